"""A window to chat in: the answer as it is made, a Stop button, and how much memory it takes.

    python examples/desktop_window.py [--model FOLDER_OR_ID] [--system-prompt TEXT] [--max-tokens 256]

Return sends, Escape stops the answer, closing the window closes the engine. The window never waits: the model is loaded
on another thread, answers are made on the engine's own, and tkinter's main loop looks now and then for what is new.
"""

from __future__ import annotations

import argparse
import sys
import tkinter as tk
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from tkinter import font, ttk

import mlx.core as mx

from arcee_mlx import DEMO_MODEL, AnswerStream, ArceeError, Engine, GenerateOptions, GenerationStats, Session

LOOK_EVERY_MS, MEMORY_EVERY_MS = 20, 250
PAPER, INK, FRAME, EDGE, FAINT = "#ffffff", "#1f2328", "#f6f8fa", "#d0d7de", "#656d76"
YOU, MODEL, WRONG = "#0969da", "#8250df", "#cf222e"


class ChatWindow:
    """The window, and what stands behind it once the model is loaded."""

    def __init__(self, model: str, system_prompt: str | None, options: GenerateOptions) -> None:
        self.system_prompt, self.options = system_prompt, options
        self.session: Session | None = None
        self.stream: AnswerStream | None = None
        self.loading = ThreadPoolExecutor(1).submit(Engine.load, model)
        self.root = tk.Tk()
        self.status, self.memory = tk.StringVar(value="Loading the model ..."), tk.StringVar()
        self._lay_out()
        self._look_for_engine()
        self._show_memory()

    def run(self) -> None:
        """Returns when the window has been closed, and the engine with it."""
        self.root.mainloop()
        if not self.loading.exception():
            self.loading.result().close()

    def send(self) -> None:
        """Sends what is typed, unless the model is loading or answering."""
        text = self.entry.get().strip()
        if not text or self.session is None or self.stream is not None:
            return
        try:
            self.stream = self.session.send(text, self.options)
        except ArceeError as error:  # what is typed stays, to be made shorter
            self._write(f"{error}\n", "error")
            return
        self.entry.delete(0, "end")
        self._write("You\n", "you")
        self._write(f"{text}\n")
        self._write("Model\n", "model")
        self.status.set("Reading ...")
        self._set_buttons()
        self._look_for_text()

    def stop(self) -> None:
        """Ends the answer before its next token; what is there stays."""
        if self.stream is not None:
            self.stream.close()

    def _look_for_engine(self) -> None:
        if not self.loading.done():
            self.root.after(LOOK_EVERY_MS, self._look_for_engine)
            return
        try:
            self.session = self.loading.result().session(self.system_prompt)
            self.status.set("Ready")
        except ArceeError as error:
            self.status.set("No model")
            self._write(f"{error}\n", "error")
        self._set_buttons()

    def _look_for_text(self) -> None:
        assert self.stream is not None
        request = self.stream.request
        try:
            while (chunk := request.next_chunk_now()) not in (None, "not yet"):
                self._write(chunk.text)
                self._show_stats(chunk.stats)
            if chunk == "not yet":
                self.root.after(LOOK_EVERY_MS, self._look_for_text)
                return
            self._write("\n")
            self._show_stats(request.result().stats, f", ended by {request.result().stop_reason}")
        except ArceeError as error:
            self._write(f"\n{error}\n", "error")
        self.stream = None
        self._set_buttons()

    def _show_stats(self, stats: GenerationStats, more: str = "") -> None:
        self.status.set(f"{stats.generation_tokens} tokens, {stats.generation_tokens_per_s:.0f} a second{more}")

    def _set_buttons(self) -> None:
        answering = self.stream is not None
        self.send_button.state(["disabled" if answering or self.session is None else "!disabled"])
        self.stop_button.state(["!disabled" if answering else "disabled"])

    def _show_memory(self) -> None:
        text = f"Memory: {mx.get_active_memory() / 1e6:,.0f} MB in use"
        if self.session is not None:
            stats = self.loading.result().stats()
            text += f", at most {stats.predicted_bytes / 1e6:,.0f} of {stats.budget_bytes / 1e6:,.0f} MB"
        self.memory.set(text)
        self.root.after(MEMORY_EVERY_MS, self._show_memory)

    def _write(self, text: str, tag: str = "text") -> None:
        was_at_end = self.page.yview()[1] == 1.0  # who has scrolled up to read is left there
        self.page.configure(state="normal")
        self.page.insert("end", text, tag)
        self.page.configure(state="disabled")
        if was_at_end:
            self.page.see("end")

    def _lay_out(self) -> None:
        self.root.title("arcee_mlx")
        self.root.geometry("720x440")
        self.root.minsize(480, 260)
        self.root.bind("<Escape>", lambda _: self.stop())
        style = ttk.Style()
        if self.root.tk.call("tk", "windowingsystem") == "x11":  # its default looks its age
            style.theme_use("clam")
            style.configure(
                ".", background=FRAME, bordercolor=EDGE, lightcolor=FRAME, darkcolor=FRAME, arrowcolor=FAINT
            )
            style.map("TButton", background=[("disabled", FRAME), ("active", EDGE)])
            style.configure("TScrollbar", troughcolor=PAPER, background=EDGE, gripcount=0)
        style.configure("TEntry", padding=5)
        style.configure("Faint.TLabel", foreground=FAINT)
        size = font.nametofont("TkDefaultFont").actual("size") + 1

        self.page = tk.Text(
            self.root, wrap="word", state="disabled", relief="flat", highlightthickness=0, padx=20, pady=12,
            background=PAPER, foreground=INK, font=("TkDefaultFont", size),
        )  # fmt: skip
        bar = ttk.Scrollbar(self.root, command=self.page.yview)
        self.page.configure(yscrollcommand=bar.set)
        for tag, colour in (("you", YOU), ("model", MODEL)):
            self.page.tag_configure(
                tag, foreground=colour, font=("TkDefaultFont", size, "bold"), spacing1=12, spacing3=3
            )
        self.page.tag_configure("error", foreground=WRONG)
        self.page.tag_configure("text", spacing2=3, spacing3=3)

        typing = ttk.Frame(self.root, padding=(12, 10, 12, 4))
        self.entry = ttk.Entry(typing, font=("TkDefaultFont", size))
        self.entry.bind("<Return>", lambda _: self.send())
        self.entry.focus_set()
        self.send_button = ttk.Button(typing, text="Send", command=self.send, state="disabled")
        self.stop_button = ttk.Button(typing, text="Stop", command=self.stop, state="disabled")
        self.entry.pack(side="left", fill="x", expand=True)
        self.send_button.pack(side="left", padx=(8, 0))
        self.stop_button.pack(side="left", padx=(8, 0))

        foot = ttk.Frame(self.root, padding=(12, 2, 12, 8))
        ttk.Label(foot, textvariable=self.status, style="Faint.TLabel").pack(side="left")
        ttk.Label(foot, textvariable=self.memory, style="Faint.TLabel").pack(side="right")

        self.root.columnconfigure(0, weight=1)
        self.root.rowconfigure(0, weight=1)  # the page grows with the window
        self.page.grid(row=0, column=0, sticky="nsew")
        bar.grid(row=0, column=1, sticky="ns")
        typing.grid(row=1, column=0, columnspan=2, sticky="ew")
        foot.grid(row=2, column=0, columnspan=2, sticky="ew")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hugging Face id (default: the demo model)")
    parser.add_argument("--system-prompt", metavar="TEXT", help="what the model is told first")
    parser.add_argument("--max-tokens", type=int, default=256, help="of one answer (default: 256)")
    args = parser.parse_args(argv)
    ChatWindow(args.model, args.system_prompt, GenerateOptions(max_tokens=args.max_tokens)).run()
    return 0


if __name__ == "__main__":
    sys.exit(main())

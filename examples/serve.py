"""Starts mlx-lm's server on our model, asks it what any OpenAI client could, and stops it.

    python examples/serve.py [--model FOLDER_OR_ID] [--prompt TEXT]

To have it stay: `python -m arcee_mlx.lm server --model FOLDER_OR_ID --port 8080`. Then, with the package openai:

    client = openai.OpenAI(base_url="http://127.0.0.1:8080/v1", api_key="none")
    messages = [{"role": "user", "content": "Tell me about the sea."}]
    answer = client.chat.completions.create(model="default_model", messages=messages)
    print(answer.choices[0].message.content)

"default_model" is the one it was started with; asked for another by name, mlx-lm's server looks for that on the hub.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from arcee_mlx import DEMO_MODEL, load

# A proxy that the environment names is not for this machine's own address.
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@contextmanager
def run_server(model: str) -> Iterator[str]:
    """Runs a server as long as the block lasts; gives its address once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # the system picks a port
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "arcee_mlx.lm", "server", "--model", model, "--port", str(port)]
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([*command, "--log-level", "WARNING"])
    try:
        while True:
            try:
                OPENER.open(f"{address}/health", timeout=5).close()
                break
            except OSError:
                if server.poll() is not None:
                    raise RuntimeError(f"the server ended with status {server.returncode}; see above") from None
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def ask(address: str, prompt: str, **options: Any) -> str:
    """Asks as OpenAI's client does: one POST of JSON."""
    body = {"model": "default_model", "messages": [{"role": "user", "content": prompt}], **options}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    with OPENER.open(request) as response:
        return json.load(response)["choices"][0]["message"]["content"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hugging Face id (default: the demo model)")
    parser.add_argument("--prompt", default="Tell me about the sea.")
    parser.add_argument("--max-tokens", type=int, default=60)
    args = parser.parse_args(argv)
    load(args.model)  # checks it, and downloads it if need be; a server without its model would keep callers waiting
    with run_server(args.model) as address:
        print(f"serving at {address}/v1", flush=True)
        answer = ask(address, args.prompt, max_tokens=args.max_tokens, temperature=0.7, top_p=0.95, seed=1)
        print(f"asked: {args.prompt}\nanswered: {answer}")
    print("stopped")
    return 0


if __name__ == "__main__":
    sys.exit(main())

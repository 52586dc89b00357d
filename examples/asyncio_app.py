"""An asyncio app: answers are streamed at once, one of them is cancelled, and the event loop is never blocked.

    python examples/asyncio_app.py [--model FOLDER_OR_ID] [--max-tokens 60]

An engine's methods may be called from any thread and any event loop. Cancelling the task that reads an answer, as a web
framework does when its client goes away, cancels the answer: the engine computes no further token of it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from arcee_mlx import DEMO_MODEL, Engine, GenerateOptions

LINE_WIDTH = 60


async def show(engine: Engine, name: str, prompt: str, options: GenerateOptions) -> None:
    """Prints a text line by line, as it is made."""
    line = prompt
    try:
        async for chunk in engine.astream(prompt, options):
            line += chunk.text.replace("\n", " ")
            if len(line) > LINE_WIDTH:
                whole_words, _, line = line.rpartition(" ")
                print(f"{name:>6} | {whole_words}", flush=True)
        print(f"{name:>6} | {line} [{chunk.stop_reason}]", flush=True)
    except asyncio.CancelledError:
        print(f"{name:>6} | {line} [cancelled]", flush=True)
        raise


async def run(model: str, max_tokens: int) -> None:
    """Two texts to their end, and one that nobody waits for any more."""
    engine = await asyncio.to_thread(Engine.load, model)  # takes as long as it takes; the loop goes on
    with engine:
        options = GenerateOptions(max_tokens=max_tokens, temp=0.7, seed=2)
        endless = GenerateOptions(max_tokens=-1, temp=0.7, seed=2)
        async with asyncio.TaskGroup() as group:
            whale = group.create_task(show(engine, "whale", "Call me Ishmael. Some years ago", endless))
            await asyncio.gather(
                show(engine, "sea", "The sea was", options), show(engine, "nation", "My fellow Americans,", options)
            )
            whale.cancel()
        stats = engine.stats()
        print(f"{stats.generated_tokens} tokens in {stats.decode_steps} steps")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hugging Face id (default: the demo model)")
    parser.add_argument("--max-tokens", type=int, default=60, help="of the two that are not cancelled (default: 60)")
    args = parser.parse_args(argv)
    asyncio.run(run(args.model, args.max_tokens))
    return 0


if __name__ == "__main__":
    sys.exit(main())

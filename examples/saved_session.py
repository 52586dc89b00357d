"""A conversation that outlives its process: saved by one, restored and continued by another.

    python examples/saved_session.py [FILE.safetensors] [--model FOLDER_OR_ID] [--say TEXT]

Where the file is there, the conversation in it goes on; where not, one begins. Run it twice. What was said before is not
computed again: its keys and values are in the file, which belongs to the model that made it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from arcee_mlx import DEMO_MODEL, Engine, GenerateOptions


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, default=Path("runs/session.safetensors"))
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hugging Face id (default: the demo model)")
    parser.add_argument("--say", default="Tell me about the sea.", metavar="TEXT")
    parser.add_argument("--max-tokens", type=int, default=60, help="of the answer (default: 60)")
    args = parser.parse_args(argv)

    with Engine.load(args.model) as engine:
        session = engine.load_session(args.file) if args.file.exists() else engine.session()
        for message in session.messages:
            print(f"{message.role}: {message.content}")
        print(f"user: {args.say}\nassistant: ", end="")
        with session.send(args.say, GenerateOptions(max_tokens=args.max_tokens, seed=1)) as answer:
            for chunk in answer:
                print(chunk.text, end="", flush=True)
        print(f"\n({chunk.stats.cached_tokens} of {chunk.stats.prompt_tokens} prompt tokens were there already)")
        args.file.parent.mkdir(parents=True, exist_ok=True)
        session.save(args.file)
        print(f"saved as {args.file}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

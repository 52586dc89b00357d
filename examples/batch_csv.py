"""Answers the prompts of a CSV file, many at once, and goes on where it was stopped.

    python examples/batch_csv.py [INPUT.csv] [OUTPUT.csv] [--model FOLDER_OR_ID] [--column prompt] [--max-tokens 60]

The output has the input's columns and an answer. Rows are read, answered and written a chunk at a time, so that files of
any length take the memory of one chunk; the same command again leaves alone what is answered. Every row has a seed of
its own, its place in the file, so that an answer does not depend on where the work was stopped.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from arcee_mlx import DEMO_MODEL, GenerateOptions, Tokenizer, generate_batch, load

ANSWER = "answer"


def keep_whole_rows(path: Path, columns: Sequence[str]) -> int:
    """Cuts off what a killed run left of its last row, and returns how many rows there are, without the header."""
    if not path.exists() or path.stat().st_size == 0:
        return 0
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        if (header := next(csv.reader(file))) != columns:
            raise SystemExit(f"{path} has the columns {header}; expected {columns}; name another output")
    rows = end = position = quotes = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            quotes += line.count(b'"')
            if line.endswith(b"\n") and quotes % 2 == 0:  # else the line ends inside a quoted cell
                rows, end = rows + 1, position
    os.truncate(path, end)
    return max(rows - 1, 0)


def build_prompt(row: Mapping[str, str], column: str, tokenizer: Tokenizer) -> list[dict[str, str]] | str:
    """A question for a model that chats; for one that does not, text to go on from."""
    return [{"role": "user", "content": row[column]}] if tokenizer.has_chat_template else row[column]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", nargs="?", type=Path, default=Path(__file__).with_name("prompts.csv"))
    parser.add_argument("output", nargs="?", type=Path, default=Path("runs/answers.csv"))
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hugging Face id (default: the demo model)")
    parser.add_argument("--column", default="prompt", help="the column with the prompts (default: prompt)")
    parser.add_argument("--max-tokens", type=int, default=60, help="of one answer (default: 60)")
    parser.add_argument("--chunk-rows", type=int, default=32, help="rows answered at once (default: 32)")
    args = parser.parse_args(argv)

    with args.input.open(encoding="utf-8-sig", newline="") as source:  # Excel writes a byte order mark
        rows = csv.DictReader(source, restval="")
        columns = list(rows.fieldnames or [])
        if args.column not in columns:
            raise SystemExit(f"{args.input} has the columns {columns}; expected {args.column!r} too; see --column")
        done = keep_whole_rows(args.output, [*columns, ANSWER])
        args.output.parent.mkdir(parents=True, exist_ok=True)
        model, tokenizer = load(args.model)
        with args.output.open("a", encoding="utf-8", newline="") as target:
            writer = csv.DictWriter(target, [*columns, ANSWER])
            if target.tell() == 0:
                writer.writeheader()
            numbered = itertools.islice(enumerate(rows), done, None)
            while chunk := list(itertools.islice(numbered, args.chunk_rows)):
                prompts = [build_prompt(row, args.column, tokenizer) for _, row in chunk]
                options = [GenerateOptions(max_tokens=args.max_tokens, seed=place) for place, _ in chunk]
                answers = generate_batch(model, tokenizer, prompts, options)
                writer.writerows(row | {ANSWER: a.text.strip()} for (_, row), a in zip(chunk, answers, strict=True))
                target.flush()
                print(f"{args.output}: {chunk[-1][0] + 1} rows", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Letters in, records out: what a Pydantic model asks for is filled in from text, and the writer's mood by one of three choices.

    pip install pydantic
    python examples/extract.py [--model FOLDER_OR_ID] [LETTER ...]

The small demo model fills in the form without understanding the letter; a chat model such as AFM-4.5B reads it, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, Field

from arcee_mlx import DEMO_MODEL, Engine, GenerateOptions, IncompleteAnswerError

LETTERS = [
    "My parcel of 12 May has not come, and your shop does not answer. I want my 40 dollars back. Ann Lee, Boston"
]
MOODS = ("angry", "patient", "pleased")


class Complaint(BaseModel):
    """What is kept of a letter. The limits are enforced while the answer is written."""

    name: str = Field(max_length=30, pattern="^[A-Z][A-Za-z .]*$")
    topic: Literal["delivery", "payment", "quality"]
    amount: int | None = Field(ge=0, le=10_000)
    wants: list[Literal["money back", "an apology", "another one"]] = Field(min_length=1, max_length=3)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hugging Face id (default: the demo model)")
    parser.add_argument("letters", nargs="*", default=LETTERS, metavar="LETTER", help="texts to read")
    args = parser.parse_args(argv)

    record = GenerateOptions(schema=Complaint, max_tokens=200, temp=0)
    mood = GenerateOptions(choices=MOODS, temp=0)
    with Engine.load(args.model) as engine:
        for letter in args.letters:
            # Both at once: constrained and free requests share a batch.
            asked = engine.submit(f"Letter: {letter}\nThe letter as JSON: ", record)
            felt = engine.submit(f"Letter: {letter}\nThe writer is ", mood)
            try:
                complaint: Complaint = asked.result().parsed
            except IncompleteAnswerError as error:
                print(f"not filled in to the end: {error.text}", file=sys.stderr)
                return 1
            print(f"{complaint!r}; {felt.result().text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

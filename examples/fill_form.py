"""A form, filled in field after field: choices, patterns and short texts, each field seeing those before it.

    python examples/fill_form.py [--model FOLDER_OR_ID] [REPORT]

The small demo model fills in the form without understanding the report; a chat model such as AFM-4.5B reads it, too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from arcee_mlx import DEMO_MODEL, GenerateOptions, cache_prompt, generate, load

REPORT = "At ten past nine a man left the harbour in our small blue boat. He wore a grey coat. Nobody was hurt."
FIELDS = {  # what is asked, and what may be answered
    "Kind of event": GenerateOptions(choices=("theft", "accident", "fire", "other")),
    "Time": GenerateOptions(regex=r"([01]\d|2[0-3]):[0-5]\d"),
    "Anyone hurt": GenerateOptions(choices=("yes", "no", "not known")),
    "Police report": GenerateOptions(regex=r"none|[A-Z]{2}-\d{4}"),
    "In a few words": GenerateOptions(regex=r"[A-Z][a-z]*( [a-z]{1,12}){1,7}\."),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hugging Face id (default: the demo model)")
    parser.add_argument("report", nargs="?", default=REPORT, metavar="REPORT", help="text to read")
    args = parser.parse_args(argv)

    model, tokenizer = load(args.model)
    form = f"Report: {args.report}\n\nThe report as a form.\n"
    read = cache_prompt(model, tokenizer, form)  # once, for all fields
    for field, options in FIELDS.items():
        form += f"{field}: "
        answer = generate(model, tokenizer, form, replace(options, temp=0), prompt_cache=read)
        print(f"{field:15s} {answer}")
        form += f"{answer}\n"  # the next field is to fit this one
    return 0


if __name__ == "__main__":
    sys.exit(main())

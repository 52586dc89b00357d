"""`arcee-mlx tag`: the labelled pieces of each line, as JSON lines."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, get_args

from ..generate.arguments import add_model_arguments
from ..model.heads import ArceeForTokenClassification
from .lines import Line, answer_lines, check_files, tokenize_lines
from .lines import add_arguments as add_line_arguments
from .opening import open_classifier
from .tag import Aggregation, tag_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser; `run` takes what it parses."""
    add_line_arguments(parser, batch_size=32)
    parser.add_argument(
        "--aggregation",
        choices=get_args(Aggregation),
        default="simple",
        help="how tokens become entities: each alone, joined by label, or as words whose first, mean or surest token "
        "gives the label (%(default)s)",
    )
    parser.add_argument(
        "--ignore-labels", nargs="*", default=["O"], metavar="LABEL", help="leave out what is so labelled (O)"
    )
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Tags lines and prints; returns the exit status.

    Raises:
        ArceeError: a line or an option is not what it should be, or the checkpoint cannot be used.
    """
    check_files(args)
    model, tokenizer = open_classifier(args, ArceeForTokenClassification)

    def answer(lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
        rows = tokenize_lines(args, tokenizer, model.config, lines)
        results = tag_rows(
            model,
            tokenizer,
            rows,
            aggregation=args.aggregation,
            ignore_labels=args.ignore_labels,
            batch_size=args.batch_size,
        )
        for entities in results:
            yield {"entities": [asdict(entity) for entity in entities]}

    return answer_lines(args, answer)

"""`arcee-mlx classify`: the label of each line, as JSON lines."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, get_args

from ..errors import InputError
from ..generate.arguments import add_model_arguments
from ..model.heads import ArceeForSequenceClassification
from .classify import ScoreFunction, check_options, classify_rows
from .lines import Line, answer_lines, check_files, tokenize_lines
from .lines import add_arguments as add_line_arguments
from .opening import open_classifier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser; `run` takes what it parses."""
    add_line_arguments(parser, batch_size=32)
    parser.add_argument("--pair-field", metavar="NAME", help="a second text, to go with the one in --field")
    parser.add_argument("--top-k", type=int, metavar="N", help="labels to give, the best first (default: all)")
    parser.add_argument(
        "--function-to-apply",
        choices=get_args(ScoreFunction),
        help="what makes scores of logits (default: by the config's problem type)",
    )
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Classifies lines and prints; returns the exit status.

    Raises:
        ArceeError: a line or an option is not what it should be, or the checkpoint cannot be used.
    """
    check_files(args)
    check_options(args.top_k, args.function_to_apply)
    if args.pair_field is not None and args.field is None:
        raise InputError("--pair-field without --field; expected both, of lines that are JSON objects; name the first")
    model, tokenizer = open_classifier(args, ArceeForSequenceClassification)

    def answer(lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
        rows = tokenize_lines(args, tokenizer, model.config, lines, pair_field=args.pair_field)
        results = classify_rows(
            model, rows, top_k=args.top_k, function_to_apply=args.function_to_apply, batch_size=args.batch_size
        )
        return map(asdict, results)

    return answer_lines(args, answer)

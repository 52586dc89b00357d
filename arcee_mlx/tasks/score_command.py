"""`arcee-mlx score`: the log-likelihood of each line, as JSON lines."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..generate.arguments import add_model_arguments
from ..generate.opening import open_model
from .lines import Line, answer_lines, check_files, tokenize_lines
from .lines import add_arguments as add_line_arguments
from .score import score_rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser; `run` takes what it parses."""
    add_line_arguments(parser, batch_size=8)
    parser.add_argument("--tokens", action="store_true", help="each token's log-likelihood and place in the text, too")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Scores lines and prints; returns the exit status.

    Raises:
        ArceeError: a line or an option is not what it should be, or the checkpoint cannot be used.
    """
    check_files(args)
    model, tokenizer = open_model(args)

    def answer(lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
        rows = tokenize_lines(args, tokenizer, model.config, lines)
        for result in score_rows(model, rows, batch_size=args.batch_size):
            values: dict[str, Any] = {"logprob": result.logprob, "perplexity": result.perplexity}
            if args.tokens:
                yield values | {"tokens": [asdict(token) for token in result.tokens]}
            else:
                yield values | {"token_count": len(result.tokens)}

    return answer_lines(args, answer)

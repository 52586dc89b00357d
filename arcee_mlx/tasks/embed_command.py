"""`arcee-mlx embed`: a vector for each line, as JSON lines."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np

from ..checkpoint.hub import resolve_folder
from ..checkpoint.loading import load_model
from ..checkpoint.tokenizer import read_tokenizer
from ..generate.arguments import add_model_arguments
from ..generate.opening import name_model
from ..model.decoder import ArceeModel
from .embed import Pooling, embed_rows
from .lines import Line, answer_lines, check_files, tokenize_lines
from .lines import add_arguments as add_line_arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser; `run` takes what it parses."""
    add_line_arguments(parser, batch_size=32)
    parser.add_argument(
        "--pooling",
        choices=get_args(Pooling),
        default="mean",
        help="of all tokens, the last one, or an end-of-text token put behind each text (%(default)s)",
    )
    parser.add_argument("--no-normalize", action="store_true", help="leave the vectors as long as they are")
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Embeds lines and prints; returns the exit status.

    Raises:
        ArceeError: a line or an option is not what it should be, or the checkpoint cannot be used.
    """
    check_files(args)
    folder = resolve_folder(name_model(args), revision=args.revision)
    tokenizer = read_tokenizer(folder)
    model = load_model(folder, ArceeModel, args.dtype, adapter_path=args.adapter_path)  # the head stays on the disk

    def answer(lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
        rows = tokenize_lines(args, tokenizer, model.config, lines, add_eos=args.pooling == "eos")
        vectors = embed_rows(
            model, rows, pooling=args.pooling, normalize=not args.no_normalize, batch_size=args.batch_size
        )
        for vector in vectors:
            yield {"embedding": [float(np.format_float_positional(x)) for x in vector]}  # no digits a float32 has not

    return answer_lines(args, answer)

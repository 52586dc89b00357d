"""Texts from lines or JSON lines, and answers as JSON lines, in the order of the input and as soon as they are there."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from ..checkpoint.tokenizer import Tokenizer
from ..errors import InputError
from ..model.config import ArceeConfig
from .batches import TokenizedText, tokenize

_BATCHES_TOGETHER = 16  # sorted by length together; a batch of one comes at once
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Line:
    """A line of the input.

    Attributes:
        name: file and number, for errors.
        values: the JSON object that it holds, or {"text": the line}.
        text: to work on.
    """

    name: str
    values: Mapping[str, Any]
    text: str


def add_arguments(parser: argparse.ArgumentParser, *, batch_size: int, cuts: bool = True) -> None:
    """Adds what says which texts, and how many at once.

    Args:
        batch_size: the default.
        cuts: whether a text that is too long can be cut.
    """
    texts = parser.add_argument_group("texts")
    texts.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="a text a line, in UTF-8; '-' or none is standard input"
    )
    texts.add_argument("--field", metavar="NAME", help="lines are JSON objects, the text is in this field of each")
    texts.add_argument(
        "--batch-size",
        type=int,
        default=batch_size,
        metavar="N",
        help="texts at once; 1 answers line by line (%(default)s)",
    )
    if cuts:
        texts.add_argument(
            "--max-length", type=int, metavar="N", help="tokens of a text at most (default: the model's positions)"
        )
        texts.add_argument(
            "--truncate", action="store_true", help="cut longer texts at their end instead of refusing them"
        )
    parser.add_argument("--quiet", action="store_true", help="no progress or notes on standard error")


def check_files(args: argparse.Namespace) -> None:
    """Stops before a model is loaded for nothing.

    Raises:
        InputError: a file is not there, or the batch size is less than 1.
    """
    if args.batch_size < 1:
        raise InputError(f"--batch-size is {args.batch_size}; expected at least 1")
    for file in args.files:
        if str(file) != "-" and not file.exists():
            raise InputError(f"{file}: no such file; expected texts, one a line; check the path")


def answer_lines(args: argparse.Namespace, answer: Callable[[Sequence[Line]], Iterable[Mapping[str, Any]]]) -> int:
    """Prints a JSON object for each line: what was in it, then what the answer adds; returns the exit status.

    Args:
        answer: of some lines, one a line in their order.

    Raises:
        InputError: a file cannot be read, or a line is not what it should be; names it.
    """
    from tqdm import tqdm

    lines = _read_lines(args)
    size = 1 if args.batch_size == 1 else _BATCHES_TOGETHER * args.batch_size
    with tqdm(unit="text", disable=True if args.quiet or sys.stdout.isatty() else None, leave=False) as bar:
        while some := list(islice(lines, size)):
            for line, values in zip(some, answer(some), strict=True):
                if both := line.values.keys() & values.keys():
                    raise InputError(
                        f"{line.name}: has a field {min(both)!r} already; expected room for the answer; rename it"
                    )
                print(json.dumps({**line.values, **values}, ensure_ascii=False, allow_nan=False))
            sys.stdout.flush()
            bar.update(len(some))
    return 0


def tokenize_lines(
    args: argparse.Namespace,
    tokenizer: Tokenizer,
    config: ArceeConfig,
    lines: Sequence[Line],
    *,
    add_eos: bool = False,
    pair_field: str | None = None,
) -> list[TokenizedText]:
    """The texts of lines as tokens, as the arguments ask for; see `tokenize`. Errors name the line.

    Args:
        pair_field: of the lines, with a second text that goes with the first; None for no pairs.
    """
    return tokenize(
        tokenizer,
        config,
        [line.text if pair_field is None else (line.text, read_field(line, pair_field)) for line in lines],
        names=[line.name for line in lines],
        max_length=args.max_length,
        truncate=args.truncate,
        add_eos=add_eos,
    )


def read_field(line: Line, field: str) -> str:
    """Another text of a line.

    Raises:
        InputError: it has none of this name.
    """
    text = line.values.get(field)
    if not isinstance(text, str):
        raise InputError(f"{line.name}: expected a text in {field!r}, too; name another field, or repair it")
    return text


def _read_lines(args: argparse.Namespace) -> Iterator[Line]:
    for file in args.files or [Path("-")]:
        if str(file) == "-":
            if sys.stdin.isatty() and not args.quiet:
                print("Reading texts from standard input, one a line; Ctrl-D ends them.", file=sys.stderr)
            yield from _split(sys.stdin.buffer, "standard input", args.field)
            continue
        try:
            with open(file, "rb") as opened:
                yield from _split(opened, str(file), args.field)
        except OSError as error:
            raise InputError(f"{file}: cannot be read ({error.strerror}); expected texts, one a line") from error


def _split(file: BinaryIO, name: str, field: str | None) -> Iterator[Line]:
    for number, content in enumerate(file, start=1):
        place = f"{name}, line {number}"
        content = content.removeprefix(_BYTE_ORDER_MARK) if number == 1 else content
        try:
            line = content.decode("utf-8").removesuffix("\n").removesuffix("\r")
        except UnicodeDecodeError as error:
            raise InputError(
                f"{place}: is not UTF-8 at byte {error.start}; expected texts in UTF-8; save it so"
            ) from None
        yield Line(place, {"text": line}, line) if field is None else _parse(line, place, field)


def _parse(line: str, place: str, field: str) -> Line:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{place}: is not JSON ({error}); expected an object with {field!r}; repair it") from None
    if not isinstance(values, dict) or not isinstance(values.get(field), str):
        raise InputError(
            f"{place}: expected a JSON object with a text in {field!r}; name another --field, or repair it"
        )
    return Line(place, values, values[field])

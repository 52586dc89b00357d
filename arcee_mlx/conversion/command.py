"""`arcee-mlx convert`, which convert/hf_to_mlx.py is too: mlx_lm.convert's options, each one meant or refused by name."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..errors import InputError
from ..model.config import DTYPES
from .recipes import BITS, GROUP_SIZES, MODES, Quantization, Recipe
from .report import summarize
from .run import convert

DESCRIPTION = "Convert a Hugging Face checkpoint of Arcee's dense decoder to MLX, by default to 4 bits in groups of 64."
_REFUSED = {
    ("-d", "--dequantize"): "convert the original float checkpoint instead",
    ("--quant-predicate",): "all layers get the same bits; choose them with --q-bits",
    ("--upload-repo",): "upload the folder afterwards with `hf upload REPO FOLDER`",
    ("--trust-remote-code",): "code of a checkpoint is never run, and this model needs none",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser; `run` takes what it parses."""
    parser.add_argument("--hf-path", "--model", required=True, metavar="PATH", help="folder or Hugging Face Hub id")
    parser.add_argument("--mlx-path", default="mlx_model", metavar="FOLDER", help="new folder (default: %(default)s)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "-q", "--quantize", action="store_true", default=True, help="quantize the weights (the default)"
    )
    either.add_argument("--no-quantize", dest="quantize", action="store_false", help="keep all weights floats")
    parser.add_argument("--q-bits", type=int, choices=BITS, help="bits a weight (default: 4)")
    parser.add_argument(
        "--q-group-size", type=int, choices=GROUP_SIZES, help="weights that share a scale (default: 64)"
    )
    parser.add_argument("--q-mode", choices=MODES, help="quantization mode (default: affine)")
    parser.add_argument("--dtype", choices=DTYPES, help="of all that is not quantized (default: the checkpoint's own)")
    parser.add_argument("--force", action="store_true", help="replace the converted model that is at --mlx-path")
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="keep weights that are Inf or NaN, which are refused otherwise"
    )
    for names, advice in _REFUSED.items():
        parser.add_argument(*names, action=_Refuse, nargs="*", help=argparse.SUPPRESS, advice=advice)


def run(arguments: argparse.Namespace) -> int:
    """Converts; the new folder's path is all that goes to standard output. Returns the exit status.

    Raises:
        ArceeError: as `convert`.
    """
    options = {"bits": arguments.q_bits, "group_size": arguments.q_group_size, "mode": arguments.q_mode}
    given = {name: value for name, value in options.items() if value is not None}
    if given and not arguments.quantize:
        names = ", ".join(f"--q-{name.replace('_', '-')}" for name in given)
        raise InputError(f"--no-quantize came with {names}; expected one or the other; leave one out")
    recipe = Recipe(quantization=Quantization(**given) if arguments.quantize else None, dtype=arguments.dtype)
    conversion = convert(
        arguments.hf_path,
        arguments.mlx_path,
        recipe,
        revision=arguments.revision,
        overwrite=arguments.force,
        allow_nonfinite=arguments.allow_nonfinite,
        progress=True,
    )
    print(summarize(conversion), file=sys.stderr)
    print(conversion.folder)
    return 0


class _Refuse(argparse.Action):
    """An option of mlx_lm.convert that is not offered here: refused by name rather than ignored."""

    def __init__(self, *args: Any, advice: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._advice = advice

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        parser.error(f"{option_string} is not offered; {self._advice}")

"""One conversion in a process of its own, ours or mlx-lm's at the same bits, and what it took.

`convert_in_process` starts `python -m arcee_mlx.bench.convert_process CONVERTER SOURCE TARGET`, which converts and
prints an `Effort` as the last line, in JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from .. import upstream
from ..checkpoint.quantization import Quantization
from ..conversion.result import peak_memory_bytes
from ..errors import ArceeError, InputError
from ..model.config import LAYOUTS
from ..program import run_program
from . import plain_port

Converter = Literal["arcee_mlx", "mlx_lm"]
CONVERTERS: tuple[Converter, ...] = ("arcee_mlx", "mlx_lm")
_NAME = "arcee_mlx.bench.convert_process"


@dataclass(frozen=True)
class Effort:
    """What a conversion took.

    Attributes:
        seconds: of the conversion; importing what does it is left out, in which mlx_lm takes longer.
        peak_bytes: the most memory its process had resident, imports included.
    """

    seconds: float
    peak_bytes: int


def convert_in_process(
    converter: Converter,
    source: Path,
    target: Path,
    *,
    calibrate: str | bool | None = None,
    recipe: str | None = None,
    layout: str | None = None,
) -> Effort:
    """Converts a checkpoint folder to 4 bits, each converter's default.

    Args:
        converter: whose.
        source: folder of a float checkpoint.
        target: new folder.
        calibrate: of "arcee_mlx" alone: True, or the path of a calibration text.
        recipe: of "arcee_mlx" alone: name or file; by default what the convert command takes.
        layout: of "arcee_mlx" alone: of down projections; by default the recipe's, else standard, as mlx_lm's are.

    Raises:
        ArceeError: the conversion failed; the message ends with what it said.
    """
    # -P and PYTHONPATH: the child runs this very package, whatever else lies in the current folder.
    command = [sys.executable, "-P", "-m", _NAME, converter, str(source), str(target)]
    if calibrate is not None:
        command += ["--calibrate"] if calibrate is True else ["--calibrate", str(calibrate)]
    if recipe is not None:
        command += ["--recipe", recipe]
    if layout is not None:
        command += ["--layout", layout]
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ArceeError(
            f"{converter} converting {source}: exit status {done.returncode}; expected 0; it said: "
            f"{done.stderr.strip()[-1000:]}"
        )
    return Effort(**json.loads(done.stdout.splitlines()[-1]))


def _import_ours(args: argparse.Namespace) -> Callable[..., object]:
    from ..conversion.recipe_file import read_recipe
    from ..conversion.recipes import CALIBRATED_RECIPE, Recipe, override
    from ..conversion.run import convert

    options: dict[str, Any] = {} if args.calibrate is None else {"calibrate": args.calibrate}
    name = args.recipe or (CALIBRATED_RECIPE if options else None)
    recipe = Recipe() if name is None else read_recipe(name)
    return partial(convert, recipe=override(recipe, layout=args.layout or recipe.layout or "standard"), **options)


def _import_mlx_lm(args: argparse.Namespace) -> Callable[..., object]:
    """mlx_lm's own function and code, but for Arcee, of which it has no model, and a tokenizer that may not be there."""
    if any(option is not None for option in (args.calibrate, args.recipe, args.layout)):
        raise InputError(
            "--calibrate, --recipe or --layout came with mlx_lm; expected arcee_mlx, which alone has them; leave them out"
        )
    plain_port.register()
    if not (args.source / "tokenizer.json").exists():
        utils: Any = upstream.mlx_lm_module("utils")
        utils.load_tokenizer = lambda *_args, **_options: _NoTokenizer()
    default = Quantization()
    convert = upstream.mlx_lm_module("convert").convert
    return partial(convert, quantize=True, q_bits=default.bits, q_group_size=default.group_size)


class _NoTokenizer:
    """All that mlx_lm's convert asks of a tokenizer."""

    def save_pretrained(self, folder: Path) -> None:
        """Writes nothing."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("converter", choices=CONVERTERS)
    parser.add_argument("source", type=Path, help="checkpoint folder")
    parser.add_argument("target", type=Path, help="new folder")
    parser.add_argument("--calibrate", nargs="?", const=True, metavar="TEXT", help="as of arcee-mlx convert")
    parser.add_argument("--recipe", metavar="NAME|FILE", help="as of arcee-mlx convert")
    parser.add_argument("--layout", choices=LAYOUTS, help="of down projections (default: the recipe's, else standard)")


def _run(args: argparse.Namespace) -> int:
    convert = {"arcee_mlx": _import_ours, "mlx_lm": _import_mlx_lm}[args.converter](args)
    started_s = time.perf_counter()
    convert(str(args.source), str(args.target))
    seconds = time.perf_counter() - started_s
    print(json.dumps(asdict(Effort(seconds, peak_memory_bytes()))))
    return 0


if __name__ == "__main__":
    sys.exit(run_program(f"python -m {_NAME}", "Convert once and say what it took.", _add_arguments, _run))

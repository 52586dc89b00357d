"""`arcee-mlx convert`, which convert/hf_to_mlx.py is too: mlx_lm.convert's options, each one meant or refused by name."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ..checkpoint.quantization import MODES, Quantization
from ..errors import CheckpointError, InputError
from ..model.config import DTYPES, LAYOUTS
from .calibrate import check_calibration
from .dry_run import describe_plan, plan_to_dict
from .prepare import check_space, plan_conversion
from .progress import Bar, JsonLines, Quiet
from .recipes import BITS, CALIBRATED_RECIPE, GROUP_SIZES, Recipe, list_recipes, override
from .report import summarize
from .run import NUM_SAMPLES, SEQUENCE_LENGTH, convert
from .work_folder import can_be_resumed, measure_disk

DESCRIPTION = "Convert a Hugging Face checkpoint of Arcee's dense decoder to MLX, by default to 4 bits in groups of 64."
_REFUSED = {
    ("-d", "--dequantize"): "convert the original float checkpoint instead",
    ("--trust-remote-code",): "code of a checkpoint is never run, and this model needs none",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser; `run` takes what it parses."""
    parser.add_argument("--hf-path", "--model", required=True, metavar="PATH", help="folder or Hugging Face Hub id")
    parser.add_argument("--mlx-path", default="mlx_model", metavar="FOLDER", help="new folder (default: %(default)s)")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    _add_recipe_arguments(parser)
    parser.add_argument(
        "--calibrate", nargs="?", const=True, default=False, metavar="TEXT",
        help="round with error feedback on a text, the package's own or this file (default recipe then: arcee_4)",
    )  # fmt: skip
    parser.add_argument(
        "--num-samples", type=int, metavar="N", help=f"sequences to calibrate on (default: {NUM_SAMPLES})"
    )
    parser.add_argument("--sequence-length", type=int, metavar="N", help=f"tokens of each (default: {SEQUENCE_LENGTH})")
    parser.add_argument(
        "--verify", nargs="?", const=True, default=False, metavar="TEXT",
        help="compare with the source on a text, the package's own or this file; --calibrate and --upload-repo imply it",
    )  # fmt: skip
    parser.add_argument("--upload-repo", metavar="USER/NAME", help="upload the result to the Hugging Face Hub")
    parser.add_argument("--force", action="store_true", help="replace the converted model that is at --mlx-path")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="keep weights that are Inf or NaN, which are refused otherwise"
    )
    parser.add_argument("--fold-layers", action="store_true", help="with --dry-run: show equal layers as one")
    says = parser.add_mutually_exclusive_group()
    says.add_argument("--quiet", action="store_true", help="print nothing but the new folder, and errors")
    says.add_argument(
        "--json", action="store_true", help="print the result, or the plan, as a JSON object, and progress as JSON lines on "
        "standard error",
    )  # fmt: skip
    for names, advice in _REFUSED.items():
        parser.add_argument(*names, action=_Refuse, nargs="*", help=argparse.SUPPRESS, advice=advice)


def run(arguments: argparse.Namespace) -> int:
    """Converts; the new folder's path is all that goes to standard output, or the plan of a dry run.

    Returns:
        the exit status.

    Raises:
        ArceeError: as `convert`.
    """
    recipe = choose_recipe(arguments)
    if arguments.fold_layers and not arguments.dry_run:
        raise InputError("--fold-layers came without --dry-run; expected both; add --dry-run, or leave it out")
    for option, value in (("--num-samples", arguments.num_samples), ("--sequence-length", arguments.sequence_length)):
        if value is not None and arguments.calibrate is False:
            raise InputError(f"{option} came without --calibrate; expected both; add --calibrate, or leave it out")
        if value is not None and value < 1:
            raise InputError(f"{option} is {value}; expected at least 1; choose a larger number")
    reporter = Quiet() if arguments.quiet else JsonLines() if arguments.json else Bar()
    if arguments.dry_run:
        return _show_plan(arguments, recipe, reporter)
    try:
        conversion = convert(
            arguments.hf_path,
            arguments.mlx_path,
            recipe,
            revision=arguments.revision,
            overwrite=arguments.force,
            allow_nonfinite=arguments.allow_nonfinite,
            calibrate=arguments.calibrate,
            num_samples=arguments.num_samples or NUM_SAMPLES,
            sequence_length=arguments.sequence_length or SEQUENCE_LENGTH,
            verify=arguments.verify,
            upload_repo=arguments.upload_repo,
            reporter=reporter,
        )
    except (KeyboardInterrupt, CheckpointError) as error:
        kept_bytes = measure_disk(Path(arguments.mlx_path).expanduser().absolute())
        if kept_bytes and can_be_resumed(error):
            print(
                f"stopped; {kept_bytes / 1e6:,.1f} MB are kept, and the same command goes on from there",
                file=sys.stderr,
            )
        raise
    if arguments.json:
        print(json.dumps(conversion.to_dict(), indent=2, ensure_ascii=False))
        return 0
    if not arguments.quiet:
        print(summarize(conversion), file=sys.stderr)
    print(conversion.folder)
    return 0


def _show_plan(arguments: argparse.Namespace, recipe: Recipe, reporter: Quiet) -> int:
    planned = plan_conversion(
        arguments.hf_path,
        arguments.mlx_path,
        recipe,
        revision=arguments.revision,
        overwrite=arguments.force,
        shows_downloads=reporter.shows_downloads,
    )
    tokens = 0
    if arguments.calibrate is not False:
        check_calibration(planned, allow_nonfinite=arguments.allow_nonfinite)
        tokens = (arguments.num_samples or NUM_SAMPLES) * (arguments.sequence_length or SEQUENCE_LENGTH)
    if arguments.json:
        print(json.dumps(plan_to_dict(planned, calibration_tokens=tokens), indent=2, ensure_ascii=False))
    else:
        print(describe_plan(planned, fold_layers=arguments.fold_layers, calibration_tokens=tokens))
    check_space(planned)
    return 0


def choose_recipe(arguments: argparse.Namespace) -> Recipe:
    """The recipe that the options name, with what they change of it.

    Raises:
        InputError: there is no such recipe, options contradict each other or it, or a value is out of range.
    """
    values = {name: getattr(arguments, f"q_{name}") for name in ("bits", "group_size", "mode")}
    given = [f"--q-{name.replace('_', '-')}" for name, value in values.items() if value is not None]
    recipe, named = Recipe(quantization=None if arguments.quantize is False else Quantization()), []
    name = arguments.recipe
    if name is not None:
        named = [f"--recipe {name}"]
    elif arguments.calibrate is not False and arguments.quantize is not False and not given:
        name = CALIBRATED_RECIPE
    if name is not None:
        from .recipe_file import read_recipe  # YAML is not loaded without need

        recipe = read_recipe(name)
    if arguments.quantize is False and (rivals := given + (named if recipe.quantizes else [])):
        raise InputError(f"--no-quantize came with {', '.join(rivals)}; expected one or the other; leave one out")
    if arguments.quantize and not recipe.quantizes:
        given.insert(0, "--quantize")
    if named and recipe.quantization is None and given:
        raise InputError(
            f"{named[0]} came with {', '.join(given)}; expected one or the other, as the recipe's default is to quantize "
            f"nothing; leave one out"
        )
    return override(recipe, **values, dtype=arguments.dtype, layout=arguments.layout)


def _add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", "--quant-predicate", metavar="NAME|FILE",
        help=f"which layer gets which form: {', '.join(list_recipes())}, or a YAML file (default: 4bit)",
    )  # fmt: skip
    either = parser.add_mutually_exclusive_group()
    either.add_argument("-q", "--quantize", action="store_const", const=True, help="quantize the weights (the default)")
    either.add_argument(
        "--no-quantize", dest="quantize", action="store_const", const=False, help="keep all weights floats"
    )
    parser.add_argument("--q-bits", type=int, choices=BITS, help="bits a weight (default: the recipe's, or the mode's)")
    parser.add_argument(
        "--q-group-size", type=int, choices=GROUP_SIZES, help="weights that share a scale (default: so)"
    )
    parser.add_argument("--q-mode", choices=tuple(MODES), help="quantization mode (default: affine)")
    parser.add_argument("--dtype", choices=DTYPES, help="of all that is not quantized (default: the checkpoint's own)")
    parser.add_argument(
        "--layout",
        choices=LAYOUTS,
        help="of down projections (default: by_neuron where weights are quantized, else standard)",
    )


class _Refuse(argparse.Action):
    """An option of mlx_lm.convert that is not offered here: refused by name rather than ignored."""

    def __init__(self, *args: Any, advice: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._advice = advice

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None
    ) -> None:
        parser.error(f"{option_string} is not offered; {self._advice}")

"""mlx-lm's commands on Arcee checkpoints; what they would change in the process is put back."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .. import upstream
from ..checkpoint.hub import resolve_folder
from ..checkpoint.names import check_generates
from ..checkpoint.opening import open_model
from ..errors import InputError
from ..model.config import read_config
from ..program import run_reporting
from .awq import refuse_by_neuron
from .dequantize import standard_when_dequantized
from .training import resumable_lora

# Commands -> the options that say which model they work on. Without one, mlx-lm would download a model of its own choice.
COMMANDS: dict[str, tuple[str, ...]] = {
    "awq": ("--model", "-m"),
    "benchmark": ("--model",),
    "cache_prompt": ("--model",),
    "chat": ("--model",),
    "convert": ("--model", "--hf-path"),
    "dwq": ("--model", "-m"),
    "dynamic_quant": ("--model", "-m"),
    "evaluate": ("--model",),
    "fuse": ("--model",),
    "generate": ("--model",),
    "gptq": ("--model", "-m"),
    "lora": ("--model", "--config", "-c"),
    "perplexity": ("--model",),
    "server": ("--model",),
}
# Commands -> a package they import and mlx-lm does not require, and the extra of mlx-lm that brings it.
_PACKAGES = {"dwq": ("datasets", "train"), "evaluate": ("lm_eval", "evaluate"), "perplexity": ("datasets", "train")}
NAME = "python -m arcee_mlx.lm"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one of mlx-lm's commands and returns the exit status; argparse's own exits pass through."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {NAME} COMMAND ...\n\nmlx-lm's commands on Arcee models: {', '.join(COMMANDS)}.")
        print("COMMAND --help lists a command's options, which are mlx-lm's; lora has --resume beside them.")
        return 0 if arguments else 2
    return run_reporting(lambda: run_command(arguments[0], arguments[1:]))


def run_command(command: str, arguments: list[str]) -> int:
    """Runs a command, given its own arguments, and returns 0.

    Raises:
        InputError: there is no such command, it names no model or one it cannot work on, or a package that it needs is not
            installed.
    """
    if command not in COMMANDS:
        raise InputError(f"command is {command!r}; expected one of {', '.join(COMMANDS)}; try {NAME} --help")
    given = {argument.split("=")[0] for argument in arguments}
    if not given & {*COMMANDS[command], "-h", "--help"}:
        raise InputError(f"{command} names no model; expected {' or '.join(COMMANDS[command])} FOLDER_OR_ID; add it")
    package, extra = _PACKAGES.get(command, (None, None))
    if package is not None and find_spec(package) is None:
        raise InputError(f"{package} is not installed; expected it for {command}; pip install 'mlx-lm[{extra}]'")
    if command == "server":
        _check_model(arguments)
    _check_weights(command, arguments)
    with _own_process(command, arguments), _extend(command):
        upstream.mlx_lm_module("cli").main()
    return 0


def _check_model(arguments: list[str]) -> None:
    """Refuses a model that cannot be loaded: mlx-lm's server would start, and its first caller wait for ever."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model")
    if model := parser.parse_known_args(arguments)[0].model:
        check_generates(open_model(resolve_folder(model)).config)


def _check_weights(command: str, arguments: list[str]) -> None:
    """Refuses what mlx-lm cannot do to the weights as they are stored, before it downloads data or trains."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--model", "-m", "--hf-path")
    parser.add_argument("--fine-tune-type")
    parser.add_argument("--config", "-c")
    given = parser.parse_known_args(arguments)[0]
    values = _read_yaml(given.config) if command == "lora" and given.config else {}
    model = given.model or values.get("model")
    kind = (given.fine_tune_type or values.get("fine_tune_type")) if command == "lora" else None
    tool = command if command in ("awq", "dwq", "dynamic_quant", "gptq") else ""
    if kind == "dora":
        tool = "lora --fine-tune-type dora"
    if model and (tool or kind == "full"):
        config = read_config(resolve_folder(model))
        if tool:
            refuse_by_neuron(tool, config)
        elif config.quantization is not None:
            raise InputError(
                f"lora --fine-tune-type full on {config.source}, whose weights are quantized, so that they have no "
                f"gradient; expected float weights; take --fine-tune-type lora, or unpack it first: "
                f"python -m arcee_mlx.lm convert -d"
            )


def _read_yaml(path: str) -> Mapping[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # mlx-lm reads it again, and says what is wrong with it
    return values if isinstance(values, dict) else {}


def _extend(command: str) -> AbstractContextManager[None]:
    """What we add to a command while it runs."""
    if command == "lora":
        return resumable_lora()
    return standard_when_dequantized(command) if command in ("convert", "fuse") else nullcontext()


@contextmanager
def _own_process(command: str, arguments: list[str]) -> Iterator[None]:
    """Gives a command its sys.argv, and puts that and the environment back after."""
    argv, environment = sys.argv, dict(os.environ)
    sys.argv = [f"{NAME} {command}", command, *arguments]
    try:
        yield
    finally:
        sys.argv = argv
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)

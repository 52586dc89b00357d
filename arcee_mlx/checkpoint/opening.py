"""From a folder to a model laid out for it: config, names and shapes checked against each other; no tensor is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import upstream
from ..errors import CheckpointError, ConfigError, InputError
from ..model.config import ArceeConfig, read_config
from ..model.decoder import ArceeForCausalLM
from .adapter_files import Adapter
from .files import FLOATS, Checkpoint, TensorEntry, open_checkpoint, same_content
from .names import CLASSES, TASK_HEADS, Model, choose_class, layout_of, map_names, named_class, tie_names
from .quantization import read_quantization
from .shards import INDEX_FILE


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint that has been checked but not read.

    Attributes:
        names: the model's key -> the file's key.
        model: its layers, quantized where the file is; the weights are not the checkpoint's.
        new: keys of the head that the file, of another class, does not have: the model's own values are to stay.
        adapter: what `measure` is to read into the weights.
    """

    config: ArceeConfig
    checkpoint: Checkpoint
    names: Mapping[str, str]
    model: Model
    new: Sequence[str] = ()
    adapter: Adapter | None = None


@dataclass(frozen=True)
class Misfits:
    """Where a checkpoint's tensors are not those of the model that its config describes.

    Attributes:
        missing: the model's key -> the shape it needs, sorted.
        unexpected: tensors that the model has no place for, sorted.
        wrong: the file's key -> what is wrong with its shape or dtype, in words.
    """

    missing: Mapping[str, tuple[int, ...]]
    unexpected: Sequence[TensorEntry]
    wrong: Mapping[str, str]


def open_model(
    folder: Path, model_class: type[Model] | None = None, *, config: ArceeConfig | None = None
) -> OpenedModel:
    """Checks that config.json and the tensors' names and shapes fit together; reads no tensor.

    Args:
        folder: of the checkpoint.
        model_class: see `load_model`.
        config: in place of the folder's.

    Raises:
        ConfigError, CheckpointError, InputError: see `load_model`.
    """
    opened = lay_out_model(config or read_config(folder), open_checkpoint(folder), model_class)
    _refuse_misfits(opened)
    return opened


def lay_out_model(config: ArceeConfig, checkpoint: Checkpoint, model_class: type[Model] | None = None) -> OpenedModel:
    """Makes the model that a config describes, quantized where the file is, without a look at missing or odd tensors.

    Raises:
        ConfigError, InputError: see `load_model`.
        CheckpointError: config.json has sizes that no model in these files can have.
    """
    chosen = choose_class(config, model_class)
    _refuse_sizes(config, checkpoint)
    entries = checkpoint.entries
    names = map_names(entries, chosen, named_class(config))
    tied = None
    if chosen is ArceeForCausalLM:
        tied = tie_names(names, config, lambda a, b: same_content(entries[a], entries[b]))
    with upstream.keep_random_state():
        model = ArceeForCausalLM(config, tied=tied) if chosen is ArceeForCausalLM else chosen(config)
        _quantize_layers(model, names, config)
    return OpenedModel(config, checkpoint, names, model, _find_new(model, names))


def find_misfits(opened: OpenedModel) -> Misfits:
    """Compares names, shapes and kinds of a checkpoint's tensors with its model's; reads no tensor."""
    names, entries = opened.names, opened.checkpoint.entries
    expected: dict[str, mx.array] = dict(tree_flatten(opened.model.parameters()))
    wrong = {}
    for key, array in expected.items():
        if key in names and (problem := _find_problem(entries[names[key]], array)):
            wrong[names[key]] = problem
    return Misfits(
        missing={key: tuple(expected[key].shape) for key in sorted(expected.keys() - names.keys() - set(opened.new))},
        unexpected=[entries[names[key]] for key in sorted(names.keys() - expected.keys())],
        wrong=wrong,
    )


def _find_new(model: Model, names: dict[str, str]) -> list[str]:
    """Keys of a classifier's head that a checkpoint of another class does not have; what it has too many leaves `names`."""
    head = layout_of(type(model)).head
    if head not in TASK_HEADS or named_class(model.config) == type(model).__name__:
        return []
    expected: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    own = {key for key in expected if key.split(".")[0] == head}
    for key in {key for key in names if key.split(".")[0] == head} - own:
        del names[key]
    return sorted(own - names.keys())


def _refuse_sizes(config: ArceeConfig, checkpoint: Checkpoint) -> None:
    """Stops at sizes out of all proportion to the files: to lay such a model out would take memory or time without end."""
    most_weights = 4 * sum(entry.nbytes for entry in checkpoint.entries.values())  # at two bits each
    widest, tallest = (min(max(n, 2**20), 2**31 - 1) for n in (most_weights, most_weights // config.hidden_size))
    for name, got, most in (
        ("num_hidden_layers", config.num_hidden_layers, max(len(checkpoint.entries), 1000)),
        ("hidden_size", config.hidden_size, widest),
        ("vocab_size", config.vocab_size, tallest),
        ("intermediate_size", config.intermediate_size, tallest),
        ("num_attention_heads times head_dim", config.num_attention_heads * config.head_size, tallest),
    ):
        if got > most:
            raise CheckpointError(
                f"{config.source}: {name} is {got}; expected at most {most}, by the size of the weights in "
                f"{checkpoint.folder}; check that config and weights belong together"
            )


def _quantize_layers(model: Model, names: Mapping[str, str], config: ArceeConfig) -> None:
    """Turns the layers that the file has quantized into quantized ones, by the file's keys and config's table."""
    quantized = {key.removesuffix(".scales") for key in names if key.endswith(".scales")}
    table = config.quantization or {}

    def parameters(path: str, module: nn.Module) -> bool | dict[str, Any]:
        if path not in quantized:
            return False
        try:
            chosen = read_quantization(table, path)
        except InputError as error:
            raise ConfigError(f"{config.source}: {error}; the file and its config do not belong together") from None
        width = module["weight" if "weight" in module else "weight_by_neuron"].shape[-1]
        if width % chosen.group_size:
            raise ConfigError(
                f"{config.source}: quantization group_size {chosen.group_size} does not divide the rows of {width} weights "
                f"of {path!r}"
            )
        return asdict(chosen)

    if quantized:
        nn.quantize(model, class_predicate=parameters)


def _refuse_misfits(opened: OpenedModel) -> None:
    checkpoint, misfits = opened.checkpoint, find_misfits(opened)
    if missing := list(misfits.missing):
        advice, named = "download it again", named_class(opened.config)
        if missing[0].split(".")[0] == layout_of(type(opened.model)).head:
            advice = "the head cannot be made up; the file is incomplete"
            if named in CLASSES and CLASSES[named] is not type(opened.model):
                advice = f"the head cannot be made up; this is a checkpoint of {named}"
        if others := misfits.unexpected:
            advice = (
                f"it holds {others[0].name!r}{_and_more(others)} instead: check that config and weights belong together"
            )
        place = checkpoint.files[0] if len(checkpoint.files) == 1 else checkpoint.folder / INDEX_FILE
        raise CheckpointError(
            f"{place}: has no tensor {missing[0]!r}{_and_more(missing)}; expected shape "
            f"{misfits.missing[missing[0]]}; {advice}"
        )
    if unexpected := misfits.unexpected:
        raise CheckpointError(
            f"{unexpected[0].file}: holds {unexpected[0].name!r}{_and_more(unexpected)}, which this model does not have; "
            f"expected only what config.json describes; check that config and weights belong together"
        )
    for name, problem in misfits.wrong.items():
        raise CheckpointError(f"{checkpoint.entries[name].file}: {name!r} {problem}")


def _find_problem(entry: TensorEntry, expected: mx.array) -> str:
    packed = expected.dtype in (mx.uint32, mx.uint8)
    if entry.shape != tuple(expected.shape):
        return (
            f"has shape {entry.shape}; expected {tuple(expected.shape)}; check that config and weights belong together"
        )
    if packed != (entry.dtype not in FLOATS):
        return f"has dtype {entry.dtype}; expected {'packed integers' if packed else 'floats'}"
    return ""


def _and_more(names: Sequence[object]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""

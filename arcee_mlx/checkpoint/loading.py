"""load_model, load, save_checkpoint: from a path or a hub id to a model and a tokenizer, and back to a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .. import upstream
from ..errors import CheckpointError, ConfigError, InputError
from ..model.config import ArceeConfig, read_config
from ..model.decoder import ArceeForCausalLM, ArceeModel
from ..model.heads import (
    ArceeForQuestionAnswering,
    ArceeForSequenceClassification,
    ArceeForTokenClassification,
    set_labels,
)
from ..thread_end import wait_for_this_thread_at_exit
from .adapters import has_adapter, set_adapter
from .files import FLOATS, Checkpoint, TensorEntry, new_folder, open_checkpoint, same_content, write_json, write_tensors
from .hub import resolve_folder
from .names import (
    CLASSES,
    TASK_HEADS,
    Model,
    check_generates,
    choose_class,
    layout_of,
    map_names,
    named_class,
    tie_names,
)
from .quantization import Quantization, build_table, read_quantization
from .shards import INDEX_FILE
from .tokenizer import Tokenizer, read_tokenizer

DEMO_MODEL = Path(__file__).parent.parent / "demo"  # the small trained model that comes with the package

M = TypeVar(
    "M",
    ArceeForCausalLM,
    ArceeModel,
    ArceeForSequenceClassification,
    ArceeForTokenClassification,
    ArceeForQuestionAnswering,
)
_logger = logging.getLogger("arcee_mlx")


def load(
    path_or_id: str | os.PathLike[str],
    revision: str | None = None,
    dtype: mx.Dtype | str | None = None,
    *,
    adapter_path: str | os.PathLike[str] | None = None,
) -> tuple[ArceeForCausalLM, Tokenizer]:
    """Loads a causal model and its tokenizer, as mlx_lm.load. The weights are read now, so that any thread may use them.

    Args:
        path_or_id: a checkpoint folder, or a Hugging Face Hub id such as "arcee-ai/AFM-4.5B".
        revision: branch, tag or commit of a hub id.
        dtype, adapter_path: see `load_model`.

    Raises:
        ArceeError: see `load_model`; ConfigError for a classifier, which generates no text; TokenizerError when there is
            no usable tokenizer.json.
    """
    adapter = None if adapter_path is None else resolve_folder(adapter_path, adapter=True)  # before a large download
    folder = resolve_folder(path_or_id, revision=revision)
    check_generates(read_config(folder))
    tokenizer = read_tokenizer(folder)
    model = load_model(folder, ArceeForCausalLM, dtype=dtype, adapter_path=adapter)
    wait_for_this_thread_at_exit()
    mx.eval(model.parameters())  # a weight that is not read yet belongs to the thread that named it
    return model, tokenizer


def load_model(
    path_or_id: str | os.PathLike[str],
    model_class: type[M] | None = None,
    dtype: mx.Dtype | str | None = None,
    *,
    revision: str | None = None,
    adapter_path: str | os.PathLike[str] | None = None,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    problem_type: str | None = None,
) -> M:
    """Loads a model. Nothing is read from disk before it is first computed with, and then once; so the thread that
    loads it must be the first to compute with it, or `mx.eval(model.parameters())` it.

    Args:
        path_or_id: a checkpoint folder, or a Hugging Face Hub id.
        model_class: ArceeForCausalLM, ArceeModel, ArceeForSequenceClassification, ArceeForTokenClassification or
            ArceeForQuestionAnswering; None takes the one config.json names in `architectures`. A checkpoint of another
            class gives its decoder; a classifier's head that it does not have starts at random, and a warning of the
            logger "arcee_mlx" says so.
        revision: branch, tag or commit of a hub id.
        dtype: of weights and activations: an mx.Dtype or its name; "auto" for the checkpoint's own (config `dtype`,
            else `torch_dtype`, else the file's); None for the checkpoint's own on a GPU and float32 on MLX's CPU
            backend, where half precision is many times slower.
        adapter_path: a LoRA or DoRA adapter to put on; see `set_adapter`.
        num_labels, id2label, problem_type: of a classifier, in place of the config's; see `set_labels`.

    Raises:
        ConfigError: config.json does not describe a model this package runs exactly, or adapter_config.json such an
            adapter.
        CheckpointError: files are missing or damaged, or a tensor is missing, unexpected or mis-shaped.
        HubError: a hub id could not be downloaded.
        InputError: dtype or model_class is none of the above, or the labels do not fit the class.
    """
    adapter = None if adapter_path is None else resolve_folder(adapter_path, adapter=True)  # before a large download
    folder = resolve_folder(path_or_id, revision=revision)
    config = read_config(folder)
    if (num_labels, id2label, problem_type) != (None, None, None):
        _check_has_labels(choose_class(config, model_class))
        config = set_labels(config, num_labels=num_labels, id2label=id2label, problem_type=problem_type)
    opened = _check(lay_out_model(config, open_checkpoint(folder), model_class))
    target = _compute_dtype(dtype, opened.config, opened.checkpoint)
    arrays = opened.checkpoint.arrays()
    weights = {key: _cast(arrays[name], target) for key, name in opened.names.items()}
    if opened.new:
        _logger.warning("%s: has no %s: new, at random; train before use", folder, ", ".join(opened.new))
        made = dict(tree_flatten(opened.model.parameters()))
        weights |= {key: _cast(made[key], target) for key in opened.new}
    opened.model.load_weights(list(weights.items()), strict=True)
    opened.model.eval()
    if adapter is not None:
        set_adapter(opened.model, adapter)
    return opened.model  # type: ignore[return-value]


@dataclass(frozen=True)
class OpenedModel:
    """A checkpoint that has been checked but not read.

    Attributes:
        names: the model's key -> the file's key.
        model: its layers, quantized where the file is; the weights are not the checkpoint's.
        new: keys of the head that the file, of another class, does not have: the model's own values are to stay.
    """

    config: ArceeConfig
    checkpoint: Checkpoint
    names: Mapping[str, str]
    model: Model
    new: Sequence[str] = ()


def open_model(folder: Path, model_class: type[Model] | None = None) -> OpenedModel:
    """Checks that config.json and the tensors' names and shapes fit together; reads no tensor.

    Raises:
        ConfigError, CheckpointError, InputError: see `load_model`.
    """
    return _check(lay_out_model(read_config(folder), open_checkpoint(folder), model_class))


def lay_out_model(config: ArceeConfig, checkpoint: Checkpoint, model_class: type[Model] | None = None) -> OpenedModel:
    """Makes the model that a config describes, quantized where the file is, without a look at missing or odd tensors.

    Raises:
        ConfigError, InputError: see `load_model`.
        CheckpointError: config.json has sizes that no model in these files can have.
    """
    chosen = choose_class(config, model_class)
    _refuse_sizes(config, checkpoint)
    entries = checkpoint.entries
    names = map_names(entries, chosen)
    tied = None
    if chosen is ArceeForCausalLM:
        tied = tie_names(names, config, lambda a, b: same_content(entries[a], entries[b]))
    with upstream.keep_random_state():
        model = ArceeForCausalLM(config, tied=tied) if chosen is ArceeForCausalLM else chosen(config)
        _quantize_layers(model, names, config)
    return OpenedModel(config, checkpoint, names, model, _find_new(model, names))


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


def _check_has_labels(chosen: type[Model]) -> None:
    if layout_of(chosen).head != "score":
        raise InputError(
            f"num_labels, id2label or problem_type for {chosen.__name__}; expected ArceeForSequenceClassification or "
            f"ArceeForTokenClassification; pass it as model_class"
        )


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


def save_checkpoint(
    model: Model,
    path: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint that transformers, mlx-lm (float or quantized in its own form) and this package read.

    The folder appears under its name only when it is complete; a failure leaves nothing, or the old one.

    Args:
        model: float or quantized.
        path: of the new folder.
        tokenizer: written along, with the end-of-text ids it stops at.
        overwrite: replace an existing checkpoint folder.

    Raises:
        InputError: the folder exists and `overwrite` is false; or the model has an adapter that is not fused.
    """
    if has_adapter(model):
        raise InputError(
            "the model has an adapter; expected a base alone; fuse_adapter it first, or set_adapter(model, None)"
        )
    weights = dict(tree_flatten(model.parameters()))
    dtypes = {str(w.dtype).removeprefix("mlx.core.") for k, w in weights.items() if k.endswith("norm.weight")}
    values = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": dtypes.pop()}
    if isinstance(model, ArceeForCausalLM):
        values["tie_word_embeddings"] = "lm_head" not in model
    values.pop("quantization", None)
    if table := _quantization_table(model):
        values["quantization"] = values["quantization_config"] = table
    with new_folder(Path(path), overwrite=overwrite) as folder:
        write_tensors(folder, weights)
        write_json(folder / "config.json", values)
        if tokenizer is not None:
            tokenizer.save(folder)


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


def _check(opened: OpenedModel) -> OpenedModel:
    """Raises CheckpointError for the first misfit."""
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
    return opened


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


def _compute_dtype(asked: mx.Dtype | str | None, config: ArceeConfig, checkpoint: Checkpoint) -> mx.Dtype:
    on_cpu = mx.default_device() == mx.cpu
    if asked is None and on_cpu:
        return mx.float32
    if asked is None or asked == "auto":
        floats = (name for name in sorted(checkpoint.entries) if checkpoint.entries[name].dtype in FLOATS)
        named = next(name for name in floats if not name.endswith("rotary_emb.inv_freq"))
        asked = config.dtype or checkpoint.entries[named].dtype  # of the first by name, as transformers
    by_name = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    by_name |= {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
    dtype = by_name.get(asked) if isinstance(asked, str) else asked
    if dtype is None or dtype not in (mx.float32, mx.float16, mx.bfloat16):
        raise InputError(f"dtype is {asked!r}; expected float32, float16, bfloat16, 'auto' or None")
    if on_cpu and dtype != mx.float32 and any(name.endswith(".scales") for name in checkpoint.entries):
        raise InputError(
            f"dtype is {asked!r} for a quantized checkpoint on MLX's CPU backend, whose half-precision quantized "
            f"products are wrong by several percent; expected float32 (or None) there"
        )
    return dtype


def _cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array


def _quantization_table(model: nn.Module) -> dict[str, Any]:
    modules: list[tuple[str, Any]] = model.named_modules()
    layers = {
        path: Quantization(group_size=module.group_size, bits=module.bits, mode=module.mode)
        for path, module in sorted(modules)
        if hasattr(module, "bits")
    }
    return build_table(layers)

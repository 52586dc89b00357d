"""Adapters onto a model: LoRA and DoRA, of mlx-lm or of PEFT, put on, swapped, taken off, fused, written as PEFT's.

The layers are mlx-lm's own (LoRALinear, DoRALinear, LoRAEmbedding, DoRAEmbedding), which hold the base's layer, float or
quantized, as it is: no weight of the base is copied or changed until `fuse_adapter`.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from .. import upstream
from ..errors import ConfigError, InputError
from ..model.config import read_json
from ..model.decoder import ArceeForCausalLM, ArceeModel
from ..model.relu2.down import ByNeuron, DownByNeuron
from .adapter_files import (
    ADAPTABLE,
    BY_NEURON,
    CONFIG_FILE,
    EMBEDDINGS,
    QUANTIZED,
    Adapter,
    AdapterConfig,
    LowRank,
    Plan,
    Slot,
    dimensions,
    float_shapes,
    is_int,
    read_planned,
    refuse_dora,
)
from .files import new_folder, read_header
from .hub import resolve_folder
from .names import TASK_HEADS, Model, decoder_of, layout_of
from .peft import plan_peft, write_peft

# PEFT's names of what a model is for.
_TASK_TYPES = {
    "ArceeForSequenceClassification": "SEQ_CLS",
    "ArceeForTokenClassification": "TOKEN_CLS",
    "ArceeForQuestionAnswering": "QUESTION_ANS",
}


def set_adapter(model: Model, path_or_id: str | os.PathLike[str] | None) -> None:
    """Puts an adapter on a model in place of the one it has, or takes that off. The base stays loaded as it is.

    Not while a generation is running; a KV cache filled before belongs to the adapter of before. If the adapter
    does not fit, the model keeps the one it has.

    Args:
        path_or_id: folder or Hugging Face Hub id of an adapter, mlx-lm's (adapters.safetensors) or PEFT's
            (adapter_model.safetensors); None for the bare base.

    Raises:
        ConfigError: adapter_config.json is malformed, or asks for what is not supported.
        CheckpointError: a file is missing or damaged, or a tensor is missing, unexpected or mis-shaped.
        HubError: a hub id could not be downloaded.
    """
    modules, adapter = _base_modules(model), Adapter({}, {})
    if path_or_id is not None:
        adapter = _read_adapter(resolve_folder(path_or_id, adapter=True), modules, model)
    changed = {path: modules[path] for path in (*_adapted_layers(model), *_set_aside(model))}
    with upstream.keep_random_state():
        for name, weights in adapter.weights.items():
            changed[name] = _with_weights(modules[name], weights, _dtype(model))
        for name, update in adapter.low_rank.items():
            changed[name] = _with_update(changed.get(name, modules[name]), update)
    _install(model, changed)
    model._aside = _Aside({name: modules[name] for name in adapter.weights})


def read_adapter(path_or_id: str | os.PathLike[str], model: Model) -> Adapter:
    """Reads an adapter that fits a model, and does not put it on; the model's weights need not be read.

    Raises:
        ConfigError, CheckpointError, HubError: see `set_adapter`.
    """
    return _read_adapter(resolve_folder(path_or_id, adapter=True), _base_modules(model), model)


def fuse_adapter(model: Model, *, dequantize: bool = False) -> None:
    """Makes a model's adapter part of its weights, which are then the base's. Each layer keeps its dtype.

    A quantized layer is quantized again with its own parameters, as mlx_lm.fuse does: that rounds the update too, so
    the output is near, not equal.

    Args:
        dequantize: leave the adapted layers float instead, exact and larger.

    Raises:
        InputError: the model has no adapter.
    """
    layers = _adapted_layers(model)
    if not layers and not _set_aside(model):
        raise InputError("the model has no adapter; expected one to fuse; put it on with set_adapter or adapter_path")
    model._aside = _Aside({})
    with upstream.keep_random_state():
        while layers:
            path, layer = layers.popitem()
            fused = layer.fuse(dequantize=dequantize)
            fused.set_dtype(_dtype(model))  # DoRA's magnitudes are float32, and so would be what it fuses
            mx.eval(fused.parameters())  # one layer at a time, so that its old weights go before the next is made
            _install(model, {path: fused.train(model.training)})
            del layer


def save_peft_adapter(model: Model, path: str | os.PathLike[str], *, base_model: str | None = None) -> None:
    """Writes a model's adapter as PEFT's: adapter_config.json and adapter_model.safetensors; a classifier's head goes along.

    Args:
        model: with an adapter from `set_adapter`, or from training it with mlx-lm.
        path: of the new folder.
        base_model: folder or hub id of the base, for those of PEFT's classes that load the base themselves.

    Raises:
        InputError: the folder exists; or the model has no adapter, or one that PEFT has no form for.
    """
    layers, modules = _adapted_layers(model), _base_modules(model)
    low_rank = {path: LowRank(own.lora_a, own.lora_b, own.get("m"), own.scale) for path, own in layers.items()}
    saved = [head] if (head := layout_of(type(model)).head) in TASK_HEADS else []
    _refuse_to_write(model, low_rank, saved)
    with new_folder(Path(path)) as folder:
        write_peft(
            folder,
            low_rank,
            modules | {name: model[name] for name in saved},
            base_model,
            task_type=_TASK_TYPES.get(type(model).__name__, "CAUSAL_LM"),
            saved=saved,
        )


def has_adapter(model: nn.Module) -> bool:
    """Whether a model has layers with an update, from here or from mlx-lm."""
    return any("lora_a" in module for _, module in model.named_modules())


def comes_from_adapter(model: Model, path: str) -> bool:
    """Whether a module's weights are an adapter's as a whole, such as a classifier's head, in place of the base's."""
    return path in _set_aside(model)


def _refuse_to_write(model: Model, low_rank: Mapping[str, LowRank], saved: Sequence[str]) -> None:
    advice = "fuse it with fuse_adapter, and write the model with save_checkpoint"
    if whole := sorted(_set_aside(model).keys() - set(saved)):
        raise InputError(f"the adapter brings {whole[0]!r} as a whole; expected low-rank updates alone; {advice}")
    if not low_rank:
        raise InputError("the model has no adapter; expected one to write; put it on with set_adapter or adapter_path")
    dora = [path for path, update in low_rank.items() if update.magnitude is not None]
    if 0 < len(dora) < len(low_rank):
        raise InputError(f"the adapter is DoRA on {dora[0]!r} and LoRA elsewhere; expected one of the two; {advice}")
    for name in saved:
        if type(model[name]) is not nn.Linear:
            raise InputError(
                f"{name} is {type(model[name]).__name__}; expected nn.Linear, which PEFT saves whole; {advice}"
            )
    embedding = [path for path in low_rank if path.endswith("embed_tokens")]
    if embedding and (dora or _is_tied(model)):
        raise InputError(
            f"the adapter is on {embedding[0]!r}, {'with DoRA' if dora else 'which is the head too'}; expected an adapter "
            f"that PEFT has a form for; {advice}"
        )


@dataclass(frozen=True)
class _Aside:
    """The base's modules, by path, for which an adapter's whole weights stand in; kept on the model, unseen by MLX."""

    modules: Mapping[str, nn.Module]


def _set_aside(model: Model) -> Mapping[str, nn.Module]:
    return getattr(model, "_aside", _Aside({})).modules


def _read_adapter(folder: Path, modules: Mapping[str, nn.Module], model: Model) -> Adapter:
    config = AdapterConfig(folder / CONFIG_FILE, read_json(folder / CONFIG_FILE))
    if "peft_type" in config.values:
        return read_planned(plan_peft(config, modules, tied=_is_tied(model)))
    return read_planned(_plan_mlx_lm(config, modules))


def _plan_mlx_lm(config: AdapterConfig, modules: Mapping[str, nn.Module]) -> Plan:
    """What an adapter that mlx-lm trained holds for a model. Source: mlx-lm 0.32.2 `tuner/utils.py`, `lora.py`."""
    if not config.values.keys() & {"fine_tune_type", "lora_parameters"}:
        raise ConfigError(
            f"{config.path}: has neither peft_type nor fine_tune_type and lora_parameters; expected a config that PEFT or "
            f"mlx-lm wrote"
        )
    kinds = ("lora", "dora", "full")
    kind = config.take("fine_tune_type", "lora", lambda value: value in kinds, f"one of {', '.join(kinds)}")
    count = config.take("num_layers", None, is_int, "the number of layers trained, -1 for all")
    places = {path: re.fullmatch(r"(?:model|transformer)\.layers\.(\d+)\.(.+)", path) for path in modules}
    total = 1 + max((int(place[1]) for place in places.values() if place), default=-1)
    first = total - count if 0 < count < total else 0
    inside = {path: place[2] for path, place in places.items() if place and int(place[1]) >= first}
    file = config.path.parent / "adapters.safetensors"
    slots: dict[str, Slot] = {}
    for head in [head for head in TASK_HEADS if head in modules]:  # trained along, where it was not frozen
        slots |= {f"{head}.{n}": Slot(head, n, s, optional=True) for n, s in float_shapes(modules[head]).items()}
    if kind == "full":
        stored = read_header(file) if file.exists() else {}
        for path in inside:
            for name, shape in float_shapes(modules[path]).items():
                if name == BY_NEURON and f"{path}.weight" in stored:  # trained in the standard layout
                    slots[f"{path}.weight"] = Slot(path, name, shape[::-1], transposed=True)
                else:
                    slots[f"{path}.{name}"] = Slot(path, name, shape)
        return Plan(file, slots, {})
    own = AdapterConfig(config.path, config.take("lora_parameters", None, lambda v: isinstance(v, dict), "an object"))
    rank, scale = own.rank("rank"), own.number("scale")
    keys = None if own.values.get("keys") is None else own.names("keys")
    scales: dict[str, float] = {}
    for path, module in modules.items():
        chosen = path in inside if keys is None else path in keys or inside.get(path) in keys
        if not chosen or not isinstance(module, ADAPTABLE):
            continue
        inputs, outputs = dimensions(module)
        slots[f"{path}.lora_a"] = Slot(path, "lora_a", (inputs, rank))
        slots[f"{path}.lora_b"] = Slot(path, "lora_b", (rank, outputs))
        scales[path] = scale
        if kind == "dora":
            refuse_dora(path, module, config.path)
            slots[f"{path}.m"] = Slot(path, "m", (inputs if isinstance(module, EMBEDDINGS) else outputs,))
        if kind == "dora" and isinstance(module, nn.QuantizedEmbedding):
            raise ConfigError(
                f"{config.path}: DoRA on {path!r}, which is quantized; expected a float embedding, as mlx-lm; use the "
                f"float base"
            )
    return Plan(file, slots, scales, own.probability("dropout"))


def _is_tied(model: Model) -> bool:
    return isinstance(model, ArceeForCausalLM) and "lm_head" not in model


def _adapted_layers(model: Model) -> dict[str, nn.Module]:
    """The layers with an update, by path of the causal model."""
    return {_prefix(model) + path: module for path, module in model.named_modules() if "lora_a" in module}


def _base_modules(model: Model) -> dict[str, nn.Module]:
    """The base's modules that have no children, by path of the causal model, under whatever adapter there is."""
    layers, prefix = _adapted_layers(model), _prefix(model)
    leaves = {
        prefix + path: module
        for path, module in model.named_modules()
        if not module.children() and (prefix + path).rpartition(".")[0] not in layers
    }
    return {**leaves, **{path: _base_of(layer) for path, layer in layers.items()}, **_set_aside(model)}


def _base_of(layer: nn.Module) -> nn.Module:
    return layer["embedding"] if "embedding" in layer else layer["linear"]


def _dtype(model: Model) -> mx.Dtype:
    return decoder_of(model).norm.weight.dtype


def _prefix(model: Model) -> str:
    return "model." if isinstance(model, ArceeModel) else ""


def _install(model: Model, modules: Mapping[str, nn.Module]) -> None:
    prefix = _prefix(model)
    model.update_modules(tree_unflatten([(path.removeprefix(prefix), own) for path, own in modules.items()]))


def _with_update(base: nn.Module, update: LowRank) -> nn.Module:
    """mlx-lm's layer around a base's, or our own where it has none."""
    if isinstance(base, ByNeuron):
        own = base.to_lora(r=update.a.shape[1], dropout=update.dropout, scale=update.scale)
        own.lora_a, own.lora_b = update.a, update.b
        return own.train(base.training)
    embedding, dora = isinstance(base, EMBEDDINGS), update.magnitude is not None
    room = upstream.mlx_lm_module("tuner.dora" if dora else "tuner.lora")
    kind = getattr(room, ("DoRA" if dora else "LoRA") + ("Embedding" if embedding else "Linear"))
    layer = kind.from_base(base, r=update.a.shape[1], dropout=update.dropout, scale=update.scale)
    layer.lora_a, layer.lora_b = update.a, update.b
    if dora:
        layer.m = update.magnitude
    return layer.train(base.training)


def _with_weights(base: nn.Module, weights: Mapping[str, mx.array], dtype: mx.Dtype) -> nn.Module:
    """A module like the base's, float if that is quantized, in which some parameters are others."""
    own: Any = copy.copy(base)
    if isinstance(base, ByNeuron) and BY_NEURON in weights:
        own = DownByNeuron.from_weight(weights[BY_NEURON], base.get("bias"))
    if isinstance(base, QUANTIZED) and "weight" in weights:
        own = nn.Embedding(1, 1) if isinstance(base, nn.QuantizedEmbedding) else nn.Linear(1, 1, bias=False)
        if "bias" in base:
            own.bias = base.bias
    for name, array in weights.items():
        own[name] = array.astype(dtype)
    return own.train(base.training)

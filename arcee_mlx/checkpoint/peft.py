"""PEFT's form of an adapter: which tensors its config says there are, for reading; and writing.

PEFT computes W x + alpha / r * lora_B lora_A x with matrices (r, in) and (out, r): mlx-lm's, transposed.
Neither torch nor peft is imported.

Source: peft 0.21 `tuners/tuners_utils.py` (what a config targets), `tuners/lora`, `utils/save_and_load.py` (names).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError
from .adapter_files import (
    ADAPTABLE,
    BY_NEURON,
    CONFIG_FILE,
    EMBEDDING,
    EMBEDDINGS,
    HEAD,
    AdapterConfig,
    LowRank,
    Plan,
    Slot,
    dimensions,
    float_shapes,
    is_int,
    is_number,
    is_pattern,
    is_rank,
    refuse_dora,
)
from .files import DTYPE_NAMES, TensorWriter, write_json

FILE = "adapter_model.safetensors"
_REMEDY = "merge the adapter with peft's merge_and_unload, and load the result"
# What the plan reads, then what says nothing about the forward pass. Any other key must be unset.
_KEYS = {
    "alpha_pattern", "bias", "exclude_modules", "init_lora_weights", "layers_pattern", "layers_to_transform",
    "lora_alpha", "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern", "target_modules", "use_dora",
    "use_rslora",
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config", "fan_in_fan_out",
    "inference_mode", "loftq_config", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size",
    "revision", "runtime_config", "task_type", "velora_config",
}  # fmt: skip
# The other starts (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change the base's weights before training.
_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica")


def plan_peft(config: AdapterConfig, modules: Mapping[str, nn.Module], *, tied: bool) -> Plan:
    """What a PEFT adapter holds for a model.

    Args:
        modules: the base's modules that have no children, by path.
        tied: whether the embedding is the head too.

    Raises:
        ConfigError: the config is malformed, or asks for what is not supported.
    """
    _refuse(config)
    rank, alpha = config.rank("r", 8), config.number("lora_alpha", 8)
    ranks, alphas = _patterns(config, "rank_pattern"), _patterns(config, "alpha_pattern")
    use_dora, use_rslora = config.flag("use_dora"), config.flag("use_rslora")
    bias = config.take("bias", "none", lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only")
    saved = config.names("modules_to_save")
    modules = {**modules, HEAD: modules[EMBEDDING]} if tied else modules
    targets = _targets(config, modules, saved)
    slots: dict[str, Slot] = {}
    scales: dict[str, float] = {}
    for path, module in modules.items():
        key = f"base_model.model.{path}"
        if path in targets:
            inputs, outputs = dimensions(module)
            r = ranks.get(_matching(ranks, path), rank)
            scales[path] = alphas.get(_matching(alphas, path), alpha) / (math.sqrt(r) if use_rslora else r)
            name_a, name_b, name_m = _tensor_names(path, module)
            slots[name_a] = Slot(path, "lora_a", (r, inputs), transposed=True)
            slots[name_b] = Slot(path, "lora_b", (outputs, r), transposed=True)
            if use_dora:
                refuse_dora(path, module, config.path)
                slots[name_m] = Slot(path, "m", (outputs,))
            key += ".base_layer"
        whole = any(ancestor.endswith(name) for ancestor in _ancestors(path) for name in saved)
        for name, shape in float_shapes(module).items():
            trained = whole or name == "bias" and (bias == "all" or bias == "lora_only" and path in targets)
            # PEFT saves embedding and head along when it finds one of them targeted or resized.
            if trained or not tied and (path == HEAD or isinstance(module, EMBEDDINGS)):
                turned = name == BY_NEURON
                file_name, shape = ("weight", shape[::-1]) if turned else (name, shape)
                slots[f"{key}.{file_name}"] = Slot(path, name, shape, turned, not trained)
    touched = {slot.path for slot in slots.values() if not slot.optional} & {EMBEDDING, HEAD}
    if tied and touched:
        raise ConfigError(
            f"{config.path}: changes {min(touched)!r}; expected an adapter that leaves it alone, since embedding and "
            f"head are one in this model, and two for PEFT; {_REMEDY}"
        )
    if use_dora and (embedding := [path for path in scales if isinstance(modules[path], EMBEDDINGS)]):
        raise ConfigError(
            f"{config.path}: use_dora with {embedding[0]!r} among the targets; expected linear layers: of an embedding "
            f"PEFT scales the columns, mlx-lm the rows; {_REMEDY}"
        )
    return Plan(config.path.parent / FILE, slots, scales, config.probability("lora_dropout"))


def write_peft(
    folder: Path,
    low_rank: Mapping[str, LowRank],
    modules: Mapping[str, nn.Module],
    base_model: str | None,
    *,
    task_type: str,
    saved: Sequence[str],
) -> None:
    """Writes an adapter into a folder in PEFT's form.

    Args:
        low_rank: by path of the causal model; all LoRA, or all DoRA.
        modules: the base's, by path.
        base_model: folder or hub id of the base, for PEFT's Auto classes.
        task_type: PEFT's name of what the model is for.
        saved: paths of modules that are written whole.
    """
    tensors: dict[str, mx.array] = {}
    for path, update in low_rank.items():
        name_a, name_b, name_m = _tensor_names(path, modules[path])
        tensors[name_a], tensors[name_b] = update.a.T, update.b.T
        if update.magnitude is not None:
            tensors[name_m] = update.magnitude
    for path in saved:
        tensors |= {f"base_model.model.{path}.{name}": array for name, array in modules[path].parameters().items()}
    ranks = {path: update.a.shape[1] for path, update in low_rank.items()}
    alphas = {path: update.scale * ranks[path] for path, update in low_rank.items()}
    rank, alpha = _commonest(ranks), _commonest(alphas)
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: own for path, own in ranks.items() if own != rank},
        "alpha_pattern": {path: own for path, own in alphas.items() if own != alpha},
        "target_modules": list(low_rank),
        "use_dora": any(update.magnitude is not None for update in low_rank.values()),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "bias": "none",
        "modules_to_save": list(saved) or None,
    }
    table = {name: (DTYPE_NAMES[array.dtype], tuple(array.shape)) for name, array in tensors.items()}
    writer = TensorWriter(folder / FILE, table)
    try:
        for name, array in tensors.items():
            writer.write(name, array)
        writer.close()
    finally:
        writer.abort()
    write_json(folder / CONFIG_FILE, config)


def _refuse(config: AdapterConfig) -> None:
    kind, start = config.values["peft_type"], config.values.get("init_lora_weights", True)
    if kind != "LORA":
        raise ConfigError(f"{config.path}: peft_type is {kind!r}; expected 'LORA'; {_REMEDY}")
    if start not in _STARTS:
        raise ConfigError(
            f"{config.path}: init_lora_weights is {start!r}, with which training began by changing the base's weights; "
            f"expected true, false or one of {', '.join(str(name) for name in _STARTS[2:])}; {_REMEDY}"
        )
    for key in sorted(config.values.keys() - _KEYS):
        if config.values[key]:
            raise ConfigError(f"{config.path}: {key} is {config.values[key]!r}; expected it unset; {_REMEDY}")


def _targets(config: AdapterConfig, modules: Mapping[str, nn.Module], saved: list[str]) -> set[str]:
    """The paths of the modules that PEFT would give an update."""
    wanted, excluded, inside = (
        _names_or_pattern(config, key) for key in ("target_modules", "exclude_modules", "layers_pattern")
    )
    layers = config.take("layers_to_transform", [], _is_int_or_ints, "an integer or a list of them")
    layers = [layers] if isinstance(layers, int) else layers
    lists = [inside] if isinstance(inside, str) and inside else inside or ["[^.]*"]

    def is_target(path: str, module: nn.Module) -> bool:
        if _is_named(path, excluded) or any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in saved):
            return False
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            return path != HEAD and not isinstance(module, EMBEDDINGS)
        if isinstance(wanted, str) or path in wanted or not layers:
            return _is_named(path, wanted)
        found = (re.match(rf"(?:^|.*?\.){name}\.(\d+)\.", path) for name in lists)
        return _is_named(path, wanted) and int(next((match[1] for match in found if match), -1)) in layers

    return {path for path, module in modules.items() if isinstance(module, ADAPTABLE) and is_target(path, module)}


def _names_or_pattern(config: AdapterConfig, key: str) -> str | list[str]:
    def fits(value: Any) -> bool:
        return is_pattern(value) or isinstance(value, list) and all(map(is_pattern, value))

    return config.take(key, [], fits, "a regular expression, or a list of names")


def _patterns(config: AdapterConfig, key: str) -> dict[str, Any]:
    fits = is_rank if key == "rank_pattern" else is_number

    def all_fit(value: Any) -> bool:
        return isinstance(value, dict) and all(is_pattern(name) and fits(own) for name, own in value.items())

    return config.take(key, {}, all_fit, "an object of names and positive numbers")


def _matching(patterns: Mapping[str, Any], path: str) -> str:
    return next((pattern for pattern in patterns if re.match(rf"(.*\.)?({pattern})$", path)), path)


def _is_named(path: str, names: str | list[str]) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def _tensor_names(path: str, module: nn.Module) -> tuple[str, str, str]:
    key = f"base_model.model.{path}"
    if isinstance(module, EMBEDDINGS):
        return f"{key}.lora_embedding_A", f"{key}.lora_embedding_B", f"{key}.lora_magnitude_vector"
    return f"{key}.lora_A.weight", f"{key}.lora_B.weight", f"{key}.lora_magnitude_vector"


def _ancestors(path: str) -> list[str]:
    """The paths of a module and of all it lies in."""
    parts = path.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _commonest(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _is_int_or_ints(value: Any) -> bool:
    return is_int(value) or isinstance(value, list) and all(map(is_int, value))

"""load_model, load, save_checkpoint: from a path or a hub id to a model and a tokenizer, and back to a folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..errors import InputError
from ..model.config import ArceeConfig, read_config
from ..model.decoder import ArceeForCausalLM, ArceeModel
from ..model.heads import (
    ArceeForQuestionAnswering,
    ArceeForSequenceClassification,
    ArceeForTokenClassification,
    set_labels,
)
from ..thread_end import wait_for_this_thread_at_exit
from .adapters import comes_from_adapter, has_adapter, set_adapter
from .files import FLOATS, Checkpoint, new_folder, write_json, write_tensors
from .hub import resolve_folder
from .names import Model, check_generates, choose_class, layout_of
from .opening import open_model
from .quantization import Quantization, build_table
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


def load_tokenizer(path_or_id: str | os.PathLike[str], revision: str | None = None) -> Tokenizer:
    """Loads the tokenizer alone, of a checkpoint of any class; see `read_tokenizer`.

    Args:
        path_or_id: a checkpoint folder, or a Hugging Face Hub id.
        revision: branch, tag or commit of a hub id.

    Raises:
        TokenizerError: there is no usable tokenizer.json.
        HubError: a hub id could not be downloaded.
    """
    return read_tokenizer(resolve_folder(path_or_id, revision=revision))


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
    pad_token_id: int | None = None,
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
        pad_token_id: in place of the config's; several rows at once need one to be classified as sequences.

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
    if pad_token_id is not None:
        config = replace(config, pad_token_id=pad_token_id)
    opened = open_model(folder, model_class, config=config)
    target = _compute_dtype(dtype, opened.config, opened.checkpoint)
    arrays = opened.checkpoint.arrays()
    weights = {key: _cast(arrays[name], target) for key, name in opened.names.items()}
    if opened.new:
        made = dict(tree_flatten(opened.model.parameters()))
        weights |= {key: _cast(made[key], target) for key in opened.new}
    opened.model.load_weights(list(weights.items()), strict=True)
    opened.model.eval()
    if adapter is not None:
        set_adapter(opened.model, adapter)
    if new := [key for key in opened.new if not comes_from_adapter(opened.model, key.rpartition(".")[0])]:
        _logger.warning("%s: has no %s: new, at random; train before use", folder, ", ".join(new))
    return opened.model  # type: ignore[return-value]


def _check_has_labels(chosen: type[Model]) -> None:
    if layout_of(chosen).head != "score":
        raise InputError(
            f"num_labels, id2label or problem_type for {chosen.__name__}; expected ArceeForSequenceClassification or "
            f"ArceeForTokenClassification; pass it as model_class"
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

"""plan_conversion: what a conversion will do, known and checked before a weight is read or a byte is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import TensorEntry, check_target
from ..checkpoint.hub import resolve_folder
from ..checkpoint.links import check_links, find_files
from ..checkpoint.names import TASK_HEADS
from ..checkpoint.opening import OpenedModel, open_model
from ..errors import ConversionError, InputError
from ..model.config import ArceeConfig, layout_entry, read_json
from ..model.decoder import ArceeForCausalLM
from .plan import PlannedTensor, describe_form, find_undivided, plan_tensors, quantization_table
from .recipes import Recipe
from .result import Conversion
from .work_folder import measure_disk

# Copied byte for byte. README.md is not among them: the conversion has a card of its own.
_CARRIED = (
    "generation_config.json", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.*", "additional_chat_templates/*.jinja", "LICENSE*", "LICENCE*", "NOTICE*",
)  # fmt: skip
_SPARE_BYTES = 2**24  # for headers, index, config and card
_DTYPE_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class ConversionPlan:
    """What a conversion will do, known before a weight is read or a byte is written.

    Attributes:
        folder: of the source, on this machine.
        hub_id: it was asked for by; None for a folder.
        target: the new folder.
        source: the checked source.
        sources: the model's key -> the tensor in the source.
        recipe: what to make of it.
        dtype: of what is not quantized: "float32", "float16" or "bfloat16".
        tensors: in the order in which they lie in the source's files.
        conversion: the result to come; it has taken no time yet.
        needed_bytes: of disk space, for all that will be written.
        free_bytes: of disk space, where the new folder is to be; an unfinished conversion's share counts as free.
    """

    folder: Path
    hub_id: str | None
    target: Path
    source: OpenedModel
    sources: Mapping[str, TensorEntry]
    recipe: Recipe
    dtype: str
    tensors: Sequence[PlannedTensor]
    conversion: Conversion
    needed_bytes: int
    free_bytes: int


def plan_conversion(
    hf_path: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str] = "mlx_model",
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    *,
    revision: str | None = None,
    overwrite: bool = False,
    shows_downloads: bool = False,
) -> ConversionPlan:
    """Plans a conversion; reads no weight and writes nothing, but downloads a hub id.

    Args, Raises: as `convert`; a disk that is too small is no error here.
    """
    target = Path(mlx_path).expanduser().absolute()
    check_target(target, overwrite=overwrite)
    folder = resolve_folder(hf_path, revision=revision, progress=shows_downloads)
    hub_id = None if folder == Path(hf_path).expanduser() else os.fspath(hf_path)
    _check_apart(folder, target)
    check_links(folder)
    source = _open_source(folder)
    entries = {key: source.checkpoint.entries[name] for key, name in source.names.items()}
    dtype = recipe.dtype or _own_dtype(source.config, entries)
    layers = {
        path
        for path, module in source.model.named_modules()
        if hasattr(module, "to_quantized") and path not in TASK_HEADS  # small, and what all else is for: floats
    }
    layout = recipe.choose_layout(source.config.hidden_act)
    tensors = plan_tensors(
        entries, layers, recipe, dtype=dtype, layout=layout, num_layers=source.config.num_hidden_layers
    )
    carried = find_files(folder, _CARRIED)
    conversion = Conversion(
        source=hub_id or folder.resolve().name,
        revision=None if hub_id is None else folder.name,
        folder=target,
        architecture=type(source.model).__name__,
        recipe=recipe,
        layout=layout,
        form=describe_form(tensors),
        is_quantized=any(t.quantization for t in tensors),
        dtype=dtype,
        float_layers=find_undivided(tensors, recipe),
        carried_files=[str(p.relative_to(folder)) for p in carried],
        weights=sum(t.weights for t in tensors),
        source_bytes=sum(t.source.nbytes for t in tensors),
        bytes=sum(t.nbytes for t in tensors),
    )
    place = next(parent for parent in target.parents if parent.exists())
    return ConversionPlan(
        folder=folder,
        hub_id=hub_id,
        target=target,
        source=source,
        sources=entries,
        recipe=recipe,
        dtype=dtype,
        tensors=tensors,
        conversion=conversion,
        needed_bytes=conversion.bytes + sum(p.stat().st_size for p in carried) + _SPARE_BYTES,
        free_bytes=shutil.disk_usage(place).free + measure_disk(target),
    )


def _open_source(folder: Path) -> OpenedModel:
    opened = open_model(folder)
    scales = sorted(name for name in opened.names.values() if name.endswith(".scales"))
    if opened.config.quantization or scales:
        file = opened.checkpoint.entries[scales[0]].file if scales else folder / "config.json"
        raise ConversionError(
            f"{file}: is quantized for MLX already; expected float weights; load the model as it is, convert the "
            f"original checkpoint it was made from, or unpack this: python -m arcee_mlx.lm convert --dequantize"
        )
    if opened.config.down_proj_layout != "standard":
        raise ConversionError(
            f"{folder / 'config.json'}: has down projections by neuron already; expected a checkpoint as transformers "
            f"saves it; load it as it is, or convert the original it was made from"
        )
    return opened


def _own_dtype(config: ArceeConfig, entries: Mapping[str, TensorEntry]) -> str:
    """What config.json says the checkpoint was saved for, else what its largest tensor has."""
    largest = max(entries.values(), key=lambda entry: entry.nbytes)
    return config.dtype or _DTYPE_WORDS[largest.dtype]


def _check_apart(source: Path, target: Path) -> None:
    """The new folder may not take the place of the source, nor of a folder the source is in."""
    source, target = source.resolve(), target.resolve()
    if target == source or target in source.parents:
        raise InputError(f"{target}: is or holds the source {source}; expected another folder for the converted model")


def check_space(planned: ConversionPlan) -> None:
    """Raises ConversionError if the disk is too small for what is planned."""
    if planned.free_bytes < planned.needed_bytes:
        raise ConversionError(
            f"{planned.target}: has {planned.free_bytes / 1e9:.2f} GB free; expected {planned.needed_bytes / 1e9:.2f} GB "
            f"for the converted model; free some space, or name a folder on another disk"
        )


def convert_config(planned: ConversionPlan) -> dict[str, Any]:
    """The source's own keys, with what the conversion changes: quantization, dtype, and a tie that the file denies."""
    source = planned.source
    values = read_json(source.checkpoint.folder / "config.json")
    for key in {"dtype", "torch_dtype"} & values.keys() or {"torch_dtype"}:
        values[key] = planned.dtype
    if isinstance(source.model, ArceeForCausalLM):
        values["tie_word_embeddings"] = "lm_head" not in source.model
    if table := quantization_table(planned.tensors):
        # Twice, as mlx-lm writes it: it reads the first, tools of Hugging Face look for the second.
        values["quantization"] = values["quantization_config"] = table
    return values | layout_entry(planned.conversion.layout)

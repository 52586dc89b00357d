"""convert: a Hugging Face checkpoint becomes an MLX checkpoint, in a memory of a few slices of one tensor.

Plan, stream, verify, rename: the plan says what will be written (recipes.py), rows are read, converted and written in
place slice by slice (quantize.py), the result is read back (report.py), and only then does it get its name.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..checkpoint.files import (
    TensorEntry,
    TensorWriter,
    check_target,
    new_folder,
    plan_shards,
    write_index,
    write_json,
)
from ..checkpoint.hub import resolve_folder
from ..checkpoint.links import check_links, find_files
from ..checkpoint.loading import OpenedModel, open_model
from ..errors import ConversionError, InputError
from ..model.config import ArceeConfig, read_json
from ..model.decoder import ArceeForCausalLM
from .quantize import convert_slices
from .recipes import PlannedTensor, Quantization, Recipe, plan_tensors
from .report import Conversion, verify, write_card

# Copied byte for byte. README.md is not among them: the conversion has a card of its own.
_CARRIED = (
    "generation_config.json", "tokenizer*.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.*", "additional_chat_templates/*.jinja", "LICENSE*", "LICENCE*", "NOTICE*",
)  # fmt: skip
_SPARE_BYTES = 2**24  # for headers, index, config and card
_DTYPE_WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def convert(
    hf_path: str | os.PathLike[str],
    mlx_path: str | os.PathLike[str] = "mlx_model",
    recipe: Recipe = Recipe(),  # noqa: B008 - frozen
    *,
    revision: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: bool = False,
) -> Conversion:
    """Converts a checkpoint. The new folder appears when it is complete and verified; a failure leaves nothing.

    Args:
        hf_path: a folder with a float checkpoint of Hugging Face's form, or a hub id such as "arcee-ai/AFM-4.5B".
        mlx_path: the new folder.
        recipe: what to make of the weights; by default 4 bits in groups of 64.
        revision: branch, tag or commit of a hub id.
        overwrite: replace the checkpoint that is at `mlx_path`, once the new one is complete.
        allow_nonfinite: keep weights that are Inf or NaN instead of refusing them; see `convert_slices`.
        progress: show a bar on standard error, if that is a terminal.

    Raises:
        InputError: `mlx_path` exists, or an argument is out of range.
        ConversionError: there is nothing to convert, too little disk space, or it failed on the way.
        ConfigError, CheckpointError, HubError: the source cannot be used; see `load_model`.
    """
    target = Path(mlx_path).expanduser().absolute()
    check_target(target, overwrite=overwrite)
    folder = resolve_folder(hf_path, revision=revision, progress=progress)
    hub_id = None if folder == Path(hf_path).expanduser() else os.fspath(hf_path)
    started = time.perf_counter()
    _check_apart(folder, target)
    check_links(folder)
    source = _open_source(folder)
    entries = {key: source.checkpoint.entries[name] for key, name in source.names.items()}
    dtype = recipe.dtype or _own_dtype(source.config, entries)
    layers = {path for path, module in source.model.named_modules() if hasattr(module, "to_quantized")}
    plan = plan_tensors(entries, layers, recipe, dtype=dtype)
    carried = find_files(folder, _CARRIED)
    conversion = Conversion(
        source=hub_id or folder.resolve().name,
        folder=target,
        quantization=recipe.quantization,
        dtype=dtype,
        float_layers=_float_layers(plan, layers) if recipe.quantization else [],
        carried_files=[str(p.relative_to(folder)) for p in carried],
        weights=sum(math.prod(t.source.shape) for t in plan),
        source_bytes=sum(t.source.nbytes for t in plan),
        bytes=sum(t.nbytes for t in plan),
    )
    needed_bytes = conversion.bytes + sum(p.stat().st_size for p in carried) + _SPARE_BYTES
    _check_space(target, needed_bytes)
    try:
        with new_folder(target, overwrite=overwrite) as partial:
            _write_weights(partial, plan, allow_nonfinite=allow_nonfinite, progress=progress)
            _copy_files(folder, partial, conversion.carried_files)
            write_json(partial / "config.json", _convert_config(source, recipe.quantization, dtype))
            write_card(partial, conversion, folder, hub_id=hub_id)
            verify(partial, plan)
    except OSError as error:
        raise ConversionError(
            f"{target}: cannot be written ({error.strerror or error}); expected room for {needed_bytes / 1e9:.2f} GB and "
            f"the right to write; nothing was kept, free some space or name another folder, and convert again"
        ) from error
    return replace(conversion, seconds=time.perf_counter() - started)


def _open_source(folder: Path) -> OpenedModel:
    opened = open_model(folder)
    if opened.config.quantization or any(name.endswith(".scales") for name in opened.names):
        raise ConversionError(
            f"{opened.config.source}: says that the model is quantized for MLX already; expected float weights; load it as "
            f"it is, or convert the original checkpoint it was made from"
        )
    return opened


def _own_dtype(config: ArceeConfig, entries: Mapping[str, TensorEntry]) -> str:
    """What config.json says the checkpoint was saved for, else what its largest tensor has."""
    largest = max(entries.values(), key=lambda entry: entry.nbytes)
    return config.dtype or _DTYPE_WORDS[largest.dtype]


def _float_layers(plan: Sequence[PlannedTensor], layers: set[str]) -> list[str]:
    kept = {key.removesuffix(".weight") for t in plan if t.quantization is None for key in t.outputs}
    return sorted(kept & layers)


def _check_apart(source: Path, target: Path) -> None:
    """The new folder may not take the place of the source, nor of a folder the source is in."""
    source, target = source.resolve(), target.resolve()
    if target == source or target in source.parents:
        raise InputError(f"{target}: is or holds the source {source}; expected another folder for the converted model")


def _check_space(target: Path, needed_bytes: int) -> None:
    place = next(parent for parent in target.parents if parent.exists())
    free_bytes = shutil.disk_usage(place).free
    if free_bytes < needed_bytes:
        raise ConversionError(
            f"{place}: has {free_bytes / 1e9:.2f} GB free; expected {needed_bytes / 1e9:.2f} GB for the converted model; "
            f"free some space, or name a folder on another disk"
        )


def _write_weights(folder: Path, plan: Sequence[PlannedTensor], *, allow_nonfinite: bool, progress: bool) -> None:
    by_name = {t.source.name: t for t in plan}
    shards = plan_shards({name: t.nbytes for name, t in by_name.items()})  # a layer's codes and scales stay together
    total_bytes = sum(t.source.nbytes for t in plan)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, disable=None if progress else True) as bar:
        for file, names in shards.items():
            tensors = [by_name[name] for name in names]
            writer = TensorWriter(folder / file, {name: spec for t in tensors for name, spec in t.outputs.items()})
            try:
                with closing(convert_slices(tensors, allow_nonfinite=allow_nonfinite)) as slices:
                    for tensor, arrays in slices:
                        for name, rows in zip(tensor.outputs, arrays, strict=True):
                            writer.write(name, rows)
                        bar.update(arrays[0].shape[0] * tensor.source.nbytes // tensor.source.shape[0])
                writer.close()
            finally:
                writer.abort()
    written = {file: [output for name in names for output in by_name[name].outputs] for file, names in shards.items()}
    write_index(folder, written, sum(t.nbytes for t in plan))


def _convert_config(source: OpenedModel, quantization: Quantization | None, dtype: str) -> dict[str, Any]:
    """The source's own keys, with what the conversion changes: quantization, dtype, and a tie that the file denies."""
    values = read_json(source.checkpoint.folder / "config.json")
    for key in {"dtype", "torch_dtype"} & values.keys() or {"torch_dtype"}:
        values[key] = dtype
    if isinstance(source.model, ArceeForCausalLM):
        values["tie_word_embeddings"] = "lm_head" not in source.model
    if quantization is not None:
        # Twice, as mlx-lm writes it: it reads the first, tools of Hugging Face look for the second.
        values["quantization"] = values["quantization_config"] = asdict(quantization)
    return values


def _copy_files(source: Path, target: Path, names: Sequence[str]) -> None:
    for name in names:
        (target / name).parent.mkdir(exist_ok=True)
        with open(source / name, "rb") as old, open(target / name, "wb") as new:
            shutil.copyfileobj(old, new)
            new.flush()
            os.fsync(new.fileno())

"""What a conversion says of itself: the check before it gets its name, its model card, and its summary."""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint.files import open_checkpoint
from ..checkpoint.loading import open_model
from ..errors import ArceeError, ConversionError
from .plan import PlannedTensor

CARD_FILE = "README.md"
# What the source's card says of rights and language holds for the conversion too; the rest of it is about the source.
_KEPT_METADATA = ("license", "license_name", "license_link", "language")


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        source: the hub id, or the name of the source's folder.
        folder: of the converted checkpoint.
        form: of the weights in words, such as "4 bits in groups of 64, bfloat16".
        is_quantized: whether a weight does not stay a float.
        dtype: of what is not quantized: "float32", "float16" or "bfloat16".
        float_layers: layers that stay floats because their rows cannot be divided into whole groups.
        carried_files: copied from the source byte for byte.
        weights: number of weights (scales and biases of groups not counted).
        source_bytes: of the source's tensors.
        bytes: of the converted tensors.
        seconds: it took, without a download.
    """

    source: str
    folder: Path
    form: str
    is_quantized: bool
    dtype: str
    float_layers: Sequence[str]
    carried_files: Sequence[str]
    weights: int
    source_bytes: int
    bytes: int
    seconds: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight, scales and biases of groups included."""
        return 8 * self.bytes / max(self.weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """The attributes as JSON holds them."""
        return asdict(self) | {"folder": str(self.folder), "bits_per_weight": self.bits_per_weight}


def verify(folder: Path, plan: Sequence[PlannedTensor]) -> None:
    """Reads a converted folder back: every tensor as planned, and a model that this package loads.

    Raises:
        ConversionError: it is not what was planned.
    """
    try:
        found = {name: (entry.dtype, entry.shape) for name, entry in open_checkpoint(folder).entries.items()}
        planned = {name: spec for tensor in plan for name, spec in tensor.outputs.items()}
        wrong = sorted(name for name in found.keys() | planned.keys() if found.get(name) != planned.get(name))
        if wrong:
            raise ConversionError(f"{wrong[0]!r} is {found.get(wrong[0])}; expected {planned.get(wrong[0])}")
        open_model(folder)
    except ArceeError as error:
        raise ConversionError(f"the converted files are not what was planned ({error}); nothing was kept") from error


def write_card(folder: Path, conversion: Conversion, source_folder: Path, *, hub_id: str | None) -> None:
    """Writes the conversion's own README.md: the source's card describes other files than these."""
    metadata: dict[str, Any] = {"library_name": "mlx", "pipeline_tag": "text-generation", "tags": ["mlx"]}
    metadata |= _read_metadata(source_folder / CARD_FILE)
    if hub_id is not None:
        metadata["base_model"] = hub_id
        if conversion.is_quantized:
            metadata["base_model_relation"] = "quantized"
    header = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in metadata.items())
    text = (
        f"---\n{header}---\n\n"
        f"# {conversion.source} for MLX\n\n"
        f"Converted from {conversion.source} to MLX's format by arcee_mlx ({conversion.form}). "
        f"What the model is and how it may be used is said by its makers, in the original's model card and licence.\n"
    )
    with open(folder / CARD_FILE, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def summarize(conversion: Conversion) -> str:
    """A few lines for a person to read, after the conversion."""
    lines = [
        f"source  {conversion.source}, {_gigabytes(conversion.source_bytes)}",
        f"output  {conversion.folder}, {_gigabytes(conversion.bytes)}",
        f"form    {conversion.form}; {conversion.bits_per_weight:.3f} bits per weight",
        f"effort  {conversion.seconds:.1f} s, {_gigabytes(peak_memory_bytes())} peak memory",
    ]
    if conversion.float_layers:
        first, more = conversion.float_layers[0], len(conversion.float_layers) - 1
        lines.append(
            f"note    rows of {first}{f' and {more} more' if more else ''} do not divide into groups: kept as floats"
        )
    if "tokenizer.json" not in conversion.carried_files:
        lines.append("note    the source has no tokenizer.json: add one before generating text")
    return "\n".join(lines)


def peak_memory_bytes() -> int:
    """The most memory this process has had resident."""
    try:
        # ru_maxrss of Linux begins at what the starting process had (a notebook, say), and exec does not reset it.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _read_metadata(card: Path) -> dict[str, Any]:
    """The kept keys of a card's YAML header; none where there is no card or no header that can be read."""
    if not card.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        values = metadata_load(card) or {}
    except Exception:  # what a damaged header raises is the YAML library's own; a card stops no conversion
        return {}
    kept = {key: values[key] for key in _KEPT_METADATA if key in values}
    # YAML has dates and nested lists too, which are no licence and no language.
    return {
        key: value
        for key, value in kept.items()
        if all(isinstance(text, str) for text in (value if isinstance(value, list) else [value]))
    }


def _gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"

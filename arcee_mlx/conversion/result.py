"""Conversion: what came of a conversion, what it took, and how good it is."""

from __future__ import annotations

import platform
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..measure.evaluate import Comparison
from .recipes import Recipe, recipe_to_dict
from .texts import Sample


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """The result of a conversion.

    Attributes:
        source: the hub id, or the name of the source's folder.
        revision: the commit of a hub id.
        folder: of the converted checkpoint.
        architecture: the class it is of, such as "ArceeForCausalLM".
        recipe: what was asked for.
        layout: of down projections: "standard" or "by_neuron".
        form: of the weights in words, such as "4 bits in groups of 64, bfloat16".
        is_quantized: whether a weight does not stay a float.
        dtype: of what is not quantized: "float32", "float16" or "bfloat16".
        float_layers: layers that stay floats because their rows cannot be divided into whole groups.
        carried_files: copied from the source byte for byte.
        weights: number of weights (scales and biases of groups not counted).
        source_bytes: of the source's tensors.
        bytes: of the converted tensors.
        calibration: the text that rounding was calibrated on, or None.
        scaled_neurons: multiplied by a factor before their activation and by its inverse square after it, so that
            float16 squares stay finite or rounding costs less.
        errors: of the weights, by the names of their tensors, from `check_result`.
        comparison: with the source, on a text, or None.
        verification: that text.
        seconds: it took, without a download.
    """

    source: str
    folder: Path
    architecture: str
    recipe: Recipe
    layout: str
    form: str
    is_quantized: bool
    dtype: str
    float_layers: Sequence[str]
    carried_files: Sequence[str]
    weights: int
    source_bytes: int
    bytes: int
    revision: str | None = None
    calibration: Sample | None = None
    scaled_neurons: int = 0
    errors: Mapping[str, float] = field(default_factory=dict)
    comparison: Comparison | None = None
    verification: Sample | None = None
    seconds: float = 0.0

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each weight, scales and biases of groups included."""
        return 8 * self.bytes / max(self.weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """In plain values, as JSON holds them, with the versions and the memory it took."""
        return {
            "source": self.source,
            "revision": self.revision,
            "folder": str(self.folder),
            "architecture": self.architecture,
            "recipe": recipe_to_dict(self.recipe),
            "layout": self.layout,
            "form": self.form,
            "dtype": self.dtype,
            "float_layers": list(self.float_layers),
            "carried_files": list(self.carried_files),
            "weights": self.weights,
            "source_bytes": self.source_bytes,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "calibration": _describe_sample(self.calibration),
            "scaled_neurons": self.scaled_neurons,
            "errors": dict(self.errors),
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
            "verification": _describe_sample(self.verification),
            "seconds": self.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "versions": read_versions(),
        }


def peak_memory_bytes() -> int:
    """The most memory this process has had resident."""
    try:
        # ru_maxrss of Linux begins at what the starting process had (a notebook, say), and exec does not reset it.
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def read_versions() -> dict[str, str]:
    """Of all that a result's bits depend on."""
    packages = {"arcee_mlx": "arcee-mlx", "mlx": "mlx", "numpy": "numpy"}
    return {name: version(package) for name, package in packages.items()} | {"python": platform.python_version()}


def describe_bytes(nbytes: int) -> str:
    """In words: "2.60 GB" or "5.30 MB"."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def _describe_sample(sample: Sample | None) -> dict[str, Any] | None:
    if sample is None:
        return None
    sequences, tokens = sample.ids.shape
    return {"text": sample.name, "sha256": sample.sha256, "sequences": sequences, "tokens_each": tokens}

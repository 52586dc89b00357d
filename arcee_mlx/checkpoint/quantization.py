"""Quantization: the packed forms of a weight matrix that MLX computes with, and config.json's table of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import InputError
from .names import PREFIXES, strip_prefix

# mode -> bits and group sizes that MLX has; the first of each is what the mode takes where none is named, as in MLX.
MODES: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "affine": ((4, 2, 3, 5, 6, 8), (64, 32, 128)),
    "mxfp4": ((4,), (32,)),
    "nvfp4": ((4,), (16,)),
    "mxfp8": ((8,), (32,)),
}


@dataclass(frozen=True, init=False)
class Quantization:
    """How a weight matrix is packed: `bits` a weight, and a scale for each `group_size` weights of a row.

    Attributes:
        group_size: weights that share a scale.
        bits: of one weight.
        mode: "affine": integers, with a scale and a bias in the model's dtype; "mxfp4", "nvfp4" or "mxfp8": small
            floats, with a scale of one byte and no bias.
    """

    group_size: int
    bits: int
    mode: str

    def __init__(self, *, group_size: int | None = None, bits: int | None = None, mode: str = "affine") -> None:
        """Args: as the attributes; None takes the mode's own.

        Raises:
            InputError: MLX has no such form.
        """
        if not isinstance(mode, str) or mode not in MODES:
            raise InputError(f"mode is {mode!r}; expected {list_words(MODES)}; choose one of them")
        for name, value, allowed in zip(("bits", "group_size"), (bits, group_size), MODES[mode], strict=True):
            if value is None:
                value = allowed[0]
            if type(value) is not int or value not in allowed:
                raise InputError(
                    f"{name} is {value!r}; expected {list_words(sorted(allowed))} in mode {mode!r}; choose one of these, "
                    f"or another mode"
                )
            object.__setattr__(self, name, value)
        object.__setattr__(self, "mode", mode)

    @property
    def form(self) -> str:
        """In words, such as "4 bits in groups of 64"."""
        return f"{self.bits} bits in groups of {self.group_size}" + ("" if self.mode == "affine" else f", {self.mode}")

    def pack(self, rows: int, columns: int, dtype: str) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What `mx.quantize` makes of a matrix.

        Args:
            rows, columns: of the matrix; the group size divides the columns.
            dtype: safetensors' name of its float dtype.

        Returns:
            parameter -> (safetensors dtype, shape), in the order of `mx.quantize`.
        """
        packed, groups = (rows, columns * self.bits // 32), (rows, columns // self.group_size)
        if self.mode == "affine":
            return {"weight": ("U32", packed), "scales": (dtype, groups), "biases": (dtype, groups)}
        return {"weight": ("U32", packed), "scales": ("U8", groups)}


def read_quantization(table: Mapping[str, Any], path: str) -> Quantization:
    """What config.json's `quantization` says of a layer that the file has quantized.

    Args:
        table: default parameters, and entries by path for layers that have their own.
        path: of the layer, in whatever model.

    Raises:
        InputError: MLX has no such form.
    """
    own = find_entry(table, path)
    chosen = {
        key: value for key, value in (table if own is None else own).items() if key in ("group_size", "bits", "mode")
    }
    where = f"quantization of {path!r} is {chosen}"
    if own is None and not (chosen.get("group_size") and chosen.get("bits")):
        raise InputError(f"{where}; expected a group_size and bits")
    # mlx-lm writes `"group_size": null` in the entries of its mixed recipes, and reads that as the mode's own.
    try:
        return Quantization(**chosen)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def find_entry(table: Mapping[str, Any], path: str) -> Mapping[str, Any] | None:
    """The entry that a layer has of its own, under its path or that in a model with another head; None without one."""
    names = (path, *(prefix + strip_prefix(path) for prefix in ("", *PREFIXES)))
    return next((entry for name in names if isinstance(entry := table.get(name), Mapping)), None)


def build_table(layers: Mapping[str, Quantization | None]) -> dict[str, Any]:
    """MLX's quantization table, as mlx-lm writes it: the commonest form as default, other layers by path.

    Args:
        layers: path -> its form; None for a layer that stays a float, which becomes `false`.

    Returns:
        the table; {} where no layer is quantized.
    """
    forms = [form for form in layers.values() if form is not None]
    if not forms:
        return {}
    default = max(forms, key=forms.count)
    others = {path: form for path, form in sorted(layers.items()) if form != default}
    return asdict(default) | {path: False if form is None else asdict(form) for path, form in others.items()}


def list_words(values: Any) -> str:
    """Joins what an error expects: "2, 3 or 4"."""
    *most, last = map(str, values)
    return f"{', '.join(most)} or {last}" if most else last

"""Do the down projections of this device give what float64 gives, in every form that they come in, and the same twice?

On a GPU that is asked of the kernels that leave out the rows of zero neurons. MLX's CPU backend has no kernels: there the
gathered and the dense path are asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import mlx.core as mx

from ..bench.afm_shape import AFM_CONFIG
from ..model.relu2 import kernels
from ..model.relu2.down import VARIABLE, ByNeuron
from ..model.relu2.rows import Rows
from ..model.relu2.self_check import TOLERANCES, measure_error
from .checks import REPORT, Check, describe_error

_GROUPS = (32, 64, 128)
_TOKENS = range(1, kernels.MAX_TOKENS + 1)
_BITS = (2, 3, 4, 5, 6, 8)  # that MLX packs
_AFM = (AFM_CONFIG["intermediate_size"], AFM_CONFIG["hidden_size"])


@dataclass(frozen=True)
class Variant:
    """A form of the product.

    Attributes:
        path: "kernel", "gathered" or "dense".
        dtype, bits, group_size: of the rows; bits and group_size None for floats.
        tokens: at once.
        has_bias: whether a bias is added.
        shape: neurons and hidden; None is a small layer.
    """

    path: Literal["kernel", "gathered", "dense"]
    dtype: mx.Dtype
    bits: int | None
    group_size: int | None
    tokens: int
    has_bias: bool
    shape: tuple[int, int] | None = None

    def __str__(self) -> str:
        form = f"{self.bits} bits in groups of {self.group_size}" if self.bits else "floats"
        shape = " of AFM-4.5B's shape" if self.shape else ""
        bias = "a" if self.has_bias else "no"
        return f"{self.path}, {form}{shape}, {_name(self.dtype)}, {self.tokens} tokens, {bias} bias"


@dataclass(frozen=True)
class Outcome:
    """What came of a variant.

    Attributes:
        error: largest difference over the largest output; infinite if it could not be computed or is not finite.
        fault: what is wrong in words, None if nothing.
    """

    error: float
    fault: str | None


def list_variants(on_gpu: bool) -> list[Variant]:
    """All that are compared on a GPU, or on MLX's CPU backend."""
    paths: Sequence[Any] = ("kernel",) if on_gpu else ("gathered", "dense")
    forms = list(product(kernels.BITS if on_gpu else _BITS, _GROUPS))
    # The CPU backend's products of packed rows in half precision are wrong, and not used.
    packed = [(dtype, *form) for dtype in (TOLERANCES if on_gpu else (mx.float32,)) for form in forms]
    floats = [(dtype, None, None) for dtype in TOLERANCES]
    small = [
        Variant(path, *form, tokens, has_bias)
        for form, path, tokens, has_bias in product((*packed, *floats), paths, _TOKENS, (True, False))
    ]
    large = [Variant("kernel", mx.bfloat16, 4, 64, tokens, False, _AFM) for tokens in (1, 8)]
    return small + large if on_gpu else small


def try_variant(variant: Variant) -> Outcome:
    """Computes a variant twice, and in float64."""
    repeats: list[bool] = []

    def multiply(x: mx.array, rows: Rows, bias: mx.array | None, residual: mx.array) -> mx.array:
        first, second = (_multiply(variant.path, x, rows, bias, residual) for _ in range(2))
        repeats.append(bool(mx.array_equal(first, second, equal_nan=True)))
        return first

    try:
        error = measure_error(
            variant.dtype, variant.bits, variant.group_size, variant.tokens,
            multiply=multiply, has_bias=variant.has_bias, zeros=0.5 if variant.path == "kernel" else 0.95,
            shape=variant.shape,
        )  # fmt: skip
    except (RuntimeError, ValueError) as problem:  # the source did not compile, or the device refused it
        return Outcome(float("inf"), describe_error(problem))
    allowed = TOLERANCES[variant.dtype]
    if not error <= allowed:
        return Outcome(error, f"off by {error:.2g} of the largest output; expected {allowed:.2g} at most")
    return Outcome(error, None if all(repeats) else "two runs differ; expected the same bits")


def check_kernels(variants: Sequence[Variant] | None = None) -> Check:
    """Tries variants, all of them if none are given, with a bar on standard error if that is a terminal."""
    from tqdm import tqdm

    on_gpu = mx.default_device() == mx.gpu
    outcomes = {
        variant: try_variant(variant)
        for variant in tqdm(variants or list_variants(on_gpu), desc="kernels", disable=None, leave=False)
    }
    faults = {str(variant): outcome.fault for variant, outcome in outcomes.items() if outcome.fault}
    worst = _find_worst(outcomes)
    compared = "the GPU's kernels" if on_gpu else "the gathered and the dense path"
    lines = [f"{compared} against float64: {len(outcomes)} products, each twice"]
    if not on_gpu:
        lines.append("the GPU's kernels were not run: MLX computes on the CPU here")
    lines += _tabulate(worst)
    problems = []
    if faults:
        variant, fault = next(iter(faults.items()))
        is_dense = any(variant.path == "dense" for variant, outcome in outcomes.items() if outcome.fault)
        advice = "install mlx anew" if is_dense else f"set {VARIABLE}=off, which reads all rows"
        problems.append(
            f"{len(faults)} of {len(outcomes)} products are wrong, the first: {variant}: {fault}; {advice}, and {REPORT}"
        )
    facts = {
        "kernels_were_run": on_gpu,
        "products": len(outcomes),
        "worst": [
            {
                "dtype": _name(dtype), "bits": bits, "group_size": group_size, "shape": shape,
                "error": error if error < float("inf") else None, "allowed": TOLERANCES[dtype],
            }
            for (dtype, bits, group_size, shape), error in worst.items()
        ],
        "faults": faults,
    }  # fmt: skip
    return Check(facts, tuple(lines), tuple(problems))


class _GivenRows(ByNeuron):
    """The layer around rows that are there already."""

    def __init__(self, rows: Rows, bias: mx.array | None) -> None:
        super().__init__()
        self._given = rows
        if bias is not None:
            self.bias = bias
        self.eval()

    @property
    def rows(self) -> Rows:
        return self._given


def _multiply(path: str, x: mx.array, rows: Rows, bias: mx.array | None, residual: mx.array) -> mx.array:
    if path == "kernel":
        return kernels.multiply(x, rows, bias, residual)
    return _GivenRows(rows, bias).after_relu2(x, residual, sparse="on" if path == "gathered" else "off")


_Form = tuple[mx.Dtype, int | None, int | None, tuple[int, int] | None]


def _find_worst(outcomes: dict[Variant, Outcome]) -> dict[_Form, float]:
    """The largest error of each form, over tokens, bias and path."""
    worst: dict[_Form, float] = {}
    for variant, outcome in outcomes.items():
        form = (variant.dtype, variant.bits, variant.group_size, variant.shape)
        worst[form] = max(worst.get(form, 0.0), outcome.error)
    return worst


def _tabulate(worst: dict[_Form, float]) -> list[str]:
    """Forms of one dtype and one number of bits in a row, with a column for each size of group."""
    lines = ["largest error  in groups of" + "".join(f"{size:>9}" for size in _GROUPS) + "    allowed"]
    for dtype, bits, shape in dict.fromkeys((dtype, bits, shape) for dtype, bits, _, shape in worst):
        cells = [worst.get((dtype, bits, size, shape)) for size in (_GROUPS if bits else (None,))]
        name = f"{_name(dtype)}, {f'{bits} bits' if bits else 'floats'}{', AFM-4.5B' if shape else ''}"
        numbers = "".join(f"{'-' if cell is None else format(cell, '.1e'):>9}" for cell in cells)
        lines.append(f"{name:<27}{numbers:<27}{TOLERANCES[dtype]:>11.1e}")
    return lines


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")

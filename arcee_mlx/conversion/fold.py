"""Float16 safety: powers of two folded into the weights around squared ReLU, so that no neuron can overflow.

relu(x)² overflows float16 above 255.9, a value bfloat16 checkpoints do reach. Scaling such a neuron by 2**-e before its
activation and by 2**2e after it is the same function to the bit (see model/relu2/symmetry.py); other neurons are left
alone. How far a neuron can reach is bounded from its weights, or taken from what a calibration text made of it.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from ..checkpoint.files import TensorEntry, read_rows
from ..model.relu2.symmetry import bound_neurons, fold_exponents
from .plan import PlannedTensor

# Recorded maxima are of one text: others may reach further. Where the bound is lower, the bound is taken.
HEADROOM = 4.0
_SLICE_ROWS = 2048


@dataclass(frozen=True)
class Scaling:
    """What a tensor of the source is multiplied by: float32 (rows,) and (columns,), or None for nothing."""

    rows: mx.array | None = None
    columns: mx.array | None = None

    def apply(self, values: mx.array, start: int = 0) -> mx.array:
        """Scales rows `start` and following of the tensor; float32."""
        values = values.astype(mx.float32)
        if self.rows is not None:
            own = self.rows[start : start + values.shape[0]]
            values = values * (own if values.ndim == 1 else own[:, None])
        return values if self.columns is None else values * self.columns

    def transpose(self) -> Scaling:
        """Of the transposed tensor."""
        return Scaling(self.columns, self.rows)

    def to_dict(self) -> dict[str, str]:
        """The factors as JSON holds them, their bytes in base64."""
        factors = {"rows": self.rows, "columns": self.columns}
        return {k: base64.b64encode(np.array(v).tobytes()).decode() for k, v in factors.items() if v is not None}

    @classmethod
    def from_dict(cls, values: Mapping[str, str]) -> Scaling:
        """What `to_dict` gave."""
        return cls(**{k: mx.array(np.frombuffer(base64.b64decode(v), np.float32)) for k, v in values.items()})


def needs_fold(dtype: str, hidden_act: str) -> bool:
    """Whether a model's neurons may overflow in `dtype`."""
    return dtype == "float16" and hidden_act == "relu2"


def bound_scalings(sources: Mapping[str, TensorEntry], plan: Sequence[PlannedTensor]) -> dict[str, Scaling]:
    """Finds the scalings from bounds that hold for every text; reads all up projections once.

    Args:
        sources: the model's key -> the tensor in the source.
        plan: what becomes of them.

    Returns:
        the model's key -> the scaling, for tensors that are scaled.
    """
    scalings: dict[str, Scaling] = {}
    for key, up in sources.items():
        if not key.endswith(".mlp.up_proj.weight"):
            continue
        layer = key.removesuffix(".mlp.up_proj.weight")
        norm, bias = (
            sources.get(f"{layer}.{name}") for name in ("post_attention_layernorm.weight", "mlp.up_proj.bias")
        )
        assert norm is not None
        weight = read_rows(norm, 0, norm.shape[0])
        bounds = []
        for start in range(0, up.shape[0], _SLICE_ROWS):
            stop = min(start + _SLICE_ROWS, up.shape[0])
            own_bias = None if bias is None else read_rows(bias, start, stop)
            bounds.append(bound_neurons(read_rows(up, start, stop), weight, own_bias))
        scalings |= layer_scalings(layer, np.concatenate(bounds), plan, has_bias=bias is not None)
    return scalings


def layer_scalings(
    layer: str, maxima: np.ndarray, plan: Sequence[PlannedTensor], *, has_bias: bool
) -> dict[str, Scaling]:
    """The scalings of one layer whose neurons may overflow.

    Args:
        layer: its path, such as "model.layers.3".
        maxima: (F,), the most each neuron's input is or can be.
        plan: what becomes of the tensors.
        has_bias: whether its up projection has one.

    Returns:
        as `bound_scalings`; {} where nothing can overflow.
    """
    down = find_down(layer, plan)
    shares_scale = down.quantization is not None and not down.by_neuron
    exponents = fold_exponents(maxima, down.quantization.group_size if shares_scale and down.quantization else 1)
    if not exponents.any():
        return {}
    return scale_neurons(layer, np.exp2(-exponents), has_bias=has_bias)


def scale_neurons(layer: str, factors: np.ndarray, *, has_bias: bool) -> dict[str, Scaling]:
    """The scalings that multiply a layer's neurons by `factors` (F,) before squared ReLU and take it back after it."""
    rows = mx.array(factors.astype(np.float32))
    scalings = {f"{layer}.mlp.up_proj.weight": Scaling(rows=rows)}
    if has_bias:
        scalings[f"{layer}.mlp.up_proj.bias"] = Scaling(rows=rows)
    columns = mx.array((1 / np.square(factors.astype(np.float64))).astype(np.float32))
    return scalings | {f"{layer}.mlp.down_proj.weight": Scaling(columns=columns)}


def find_down(layer: str, plan: Sequence[PlannedTensor]) -> PlannedTensor:
    """The plan's tensor for a layer's down projection."""
    return next(tensor for tensor in plan if tensor.key == f"{layer}.mlp.down_proj.weight")


def count_scaled(scalings: Mapping[str, Scaling]) -> int:
    """Number of neurons that are scaled."""
    rows = [s.rows for key, s in scalings.items() if key.endswith("up_proj.weight") and s.rows is not None]
    return sum(int((own != 1).sum()) for own in rows)

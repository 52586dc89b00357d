"""Rotary position embeddings: the seven kinds transformers has for Arcee, in transformers' float32 operation order.

`mx.fast.rope` is not used: it takes periods instead of frequencies and multiplies in its own precision, which is off by
4e-3 at position 65,535, and in half precision it does not round cos and sin first as transformers does. One table is
computed per forward pass and shared by all layers, so its cost does not matter; turning a tensor is one fused kernel.

Source: transformers 5.23 `modeling_rope_utils.py` and `ArceeRotaryEmbedding`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import mlx.core as mx

from ..errors import ConfigError
from .config import ArceeConfig
from .json_file import shorten

_MAX_ROTATED = 2**20  # far above any head, far below what a table could not be made for


class Rotation(NamedTuple):
    """Cosines and signed sines of the positions of one forward pass.

    cos has shape (B or 1, L, 1, 1, D/2), sin (B or 1, L, 1, 2, D/2) with the first of the pair negated.
    """

    cos: mx.array
    sin: mx.array


class RotaryEmbedding:
    """The rotation table of a model, and the state transformers keeps for `dynamic` (see `forward_table`)."""

    def __init__(self, config: ArceeConfig) -> None:
        rope = config.rope
        self.kind: str = rope["rope_type"]
        self.rope = rope
        self.head_dim = config.head_size
        self.max_position_embeddings = config.max_position_embeddings
        self.attention_factor = 1.0
        self.original_length = rope.get("original_max_position_embeddings", self.max_position_embeddings)
        self._cached_length = self.max_position_embeddings
        partial = rope.get("partial_rotary_factor", 1.0) if self.kind != "default" else 1.0
        try:
            rotated = int(self.head_dim * partial)
            if rotated > _MAX_ROTATED:
                raise ValueError(f"{rotated:.3g} rotated dimensions a head")
            self.dim = self.head_dim if self.kind == "proportional" else rotated
            with mx.stream(mx.cpu):  # pow of the GPU backends is not bit-equal to the reference
                self.base_table = self._table()
                self.long_table = self._longrope_table(rope["long_factor"]) if self.kind == "longrope" else None
                tables = [self.base_table] + ([self.long_table] if self.long_table is not None else [])
                mx.eval(tables)
        # The last two are MLX's own for numbers that no float32 can hold.
        except (ArithmeticError, ValueError, TypeError, RuntimeError) as error:
            raise ConfigError(
                f"{config.source}: rope_parameters {shorten(rope)} give no table ({error}); expected what rope type "
                f"{self.kind!r} can be computed from; correct it in the config"
            ) from error
        self._state = self.base_table
        # transformers builds such a model too, and fails on its first use: so it can be converted and looked at.
        self._misfit = ""
        if any(table.shape != (self.head_dim // 2,) for table in tables):
            self._misfit = (
                f"{config.source}: rope type {self.kind!r} with partial_rotary_factor {partial} does not rotate all "
                f"{self.head_dim} dimensions of a head; expected a table for all of them; transformers cannot run it either"
            )

    @property
    def depends_on_length(self) -> bool:
        """Whether the table of a sequence changes as it grows."""
        return self.kind in ("dynamic", "longrope")

    def shares_table(self, first: int, last: int) -> bool:
        """Whether sequences of all lengths from `first` to `last` have one table, so that one pass may make them."""
        limit = self.original_length if self.kind == "longrope" else self.max_position_embeddings
        if not self.depends_on_length or first == last or last <= limit:
            return True
        return self.kind == "longrope" and first > limit

    def table(self, length: int | mx.array) -> mx.array:
        """The frequencies for sequences of a given length, without any state: generation's rule.

        Args:
            length: tokens of the sequence so far, the new ones included; an int, or int array (B,) for one per row.

        Returns:
            float32, (D/2,), or (B, D/2) for an array of lengths on a kind that depends on it.

        Raises:
            ConfigError: the config's rotation does not fit its heads.
        """
        self._check_fit()
        if not self.depends_on_length:
            return self.base_table
        if self.kind == "longrope":
            assert self.long_table is not None
            if isinstance(length, int):
                return self.long_table if length > self.original_length else self.base_table
            return mx.where(length[:, None] > self.original_length, self.long_table, self.base_table)
        if isinstance(length, int):
            return self._grown_table(length) if length > self.max_position_embeddings else self.base_table
        long = length[:, None] > self.max_position_embeddings
        return mx.where(long, self._grown_table(mx.maximum(length, self.max_position_embeddings)), self.base_table)

    def forward_table(self, length: int) -> mx.array:
        """The frequencies as transformers' forward has them, where `dynamic` remembers the longest call.

        A longer call than any before grows the table; it stays until a call is shorter than max_position_embeddings.

        Args:
            length: the largest position of the call, over all rows, plus one.
        """
        self._check_fit()
        if self.kind != "dynamic":
            return self.table(length)
        if length > self._cached_length:
            self._state, self._cached_length = self._grown_table(length), length
        elif length < self.max_position_embeddings < self._cached_length:
            self._state, self._cached_length = self.base_table, self.max_position_embeddings
        return self._state

    def rotation(self, position_ids: mx.array, table: mx.array, dtype: mx.Dtype) -> Rotation:
        """cos and sin of every position, scaled by the attention factor and rounded to the model's dtype.

        Args:
            position_ids: int, (B, L) or (1, L).
            table: float32 frequencies, (D/2,) or (B, D/2).
            dtype: of the activations.
        """
        table = table[None, None] if table.ndim == 1 else table[:, None]
        angles = position_ids[..., None].astype(mx.float32) * table
        cos = (mx.cos(angles) * self.attention_factor).astype(dtype)
        sin = (mx.sin(angles) * self.attention_factor).astype(dtype)
        return Rotation(cos[:, :, None, None], mx.stack([-sin, sin], axis=-2)[:, :, None])

    def _check_fit(self) -> None:
        if self._misfit:
            raise ConfigError(self._misfit)

    def _table(self) -> mx.array:
        rope, kind, dim = self.rope, self.kind, self.dim
        base = rope["rope_theta"]
        if kind == "yarn":
            return self._yarn_table()
        if kind == "longrope":
            factor = rope.get("factor")
            if factor is None:
                factor = self.max_position_embeddings / self.original_length
            if rope.get("attention_factor") is not None:
                self.attention_factor = rope["attention_factor"]
            elif factor > 1:
                self.attention_factor = math.sqrt(1 + math.log(factor) / math.log(self.original_length))
            return self._longrope_table(rope["short_factor"])
        if kind == "proportional":
            angles = int(rope.get("partial_rotary_factor", 1.0) * self.head_dim // 2)
            table = 1.0 / (base ** (mx.arange(0, 2 * angles, 2).astype(mx.float32) / self.head_dim))
            return mx.concatenate([table, mx.zeros(self.head_dim // 2 - angles)]) / rope.get("factor", 1.0)
        if kind == "dynamic":
            length = self.max_position_embeddings
            base = base * ((rope["factor"] * length / length) - (rope["factor"] - 1)) ** (dim / (dim - 2))
        table = 1.0 / (base ** self._exponents())
        if kind == "linear":
            return table / rope["factor"]
        return self._llama3_table(table) if kind == "llama3" else table

    def _exponents(self) -> mx.array:
        return mx.arange(0, self.dim, 2).astype(mx.float32) / self.dim

    def _grown_table(self, length: int | mx.array) -> mx.array:
        """`dynamic` beyond max_position_embeddings: the base grows with the length (float32 throughout, as torch)."""
        with mx.stream(mx.cpu):
            factor, dim = self.rope["factor"], self.dim
            tokens = mx.array(length).astype(mx.float32)
            stretch = (factor * tokens / self.max_position_embeddings) - (factor - 1)
            # torch takes this power with a double exponent
            scale = (stretch.astype(mx.float64) ** mx.array(dim / (dim - 2), mx.float64)).astype(mx.float32)
            return 1.0 / ((self.rope["rope_theta"] * scale)[..., None] ** self._exponents())

    def _longrope_table(self, factors: list[float]) -> mx.array:
        scale = mx.array(factors, mx.float32)
        exponents = self._exponents()
        if scale.size != exponents.size and 1 not in (scale.size, exponents.size):
            return mx.zeros(0)  # does not fit
        return 1.0 / (scale * self.rope["rope_theta"] ** exponents)

    def _yarn_table(self) -> mx.array:
        rope, dim, base = self.rope, self.dim, self.rope["rope_theta"]
        factor = rope["factor"]
        if factor is None:
            factor = self.max_position_embeddings / self.original_length

        def mscale(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        def correction(rotations: float) -> float:
            return (dim * math.log(self.original_length / (rotations * 2 * math.pi))) / (2 * math.log(base))

        if rope.get("attention_factor") is not None:
            self.attention_factor = rope["attention_factor"]
        elif rope.get("mscale") and rope.get("mscale_all_dim"):
            self.attention_factor = mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
        else:
            self.attention_factor = mscale(1)
        low, high = correction(rope.get("beta_fast") or 32), correction(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        if low == high:
            high += 0.001
        periods = base ** self._exponents()
        if periods.size != dim // 2:
            return mx.zeros(0)  # does not fit
        ramp = 1 - mx.clip((mx.arange(dim // 2).astype(mx.float32) - low) / (high - low), 0, 1)
        return (1.0 / (factor * periods)) * (1 - ramp) + (1.0 / periods) * ramp

    def _llama3_table(self, table: mx.array) -> mx.array:
        factor, low, high = (self.rope[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
        original = self.original_length
        wavelength = (1.0 / table) * (2 * math.pi)  # torch divides a number by a tensor in these two steps
        scaled = mx.where(wavelength > original / low, table / factor, table)
        smooth = ((1.0 / wavelength) * original - low) / (high - low)
        smoothed = (1 - smooth) * scaled / factor + smooth * scaled
        medium = (wavelength >= original / high) & (wavelength <= original / low)
        return mx.where(medium, smoothed, scaled)


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    # x * cos + rotate_half(x) * sin, with rotate_half a reversed view of the two halves instead of a copy.
    return x * cos + x[..., ::-1, :] * sin


_rotate_fused = mx.compile(_rotate)


def rotate(x: mx.array, rotation: Rotation) -> mx.array:
    """Turns queries or keys: (B, L, heads, D) -> the same shape and dtype."""
    pairs = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    turn = (
        _rotate_fused if mx.default_device() == mx.gpu else _rotate
    )  # compiling on the CPU would start a C++ compiler
    return turn(pairs, rotation.cos, rotation.sin).reshape(x.shape)

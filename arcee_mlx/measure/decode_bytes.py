"""DecodeBytes: what a decode step reads from memory, dense, and with the rows of neurons that are zero left out.

The model: a step reads every weight once in the form it is stored in, a row of the embedding for each token, and the KV
cache in 16 bits. Sparse, the down projections are stored by neuron and only the rows of active neurons are read: a row of
codes, of scales or of biases costs the whole 128-byte lines it touches, and a line that several rows touch counts for each,
as if no cache held it; so narrow models come off worse than they are. Partial sums are written and read once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..checkpoint.files import DTYPES, TensorEntry
from ..checkpoint.names import find_prefix, is_causal
from ..checkpoint.quantization import read_quantization
from ..model.config import ArceeConfig

LINE_BYTES = 128
SLABS = 16  # parts of the neurons, each with a partial sum of its own
_SLAB_NEURONS = 32  # that a slab has at least
_PARTIAL_BYTES = 4  # float32
_KV_BYTES = 2
_DOWN = "mlp.down_proj"


@dataclass(frozen=True, kw_only=True)
class StepBytes:
    """What one step reads, for what share of active neurons; from `DecodeBytes.step`.

    Attributes:
        tokens: that the step takes at once: one, or as many as are verified together when drafts are guessed ahead.
        active: share of the neurons that at least one of them needs, mean of the layers.
        dense_bytes: every weight.
        ideal_bytes: no byte of a down projection but those of active neurons.
        sparse_bytes: the lines of those, and the partial sums.
    """

    tokens: int
    active: float
    dense_bytes: float
    ideal_bytes: float
    sparse_bytes: float

    @property
    def ideal_speedup(self) -> float:
        """Dense against ideal, by bytes alone."""
        return self.dense_bytes / self.ideal_bytes

    @property
    def speedup(self) -> float:
        """Dense against sparse, by bytes alone."""
        return self.dense_bytes / self.sparse_bytes

    def to_dict(self) -> dict[str, Any]:
        """In plain values, as JSON holds them; bytes whole."""
        sizes = {name: round(getattr(self, name)) for name in ("dense_bytes", "ideal_bytes", "sparse_bytes")}
        speedups = {"ideal_speedup": self.ideal_speedup, "speedup": self.speedup}
        return {"tokens": self.tokens, "active": self.active, **sizes, **speedups}


@dataclass(frozen=True, kw_only=True)
class DecodeBytes:
    """Bytes that decoding reads, by part; from `count_decode_bytes`.

    Attributes:
        weights: all of them but the embedding and the matrices of the down projections.
        embedding_row: one token's row.
        kv_cache: at the context length that was asked for.
        down: of each layer's down projection, as it is stored.
        active_down: of each layer, the lines of all neurons' rows, stored by neuron and each read by itself.
        partial_sums: of all layers, for one token.
    """

    weights: int
    embedding_row: int
    kv_cache: int
    down: Sequence[int]
    active_down: Sequence[float]
    partial_sums: int

    def step(self, active: Sequence[float], *, tokens: int = 1) -> StepBytes:
        """Of a step that takes so many tokens at once; `active` is the share of neurons they need in each layer.

        A matrix read sparse never counts for more than a dense one.
        """
        rest = self.weights + self.kv_cache + tokens * self.embedding_row
        layers = list(zip(active, self.down, self.active_down, strict=True))
        lines = sum(min(share * rows, matrix) for share, matrix, rows in layers)
        return StepBytes(
            tokens=tokens,
            active=sum(active) / len(active),
            dense_bytes=rest + sum(self.down),
            ideal_bytes=rest + sum(share * matrix for share, matrix, _ in layers),
            sparse_bytes=rest + lines + tokens * self.partial_sums,
        )


def count_decode_bytes(config: ArceeConfig, entries: Mapping[str, TensorEntry], *, context_tokens: int) -> DecodeBytes:
    """Counts from names, shapes and forms alone; reads no tensor.

    Args:
        config: of the model.
        entries: the model's key -> its tensor; a tied head has none of its own.
        context_tokens: in the KV cache.
    """
    prefix = find_prefix(entries)
    paths = [f"{prefix}layers.{index}.{_DOWN}" for index in range(config.num_hidden_layers)]
    down = [sum(_matrix_bytes(entries, path)) for path in paths]
    embedding = sum(_matrix_bytes(entries, f"{prefix}embed_tokens"))
    is_tied = is_causal(entries) and not any(key.startswith("lm_head.") for key in entries)
    total = sum(entry.nbytes for entry in entries.values())
    slabs = min(SLABS, math.ceil(config.intermediate_size / _SLAB_NEURONS))
    written = slabs * config.hidden_size * _PARTIAL_BYTES * config.num_hidden_layers
    return DecodeBytes(
        weights=total - sum(down) - (0 if is_tied else embedding),
        embedding_row=embedding // config.vocab_size,
        kv_cache=2 * config.kv_heads * config.head_size * _KV_BYTES * config.num_hidden_layers * context_tokens,
        down=down,
        active_down=[
            sum(_count_line_bytes(config.intermediate_size, row) for row in _row_bytes(config, entries, path))
            for path in paths
        ],
        partial_sums=2 * written,
    )


def _matrix_bytes(entries: Mapping[str, TensorEntry], path: str) -> Iterator[int]:
    for name in ("weight", "weight_by_neuron", "scales", "biases"):
        if (entry := entries.get(f"{path}.{name}")) is not None:
            yield entry.nbytes


def _row_bytes(config: ArceeConfig, entries: Mapping[str, TensorEntry], path: str) -> list[int]:
    """Of a neuron's row of each array, were the matrix stored by neuron in the form it has."""
    scales = entries.get(f"{path}.scales")
    form = None if scales is None else read_quantization(config.quantization or {}, path)
    hidden = config.hidden_size
    if scales is not None and form is not None and hidden % form.group_size == 0:
        arrays = form.pack(1, hidden, scales.dtype).values()
        return [math.prod(shape) * DTYPES[dtype][0].size for dtype, shape in arrays]
    norm = next(entry for key, entry in entries.items() if key.endswith("norm.weight"))  # in the model's float dtype
    return [hidden * DTYPES[norm.dtype][0].size]


def _count_line_bytes(rows: int, row_bytes: int) -> float:
    """Bytes of the lines that rows one after the other touch, each row's counted by itself."""
    starts = np.arange(rows, dtype=np.int64) * row_bytes
    touched = (starts + row_bytes - 1) // LINE_BYTES - starts // LINE_BYTES + 1
    return float(touched.sum()) * LINE_BYTES

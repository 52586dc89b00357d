"""LayerStream: a checkpoint's decoder with one layer at a time in memory, computed in float32 on every device.

Quantized weights are dequantized to what they stand for and multiplied as floats: for whole texts that is the faster
product, and on MLX's CPU backend the only right one in half precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .. import upstream
from ..checkpoint.adapter_files import Adapter
from ..checkpoint.files import TensorEntry, read_rows
from ..checkpoint.names import find_prefix, is_causal
from ..checkpoint.quantization import Quantization, read_quantization
from ..errors import ArceeError
from ..model.config import ArceeConfig
from ..model.decoder import DecoderLayer
from ..model.masks import Mask
from ..model.rope import RotaryEmbedding, Rotation

_ROWS_TOGETHER, _TOKENS_TOGETHER = 4, 2048  # sequences run at once, fewer where they are long


class WeightReader:
    """Reads a checkpoint's weights as float32, in the standard layout, however they are stored."""

    def __init__(self, entries: Mapping[str, TensorEntry], table: Mapping[str, Any] | None) -> None:
        """Args: the model's key -> its tensor; config.json's quantization table, or None."""
        self.entries = entries
        self._table = table or {}

    def vector(self, key: str) -> mx.array:
        """A norm's weight or a bias, float32 (n,)."""
        return read_rows(self.entries[key], 0, self.entries[key].shape[0]).astype(mx.float32)

    def rows(self, path: str, start: int, stop: int) -> mx.array:
        """Rows of the matrix of a layer as it is stored: by neuron, they are the transpose's."""
        name = next(f"{path}.{name}" for name in ("weight", "weight_by_neuron") if f"{path}.{name}" in self.entries)
        return self._read(name, path, start, stop)

    def matrix(self, path: str) -> mx.array:
        """The matrix of a layer as nn.Linear has it, float32 (out, in)."""
        by_neuron = f"{path}.weight_by_neuron"
        if by_neuron in self.entries:
            return self._read(by_neuron, path, 0, self.entries[by_neuron].shape[0]).T
        return self._read(f"{path}.weight", path, 0, self.entries[f"{path}.weight"].shape[0])

    def _read(self, key: str, path: str, start: int, stop: int) -> mx.array:
        values = read_rows(self.entries[key], start, stop)
        if (scales_entry := self.entries.get(f"{path}.scales")) is None:
            return values.astype(mx.float32)
        form = read_quantization(self._table, path)
        scales = read_rows(scales_entry, start, stop)
        biases = self.entries.get(f"{path}.biases")
        return dequantize(values, scales, None if biases is None else read_rows(biases, start, stop), form)


class AdaptedReader(WeightReader):
    """Reads a checkpoint's weights with an adapter in them, as if it had been fused in float32."""

    def __init__(self, entries: Mapping[str, TensorEntry], table: Mapping[str, Any] | None, adapter: Adapter) -> None:
        """Args: as WeightReader; the adapter."""
        super().__init__(entries, table)
        self._adapter = adapter

    def vector(self, key: str) -> mx.array:
        path, _, name = key.rpartition(".")
        own = self._adapter.weights.get(path, {})
        return own[name].astype(mx.float32) if name in own else super().vector(key)

    def rows(self, path: str, start: int, stop: int) -> mx.array:
        own = self._adapter.weights.get(path, {})
        name = next((name for name in ("weight", "weight_by_neuron") if name in own), None)
        if name is not None:
            return own[name][start:stop].astype(mx.float32)
        return self._update(path, super().rows(path, start, stop), start, stop)

    def matrix(self, path: str) -> mx.array:
        own = self._adapter.weights.get(path, {})
        if "weight" in own:
            return own["weight"].astype(mx.float32)
        if "weight_by_neuron" in own:
            return own["weight_by_neuron"].astype(mx.float32).T
        matrix = super().matrix(path)
        return self._update(path, matrix, 0, matrix.shape[0])

    def _update(self, path: str, rows: mx.array, start: int, stop: int) -> mx.array:
        """Rows of a matrix as nn.Linear or nn.Embedding has it, with the adapter's low-rank update."""
        if (update := self._adapter.low_rank.get(path)) is None:
            return rows
        a, b = update.a.astype(mx.float32), update.b.astype(mx.float32)
        change = a[start:stop] @ b if path.endswith("embed_tokens") else (a @ b[:, start:stop]).T
        rows = rows + update.scale * change
        if update.magnitude is not None:  # DoRA's
            rows *= (update.magnitude[start:stop].astype(mx.float32) / mx.linalg.norm(rows, axis=1))[:, None]
        return rows


def dequantize(codes: mx.array, scales: mx.array, biases: mx.array | None, form: Quantization) -> mx.array:
    """What packed weights stand for, float32."""
    options: dict[str, Any] = {"group_size": form.group_size, "bits": form.bits, "mode": form.mode}
    if biases is None:
        return mx.dequantize(codes, scales, **options).astype(mx.float32)
    return mx.dequantize(codes, scales.astype(mx.float32), biases.astype(mx.float32), **options)


class LayerStream:
    """A decoder whose layers are read, used and dropped one after the other.

    Hidden states are float32 (N, T, E): N sequences of T tokens, without padding.
    """

    def __init__(self, config: ArceeConfig, weights: WeightReader) -> None:
        """Args: of the model; its weights by the model's keys, with or without the prefix of a causal model."""
        self.config = replace(config, down_proj_layout="standard", quantization=None)
        self.weights = weights
        self.prefix = find_prefix(weights.entries)
        self._rotary = RotaryEmbedding(self.config)
        with upstream.keep_random_state():
            self._layer = DecoderLayer(self.config)  # its random weights are never computed
        self._layer.eval()
        self._unread: Any = self._layer.parameters()
        self._names: list[str] = list(dict(tree_flatten(self._unread)))

    @property
    def head(self) -> str:
        """Path of the head; where it is tied, of the embedding."""
        return "lm_head" if "lm_head.weight" in self.weights.entries else f"{self.prefix}embed_tokens"

    @property
    def has_head(self) -> bool:
        """Whether it is a causal model."""
        return is_causal(self.weights.entries)

    def embed(self, ids: mx.array) -> mx.array:
        """Token ids (N, T) -> (N, T, E); reads the rows of the tokens that occur, and no others."""
        path = f"{self.prefix}embed_tokens"
        distinct, places = np.unique(np.array(ids), return_inverse=True)
        table = mx.concatenate([self.weights.rows(path, int(token), int(token) + 1) for token in distinct])
        h = table[mx.array(places.reshape(ids.shape))]
        mx.eval(h)
        return h

    @contextmanager
    def layer(self, index: int) -> Iterator[DecoderLayer]:
        """Reads a layer's weights; they go when the block ends."""
        path = f"{self.prefix}layers.{index}"
        weights = []
        for name in self._names:
            owner, _, parameter = name.rpartition(".")
            is_matrix = parameter == "weight" and not owner.endswith("norm")
            weights.append(
                (name, self.weights.matrix(f"{path}.{owner}") if is_matrix else self.weights.vector(f"{path}.{name}"))
            )
        self._layer.load_weights(weights)
        del weights
        mx.eval(self._layer.parameters())
        try:
            yield self._layer
        finally:
            self._layer.update(self._unread)

    def rotation(self, tokens: int) -> Rotation:
        """Of positions 0 to `tokens` - 1."""
        return self._rotary.rotation(mx.arange(tokens)[None], self._rotary.table(tokens), mx.float32)

    def run(self, layer: DecoderLayer, h: mx.array) -> mx.array:
        """Runs a layer on (N, T, E), a few sequences at a time."""
        rotation = self.rotation(h.shape[1])
        parts = []
        rows = max(1, min(_ROWS_TOGETHER, _TOKENS_TOGETHER // h.shape[1]))
        for start in range(0, h.shape[0], rows):
            parts.append(layer(h[start : start + rows], rotation, CAUSAL, None)[0])
            mx.eval(parts[-1])
        return mx.concatenate(parts)

    def norm(self, h: mx.array) -> mx.array:
        """The final norm."""
        return mx.fast.rms_norm(h, self.weights.vector(f"{self.prefix}norm.weight"), self.config.rms_norm_eps)


CAUSAL = Mask("causal")


def check_finite(h: mx.array, where: str) -> None:
    """Raises ArceeError if hidden states hold Inf or NaN."""
    if not bool(mx.isfinite(h).all()):
        raise ArceeError(
            f"{where} gives Inf or NaN; expected finite hidden states; the weights are damaged, or this text is too much "
            f"for them"
        )

"""Calibrated quantization: layer by layer, with the inputs that the rounded layers before it really give.

Two streams of hidden states run through the model side by side: the float model's, and that of what has been written
so far. A linear layer is first moved to where it makes good what is wrong with its inputs (`correct_weight`), and then
rounded with error feedback. What is written is read back for the second stream: so a conversion that was cut off goes on
with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Generator, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .. import upstream
from ..checkpoint.files import DTYPES, TensorEntry
from ..checkpoint.names import TASK_HEADS
from ..errors import ConversionError, InputError
from ..measure.layers import CAUSAL, LayerStream, WeightReader, check_finite
from ..model.decoder import DecoderLayer
from ..model.relu2.symmetry import bound_neurons
from ..model.rope import Rotation
from .error_feedback import ErrorFeedback, Floats, correct_weight, round_to_nearest
from .fold import HEADROOM, Scaling, find_down, layer_scalings, needs_fold, scale_neurons
from .plan import PlannedTensor
from .prepare import ConversionPlan
from .quantize import convert_slices, has_non_finite
from .rescale import NeuronUse, choose_factors

_SEQUENCES_TOGETHER = 4
_HEAD_ROWS = 2**13
# A tied matrix is the head, whose inputs are known, and the embedding, for which every direction counts the same.
_EMBEDDING_SHARE = 0.3
# Larger moments are kept in float32: those of 18,432 neurons take 1.4 GB in it.
MOST_FLOAT64_INPUTS = 4096
_MOST_WEIGHT = 1e15  # the squares of larger ones leave float32

Converted = tuple[PlannedTensor, list[mx.array]]


def check_calibration(planned: ConversionPlan, *, allow_nonfinite: bool) -> None:
    """Raises InputError for what error feedback has no rule for: forms other than affine, weights that are not finite."""
    if allow_nonfinite:
        raise InputError("calibration came with allow_nonfinite; expected one or the other; leave one out")
    folds = needs_fold(planned.dtype, planned.source.config.hidden_act)
    if not folds and not any(tensor.quantization for tensor in planned.tensors):
        raise InputError("calibration came with a recipe that quantizes nothing; expected one that does; leave one out")
    for tensor in planned.tensors:
        if tensor.quantization is not None and tensor.quantization.mode != "affine":
            raise InputError(
                f"calibration with {tensor.name!r} in {tensor.form}; expected mode affine; leave --calibrate out, or name "
                f"another recipe"
            )


class Calibration:
    """Converts a model's tensors layer by layer; `convert_tensors` gives them, to be written at once."""

    def __init__(
        self,
        planned: ConversionPlan,
        written: WeightReader,
        finished: Container[str],
        scalings: dict[str, Scaling],
        ids: mx.array,
    ) -> None:
        """Prepares; computes nothing.

        Args:
            planned: the conversion.
            written: reads the tensors of the result, once they were given and written.
            finished: names of planned tensors that are written already.
            scalings: what those were scaled by, by the model's key; what is scaled from now on comes to it.
            ids: (N, T), the calibration text.
        """
        config = planned.source.config
        self._scalings = scalings
        self._planned, self._ids = planned, ids
        self._pending = {tensor.key: tensor for tensor in planned.tensors if tensor.name not in finished}
        self._source = LayerStream(config, _SourceReader(planned.sources, None))
        self._result = LayerStream(config, written)
        self._folds = needs_fold(planned.dtype, config.hidden_act)

    def convert_tensors(self) -> Generator[Converted]:
        """Converts all tensors that are not finished; each must be written before the next is asked for."""
        source, result = self._source, self._result
        embedding = f"{source.prefix}embed_tokens"
        is_tied = source.has_head and source.head == embedding
        if f"{embedding}.weight" in self._pending:
            yield from self._convert_rows(embedding, self._find_final_moments() if is_tied else None)
        pair = _Pair(source.embed(self._ids), result.embed(self._ids))
        for index in range(source.config.num_hidden_layers):
            yield from self._convert_layer(index, pair)
            check_finite(pair.given, f"layer {index} of the result, on the calibration text,")
        yield from self._convert_plainly(f"{source.prefix}norm.weight")
        if source.has_head and not is_tied and "lm_head.weight" in self._pending:
            moments, cross = _Moments(), _Moments()
            for wanted, given in pair.parts():
                wanted, given = source.norm(wanted), result.norm(given)
                moments.add(given, given)
                cross.add(wanted - given, given)
            yield from self._convert_rows("lm_head", moments.take_mean(), cross.take_mean())
        for key in [key for key in self._pending if key.split(".")[0] in TASK_HEADS]:
            yield from self._convert_plainly(key)

    def _convert_layer(self, index: int, pair: _Pair) -> Iterator[Converted]:
        """Converts what is pending of a layer and moves both streams behind it."""
        path, source, result = f"{self._source.prefix}layers.{index}", self._source, self._result
        if not any(key.startswith(f"{path}.") for key in self._pending):
            with source.layer(index) as layer:
                pair.wanted = source.run(layer, pair.wanted)
            with result.layer(index) as layer:
                pair.given = result.run(layer, pair.given)
            return
        rotation = source.rotation(self._ids.shape[1])
        rounded = _Rounded(self._result, path)

        def convert(*names: str) -> Iterator[Converted]:
            for name in names:
                yield from self._convert_plainly(f"{path}.{name}")
                rounded.read(name)

        with source.layer(index) as layer:
            attention, mlp, own = layer.self_attn, layer.mlp, rounded.layer
            yield from convert("input_layernorm.weight", "post_attention_layernorm.weight")
            yield from convert(*(f"self_attn.{name}.bias" for name in ("q_proj", "k_proj", "v_proj", "o_proj")))
            yield from convert("mlp.down_proj.bias")

            moments, cross = _Moments(), _Moments()
            for wanted, given in pair.parts():
                wanted, given = layer.input_layernorm(wanted), own.input_layernorm(given)
                moments.add(given, given)
                cross.add(wanted - given, given)
            names = ("q_proj", "k_proj", "v_proj")
            yield from self._round(path, [f"self_attn.{name}" for name in names], moments, cross)
            for name in names:
                rounded.read(f"self_attn.{name}.weight")

            moments, shift = _Moments(), _Moments()
            for wanted, given in pair.parts():
                heads, own_heads = _attend(layer, wanted, rotation), _attend(own, given, rotation)
                moments.add(own_heads, own_heads)
                shift.add(wanted - given + (heads - own_heads) @ attention.o_proj.weight.T, own_heads)
            yield from self._round(path, ["self_attn.o_proj"], moments, shift=shift)
            rounded.read("self_attn.o_proj.weight")
            pair.move(
                lambda h: h + attention.o_proj(_attend(layer, h, rotation)),
                lambda h: h + own.self_attn.o_proj(_attend(own, h, rotation)),
            )

            moments, cross, use = _Moments(), _Moments(), NeuronUse()
            for wanted, given in pair.parts():
                wanted, given = layer.post_attention_layernorm(wanted), own.post_attention_layernorm(given)
                moments.add(given, given)
                cross.add(wanted - given, given)
                use.add(mlp.up_proj(wanted), mlp.act_fn)
                use.add(mlp.up_proj(given), mlp.act_fn)
            self._scale_neurons(path, layer, use)
            yield from convert("mlp.up_proj.bias")
            yield from self._round(path, ["mlp.up_proj"], moments, cross)
            rounded.read("mlp.up_proj.weight")

            moments, shift = _Moments(), _Moments()
            scaling = self._scalings.get(f"{path}.mlp.down_proj.weight", Scaling())
            scaled = scaling.apply(mlp.down_proj.weight)
            for wanted, given in pair.parts():
                neurons = mlp.act_fn(mlp.up_proj(layer.post_attention_layernorm(wanted)))
                own_neurons = own.mlp.act_fn(own.mlp.up_proj(own.post_attention_layernorm(given)))
                moments.add(own_neurons, own_neurons)
                outputs = neurons @ mlp.down_proj.weight.T - own_neurons @ scaled.T
                shift.add(wanted - given + outputs, own_neurons)
            del scaled
            yield from self._round(path, ["mlp.down_proj"], moments, shift=shift)
            rounded.read("mlp.down_proj.weight")
            pair.move(
                lambda h: h + mlp(layer.post_attention_layernorm(h)),
                lambda h: h + own.mlp(own.post_attention_layernorm(h)),
            )

    def _round(
        self,
        path: str,
        names: Sequence[str],
        moments: _Moments,
        cross: _Moments | None = None,
        shift: _Moments | None = None,
    ) -> Iterator[Converted]:
        """Converts the matrices of linear layers with the same inputs; `cross` or `shift` says what they should make good."""
        feedback = mean = drift = None
        for name in names:
            key = f"{path}.{name}.weight"
            if key not in self._pending:
                continue
            tensor = self._pending[key]
            if tensor.quantization is None:
                yield from self._convert_plainly(key)
                continue
            if mean is None:
                mean, drift = moments.take_mean(), None if cross is None else cross.take_mean()
            weight: Floats = np.array(self._source.weights.matrix(f"{path}.{name}"), dtype=mean.dtype)
            if drift is not None:
                weight = correct_weight(weight, weight @ drift, mean)
            scaling = self._scalings.get(key)
            if scaling is not None:
                weight = np.array(scaling.apply(mx.array(weight.astype(np.float32))), dtype=mean.dtype)
            if shift is not None:
                weight = correct_weight(weight, shift.take_mean(), mean)
            feedback = feedback or ErrorFeedback(mean)  # after the correction, whose factor is as large as its own
            dtype = DTYPES[tensor.dtype][0]
            _check_range(weight, tensor)
            rounding = feedback.round_by_row if tensor.by_neuron else feedback.round_by_column
            yield tensor, rounding(weight, tensor.quantization, dtype).pack(tensor.quantization, dtype)

    def _convert_rows(self, path: str, moments: Floats | None, cross: Floats | None = None) -> Iterator[Converted]:
        """Converts the embedding or the head some rows at a time."""
        tensor = self._pending[f"{path}.weight"]
        if (form := tensor.quantization) is None:
            yield from self._convert_plainly(tensor.key)
            return
        dtype = DTYPES[tensor.dtype][0]
        feedback = None if moments is None else ErrorFeedback(moments)
        for start in range(0, tensor.source.shape[0], _HEAD_ROWS):
            stop = min(start + _HEAD_ROWS, tensor.source.shape[0])
            weight: Floats = np.array(self._source.weights.rows(path, start, stop), dtype=np.float64)
            if cross is not None and moments is not None:
                weight = correct_weight(weight, weight @ cross, moments)
            _check_range(weight, tensor)
            done = (
                round_to_nearest(weight, form, dtype)
                if feedback is None
                else feedback.round_by_column(weight, form, dtype)
            )
            yield tensor, done.pack(form, dtype)

    def _convert_plainly(self, key: str) -> Iterator[Converted]:
        if key in self._pending:
            yield from convert_slices([self._pending[key]], self._scalings)

    def _scale_neurons(self, path: str, layer: DecoderLayer, use: NeuronUse) -> None:
        """Decides what the layer's neurons are scaled by, before their matrices are rounded."""
        if self._planned.source.config.hidden_act != "relu2":
            return
        mlp, down = layer.mlp, find_down(path, self._planned.tensors)
        has_bias = "bias" in mlp.up_proj
        check_finite(mx.array(use.importance.astype(np.float32)), f"{path}.mlp, on the calibration text,")
        factors: Floats = np.ones(mlp.down_proj.weight.shape[1])
        if down.quantization is not None and not down.by_neuron:
            weight = np.array(mlp.down_proj.weight)
            factors = choose_factors(weight, use, down.quantization, DTYPES[down.dtype][0]) ** -0.5
        if self._folds:
            bounds = bound_neurons(mlp.up_proj.weight, layer.post_attention_layernorm.weight, mlp.up_proj.get("bias"))
            maxima = np.minimum(bounds, HEADROOM * use.maxima) * factors
            folded = layer_scalings(path, maxima, self._planned.tensors, has_bias=has_bias)
            if folded:
                factors = factors * np.array(folded[f"{path}.mlp.up_proj.weight"].rows)
        if (factors != 1).any():
            self._scalings |= scale_neurons(path, factors, has_bias=has_bias)

    def _find_final_moments(self) -> Floats:
        """Of the float model's final hidden states, with a share for the other use of a tied matrix."""
        source, h = self._source, self._source.embed(self._ids)
        for index in range(source.config.num_hidden_layers):
            with source.layer(index) as layer:
                h = source.run(layer, h)
        moments = _Moments()
        for part, _ in _Pair(h, h).parts():
            final = source.norm(part)
            moments.add(final, final)
        mean = moments.take_mean()
        return mean / np.diag(mean).mean() + _EMBEDDING_SHARE * np.eye(len(mean))


class _SourceReader(WeightReader):
    """Reads a source's weights, and refuses Inf and NaN: error feedback would spread them over the whole matrix."""

    def vector(self, key: str) -> mx.array:
        return _refuse_non_finite(super().vector(key), self.entries[key])

    def _read(self, key: str, path: str, start: int, stop: int) -> mx.array:
        return _refuse_non_finite(super()._read(key, path, start, stop), self.entries[key])


def _refuse_non_finite(values: mx.array, entry: TensorEntry) -> mx.array:
    if has_non_finite(values):
        raise ConversionError(
            f"{entry.file}: {entry.name!r} holds Inf or NaN; expected finite weights; download the file again, or ask "
            f"its maker"
        )
    return values


def _check_range(weight: Floats, tensor: PlannedTensor) -> None:
    """Refuses weights that scales and biases in the stored dtype cannot reach."""
    most = min(float(mx.finfo(DTYPES[tensor.dtype][0]).max), _MOST_WEIGHT)
    if not float(np.abs(weight).max()) <= most:
        source = tensor.source
        raise ConversionError(
            f"{source.file}: {source.name!r} holds a weight too large to be calibrated in {tensor.form}; expected at most "
            f"{most:g}; convert without --calibrate, or to bfloat16"
        )


class _Pair:
    """Hidden states (N, T, E) of the float model, `wanted`, and of what is written, `given`."""

    def __init__(self, wanted: mx.array, given: mx.array) -> None:
        self.wanted, self.given = wanted, given

    def parts(self) -> Iterator[tuple[mx.array, mx.array]]:
        """A few sequences of both at a time."""
        for start in range(0, self.wanted.shape[0], _SEQUENCES_TOGETHER):
            part = slice(start, start + _SEQUENCES_TOGETHER)
            yield self.wanted[part], self.given[part]

    def move(self, wanted: Callable[[mx.array], mx.array], given: Callable[[mx.array], mx.array]) -> None:
        """Moves both on, part by part."""
        new: tuple[list[mx.array], list[mx.array]] = ([], [])
        for parts in self.parts():
            for done, step, part in zip(new, (wanted, given), parts, strict=True):
                done.append(step(part))
            mx.eval(new[0][-1], new[1][-1])
        self.wanted, self.given = mx.concatenate(new[0]), mx.concatenate(new[1])
        mx.eval(self.wanted, self.given)


class _Moments:
    """The mean of a b^T over tokens, summed on the device in float32."""

    def __init__(self) -> None:
        self._sum: mx.array | None = None
        self._tokens = 0

    def add(self, a: mx.array, b: mx.array) -> None:
        """Adds tokens: a (..., m) and b (..., n)."""
        a, b = (x.reshape(-1, x.shape[-1]) for x in (a, b))
        product = a.T @ b
        self._sum = product if self._sum is None else self._sum + product
        self._tokens += a.shape[0]
        mx.eval(self._sum)

    def take_mean(self) -> Floats:
        """(m, n); gives up the sum, which of 18,432 neurons takes 1.4 GB."""
        assert self._sum is not None
        check_finite(self._sum, "a product of activations on the calibration text")
        dtype = np.float64 if self._sum.shape[1] <= MOST_FLOAT64_INPUTS else np.float32
        mean: Floats = np.array(self._sum).astype(dtype)
        self._sum = None
        mean /= self._tokens
        return mean


class _Rounded:
    """A layer whose weights are read from what is written, one after the other."""

    def __init__(self, result: LayerStream, path: str) -> None:
        self._weights, self._path = result.weights, path
        with upstream.keep_random_state():
            self.layer = DecoderLayer(result.config)
        self.layer.eval()
        self._names = set(dict(tree_flatten(self.layer.parameters())))

    def read(self, name: str) -> None:
        """Reads a parameter, such as "self_attn.q_proj.weight"; one that this model does not have is passed over."""
        if name not in self._names:
            return
        owner, _, parameter = name.rpartition(".")
        is_matrix = parameter == "weight" and not owner.endswith("norm")
        full = f"{self._path}.{owner if is_matrix else name}"
        value = self._weights.matrix(full) if is_matrix else self._weights.vector(full)
        self.layer.load_weights([(name, value)], strict=False)
        mx.eval(value)


def _attend(layer: DecoderLayer, h: mx.array, rotation: Rotation) -> mx.array:
    """What o_proj of a layer reads, (B, L, H * D)."""
    attention = layer.self_attn
    o_proj: nn.Linear = attention.o_proj
    attention.update_modules({"o_proj": nn.Identity()})
    try:
        return attention(layer.input_layernorm(h), rotation, CAUSAL, None)[0]
    finally:
        attention.o_proj = o_proj

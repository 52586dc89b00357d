"""What `bench decode` measures: tokens/s of the four programs in turns, the down projections alone, prefill, memory, zeros."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from .. import upstream
from ..model.activations import relu2
from ..model.decoder import ArceeForCausalLM
from ..model.relu2.down import Sparse
from .clock import Clock
from .decode_programs import BY_NEURON, SPARSE, STANDARD, Program, Programs
from .decode_results import DecodeResult, LayoutResult

_CALIBRATION_TOKENS = 4  # a random layer's scale is the same for all
_DOWN_ROUNDS = 10


def set_zeros(programs: Programs, ids: mx.array, share: float) -> None:
    """Shifts what goes into each layer's activation, by the bias of the up projection, so that this share is negative.

    Args:
        programs: of a model with mlp_bias.
        ids: int (T,), tokens for which the share is reached.
        share: of the neurons, 0 to 1.
    """

    def shift(layer: Any) -> Callable[[mx.array], mx.array]:
        up = layer.mlp.up_proj
        up.bias = mx.zeros_like(up.bias)

        def activation(x: mx.array) -> mx.array:
            bias = -float(np.quantile(np.array(x.astype(mx.float32)), share))
            up.bias = mx.full(up.bias.shape, bias, x.dtype)
            return relu2(x + up.bias)

        return activation

    _run_with(programs.by_neuron, shift, ids[:_CALIBRATION_TOKENS])


def count_zeros(programs: Programs, ids: mx.array) -> tuple[list[float], list[mx.array]]:
    """Reads tokens and looks at what each layer's activation gives.

    Args:
        programs: of the model.
        ids: int (T,).

    Returns:
        the share of exact zeros of each layer; and what goes into its activation, for the last token, (1, F).
    """
    zeros: list[float] = []
    inputs: list[mx.array] = []

    def look(_: Any) -> Callable[[mx.array], mx.array]:
        def activation(x: mx.array) -> mx.array:
            values = relu2(x)
            zeros.append(float((values == 0).mean()))
            inputs.append(x[0, -1:])
            return values

        return activation

    _run_with(programs.by_neuron, look, ids)
    return zeros, inputs


def _run_with(model: ArceeForCausalLM, make: Callable[[Any], Callable[[mx.array], mx.array]], ids: mx.array) -> None:
    """Runs tokens through a model whose layers have another activation function, made for each."""
    for layer in model.layers:
        layer.mlp.act_fn = make(layer)
    try:
        mx.eval(model.model(ids[None]))
    finally:
        for layer in model.layers:
            layer.mlp.act_fn = relu2


def decode(program: Program, ids: mx.array, clock: Clock = time.perf_counter) -> float:
    """Decodes tokens one by one into an empty cache, and takes the likeliest next one of each, as generation does.

    The next token is computed while the one before is waited for. Which token comes next is given: so all programs compute
    the same.

    Args:
        program: to be measured.
        ids: int (T,).
        clock: to measure by.

    Returns:
        tokens/s.
    """
    cache = upstream.mlx_lm_module("models.cache").make_prompt_cache(program.model)
    with program.running() as model:
        started_s = clock()
        last = None
        for token in ids:
            chosen = mx.argmax(model(token[None, None], cache=cache)[:, -1], axis=-1)
            mx.async_eval(chosen)
            if last is not None:
                last.item()
            last = chosen
        mx.eval(last)
        return ids.size / (clock() - started_s)


def measure_decode(
    programs: Programs,
    ids: mx.array,
    *,
    asked: float | None,
    runs: int,
    clock: Clock = time.perf_counter,
    on_run: Callable[[], object] | None = None,
) -> DecodeResult:
    """Lets the four programs decode the same tokens, taking turns.

    Args:
        programs: to be measured.
        ids: int (T,).
        asked: share of zeros that was wanted, if one was.
        runs: of each.
        clock: to measure by.
        on_run: told of each run.
    """
    zeros, inputs = count_zeros(programs, ids)
    rates: dict[str, list[float]] = {program.name: [] for program in programs}
    for _ in range(runs):
        for program in programs:
            rates[program.name].append(decode(program, ids, clock))
            if on_run is not None:
                on_run()
    step = programs.count_bytes(ids.size // 2).step([1 - share for share in zeros])
    return DecodeResult(asked=asked, zeros=zeros, rates=rates, down_s=_time_down(programs, inputs, clock), step=step)


def _time_down(programs: Programs, inputs: Sequence[mx.array], clock: Clock) -> dict[str, list[float]]:
    """Seconds for the down projections of one token, all layers one after the other, so that no cache holds a matrix."""
    residual = mx.zeros((1, programs.config.hidden_size), inputs[0].dtype)

    def by_neuron(sparse: Sparse) -> list[mx.array]:
        pairs = zip(programs.by_neuron.layers, inputs, strict=True)
        return [layer.mlp.down_proj.after_relu2(x, residual, sparse=sparse) for layer, x in pairs]

    def standard() -> list[mx.array]:
        return [
            residual + layer.mlp.down_proj(relu2(x)) for layer, x in zip(programs.standard.layers, inputs, strict=True)
        ]

    ways: dict[str, Callable[[], list[mx.array]]] = {
        SPARSE: lambda: by_neuron("auto"),
        BY_NEURON: lambda: by_neuron("off"),
        STANDARD: standard,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(_DOWN_ROUNDS + 1):  # the first only warms up
        for name, way in ways.items():
            started_s = clock()
            mx.eval(way())
            if number:
                seconds[name].append(clock() - started_s)
    return seconds


def measure_layouts(
    programs: Programs, ids: mx.array, prompt: mx.array, *, layers: int, runs: int, clock: Clock = time.perf_counter
) -> dict[str, LayoutResult]:
    """Reads a prompt with both layouts in turns, and looks at the memory.

    Args:
        programs: to be measured.
        ids: int (T,), decoded for the memory it takes.
        prompt: int (T,), read at once, up to the final norm.
        layers: that read the prompt, from the first.
        runs: of each layout.
        clock: to measure by.
    """
    turns = {SPARSE: programs.by_neuron, STANDARD: programs.standard}
    cuts = {name: _cut(model, layers) for name, model in turns.items()}
    rates: dict[str, list[float]] = {name: [] for name in turns}
    decode_bytes, prefill_bytes = {}, {}
    for program in programs:
        if program.name in turns:
            decode_bytes[program.name] = _measure_memory(partial(decode, program, ids))
    for _ in range(runs):
        for name, model in cuts.items():
            started_s = clock()
            prefill_bytes[name] = _measure_memory(partial(_read_prompt, model, prompt))
            rates[name].append(prompt.size / (clock() - started_s))
    return {
        name: LayoutResult(
            weights_bytes=sum(x.nbytes for x in dict(tree_flatten(model.parameters())).values()),
            decode_bytes=decode_bytes[name],
            prefill_bytes=prefill_bytes[name],
            prefill_rates=rates[name],
        )
        for name, model in turns.items()
    }


def _read_prompt(model: ArceeForCausalLM, prompt: mx.array) -> None:
    mx.eval(model.model(prompt[None], cache=model.make_cache()))


def _cut(model: ArceeForCausalLM, layers: int) -> ArceeForCausalLM:
    """The first layers of a model, shared with it."""
    with upstream.keep_random_state():
        cut = ArceeForCausalLM(replace(model.config, num_hidden_layers=layers), tied="lm_head" not in model)
    modules: dict[str, Any] = model.leaf_modules()
    modules["model"]["layers"] = modules["model"]["layers"][:layers]
    cut.update_modules(modules)
    return cut.eval()  # type: ignore[return-value]


def _measure_memory(run: Callable[[], object]) -> int:
    """Bytes that a run had in use at once beside those in use before."""
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    run()
    return mx.get_peak_memory() - before

"""What `bench decode` measured: the numbers, their ratios, and the lines that people read."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..measure.decode_bytes import StepBytes
from .decode_programs import BY_NEURON, PORT, SPARSE, STANDARD


@dataclass(frozen=True, kw_only=True)
class DecodeResult:
    """What was measured at one share of zeros.

    Attributes:
        asked: the share that was wanted; None for a checkpoint's own.
        zeros: of each layer, the share of its neurons that were zero for the tokens that were decoded.
        rates: program -> tokens/s of each run.
        down_s: sparse, dense by neuron, dense standard -> seconds that all layers' down projections took in each round.
        step: the bytes that a token reads.
    """

    asked: float | None
    zeros: Sequence[float]
    rates: Mapping[str, Sequence[float]]
    down_s: Mapping[str, Sequence[float]]
    step: StepBytes

    @property
    def mean_zeros(self) -> float:
        """Over all layers."""
        return statistics.mean(self.zeros)

    def ratio(self, against: str) -> float:
        """Tokens/s of sparse over those of another program, medians."""
        return statistics.median(self.rates[SPARSE]) / statistics.median(self.rates[against])

    def down_ratio(self, against: str) -> float:
        """How many times as fast sparse down projections are, medians."""
        return statistics.median(self.down_s[against]) / statistics.median(self.down_s[SPARSE])

    @property
    def reached(self) -> float:
        """Share of what the bytes allow over dense by neuron."""
        return self.ratio(BY_NEURON) / self.step.speedup

    def to_dict(self) -> dict[str, Any]:
        """In plain values, as JSON holds them."""
        return {
            "asked_zeros": self.asked,
            "zeros": self.mean_zeros,
            "zeros_by_layer": list(self.zeros),
            "tokens_per_s": {name: list(rates) for name, rates in self.rates.items()},
            "ratios": {name: self.ratio(name) for name in (BY_NEURON, STANDARD, PORT)},
            "down_s": {name: list(seconds) for name, seconds in self.down_s.items()},
            "down_ratios": {name: self.down_ratio(name) for name in (BY_NEURON, STANDARD)},
            "bytes": self.step.to_dict(),
            "reached": self.reached,
        }


@dataclass(frozen=True, kw_only=True)
class LayoutResult:
    """What a layout costs where nothing can be left out.

    Attributes:
        weights_bytes: of all the weights.
        decode_bytes, prefill_bytes: the most that decoding and reading a prompt took beside them.
        prefill_rates: tokens/s of each run.
    """

    weights_bytes: int
    decode_bytes: int
    prefill_bytes: int
    prefill_rates: Sequence[float]

    def to_dict(self) -> dict[str, Any]:
        """In plain values, as JSON holds them."""
        sizes = {name: getattr(self, name) for name in ("weights_bytes", "decode_bytes", "prefill_bytes")}
        return sizes | {"prefill_tokens_per_s": list(self.prefill_rates)}


def describe_decode(result: DecodeResult) -> Iterator[str]:
    """The lines about one share of zeros."""
    asked = "" if result.asked is None else f" of {100 * result.asked:g} % asked for"
    yield f"zeros {result.mean_zeros:.1%}{asked} ({min(result.zeros):.1%} to {max(result.zeros):.1%} by layer)"
    for name, rates in result.rates.items():
        yield f"  {name:15s}  median {_round(rates)} tokens/s, {min(rates):.4g} to {max(rates):.4g}"
    ratios = ", ".join(f"{result.ratio(name):.2f} ({name})" for name in (BY_NEURON, STANDARD, PORT))
    yield f"  sparse against   {ratios}"
    downs = ", ".join(f"{result.down_ratio(name):.2f} ({name})" for name in (BY_NEURON, STANDARD))
    per_layer_ms = 1e3 * statistics.median(result.down_s[SPARSE]) / len(result.zeros)
    yield f"  down alone       {downs}; {per_layer_ms:.3g} ms a layer"
    step = result.step
    yield (
        f"  bytes a token    {step.dense_bytes / 1e6:,.1f} MB dense, {step.sparse_bytes / 1e6:,.1f} sparse: "
        f"{step.speedup:.2f} times at most by bytes, of which {result.reached:.0%} reached against {BY_NEURON}"
    )


def describe_layouts(layouts: Mapping[str, LayoutResult], prompt_tokens: int, layers: int) -> Iterator[str]:
    """The lines about prefill and memory."""
    by_neuron, standard = (layouts[name] for name in (SPARSE, STANDARD))
    yield f"a prompt of {prompt_tokens} tokens, {'first layer alone' if layers == 1 else f'{layers} layers'}"
    for name, result in (("by neuron", by_neuron), ("standard", standard)):
        rates = result.prefill_rates
        yield f"  {name:15s}  median {_round(rates)} tokens/s, {min(rates):.4g} to {max(rates):.4g}"
    ratio = statistics.median(by_neuron.prefill_rates) / statistics.median(standard.prefill_rates)
    yield f"  ratio            {ratio:.2f} (by neuron / standard)"
    yield "memory, MB         weights   to decode   for the prompt"
    for name, result in (("by neuron", by_neuron), ("standard", standard)):
        sizes = (result.weights_bytes, result.decode_bytes, result.prefill_bytes)
        yield f"  {name:15s}" + "".join(
            f"{size / 1e6:{width},.1f}" for size, width in zip(sizes, (9, 12, 17), strict=True)
        )


def _round(rates: Sequence[float]) -> str:
    return f"{statistics.median(rates):.4g}"

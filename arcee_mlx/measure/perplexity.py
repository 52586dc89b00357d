"""measure_perplexity: how well a checkpoint predicts a text, whatever its size: one layer is in memory at a time.

It is computed in float32 on every device, as `compare` does, so that two checkpoints differ by their weights alone.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.opening import OpenedModel
from ..errors import InputError
from .divergence import FinalStates
from .text import Windows
from .text_run import Progress, TextRun, check_windows, count_part, cut_blocks, pick_targets, share_progress

_SLICE_ROWS, _TOKENS_TOGETHER = 4096, 512
_MOST_EXPONENT = 700.0  # the exponential of more is no float any longer, and no use


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How well a checkpoint predicts a text; from `measure_perplexity`.

    Attributes:
        tokens: that were predicted.
        text_bytes: of the text that they stand for, in UTF-8.
        perplexity: the exponential of the mean negative log-likelihood of a token, in nats.
        standard_error: of the perplexity, as mlx-lm has it: as if tokens were independent, which makes it a little small.
    """

    tokens: int
    text_bytes: int
    perplexity: float
    standard_error: float

    @property
    def bits_per_byte(self) -> float:
        """Negative log-likelihood of a byte of the text, in bits, which can be compared between tokenizers."""
        return math.log2(self.perplexity) * self.tokens / self.text_bytes

    def to_dict(self) -> dict[str, Any]:
        """In plain values, as JSON holds them."""
        return asdict(self) | {"bits_per_byte": self.bits_per_byte}


def measure_perplexity(opened: OpenedModel, windows: Windows, *, on_progress: Progress | None = None) -> Perplexity:
    """Runs a text through a checkpoint, a layer at a time, and measures how well each next token was predicted.

    Args:
        opened: a causal checkpoint, float or quantized, in any layout.
        windows: of a text, from `cut_windows`.
        on_progress: told the name of each part that is done, and its bytes; of a text that is read in several blocks,
            the block's share of them.

    Raises:
        InputError: it is a decoder without a head, or the ids do not fit the model.
        CheckpointError: a file cannot be read.
        ArceeError: the model gives Inf or NaN; names the layer.
    """
    config = opened.config
    scored = check_windows(windows.ids, windows.scored, config.vocab_size)
    sizes = [count_part(opened, f"layers.{index}.") for index in range(config.num_hidden_layers)]
    losses = []
    for block in cut_blocks(windows.ids, config.hidden_size):
        report = share_progress(on_progress, block, windows.ids.shape[0])
        text = TextRun(opened, windows.ids[block])
        if not text.stream.has_head:
            raise InputError(
                f"{config.source}: is of a model without a language-model head; expected one that predicts tokens; name one"
            )
        for index, nbytes in enumerate(sizes):
            with text.stream.layer(index) as layer:
                text.states = [text.run(layer, index, h) for h in text.states]
            report(f"layers.{index}", nbytes)
        losses.append(_measure_losses(text.finish(scored[block]), pick_targets(windows.ids[block], scored[block])))
        report("lm_head", count_part(opened) - sum(sizes))
    perplexity, error = exponentiate(np.concatenate(losses))
    return Perplexity(tokens=windows.tokens, text_bytes=windows.text_bytes, perplexity=perplexity, standard_error=error)


def exponentiate(losses: NDArray[np.float64]) -> tuple[float, float]:
    """The perplexity that losses in nats come to, and its standard error."""
    perplexity = math.exp(min(float(losses.mean()), _MOST_EXPONENT))
    return perplexity, perplexity * standard_error(losses)


def standard_error(values: NDArray[np.float64]) -> float:
    """Of the mean of values, taken as independent; 0 of a single one."""
    return float(values.std(ddof=1)) / math.sqrt(values.size) if values.size > 1 else 0.0


def _measure_losses(final: FinalStates, targets: mx.array) -> NDArray[np.float64]:
    """Negative log-likelihoods (M,) of the tokens that came, in nats; a slice of the head is in memory."""
    stream, vocab_size = final.stream, final.stream.config.vocab_size
    tops, masses, own = [], [], np.full(targets.size, -np.inf)
    for start in range(0, vocab_size, _SLICE_ROWS):
        head = stream.weights.rows(stream.head, start, min(start + _SLICE_ROWS, vocab_size))
        mx.eval(head)
        top, mass = np.empty(targets.size), np.empty(targets.size)
        for first in range(0, targets.size, _TOKENS_TOGETHER):
            some = slice(first, first + _TOKENS_TOGETHER)
            logits = final.logits(head, some)
            best = logits.max(axis=1)
            place = targets[some] - start
            inside = mx.take_along_axis(logits, mx.clip(place, 0, head.shape[0] - 1)[:, None], axis=1)[:, 0]
            mine = mx.where((place >= 0) & (place < head.shape[0]), inside, -mx.inf)
            top[some], mass[some] = best, mx.exp(logits - best[:, None]).sum(axis=1)
            own[some] = np.maximum(own[some], mine)
        tops.append(top)
        masses.append(mass)
    largest = np.max(tops, axis=0)
    return largest + np.log((np.exp(np.array(tops) - largest) * np.array(masses)).sum(axis=0)) - own

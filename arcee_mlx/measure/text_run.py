"""TextRun: a checkpoint and the hidden states of a text in it, as far as it has been run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.names import strip_prefix
from ..checkpoint.opening import OpenedModel
from ..errors import InputError
from ..model.decoder import DecoderLayer
from ..model.inputs import check_ids
from .divergence import FinalStates
from .layers import AdaptedReader, LayerStream, WeightReader, check_finite

_SEQUENCES_TOGETHER = 4
_BLOCK_BYTES = 2**28  # of hidden states; for each block of a text the weights are read anew

Progress = Callable[[str, int], None]


class TextRun:
    """A checkpoint and the text's hidden states in it, (up to 4, T, E) each, as far as it has been run."""

    def __init__(self, opened: OpenedModel, ids: mx.array) -> None:
        """Embeds int (N, T)."""
        entries = {key: opened.checkpoint.entries[name] for key, name in opened.names.items()}
        table = opened.config.quantization
        adapted = opened.adapter and AdaptedReader(entries, table, opened.adapter)
        self.stream = LayerStream(opened.config, adapted or WeightReader(entries, table))
        self.name = opened.checkpoint.folder.name
        starts = range(0, ids.shape[0], _SEQUENCES_TOGETHER)
        self.states = [self.stream.embed(ids[start : start + _SEQUENCES_TOGETHER]) for start in starts]
        for h in self.states:
            check_finite(h, f"{self.name}: the embedding")

    def run(self, layer: DecoderLayer, index: int, h: mx.array) -> mx.array:
        """Runs a layer on some of the states."""
        out = self.stream.run(layer, h)
        check_finite(out, f"{self.name}: layer {index}")
        return out

    def finish(self, scored: NDArray[np.bool_]) -> FinalStates:
        """Normed states that predict tokens: those before the ones that `scored`, bool (N, T), names."""
        parts, start = [], 0
        for h in self.states:
            rows, columns = np.nonzero(scored[start : start + h.shape[0], 1:])
            parts.append(self.stream.norm(h)[mx.array(rows), mx.array(columns)])
            start += h.shape[0]
        self.states.clear()
        states = mx.concatenate(parts)
        check_finite(states, f"{self.name}: the final norm")
        return FinalStates(self.stream, states, self.name)


def cut_blocks(ids: mx.array, hidden_size: int) -> Iterator[slice]:
    """Cuts windows, int (N, T), into blocks whose hidden states fit in memory several times over."""
    step = max(1, _BLOCK_BYTES // (ids.shape[1] * hidden_size * 4))
    return (slice(start, start + step) for start in range(0, ids.shape[0], step))


def check_windows(ids: mx.array, scored: NDArray[np.bool_] | None, vocab_size: int) -> NDArray[np.bool_]:
    """Checks windows, int (N, T), and gives the tokens to predict, bool (N, T); of None, all but the first of each.

    Raises:
        InputError: a shape or an id does not fit, or there is nothing to predict.
    """
    if ids.ndim != 2 or ids.shape[0] < 1 or ids.shape[1] < 2:
        raise InputError(f"ids have shape {ids.shape}; expected (windows, tokens), 2 tokens at least; take more text")
    check_ids(ids, 0, vocab_size, "ids")
    if scored is None:
        scored = np.ones(ids.shape, dtype=np.bool_)
        scored[:, 0] = False
    if scored.shape != ids.shape or scored[:, 0].any() or not scored.any():
        raise InputError(
            f"scored has shape {scored.shape} and {int(scored[:, 0].sum())} first tokens of windows; expected {ids.shape}, "
            f"no first token, which nothing predicts, and some other one"
        )
    return scored


def pick_targets(ids: mx.array, scored: NDArray[np.bool_]) -> mx.array:
    """The tokens to predict, int (M,), in the order of `TextRun.finish`."""
    rows, columns = np.nonzero(scored[:, 1:])
    return ids[mx.array(rows), mx.array(columns + 1)]


def count_part(opened: OpenedModel, part: str = "") -> int:
    """Bytes of the tensors whose path begins so; of all."""
    names = opened.names.items()
    return sum(opened.checkpoint.entries[name].nbytes for key, name in names if strip_prefix(key).startswith(part))


def share_progress(on_progress: Progress | None, block: slice, count: int) -> Progress:
    """Tells a block's share of each part's bytes, so that over all blocks they come to all of them."""
    stop = min(block.stop, count)

    def report(part: str, nbytes: int) -> None:
        if on_progress is not None:
            on_progress(part, nbytes * stop // count - nbytes * block.start // count)

    return report

"""A text becomes windows of tokens, side by side or overlapping, which a model reads one by one from position 0."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.tokenizer import Tokenizer
from ..errors import CheckpointError, InputError
from ..model.inputs import check_ids
from ..model.json_file import open_regular

LEAST_TOKENS = 16  # of fewer, a perplexity says nothing
_MAX_TEXT_BYTES = 2**27


def read_text(path: str | os.PathLike[str]) -> str:
    """Reads a text file in UTF-8, with or without a byte order mark.

    Raises:
        InputError: it is not there, no regular file, larger than 128 MiB, not UTF-8, or holds nothing but white space.
    """
    file = Path(path).expanduser()
    try:
        with open_regular(file) as opened:
            content = opened.read(_MAX_TEXT_BYTES + 1)
        if len(content) > _MAX_TEXT_BYTES:
            raise InputError(
                f"{file}: has more than {_MAX_TEXT_BYTES >> 20} MiB; expected a text to read as a whole; take a part of it"
            )
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 at byte {error.start}; expected a text in UTF-8; save it so") from None
    except (OSError, CheckpointError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no regular file"
        raise InputError(f"{file}: cannot be read ({reason}); expected a text file; name another one") from error
    if not text.strip():
        raise InputError(f"{file}: holds no text; expected some thousand words; name another one")
    return text


def read_windows(
    tokenizer: Tokenizer, text: str, *, window_tokens: int, max_windows: int | None = None, vocab_size: int
) -> mx.array:
    """Cuts a text's tokens into windows of equal length, without special tokens; what is left at the end is not used.

    Args:
        tokenizer: of the model.
        text: to be read.
        window_tokens: of one window, at least 2; a text that is shorter becomes one window of its own length.
        max_windows: at most so many, spread evenly over the text; None for all.
        vocab_size: of the model, which ids must be in.

    Returns:
        int32 (N, T).

    Raises:
        InputError: the text has fewer than 16 tokens, the tokenizer is another model's, or a number is too small.
    """
    if window_tokens < 2 or (max_windows is not None and max_windows < 1):
        raise InputError(
            f"window_tokens is {window_tokens} and max_windows {max_windows}; expected at least 2 and 1; take more"
        )
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) < LEAST_TOKENS:
        raise InputError(
            f"the text has {len(ids)} tokens; expected at least {LEAST_TOKENS}, better thousands; name a longer one"
        )
    length = min(window_tokens, len(ids))
    count = len(ids) // length
    windows = mx.array(ids[: count * length], mx.int32).reshape(count, length)
    check_ids(windows, 0, vocab_size, "the tokenized text")
    if max_windows is not None and max_windows < count:
        windows = windows[mx.array([i * count // max_windows for i in range(max_windows)])]
    return windows


@dataclass(frozen=True)
class Windows:
    """A text in windows that overlap, so that each of its tokens is predicted once, with others before it.

    Attributes:
        ids: int32 (N, T).
        scored: bool (N, T), the tokens to predict; the others are there to predict them with.
        text_bytes: of the text that the tokens to predict stand for, in UTF-8.
    """

    ids: mx.array
    scored: NDArray[np.bool_]
    text_bytes: int

    @property
    def tokens(self) -> int:
        """How many are predicted."""
        return int(self.scored.sum())


def cut_windows(
    tokenizer: Tokenizer,
    text: str,
    *,
    window_tokens: int,
    stride: int | None = None,
    max_windows: int | None = None,
    vocab_size: int,
) -> Windows:
    """Cuts a text into windows of equal length that predict each of its tokens once.

    A window begins with what the tokenizer puts in front of every text, and ends `stride` tokens after the one before;
    these it predicts, the first window all of its own. The last window ends with the text. Only the first token of a text
    with nothing in front is never predicted.

    Args:
        tokenizer: of the model.
        text: to be read as a whole.
        window_tokens: of one window, at least 2; of a text that is shorter there is one window of its own length.
        stride: tokens that a window predicts; None for as many as it can. Fewer have more before them, and take longer.
        max_windows: at most so many, spread evenly over the text; None for all.
        vocab_size: of the model, which ids must be in.

    Raises:
        InputError: the text has fewer than 16 tokens, the tokenizer is another model's, or a number is out of range.
    """
    stride = window_tokens - 1 if stride is None else stride
    if window_tokens < 2 or not 1 <= stride < window_tokens or (max_windows is not None and max_windows < 1):
        raise InputError(
            f"sequence length {window_tokens}, stride {stride} and {'all' if max_windows is None else max_windows} windows; expected at least 2, 1 to "
            f"{window_tokens - 1}, and at least 1; choose others"
        )
    encoding = tokenizer.encode_with_offsets(text, add_special_tokens=False)
    count = len(encoding.ids)
    if count < LEAST_TOKENS:
        raise InputError(
            f"the text has {count} tokens; expected at least {LEAST_TOKENS}, better thousands; name a longer one"
        )
    ids = np.array(encoding.ids, dtype=np.int32)
    check_ids(mx.array(ids), 0, vocab_size, "the tokenized text")
    first = _tokens_in_front(tokenizer)
    length = min(window_tokens - len(first), count)
    ends = [*range(length, count, stride), count]
    begins = [1 - len(first), *ends[:-1]]  # of what is predicted
    spans = list(zip(begins, ends, strict=True))
    if max_windows is not None and max_windows < len(spans):
        spans = [spans[i * len(spans) // max_windows] for i in range(max_windows)]
    rows = np.stack([np.concatenate([first, ids[end - length : end]]) for _, end in spans]).astype(np.int32)
    places = np.arange(rows.shape[1])
    scored = np.stack([places >= rows.shape[1] - (end - begin) for begin, end in spans])
    starts = [0, *(start for start, _ in encoding.offsets[1:]), len(text)]
    nbytes = sum(len(text[starts[begin] : starts[end]].encode()) for begin, end in spans)
    return Windows(mx.array(rows), scored, nbytes)


def _tokens_in_front(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts in front of every text."""
    encoding = tokenizer.encode_with_offsets("a")
    return list(encoding.ids[: encoding.special_tokens_mask.index(0)])

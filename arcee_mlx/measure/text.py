"""A text becomes windows of tokens, which a model reads one by one from position 0."""

from __future__ import annotations

import os
from pathlib import Path

import mlx.core as mx

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

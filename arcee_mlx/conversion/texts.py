"""The texts a conversion is calibrated and judged on: the user's own file, or the ones that come with the package."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..checkpoint.tokenizer import read_tokenizer
from ..errors import InputError
from ..measure.text import read_text, read_windows
from ..model.config import ArceeConfig

_FOLDER = Path(__file__).with_name("recipes")
# State of the Union addresses and Moby-Dick, public domain; the second was held out when the demo model was trained.
CALIBRATION_TEXT = _FOLDER / "calibration.txt"
VERIFICATION_TEXT = _FOLDER / "verification.txt"


@dataclass(frozen=True)
class Sample:
    """A text in tokens.

    Attributes:
        name: of its file.
        sha256: of the text.
        ids: int32 (N, T), each sequence with the model's token for the beginning of text in front, if it has one.
        is_own: whether it came with the package.
    """

    name: str
    sha256: str
    ids: mx.array
    is_own: bool = False


def read_sample(
    path: str | os.PathLike[str], folder: Path, config: ArceeConfig, *, num_samples: int, sequence_length: int
) -> Sample:
    """Reads a text and cuts it into sequences, spread evenly over it.

    Args:
        path: of a text in UTF-8.
        folder: of the checkpoint, whose tokenizer is used.
        config: of the model.
        num_samples: sequences to take at most.
        sequence_length: tokens of each, at most the positions the model has.

    Raises:
        InputError: the text cannot be read, is too short, or a number is out of range.
        TokenizerError: the checkpoint has no usable tokenizer.
    """
    if num_samples < 1 or not 8 <= sequence_length <= config.max_position_embeddings:
        raise InputError(
            f"num_samples is {num_samples} and sequence_length {sequence_length}; expected at least 1, and 8 to "
            f"{config.max_position_embeddings}, the model's positions; choose others"
        )
    text, tokenizer = read_text(path), read_tokenizer(folder)
    # What a tokenizer puts in front of every text; models come to lean on it, with states found nowhere else.
    first = tokenizer.encode("")[:1]
    try:
        windows = read_windows(
            tokenizer,
            text,
            window_tokens=sequence_length - len(first),
            max_windows=num_samples,
            vocab_size=config.vocab_size,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    if first:
        windows = mx.concatenate([mx.full((windows.shape[0], 1), first[0], windows.dtype), windows], axis=1)
    is_own = path in (CALIBRATION_TEXT, VERIFICATION_TEXT)
    return Sample(Path(path).name, hashlib.sha256(text.encode()).hexdigest(), windows, is_own)

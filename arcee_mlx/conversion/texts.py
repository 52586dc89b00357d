"""The texts a conversion is calibrated and judged on: the user's own file, or the ones that come with the package."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from ..checkpoint.tokenizer import read_tokenizer
from ..errors import InputError
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
        sha256: of its file.
        ids: int32 (N, T).
    """

    name: str
    sha256: str
    ids: mx.array


def read_sample(
    path: str | os.PathLike[str], folder: Path, config: ArceeConfig, *, num_samples: int, sequence_length: int
) -> Sample:
    """Reads a text and cuts it into sequences, spread evenly over it.

    Args:
        path: of a UTF-8 text.
        folder: of the checkpoint, whose tokenizer is used.
        config: of the model.
        num_samples: sequences to take at most.
        sequence_length: tokens of each; at most the positions the model has.

    Raises:
        InputError: the text cannot be read, is too short, or a number is out of range.
        TokenizerError: the checkpoint has no usable tokenizer.
    """
    for name, value, most in (
        ("num_samples", num_samples, 2**20), ("sequence_length", sequence_length, config.max_position_embeddings)
    ):  # fmt: skip
        if not 1 < value <= most:
            raise InputError(f"{name} is {value}; expected 2 to {most}; choose a number in this range")
    try:
        content = Path(path).expanduser().read_bytes()
        text = content.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a text file in UTF-8; check the path") from error
    ids = read_tokenizer(folder).encode(text)
    if wrong := next((i for i in ids if not 0 <= i < config.vocab_size), None):
        raise InputError(
            f"{folder}: its tokenizer gives id {wrong}; expected ids below vocab_size {config.vocab_size}; check that "
            f"tokenizer and weights belong together"
        )
    whole = len(ids) // sequence_length
    if not whole:
        raise InputError(
            f"{path}: has {len(ids)} tokens; expected at least sequence_length {sequence_length}; give a longer text or a "
            f"smaller number"
        )
    count = min(whole, num_samples)
    starts = [i * whole // count * sequence_length for i in range(count)]
    rows = mx.array([ids[start : start + sequence_length] for start in starts])
    return Sample(Path(path).name, hashlib.sha256(content).hexdigest(), rows)

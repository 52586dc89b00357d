"""Text generation for one caller: `generate`, `stream_generate`, and `python -m arcee_mlx.generate`."""

from .answer import GenerationChunk, GenerationStats, TokenLogprob
from .options import GenerateOptions, StopReason
from .stream import generate, stream_generate

__all__ = [
    "GenerateOptions",
    "GenerationChunk",
    "GenerationStats",
    "StopReason",
    "TokenLogprob",
    "generate",
    "stream_generate",
]

"""Text generation for one caller: `generate`, `stream_generate`, and `python -m arcee_mlx.generate`."""

from .answer import Answer, GenerationChunk, GenerationStats, TokenLogprob
from .batch import generate_answers, generate_batch
from .beam import Beam, beam_search
from .options import GenerateOptions, StopReason
from .stream import generate, stream_generate

__all__ = [
    "Answer",
    "Beam",
    "GenerateOptions",
    "GenerationChunk",
    "GenerationStats",
    "StopReason",
    "TokenLogprob",
    "beam_search",
    "generate",
    "generate_answers",
    "generate_batch",
    "stream_generate",
]

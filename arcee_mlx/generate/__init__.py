"""Text generation for one caller: `generate`, `stream_generate`, and `python -m arcee_mlx.generate`."""

from .options import GenerateOptions, StopReason
from .stream import GenerationChunk, GenerationStats, generate, stream_generate

__all__ = ["GenerateOptions", "GenerationChunk", "GenerationStats", "StopReason", "generate", "stream_generate"]

"""Text generation for one caller: `generate`, `stream_generate`, and `python -m arcee_mlx.generate`."""

from .answer import Answer, GenerationChunk, GenerationStats, TokenLogprob
from .batch import generate_answers, generate_batch
from .beam import Beam, beam_search
from .options import GenerateOptions, StopReason
from .prompt_cache import PromptCache, cache_prompt, load_prompt_cache, save_prompt_cache
from .stream import generate, stream_generate
from .tools import InvalidToolCall, ToolCall, ToolResult

__all__ = [
    "Answer",
    "Beam",
    "GenerateOptions",
    "GenerationChunk",
    "GenerationStats",
    "InvalidToolCall",
    "StopReason",
    "PromptCache",
    "TokenLogprob",
    "ToolCall",
    "ToolResult",
    "beam_search",
    "cache_prompt",
    "generate",
    "generate_answers",
    "generate_batch",
    "load_prompt_cache",
    "save_prompt_cache",
    "stream_generate",
]

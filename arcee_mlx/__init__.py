"""arcee_mlx: Arcee's dense decoder (AFM-4.5B and its fine-tunes) on Apple Silicon through MLX."""

from .checkpoint.adapters import fuse_adapter, save_peft_adapter, set_adapter
from .checkpoint.function_schema import get_json_schema
from .checkpoint.loading import DEMO_MODEL, load, load_model, save_checkpoint
from .checkpoint.tokenizer import Tokenizer
from .engine import AnswerStream, AsyncAnswerStream, Engine, EngineStats, Message, Request, Session
from .errors import (
    ArceeError,
    CallbackError,
    CheckpointError,
    ConfigError,
    ContextOverflowError,
    ConversionError,
    DeviceError,
    EngineClosedError,
    HubError,
    InputError,
    MemoryBudgetError,
    QueueFullError,
    TokenizerError,
)
from .generate import (
    Answer,
    Beam,
    GenerateOptions,
    GenerationChunk,
    GenerationStats,
    PromptCache,
    TokenLogprob,
    beam_search,
    cache_prompt,
    generate,
    generate_answers,
    generate_batch,
    load_prompt_cache,
    save_prompt_cache,
    stream_generate,
)
from .inspection.results import Inspection
from .inspection.run import inspect_checkpoint
from .model.config import ArceeConfig
from .model.decoder import ArceeForCausalLM, ArceeModel, BaseModelOutput, CausalLMOutput
from .model.relu2.down import store_by_neuron
from .tasks import TextScore, TokenScore, embed, score

__all__ = [
    "DEMO_MODEL",
    "Answer",
    "AnswerStream",
    "ArceeConfig",
    "ArceeError",
    "ArceeForCausalLM",
    "ArceeModel",
    "AsyncAnswerStream",
    "BaseModelOutput",
    "Beam",
    "CallbackError",
    "CausalLMOutput",
    "CheckpointError",
    "ConfigError",
    "ContextOverflowError",
    "ConversionError",
    "DeviceError",
    "Engine",
    "EngineClosedError",
    "EngineStats",
    "GenerateOptions",
    "GenerationChunk",
    "GenerationStats",
    "HubError",
    "InputError",
    "Inspection",
    "MemoryBudgetError",
    "Message",
    "PromptCache",
    "QueueFullError",
    "Request",
    "Session",
    "TextScore",
    "TokenLogprob",
    "TokenScore",
    "Tokenizer",
    "TokenizerError",
    "beam_search",
    "cache_prompt",
    "embed",
    "fuse_adapter",
    "generate",
    "generate_answers",
    "generate_batch",
    "get_json_schema",
    "inspect_checkpoint",
    "load",
    "load_model",
    "load_prompt_cache",
    "save_checkpoint",
    "save_peft_adapter",
    "score",
    "save_prompt_cache",
    "set_adapter",
    "store_by_neuron",
    "stream_generate",
]

"""arcee_mlx: Arcee's dense decoder (AFM-4.5B and its fine-tunes) on Apple Silicon through MLX."""

from .checkpoint.adapters import fuse_adapter, save_peft_adapter, set_adapter
from .checkpoint.function_schema import get_json_schema
from .checkpoint.loading import DEMO_MODEL, load, load_model, save_checkpoint
from .checkpoint.tokenizer import Tokenizer
from .errors import (
    ArceeError,
    CheckpointError,
    ConfigError,
    ConversionError,
    HubError,
    InputError,
    TokenizerError,
)
from .generate import GenerateOptions, GenerationChunk, GenerationStats, generate, stream_generate
from .inspection.results import Inspection
from .inspection.run import inspect_checkpoint
from .model.config import ArceeConfig
from .model.decoder import ArceeForCausalLM, ArceeModel, BaseModelOutput, CausalLMOutput

__all__ = [
    "DEMO_MODEL",
    "ArceeConfig",
    "ArceeError",
    "ArceeForCausalLM",
    "ArceeModel",
    "BaseModelOutput",
    "CausalLMOutput",
    "CheckpointError",
    "ConfigError",
    "ConversionError",
    "GenerateOptions",
    "GenerationChunk",
    "GenerationStats",
    "HubError",
    "InputError",
    "Inspection",
    "Tokenizer",
    "TokenizerError",
    "fuse_adapter",
    "generate",
    "get_json_schema",
    "inspect_checkpoint",
    "load",
    "load_model",
    "save_checkpoint",
    "save_peft_adapter",
    "set_adapter",
    "stream_generate",
]

"""arcee_mlx: Arcee's dense decoder (AFM-4.5B and its fine-tunes) on Apple Silicon through MLX."""

from .checkpoint.loading import load, load_model, save_checkpoint
from .model.config import ArceeConfig
from .model.decoder import ArceeForCausalLM, ArceeModel

__all__ = ["ArceeConfig", "ArceeForCausalLM", "ArceeModel", "load", "load_model", "save_checkpoint"]

"""Tiny random models of transformers, and the same checkpoint through both implementations. Needs torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import torch
import transformers
from huggingface_hub.utils import enable_progress_bars
from transformers import ArceeConfig as TheirConfig
from transformers import ArceeForCausalLM as TheirCausalLM

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
enable_progress_bars()  # of huggingface_hub, which transformers silences along; other tests in this process look at them

ATOL = 2e-4  # on float32 logits of standard deviation 2; the smallest mistake moves them by 0.08

TINY: dict[str, Any] = {
    "model_type": "arcee",
    "architectures": ["ArceeForCausalLM"],
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(**changes: Any) -> dict[str, Any]:
    """The JSON of a small config."""
    return {**TINY, **changes}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights of a size at which every part of the model matters and logits have a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                parameter.copy_((2 if "lm_head" in name else 1.3) * noise / parameter.shape[1] ** 0.5)


def their_model(values: dict[str, Any], *, seed: int = 0, cls: Any = TheirCausalLM) -> Any:
    """transformers' model of a config, float32, random, in evaluation mode."""
    model = cls(TheirConfig.from_dict(json.loads(json.dumps(values))))
    randomize(model, seed)
    return model.eval()


def saved(values: dict[str, Any], folder: Path, *, seed: int = 0, config: str = "ours") -> Any:
    """Saves a random model. `config` "ours" writes `values` as config.json, "theirs" what save_pretrained wrote."""
    model = their_model(values, seed=seed)
    model.save_pretrained(folder)
    if config == "ours":
        (folder / "config.json").write_text(json.dumps(values))
    return TheirCausalLM.from_pretrained(folder).eval()


def both(array: Any) -> tuple[torch.Tensor, mx.array]:
    """The same numbers for both."""
    array = np.asarray(array)
    return torch.tensor(array), mx.array(array)


def as_numpy(value: Any) -> np.ndarray:
    """Float64 of either's tensor."""
    if isinstance(value, mx.array):
        return np.array(value.astype(mx.float32)).astype(np.float64)
    return value.detach().float().numpy().astype(np.float64)


def assert_close(ours: Any, theirs: Any, atol: float = ATOL, where: np.ndarray | None = None) -> None:
    """Same shape, NaN at the same places, and nowhere further apart than atol (where `where` is true)."""
    a, b = as_numpy(ours), as_numpy(theirs)
    assert a.shape == b.shape
    if where is not None:
        a, b = a[where], b[where]
    np.testing.assert_allclose(a, b, atol=atol, rtol=0)


def random_ids(shape: tuple[int, ...], seed: int = 0, vocab_size: int = 61) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, vocab_size, shape)

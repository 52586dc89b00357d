"""What the tests of arcee_mlx.tasks share: a tiny model with each kind of rope, texts, and the plain way to their states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from arcee_mlx import ArceeForCausalLM, Tokenizer
from arcee_mlx.checkpoint.tokenizer import read_tokenizer

from conftest import TEXT, flat, tiny_config, write_tokenizer

# Short enough for the limits of the ropes below to lie among the texts.
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8},
    "dynamic": {"factor": 2.0},
    "longrope": {
        "short_factor": [1 + 0.1 * i for i in range(16)],
        "long_factor": [2 + 0.7 * i for i in range(16)],
        "original_max_position_embeddings": 12,
    },
}
TEXTS = [TEXT[:50], "", "a", TEXT[20:60], TEXT[100:], "Grüße, 日本語 🙂", TEXT[:7], TEXT[:8], TEXT[:9]]


def build(rope: str = "default", cls: Any = ArceeForCausalLM, **changes: Any) -> Any:
    """A random float32 model."""
    model = cls(tiny_config(rope_parameters={"rope_type": rope, **ROPES[rope]}, **changes))
    mx.random.seed(0)
    model.load_weights([(name, 0.2 * mx.random.normal(value.shape)) for name, value in flat(model)])
    model.eval()
    return model


def make_tokenizer(folder: Path, template: str | None = None, pair: str | None = None) -> Tokenizer:
    """The tests' tokenizer, which puts <s> in front of a text, or what templates say around `$A`, and `$B` of a pair."""
    import tokenizers

    write_tokenizer(folder)
    if template is not None or pair is not None:
        backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        special = [("<s>", 0), ("</s>", 1)]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=template or "<s> $A", pair=pair or "$A:0 $B:1", special_tokens=special
        )
        backend.save(str(folder / "tokenizer.json"))
    return read_tokenizer(folder)


def build_by_token(cls: Any, outputs: dict[int, list[float]], **changes: Any) -> Any:
    """A model whose head gives each token numbers that depend on nothing else: those in `outputs`, else zeros."""
    model = build(cls=cls, **changes)
    weights = {name: mx.zeros_like(value) for name, value in flat(model)}
    count = len(next(iter(outputs.values())))
    embeddings = np.zeros((model.config.vocab_size, model.config.hidden_size), np.float32)
    embeddings[:, -1] = 1
    for token, values in outputs.items():  # of length 1 or 0, which the norm makes the root of hidden_size
        embeddings[token, :count], embeddings[token, -1] = values, not any(values)
    head = np.eye(count, model.config.hidden_size, dtype=np.float32)
    for name, value in weights.items():
        if name.endswith("norm.weight"):
            weights[name] = mx.ones_like(value)
        elif name.endswith("embed_tokens.weight"):
            weights[name] = mx.array(1000 * embeddings)  # so that the norm's epsilon is nothing
        elif name in ("score.weight", "qa_outputs.weight"):
            weights[name] = mx.array(head)
    model.load_weights(list(weights.items()))
    return model


def hidden_states(model: ArceeForCausalLM, ids: list[int]) -> np.ndarray:
    """Of one text alone, after the final norm: float64 (tokens, E)."""
    return np.array(model.model(mx.array([ids])))[0].astype(np.float64)


def logprobs(model: ArceeForCausalLM, ids: list[int]) -> np.ndarray:
    """Of each token of one text but the first, by numpy from the whole text's logits: float64 (tokens - 1,)."""
    logits = np.array(model(mx.array([ids])))[0].astype(np.float64)
    logs = logits - np.log(np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
    logs -= logits.max(axis=1, keepdims=True)
    return logs[np.arange(len(ids) - 1), ids[1:]]

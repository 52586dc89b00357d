"""Logits after penalty and filters equal transformers' own processors, in its order."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx import GenerateOptions
from arcee_mlx.generate.sampling import filter_scores, make_logits_processors

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 5},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"top_k": 50, "top_p": 0.95, "temp": 0.5, "repetition_penalty": 1.1},
        {"top_k": 20, "top_p": 0.5, "min_p": 0.2, "temp": 2.0, "repetition_penalty": 0.8},
        {"top_k": 1},
        {"top_p": 1e-4},
        {"min_p": 1.0},
    ],
)
def test_scores_equal_transformers_processors(options: dict[str, float], seed: int) -> None:
    torch = pytest.importorskip("torch")
    hf = pytest.importorskip("transformers")
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((1, 500)) * 4).astype(np.float32)
    logits[0, 10:20] = logits[0, 3]  # ties, as half precision makes them
    tokens = rng.integers(0, 500, (1, 40))
    config = hf.GenerationConfig(
        do_sample=True,
        temperature=options.get("temp", 1.0),
        top_k=options.get("top_k", 0),
        top_p=options.get("top_p", 1.0),
        min_p=options.get("min_p"),
        repetition_penalty=options.get("repetition_penalty", 1.0),
    )
    processors = hf.LogitsProcessorList()
    if config.repetition_penalty != 1.0:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    processors.append(hf.TemperatureLogitsWarper(float(config.temperature)))
    if config.top_k:
        processors.append(hf.TopKLogitsWarper(int(config.top_k)))
    if config.top_p < 1.0:
        processors.append(hf.TopPLogitsWarper(config.top_p))
    if config.min_p:
        processors.append(hf.MinPLogitsWarper(config.min_p))
    expected = processors(torch.tensor(tokens), torch.tensor(logits)).numpy()

    resolved = GenerateOptions(**{"temp": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | options)  # type: ignore[arg-type]
    scores = mx.array(logits)
    for process in make_logits_processors(resolved, vocab_size=500, model_vocab_size=500):
        scores = process(mx.array(tokens[0]), scores)
    assert resolved.top_k is not None and resolved.top_p is not None
    assert resolved.min_p is not None and resolved.temp is not None
    mine = np.array(
        filter_scores(scores / resolved.temp, top_k=resolved.top_k, top_p=resolved.top_p, min_p=resolved.min_p)
    )
    assert (np.isinf(mine) == np.isinf(expected)).all()
    np.testing.assert_allclose(mine[np.isfinite(mine)], expected[np.isfinite(expected)], rtol=1e-6)

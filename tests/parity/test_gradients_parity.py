"""Gradients of every loss, parameter by parameter, against torch's autograd on tiny float32 models.

Tolerance: 2e-5 of a parameter's largest gradient, or 2e-5 where that is below 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

torch = pytest.importorskip("torch", reason="compares with transformers on torch")

import transformers  # noqa: E402

from arcee_mlx import load_model  # noqa: E402

from parity_configs import rope  # noqa: E402
from reference import assert_close, random_ids, their_model, tiny  # noqa: E402

pytestmark = pytest.mark.parity

ATOL = 2e-5
B, L, PAD = 3, 9, 0
IDS = random_ids((B, L))
PADDING = np.ones((B, L), np.int64)
PADDING[0, :3] = PADDING[1, 6:] = 0
IDS[PADDING == 0] = PAD
CAUSAL, SEQUENCE = "ArceeForCausalLM", "ArceeForSequenceClassification"
TOKEN, QA = "ArceeForTokenClassification", "ArceeForQuestionAnswering"
FLOATS = np.random.default_rng(2).random((B, 3)).astype(np.float32)
LOSSES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "causal": (CAUSAL, {}, {"labels": np.where(PADDING > 0, IDS, -100)}),
    "causal_tied": (CAUSAL, {"tie_word_embeddings": True}, {"labels": np.where(PADDING > 0, IDS, -100)}),
    "causal_without_pad": (CAUSAL, {"pad_token_id": None}, {"labels": np.where(PADDING > 0, IDS, -100)}),
    "causal_negative_pad": (CAUSAL, {"pad_token_id": int(IDS[2, 0]) - 61}, {"labels": IDS}),
    "causal_sum": (CAUSAL, {}, {"labels": IDS, "num_items_in_batch": 5}),
    "causal_last_rows": (CAUSAL, {}, {"shift_labels": IDS[:, -4:], "labels": IDS[:, -4:], "logits_to_keep": 4}),
    "single_label": (SEQUENCE, {}, {"labels": np.array([2, 0, 1])}),
    "single_label_ignored": (SEQUENCE, {}, {"labels": np.array([2, -100, 1])}),
    "multi_label": (SEQUENCE, {}, {"labels": (FLOATS > 0.5).astype(np.float32)}),
    "regression": (SEQUENCE, {"labels": 1}, {"labels": FLOATS[:, 0]}),
    "regression_of_three": (SEQUENCE, {"problem_type": "regression"}, {"labels": FLOATS}),
    "tokens": (TOKEN, {"classifier_dropout": 0.0}, {"labels": np.where(PADDING > 0, IDS % 3, -100)}),
    "answer": (QA, {}, {"start_positions": np.array([4, 0, -1]), "end_positions": np.array([8, 5, L])}),
    "answer_sum": (QA, {}, {"start_positions": np.array([4, 0, 1]), "end_positions": np.array([8, 5, 2]), "num_items_in_batch": 4}),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_every_gradient_is_torch_autograds(tmp_path: Path, name: str, training: bool) -> None:
    cls, changes, targets = LOSSES[name]
    count = changes.get("labels", 3)
    values = tiny(
        **{"architectures": [cls], "pad_token_id": PAD, "attention_bias": True, "mlp_bias": True,
           "id2label": {str(i): str(i) for i in range(count)}, "rope_parameters": rope("yarn", factor=4.0)}
        | {key: value for key, value in changes.items() if key != "labels"}
    )  # fmt: skip
    their_model(values, seed=2, cls=getattr(transformers, cls)).save_pretrained(tmp_path)
    theirs = getattr(transformers, cls).from_pretrained(tmp_path).train(training)
    model = load_model(tmp_path).train(training)
    numbers = {"input_ids": IDS, "attention_mask": PADDING, "use_cache": False, **targets}
    theirs(**{k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in numbers.items()}).loss.backward()

    def loss(net: Any) -> mx.array:
        return net.forward(**{k: mx.array(v) if isinstance(v, np.ndarray) else v for k, v in numbers.items()}).loss

    gradients = dict(tree_flatten(nn.value_and_grad(model, loss)(model)[1]))
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == expected.keys()
    for key, gradient in gradients.items():
        size = float(expected[key].abs().max())
        assert size > 0, key
        assert_close(gradient, expected[key], atol=ATOL * max(size, 1))

"""Stored numbers of transformers, replayed without it; `tests/goldens/make_goldens.py` made them."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx import load_model

GOLDENS = Path(__file__).parent.parent / "goldens"
CASES = sorted(path.stem for path in GOLDENS.glob("*.npz"))
ATOL = 2e-4


def test_goldens_are_there_and_small() -> None:
    assert len(CASES) == 6
    assert sum(path.stat().st_size for path in GOLDENS.rglob("*") if path.is_file()) < 2**20


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_transformers_numbers(name: str) -> None:
    golden, model = np.load(GOLDENS / f"{name}.npz"), load_model(GOLDENS / name, dtype="float32")
    ids, mask = mx.array(golden["ids"]), mx.array(golden["mask"])

    def check(got: mx.array, key: str, where: np.ndarray | slice = slice(None)) -> None:
        np.testing.assert_allclose(np.array(got)[where], golden[key][where], atol=ATOL, rtol=0, err_msg=key)

    check(model.forward(ids[:, :8]).logits, "short")
    full = model.forward(ids, labels=ids, output_hidden_states=True)
    check(full.logits, "full")
    assert full.loss is not None and full.loss.item() == pytest.approx(float(golden["loss"]), abs=ATOL)
    assert full.hidden_states is not None
    check(mx.stack([state for state in full.hidden_states if state is not None]), "hidden")
    check(model.forward(ids, attention_mask=mask).logits, "padded", golden["mask"] > 0)
    cache = model.make_cache()
    parts = [model.forward(ids[:, a:b], cache=cache).logits for a, b in ((0, 9), (9, 10), (10, 16))]
    check(mx.concatenate(parts, axis=1), "steps")

"""What `arcee-mlx doctor` has stored of the bundled model is what transformers computes with the same weights."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with transformers on torch")

from arcee_mlx import DEMO_MODEL, Tokenizer, load  # noqa: E402
from arcee_mlx.checkpoint.files import write_json, write_tensors  # noqa: E402
from arcee_mlx.doctor.demo import compare, read_stored  # noqa: E402
from arcee_mlx.model.relu2.down import ByNeuron  # noqa: E402

from reference import TheirCausalLM  # noqa: E402

pytestmark = pytest.mark.parity


def unpack(folder: Path) -> Tokenizer:
    """Writes the bundled model's weights as floats, exactly; gives its tokenizer."""
    model, tokenizer = load(DEMO_MODEL, dtype="float32")
    weights = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.QuantizedLinear | nn.QuantizedEmbedding):
            packed = module.weight, module.scales, module.biases
            weights[f"{name}.weight"] = mx.dequantize(*packed, module.group_size, module.bits)
        elif isinstance(module, ByNeuron):
            weights[f"{name}.weight"] = module.rows.unpack().T
        elif isinstance(module, nn.RMSNorm):
            weights[f"{name}.weight"] = module.weight
    values = model.config.to_dict() | {"dtype": "float32", "architectures": ["ArceeForCausalLM"]}
    for key in ("quantization", "quantization_config", "down_proj_layout"):
        values.pop(key, None)
    folder.mkdir()
    write_tensors(folder, weights)
    write_json(folder / "config.json", values)
    return tokenizer


def test_the_stored_tokens_and_logits_are_transformers(tmp_path: Path) -> None:
    prompt, stored = read_stored()
    ids = unpack(tmp_path / "float").encode(prompt)
    model = TheirCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32).eval()
    with torch.no_grad():
        tokens = torch.tensor([[*ids, *stored.tokens[:-1]]])
        logits = model(tokens).logits[0, len(ids) - 1 :].numpy()
        generated = model.generate(torch.tensor([ids]), max_new_tokens=len(stored.tokens), do_sample=False)
    difference = compare(stored, logits, 2e-4)
    assert difference.fault is None and difference.near_ties == ()
    np.testing.assert_array_equal(generated[0, len(ids) :].numpy(), stored.tokens)

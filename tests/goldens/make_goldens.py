"""Writes the goldens next to this file: tiny checkpoints of transformers and what it computes with them.

Run once, with torch and transformers 5.23: `python tests/goldens/make_goldens.py`. `tests/model/test_goldens.py` replays them
without either.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import ArceeConfig, ArceeForCausalLM

HERE = Path(__file__).parent
SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FACTORS = {"short_factor": [1.0, 1.1, 1.3, 1.7], "long_factor": [2.0, 3.0, 5.0, 7.0]}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "mscale": 1.0}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 12},
    "longrope": {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 12, **FACTORS}},
    "llama3": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                   "original_max_position_embeddings": 32}},
    "tied_biases_wide": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
}  # fmt: skip


def make(name: str, changes: dict[str, Any]) -> None:
    model = ArceeForCausalLM(ArceeConfig(**{**SMALL, **changes})).eval()
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            scale = 1.0 if "embed" in key else 0.3 if key.endswith("bias") else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_(1 + 0.2 * noise if "norm" in key else scale * noise)
    model.save_pretrained(HERE / name)
    (HERE / name / "generation_config.json").unlink(missing_ok=True)
    ids = torch.randint(3, 40, (2, 16), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    with torch.no_grad():
        short = model(ids[:, :8], use_cache=False)
        full = model(ids, labels=ids, use_cache=False, output_hidden_states=True)
        padded = model(ids, attention_mask=mask, use_cache=False)
        cache, steps = None, []
        for start, stop in ((0, 9), (9, 10), (10, 16)):
            output = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    np.savez_compressed(
        HERE / f"{name}.npz",
        ids=ids.numpy(), mask=mask.numpy(), short=short.logits.numpy(), full=full.logits.numpy(), loss=full.loss.numpy(),
        hidden=torch.stack(full.hidden_states).numpy(), padded=padded.logits.numpy(), steps=torch.cat(steps, 1).numpy(),
    )  # fmt: skip


if __name__ == "__main__":
    for case, values in CASES.items():
        make(case, values)
    sizes = {str(path.relative_to(HERE)): path.stat().st_size for path in sorted(HERE.rglob("*")) if path.is_file()}
    print(json.dumps({"files": len(sizes), "bytes": sum(sizes.values())}))

"""Writes the tokens and logits that `arcee-mlx doctor` compares with: `python tests/goldens/make_demo_decoding.py`.

It runs this package on MLX's CPU backend; `tests/parity/test_doctor_parity.py` compares the result with transformers.
"""

from __future__ import annotations

import json

import mlx.core as mx

import arcee_mlx
from arcee_mlx import GenerateOptions
from arcee_mlx.doctor.demo import STORED, Decoding, compute_logits

PROMPT = "To the Senate and House of Representatives: The state of our finances is"
TOKENS = 32


def make() -> str:
    """The file's text."""
    mx.set_default_device(mx.cpu)
    model, tokenizer = arcee_mlx.load(arcee_mlx.DEMO_MODEL, dtype="float32")
    options = GenerateOptions(max_tokens=TOKENS, temp=0, repetition_penalty=1.0)
    tokens = [chunk.token for chunk in arcee_mlx.stream_generate(model, tokenizer, PROMPT, options)]
    decoding = Decoding.from_logits(compute_logits(model, tokenizer.encode(PROMPT), tokens))
    assert list(decoding.tokens) == tokens
    rows = {"ids": decoding.ids.tolist(), "logits": [[round(x, 5) for x in row] for row in decoding.logits.tolist()]}
    parts = [f'"prompt": {json.dumps(PROMPT)}']
    parts += [f'"{key}": [\n  ' + ",\n  ".join(map(json.dumps, values)) + "\n]" for key, values in rows.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    STORED.write_text(make(), encoding="utf-8")

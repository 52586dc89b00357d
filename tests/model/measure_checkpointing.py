"""Prints what gradient checkpointing saves and costs: `python tests/model/measure_checkpointing.py`.

Twelve layers of width 256, four rows of 256 tokens, random float32 weights (56 MB, in the peaks), one step's loss and
gradients; the middle CPU time of three.
"""

from __future__ import annotations

import statistics
import time

import mlx.core as mx
import mlx.nn as nn

from arcee_mlx import ArceeConfig, ArceeForCausalLM

ROWS, TOKENS, VOCABULARY = 4, 256, 1000


def main() -> None:
    config = ArceeConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=1792, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = ArceeForCausalLM.from_config(config)
    ids = mx.random.randint(0, VOCABULARY, (ROWS, TOKENS), key=mx.random.key(0))
    compute = nn.value_and_grad(model, lambda: model.forward(ids, labels=ids, use_cache=False).loss)
    mx.eval(model.parameters(), ids)
    for name, switch in (
        ("everything kept", model.gradient_checkpointing_disable),
        ("gradient checkpointing", model.gradient_checkpointing_enable),
    ):
        switch()
        seconds, losses = [], set()
        mx.reset_peak_memory()
        for _ in range(3):
            start = time.process_time()
            loss, gradients = compute()
            mx.eval(loss, gradients)
            seconds.append(time.process_time() - start)
            losses.add(loss.item())
            del gradients
        peak_mb = mx.get_peak_memory() / 1e6
        print(f"{name}: peak {peak_mb:.0f} MB, {statistics.median(seconds):.2f} s of CPU, loss {losses.pop():.6f}")


if __name__ == "__main__":
    main()

"""A few tensors, one of each dtype that is stored."""

from __future__ import annotations

import mlx.core as mx

NAMES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint8: "U8"}


def tensors() -> dict[str, mx.array]:
    key = mx.random.key(0)
    return {
        "a": mx.random.normal((5, 3), key=key),
        "b": mx.random.normal((4,), key=key).astype(mx.bfloat16),
        "c": mx.random.normal((2, 2, 3), key=key).astype(mx.float16),
        "d": mx.random.randint(0, 2**31, (3, 2), key=key).astype(mx.uint32),
        "e": mx.random.randint(0, 255, (7,), key=key).astype(mx.uint8),
    }

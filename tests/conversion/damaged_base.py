"""A sound checkpoint as bytes in memory, and the form of a damaged one: what lies where, and how converting it must end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

CONFIG, WEIGHTS, INDEX = "in/config.json", "in/model.safetensors", "in/model.safetensors.index.json"
SHARDS = ("in/model-00001-of-00002.safetensors", "in/model-00002-of-00002.safetensors")
SETTINGS: dict[str, Any] = {
    "model_type": "arcee", "architectures": ["ArceeForCausalLM"], "vocab_size": 40, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    "max_position_embeddings": 64, "hidden_act": "relu2", "attention_bias": True, "mlp_bias": False,
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "float32",
}  # fmt: skip
LAYER = "model.layers.0."
SHAPES: dict[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (40, 32),
    LAYER + "self_attn.q_proj.weight": (32, 32),
    LAYER + "self_attn.q_proj.bias": (32,),
    LAYER + "self_attn.k_proj.weight": (16, 32),
    LAYER + "self_attn.k_proj.bias": (16,),
    LAYER + "self_attn.v_proj.weight": (16, 32),
    LAYER + "self_attn.v_proj.bias": (16,),
    LAYER + "self_attn.o_proj.weight": (32, 32),
    LAYER + "self_attn.o_proj.bias": (32,),
    LAYER + "mlp.up_proj.weight": (64, 32),
    LAYER + "mlp.down_proj.weight": (32, 64),
    LAYER + "input_layernorm.weight": (32,),
    LAYER + "post_attention_layernorm.weight": (32,),
    "model.norm.weight": (32,),
    "lm_head.weight": (40, 32),
}
NORM, EMBEDDING, UP = "model.norm.weight", "model.embed_tokens.weight", LAYER + "mlp.up_proj.weight"


@dataclass(frozen=True)
class Link:
    """A symbolic link; a target that begins with "/" is kept, unless it begins with "/ROOT", the folder all lies in."""

    target: str


@dataclass(frozen=True)
class Sparse:
    """A file of `size` bytes that begins with `head`; the rest is a hole."""

    head: bytes
    size: int


Content = bytes | Link | Sparse | Literal["pipe", "folder"]
Tensor = tuple[str, tuple[int, ...], bytes]  # safetensors' dtype, shape, data


@dataclass(frozen=True)
class Case:
    """One damaged checkpoint.

    Attributes:
        name: what is wrong with it.
        files: content by path; the checkpoint is the folder `in`.
        says: what the error must say, all of it; with none, the conversion must be correct.
        may_convert: a correct result is as good as the error.
        bits: 0 converts to floats.
        dtype: that is asked for.
        allow_nonfinite: is passed on.
    """

    name: str
    files: Mapping[str, Content]
    says: tuple[str, ...] = ()
    may_convert: bool = False
    bits: int = 0
    dtype: str = "float32"
    allow_nonfinite: bool = False


def tensors(*, dtype: str = "F32", **dtypes: str) -> dict[str, Tensor]:
    """The whole checkpoint's tensors; of one dtype, but for those named."""
    values = np.random.default_rng(7)
    return {
        name: (kind := dtypes.get(name, dtype), shape, encode(values.normal(size=shape).astype("<f4"), kind))
        for name, shape in SHAPES.items()
    }


def encode(values: np.ndarray, dtype: str) -> bytes:
    """Floats as the bytes of a dtype; bfloat16 by cutting off, which is good enough for made-up weights."""
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()


def table(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The header of a file with these tensors, one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    return header


def pack(tensors: Mapping[str, Tensor], header: object = None) -> bytes:
    """A safetensors file; `header` stands in for the true one, as an object or as bytes."""
    header = table(tensors) if header is None else header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values())


TENSORS = tensors()
HEADER, FILE = table(TENSORS), pack(TENSORS)
HEADER_END = 8 + int.from_bytes(FILE[:8], "little")
SMALL_FILES: dict[str, Content] = {"in/tokenizer.json": b'{"version": "1.0"}', "in/LICENSE": b"Apache"}


def config(**changes: object) -> bytes:
    return json.dumps(SETTINGS | changes).encode()


def single(weights: Content = FILE, settings: Content | None = None, **others: Content) -> dict[str, Content]:
    """A checkpoint whose weights are in one file."""
    return {CONFIG: config() if settings is None else settings, WEIGHTS: weights, **SMALL_FILES, **others}


def sharded(index: object = None, **others: Content) -> dict[str, Content]:
    """A checkpoint in two shards; `index` stands in for the true one, as an object or as bytes."""
    names = sorted(TENSORS)
    files: dict[str, Content] = {CONFIG: config(), **SMALL_FILES}
    for i, shard in enumerate(SHARDS):
        files[shard] = pack({name: TENSORS[name] for name in names[i::2]})
    index = weight_map() if index is None else index
    return files | {INDEX: index if isinstance(index, bytes) else json.dumps(index).encode()} | others


def weight_map(**changes: object) -> dict[str, Any]:
    names = {name: SHARDS[i % 2].removeprefix("in/") for i, name in enumerate(sorted(TENSORS))}
    return {"metadata": {"total_size": len(FILE) - HEADER_END}, "weight_map": names | changes}


def flip(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]

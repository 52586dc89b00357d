"""Damage to the weights: their files, headers and values."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from damaged_base import (
    EMBEDDING,
    FILE,
    HEADER,
    HEADER_END,
    LAYER,
    NORM,
    SHAPES,
    SHARDS,
    TENSORS,
    UP,
    WEIGHTS,
    Case,
    Sparse,
    config,
    encode,
    flip,
    pack,
    sharded,
    single,
    tensors,
)


def lengths(_: random.Random) -> Iterator[Case]:
    for bit in range(64):
        yield Case(f"bit {bit} of the length", single(flip(FILE, bit)), (WEIGHTS,))
    for length in (0, 1, 2, HEADER_END, len(FILE) - 8, 100_000_001, 2**63, 2**64 - 1):
        yield Case(f"length {length}", single(length.to_bytes(8, "little") + FILE[8:]), (WEIGHTS,))
    length = 200_000_000
    yield Case("a header of 200 MB", single(Sparse(length.to_bytes(8, "little") + b"{", length + 1000)), (WEIGHTS,))


def header_bits(choose: random.Random) -> Iterator[Case]:
    for bit in choose.sample(range(64, 8 * HEADER_END), 110):
        yield Case(f"bit {bit}", single(flip(FILE, bit)), (WEIGHTS,), may_convert=True)
    shard = sharded()[SHARDS[1]]
    assert isinstance(shard, bytes)
    for bit in choose.sample(range(64, 8 * 1000), 20):
        yield Case(f"bit {bit} of a shard", sharded(**{SHARDS[1]: flip(shard, bit)}), ("in/model",), may_convert=True)


def cuts(choose: random.Random) -> Iterator[Case]:
    sizes = [0, 1, 7, 8, 9, HEADER_END - 1, HEADER_END, HEADER_END + 1, len(FILE) - 1]
    for size in sizes + choose.sample(range(10, len(FILE)), 12):
        yield Case(f"cut to {size} bytes", single(FILE[:size]), (WEIGHTS,))
    for extra in (b"\0", b"x" * 1000, FILE):
        yield Case(f"{len(extra)} bytes more", single(FILE + extra), (WEIGHTS,))
    for shard in SHARDS:
        data = sharded()[shard]
        assert isinstance(data, bytes)
        for size in (0, 8, len(data) - 1):
            yield Case(f"{shard} cut to {size} bytes", sharded(**{shard: data[:size]}), (shard,))


def change_entry(name: str, **changes: object) -> bytes:
    return pack(TENSORS, HEADER | {name: HEADER[name] | changes})


def offsets(_: random.Random) -> Iterator[Case]:
    for name in (EMBEDDING, LAYER + "self_attn.k_proj.bias", "lm_head.weight"):
        start, end = HEADER[name]["data_offsets"]
        lies: list[Any] = [
            [start + 4, end], [start, end + 4], [start, end - 4], [start + 4, end + 4], [start - 4, end - 4], [end, start],
            [0, end - start] if start else [8, end - start + 8], [len(FILE), len(FILE) + end - start], [-4, end - start - 4],
            [start, 2**64], [2**63, 2**63 + end - start], [float(start), end], [start, float(end)], [False, end],
            [start, True], [str(start), end], [start, None], [start], [start, end, end], [], None, "0", {"0": start, "1": end},
            [[start], end], [start, float("nan")], 10**30,
        ]  # fmt: skip
        for lie in lies:
            yield Case(f"{name} at {lie}", single(change_entry(name, data_offsets=lie)), (WEIGHTS,))
    swapped = HEADER | {NORM: HEADER[NORM] | {"data_offsets": HEADER[LAYER + "self_attn.q_proj.bias"]["data_offsets"]}}
    yield Case("two tensors in one place", single(pack(TENSORS, swapped)), (WEIGHTS,))


def shapes(_: random.Random) -> Iterator[Case]:
    for name in (EMBEDDING, NORM):
        shape = HEADER[name]["shape"]
        lies: list[Any] = [
            [-n for n in shape], [10**12, *shape[1:]], [2**31, *shape[1:]], [*shape, 2**64], [float(n) for n in shape],
            [*shape, True], [*map(str, shape)], [shape], [], None, "40", {}, 40, [*shape, 0], [0, *shape], [*shape, 1],
            [1, *shape], shape[::-1] if len(shape) == 2 else [16, 2], [n + 1 for n in shape], [None], [2**100], [1e400], [*shape, *[1] * 9],
            [2**30] * 200_000,
        ]  # fmt: skip
        for lie in lies:
            yield Case(f"{name} of shape {lie}"[:80], single(change_entry(name, shape=lie)), (WEIGHTS,))
    for name, cut in ((EMBEDDING, (0, 32)), (UP, (64, 0)), (NORM, (0,)), (UP, (0, 2**31 - 1)), (UP, (0, 2**40))):
        kept = TENSORS | {name: ("F32", cut, b"")}
        yield Case(f"{name} of no values, {cut}", single(pack(kept)), (WEIGHTS, name))


def header_forms(_: random.Random) -> Iterator[Case]:
    text = json.dumps(HEADER).encode()
    entry = json.dumps(HEADER[NORM]).encode()
    forms: dict[str, bytes | object] = {
        "no text": b"", "no object": [HEADER], "a string": "x", "null": b"null", "a number": 5, "no tensors": {},
        "Latin-1": text.replace(b"norm", b"n\xf6rm"), "a byte order mark": b"\xef\xbb\xbf" + text,
        "UTF-16": json.dumps(HEADER).encode("utf-16-le"), "UTF-32": json.dumps(HEADER).encode("utf-32"),
        "a space first": b" " + text, "deep lists": b"[" * 100_000, "deep objects": b'{"a":' * 100_000,
        "deep but closed": b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"," + text[1:], "two objects": text + text,
        "bytes after it": text + b"\0\0\0\0\0\0\0\0", "a comma too many": text[:-1] + b",}", "no end": text[:-1],
        "single quotes": text.replace(b'"', b"'"),
        "a tensor twice": text[:-1] + b', "model.norm.weight": ' + entry + b"}",
        "a tensor twice, different": text[:-1] + b', "model.norm.weight": ' + entry.replace(b"32", b"31") + b"}",
        "a tensor twice, by an escape": text[:-1] + rb', "model.norm.weigh\u0074": ' + entry + b"}",
        "a dtype twice": text.replace(entry, b'{"dtype": "F16", ' + entry[1:]),
        "offsets twice": text.replace(entry, b'{"data_offsets": [0, 8], ' + entry[1:]),
        "metadata twice": text[:-1] + b', "__metadata__": {}}',
        "a number of 5000 digits": text[:-1] + b', "x": ' + b"9" * 5000 + b"}",
        "an entry too many": HEADER | {"x": None}, "an entry of another kind": HEADER | {NORM: [1, 2]},
        "an entry without dtype": HEADER | {NORM: {"shape": [32], "data_offsets": HEADER[NORM]["data_offsets"]}},
        "an entry with nothing": HEADER | {NORM: {}},
        "more in an entry": HEADER | {NORM: HEADER[NORM] | {"x": float("nan")}},
        "half a surrogate pair in the metadata": HEADER | {"__metadata__": {"format": "\ud800"}}, "half a surrogate pair": HEADER | {"\ud800": HEADER[NORM]},
    }  # fmt: skip
    for name, form in forms.items():
        yield Case(name, single(pack(TENSORS, form)), (WEIGHTS,))
    for metadata in (5, "x", [], ["a"], {"a": 1}, {"a": None}, {"a": {"b": "c"}}, {"format": ["pt"]}, True, 1.5):
        yield Case(f"metadata {metadata}", single(pack(TENSORS, HEADER | {"__metadata__": metadata})), (WEIGHTS,))
    harmless: dict[str, object] = {
        "no metadata": {name: value for name, value in HEADER.items() if name != "__metadata__"},
        "empty metadata": HEADER | {"__metadata__": {}}, "null metadata": HEADER | {"__metadata__": None},
        "spaces after it": text + b" " * 1000, "another order": dict(reversed(HEADER.items())),
        "line ends": json.dumps(HEADER, indent=1).encode(), "escapes": text.replace(b"norm", rb"n\u006frm"),
    }  # fmt: skip
    for name, form in harmless.items():
        yield Case(name, single(pack(TENSORS, form)))


def dtypes(_: random.Random) -> Iterator[Case]:
    for dtype in (
        "F64", "I32", "I64", "I16", "I8", "U16", "U64", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "C64", "f32", "",
        "float32", "F32 ", "\x1b[2J", "\ud800", 5, None, True, ["F32"], {"F32": 1},
    ):  # fmt: skip
        yield Case(f"dtype {dtype!r}", single(change_entry(NORM, dtype=dtype)), (WEIGHTS, NORM))
    for dtype, size in (("F64", 8), ("I32", 4), ("BOOL", 1), ("F8_E4M3", 1), ("U32", 4), ("U8", 1)):
        for name in (NORM, UP, EMBEDDING):
            data = bytes(size * int(np.prod(SHAPES[name])))
            yield Case(
                f"{name} is {dtype}", single(pack(TENSORS | {name: (dtype, SHAPES[name], data)})), (WEIGHTS, name)
            )
    stale = ("F64", (8,), bytes(64))
    yield Case("a stale table in F64", single(pack(TENSORS | {LAYER + "self_attn.rotary_emb.inv_freq": stale})))


def names(choose: random.Random) -> Iterator[Case]:
    for name in TENSORS:
        rest = {key: value for key, value in TENSORS.items() if key != name}
        yield Case(f"{name} is missing", single(pack(rest)), (WEIGHTS, name))
        spoilt = name.replace(".", choose.choice(["..", "_", ""]), 1)
        yield Case(f"{name} is called {spoilt}", single(pack(rest | {spoilt: TENSORS[name]})), (WEIGHTS,))
    scalar = ("F32", (), bytes(4))
    for name in ("x", "", "model.layers.1.mlp.up_proj.weight", LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.bias",
                 "model.layers.00.mlp.up_proj.weight", "score.weight", "../x", "a\0b"):  # fmt: skip
        yield Case(f"{name!r} besides", single(pack(TENSORS | {name: scalar})), (WEIGHTS, repr(name)))
    for part in ("scales", "biases"):
        extra = {LAYER + f"mlp.up_proj.{part}": ("F32", (64, 1), bytes(256))}
        yield Case(f"{part} of float weights", single(pack(TENSORS | extra)), ("in/", "up_proj"))
    for name, shape in SHAPES.items():
        rows = ("F32", (shape[0] - 1, *shape[1:]), TENSORS[name][2][: -4 * int(np.prod(shape[1:]))])
        yield Case(f"{name} lacks a row", single(pack(TENSORS | {name: rows})), (WEIGHTS, name))


def non_finite(_: random.Random) -> Iterator[Case]:
    values = (float("nan"), float("inf"), -float("inf"))
    for i, name in enumerate(SHAPES):
        for j, dtype in enumerate(("F32", "F16", "BF16")):
            spoilt = np.random.default_rng(i).normal(size=SHAPES[name]).astype("<f4")
            spoilt.reshape(len(spoilt), -1)[5, -1] = values[(i + j) % 3]
            files = single(pack(tensors(dtype=dtype) | {name: (dtype, SHAPES[name], encode(spoilt, dtype))}))
            about = f"{values[(i + j) % 3]} in {name} of {dtype}"
            bits, to = (i + j) % 2 * 4, ("float32", "bfloat16", "float16")[i % 3]
            says = (WEIGHTS, repr(name), "rows 5 to 5", "Inf or NaN")
            yield Case(about, files, says, bits=bits, dtype=to)
            yield Case(about + ", allowed", files, bits=bits, dtype=to, allow_nonfinite=True)
    large = tensors() | {NORM: ("F32", (32,), encode(np.full(32, -1e5, "<f4"), "F32"))}
    yield Case("too large for float16", single(pack(large)), (WEIGHTS, NORM, "float16"), dtype="float16")
    yield Case("too large, others allowed", single(pack(large)), (WEIGHTS, NORM), dtype="float16", allow_nonfinite=True)
    wide = np.zeros(SHAPES[UP], "<f4")
    wide[3, :2] = 3e38, -3e38
    files = single(pack(tensors() | {UP: ("F32", SHAPES[UP], wide.tobytes())}))
    yield Case("too far apart to share a scale", files, (WEIGHTS, UP, "scale"), bits=4)
    yield Case("far apart as floats", files)


def mixtures(choose: random.Random) -> Iterator[Case]:
    for i in range(24):
        mixed = tensors(**{name: choose.choice(["F32", "F16", "BF16"]) for name in SHAPES})
        named = choose.choice(["float32", "bfloat16", "float16"])
        files = single(pack(mixed), config(torch_dtype=choose.choice([None, named])))
        yield Case(f"mixture {i}", files, bits=choose.choice([0, 4, 8]), dtype=named)


WEIGHT_KINDS: dict[str, Callable[[random.Random], Iterator[Case]]] = {
    kind.__name__: kind
    for kind in (lengths, header_bits, cuts, offsets, shapes, header_forms, dtypes, names, non_finite, mixtures)
}

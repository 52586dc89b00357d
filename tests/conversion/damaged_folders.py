"""Damage to what is beside the weights: config, index, links, and files that are empty or none at all."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

from damaged_base import (
    CONFIG,
    FILE,
    INDEX,
    SETTINGS,
    SHARDS,
    SMALL_FILES,
    TENSORS,
    UP,
    WEIGHTS,
    Case,
    Content,
    Link,
    config,
    flip,
    pack,
    sharded,
    single,
    weight_map,
)

_FIRST, _SECOND = (shard.removeprefix("in/") for shard in SHARDS)
_WRONG_SIZES = (0, -1, -(10**12), 10**12, 2**31, 2**63, 10**30, 1.5, 32.0, 1e300, float("nan"), True, "32", [], {})


def indexes(choose: random.Random) -> Iterator[Case]:
    for name in (
        "../x.safetensors", "/ROOT/x.safetensors", "sub/x.safetensors", "..\\x.safetensors", "C:\\x.safetensors", "..", ".",
        "", "./x.safetensors", "x.bin", "config.json", "/dev/zero", "https://x.org/x.safetensors", "x\0.safetensors",
        "\ud800.safetensors", "~/x.safetensors", "$HOME.safetensors", "x.safetensors\n", "x" * 300 + ".safetensors",
    ):  # fmt: skip
        weights = {"in/sub/x.safetensors": FILE, "x.safetensors": FILE, "in/x.bin": FILE}
        yield Case(f"leads to {name[:40]!r}", sharded(weight_map(**{UP: name}), **weights), ("in/",))
    for name in ("absent.safetensors", "model-00003-of-00002.safetensors"):
        yield Case(
            f"leads to {name}, which is missing", sharded(weight_map(**{UP: name})), (f"in/{name}", "no such file")
        )
    for shard in SHARDS:
        yield Case(f"{shard} is empty", sharded(**{shard: b""}), (shard,))
        files = sharded()
        del files[shard]
        yield Case(f"{shard} is missing", files, (shard,))
    for value in (None, [], "x", 5, {UP: 1}, {UP: None}, {UP: [_FIRST]}, {UP: {}}, True):
        yield Case(f"weight_map {value}", sharded({"weight_map": value}), (INDEX,))
    text = json.dumps(weight_map()).encode()
    entry = f'"{UP}": "{_FIRST}"'.encode()
    forms: dict[str, bytes | object] = {
        "empty": b"", "no JSON": b"PK\3\4", "cut": text[:200], "a list": [weight_map()], "a string": "x", "null": b"null",
        "no map": {"metadata": {}}, "an empty map": {"weight_map": {}}, "deep": b'{"a":' + b"[" * 10_000, "Latin-1": b'{"\xff": 1}',
        "a byte order mark": b"\xef\xbb\xbf" + text, "UTF-16": json.dumps(weight_map()).encode("utf-16"),
        "a tensor twice": text.replace(b'"weight_map": {', b'"weight_map": {' + entry + b", "),
        "a tensor twice, different": text.replace(b'"weight_map": {', b'"weight_map": {' + entry.replace(b"00001", b"00009") + b", "),
        "two maps": text[:-1] + b', "weight_map": {}}',
    }  # fmt: skip
    for name, form in forms.items():
        yield Case(name, sharded(form), (INDEX,))
    true = weight_map()["weight_map"]
    for name in choose.sample(sorted(TENSORS), 6):
        other = _SECOND if true[name] == _FIRST else _FIRST
        yield Case(f"{name} in the wrong shard", sharded(weight_map(**{name: other})), ("in/model-0000", name))
        rest = {"weight_map": {key: value for key, value in true.items() if key != name}}
        yield Case(f"{name} is not listed", sharded(rest), ("in/model-0000", name))
    for name in ("x", "\ud800", ""):
        yield Case(f"{name!r} is listed besides", sharded(weight_map(**{name: _FIRST})), ("in/model-0000", repr(name)))
    others = {"in/model-00003-of-00003.safetensors": pack({"x": TENSORS[UP]}), "in/consolidated.safetensors": b"x"}
    yield Case("shards that are not listed", sharded(**others))
    yield Case("a shard that is listed for nothing but its own", sharded({"weight_map": true}))
    yield Case("a damaged index beside one whole file", single(FILE, None, **{INDEX: b"{"}))
    for bit in choose.sample(range(8 * len(text)), 30):
        yield Case(f"bit {bit}", sharded(flip(text, bit)), ("in/",), may_convert=True)


def configs(choose: random.Random) -> Iterator[Case]:
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim"):  # fmt: skip
        for value in (*_WRONG_SIZES, SETTINGS[key] + 1, SETTINGS[key] * 2, 10**9):
            if type(value) is not int or value != SETTINGS[key]:
                yield Case(f"{key} is {value}", single(settings=config(**{key: value})), ("in/",))
    wrong: dict[str, tuple[Any, ...]] = {
        "max_position_embeddings": (0, -5, 1.5, "64", None, True, []),
        "hidden_act": ("nope", "RELU2", 5, None, [], {}),
        "model_type": ("llama", None, 5, []),
        "architectures": (["ArceeForSomething"], "ArceeForCausalLM", 5, {"a": 1}, [["ArceeForCausalLM"]], [None], [5]),
        "torch_dtype": ("float64", "int8", 5, ["float32"], {"a": 1}),
        "attention_bias": (False, 0, 1, "true", None, []),
        "mlp_bias": (True, 0, "x", None),
        "tie_word_embeddings": (1, "x", None, []),
        "rms_norm_eps": ("1e-5", None, [], True, 0, -1e-5, float("nan"), 1e400),
        "bos_token_id": (-(10**12), 1.5, "1", [1]),
        "eos_token_id": ("1", 1.5, ["1"], {}, [[1]]),
        "pad_token_id": (40, 10**12, -41, "x", 1.5),
        "id2label": ([], "x", 5, {"a": "b"}),
        "num_labels": (0, -1, 1.5, "2", 10**9, 10**30),
        "quantization": ("x", 5, [1], True, {"group_size": 64, "bits": 4}, {"bits": [4]}),
        "quantization_config": ("x", [1], {"quant_method": "gptq"}, {"group_size": 32, "bits": 4}),
        "sliding_window": (16, "x", []), "layer_types": (["sliding_attention"], "x", {}, 5),
        "num_experts": (8, "x", []), "attn_logit_softcapping": (30.0, [], {}),
        "rope_theta": ("x", None, [], -1.0, 0, 1e400, float("nan")),
    }  # fmt: skip
    for key, values in wrong.items():
        for value in values:
            yield Case(f"{key} is {value!r}", single(settings=config(**{key: value})), ("in/",), may_convert=True)
    ropes: list[Any] = [
        5, "x", [1], {"rope_type": "nope"}, {"rope_type": []}, {"rope_type": "linear"}, {"rope_type": "linear", "factor": 0},
        {"rope_type": "linear", "factor": "x"}, {"rope_type": "dynamic", "factor": -5}, {"rope_type": "yarn", "factor": 0.0},
        {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 0}, {"rope_type": "yarn", "factor": 10**400},
        {"rope_type": "yarn", "factor": 2, "beta_fast": -1}, {"rope_type": "longrope", "short_factor": [], "long_factor": []},
        {"rope_type": "longrope", "short_factor": [0] * 8, "long_factor": [10**400] * 8},
        {"rope_type": "llama3", "factor": 0, "low_freq_factor": 0, "high_freq_factor": 0},
        {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 1e300}, {"rope_type": "linear", "factor": 2, "partial_rotary_factor": -1},
        {"rope_type": "proportional", "partial_rotary_factor": 1e9}, {"rope_type": "proportional", "factor": 0},
        {"rope_type": "yarn", "factor": 2, "rope_theta": -2}, {"rope_type": "default", "rope_theta": 10**400}, {"rope_theta": [1]},
    ]  # fmt: skip
    for rope in ropes:
        yield Case(f"rope {rope}"[:100], single(settings=config(rope_scaling=rope)), (CONFIG,), may_convert=True)
    for key in SETTINGS:
        settings = {name: value for name, value in SETTINGS.items() if name != key}
        yield Case(f"{key} is missing", single(settings=json.dumps(settings).encode()), ("in/",), may_convert=True)
    text = config()
    forms = {
        "empty": b"", "no JSON": b"PK\3\4", "a list": b"[1]", "a string": b'"x"', "null": b"null", "deep": b"[" * 100_000,
        "deep but closed": text[:-1] + b', "x": ' + b"[" * 400 + b"]" * 400 + b"}", "no end": text[:-1], "two": text + text,
        "a byte order mark": b"\xef\xbb\xbf" + text, "UTF-16": text.decode().encode("utf-16"), "Latin-1": text[:-1] + b', "\xff": 1}',
        "a key twice": text[:-1] + b', "head_dim": 16}', "a key twice, different": text[:-1] + b', "head_dim": 8}',
        "an inner key twice": text[:-1] + b', "x": {"a": 1, "a": 2}}', "a number of 5000 digits": text[:-1] + b', "x": ' + b"9" * 5000 + b"}",
        "an empty object": b"{}",
    }  # fmt: skip
    for name, form in forms.items():
        yield Case(name, single(settings=form), ("in/",))
    harmless = {
        "half a surrogate pair": r'"\ud800"',
        "an unknown key": '{"a": [1, null]}',
        "not a number": "NaN",
        "huge": "1e999",
        "no special float": '{"__float__": [1]}',
    }
    for name, value in harmless.items():
        yield Case(name, single(settings=text[:-1] + f', "x": {value}}}'.encode()))
    for size in choose.sample(range(1, len(text)), 10):
        yield Case(f"cut to {size} bytes", single(settings=text[:size]), (CONFIG,))
    for bit in choose.sample(range(8 * len(text)), 60):
        yield Case(f"bit {bit}", single(settings=flip(text, bit)), ("in/",), may_convert=True)


def links(_: random.Random) -> Iterator[Case]:
    private: dict[str, Content] = {"elsewhere/private.txt": b"secret", "elsewhere/folder/x": b"x", "pipe": "pipe"}
    targets = {
        "a text": "../elsewhere/private.txt", "a private file": "/ROOT/elsewhere/private.txt", "a folder": "../elsewhere/folder",
        "nothing": "../elsewhere/absent", "itself": "SELF", "a pipe": "../pipe", "/dev/zero": "/dev/zero", "/dev/null": "/dev/null",
        "a blobs folder of nobody": "../elsewhere/blobs/private.txt", "a way back in": "../in/../elsewhere/private.txt",
        "a descriptor": "/dev/stdin",
    }  # fmt: skip
    private["elsewhere/blobs/private.txt"] = b"secret"
    for about, target in targets.items():
        for path in (CONFIG, WEIGHTS, "in/tokenizer.json", "in/LICENSE", "in/chat_template.jinja"):
            leads = path.removeprefix("in/") if target == "SELF" else target
            yield Case(f"{path} to {about}", single(**{**private, path: Link(leads)}), (path, "is a link to"))
        for path in (SHARDS[0], INDEX):
            leads = path.removeprefix("in/") if target == "SELF" else target
            yield Case(f"{path} to {about}", sharded(**{**private, path: Link(leads)}), (path, "is a link to"))
    for path in (CONFIG, WEIGHTS, "in/tokenizer.json", "in/generation_config.json"):
        yield Case(f"{path} is a pipe", single(**{path: "pipe"}), (path, "pipe"))
    for path in (CONFIG, WEIGHTS):
        yield Case(f"{path} is a folder", single(**{path: "folder"}), (path, "folder"))
    for path in (SHARDS[1], INDEX):
        yield Case(f"{path} is a pipe", sharded(**{path: "pipe"}), (path, "pipe"))
    templates = "in/additional_chat_templates"
    for about, target in (("elsewhere", "../elsewhere"), ("nowhere", "../absent"), ("up", "sub/../..")):
        files = single(
            **{**private, "elsewhere/x.jinja": b"secret", "x.jinja": b"x", "in/sub/x": b"x", templates: Link(target)}
        )
        yield Case(f"templates {about}", files, (templates,))
    hop = {"in/private.txt": Link("../elsewhere/private.txt"), "in/tokenizer.json": Link("private.txt")}
    yield Case("out by a second link", single(**private, **hop), ("in/tokenizer.json", "is a link to"))


def good_links(_: random.Random) -> Iterator[Case]:
    for about, files in (("one file", single()), ("shards", sharded())):
        template = {"in/additional_chat_templates/rag.jinja": b"{{ x }}"}
        cache: dict[str, Content] = {}
        for i, (path, content) in enumerate((files | template).items()):
            up = "../" * path.count("/") + "../"
            cache[f"hub/models--org--name/blobs/{i:064x}"] = content
            cache[path.replace("in/", "hub/models--org--name/snapshots/abc/")] = Link(f"{up}blobs/{i:064x}")
        yield Case(f"a snapshot of a cache, {about}", cache | {"in": Link("hub/models--org--name/snapshots/abc")})
        snapshot = {path: Link(path.replace("in/", "../hub/models--org--name/snapshots/abc/")) for path in files}
        yield Case(f"links to a snapshot of a cache, {about}", cache | snapshot)
        disk = {path.replace("in/", "disk/weights/"): content for path, content in files.items()}
        away = {path: Link(path.replace("in/", "/ROOT/disk/weights/")) for path in files}
        yield Case(f"files of the same name on another disk, {about}", disk | away)
        named = {path.replace("in/", "in/kept/_"): content for path, content in files.items()}
        inside = {path: Link(path.replace("in/", "kept/_")) for path in files}
        yield Case(f"files inside the folder, {about}", named | inside)
    yield Case("a folder that matches a pattern", single(**{"in/LICENSES/MIT.txt": b"x", "in/tokenizer_old": "folder"}))
    yield Case(
        "links that are no part of it", single(**{"in/runs": Link("/dev"), "in/old.safetensors": Link("nowhere")})
    )


def empty_files(_: random.Random) -> Iterator[Case]:
    for path in (CONFIG, WEIGHTS):
        yield Case(f"{path} is empty", single(**{path: b""}), (path,))
        yield Case(f"{path} is one byte", single(**{path: b"{"}), (path,))
        files = single()
        del files[path]
        yield Case(f"{path} is missing", files, ("in", path.removeprefix("in/")))
    yield Case("an empty folder", {"in": "folder"}, ("in", "config.json"))
    yield Case("all files are empty", dict.fromkeys(single(), b""), (CONFIG,))
    for path in (*SMALL_FILES, "in/NOTICE", "in/merges.txt"):
        yield Case(f"{path} is empty", single(**{path: b""}))


FOLDER_KINDS: dict[str, Callable[[random.Random], Iterator[Case]]] = {
    kind.__name__: kind for kind in (indexes, configs, links, good_links, empty_files)
}

"""The file of a session: what was said, its tokens, and their keys and values, for another process to go on from.

A .safetensors file, written whole or not at all. Its checksum covers every byte of it, so that no damage is loaded; it is
tied to weights and tokenizer, since keys, values and tokens mean nothing to others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten

from ..checkpoint.files import DTYPE_NAMES, TensorEntry, read_rows
from ..checkpoint.sealed import new_sealed_file, read_sealed_file
from ..errors import InputError
from ..generate.options import GenerateOptions
from ..generate.prefill import fill_cache, make_prompt_cache
from ..generate.prompt_cache import hash_text
from ..generate.tools import ToolCall, ToolResult
from .owner import Owner
from .prefix_cache import CacheKind
from .transcript import OVERFLOWS, Transcript, Turn

_VERSION = 2
_READABLE_VERSIONS = (1, 2)  # 1 knew no tools


def save_session(path: str | os.PathLike[str], transcript: Transcript, owner: Owner) -> None:
    """Writes a session, with what the engine has of its keys and values.

    Nobody else's request waits for it: between two steps the engine copies the keys and values of one layer.

    Raises:
        InputError: the name does not end in .safetensors, or the file cannot be written.
        EngineClosedError: the engine is closed.
    """
    path = Path(path).expanduser().absolute()
    if path.suffix != ".safetensors":
        raise InputError(f"session file is {path.name!r}; expected a name ending in .safetensors; add that")
    weights, (layers, count) = owner.call(lambda: _find(owner, transcript))
    content = _describe(transcript) | {
        "weights_sha256": weights,
        "text_sha256": _hash_text(owner, transcript),
        "cached_tokens": count,
    }
    shapes = {name: shape for i, layer in enumerate(layers) for name, shape in _shapes(i, layer, count).items()}
    try:
        with new_sealed_file(path, "session", content, shapes) as writer:
            for i, layer in enumerate(layers):
                for name, data in owner.call(partial(_copy_layer, i, layer, count)):
                    writer.write(name, data)
    except TypeError as error:
        raise InputError(
            f"options cannot be saved ({error}); expected JSON values in chat_template_config, and a schema as a dict; "
            f"give a type as the schema with each message instead"
        ) from error


def load_session(path: str | os.PathLike[str], owner: Owner) -> Transcript:
    """Reads a session; its keys and values go into the engine's prefix cache, if that has room for them.

    Raises:
        InputError: there is no such file, it is damaged or none of a session's, or it was made with other weights,
            another tokenizer or another version of this format.
        EngineClosedError: the engine is closed.
    """
    path = Path(path).expanduser()
    content, entries = read_sealed_file(path, "session", "Session.save")
    if content.get("version") not in _READABLE_VERSIONS:
        raise InputError(
            f"{path}: is of format version {content.get('version')}; expected at most {_VERSION}; load it with the arcee_mlx that "
            f"saved it"
        )
    if content.get("weights_sha256") != owner.call(lambda: owner.scheduler.weights_sha256):
        raise InputError(
            f"{path}: was made with other weights; expected this engine's, adapters included; load the model it was made with"
        )
    try:
        transcript = _read_transcript(content)
        ids = transcript.ids[: content["cached_tokens"]]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected a file of Session.save; save it again") from error
    if content.get("text_sha256") != _hash_text(owner, transcript):
        raise InputError(
            f"{path}: was made with another tokenizer, in which its tokens are another text; expected this checkpoint's; "
            f"load the one it was made with"
        )
    _restore(owner, entries, ids, transcript.cache_kind)
    return transcript


def _describe(transcript: Transcript) -> dict[str, Any]:
    options = None
    if transcript.options is not None:
        options = asdict(transcript.options) | {"logit_bias": list(transcript.options.logit_bias.items())}
    return {
        "version": _VERSION,
        "system_prompt": transcript.system_prompt,
        "turns": [asdict(turn) for turn in transcript.turns],
        "options": options,
        "overflow": transcript.overflow,
        "cache_kind": transcript.cache_kind,
    }


def _read_transcript(content: Mapping[str, Any]) -> Transcript:
    turns = tuple(map(_read_turn, content["turns"]))
    options = content["options"]
    if options is not None:
        options = GenerateOptions(**options | {"logit_bias": dict(options["logit_bias"])})
    bits, group_size = content["cache_kind"]
    transcript = Transcript(content["system_prompt"], turns, options, content["overflow"], (bits, group_size))
    texts = [transcript.system_prompt or "", *(text for turn in turns for text in (turn.user, turn.answer, turn.text))]
    texts += [text for turn in turns for result in turn.tool_results for text in (result.name, result.content)]
    texts += [text for turn in turns for call in turn.tool_calls for text in (call.name, call.text)]
    numbers = [content["cached_tokens"], *(number for turn in turns for number in (turn.dropped_turns, *turn.ids))]
    if {type(text) for text in texts} != {str} or {type(number) for number in numbers} != {int}:
        raise TypeError("its texts and numbers are of other types")
    if transcript.overflow not in OVERFLOWS:
        raise ValueError(f"overflow is {transcript.overflow!r}")
    return transcript


def _read_turn(values: Mapping[str, Any]) -> Turn:
    return Turn(
        **{
            **values,
            "ids": tuple(values["ids"]),
            "tool_results": tuple(ToolResult(**result) for result in values.get("tool_results", ())),
            "tool_calls": tuple(ToolCall(**call) for call in values.get("tool_calls", ())),
        }
    )


def _hash_text(owner: Owner, transcript: Transcript) -> str:
    return hash_text(owner.tokenizer, [token for turn in transcript.turns for token in turn.ids])


# Keys and values. Except for the table of shapes all of this is for the owner thread.


def _find(owner: Owner, transcript: Transcript) -> tuple[str, tuple[list[Any], int]]:
    """The hash of the weights; and a cache of what the engine has of the transcript's tokens, and how many those are."""
    scheduler = owner.scheduler
    ids = [*transcript.ids, 0]  # of which a fork leaves the last one out
    return scheduler.weights_sha256, scheduler.prefixes.fork(ids, transcript.cache_kind) or ([], 0)


def _arrays(i: int, layer: Any) -> dict[str, mx.array]:
    """A layer's keys and values by name; their third dimension is that of the tokens."""
    arrays: list[tuple[str, mx.array]] = tree_flatten(layer.state[:2])  # type: ignore[assignment]
    return {f"{i}.{name}": array for name, array in arrays}


def _shapes(i: int, layer: Any, count: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        name: (DTYPE_NAMES[array.dtype], (*array.shape[:2], count, *array.shape[3:]))
        for name, array in _arrays(i, layer).items()
    }


def _copy_layer(i: int, layer: Any, count: int) -> list[tuple[str, mx.array]]:
    # As bytes: whoever writes them has nothing to compute.
    data = [(name, mx.contiguous(array[:, :, :count]).view(mx.uint8)) for name, array in _arrays(i, layer).items()]
    mx.eval([array for _, array in data])
    return data


def _restore(owner: Owner, entries: Mapping[str, TensorEntry], ids: Sequence[int], kind: CacheKind) -> None:
    """Puts keys and values into the prefix cache. Those it has no room for, or that another dtype computed, are left:
    they are computed again.
    """
    layers = owner.call(lambda: _make_layers(owner, entries, len(ids), kind))
    for i, layer in enumerate(layers):
        owner.call(partial(_read_layer, i, layer, entries, len(ids)))
    if layers:
        owner.call(lambda: owner.scheduler.prefixes.insert(ids, layers))


def _make_layers(owner: Owner, entries: Mapping[str, TensorEntry], count: int, kind: CacheKind) -> list[Any]:
    """Caches of this engine for the tensors of a file; none where there are no such, or no room for them."""
    scheduler = owner.scheduler
    nbytes = sum(entry.nbytes for entry in entries.values())
    if count == 0 or nbytes > scheduler.prefix_room_bytes:
        return []
    bits, group_size = kind
    options = GenerateOptions(kv_bits=bits, kv_group_size=group_size or 64)
    layers = make_prompt_cache(scheduler.model, options)
    fill_cache(scheduler.model, layers, [0], 1)  # any token: it shows what is stored for one
    wanted = {name: shape for i, layer in enumerate(layers) for name, shape in _shapes(i, layer, count).items()}
    if wanted != {name: (entry.dtype, entry.shape) for name, entry in entries.items()}:
        return []
    scheduler.prefixes.shrink(scheduler.prefix_room_bytes - nbytes)
    return layers


def _read_layer(i: int, layer: Any, entries: Mapping[str, TensorEntry], count: int) -> None:
    names = [name.split(".", 1)[1] for name in _arrays(i, layer)]
    read = {name: read_rows(entries[f"{i}.{name}"], 0, 1) for name in names}
    mx.eval(read)
    keys, values = tree_unflatten(list(read.items()))
    layer.state = (keys, values, count, *layer.state[3:])

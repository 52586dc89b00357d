"""The special tokens of a checkpoint, found in the three files that have told of them over the years.

Source: transformers 5.23, tokenization_utils_tokenizers.py and tokenization_utils_base.py (behaviour, not code).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken

from ..errors import TokenizerError

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def resolve_special_tokens(folder: Path, config: Mapping[str, Any], backend: tokenizers.Tokenizer) -> dict[str, str]:
    """Find the special tokens by name, and add to `backend` the tokens the config files have and it lacks."""
    settings = dict(config)
    if not settings.get("extra_special_tokens") and "additional_special_tokens" in settings:
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    listed = settings.get("added_tokens_decoder")
    if listed is None:
        older = read_optional_json(folder / "special_tokens_map.json")
        if "extra_special_tokens" not in settings:
            settings["extra_special_tokens"] = older.pop("additional_special_tokens", None)
        if isinstance(more := older.get("extra_special_tokens"), list):
            older["extra_special_tokens"] = [*(settings.get("extra_special_tokens") or []), *more]
        settings |= older
    if backend.padding is not None:
        settings.setdefault("pad_token", backend.padding["pad_token"])

    extra = settings.get("extra_special_tokens") or []
    if isinstance(extra, dict):  # the model's own names, such as image_token
        settings, extra = {**settings, **extra}, []
    named = {
        key: _added_token(value)
        for key, value in settings.items()
        if (key in _NAMED or key.endswith("_token") or key in (config.get("extra_special_tokens") or ()))
        and isinstance(value, str | dict)
    }
    extra = [_added_token(token) for token in extra]
    for token in extra:
        token.special = True
    names = {key: token.content for key, token in named.items()}
    special = set(names.values())

    if listed is not None:
        stored = {int(i): _added_token(token) for i, token in listed.items()}
    else:
        known = special | {token.content for token in extra}
        older_tokens = read_optional_json(folder / "added_tokens.json")
        stored = {
            i: AddedToken(text, normalized=text not in known, special=text in known) for text, i in older_tokens.items()
        } | backend.get_added_tokens_decoder()
    # Known tokens are added again: that is how the library takes over the flags that the config gives them. New ones
    # get the next free ids, in the order of the ids they claim.
    tokens = [stored[i] for i in sorted(stored)]
    have = {token.content for token in [*tokens, *backend.get_added_tokens_decoder().values()]}
    tokens += [token for token in [*named.values(), *extra] if token.content not in have]
    for token in tokens:
        token.special = token.special or token.content in special
    backend.add_tokens(tokens)
    return names


def find_special_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    return frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)


def _added_token(value: str | Mapping[str, Any]) -> AddedToken:
    """Read a token as the files write it: its text, or an object with `content` and flags."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = {key: value[key] for key in ("single_word", "lstrip", "rstrip", "normalized", "special") if key in value}
    return AddedToken(str(value["content"]), **flags)


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty where the file is missing."""
    try:
        value = json.loads(path.read_bytes()) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{path} cannot be read ({error}); expected JSON; download it again") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} holds a {type(value).__name__}; expected a JSON object; download it again")
    return value

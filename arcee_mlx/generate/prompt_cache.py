"""A prompt's keys and values, kept for later: in memory, or in a file that mlx_lm.cache_prompt and ours share.

A file of ours also says which tokens it holds, for which weights, and what text they were. So a whole prompt may be
given with it, and what the two have in common is not computed again. A file of mlx_lm's holds none of that: as in
mlx_lm.generate, the prompt goes on from where it ends.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from .. import upstream
from ..checkpoint.tokenizer import Tokenizer
from ..checkpoint.training_state import hash_weights
from ..errors import InputError
from ..model.decoder import ArceeForCausalLM
from .options import GenerateOptions, context_tokens
from .prefill import PromptProgress, fill_cache, make_prompt_cache
from .request import Prompt, encode_prompt, read_request

_KINDS = ("KVCache", "RotatingKVCache", "QuantizedKVCache")


@dataclass(frozen=True)
class PromptCache:
    """Keys and values of the beginning of a prompt. Generating with one leaves it as it is.

    Attributes:
        layers: mlx-lm caches, one a layer.
        ids: the tokens they hold; None for a file of mlx_lm's, which does not say.
        weights_sha256: of the model that made it (its first numbers of every weight).
        length: how many tokens.
        kv_bits, kv_group_size, max_kv_size: as in the options it was made with.
    """

    layers: list[Any]
    ids: tuple[int, ...] | None
    weights_sha256: str

    @property
    def length(self) -> int:
        return self.layers[0].offset

    @property
    def kv_bits(self) -> int | None:
        return getattr(self.layers[0], "bits", None)

    @property
    def kv_group_size(self) -> int | None:
        return getattr(self.layers[0], "group_size", None)

    @property
    def max_kv_size(self) -> int | None:
        return getattr(self.layers[0], "max_size", None)

    @property
    def unseen_tokens(self) -> int:
        """Tokens that stand before any prompt, whatever it is."""
        return self.length if self.ids is None else 0

    def check_fits(self, options: GenerateOptions, model: ArceeForCausalLM) -> None:
        """Raises InputError where the options ask for another kind of KV cache, or the weights are not those it was made with."""
        if self.weights_sha256 != hash_weights(model.parameters()):
            raise InputError(
                "prompt_cache was made with other weights; expected this model's, adapters included; make it again"
            )
        names = ("max_kv_size",) if options.kv_bits is None else ("max_kv_size", "kv_bits", "kv_group_size")
        for name in names:
            asked, own = getattr(options, name), getattr(self, name)
            if asked is not None and asked != own:
                raise InputError(f"{name} is {asked} with a prompt cache of {own}; expected the same; leave it out")

    def fork(self, ids: list[int]) -> tuple[list[Any], int]:
        """A cache of its own for one prompt, and how many of the prompt's tokens it holds: never all of them.

        Nothing is copied until the fork is written to.
        """
        common = 0
        if self.ids is not None:
            common = next(
                (i for i, pair in enumerate(zip(self.ids, ids, strict=False)) if pair[0] != pair[1]),
                min(len(self.ids), len(ids)),
            )
            common = min(common, len(ids) - 1)
        kept = self.length if self.ids is None else common
        if kept < self.length and not all(layer.is_trimmable() for layer in self.layers):
            kept = common = 0  # a rotating cache that has let go of tokens cannot go back
        return [_fork_layer(layer, kept) for layer in self.layers], common


def cache_prompt(
    model: ArceeForCausalLM,
    tokenizer: Tokenizer,
    prompt: Prompt,
    options: GenerateOptions | None = None,
    *,
    prompt_progress: PromptProgress | None = None,
) -> PromptCache:
    """Computes what prompts that begin like this one will need, for `stream_generate(..., prompt_cache=...)`.

    Of messages the last one is left open, as by mlx_lm.cache_prompt, so that later prompts may go on in it.

    Args:
        options: those about the prompt and about memory count.

    Raises:
        InputError, TokenizerError: as `generate`.
    """
    options = options or GenerateOptions()
    ids = encode_prompt(tokenizer, prompt, options, is_open=True)
    read = replace(options, prefill_response=None, chat_template_config={})
    request = read_request(model.config, tokenizer, ids, read)
    layers = make_prompt_cache(model, request.options)
    fill_cache(model, layers, request.ids, options.prefill_step_size, prompt_progress or (lambda *_: None))
    return PromptCache(layers, tuple(request.ids), hash_weights(model.parameters()))


def save_prompt_cache(
    path: str | os.PathLike[str],
    cache: PromptCache,
    model: ArceeForCausalLM,
    tokenizer: Tokenizer,
    *,
    model_name: str | None = None,
) -> None:
    """Writes a prompt cache to a .safetensors file, which mlx_lm.generate reads too (its prompt goes on from there).

    Args:
        model_name: what mlx_lm.generate is to load or compare its --model with; by default the model's folder.

    Raises:
        InputError: the cache's tokens are not known, or the file cannot be written.
    """
    if cache.ids is None:
        raise InputError("the prompt cache came from a file of mlx_lm's; expected one of cache_prompt; copy the file")
    metadata = {
        "model": model_name or str(_folder(model)),
        "tokenizer_config": "{}",
        "ids": json.dumps(cache.ids),
        "text_sha256": hash_text(tokenizer, cache.ids),
        "weights_sha256": cache.weights_sha256,
    }
    name = check_cache_file_name(path)
    try:
        upstream.mlx_lm_module("models.cache").save_prompt_cache(name, cache.layers, metadata)
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(f"{name}: cannot be written ({error}); expected a folder to write to") from error


def check_cache_file_name(path: str | os.PathLike[str]) -> str:
    """Raises InputError unless a prompt cache may have this name; returns it as text."""
    name = os.fspath(path)
    if not name.endswith(".safetensors"):
        raise InputError(f"prompt cache file is {name!r}; expected a name ending in .safetensors; add that")
    return name


def load_prompt_cache(
    path: str | os.PathLike[str], model: ArceeForCausalLM, tokenizer: Tokenizer, *, model_name: str | None = None
) -> PromptCache:
    """Reads a file of `save_prompt_cache` or of mlx_lm.cache_prompt.

    Args:
        model_name: what the model was loaded from, compared with what a file of mlx_lm's says; by default its folder.

    Raises:
        InputError: there is no such file, it is damaged, or it was made with another model or tokenizer.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise InputError(f"prompt cache file {name}: does not exist; make it with `arcee-mlx cache-prompt`")
    try:
        _, stored = mx.load(name, format="safetensors", return_metadata=True)
        kinds = [value for key, value in sorted(stored.items()) if key.startswith("1.")]  # type: ignore[union-attr]
        if not kinds or not set(kinds) <= {*_KINDS}:
            raise ValueError(f"holds {', '.join(sorted({*kinds})) or 'no caches'}")
        layers, metadata = upstream.mlx_lm_module("models.cache").load_prompt_cache(name, return_metadata=True)
        made_with = metadata["model"]
        ids = tuple(json.loads(metadata["ids"])) if "ids" in metadata else None
        shapes = {_shape(layer) for layer in layers}
        length = layers[0].offset
        mx.eval([layer.state for layer in layers])  # a file cut short shows only now
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"prompt cache file {name}: cannot be read ({error}); expected one of `arcee-mlx cache-prompt` "
                         f"or mlx_lm.cache_prompt; make it again") from error  # fmt: skip
    wanted = (model.config.kv_heads, model.config.head_size)
    if len(layers) != len(model.layers) or shapes != {wanted}:
        raise _of_another(name, "model", made_with, f"{len(layers)} layers of (heads, width) {sorted(shapes)}; expected "
                          f"{len(model.layers)} of {wanted}")  # fmt: skip
    if ids is None:
        if not _is_name_of(made_with, model_name, _folder(model)):
            raise _of_another(name, "model", made_with, f"not with {model_name or _folder(model)}")
    elif metadata.get("weights_sha256") != hash_weights(model.parameters()):
        raise _of_another(name, "model", made_with, f"whose weights are not those of {model_name or _folder(model)}")
    elif len(ids) != length or metadata.get("text_sha256") != hash_text(tokenizer, ids):
        raise _of_another(name, "tokenizer", made_with, "its tokens are another text in this tokenizer")
    if length >= context_tokens(model.config) and "RotatingKVCache" not in kinds:
        raise InputError(f"prompt cache file {name}: fills all {length} positions of the model; expected fewer")
    return PromptCache(layers, ids, hash_weights(model.parameters()))


def _of_another(name: str, what: str, made_with: str, detail: str) -> InputError:
    return InputError(
        f"prompt cache file {name}: made with another {what}, that of {made_with!r}: {detail}; make it again"
    )


def _fork_layer(layer: Any, kept: int) -> Any:
    if kept == 0 and hasattr(layer, "max_size"):
        return type(layer)(layer.max_size, layer.keep)
    # New array objects over the same memory: writing into one of them copies first.
    fork = type(layer).from_state(tree_map(lambda x: mx.array(x) if isinstance(x, mx.array) else x, layer.state))
    fork.trim(layer.offset - kept)
    return fork


def _shape(layer: Any) -> tuple[int, int]:
    """(heads, width) of a layer's keys."""
    if hasattr(layer, "bits"):
        codes = layer.keys[0]
        return codes.shape[1], codes.shape[3] * 32 // layer.bits
    return layer.keys.shape[1], layer.keys.shape[3]


def _folder(model: ArceeForCausalLM) -> Path:
    return Path(model.config.source).parent


def _is_name_of(made_with: str, model_name: str | None, folder: Path) -> bool:
    """Whether a file of mlx_lm's means this model: by the same name, the same folder, or its place in the hub's cache."""
    hub_folder = "models--" + made_with.replace("/", "--")
    return made_with == model_name or hub_folder in folder.parts or Path(made_with).resolve() == folder.resolve()


def hash_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Of the text that tokens are in this tokenizer; "" where it does not have one of them."""
    try:
        text = tokenizer.decode(ids)
    except InputError:  # an id this tokenizer does not have
        return ""
    return hashlib.sha256(text.encode()).hexdigest()

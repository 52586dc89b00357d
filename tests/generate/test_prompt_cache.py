"""Prompt caches: cached equals cold, files shared with mlx_lm.cache_prompt, other models and tokenizers refused."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import ArceeForCausalLM, GenerateOptions, GenerationChunk, InputError, PromptCache, Tokenizer
from arcee_mlx.generate.prompt_cache import _is_name_of
from arcee_mlx.upstream import mlx_lm_module

from conftest import flat, tiny_config, write_checkpoint

Loaded = tuple[ArceeForCausalLM, Tokenizer]
PROMPT = "Call me Ishmael. Some years ago, never mind how long precisely"
OPTIONS = GenerateOptions(max_tokens=12, temp=0, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


def run(loaded: Loaded, prompt: Any, cache: PromptCache | None = None, **options: Any) -> list[GenerationChunk]:
    values = {"max_tokens": 12, "temp": 0, "repetition_penalty": 1.2} | options
    return list(arcee_mlx.stream_generate(*loaded, prompt, GenerateOptions(**values), prompt_cache=cache))


def tokens_of(chunks: list[GenerationChunk]) -> list[int]:
    return [chunk.token for chunk in chunks]


@pytest.mark.parametrize("memory", [{}, {"kv_bits": 8, "kv_group_size": 32}, {"max_kv_size": 64}, {"max_kv_size": 9}])
def test_cached_equals_cold_whatever_the_two_prompts_have_in_common(loaded: Loaded, memory: dict[str, Any]) -> None:
    ids = loaded[1].encode(PROMPT)
    cache = arcee_mlx.cache_prompt(*loaded, ids, GenerateOptions(**memory))
    prompts = [ids, ids[:1], ids[:5], [*ids, 7, 8], [*ids[:6], 9, 9, 9], [9, 9], ids]
    for prompt in prompts:  # the cache serves all of them and stays as it is
        warm = run(loaded, prompt, cache)
        assert tokens_of(warm) == tokens_of(run(loaded, prompt, **memory))
    assert cache.length == len(ids)


def test_the_exact_repeat_leaves_one_token_to_compute(loaded: Loaded) -> None:
    cache = arcee_mlx.cache_prompt(*loaded, PROMPT)
    last = run(loaded, PROMPT, cache)[-1]
    assert last.stats.cached_tokens == last.stats.prompt_tokens - 1 == cache.length - 1
    assert run(loaded, [9, 9], cache)[-1].stats.cached_tokens == 0


def test_generating_writes_nothing_into_the_cache(loaded: Loaded) -> None:
    for memory in ({}, {"kv_bits": 8, "kv_group_size": 32}, {"max_kv_size": 64}):
        cache = arcee_mlx.cache_prompt(*loaded, PROMPT, GenerateOptions(**memory))
        before = [mx.array(x) for layer in cache.layers for _, x in mlx_flat(layer.state)]
        mx.eval(before)
        run(loaded, PROMPT + " and more", cache, max_tokens=30)
        after = [x for layer in cache.layers for _, x in mlx_flat(layer.state)]
        assert all(mx.array_equal(a, b).item() for a, b in zip(before, after, strict=True))


def mlx_flat(state: Any) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return [(name, x) for name, x in tree_flatten(state) if isinstance(x, mx.array)]


@pytest.mark.parametrize("memory", [{}, {"kv_bits": 4, "kv_group_size": 32}, {"max_kv_size": 64}])
def test_a_file_holds_what_was_saved(loaded: Loaded, tmp_path: Path, memory: dict[str, Any]) -> None:
    path = tmp_path / "prompt.safetensors"
    cache = arcee_mlx.cache_prompt(*loaded, PROMPT, GenerateOptions(**memory))
    arcee_mlx.save_prompt_cache(path, cache, *loaded)
    again = arcee_mlx.load_prompt_cache(path, *loaded)
    assert again.ids == tuple(loaded[1].encode(PROMPT))
    assert (again.kv_bits, again.max_kv_size) == (memory.get("kv_bits"), memory.get("max_kv_size"))
    for prompt in (PROMPT, PROMPT + " I thought"):
        assert tokens_of(run(loaded, prompt, again)) == tokens_of(run(loaded, prompt, **memory))


def test_messages_go_on_in_the_open_last_message(loaded: Loaded) -> None:
    cache = arcee_mlx.cache_prompt(*loaded, [{"role": "user", "content": "A long text."}])
    assert cache.ids is not None
    assert loaded[1].decode(cache.ids) == "<s><|im_start|>user\nA long text."
    whole = [{"role": "user", "content": "A long text. And a question?"}]
    warm = run(loaded, whole, cache)
    assert tokens_of(warm) == tokens_of(run(loaded, whole))
    assert warm[-1].stats.cached_tokens >= cache.length - 1


def test_several_answers_start_from_a_cache(loaded: Loaded) -> None:
    options = GenerateOptions(max_tokens=8, temp=1.0, seed=4, repetition_penalty=1.2)
    cache = arcee_mlx.cache_prompt(*loaded, PROMPT)
    cold = arcee_mlx.generate_answers(*loaded, PROMPT + " now", options, n=3)
    warm = arcee_mlx.generate_answers(*loaded, PROMPT + " now", options, n=3, prompt_cache=cache)
    assert [answer.tokens for answer in warm] == [answer.tokens for answer in cold]
    small = arcee_mlx.cache_prompt(*loaded, PROMPT, GenerateOptions(kv_bits=8, kv_group_size=32))
    with pytest.raises(InputError, match="kv_bits is 8 in a batch"):
        arcee_mlx.generate_answers(*loaded, PROMPT, options, n=3, prompt_cache=small)


class PlainTokenizer:
    """As much of mlx_lm's tokenizer as mlx_lm.cache_prompt needs."""

    has_chat_template = True

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.apply_chat_template = tokenizer.encode_chat


def cache_with_mlx_lm(loaded: Loaded, path: Path, model_name: str, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    program = mlx_lm_module("cache_prompt")
    monkeypatch.setattr(program, "load", lambda *_, **__: (loaded[0], PlainTokenizer(loaded[1])))
    argv = ["x", "--model", model_name, "--prompt-cache-file", str(path), "--prompt", "A long text."]
    monkeypatch.setattr(sys, "argv", [*argv, *more])
    program.main()


@pytest.mark.parametrize("more", [(), ("--kv-bits", "8", "--kv-group-size", "32", "--quantized-kv-start", "0")])
def test_a_file_of_mlx_lm_is_gone_on_from(
    loaded: Loaded, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: tuple[str, ...]
) -> None:
    path = tmp_path / "theirs.safetensors"
    cache_with_mlx_lm(loaded, path, str(checkpoint), monkeypatch, *more)
    cache = arcee_mlx.load_prompt_cache(path, *loaded)
    assert cache.ids is None and cache.kv_bits == (8 if more else None)
    memory = {"kv_bits": 8, "kv_group_size": 32} if more else {}
    for question in ("", " And a question?"):  # the exact repeat, too
        warm = run(loaded, [{"role": "user", "content": question}], cache, repetition_penalty=1.0)
        whole = [{"role": "user", "content": "A long text." + question}]
        assert tokens_of(warm) == tokens_of(run(loaded, whole, repetition_penalty=1.0, **memory))
        assert warm[-1].stats.prompt_tokens == len(loaded[1].encode_chat(whole, add_generation_prompt=True))
    raw = run(loaded, " More", cache, repetition_penalty=1.0)
    ids = loaded[1].encode("<s><|im_start|>user\nA long text. More", add_special_tokens=False)
    assert tokens_of(raw) == tokens_of(run(loaded, ids, repetition_penalty=1.0, **memory))
    with pytest.raises(InputError, match="the prompt is empty"):
        run(loaded, "", cache)
    with pytest.raises(InputError, match="expected fewer than the 256 positions"):
        run(loaded, [5] * 250, cache)


def test_mlx_lm_goes_on_from_a_file_of_ours(
    loaded: Loaded,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "ours.safetensors"
    cache = arcee_mlx.cache_prompt(*loaded, [{"role": "user", "content": "A long text."}])
    arcee_mlx.save_prompt_cache(path, cache, *loaded)
    program = mlx_lm_module("generate")
    wrapped = mlx_lm_module("tokenizer_utils").load(checkpoint)
    monkeypatch.setattr(program, "load", lambda *_, **__: (loaded[0], wrapped, {}))
    argv = ["x", "--model", str(checkpoint), "--prompt-cache-file", str(path), "--prompt", " And a question?"]
    monkeypatch.setattr(sys, "argv", [*argv, "--max-tokens", "6", "--verbose", "F"])
    program.main()
    whole = [{"role": "user", "content": "A long text. And a question?"}]
    ours = run(loaded, whole, max_tokens=6, repetition_penalty=1.0)
    assert capsys.readouterr().out.removesuffix("\n") == "".join(chunk.text for chunk in ours)


def other_model(folder: Path, **changes: Any) -> Loaded:
    """A checkpoint of another model: other weights, or another shape."""
    write_checkpoint(folder)
    if not changes:
        model = arcee_mlx.load_model(folder, ArceeForCausalLM)
        model.load_weights([(name, value * 1.01) for name, value in flat(model)])
    else:
        model = ArceeForCausalLM(tiny_config(**changes))
    return model, arcee_mlx.load(folder)[1]


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 3}, {"num_key_value_heads": 4}, {"head_dim": 64}])
def test_a_cache_of_another_model_is_refused_by_name(
    loaded: Loaded, checkpoint: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    path = tmp_path / "prompt.safetensors"
    arcee_mlx.save_prompt_cache(path, arcee_mlx.cache_prompt(*loaded, PROMPT), *loaded, model_name="arcee-ai/ours")
    with pytest.raises(InputError, match="made with another model, that of 'arcee-ai/ours'"):
        arcee_mlx.load_prompt_cache(path, *other_model(tmp_path / "other", **changes))


def test_a_cache_of_mlx_lms_with_another_name_is_refused(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "theirs.safetensors"
    cache_with_mlx_lm(loaded, path, "arcee-ai/AFM-4.5B", monkeypatch)
    with pytest.raises(InputError, match="made with another model, that of 'arcee-ai/AFM-4.5B'"):
        arcee_mlx.load_prompt_cache(path, *loaded)
    assert arcee_mlx.load_prompt_cache(path, *loaded, model_name="arcee-ai/AFM-4.5B").ids is None


@pytest.mark.parametrize(
    ("made_with", "model_name", "folder", "same"),
    [
        ("arcee-ai/AFM-4.5B", None, "/hub/models--arcee-ai--AFM-4.5B/snapshots/0123", True),
        ("arcee-ai/AFM-4.5B", None, "/hub/models--arcee-ai--AFM-4.5B-Base/snapshots/0123", False),
        ("arcee-ai/AFM-4.5B", "arcee-ai/AFM-4.5B", "/models/afm", True),
        ("/models/other/../afm", None, "/models/afm", True),
        ("/models/afm", "arcee-ai/AFM-4.5B", "/models/afm-4bit", False),
    ],
)
def test_a_name_means_a_model(made_with: str, model_name: str | None, folder: str, same: bool) -> None:
    assert _is_name_of(made_with, model_name, Path(folder)) == same


def test_a_cache_of_another_tokenizer_is_refused(loaded: Loaded, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    arcee_mlx.save_prompt_cache(path, arcee_mlx.cache_prompt(*loaded, PROMPT), *loaded)
    shutil.copytree(checkpoint, tmp_path / "m")
    file = tmp_path / "m" / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    first, second = (next(t for t, i in vocabulary.items() if i == n) for n in loaded[1].encode(PROMPT)[1:3])
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(values))
    other = arcee_mlx.load(tmp_path / "m")[1]
    with pytest.raises(InputError, match="made with another tokenizer"):
        arcee_mlx.load_prompt_cache(path, loaded[0], other)


def test_the_same_weights_in_another_place_are_the_same_model(loaded: Loaded, checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    arcee_mlx.save_prompt_cache(path, arcee_mlx.cache_prompt(*loaded, PROMPT), *loaded)
    shutil.copytree(checkpoint, tmp_path / "moved")
    assert arcee_mlx.load_prompt_cache(path, *arcee_mlx.load(tmp_path / "moved")).ids is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "cannot be read"),
        (b"\x08\0\0\0\0\0\0\0{}      ", "cannot be read"),
        (b"no safetensors at all" * 10, "cannot be read"),
    ],
)
def test_a_damaged_file_is_one_clear_error(loaded: Loaded, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "prompt.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"prompt.safetensors: {message}"):
        arcee_mlx.load_prompt_cache(path, *loaded)


def test_a_file_cut_short_is_noticed_when_it_is_read(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    arcee_mlx.save_prompt_cache(path, arcee_mlx.cache_prompt(*loaded, PROMPT), *loaded)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(InputError, match="prompt.safetensors: cannot be read"):
        arcee_mlx.load_prompt_cache(path, *loaded)


def test_a_file_that_names_another_class_is_not_followed(loaded: Loaded, tmp_path: Path) -> None:
    path = tmp_path / "prompt.safetensors"
    mx.save_safetensors(str(path), {"0.0": mx.zeros(3)}, {"0.model": "x", "1.0": "LRUPromptCache", "2.0": ""})
    with pytest.raises(InputError, match="cannot be read .holds LRUPromptCache"):
        arcee_mlx.load_prompt_cache(path, *loaded)


def test_what_does_not_fit_the_cache_is_refused(loaded: Loaded, tmp_path: Path) -> None:
    cache = arcee_mlx.cache_prompt(*loaded, PROMPT)
    with pytest.raises(InputError, match="kv_bits is 8 with a prompt cache of None"):
        run(loaded, PROMPT, cache, kv_bits=8, kv_group_size=32)
    with pytest.raises(InputError, match="max_kv_size is 64 with a prompt cache of None"):
        run(loaded, PROMPT, cache, max_kv_size=64)
    with pytest.raises(InputError, match=r"expected a name ending in .safetensors"):
        arcee_mlx.save_prompt_cache(tmp_path / "cache", cache, *loaded)
    with pytest.raises(InputError, match="cannot be written"):
        arcee_mlx.save_prompt_cache(tmp_path / "no" / "cache.safetensors", cache, *loaded)

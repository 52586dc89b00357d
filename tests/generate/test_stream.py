"""generate and stream_generate on a tiny model."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import ArceeForCausalLM, GenerateOptions, GenerationChunk, InputError, Tokenizer, TokenizerError
from arcee_mlx.generate.stream import encode_prompt, make_prompt_cache

from conftest import write_checkpoint

Loaded = tuple[ArceeForCausalLM, Tokenizer]
PROMPT = "Call me Ishmael."


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


def run(loaded: Loaded, prompt: Any = PROMPT, **options: Any) -> list[GenerationChunk]:
    return list(arcee_mlx.stream_generate(*loaded, prompt, GenerateOptions(**options)))


def greedy(model: ArceeForCausalLM, ids: list[int], count: int) -> list[int]:
    """The slow obvious path: the whole sequence anew for every token."""
    ids, start = list(ids), len(ids)
    for _ in range(count):
        ids.append(int(mx.argmax(model.forward(mx.array([ids])).logits[0, -1])))
    return ids[start:]


def test_greedy_tokens_are_those_of_full_passes(loaded: Loaded) -> None:
    model, tokenizer = loaded
    chunks = run(loaded, max_tokens=30, temp=0)
    expected = greedy(model, tokenizer.encode(PROMPT), len(chunks))
    assert [chunk.token for chunk in chunks] == expected


def test_the_joined_stream_is_the_decoded_tokens_and_what_generate_returns(loaded: Loaded) -> None:
    options = GenerateOptions(max_tokens=60, temp=1.5, seed=3)
    chunks = list(arcee_mlx.stream_generate(*loaded, PROMPT, options))
    tokens = [chunk.token for chunk in chunks if chunk.stop_reason != "eos"]
    text = "".join(chunk.text for chunk in chunks)
    assert text == loaded[1].decode(tokens, skip_special_tokens=True)
    assert text == arcee_mlx.generate(*loaded, PROMPT, options)


def test_a_seed_fixes_the_text_and_none_draws_one_that_repeats_it(loaded: Loaded) -> None:
    first = run(loaded, max_tokens=30, temp=1.0)
    again = run(loaded, max_tokens=30, temp=1.0, seed=first[-1].stats.seed)
    other = run(loaded, max_tokens=30, temp=1.0)
    assert [c.token for c in first] == [c.token for c in again]
    assert [c.token for c in first] != [c.token for c in other]


@pytest.mark.parametrize("step", [1, 3, 7])
def test_the_prefill_step_does_not_change_the_text(loaded: Loaded, step: int) -> None:
    whole = run(loaded, PROMPT * 4, max_tokens=12, temp=0)
    pieces = run(loaded, PROMPT * 4, max_tokens=12, temp=0, prefill_step_size=step)
    assert [c.token for c in whole] == [c.token for c in pieces]


def test_prompt_progress_ends_at_the_whole_prompt(loaded: Loaded) -> None:
    seen: list[tuple[int, int]] = []
    chunks = arcee_mlx.stream_generate(
        *loaded, PROMPT, GenerateOptions(max_tokens=1, prefill_step_size=2), prompt_progress=lambda *x: seen.append(x)
    )
    list(chunks)
    total = len(loaded[1].encode(PROMPT))
    assert seen[0] == (0, total) and seen[-1] == (total, total) and len(seen) > 3


def test_only_the_last_chunk_has_a_reason(loaded: Loaded) -> None:
    chunks = run(loaded, max_tokens=5, temp=0)
    assert [chunk.stop_reason for chunk in chunks] == [None] * 4 + ["max_tokens"]
    assert chunks[-1].stats.generation_tokens == 5
    assert chunks[-1].stats.prompt_tokens == len(loaded[1].encode(PROMPT))


def test_generation_ends_at_any_end_of_text_token(loaded: Loaded) -> None:
    model, tokenizer = loaded
    expected = greedy(model, tokenizer.encode(PROMPT), 8)
    name = tokenizer.decode([expected[5]])
    if tokenizer.token_id(name) != expected[5]:
        name = next(t for t, i in tokenizer._backend.get_vocab().items() if i == expected[5])
    chunks = run(loaded, max_tokens=20, temp=0, extra_eos_tokens=(name,))
    first = expected.index(expected[5])
    assert [c.token for c in chunks] == expected[: first + 1]
    assert chunks[-1].stop_reason == "eos"
    text = "".join(c.text for c in chunks)
    assert text == tokenizer.decode(expected[:first], skip_special_tokens=True)


def test_an_unknown_end_of_text_token_is_refused_by_name(loaded: Loaded) -> None:
    with pytest.raises(InputError, match="extra_eos_tokens names '<nothing>'"):
        run(loaded, extra_eos_tokens=("<nothing>",))


def test_a_stop_string_ends_computing_not_only_the_text(loaded: Loaded) -> None:
    whole = run(loaded, max_tokens=60, temp=0)
    text = "".join(c.text for c in whole)
    stop = text[len(text) // 2 :][:3]
    chunks = run(loaded, max_tokens=60, temp=0, stop=(stop,))
    assert chunks[-1].stop_reason == "stop_string"
    assert "".join(c.text for c in chunks) == text[: text.index(stop)]
    assert len(chunks) < len(whole)


def test_the_context_ends_the_answer_when_it_is_full(loaded: Loaded) -> None:
    model, tokenizer = loaded
    prompt = tokenizer.encode(PROMPT * 10)[:250]
    chunks = run(loaded, prompt, max_tokens=-1, temp=0)
    assert len(prompt) + len(chunks) == model.config.max_position_embeddings
    assert chunks[-1].stop_reason == "context_full"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([5, 400], "id 400 at place 1; expected 0 to 399"),
        ([-1], "id -1 at place 0"),
        ([3] * 256, "256 tokens; expected fewer than the 256 positions"),
        ([1.5], "neither text, nor messages, nor token ids"),
        ([{"role": "user", "content": "x"}, 3], "neither text, nor messages"),
        ([True], "neither text"),
    ],
)
def test_a_bad_prompt_is_refused_before_anything_is_computed(loaded: Loaded, prompt: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        arcee_mlx.stream_generate(*loaded, prompt)


def test_messages_go_through_the_chat_template(loaded: Loaded) -> None:
    tokenizer = loaded[1]
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "Hi"}])
    assert tokenizer.decode(ids) == "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_messages_without_a_template_are_an_error(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "m")
    (tmp_path / "m" / "tokenizer_config.json").write_text("{}")
    loaded = arcee_mlx.load(tmp_path / "m")
    with pytest.raises(TokenizerError, match="template"):
        run(loaded, [{"role": "user", "content": "Hi"}])


def test_a_rendered_prompt_gets_no_second_beginning_of_text(loaded: Loaded) -> None:
    tokenizer = loaded[1]
    assert encode_prompt(tokenizer, "<s>Hi") == encode_prompt(tokenizer, "Hi")


def test_a_quantized_cache_is_quantized_from_the_first_token(loaded: Loaded) -> None:
    model = loaded[0]
    cache = make_prompt_cache(model, GenerateOptions(kv_bits=8, kv_group_size=32))
    model(mx.array([[1, 2, 3]]), cache=cache)
    assert [type(c).__name__ for c in cache] == ["QuantizedKVCache"] * 2
    assert cache[0].keys[0].dtype == mx.uint32 and cache[0].bits == 8
    assert len(run(loaded, max_tokens=10, temp=0, kv_bits=8, kv_group_size=32)) == 10


def test_eight_bit_keys_and_values_change_little(loaded: Loaded) -> None:
    model, tokenizer = loaded
    ids = mx.array([tokenizer.encode(PROMPT * 3)])
    exact = model(ids, cache=model.make_cache())
    quantized = model(ids, cache=make_prompt_cache(model, GenerateOptions(kv_bits=8, kv_group_size=32)))
    difference = mx.abs(exact - quantized).max().item()
    assert 0 < difference < 0.1 * mx.abs(exact).max().item()


def test_a_rotating_cache_stays_within_its_size(loaded: Loaded) -> None:
    model = loaded[0]
    cache = make_prompt_cache(model, GenerateOptions(max_kv_size=16))
    for token in range(1, 40):
        model(mx.array([[token]]), cache=cache)
    assert cache[0].keys.shape[2] <= 16 and cache[0].offset == 39
    assert len(run(loaded, max_tokens=60, temp=0, max_kv_size=16)) == 60


def test_closing_the_stream_ends_it(loaded: Loaded) -> None:
    chunks = arcee_mlx.stream_generate(*loaded, PROMPT, GenerateOptions(max_tokens=50, temp=0))
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert list(chunks) == []


def test_generation_works_in_another_thread(loaded: Loaded) -> None:
    here = run(loaded, max_tokens=8, temp=0)
    there: list[GenerationChunk] = []
    thread = threading.Thread(target=lambda: there.extend(run(loaded, max_tokens=8, temp=0)))
    thread.start()
    thread.join()
    assert [c.token for c in there] == [c.token for c in here]


def test_repetition_penalty_equals_a_loop_by_hand(loaded: Loaded) -> None:
    model, tokenizer = loaded
    ids = tokenizer.encode(PROMPT)
    start = len(ids)
    for _ in range(12):
        logits = model.forward(mx.array([ids])).logits[0, -1]
        for token in set(ids):
            value = logits[token].item()
            logits[token] = value * 1.3 if value < 0 else value / 1.3
        ids.append(int(mx.argmax(logits)))
    chunks = run(loaded, max_tokens=12, temp=0, repetition_penalty=1.3)
    assert [c.token for c in chunks] == ids[start : start + len(chunks)]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rope_that_depends_on_length_leaks_from_no_request_into_the_next(tmp_path: Path, kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": "dynamic", "factor": 4.0}
    if kind == "longrope":
        rope = {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "factor": 4.0}
        rope["original_max_position_embeddings"] = 16
    write_checkpoint(tmp_path / "m", rope_parameters=rope, max_position_embeddings=256 if kind == "longrope" else 32)
    loaded = arcee_mlx.load(tmp_path / "m")
    short = [c.token for c in run(loaded, PROMPT, max_tokens=4, temp=0)]
    run(loaded, PROMPT * 6, max_tokens=4, temp=0)  # far beyond the first table
    assert [c.token for c in run(loaded, PROMPT, max_tokens=4, temp=0)] == short

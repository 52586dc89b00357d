"""PrefixCache: what is cached is what would be computed, and no more bytes are held than allowed."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import Engine, GenerateOptions
from arcee_mlx.engine.prefix_cache import PrefixCache, entry_bytes, kind_of
from arcee_mlx.generate.prefill import fill_cache, make_prompt_cache

from engine_script import NOISE, PATIENCE_S, Loaded, alone, endless, is_promised, run_on_owner, settle

FLOAT = GenerateOptions()
QUANTIZED = GenerateOptions(kv_bits=8, kv_group_size=32)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


def filled(loaded: Loaded, ids: list[int], options: GenerateOptions = FLOAT) -> list[Any]:
    cache = make_prompt_cache(loaded[0], options)
    fill_cache(loaded[0], cache, ids, 512)
    return cache


def fork(prefixes: PrefixCache, ids: list[int], options: GenerateOptions = FLOAT) -> int:
    """How many tokens of a prompt it has."""
    found = prefixes.fork(ids, kind_of(options))
    if found is None:
        return 0
    layers, kept = found
    assert all(layer.offset == kept for layer in layers)
    return kept


def test_the_entry_that_has_most_is_found_and_one_token_is_left(loaded: Loaded) -> None:
    prefixes = PrefixCache(10**9)
    prefixes.insert([1, 2, 3, 4], filled(loaded, [1, 2, 3, 4]))
    prefixes.insert([1, 2, 9], filled(loaded, [1, 2, 9]))
    assert fork(prefixes, [1, 2, 3, 4, 5]) == 4
    assert fork(prefixes, [1, 2, 3, 4]) == 3  # the exact repeat
    assert fork(prefixes, [1, 2, 9, 9]) == 3
    assert fork(prefixes, [1, 7]) == 1
    assert fork(prefixes, [1]) == fork(prefixes, [7, 1, 2, 3]) == fork(PrefixCache(10**9), [1, 2]) == 0


def test_what_another_entry_has_whole_is_not_kept_twice(loaded: Loaded) -> None:
    prefixes = PrefixCache(10**9)
    prefixes.insert([1, 2], filled(loaded, [1, 2]))
    prefixes.insert([1, 2, 3], filled(loaded, [1, 2, 3]))
    assert len(prefixes) == 1 and fork(prefixes, [1, 2, 3, 4]) == 3
    prefixes.insert([1, 2], filled(loaded, [1, 2]))
    prefixes.insert([1, 2, 3], filled(loaded, [1, 2, 3]))
    assert len(prefixes) == 1 and fork(prefixes, [1, 2, 3, 4]) == 3


def test_the_least_recently_used_goes_first(loaded: Loaded) -> None:
    entries = {i: filled(loaded, [i, i, i]) for i in range(1, 5)}
    each = sum(layer.nbytes for layer in entries[1])
    prefixes = PrefixCache(3 * each)
    for i in (1, 2, 3):
        prefixes.insert([i, i, i], entries[i])
    fork(prefixes, [1, 1, 1, 1])
    prefixes.insert([4, 4, 4], entries[4])
    assert [fork(prefixes, [i, i, i, i]) for i in (1, 2, 3, 4)] == [3, 0, 3, 3]
    prefixes.shrink(each)
    assert len(prefixes) == 1 and prefixes.held_bytes == each and fork(prefixes, [4, 4, 4, 4]) == 3
    prefixes.shrink(0)
    assert len(prefixes) == 0 == prefixes.held_bytes


def test_one_that_is_too_large_is_not_kept_and_costs_no_other(loaded: Loaded) -> None:
    small, large = filled(loaded, [1] * 10), filled(loaded, [2] * 250 + [3] * 250)
    prefixes = PrefixCache(sum(layer.nbytes for layer in small))
    prefixes.insert([1] * 10, small)
    prefixes.insert([2] * 250 + [3] * 250, large)
    assert len(prefixes) == 1 and fork(prefixes, [1] * 11) == 10
    none = PrefixCache(0)
    none.insert([1] * 10, small)
    assert len(none) == 0


def test_a_kind_of_cache_serves_requests_of_its_kind_only(loaded: Loaded) -> None:
    prefixes = PrefixCache(10**9)
    prefixes.insert([1, 2, 3], filled(loaded, [1, 2, 3]))
    assert fork(prefixes, [1, 2, 3, 4], QUANTIZED) == 0
    prefixes.insert([1, 2, 3], filled(loaded, [1, 2, 3], QUANTIZED))
    assert len(prefixes) == 2
    for options in (FLOAT, QUANTIZED):
        assert fork(prefixes, [1, 2, 3, 4], options) == 3
        assert fork(prefixes, [1, 2, 3, 4], replace(QUANTIZED, kv_bits=4)) == 0


@pytest.mark.parametrize("options", [FLOAT, QUANTIZED])
def test_a_fork_is_no_larger_than_what_it_has_and_writing_to_it_changes_nothing(
    loaded: Loaded, options: GenerateOptions
) -> None:
    ids = [1, 2, 3] * 100
    prefixes = PrefixCache(10**9)
    prefixes.insert(ids, filled(loaded, ids, options))
    mx.clear_cache()
    before = mx.get_active_memory()
    found = prefixes.fork([*ids[:5], 9, 9], kind_of(options))
    assert found and found[1] == 5
    fill_cache(loaded[0], found[0], [9], 1)
    assert (
        mx.get_active_memory() - before <= entry_bytes(prefixes._entries[0]) * 0.9
    )  # 300 tokens took two steps of 256
    again = prefixes.fork([*ids, 9], kind_of(options))
    assert again and again[1] == 300
    cold = filled(loaded, ids, options)
    for layer, other in zip(again[0], cold, strict=True):
        for one, two in zip(_arrays(layer), _arrays(other), strict=True):
            assert mx.array_equal(one[..., :300, :], two[..., :300, :]).item()


def _arrays(layer: Any) -> list[mx.array]:
    from mlx.utils import tree_flatten

    return [value for _, value in tree_flatten(layer.state) if isinstance(value, mx.array)]


def held(engine: Engine) -> tuple[int, int, int]:
    """(bytes it says it holds, bytes its entries have, bytes it may hold)."""
    prefixes = engine._owner.scheduler.prefixes
    return run_on_owner(
        engine, lambda: (prefixes.held_bytes, sum(map(entry_bytes, prefixes._entries)), prefixes.limit_bytes)
    )


@pytest.mark.parametrize(("seed", "limit"), list(enumerate([0, 300_000, 1_000_000, 3_000_000])))
def test_cached_equals_cold_whatever_came_before(checkpoint: Path, loaded: Loaded, seed: int, limit: int) -> None:
    """Random prompts that share beginnings, one by one and together."""
    draw = random.Random(seed)
    beginnings = [[draw.randrange(5, 400) for _ in range(draw.randrange(1, 90))] for _ in range(3)]
    apart = cached = 0
    with Engine.load(checkpoint, prefix_cache_bytes=limit, prefill_step_size=draw.choice([5, 512])) as engine:
        earlier: list[list[int]] = []
        for _ in range(8):
            work = []
            for _ in range(draw.choice([1, 1, 3])):
                prompt = draw.choice(beginnings)[: draw.randrange(1, 90)] + [
                    draw.randrange(5, 400) for _ in range(draw.randrange(0, 9))
                ]
                if earlier and draw.random() < 0.3:
                    prompt = draw.choice(earlier) + draw.choice([[], [7, 7]])
                memory = draw.choice([{}, {}, {"kv_bits": 8, "kv_group_size": 32}, {"max_kv_size": 64}])
                options = GenerateOptions(
                    max_tokens=6, temp=draw.choice([0, 1.0]), seed=draw.randrange(9), logprobs=True, **memory
                )
                work.append((prompt[:200], options))
            requests = [engine.submit(*each) for each in work]
            for (prompt, options), request in zip(work, requests, strict=True):
                answer, expected = request.result(PATIENCE_S), alone(loaded, prompt, options)
                cached += answer.stats.cached_tokens > 0
                assert answer.stats.cached_tokens < len(prompt)
                if is_promised(loaded, prompt, options, answer, expected):
                    assert answer.logprobs == pytest.approx(expected.logprobs, abs=NOISE)
                else:
                    apart += 1
                earlier.append((prompt + list(answer.tokens))[:200])
            says, has, most = held(engine)
            assert says == has <= most == limit
    print(f"\nlimit {limit}: {cached} answers out of the cache; {apart} part at a near tie")
    assert bool(cached) == bool(limit)


def test_the_exact_repeat_computes_one_token(checkpoint: Path) -> None:
    prompt = [9, 8, 7] * 30
    with Engine.load(checkpoint) as engine:
        first = engine.generate(prompt, endless(5))
        before = engine.stats().computed_prompt_tokens
        again = engine.generate(prompt, endless(5))
        assert again.tokens == first.tokens and again.stats.cached_tokens == len(prompt) - 1
        assert engine.stats().computed_prompt_tokens - before == 1


@pytest.mark.parametrize("memory", [{}, {"kv_bits": 8, "kv_group_size": 32}])
def test_a_shared_beginning_is_computed_once(checkpoint: Path, memory: dict[str, int]) -> None:
    system = [9, 8, 7] * 40
    with Engine.load(checkpoint) as engine:
        for i in range(6):
            engine.generate([*system, 10 + i, 20 + i], endless(4, **memory))
        stats = engine.stats()
        assert stats.prompt_tokens == 6 * (len(system) + 2)
        assert stats.computed_prompt_tokens == len(system) + 2 + 5 * 2


def test_an_answer_is_not_computed_again_when_a_prompt_goes_on_from_it(checkpoint: Path) -> None:
    with Engine.load(checkpoint) as engine:
        prompt = [9, 8, 7] * 10
        answer = engine.generate(prompt, endless(20))
        going_on = [*prompt, *answer.tokens, 5, 6]
        assert engine.generate(going_on, endless(3)).stats.cached_tokens == len(going_on) - 2


def test_a_request_that_waits_for_memory_costs_no_prefix_and_one_that_comes_in_no_more_than_it_needs(
    checkpoint: Path,
) -> None:
    with Engine.load(checkpoint) as engine:
        budget = engine._owner.budget
        size = budget.measure(engine._check([5] * 20, endless(200), None))
        tight = budget.predict([size]) + 2_000_000
    with Engine.load(checkpoint, memory_budget_bytes=tight, prefix_cache_bytes=1_900_000) as engine:
        for i in range(8):
            engine.generate([10 + i] * 5, endless(3))
        settle(engine)
        before = engine.stats().prefix_cache_bytes
        assert before > 0
        engine.generate([5] * 20, endless(200))
        settle(engine)
        stats = engine.stats()
        assert stats.prefix_cache_bytes > 0 and stats.predicted_bytes <= tight

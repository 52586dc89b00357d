"""Memory: what is predicted is never less than what is measured, nor so much more that nothing would be let in."""

from __future__ import annotations

import gc
import random
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from arcee_mlx import Engine, GenerateOptions, InputError, MemoryBudgetError, Request
from arcee_mlx.engine.memory import MemoryBudget, RequestSize, default_limit_bytes, make_budget
from arcee_mlx.engine.scheduler import Scheduler
from arcee_mlx.generate.request import Request as CheckedRequest

from conftest import tiny_config, write_checkpoint
from engine_script import PATIENCE_S, endless, run_on_owner, settle

# Predicted over measured, of what requests take beside the weights. Two where the model has few layers, of which two
# are counted twice; what is measured is the reference, so a mix must be large enough to be seen beside small change.
FACTOR = 2


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys and values of 8 kB a token, of which a long prompt has many times the weights."""
    folder = tmp_path_factory.mktemp("big") / "model"
    write_checkpoint(
        folder, hidden_size=64, intermediate_size=128, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=4,
        head_dim=32, max_position_embeddings=8192,
    )  # fmt: skip
    return folder


def prompt(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(5, 400) for _ in range(length)]


MIXES: dict[str, list[tuple[int, dict[str, Any]]]] = {
    "one long prompt": [(900, {})],
    "one long answer": [(300, {"max_tokens": 220})],
    "equal": [(400, {"max_tokens": 20 + i}) for i in range(4)],
    "one long, some short": [(700, {"max_tokens": 20}), *((60, {"max_tokens": 20 + 10 * i}) for i in range(3))],
    "quantized": [(300, {"kv_bits": 8, "kv_group_size": 32, "max_tokens": 10})],
    "rotating": [(700, {"max_kv_size": 256})],
    "all kinds": [(500, {}), (200, {"kv_bits": 4, "kv_group_size": 32, "max_tokens": 10}), (500, {"max_kv_size": 256}), (100, {})],
}  # fmt: skip


class Watch:
    """Compares, turn by turn, the peak with what was predicted when the turn began or after it let a request in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.over: list[tuple[int, int]] = []
        self.predicted = self.measured = 0
        turn, read = Scheduler.turn, Scheduler._read_prompt
        now = 0

        def predict(scheduler: Scheduler) -> int:
            sizes = [row.size for row in scheduler._rows()]
            return scheduler._budget.predict(sizes, scheduler.prefixes.held_bytes) - scheduler._budget.weights_bytes

        def watched_read(scheduler: Scheduler) -> None:
            nonlocal now
            now = max(now, predict(scheduler))
            read(scheduler)

        def watched_turn(scheduler: Scheduler) -> None:
            nonlocal now
            now = predict(scheduler)
            before = scheduler._budget.weights_bytes + self.base
            mx.synchronize()
            mx.reset_peak_memory()
            turn(scheduler)
            mx.synchronize()
            now = max(now, predict(scheduler))
            measured = mx.get_peak_memory() - before
            self.predicted, self.measured = max(self.predicted, now), max(self.measured, measured)
            if measured > now:
                self.over.append((measured, now))

        self.base = 0
        monkeypatch.setattr(Scheduler, "turn", watched_turn)
        monkeypatch.setattr(Scheduler, "_read_prompt", watched_read)


@pytest.mark.parametrize("prefix_cache_bytes", [0, None], ids=["no prefixes", "prefixes"])
@pytest.mark.parametrize("mix", MIXES)
def test_no_turn_takes_more_than_was_predicted_nor_much_less(
    big: Path, monkeypatch: pytest.MonkeyPatch, mix: str, prefix_cache_bytes: int | None
) -> None:
    gc.collect()
    mx.clear_cache()
    base = mx.get_active_memory()
    watch = Watch(monkeypatch)
    watch.base = base
    with Engine.load(big, prefix_cache_bytes=prefix_cache_bytes, memory_budget_bytes=10**9) as engine:
        for _ in range(1 if prefix_cache_bytes == 0 else 2):  # the second time out of the prefix cache
            work = [
                (prompt(length, i), endless(**{"max_tokens": 20, **options}))
                for i, (length, options) in enumerate(MIXES[mix])
            ]
            requests: list[Request] = run_on_owner(engine, lambda: [engine.submit(*each) for each in work])  # noqa: B023
            for request in requests:
                request.result(PATIENCE_S * 5)
        settle(engine)
        weights = engine._owner.budget.weights_bytes
        stats = engine.stats()
        settle(engine)
        left = mx.get_active_memory() - base - weights - stats.prefix_cache_bytes
    print(f"\n{mix}: {watch.measured / 1e6:.1f} MB beside the weights, {watch.predicted / 1e6:.1f} MB predicted, "
          f"{watch.predicted / watch.measured:.2f} times")  # fmt: skip
    assert not watch.over
    assert watch.predicted < FACTOR * watch.measured
    assert left < 200_000  # all that ended is gone


def test_a_small_budget_is_never_exceeded_and_lets_all_through(big: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    mx.clear_cache()
    base = mx.get_active_memory()
    watch = Watch(monkeypatch)
    watch.base = base
    with Engine.load(big) as engine:
        weights, limit = engine._owner.budget.weights_bytes, engine._owner.budget.predict
        size = engine._owner.budget.measure(engine._check(prompt(400, 0), endless(30), None))
        budget_bytes = limit([size, size]) + 2_000_000
    draw = random.Random(0)
    kinds: list[dict[str, Any]] = [{}, {}, {"kv_bits": 8, "kv_group_size": 32}, {"max_kv_size": 128}]
    with Engine.load(big, memory_budget_bytes=budget_bytes) as engine:
        work = [
            (prompt(draw.randrange(5, 300), draw.randrange(5)), endless(draw.randrange(1, 30), **draw.choice(kinds)))
            for _ in range(12)
        ]
        requests: list[Request] = run_on_owner(engine, lambda: [engine.submit(*each) for each in work])
        for request in requests:
            request.result(PATIENCE_S * 5)
        settle(engine)
        assert engine.stats().prefix_cache_bytes > 0
    print(f"\n{watch.measured / 1e6:.1f} MB beside the weights of a budget of {(budget_bytes - weights) / 1e6:.1f} MB")
    assert not watch.over and watch.measured <= budget_bytes - weights


def test_memory_is_back_when_all_have_ended(big: Path) -> None:
    gc.collect()
    base = mx.get_active_memory()
    with Engine.load(big, prefix_cache_bytes=10_000_000) as engine:
        weights = engine._owner.budget.weights_bytes
        for request in [engine.submit(prompt(300, i), endless(5)) for i in range(6)]:
            request.result(PATIENCE_S)
        settle(engine)
        held = engine.stats().prefix_cache_bytes
        assert 0 < held <= 10_000_000
        settle(engine)
        assert mx.get_active_memory() - base - weights - held < 200_000
        run_on_owner(engine, lambda: engine._owner.scheduler.prefixes.shrink(0))
        settle(engine)
        assert mx.get_active_memory() - base - weights < 200_000
        assert mx.get_cache_memory() < 200_000  # buffers of the past, which MLX would keep
    gc.collect()
    assert mx.get_active_memory() - base < 200_000


# The arithmetic.


@pytest.fixture
def budget() -> Iterator[MemoryBudget]:
    yield make_budget(tiny_config(), weights_bytes=500_000, itemsize=4, prefill_step_size=512, limit_bytes=10**7)


def checked(ids: int, limit: int, **options: Any) -> CheckedRequest:
    return CheckedRequest(
        [5] * ids, GenerateOptions(**{"kv_group_size": 32, **options}), frozenset(), limit, "max_tokens"
    )


def test_advice_that_a_refusal_gives_holds_and_a_little_more_does_not(budget: MemoryBudget) -> None:
    seen = set()
    request = checked(100, 150)
    for limit_bytes in range(600_000, budget.predict([budget.measure(request)]), 10_000):
        small = replace(budget, limit_bytes=limit_bytes)
        with pytest.raises(MemoryBudgetError) as caught:
            small.check_alone(request)
        message = str(caught.value)
        assert "at its full length of 250 tokens (weights 0.500 MB, keys and values" in message
        if found := re.search(r"lower max_tokens to (\d+)", message):
            seen.add("max_tokens")
            small.check_alone(checked(100, int(found[1])))
            with pytest.raises(MemoryBudgetError):
                small.check_alone(checked(100, int(found[1]) + 1))
        if found := re.search(r"shorten the prompt of 100 tokens to (\d+) with max_tokens 1", message):
            seen.add("prompt")
            small.check_alone(checked(int(found[1]), 1))
            with pytest.raises(MemoryBudgetError):
                small.check_alone(checked(int(found[1]) + 1, 1))
        if found := re.search(r"set kv_bits to (\d)", message):
            seen.add("kv_bits")
            small.check_alone(checked(100, 150, kv_bits=int(found[1])))
        found = re.search(r"raise memory_budget_bytes to (\d+)", message)
        assert found
        replace(budget, limit_bytes=int(found[1])).check_alone(request)
        with pytest.raises(MemoryBudgetError):
            replace(budget, limit_bytes=int(found[1]) - 1).check_alone(request)
    assert seen == {"max_tokens", "prompt", "kv_bits"}


def test_more_is_never_predicted_to_take_less(budget: MemoryBudget) -> None:
    def predict(*sizes: RequestSize) -> int:
        return budget.predict(sizes)

    one, two = budget.measure(checked(100, 50)), budget.measure(checked(101, 50))
    assert predict() < predict(one) < predict(two) < predict(one, two) <= predict(two, two)
    assert predict(budget.measure(checked(100, 50, kv_bits=4))) < predict(budget.measure(checked(100, 50, kv_bits=8)))
    assert predict(budget.measure(checked(2000, 500, max_kv_size=64))) == predict(
        budget.measure(checked(4000, 900, max_kv_size=64))
    )
    assert (
        budget.measure(checked(2000, 5, prefill_step_size=16)).prefill_bytes * 8
        < budget.measure(checked(2000, 5)).prefill_bytes
    )
    assert budget.predict([one], 12345) == predict(one) + 12345


def test_a_refusal_beside_others_gives_the_numbers(budget: MemoryBudget) -> None:
    size = budget.measure(checked(100, 150))
    small = replace(budget, limit_bytes=budget.predict([size, size]))
    small.check_beside(size, [size])
    with pytest.raises(
        MemoryBudgetError, match=r"the request and the 2 before it need .* MB at full length, .* without it"
    ) as caught:
        small.check_beside(size, [size, size])
    found = re.search(r"raise memory_budget_bytes to (\d+)", str(caught.value))
    assert found
    replace(budget, limit_bytes=int(found[1])).check_beside(size, [size, size])


@pytest.mark.parametrize("limit_bytes", [0, -5, 1.5, True, "1"])
def test_a_budget_is_a_number_of_bytes(limit_bytes: Any) -> None:
    with pytest.raises(InputError, match="memory_budget_bytes is"):
        make_budget(tiny_config(), weights_bytes=1, itemsize=4, prefill_step_size=1, limit_bytes=limit_bytes)


def test_the_budget_by_default_is_a_part_of_the_machine() -> None:
    assert 10**8 < default_limit_bytes() < 10**13

"""Requests that are in the engine together, one of them the victim of a fault, and how each ended."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import DEMO_MODEL, Engine, GenerateOptions
from arcee_mlx.engine import Request

PATIENCE_S = 60.0  # who waits longer has found a hang
SEED = 666  # by which a fault knows the request it is for
GREEDY = GenerateOptions(temp=0, max_tokens=8, logit_bias={3: -1e9}, prefill_step_size=8)
LONE = replace(GREEDY, kv_bits=8)
# Each its options, in the order they are sent; three are answered at once, so that `next` waits for a place.
NEIGHBOURS = {
    "beside": ("The old harbour was quiet that morning, and", replace(GREEDY, max_tokens=16)),
    "lone": ("Once upon a time there was a", replace(LONE, max_tokens=16)),
}
NEXT = {"next": ("In the beginning", GREEDY)}
VICTIM = "It was a dark and stormy night, and the captain of the ship looked out over the sea and said to the men that"


class Alone:
    """The tokens of the plain loop, computed once for each prompt and options."""

    def __init__(self) -> None:
        self._loaded = arcee_mlx.load(DEMO_MODEL)
        self._known: dict[str, tuple[int, ...]] = {}

    def __call__(self, prompt: Any, options: GenerateOptions) -> tuple[int, ...]:
        name = repr((prompt, options))
        if name not in self._known:
            self._known[name] = tuple(c.token for c in arcee_mlx.stream_generate(*self._loaded, prompt, options))
        return self._known[name]


@pytest.fixture(scope="module", name="engine")
def demo_engine() -> Iterator[Engine]:
    """For a module that imports it."""
    with Engine.load(DEMO_MODEL, max_batch_size=3) as engine:
        yield engine


@pytest.fixture(scope="module", name="alone")
def demo_alone() -> Alone:
    """For a module that imports it."""
    return Alone()


@dataclass
class Scene:
    """Requests that are in the engine together, and how each ended."""

    engine: Engine
    tokens: dict[str, list[int]] = field(default_factory=dict)
    errors: dict[str, BaseException] = field(default_factory=dict)

    def play(self, options: GenerateOptions, *, ungiven_tokens: int = 0, **victim: Any) -> None:
        """Sends all while the loop stands still, and reads them to their end.

        Args:
            ungiven_tokens: made, but not handed over.
        """
        before = self.engine.stats()
        gate = threading.Event()
        self.engine._owner._inbox.put(lambda: gate.wait(PATIENCE_S))
        requests = {name: self.engine.submit(*given) for name, given in NEIGHBOURS.items()}
        args = {"logits_processors": (), "deadline_s": None, "wait": True, "buffer_chunks": None, "on_end": None}
        requests["victim"] = self.engine._submit_one(
            encode_victim(self.engine), replace(options, seed=SEED), **(args | victim)
        )
        requests |= {name: self.engine.submit(*given) for name, given in NEXT.items()}
        gate.set()
        for name in ("beside", "lone", "next", "victim"):
            self._read(name, requests[name])
        in_batch = self.engine._owner.call(lambda: len(self.engine._owner.scheduler._batch))
        after = self.engine.stats()
        assert (in_batch, after.active, after.queued) == (0, 0, 0)
        assert after.failed - before.failed == len(self.errors)
        assert after.done - before.done == len(requests) - len(self.errors)
        given = sum(map(len, self.tokens.values()))
        assert after.generated_tokens - before.generated_tokens == given + ungiven_tokens

    def _read(self, name: str, request: Request) -> None:
        self.tokens[name] = []
        try:
            while (chunk := request.next_chunk()) is not None:
                self.tokens[name].append(chunk.token)
            assert request.result().tokens == tuple(self.tokens[name])
        except Exception as error:
            self.errors[name] = error
            with pytest.raises(type(error)):
                request.result(0)
            assert request.state == "failed"

    def check(self, alone: Callable[..., tuple[int, ...]], options: GenerateOptions, fails: Sequence[str]) -> None:
        """That these failed; that all others have the whole right answer; that the next have it, too."""
        assert sorted(self.errors) == sorted(fails), self.errors
        for name, (prompt, own) in (NEIGHBOURS | NEXT | {"victim": (encode_victim(self.engine), options)}).items():
            expected = alone(prompt, own)
            got = tuple(self.tokens[name])
            assert got == (expected[: len(got)] if name in fails else expected), name
            if name in ("beside", "victim"):
                assert self.engine.generate(prompt, own).tokens == expected, f"{name} after the fault"


def encode_victim(engine: Engine) -> list[int]:
    """Its prompt without the token that all others begin with, so that no prefix of theirs is one of its."""
    return engine.tokenizer.encode(VICTIM, add_special_tokens=False)


def make_singular() -> mx.array:
    """An array with nothing wrong until it is computed."""
    return mx.linalg.inv(mx.zeros((2, 2)), stream=mx.cpu).sum()

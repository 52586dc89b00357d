"""What the tests of the engine share: a gate that holds up its thread, a count of what it computes, the answer alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import Answer, ArceeForCausalLM, Engine, GenerateOptions, Tokenizer
from arcee_mlx.engine import batch, scheduler
from arcee_mlx.generate.answer import join_chunks
from arcee_mlx.generate.sampling import LogitsProcessor

Loaded = tuple[ArceeForCausalLM, Tokenizer]
PATIENCE_S = 60  # for what comes at once; a test that waits longer has found a hang
NOISE = 1e-4  # of logits in a batch against those of a single run, of which test_engine_batch measures a tenth


def endless(max_tokens: int = 100, **options: Any) -> GenerateOptions:
    """Greedy, without an end of text."""
    return GenerateOptions(max_tokens=max_tokens, temp=0, seed=0, logit_bias={1: -1e9, 3: -1e9}, **options)


GREEDY = GenerateOptions(max_tokens=8, temp=0, seed=0)
LONG = endless(200)


class Gate:
    """A logits processor that holds up the engine's thread, from a certain token on, until it is opened."""

    def __init__(self, *, tokens: int = 0) -> None:
        """Args:
        tokens: to let pass before.
        """
        self._tokens = tokens
        self._reached, self._opened = threading.Event(), threading.Event()

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        if self._tokens:
            self._tokens -= 1
            return logits
        self._reached.set()
        assert self._opened.wait(PATIENCE_S)
        return logits

    @property
    def is_reached(self) -> bool:
        """Whether the engine's thread stands at it, or did."""
        return self._reached.is_set()

    def wait(self) -> None:
        """Until the engine's thread stands at it."""
        assert self._reached.wait(PATIENCE_S)

    def open(self) -> None:
        """For good."""
        self._opened.set()


class Work:
    """What engines compute while a test lasts.

    Attributes:
        steps: decode steps, those of rows that decode alone included.
        chunks: tokens of every chunk of a prompt.
        at_step, at_chunk: called after each on the engine's thread.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        self.chunks: list[int] = []
        self.at_step = self.at_chunk = lambda: None
        step, step_alone, fill = batch.Batch.step, scheduler.Scheduler._step_alone, scheduler.fill_cache

        def count_step(self_: Any) -> Any:
            made = step(self_)
            self.steps += 1
            self.at_step()
            return made

        def count_alone(*args: Any) -> None:
            step_alone(*args)
            self.steps += 1
            self.at_step()

        def count_chunk(model: Any, cache: Any, ids: Any, *rest: Any) -> None:
            fill(model, cache, ids, *rest)
            self.chunks.append(len(ids))
            self.at_chunk()

        monkeypatch.setattr(batch.Batch, "step", count_step)
        monkeypatch.setattr(scheduler.Scheduler, "_step_alone", count_alone)
        monkeypatch.setattr(scheduler, "fill_cache", count_chunk)


def alone(loaded: Loaded, prompt: Any, options: GenerateOptions, processors: Sequence[LogitsProcessor] = ()) -> Answer:
    """What the engine is compared with: the plain loop, one row, nothing cached."""
    return join_chunks(list(arcee_mlx.stream_generate(*loaded, prompt, options, logits_processors=processors)))


def said(answer: Answer) -> tuple[Any, ...]:
    """What of an answer the engine promises to the letter."""
    return answer.text, answer.tokens, answer.stop_reason, answer.stats.seed


def is_near_tie(
    loaded: Loaded, prompt: Any, options: GenerateOptions, tokens: Sequence[int], expected: Sequence[int]
) -> bool:
    """Whether the two part where a change of two logits within the noise of both turns the token round."""
    place = next(i for i, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1])
    step = -1

    def nudge(_tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal step
        step += 1
        if step == place:
            logits[:, tokens[place]] += 2 * NOISE
            logits[:, expected[place]] -= 2 * NOISE
        return logits

    return alone(loaded, prompt, replace(options, max_tokens=place + 1), [nudge]).tokens[place] == tokens[place]


def is_promised(loaded: Loaded, prompt: Any, options: GenerateOptions, answer: Answer, single: Answer) -> bool:
    """Whether an answer is the single one, or fails the test unless it parts from it at a near tie."""
    if (answer.tokens, answer.text, answer.stop_reason) == (single.tokens, single.text, single.stop_reason):
        return True
    is_tie = is_near_tie(loaded, prompt, options, answer.tokens, single.tokens)
    assert is_tie, f"{prompt!r}: {answer.text!r} for {single.text!r}"
    return False


def run_on_owner(engine: Engine, function: Callable[[], Any]) -> Any:
    """What a function gives on the engine's thread, between two turns."""
    return engine._owner.call(function)


def settle(engine: Engine) -> None:
    """Returns when the engine has done what it was asked before: after one whole turn, ends of requests included."""
    for _ in range(2):
        run_on_owner(engine, lambda: None)

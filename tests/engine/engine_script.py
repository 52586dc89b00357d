"""What the tests of the engine share: a door that holds up its thread, a count of what it computes, the answer alone."""

from __future__ import annotations

import threading
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import Answer, ArceeForCausalLM, Engine, GenerateOptions, Tokenizer
from arcee_mlx.engine import batch, scheduler
from arcee_mlx.generate.answer import join_chunks

Loaded = tuple[ArceeForCausalLM, Tokenizer]
GREEDY = GenerateOptions(max_tokens=8, temp=0, seed=0)
LONG = GenerateOptions(
    max_tokens=200, temp=0, seed=0, logit_bias={1: -100, 3: -100}
)  # of which no end of text is the end
PATIENCE_S = 60


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


def alone(loaded: Loaded, prompt: Any, options: GenerateOptions) -> Answer:
    """The answer without an engine."""
    return join_chunks(list(arcee_mlx.stream_generate(*loaded, prompt, options)))


def said(answer: Answer) -> tuple[Any, ...]:
    """What of an answer the engine promises to the letter."""
    return answer.text, answer.tokens, answer.stop_reason, answer.stats.seed


def settle(engine: Engine) -> None:
    """Returns when the engine has done what it was asked before, ends of requests included."""
    engine._owner.call(lambda: None)

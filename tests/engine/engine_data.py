"""What the engine's tests share: answers made one by one to compare with, and a hand on what the owner thread does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx

import arcee_mlx
from arcee_mlx import Answer, ArceeForCausalLM, Engine, GenerateOptions, Tokenizer
from arcee_mlx.generate.answer import join_chunks
from arcee_mlx.generate.sampling import LogitsProcessor

Loaded = tuple[ArceeForCausalLM, Tokenizer]
PATIENCE_S = 60  # for what comes at once; a test that waits longer has found a hang
NOISE = 1e-4  # of logits in a batch; test_engine_batching measures a tenth of it

PROMPTS: list[Any] = [
    "Call me Ishmael.",
    "Some years ago, never mind how long precisely, having little or no money",
    "a",
    [7],
    "I would sail about a little and see the watery part of the world. " * 3,
    [{"role": "user", "content": "日本語 🙂"}],
    "Grüße",
    "naïve café",
]
GREEDY = GenerateOptions(max_tokens=16, temp=0)
SAMPLED = GenerateOptions(
    max_tokens=16, temp=1.0, top_k=50, repetition_penalty=1.2, frequency_penalty=0.3, xtc_probability=0.3, seed=11
)
OPTIONS: dict[str, GenerateOptions] = {
    "greedy": GREEDY,
    "sampled": SAMPLED,
    "penalties": replace(GREEDY, repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.2),
    "logit_bias": replace(GREEDY, logit_bias={77: 3.0, 5: -100.0}),
    "stop": replace(GREEDY, max_tokens=40, stop=("e", "the")),
    "logprobs": replace(SAMPLED, logprobs=True, top_logprobs=3),
    "kv_bits": replace(SAMPLED, kv_bits=8, kv_group_size=32),
    "max_kv_size": replace(SAMPLED, max_kv_size=24, logprobs=True),
    "small_chunks": replace(SAMPLED, prefill_step_size=3),
}


def endless(max_tokens: int = 100, **options: Any) -> GenerateOptions:
    """Greedy, without an end of text."""
    return GenerateOptions(max_tokens=max_tokens, temp=0, logit_bias={1: -1e9, 3: -1e9}, **options)


def alone(loaded: Loaded, prompt: Any, options: GenerateOptions, processors: Sequence[LogitsProcessor] = ()) -> Answer:
    """What the engine is compared with: the plain loop, one row, nothing cached."""
    return join_chunks(list(arcee_mlx.stream_generate(*loaded, prompt, options, logits_processors=processors)))


def is_near_tie(loaded: Loaded, prompt: Any, options: GenerateOptions, answer: Answer, single: Answer) -> bool:
    """Whether the two part at a step where a change of the logits within twice the noise turns the token round."""
    place = next(i for i, pair in enumerate(zip(answer.tokens, single.tokens, strict=False)) if pair[0] != pair[1])
    step = -1

    def nudge(_tokens: mx.array, logits: mx.array) -> mx.array:
        nonlocal step
        step += 1
        if step == place:
            logits[:, answer.tokens[place]] += 2 * NOISE
            logits[:, single.tokens[place]] -= 2 * NOISE
        return logits

    nudged = alone(loaded, prompt, replace(options, max_tokens=place + 1), [nudge])
    return nudged.tokens[place] == answer.tokens[place]


def is_promised(loaded: Loaded, prompt: Any, options: GenerateOptions, answer: Answer, single: Answer) -> bool:
    """Whether an answer is the single one, or fails the test unless it parts from it at a near tie."""
    if (answer.tokens, answer.text, answer.stop_reason) == (single.tokens, single.text, single.stop_reason):
        return True
    assert is_near_tie(loaded, prompt, options, answer, single), f"{prompt!r}: {answer.text!r} for {single.text!r}"
    return False


@dataclass
class Gate:
    """A logits processor that stops the owner thread in a step until it is let go on.

    Attributes:
        at: the step it stops in, counted from 0.
        steps: it was called for.
        entered: set when it stands.
    """

    at: int = 0
    steps: int = 0
    entered: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)

    def __call__(self, _tokens: mx.array, logits: mx.array) -> mx.array:
        self.steps += 1
        if self.steps == self.at + 1:
            self.entered.set()
            assert self.opened.wait(PATIENCE_S)
        return logits

    def wait(self) -> None:
        """Until the owner thread stands in it."""
        assert self.entered.wait(PATIENCE_S)

    def open(self) -> None:
        self.opened.set()


def run_on_owner(engine: Engine, function: Callable[[], Any] = lambda: None) -> Any:
    """Between two turns; without a function, it waits until all sent before was seen."""
    return engine._owner.call(function)


def settle(engine: Engine) -> None:
    """Waits for one whole turn."""
    run_on_owner(engine)
    run_on_owner(engine)


def run_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What `work(i)` gives in `count` threads at once."""
    results: list[Any] = [None] * count

    def run(i: int) -> None:
        try:
            results[i] = work(i)
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S * 4)
        assert not thread.is_alive(), "a thread hangs"
    return results

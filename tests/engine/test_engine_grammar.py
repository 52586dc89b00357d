"""Eight requests of a batch, each of another form or free: all get what they get alone, and what they asked for."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, Literal

import jsonschema
import pydantic
import pytest

import arcee_mlx
from arcee_mlx import DEMO_MODEL, Answer, Engine, GenerateOptions, generate_batch

from engine_script import Gate, Loaded, alone


class Person(pydantic.BaseModel):
    initial: str = pydantic.Field(max_length=1)
    age: int = pydantic.Field(ge=18, le=99)


@dataclasses.dataclass
class Ship:
    kind: Literal["sloop", "brig", "man-of-war"]
    masts: Literal[1, 2, 3]
    is_lost: bool


SCHEMA = {
    "type": "array",
    "items": {"enum": ["red", None, 1, "a longer one, with a comma"]},
    "minItems": 4,
    "maxItems": 6,
}
GREEDY = GenerateOptions(temp=0, max_tokens=40, logprobs=True)
SAMPLED = dataclasses.replace(GREEDY, temp=1.0)
ASKED: list[tuple[Any, GenerateOptions]] = [
    ("Colors: ", dataclasses.replace(GREEDY, schema=SCHEMA)),
    ("Some years ago, never mind how long, I was ", dataclasses.replace(SAMPLED, schema=Person, repetition_penalty=1.2)),
    ("The sea is", dataclasses.replace(SAMPLED, frequency_penalty=0.5, presence_penalty=0.2, xtc_probability=0.3)),
    ([{"role": "user", "content": "What ship?"}], dataclasses.replace(SAMPLED, schema=Ship, top_k=20)),
    ("Call me", dataclasses.replace(SAMPLED, regex=r"\d{3}-[a-z]{1,8}( [A-Z]\w*)+\.", temp=0.7)),
    ("Was it so? ", dataclasses.replace(GREEDY, choices=("yes", "no", "yes, sir", "no, sir"))),
    ("He sailed ", dataclasses.replace(SAMPLED, grammar='start: "for " N " years"\nN: /[1-9][0-9]{0,2}/', min_p=0.01)),
    ("Once upon a time", GREEDY),
]  # fmt: skip
PROMPTS = [prompt for prompt, _ in ASKED]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return arcee_mlx.load(DEMO_MODEL)


def answer_in_engine(engine: Engine, each: list[GenerateOptions]) -> list[Answer]:
    """All of them wait when the first, which is free, is at its first token."""
    gate = Gate()
    first = engine.submit(PROMPTS[-1], each[-1], logits_processors=[gate])
    gate.wait()
    others = [engine.submit(*both) for both in zip(PROMPTS[:-1], each[:-1], strict=True)]
    gate.open()
    return [*(request.result() for request in others), first.result()]


def meets(options: GenerateOptions, answer: Answer) -> bool:
    """By other means than llguidance."""
    if options.schema is SCHEMA:
        jsonschema.validate(json.loads(answer.text), SCHEMA)
    if options.schema is not None:
        return answer.parsed is not None  # pydantic validates
    if options.choices:
        return answer.text in options.choices
    return re.fullmatch(options.regex or "for [1-9][0-9]{0,2} years", answer.text) is not None


@pytest.mark.parametrize("seed", range(2))
def test_eight_of_several_forms_and_free_are_as_one_by_one_unless_two_tokens_are_closer_than_the_noise(
    loaded: Loaded, seed: int
) -> None:
    each = [dataclasses.replace(options, seed=seed) for _, options in ASKED]
    expected = [alone(loaded, *both) for both in zip(PROMPTS, each, strict=True)]
    with Engine.load(DEMO_MODEL) as engine:
        in_engine = answer_in_engine(engine, each)
        stats = engine.stats()
    assert stats.generated_tokens > 2 * stats.decode_steps  # they did share steps
    for answers in (generate_batch(*loaded, PROMPTS, each), in_engine):
        noise, apart = 0.0, []
        for options, answer, single in zip(each, answers, expected, strict=True):
            pairs = enumerate(zip(answer.tokens, single.tokens, strict=False))
            same = next((place for place, (token, other) in pairs if token != other), len(single.tokens))
            scores = zip(answer.logprobs[:same], single.logprobs[:same], strict=True)
            noise = max(noise, *(abs(one - other) for one, other in scores), 0.0)
            if answer.tokens == single.tokens:
                assert (answer.text, answer.is_complete) == (single.text, single.is_complete)
            else:
                assert options.temp == 0
                apart.append(abs(answer.logprobs[same] - single.logprobs[same]))
            assert (answer.is_complete is None) == (not options.has_grammar)
            assert not answer.is_complete or meets(options, answer)
        print(f"\nnoise {noise:.2g} of log-probabilities; {len(apart)} of {len(answers)} answers differ, by {apart}")
        assert noise < 1e-4 and all(gap <= 2 * noise for gap in apart)
    assert sum(answer.is_complete is True for answer in expected) >= 5

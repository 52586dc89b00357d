"""An answer of a given form is that form or says that it is not whole, wherever and however it is made."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from enum import Enum
from typing import Any, Literal, NotRequired, TypedDict

import jsonschema
import mlx.core as mx
import pydantic
import pytest

from arcee_mlx import (
    DEMO_MODEL,
    ArceeForCausalLM,
    Engine,
    GenerateOptions,
    GrammarError,
    IncompleteAnswerError,
    InputError,
    Tokenizer,
    beam_search,
    cache_prompt,
    generate,
    generate_answers,
    generate_batch,
    load,
    stream_generate,
)
from arcee_mlx.cli import main
from arcee_mlx.generate.grammar import GrammarProcessor, compile_grammar

from conftest import write_checkpoint

PROMPT = "My fellow citizens, "


class Color(Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Flag:
    color: Color
    stars: Literal[0, 13, 50]
    parts: tuple[bool, bool]
    next: Flag | None = None


class Place(TypedDict):
    code: Literal["a", "b"]
    flag: NotRequired[Flag]


class Person(pydantic.BaseModel):
    initial: str = pydantic.Field(max_length=1)
    age: int = pydantic.Field(ge=18, le=99)


FORMS: list[dict[str, Any]] = [
    {"schema": Person},
    {"schema": Flag},
    {"schema": Place},
    {"schema": list[bool] | None},
    {
        "schema": {
            "type": "object",
            "properties": {"n": {"enum": [1, None, "x"]}},
            "required": ["n"],
            "additionalProperties": False,
        }
    },
    {"schema": {"type": "string", "format": "date"}},
    {"regex": r"\d{3}-[a-z]{1,4}"},
    {"choices": ("yes", "no", 'may"be\n', "yes, sir")},
    {"grammar": 'start: "for " NUMBER " years"\nNUMBER: /[1-9][0-9]{0,2}/'},
]
SAMPLED = {"temp": 1.0, "max_tokens": 60}


@pytest.fixture(scope="module")
def demo() -> tuple[ArceeForCausalLM, Tokenizer]:
    return load(DEMO_MODEL)


def meets(options: GenerateOptions, text: str) -> bool:
    """By other means than llguidance, where there are any."""
    if isinstance(options.schema, dict):
        jsonschema.validate(json.loads(text), options.schema, format_checker=jsonschema.FormatChecker())
    if options.regex is not None:
        return re.fullmatch(options.regex, text) is not None
    if options.choices:
        return text in options.choices
    if options.grammar is not None:
        return re.fullmatch("for [1-9][0-9]{0,2} years", text) is not None
    return True


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_complete_answer_has_its_form_at_every_seed(demo: Any, form: dict[str, Any]) -> None:
    complete = 0
    for seed in range(4):
        options = GenerateOptions(**{**SAMPLED, **form}, seed=seed)
        answer = generate_answers(*demo, PROMPT, options, n=1)[0]
        assert answer.is_complete is not None
        if answer.is_complete:
            complete += 1
            assert meets(options, answer.text)
            assert options.schema is None or answer.parsed is not None or answer.text == "null"
        else:
            assert answer.stop_reason == "max_tokens"
    assert complete


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_batch_engine_and_drafts_give_what_the_single_answer_gives(demo: Any, form: dict[str, Any]) -> None:
    options = [GenerateOptions(**{**SAMPLED, **form}, seed=seed, repetition_penalty=1.1) for seed in range(3)]
    free = GenerateOptions(temp=1.0, seed=5, max_tokens=20)
    alone = [list(stream_generate(*demo, PROMPT, one)) for one in [*options, free]]
    texts = ["".join(chunk.text for chunk in chunks) for chunks in alone]
    assert [answer.text for answer in generate_batch(*demo, [PROMPT] * 4, [*options, free])] == texts
    drafted = [
        list(stream_generate(*demo, PROMPT, dataclasses.replace(one, num_draft_tokens=7))) for one in [*options, free]
    ]
    assert ["".join(chunk.text for chunk in chunks) for chunks in drafted] == texts
    with Engine.load(DEMO_MODEL) as engine:
        answers = [request.result() for request in [engine.submit(PROMPT, one) for one in [*options, free]]]
    assert [answer.text for answer in answers] == texts
    assert [answer.is_complete for answer in answers] == [chunks[-1].is_complete for chunks in alone]
    assert answers[-1].is_complete is None


def test_a_draft_model_follows_the_grammar_and_leaves_the_answer(demo: Any) -> None:
    options = GenerateOptions(schema=Flag, temp=1.0, seed=3, max_tokens=60)
    plain = list(stream_generate(*demo, PROMPT, options))
    drafts = dataclasses.replace(options, num_draft_tokens=4)
    drafted = list(stream_generate(*demo, PROMPT, drafts, draft_model=demo[0]))
    assert [chunk.token for chunk in drafted] == [chunk.token for chunk in plain]
    assert drafted[-1].stats.accepted_tokens > 0


@pytest.mark.parametrize("num_draft_tokens", [0, 7])
def test_what_the_grammar_determines_is_drafted(demo: Any, num_draft_tokens: int) -> None:
    options = GenerateOptions(regex="(America ){20}", temp=1.0, seed=1, num_draft_tokens=num_draft_tokens)
    chunks = list(stream_generate(*demo, PROMPT, options))
    stats = chunks[-1].stats
    assert stats.acceptance_rate is not None and stats.acceptance_rate > 0.5
    assert stats.tokens_per_step > 4
    plain = generate_batch(*demo, [PROMPT], dataclasses.replace(options, num_draft_tokens=0))[0]
    assert plain.stats.drafted_tokens == 0 and plain.tokens == tuple(chunk.token for chunk in chunks)


def test_nothing_is_drafted_where_it_could_not_be_taken_back(demo: Any) -> None:
    options = GenerateOptions(regex="(America ){20}", max_kv_size=16)
    cache = cache_prompt(*demo, PROMPT, options)
    for given in (None, cache):
        last = list(stream_generate(*demo, PROMPT, options, prompt_cache=given))[-1]
        assert last.is_complete and last.stats.drafted_tokens == 0


def test_a_cut_off_answer_is_reported_with_what_was_made(demo: Any, capsys: Any, tmp_path: Any) -> None:
    options = GenerateOptions(schema=Flag, max_tokens=3)
    with pytest.raises(IncompleteAnswerError) as raised:
        generate(*demo, PROMPT, options)
    answer = generate_answers(*demo, PROMPT, options, n=1)[0]
    assert raised.value.text == answer.text and answer.text.startswith("{") and answer.is_complete is False
    with pytest.raises(IncompleteAnswerError):
        _ = answer.parsed
    file = tmp_path / "schema.json"
    file.write_text('{"type": "array", "items": {"type": "integer"}, "minItems": 99}')
    assert main(["generate", "--quiet", "--schema", str(file), "--max-tokens", "5", "-p", PROMPT]) == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("[") and "incomplete" in printed.err


def test_an_answer_that_may_end_or_go_on_is_complete_where_it_was_cut(demo: Any) -> None:
    answer = generate_answers(*demo, PROMPT, GenerateOptions(regex="[a-z ]+", max_tokens=5), n=1)[0]
    assert answer.is_complete and answer.stop_reason == "max_tokens"


def test_a_stop_string_inside_the_form_leaves_it_incomplete(demo: Any) -> None:
    answer = generate_answers(*demo, PROMPT, GenerateOptions(choices=("abcd",), stop=("bc",)), n=1)[0]
    assert (answer.text, answer.is_complete, answer.stop_reason) == ("a", False, "stop_string")


def test_a_cancelled_answer_of_an_engine_is_incomplete() -> None:
    options = GenerateOptions(regex="[a-z ]{4000}x", max_tokens=-1)
    with Engine.load(DEMO_MODEL) as engine:
        stream = engine.stream(PROMPT, options)
        next(stream)
        stream.request.cancel()
        assert stream.request.result().is_complete is False


def test_further_ends_of_text_end_an_answer_where_it_is_whole_only(demo: Any) -> None:
    bias = {demo[1].token_id("a"): 50.0}
    options = GenerateOptions(regex="[ab]{5}", extra_eos_tokens=("a",), logit_bias=bias)
    assert re.fullmatch("[ab]{5}", generate(*demo, PROMPT, options))
    options = GenerateOptions(regex="a{5000}", extra_eos_tokens=("a",), logit_bias=bias)
    with pytest.raises(IncompleteAnswerError):  # it cannot be written without one
        generate(*demo, PROMPT, options)


@pytest.mark.parametrize("favoured", [5, 400, 450, 511])
def test_tokens_the_tokenizer_lacks_and_a_callers_processor_cannot_leave_the_form(tmp_path: Any, favoured: int) -> None:
    write_checkpoint(tmp_path / "padded", vocab_size=512)  # the tokenizer has 400
    padded = load(tmp_path / "padded")

    def favour(_tokens: Any, logits: Any) -> Any:
        return logits.at[:, favoured].add(1e6)

    options = GenerateOptions(choices=("ab", "cd"), temp=0)
    assert generate(*padded, "I", options, logits_processors=[favour]) in ("ab", "cd")
    free = GenerateOptions(temp=0, max_tokens=3)
    answers = generate_batch(*padded, ["I"] * 3, [options, free, options], logits_processors=[favour])
    assert answers[0].text in ("ab", "cd") and answers[2].text == answers[0].text
    assert all(token < 400 for answer in answers for token in answer.tokens)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"schema": {"properties": {"a": {"not": {}}}}}, ["'not'", "$.properties.a"]),
        ({"schema": {"type": "array", "items": {"uniqueItems": True}}}, ["'uniqueItems'", "$.items"]),
        ({"schema": {"maximum": 1e30}}, ["'maximum'"]),
        ({"schema": {"$ref": "http://example.org/a"}}, ["'$ref'"]),
        ({"schema": {"type": "string", "pattern": "(?=a)"}}, ["'pattern'"]),
        ({"schema": {"items": [{}], "additionalItems": False}}, ["'additionalItems'"]),
        ({"schema": {"minimum": 1, "exclusiveMinimum": True}}, ["'exclusiveMinimum'"]),
        ({"schema": {"x-guidance": {"lenient": True}, "not": {}}}, ["'not'"]),
        ({"schema": {"type": "string", "format": "colour"}}, ["'format'", "colour"]),
        ({"schema": {"type": "string", "format": []}}, ["'format'"]),
        ({"schema": {"type": "string", "allOf": {"a": 1}}}, ["'allOf'"]),
        ({"schema": {"properties": [1]}}, ["'properties'"]),
        ({"schema": False}, ["False"]),
        ({"schema": {"const": {1}}}, ["JSON"]),
        ({"schema": set[int]}, ["set[int]"]),
        ({"regex": "a(?=b)"}, ["regex", "look-ahead"]),
        ({"regex": "a++"}, ["possessive"]),
        ({"regex": "("}, ["regex"]),
        ({"regex": "(?x: a)"}, ["verbose"]),
        ({"grammar": "begin: /a/"}, ["grammar", "start"]),
        ({"grammar": 'start: %json {"x-guidance": {"lenient": true}, "not": {}}'}, ["grammar", "not"]),
    ],
    ids=str,
)
def test_what_cannot_be_enforced_is_refused_by_name(demo: Any, options: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(GrammarError) as raised:
        generate(*demo, PROMPT, GenerateOptions(**options))
    assert all(name in str(raised.value) for name in names), str(raised.value)


@pytest.mark.parametrize(
    "options", [{"schema": 3}, {"schema": "{}"}, {"regex": 1}, {"choices": "yes"}, {"choices": ("",)}]
)
def test_options_of_the_wrong_kind_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        GenerateOptions(**options)


def test_two_forms_at_once_and_beams_are_refused(demo: Any) -> None:
    with pytest.raises(InputError, match="regex and choices"):
        GenerateOptions(regex="a", choices=("a",))
    with pytest.raises(InputError, match="beam search"):
        beam_search(*demo, PROMPT, GenerateOptions(regex="a"), num_beams=2)


def test_a_schema_says_what_its_checks_refuse(demo: Any) -> None:
    class Odd(pydantic.BaseModel):
        n: Literal[2, 4]

        @pydantic.field_validator("n")
        @classmethod
        def refuse(cls, n: int) -> int:
            raise ValueError("even")

    answer = generate_answers(*demo, PROMPT, GenerateOptions(schema=Odd), n=1)[0]
    with pytest.raises(pydantic.ValidationError):
        _ = answer.parsed


def test_choices_of_any_text_are_taken_and_nothing_else(demo: Any) -> None:
    drawn = random.Random(1)
    alphabet = "ab.*+?[](){}|\\^$&~-#/'\"\n\t é日🙂"
    for _ in range(100):
        texts = tuple({"".join(drawn.choices(alphabet, k=drawn.randint(1, 5))) for _ in range(3)})
        grammar = compile_grammar(demo[1], GenerateOptions(choices=texts))
        assert grammar is not None
        assert all(grammar.is_complete(text) for text in texts)
        for text in texts:
            other = text[:-1] + drawn.choice(alphabet)
            assert grammar.is_complete(other) == (other in texts)


def test_a_session_keeps_its_schema_and_says_where_a_type_cannot_be_saved(tmp_path: Any) -> None:
    with Engine.load(DEMO_MODEL) as engine:
        session = engine.session(options=GenerateOptions(schema={"type": "boolean"}))
        assert "".join(chunk.text for chunk in session.send("Is it?")) in ("true", "false")
        session.save(tmp_path / "dict.safetensors")
        assert engine.load_session(tmp_path / "dict.safetensors").options == session.options
        typed = engine.session(options=GenerateOptions(schema=Flag))
        with pytest.raises(InputError, match="schema as a dict"):
            typed.save(tmp_path / "type.safetensors")
        assert not (tmp_path / "type.safetensors").exists()


def test_a_processor_that_goes_on_and_back_masks_as_one_that_was_told_all_at_once(demo: Any) -> None:
    options = GenerateOptions(regex="(to|two|too|[0-9]{2,3})( (be|bee|7))+")
    grammar, eos = compile_grammar(demo[1], options), demo[1].eos_token_ids
    assert grammar is not None
    drawn, prompt, vocab_size = random.Random(2), [5, 6], demo[0].config.vocab_size
    zeros = mx.zeros((1, vocab_size))

    def mask_afresh(ids: list[int]) -> list[float]:
        return GrammarProcessor(grammar, eos, prompt_tokens=2)(mx.array(prompt + ids), zeros)[0].tolist()

    processor, ids, backs = GrammarProcessor(grammar, eos, prompt_tokens=2), [], 0
    for _ in range(150):
        mask = processor(mx.array(prompt + ids), zeros)[0].tolist()
        assert mask == mask_afresh(ids)
        allowed = [token for token, score in enumerate(mask) if score == 0 and token not in eos]
        ids = [*ids, drawn.choice(allowed)]
        if drawn.random() < 0.2:  # others than were consumed take their place, often fewer, at times more
            ids = ids[: drawn.randint(0, len(ids) - 1)]
            for _ in range(drawn.randint(0, 4)):
                allowed = [i for i, score in enumerate(mask_afresh(ids)) if score == 0 and i not in eos]
                ids = [*ids, drawn.choice(allowed)]
            processor.move_to(ids)
            backs += 1
    assert backs > 10


def test_a_schema_cannot_allow_itself_white_space(demo: Any) -> None:
    schema = {"x-guidance": {"whitespace_flexible": True}, "type": "array", "items": {"type": "boolean"}}
    grammar = compile_grammar(demo[1], GenerateOptions(schema=schema))
    assert grammar is not None
    assert grammar.is_complete("[true,false]") and not grammar.is_complete("[true, \n false]")

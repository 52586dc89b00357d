"""Calls of tools: told as the template writes them, enforced as asked, read back whole, and kept as text where they are none."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jsonschema
import mlx.core as mx
import pytest

from arcee_mlx import (
    DEMO_MODEL,
    Answer,
    ArceeForCausalLM,
    Engine,
    GenerateOptions,
    GrammarError,
    InputError,
    Tokenizer,
    TokenizerError,
    ToolCall,
    beam_search,
    generate_answers,
    generate_batch,
    get_json_schema,
    load,
    load_tokenizer,
    stream_generate,
)
from arcee_mlx.generate.grammar import Grammar, compile_grammar
from arcee_mlx.generate.request import encode_prompt
from arcee_mlx.generate.tools import cut_tool_calls, find_tool_format

from conftest import write_checkpoint

ASKED = [{"role": "user", "content": "How deep is the Pacific?"}]


def measure(sea: Literal["Atlantic", "Pacific"], deepest: bool = False, unit: Literal["m", "ft"] | None = None) -> str:
    """Measures a sea.

    Args:
        sea: Which.
        deepest: At its deepest place.
        unit: Of the answer.
    """
    raise AssertionError("nothing here runs a tool")


def tell_time(zone: Literal["Ä", "UTC"]) -> str:
    """Tells the time.

    Args:
        zone: Where.
    """
    raise AssertionError("nothing here runs a tool")


TOOLS = [measure, tell_time]
CALL = '<tool_call>\n{"name": "tell_time", "arguments": {"zone": "Ä"}}\n</tool_call>'
PARAMETERS: dict[str, Any] = {
    "measure": {
        "type": "object",
        "properties": {
            "sea": {"enum": ["Atlantic", "Pacific"]},
            "deepest": {"type": "boolean"},
            "unit": {"enum": ["m", "ft", None]},
        },
        "required": ["sea"],
        "additionalProperties": False,
    },
    "tell_time": {
        "type": "object",
        "properties": {"zone": {"enum": ["Ä", "UTC"]}},
        "required": ["zone"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def demo() -> tuple[ArceeForCausalLM, Tokenizer]:
    return load(DEMO_MODEL)


def ask(demo: tuple[ArceeForCausalLM, Tokenizer], seed: int = 0, **options: Any) -> Answer:
    asked = GenerateOptions(**({"tools": TOOLS, "temp": 1.0, "max_tokens": 150, "seed": seed} | options))
    return generate_answers(*demo, ASKED, asked, n=1)[0]


def tool_grammar(tokenizer: Tokenizer, **options: Any) -> Grammar | None:
    asked = GenerateOptions(**({"tools": TOOLS} | options))
    return compile_grammar(tokenizer, asked, find_tool_format(tokenizer, asked.tools))


def check_calls(calls: tuple[ToolCall, ...]) -> None:
    for call in calls:
        jsonschema.validate(dict(call.arguments), PARAMETERS[call.name])


def test_a_function_and_its_schema_in_either_form_are_the_same_tool() -> None:
    whole = get_json_schema(tell_time)
    for tool in (tell_time, whole, whole["function"]):
        assert GenerateOptions(tools=[tool]).tools == (whole,)


@pytest.mark.parametrize("seed", range(6))
def test_required_calls_are_whole_valid_and_as_the_template_writes_them(demo, seed: int) -> None:
    answer = ask(demo, seed, tool_choice="required")
    assert answer.tool_calls and answer.is_complete and answer.stop_reason == "tool_call" and answer.content == ""
    check_calls(answer.tool_calls)
    functions = [
        {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
        for call in answer.tool_calls
    ]
    said = [*ASKED, {"role": "assistant", "content": "", "tool_calls": functions}]
    written = demo[1].apply_chat_template(said, tools=TOOLS)
    begun = demo[1].decode(encode_prompt(demo[1], ASKED, GenerateOptions(tools=TOOLS)))
    assert written == f"{begun}{answer.text}<|im_end|>\n"


@pytest.mark.parametrize("seed", range(4))
def test_a_tool_by_name_is_called_once(demo, seed: int) -> None:
    answer = ask(demo, seed, tool_choice="tell_time")
    assert [call.name for call in answer.tool_calls] == ["tell_time"] and answer.is_complete
    check_calls(answer.tool_calls)


def test_which_texts_are_answers_is_what_was_asked_for(demo) -> None:
    measured = '<tool_call>\n{"name": "measure", "arguments": {"sea": "Pacific", "unit": null}}\n</tool_call>'
    unknown = CALL.replace("tell_time", "sail")
    wrong = CALL.replace("Ä", "GMT")
    more = CALL.replace('"Ä"', '"Ä", "more": 1')
    cases: list[tuple[dict[str, Any], list[str], list[str]]] = [
        ({}, ["", "Deep.", f"Let me see.\n{CALL}", f"{CALL}\n{measured}"], [unknown, wrong, more, CALL[:-1], CALL + "!"]),
        ({"tool_choice": "required"}, [CALL, f"{measured}\n{CALL}"], ["", "Deep.", f"So: {CALL}", unknown, wrong]),
        ({"tool_choice": "tell_time"}, [CALL], ["", measured, f"{CALL}\n{CALL}"]),
        ({"tool_choice": "required", "parallel_tool_calls": False}, [CALL, measured], [f"{CALL}\n{CALL}"]),
        ({"parallel_tool_calls": False}, ["Deep.", f"So: {CALL}"], [f"{CALL}\n{CALL}"]),
        ({"tool_choice": "none"}, ["", "Deep. <tool_cal", "{<>}\n/"], [CALL, "So: <tool_call>"]),
    ]  # fmt: skip
    for options, answers, others in cases:
        grammar = tool_grammar(demo[1], **options)
        assert grammar is not None
        assert [grammar.is_complete(text) for text in answers] == [True] * len(answers), options
        assert [grammar.is_complete(text) for text in others] == [False] * len(others), options


def test_a_tool_without_parameters_takes_none(demo) -> None:
    for tool in ({"name": "sail"}, {"name": "sail", "parameters": {"type": "object"}}):
        grammar = tool_grammar(demo[1], tools=[tool], tool_choice="required")
        assert grammar is not None
        call = '<tool_call>\n{"name": "sail", "arguments": {}}\n</tool_call>'
        assert grammar.is_complete(call) and not grammar.is_complete(call.replace("{}", '{"a": 1}'))


def write_first(tokenizer: Tokenizer, text: str, prompt_tokens: int) -> Callable[[mx.array, mx.array], mx.array]:
    """A logits processor that has the answer begin with a text."""
    ids = tokenizer.encode(text, add_special_tokens=False)

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        place = tokens.size - prompt_tokens
        return logits + 1e6 * (mx.arange(logits.shape[-1]) == ids[place]) if place < len(ids) else logits

    return process


def test_a_call_in_the_middle_of_free_text_is_enforced_from_its_mark_on(demo) -> None:
    options = GenerateOptions(tools=TOOLS, temp=1.0, max_tokens=150, seed=1)
    prompt_tokens = len(encode_prompt(demo[1], ASKED, options))
    begun = "Let me see.\n<tool_call>"
    processor = write_first(demo[1], begun, prompt_tokens)
    chunks = list(stream_generate(*demo, ASKED, options, logits_processors=[processor]))
    text, last = "".join(chunk.text for chunk in chunks), chunks[-1]
    assert text.startswith(begun) and last.stop_reason == "tool_call" and last.is_complete and last.tool_calls
    check_calls(last.tool_calls)
    assert cut_tool_calls(text, last.tool_calls) == "Let me see."


def test_none_never_begins_a_call(demo) -> None:
    options = GenerateOptions(tools=TOOLS, tool_choice="none", max_tokens=30)
    processor = write_first(demo[1], "So:\n<tool_call>", len(encode_prompt(demo[1], ASKED, options)))
    chunks = list(stream_generate(*demo, ASKED, options, logits_processors=[processor]))
    text = "".join(chunk.text for chunk in chunks)
    assert text.startswith("So:\n<tool_call") and "<tool_call>" not in text and not chunks[-1].tool_calls


def test_batch_stream_and_engine_call_alike(demo) -> None:
    asked = [
        GenerateOptions(tools=TOOLS, tool_choice=choice, temp=1.0, max_tokens=120, seed=seed)
        for seed, choice in enumerate(("required", "tell_time", "auto", "none"))
    ]
    alone = [ask(demo, options.seed or 0, tool_choice=options.tool_choice, max_tokens=120) for options in asked]
    batch = generate_batch(*demo, [ASKED] * len(asked), asked)
    with Engine.load(DEMO_MODEL) as engine:
        served = [request.result() for request in [engine.submit(ASKED, options) for options in asked]]
    for answer, *others in zip(alone, batch, served, strict=True):
        for other in others:
            assert (other.text, other.tool_calls, other.is_complete, other.stop_reason) == (
                answer.text, answer.tool_calls, answer.is_complete, answer.stop_reason,
            )  # fmt: skip
    assert [bool(answer.tool_calls) for answer in alone] == [True, True, False, False]


def test_a_cut_off_call_is_incomplete_and_its_text_is_kept(demo) -> None:
    answer = ask(demo, tool_choice="required", max_tokens=8)
    assert answer.is_complete is False and answer.stop_reason == "max_tokens" and not answer.tool_calls
    (invalid,) = answer.invalid_tool_calls
    assert "cut off" in invalid.error and answer.content == answer.text == invalid.text


@pytest.mark.parametrize(
    ("inside", "error"),
    [
        ("{not json}", "JSONDecodeError"),
        ('{"name": "sail", "arguments": {}}', "no tool 'sail'; there are measure, tell_time"),
        ('{"name": "measure", "arguments": [1]}', "expected an object"),
        ('{"arguments": {}}', "KeyError"),
        ("[1]", "TypeError"),
    ],
)
def test_what_cannot_be_read_stays_in_the_content(demo, inside: str, error: str) -> None:
    form = find_tool_format(demo[1], GenerateOptions(tools=TOOLS).tools)
    broken = f"<tool_call>{inside}</tool_call>"
    calls, (invalid,) = form.read(f"One {CALL} two {broken} three")
    assert calls == (ToolCall("tell_time", {"zone": "Ä"}),) and invalid.text == broken and error in invalid.error
    assert cut_tool_calls(f" One {CALL} two {broken}\n{CALL}\n", calls) == f" One  two {broken}"
    assert cut_tool_calls(f"\n{CALL}\n", calls) == ""


def test_a_text_argument_may_hold_the_marks(demo) -> None:
    call = '<tool_call>\n{"name": "say", "arguments": {"text": "a </tool_call> b <tool_call>"}}\n</tool_call>'
    tool = {"name": "say", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}}
    form = find_tool_format(demo[1], GenerateOptions(tools=[tool]).tools)
    grammar = tool_grammar(demo[1], tools=[tool], tool_choice="required")
    calls, invalid = form.read(f"{call}\n{call}")
    assert grammar is not None and grammar.is_complete(f"{call}\n{call}") and not invalid
    assert [dict(call.arguments) for call in calls] == [{"text": "a </tool_call> b <tool_call>"}] * 2


def test_none_reads_no_calls_in_a_form_that_looks_like_one(demo) -> None:
    answer = ask(demo, tool_choice="none", choices=[CALL])
    assert answer.text == CALL == answer.content and not answer.tool_calls and answer.stop_reason == "eos"


def test_parameters_of_several_parts_mean_what_they_say(demo) -> None:
    part = {"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}
    other = {"type": "object", "properties": {"b": {"enum": ["y"]}}, "required": ["b"]}
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({"type": "object", "allOf": [part, other]}, '{"a": "x", "b": "y"}', '{"a": "x"}'),
        ({"type": "object", "$ref": "#/$defs/A", "$defs": {"A": part}}, '{"a": "x"}', "{}"),
        ({"type": "object", "properties": {"p": {"anyOf": [part, other]}}}, '{"p": {"b": "y"}}', '{"p": {}}'),
        ({"type": "object", "properties": {"p": part}}, '{"p": {"a": "x"}}', '{"p": {"a": "x", "b": "y"}}'),
    ]  # fmt: skip
    for parameters, whole, wrong in cases:
        grammar = tool_grammar(demo[1], tools=[{"name": "f", "parameters": parameters}], tool_choice="required")
        call = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
        assert grammar is not None and grammar.is_complete(call % whole), parameters
        assert not grammar.is_complete(call % wrong), parameters


def test_a_tuple_is_whole(demo) -> None:
    def place(at: tuple[int, bool]) -> str:
        """Places.

        Args:
            at: Where.
        """
        raise AssertionError

    grammar = tool_grammar(demo[1], tools=[place], tool_choice="required")
    assert grammar is not None
    for at, is_whole in (("[1, true]", True), ("[]", False), ("[1]", False), ("[1, true, 2]", False)):
        call = f'<tool_call>\n{{"name": "place", "arguments": {{"at": {at}}}}}\n</tool_call>'
        assert grammar.is_complete(call) is is_whole


def test_arguments_that_are_json_in_a_text_are_read(demo) -> None:
    form = find_tool_format(demo[1], GenerateOptions(tools=TOOLS).tools)
    call = '<tool_call>{"name": "tell_time", "arguments": "{\\"zone\\": \\"UTC\\"}"}</tool_call>'
    assert form.read(call)[0] == (ToolCall("tell_time", {"zone": "UTC"}, call),)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "tiny", max_position_embeddings=2048)
    return tmp_path / "tiny"


def test_marks_that_are_special_tokens_are_enforced_and_read(tiny: Path) -> None:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_file(str(tiny / "tokenizer.json"))
    data = json.loads(backend.to_str())
    data["model"]["merges"] = data["model"]["merges"][:-2]  # the marks take the last two ids
    data["model"]["vocab"] = {token: i for token, i in data["model"]["vocab"].items() if i < 398}
    backend = Backend.from_str(json.dumps(data))
    backend.add_special_tokens([AddedToken(mark, special=True) for mark in ("<tool_call>", "</tool_call>")])
    assert backend.token_to_id("</tool_call>") == 399
    backend.save(str(tiny / "tokenizer.json"))
    (tiny / "chat_template.jinja").write_text((DEMO_MODEL / "chat_template.jinja").read_text())

    model, tokenizer = load(tiny)
    for choice in ("required", "tell_time", "auto"):
        options = GenerateOptions(tools=[tell_time], tool_choice=choice, max_tokens=80)
        processor = (
            []
            if choice != "auto"
            else [write_first(tokenizer, "So:<tool_call>", len(encode_prompt(tokenizer, ASKED, options)))]
        )
        chunks = list(stream_generate(model, tokenizer, ASKED, options, logits_processors=processor))
        last = chunks[-1]
        assert last.tool_calls and last.is_complete and last.stop_reason == "tool_call"
        assert {chunk.token for chunk in chunks} >= {398, 399}
        check_calls(last.tool_calls)
    cut = GenerateOptions(tools=[tell_time], max_tokens=8)
    processor = [write_first(tokenizer, "<tool_call>", len(encode_prompt(tokenizer, ASKED, cut)))]
    assert list(stream_generate(model, tokenizer, ASKED, cut, logits_processors=processor))[-1].is_complete is False
    none = GenerateOptions(tools=[tell_time], tool_choice="none", max_tokens=40)
    assert 398 not in [chunk.token for chunk in stream_generate(model, tokenizer, ASKED, none)]


def test_another_form_of_calls_is_read_by_mlx_lms_parser_and_not_enforced(tiny: Path) -> None:
    template = "{{ tools | tojson }}<|tool_list_start|>{% for message in messages %}{{ message.content }}{% endfor %}"
    (tiny / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(tiny)
    form = find_tool_format(tokenizer, GenerateOptions(tools=TOOLS).tools)
    text = 'So: <|tool_call_start|>[tell_time(zone="UTC"), measure(sea="Pacific")]<|tool_call_end|>'
    calls, invalid = form.read(text)
    assert calls == (ToolCall("tell_time", {"zone": "UTC"}), ToolCall("measure", {"sea": "Pacific"})) and not invalid
    assert cut_tool_calls(text, calls) == "So:"
    assert tool_grammar(tokenizer) is None
    with pytest.raises(GrammarError, match=r"'required' cannot be enforced .* \(pythonic\)"):
        tool_grammar(tokenizer, tool_choice="required")
    with pytest.raises(GrammarError, match=r"parallel_tool_calls False cannot be enforced"):
        tool_grammar(tokenizer, parallel_tool_calls=False)
    none = tool_grammar(tokenizer, tool_choice="none")
    assert none is not None and none.is_complete("So:") and not none.is_complete(text)


def test_a_template_that_leaves_tools_out_is_refused(tiny: Path) -> None:
    with pytest.raises(TokenizerError, match="does not write tools"):
        encode_prompt(load_tokenizer(tiny), ASKED, GenerateOptions(tools=TOOLS))


def test_a_keyword_that_cannot_be_enforced_is_named_with_its_tool(demo) -> None:
    tool = {
        "name": "sail",
        "parameters": {"type": "object", "properties": {"to": {"type": "array", "uniqueItems": True}}},
    }
    with pytest.raises(GrammarError, match=r"tool sail: .*'uniqueItems' at \$\.properties\.to"):
        tool_grammar(demo[1], tools=[tool])
    assert tool_grammar(demo[1], tools=[tool], tool_choice="none") is not None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tools": measure}, "tools is of type function"),
        ({"tools": [3]}, r"tools\[0\] is of type int"),
        ({"tools": [{"description": "x"}]}, r"tools\[0\] is .* expected a function's schema"),
        ({"tools": [{"name": "x", "parameters": {"type": "string"}}]}, "parameters is .* expected .* 'object'"),
        ({"tools": [{"name": "x", "inputSchema": {}}]}, "expected a function's schema"),
        ({"tools": [functools.partial(measure, "Pacific")]}, "expected"),
        ({"tools": [measure, measure]}, "'measure' is the name of two"),
        ({"tools": [{"name": "auto"}]}, "'auto' is a word of tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sail"}, "tool_choice is 'sail'; expected one of auto"),
        ({"tool_choice": "required"}, "without tools"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls is 1"),
        ({"tools": TOOLS, "regex": "x"}, "tools together with schema"),
    ],
)
def test_tools_that_are_none_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        GenerateOptions(**options)


def test_a_form_beside_tools_that_are_not_called_is_followed(demo) -> None:
    answer = ask(demo, tool_choice="none", choices=["deep", "shallow"])
    assert answer.text in ("deep", "shallow") and answer.is_complete


def test_beams_refuse_tools(demo) -> None:
    with pytest.raises(InputError, match="calls no tools"):
        beam_search(*demo, ASKED, GenerateOptions(tools=TOOLS), num_beams=2)

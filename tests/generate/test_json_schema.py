"""The JSON Schema Test Suite: what is not refused by name is enforced; and Python types go to JSON and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from arcee_mlx import DEMO_MODEL, GenerateOptions, GrammarError, Tokenizer, load_tokenizer
from arcee_mlx.generate.grammar import compile_grammar
from arcee_mlx.generate.json_schema import parse_answer

SUITE = json.loads((Path(__file__).parent.parent / "assets" / "json_schema_test_suite.json").read_text())["files"]
FORMAT_IS_ANNOTATION = "is only an annotation by default"  # we enforce formats


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_MODEL)


@pytest.mark.parametrize("name", SUITE)
def test_a_schema_is_enforced_or_refused_by_name(tokenizer: Tokenizer, name: str) -> None:
    for group in SUITE[name]:
        schema, where = group["schema"], f"{name}: {group['description']}"
        try:
            grammar = compile_grammar(tokenizer, GenerateOptions(schema=schema))
        except GrammarError as error:
            assert schema is False or any(f"'{key}'" in str(error) for key in _keys(schema)), f"{where}: {error}"
            continue
        assert grammar is not None
        for test in group["tests"]:
            text = json.dumps(test["data"], separators=(",", ":"), ensure_ascii=False)
            assert test["valid"] or not grammar.is_complete(text), f"{where}: {test['description']}"


def test_most_of_the_suite_is_enforced_and_takes_what_is_valid(tokenizer: Tokenizer) -> None:
    schemas = enforced = valid = taken = 0
    for group in (group for groups in SUITE.values() for group in groups):
        schemas += 1
        try:
            grammar = compile_grammar(tokenizer, GenerateOptions(schema=group["schema"]))
        except GrammarError:
            continue
        enforced += 1
        for test in group["tests"]:
            if test["valid"] and FORMAT_IS_ANNOTATION not in test["description"]:
                valid += 1
                text = json.dumps(test["data"], separators=(",", ":"), ensure_ascii=False)
                taken += grammar is not None and grammar.is_complete(text)
    print(f"{enforced} of {schemas} schemas enforced, {taken} of {valid} valid instances taken")
    assert enforced >= 200 and taken >= 0.9 * valid


def test_a_days_name_is_a_day_that_exists(tokenizer: Tokenizer) -> None:
    grammar = compile_grammar(tokenizer, GenerateOptions(schema={"type": "string", "format": "date"}))
    assert grammar is not None
    assert grammar.is_complete('"2024-02-29"') and grammar.is_complete('"2000-02-29"')
    assert not grammar.is_complete('"2023-02-29"') and not grammar.is_complete('"1900-02-29"')


def test_what_only_looks_like_a_schema_is_left_alone(tokenizer: Tokenizer) -> None:
    grammar = compile_grammar(tokenizer, GenerateOptions(schema={"const": {"format": "date", "pattern": "[["}}))
    assert grammar is not None and grammar.is_complete('{"format":"date","pattern":"[["}')


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (list[int], "[1,2]", [1, 2]),
        (tuple[int, ...], "[1]", (1,)),
        (tuple[int, str], '[1,"a"]', (1, "a")),
        (dict[str, float], '{"a":1}', {"a": 1.0}),
        (int | str | None, "null", None),
        (float | int, "1", 1),
        (bool, "true", True),
    ],
    ids=str,
)
def test_a_type_takes_its_values_and_gives_them_back(tokenizer: Tokenizer, hint: Any, text: str, value: Any) -> None:
    grammar = compile_grammar(tokenizer, GenerateOptions(schema=hint))
    assert grammar is not None and grammar.is_complete(text)
    parsed = parse_answer(hint, text)
    assert parsed == value and type(parsed) is type(value)


def _keys(schema: Any) -> set[str]:
    if isinstance(schema, list):
        return set().union(*map(_keys, schema)) if schema else set()
    if not isinstance(schema, dict):
        return set()
    return set(schema).union(*(_keys(part) for part in schema.values()))

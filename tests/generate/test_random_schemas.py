"""Whatever the schema and the seed: a complete answer validates by other means, and few are cut off."""

from __future__ import annotations

import random

import jsonschema
import pytest

from arcee_mlx import DEMO_MODEL, GenerateOptions, generate_batch, load

from random_schemas import make_schema

TEMPERATURES = (0, 0.8, 1.2)
VALIDATOR = jsonschema.Draft202012Validator


@pytest.mark.parametrize("count", [24, pytest.param(500, marks=pytest.mark.slow)])
def test_complete_answers_validate_and_few_are_cut_off(count: int) -> None:
    model, tokenizer = load(DEMO_MODEL)
    schemas = [make_schema(random.Random(seed)) for seed in range(count)]
    options = [
        GenerateOptions(schema=schema, seed=seed, temp=TEMPERATURES[seed % 3], max_tokens=512)
        for seed, schema in enumerate(schemas)
    ]
    answers = generate_batch(model, tokenizer, ["As JSON: "] * count, options, max_batch_size=8)
    incomplete = 0
    for schema, answer in zip(schemas, answers, strict=True):
        if answer.is_complete:
            jsonschema.validate(answer.parsed, schema, VALIDATOR, format_checker=VALIDATOR.FORMAT_CHECKER)
        else:
            incomplete += 1
            assert answer.stop_reason == "max_tokens" and len(answer.tokens) == 512
    print(f"{incomplete} of {count} answers were cut off at 512 tokens")
    assert incomplete <= 0.05 * count

"""A conversion that is killed at any moment harms nothing, and the next run goes on with what it had finished."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from arcee_mlx import ArceeConfig
from arcee_mlx.conversion.fold import bound_scalings, count_scaled
from arcee_mlx.conversion.prepare import plan_conversion

from conftest import TEXT as WORDS
from conftest import write_tokenizer
from conversion_data import SHAPE, random_weights, write_source
from cut_off import CASES, TEXT, Kill

PROGRAM = Path(__file__).with_name("cut_off.py")
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
RUINS = "what has the final name is neither the older checkpoint nor the complete new one"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with a checkpoint in two shards for each case: the one with a tokenizer is calibrated."""
    folder = tmp_path_factory.mktemp("sources")
    for case in CASES:
        sizes = SIZES | {"vocab_size": 400 if case == "calibrated" else 96}
        weights = random_weights(ArceeConfig(**SHAPE | sizes))
        if case == "folded":
            weights = {name: value * 60 if "post_attention" in name else value for name, value in weights.items()}
        write_source(folder / case, weights, shards=2, **sizes)
    write_tokenizer(folder / "calibrated")
    (folder / TEXT).write_text(WORDS * 3, encoding="utf-8")
    return folder


def kill_conversions(folder, sources, count, *options):
    for path in sources.iterdir():
        (folder / path.name).symlink_to(path)
    command = [sys.executable, str(PROGRAM), str(folder), str(count), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [Kill(**json.loads(line)) for line in done.stdout.splitlines()]


def assert_harmless(kills):
    problems = [f"{kill.case}, line {kill.line} of {kill.lines}, {kill.place}: {kill.problem}" for kill in kills]
    assert not [text for text, kill in zip(problems, kills, strict=True) if kill.problem], "\n".join(problems)


@pytest.fixture(scope="module")
def kills(sources, tmp_path_factory):
    return kill_conversions(tmp_path_factory.mktemp("kills"), sources, 50)


def test_a_kill_at_any_line_harms_nothing_and_the_next_run_goes_on(kills):
    assert_harmless(kills)
    assert Counter(kill.case for kill in kills[:50]) == {"4bit": 14, "by_neuron": 12, "folded": 12, "calibrated": 12}


def test_the_kills_hit_every_stage(kills):
    """So that the test above cannot pass by killing too early or too late, or by converting everything again."""
    assert {(kill.overwrite, kill.left) for kill in kills} == {
        (False, "nothing"), (False, "new"), (True, "older"), (True, "nothing"), (True, "new")
    }  # fmt: skip
    for case in CASES:
        assert any(kill.finished and kill.converted for kill in kills if kill.case == case), case
    assert any(kill.finished and not kill.converted for kill in kills)
    assert any(not kill.finished and kill.converted for kill in kills)


def test_a_rename_before_the_weights_are_complete_would_be_noticed(sources, tmp_path):
    kills = kill_conversions(tmp_path, sources, 10, "--rename-early")
    with pytest.raises(AssertionError, match=RUINS):
        assert_harmless(kills)


def test_neurons_are_folded_in_the_case_that_is_about_them(sources):
    planned = plan_conversion(sources / "folded", sources / "out", CASES["folded"]["recipe"])
    assert count_scaled(bound_scalings(planned.sources, planned.tensors)) > 100


@pytest.mark.slow
def test_five_hundred_more_kills_harm_nothing(sources, tmp_path):
    assert_harmless(kill_conversions(tmp_path, sources, 500))

"""Over a thousand damaged checkpoints: each ends in an error that names file and fault, or in a correct result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from damaged import KINDS, LIMIT_S, Ending, make_cases

PROGRAM = Path(__file__).parent / "damaged.py"


@pytest.fixture(scope="module")
def endings(tmp_path_factory):
    """How every conversion ended, in one process of their own."""
    folder = tmp_path_factory.mktemp("damaged")
    command = [sys.executable, "-W", "error", str(PROGRAM), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=2 * LIMIT_S, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"after {lines[-1:]}:\n{done.stderr}"
    assert not list(folder.iterdir())
    return [Ending(**json.loads(line)) for line in lines]


def test_there_are_hundreds_of_damaged_checkpoints_and_some_of_every_kind(endings):
    assert [(ending.kind, ending.case) for ending in endings] == [
        (kind, case.name) for kind in KINDS for case in make_cases(kind)
    ]
    refused = [ending for ending in endings if ending.error]
    assert len(refused) >= 300 and len(endings) - len(refused) >= 50


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_an_error_that_names_it_or_harmless(endings, kind):
    problems = [f"{e.case}: {e.problem} [{e.error}]" for e in endings if e.kind == kind and e.problem]
    assert not problems, "\n".join(problems)


def test_no_damaged_checkpoint_takes_much_memory(endings):
    assert endings[-1].peak_bytes < endings[0].peak_bytes + 100e6

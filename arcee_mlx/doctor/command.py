"""`arcee-mlx doctor`: every check in turn, and in the end in plain words whether all is well."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Callable

from .checks import Check, run_check
from .demo import check_by_neuron, check_demo
from .kernels import check_kernels
from .machine import check_device, check_disk, check_environment, check_memory
from .versions import check_versions

CHECKS: dict[str, Callable[[], Check]] = {
    "versions": check_versions,
    "device": check_device,
    "memory": check_memory,
    "disk": check_disk,
    "environment": check_environment,
    "kernels": check_kernels,
    "demo": check_demo,
    "sparse": check_by_neuron,
}
_INDENT = 13


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `doctor`."""
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, for a report")
    parser.epilog = (
        "It takes seconds on a CPU, and a minute or so on a GPU, whose kernels it compiles. It reads no model but the "
        "bundled one, changes nothing and needs no network. What it prints names no folder, user or host. "
        "Exit status: 0 if all is well, 1 if something needs attention."
    )


def run(args: argparse.Namespace) -> int:
    """Runs all checks and prints what they found; returns 0 if all is well and 1 if not."""
    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    found: dict[str, Check] = {}
    for name, check in CHECKS.items():
        found[name] = run_check(name, check)
        if not args.json:
            print(describe(name, found[name], width=width), flush=True)
    problems = [problem for check in found.values() for problem in check.problems]
    if args.json:
        print(json.dumps(summarize(found), allow_nan=False))
    elif problems:
        print(f"\n{len(problems)} thing{'s need' if len(problems) > 1 else ' needs'} attention:")
        for i, problem in enumerate(problems, 1):
            print(textwrap.fill(problem, width, initial_indent=f"{i}. ", subsequent_indent="   "))
    else:
        print()
        print(textwrap.fill("All is well: what is installed fits together and computes what it should here.", width))
    return 1 if problems else 0


def describe(name: str, check: Check, *, width: int) -> str:
    """A check's lines beside its name; lines are broken between words, tables are left alone."""
    lines = []
    for line in check.lines:
        is_table = "  " in line  # columns: nothing else has two spaces
        lines += (
            [line] if is_table else textwrap.wrap(line, width - _INDENT, subsequent_indent="  ", break_long_words=False)
        )
    return "\n".join(f"{name if not i else '':<{_INDENT}}{line}" for i, line in enumerate(lines))


def summarize(found: dict[str, Check]) -> dict[str, object]:
    """All that was found, as JSON has it."""
    problems = {name: list(check.problems) for name, check in found.items()}
    return {
        "sound": not any(problems.values()),
        "problems": [problem for group in problems.values() for problem in group],
        "checks": {
            name: {"sound": not problems[name], "problems": problems[name], "facts": dict(check.facts)}
            for name, check in found.items()
        },
    }

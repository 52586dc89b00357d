"""Are the installed packages those that this one declares in its metadata?"""

from __future__ import annotations

import operator
import platform
import re
import sys
from importlib import metadata

from .checks import Check

_OURS = "arcee-mlx"
_UNDECLARED = ("safetensors", "transformers")  # mlx-lm brings them: good to know in a report
_BACKENDS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
_REQUIREMENT = re.compile(r"([\w.-]+)(?:\[[^]]*])?([^;]*)(?:;(.*))?")
_CLAUSE = re.compile(r"(>=|==|<)(.+)")
_VERSION = re.compile(r"(\d+(?:\.\d+)*)[._-]?(a|b|rc|dev|pre)?")


def check_versions() -> Check:
    """Compares every required package with its bounds, and MLX with the part of it that computes."""
    if (own := _find_version(_OURS)) is None:
        problem = f"{_OURS} runs from its folder and is not installed; expected its metadata; pip install -e ."
        return Check({}, ("not installed",), (problem,))
    python = ",".join(sorted(str(metadata.metadata(_OURS)["Requires-Python"]).split(","), reverse=True))
    versions: dict[str, str | None] = {_OURS: own}
    problems = []
    if not satisfies(platform.python_version(), python):
        problems.append(
            f"Python is {platform.python_version()}; expected {python}; make a new environment with one of these"
        )
    for name, bounds in _read_requirements().items():
        version = versions[name] = _find_version(name)
        if version is None or not satisfies(version, bounds):
            got = "is not installed" if version is None else f"is {version}"
            problems.append(f"{name} {got}; expected {bounds}; pip install '{name}{bounds}'")
    backends = {name: version for name in _BACKENDS if (version := _find_version(name))}
    mlx = versions.get("mlx")
    if mlx is not None and mlx not in backends.values():
        have = ", ".join(f"{name} is {version}" for name, version in backends.items()) or "its backend is not installed"
        wanted = next(iter(backends), "mlx-metal" if sys.platform == "darwin" else "mlx-cpu")
        problems.append(f"mlx is {mlx} and {have}; expected the same version; pip install '{wanted}=={mlx}'")
    versions |= backends | {name: _find_version(name) for name in _UNDECLARED}
    facts = {"python": platform.python_version(), **versions}
    words = [f"{name} {version or '(not installed)'}" for name, version in facts.items()]
    return Check(facts, (", ".join(words),), tuple(problems))


def satisfies(version: str, bounds: str) -> bool:
    """Whether a version is inside bounds such as ">=0.32.4,<0.33"; what is not final comes before what is.

    Raises:
        ValueError: one of the two is in another form.
    """
    release, is_final = _read_version(version)
    for clause in filter(None, (part.strip() for part in bounds.split(","))):
        if (match := _CLAUSE.fullmatch(clause)) is None:
            raise ValueError(f"bound {clause!r}; expected >=, == or < and a version")
        bound, is_final_bound = _read_version(match[2].strip())
        if match[1] == "<":
            fits = release < bound  # no release candidate of the bound, either
        else:
            compare = operator.ge if match[1] == ">=" else operator.eq
            fits = compare((release, is_final), (bound, is_final_bound))
        if not fits:
            return False
    return True


def _read_requirements() -> dict[str, str]:
    """Bounds by name, the lower one first, of what is required on this platform and is no extra."""
    found = {}
    for line in metadata.requires(_OURS) or []:
        if (match := _REQUIREMENT.fullmatch(line)) is None:
            raise ValueError(f"{_OURS} requires {line!r}; expected a name, bounds and a marker")
        name, bounds, marker = match[1], match[2].strip().strip("()"), match[3] or ""
        only_on = re.search(r"sys_platform\s*==\s*[\"'](\w+)", marker)
        if "extra" not in marker and (only_on is None or only_on[1] == sys.platform):
            found[name] = ",".join(sorted((part.strip() for part in bounds.split(",")), reverse=True))
    return found


def _find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _read_version(text: str) -> tuple[tuple[int, ...], bool]:
    if (match := _VERSION.match(text)) is None:
        raise ValueError(f"version {text!r}; expected numbers with dots")
    numbers = [int(number) for number in match[1].split(".")]
    while len(numbers) > 1 and not numbers[-1]:
        numbers.pop()
    return tuple(numbers), match[2] is None

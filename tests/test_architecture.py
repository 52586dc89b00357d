"""The house in one table: who may import whom, what a file may be called, and that importing changes nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "arcee_mlx"
FILES = sorted(PACKAGE.rglob("*.py"))
# An arrow may point from a later entry to an earlier one only. A folder stands for all that is in it.
ORDER = [
    "errors", "upstream", "program", "thread_end",
    "model.json_file", "model.config", "model.rope", "model.activations", "model.linear", "model.relu2", "model.masks", "model.inputs", "model.losses",
    "model.open_attention", "model.training", "model.decoder", "model.heads",
    "checkpoint.hub_request", "checkpoint.hub", "checkpoint.hub_upload", "checkpoint.shards", "checkpoint.links", "checkpoint.headers", "checkpoint.files", "checkpoint.sealed", "checkpoint.training_state", "checkpoint.names", "checkpoint.quantization", "checkpoint.function_schema", "checkpoint.chat_template", "checkpoint.detokenizer",
    "checkpoint.special_tokens", "checkpoint.tokenizer",
    "checkpoint.adapter_files", "checkpoint.peft", "checkpoint.adapters", "checkpoint.opening", "checkpoint.loading",
    "lm", "measure", "conversion", "generate", "engine", "tasks", "inspection", "bench", "doctor", "cli", "__init__", "__main__",
]  # fmt: skip
# model/config.read_config and files share one JSON reader; rope's order among masks, inputs and losses is free.
SAME_LEVEL = {"model.masks", "model.inputs", "model.losses"}
DISTRIBUTIONS = {"yaml": "pyyaml", "llguidance": "llguidance"}  # import name -> distribution where they differ


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def place(module: str) -> int:
    """Index in ORDER of a module or of the folder it is in."""
    candidates = [i for i, name in enumerate(ORDER) if module == name or module.startswith(name + ".")]
    assert candidates, f"arcee_mlx.{module} has no place in the house; give it one in ORDER and in the plan"
    return max(candidates)


def imports(path: Path) -> set[str]:
    """Full names of all modules a file imports, at its top and inside functions."""
    package = ["arcee_mlx", *path.relative_to(PACKAGE).parts[:-1]]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = PACKAGE.joinpath(*name.split(".")[1:], alias.name)
                is_module = name.startswith("arcee_mlx") and (inner.with_suffix(".py").exists() or inner.is_dir())
                found.add(f"{name}.{alias.name}" if is_module else name)
    return found


def test_the_package_was_found() -> None:
    assert len(FILES) > 10
    assert "arcee_mlx.model.config" in imports(PACKAGE / "model" / "decoder.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows_point_down_only(path: Path) -> None:
    name = module_name(path)
    if name in ("model", "checkpoint"):
        assert not {i for i in imports(path) if i.startswith("arcee_mlx")}, "these folders' __init__ import nothing"
        return
    for imported in sorted(i for i in imports(path) if i.startswith("arcee_mlx.")):
        target = imported.removeprefix("arcee_mlx.")
        same_room = name.split(".")[0] == target.split(".")[0] and place(name) == place(target)
        free = {name, target} <= SAME_LEVEL
        assert place(target) < place(name) or same_room or free, (
            f"arcee_mlx.{name} imports {imported}, which stands below it"
        )


def test_no_two_modules_import_each_other() -> None:
    graph = {f"arcee_mlx.{module_name(path)}": imports(path) for path in FILES}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"a circle of imports: {' -> '.join([*trail, name])}"
        if name in done or name not in graph:
            return
        for imported in graph[name]:
            visit(imported, (*trail, name))
        done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_file_is_short_and_has_a_name_of_its_own(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert not {"utils", "util", "common", "helpers", "helper", "misc"} & set(
        path.relative_to(PACKAGE).with_suffix("").parts
    )
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "a file opens with its contract in one line"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_transformers_no_torch_and_one_door_to_mlx_lm(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert not roots & {"transformers", "torch", "pickle"}
    if path.name != "upstream.py":
        assert "mlx_lm" not in roots


def test_every_third_party_import_is_declared() -> None:
    file = ROOT / "pyproject.toml"
    if not file.exists():
        pytest.skip("this tree has no pyproject.toml")
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    requirements = project["dependencies"] + [
        r for extra in project.get("optional-dependencies", {}).values() for r in extra
    ]

    def names(lines: list[str]) -> set[str]:
        return {"".join(c for c in line.split(";")[0].split("[")[0].split(">")[0].split("=")[0].split("<")[0] if not c.isspace())
                .lower().replace("_", "-") for line in lines}  # fmt: skip

    required, optional = names(project["dependencies"]), names(requirements)
    for path in FILES:
        at_top = {
            root
            for node in ast.parse(path.read_text(encoding="utf-8")).body
            for root in ({a.name.split(".")[0] for a in node.names} if isinstance(node, ast.Import) else
                         {str(node.module).split(".")[0]} if isinstance(node, ast.ImportFrom) and not node.level else set())
        }  # fmt: skip
        for root in {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"arcee_mlx"}:
            distribution = DISTRIBUTIONS.get(root, root).replace("_", "-")
            allowed = required if root in at_top else optional
            assert distribution in allowed, (
                f"{path.relative_to(ROOT)} imports {root}; pyproject.toml does not require {distribution}"
            )


INERT = """
import logging, os, random, resource, signal, sys, threading, warnings
def state():
    return {
        "limit": resource.getrlimit(resource.RLIMIT_NOFILE), "environment": dict(os.environ),
        "handlers": list(logging.getLogger().handlers), "level": logging.getLogger().level, "disabled": logging.root.manager.disable,
        "filters": list(warnings.filters), "random": random.getstate(), "hook": sys.excepthook, "display": sys.displayhook,
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE)],
        "threads": threading.active_count(), "folder": os.getcwd(), "recursion": sys.getrecursionlimit(),
    }
import mlx.core as mx, mlx.nn, numpy as np
before, arrays, key = state(), np.random.get_state()[1].tolist(), mx.random.state[0].tolist()
import arcee_mlx
after = state()
for name in before:
    assert before[name] == after[name], name
assert np.random.get_state()[1].tolist() == arrays and mx.random.state[0].tolist() == key
loaded = {name.split(".")[0] for name in sys.modules}
heavy = loaded & {"mlx_lm", "transformers", "torch", "huggingface_hub", "jinja2", "yaml", "tqdm", "requests", "httpx"}
assert not heavy, heavy
"""

UPSTREAM = """
import ctypes, os, resource, sys
if os.getuid() == 0 and sys.platform == "linux":  # root could raise the limit again: give that one right up first
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    for i in range(3):  # effective, permitted, inheritable; CAP_SYS_RESOURCE is 24
        sets[i] &= ~(1 << 24)
    assert libc.capset(header, sets) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard + 1))
    except (ValueError, OSError):
        pass
    else:
        raise AssertionError("still able to raise the hard limit")
before = resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ), resource.setrlimit
from arcee_mlx.upstream import mlx_lm_module
import threading
modules = [mlx_lm_module("models.cache")]  # by the main thread: mlx_lm imported in another can abort the process at its end
threads = [threading.Thread(target=lambda: modules.append(mlx_lm_module("models.cache"))) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
assert len(set(modules)) == 1 and modules[0].__name__ == "mlx_lm.models.cache"
assert (resource.getrlimit(resource.RLIMIT_NOFILE), dict(os.environ), resource.setrlimit) == before
os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "0"
mlx_lm_module("models.base")
assert os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] == "0"
"""


def run(program: str, folder: Path) -> None:
    environment = {
        "PYTHONPATH": str(PACKAGE.parent), "PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, cwd="/", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_importing_changes_nothing_and_loads_nothing_heavy(tmp_path: Path) -> None:
    run(INERT, tmp_path)


def test_importing_warns_of_nothing(tmp_path: Path) -> None:
    run("import warnings; warnings.simplefilter('error'); import arcee_mlx", tmp_path)


def test_mlx_lm_comes_in_without_lowering_a_limit_or_setting_a_variable(tmp_path: Path) -> None:
    run(UPSTREAM, tmp_path)


def test_installed_version_is_the_declared_one() -> None:
    try:
        installed = metadata.version("arcee-mlx")
    except metadata.PackageNotFoundError:
        pytest.skip("arcee-mlx is not installed, it runs from its folder")
    assert installed == tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

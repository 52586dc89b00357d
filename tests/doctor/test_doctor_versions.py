"""Versions: inside the bounds that the metadata declares, and MLX and its backend of one version."""

from __future__ import annotations

import platform
from collections.abc import Callable
from importlib import metadata

import pytest
from packaging.specifiers import SpecifierSet

from arcee_mlx.doctor.versions import check_versions, satisfies

REQUIRES = ["mlx<0.33,>=0.32.4; sys_platform == 'darwin'", "mlx[cpu]<0.33,>=0.32.4; sys_platform == 'linux'"]
REQUIRES += ["huggingface_hub (<3,>=1.31)", "pytest>=8.4; extra == 'test'"]
INSTALLED = {
    "arcee-mlx": "0.1.0",
    "mlx": "0.32.5",
    "mlx-cpu": "0.32.5",
    "mlx-metal": "0.32.5",
    "huggingface_hub": "2.4",
}


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends that other versions are installed; None is not installed."""

    def pretend(**changes: str | None) -> None:
        installed = INSTALLED | {name.replace("__", "-"): version for name, version in changes.items()}

        def version(name: str) -> str:
            if (found := installed.get(name)) is None:
                raise metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES)
        monkeypatch.setattr(metadata, "metadata", lambda name: {"Requires-Python": "<3.15,>=3.11"})

    return pretend


def test_what_is_installed_here_is_what_is_declared() -> None:
    check = check_versions()
    assert check.problems == ()
    assert check.facts["mlx"] == metadata.version("mlx") and check.facts["arcee-mlx"] == metadata.version("arcee-mlx")
    assert {"mlx-lm", "numpy", "tokenizers", "safetensors", "huggingface_hub"} <= check.facts.keys()
    assert f"mlx-lm {metadata.version('mlx-lm')}" in check.lines[0]


def test_versions_within_bounds_are_well(install: Callable[..., None]) -> None:
    install()
    check = check_versions()
    assert check.problems == () and "pytest" not in check.facts
    assert "safetensors (not installed)" in check.lines[0]


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"mlx": "0.33.0", "mlx__cpu": "0.33.0", "mlx__metal": "0.33.0"}, "mlx is 0.33.0; expected >=0.32.4,<0.33; pip install 'mlx>=0.32.4,<0.33'"),
        ({"huggingface_hub": "1.30.2"}, "huggingface_hub is 1.30.2; expected >=1.31,<3; pip install 'huggingface_hub>=1.31,<3'"),
        ({"huggingface_hub": None}, "huggingface_hub is not installed; expected >=1.31,<3; pip install 'huggingface_hub>=1.31,<3'"),
        ({"mlx__metal": None, "mlx__cpu": "0.32.4"}, "mlx is 0.32.5 and mlx-cpu is 0.32.4; expected the same version; pip install 'mlx-cpu==0.32.5'"),
        ({"arcee__mlx": None}, "arcee-mlx runs from its folder and is not installed; expected its metadata; pip install -e ."),
    ],
)  # fmt: skip
def test_what_is_out_of_bounds_is_named_with_the_command_that_mends_it(
    install: Callable[..., None], changes: dict[str, str | None], problem: str
) -> None:
    install(**changes)
    assert check_versions().problems == (problem,)


def test_mlx_without_any_backend_is_named(install: Callable[..., None]) -> None:
    install(mlx__metal=None, mlx__cpu=None)
    (problem,) = check_versions().problems
    assert problem.startswith("mlx is 0.32.5 and its backend is not installed; expected the same version; pip install")


def test_a_python_out_of_bounds_is_named(install: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    install()
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.4")
    assert check_versions().problems == (
        "Python is 3.10.4; expected >=3.11,<3.15; make a new environment with one of these",
    )


@pytest.mark.parametrize(
    "bounds", ["", ">=0.32.4,<0.33", ">=1.31,<3", ">=2", "==2.13.0", "<3.15,>=3.11", ">= 0.32.4, < 0.33"]
)
@pytest.mark.parametrize(
    "version", ["0.32.3", "0.32.4", "0.32.4rc1", "0.32.4.dev20261101", "0.32.10", "0.33", "0.33.0rc1", "0.33.0", "1.31", "1.31.0",
                "1.30.99", "2.13", "2.13.0", "2.13.0+cpu", "3.0.0", "3.11.7", "3.15.0a2", "10.0"],
)  # fmt: skip
def test_bounds_are_read_as_packaging_reads_them(version: str, bounds: str) -> None:
    assert satisfies(version, bounds) == SpecifierSet(bounds).contains(version, prereleases=True)


@pytest.mark.parametrize("version, bounds", [("one", ">=1"), ("1.0", "~=1.0"), ("1.0", ">=x")])
def test_what_cannot_be_compared_is_not_guessed(version: str, bounds: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        satisfies(version, bounds)

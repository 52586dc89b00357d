"""The machine: what is too old, too small or wrongly set is named; the numbers are AFM-4.5B's."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from huggingface_hub import constants

from arcee_mlx.doctor import machine
from arcee_mlx.doctor.machine import (
    check_device,
    check_disk,
    check_environment,
    check_memory,
    count_bytes,
    count_context,
    sum_free_pages,
)

M1 = {
    "device_name": "Apple M1", "architecture": "applegpu_g13g", "memory_size": 8 * 2**30,
    "max_recommended_working_set_size": 5_726_623_061, "max_buffer_length": 4_294_967_296, "resource_limit": 499_000,
}  # fmt: skip
VM_STAT = """Mach Virtual Memory Statistics: (page size of 16384 bytes)
Pages free:                                5000.
Pages active:                            200000.
Pages inactive:                          190000.
Pages speculative:                         1000.
Pages throttled:                              0.
"Translation faults":                  90000000.
"""


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pretends to be a Mac."""

    def pretend(*, machine_name: str = "arm64", macos: str = "15.1", on_gpu: bool = True, **info: Any) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        monkeypatch.setattr(platform, "machine", lambda: machine_name)
        monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), machine_name))
        monkeypatch.setattr(mx, "default_device", lambda: mx.gpu if on_gpu else mx.cpu)
        monkeypatch.setattr(mx, "device_info", lambda: M1 | info)
        monkeypatch.setattr(mx.metal, "is_available", lambda: on_gpu)
        monkeypatch.setattr(machine, "_read_free_bytes", lambda: sum_free_pages(VM_STAT))

    return pretend


def test_this_machine_is_known() -> None:
    check = check_device()
    assert check.problems == () and check.facts["device"] == "CPU"
    assert platform.platform() in check.lines


def test_a_mac_is_described(mac: Callable[..., None]) -> None:
    mac()
    check = check_device()
    assert check.problems == () and check.lines[1] == "GPU (Apple M1, applegpu_g13g)"
    assert check.facts["backend"] == "Metal" and check.facts["macos"] == "15.1"


@pytest.mark.parametrize(
    "changes, problem",
    [
        (
            {"machine_name": "x86_64"},
            "this Python is for x86_64 and runs translated; expected arm64; make the environment",
        ),
        ({"macos": "13.6.1"}, "macOS is 13.6.1; expected 14 or later; update macOS"),
        ({"on_gpu": False}, "MLX computes on the CPU of this Mac; expected its GPU; pip install --force-reinstall mlx"),
    ],
)
def test_what_keeps_a_mac_from_its_gpu_is_named(
    mac: Callable[..., None], changes: dict[str, Any], problem: str
) -> None:
    mac(**changes)
    (got,) = check_device().problems
    assert got.startswith(problem)


def test_sizes_are_those_of_afm() -> None:
    assert count_bytes(0, weight_bits=4, float_bits=16) == pytest.approx(2.60e9, rel=2e-3)
    assert count_bytes(0, weight_bits=None, float_bits=16) == pytest.approx(9.24e9, rel=1e-3)
    assert count_bytes(1000, weight_bits=4, float_bits=16) - count_bytes(0, weight_bits=4, float_bits=16) == 73_728_000
    for room in (0, 1, 1000):
        size = count_bytes(room, weight_bits=8, float_bits=32)
        assert count_context(size, weight_bits=8, float_bits=32) == room
    assert count_context(10**12, weight_bits=4, float_bits=16) == 65_536


def test_memory_is_what_mlx_recommends_on_a_mac(mac: Callable[..., None]) -> None:
    mac()
    check = check_memory()
    assert check.problems == ()
    assert check.lines[0] == "8.59 GB, MLX recommends to use 5.73 GB at most, 3.21 GB free now"
    rooms = check.facts["afm_4_5b_context_tokens"]
    assert rooms["floats"] == 0 and 0 < rooms["8 bits"] < rooms["4 bits"] < 65_536
    assert "floats: no room" in check.lines[1]


def test_too_little_memory_is_named(mac: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    mac(max_recommended_working_set_size=2 * 10**9)
    (problem,) = check_memory().problems
    assert problem.startswith(
        "memory for models is 2.00 GB; expected 2.90 GB, which AFM-4.5B takes at 4 bits with 4,096"
    )


def test_an_nvidia_gpu_has_its_own_memory(mac: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    mac()
    monkeypatch.setattr(mx, "device_info", lambda: {"total_memory": 24 * 10**9, "free_memory": 20 * 10**9})
    assert check_memory().lines[0] == "24.00 GB, 20.00 GB free now"


def test_free_memory_is_read_here_and_from_what_macos_prints() -> None:
    assert sum_free_pages(VM_STAT) == 16384 * 196_000
    assert sum_free_pages("vm_stat: not permitted") is None
    free = machine._read_free_bytes()
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert free is None or 0 < free <= total


def test_downloads_need_a_folder_that_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "yet" / "there"))
    check = check_disk()
    assert check.problems == () and check.facts["free_bytes"] > 0
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    (problem,) = check_disk().problems
    assert problem.endswith("set HF_HOME to it") and str(tmp_path) not in problem


def test_variables_are_named_and_private_values_are_not_shown() -> None:
    check = check_environment({"HF_HOME": "/Users/jane/hub", "HF_TOKEN": "hf_secret", "HF_HUB_OFFLINE": "1"})
    assert check.lines == ("HF_HUB_OFFLINE=1, HF_HOME is set, HF_TOKEN is set",) and check.problems == ()
    assert "jane" not in str(check) and "secret" not in str(check)
    assert check_environment({"ARCEE_MLX_SPARSE": "off"}).problems == ()
    assert check_environment({"ARCEE_MLX_SPARSE": "yes"}).problems == (
        "ARCEE_MLX_SPARSE is 'yes'; expected off, on or auto; unset it for auto",
    )

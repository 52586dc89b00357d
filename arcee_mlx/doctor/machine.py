"""What the machine is, and whether AFM-4.5B has room on it."""

from __future__ import annotations

import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..bench.afm_shape import AFM_CONFIG, tensor_shapes
from ..inspection.command import size_words
from ..model.relu2.down import VARIABLE
from .checks import Check

_OLDEST_MACOS = 14  # of MLX's wheels
_CONTEXT_TOKENS = 4096  # that a model must have room for
_SHOWN = (VARIABLE, "HF_HUB_OFFLINE", "MLX_ENABLE_TF32")
_NAMED = ("HF_HOME", "HF_HUB_CACHE", "HF_ENDPOINT", "HF_TOKEN")  # their values are private


def check_device() -> Check:
    """Says what MLX computes on; a Mac on which it is not the GPU needs attention."""
    info, on_gpu = mx.device_info(), mx.default_device() == mx.gpu
    facts = {
        "platform": platform.platform(),
        "machine": platform.machine(),
        "macos": platform.mac_ver()[0] or None,
        "device": "GPU" if on_gpu else "CPU",
        "backend": "CUDA" if mx.cuda.is_available() else "Metal" if mx.metal.is_available() else None,
        "name": info.get("device_name"),
        "architecture": info.get("architecture"),
    }
    problems: list[str] = []
    if sys.platform == "darwin":
        if platform.machine() != "arm64":
            problems.append(
                f"this Python is for {platform.machine()} and runs translated; expected arm64; make the environment "
                f"anew with a Python for Apple Silicon (python.org, or brew install python)"
            )
        if int(str(facts["macos"]).split(".")[0]) < _OLDEST_MACOS:
            problems.append(f"macOS is {facts['macos']}; expected {_OLDEST_MACOS} or later; update macOS")
        if not on_gpu:
            problems.append(
                "MLX computes on the CPU of this Mac; expected its GPU; pip install --force-reinstall mlx mlx-metal "
                "(most virtual machines have no GPU)"
            )
    line = f"{facts['device']} ({', '.join(str(facts[key]) for key in ('name', 'architecture') if facts[key])})"
    return Check(facts, (str(facts["platform"]), line), tuple(problems))


def check_memory() -> Check:
    """Says how much memory there is and which forms of AFM-4.5B it holds; less than the smallest needs attention."""
    info, on_gpu = mx.device_info(), mx.default_device() == mx.gpu
    total = int(info.get("memory_size") or info.get("total_memory") or 0) if on_gpu else 0
    total = total or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = int(info.get("max_recommended_working_set_size", total)) if on_gpu else total
    free = int(info["free_memory"]) if on_gpu and "free_memory" in info else _read_free_bytes()
    float_bits = 16 if on_gpu else 32  # what this package computes in
    contexts = {
        name: count_context(limit, weight_bits=bits, float_bits=float_bits)
        for name, bits in (("4 bits", 4), ("8 bits", 8), ("floats", None))
    }
    facts = {"total_bytes": total, "recommended_bytes": limit, "free_bytes": free, "afm_4_5b_context_tokens": contexts}
    words = [size_words(total)]
    if limit != total:
        words.append(f"MLX recommends to use {size_words(limit)} at most")
    if free is not None:
        words.append(f"{size_words(free)} free now")
    rooms = [f"{name}: {f'{room:,} tokens' if room else 'no room'}" for name, room in contexts.items()]
    problems = []
    if contexts["4 bits"] < _CONTEXT_TOKENS:
        needed = count_bytes(_CONTEXT_TOKENS, weight_bits=4, float_bits=float_bits)
        problems.append(
            f"memory for models is {size_words(limit)}; expected {size_words(needed)}, which AFM-4.5B takes at 4 bits with "
            f"{_CONTEXT_TOKENS:,} tokens; smaller models run, this one needs a larger machine"
        )
    return Check(facts, (", ".join(words), f"room for AFM-4.5B: {'; '.join(rooms)}"), tuple(problems))


def count_bytes(tokens: int, *, weight_bits: int | None, float_bits: int) -> int:
    """What AFM-4.5B takes with so many tokens in its KV cache.

    Args:
        tokens: of one conversation.
        weight_bits: of weights in groups of 64; None for floats.
        float_bits: of scales, biases and the cache.
    """
    weights = sum(map(math.prod, tensor_shapes(AFM_CONFIG["num_hidden_layers"]).values()))
    bits = float_bits if weight_bits is None else weight_bits + 2 * float_bits / 64
    return round((weights * bits + tokens * _kv_floats() * float_bits) / 8)


def count_context(limit_bytes: int, *, weight_bits: int | None, float_bits: int) -> int:
    """Tokens for which AFM-4.5B has room in so many bytes, 0 to its context; see `count_bytes`."""
    left = limit_bytes - count_bytes(0, weight_bits=weight_bits, float_bits=float_bits)
    return min(max(8 * left // (_kv_floats() * float_bits), 0), AFM_CONFIG["max_position_embeddings"])


def check_disk() -> Check:
    """Says how much room there is where downloads go, which must be a folder that can be written to."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    download = count_bytes(0, weight_bits=None, float_bits=16)
    lines = [f"{size_words(free)} free where downloads go (AFM-4.5B is {size_words(download)}, once)"]
    is_usable = folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)
    problem = "the folder that downloads go to cannot be written; expected one that can; set HF_HOME to it"
    return Check({"free_bytes": free, "is_writable": is_usable}, tuple(lines), () if is_usable else (problem,))


def check_environment(environment: Mapping[str, str] = os.environ) -> Check:
    """Names the variables that change what this package does; a value it does not take needs attention."""
    shown: dict[str, Any] = {name: environment.get(name) for name in _SHOWN}
    facts = shown | {name: name in environment for name in _NAMED}
    words = [f"{name}={value}" for name, value in shown.items() if value is not None]
    words += [f"{name} is set" for name in _NAMED if name in environment]
    problems = []
    if shown[VARIABLE] not in (None, "", "off", "on", "auto"):
        problems.append(f"{VARIABLE} is {shown[VARIABLE]!r}; expected off, on or auto; unset it for auto")
    return Check(facts, (", ".join(words) or "nothing is set that changes anything",), tuple(problems))


def _read_free_bytes() -> int | None:
    """Memory that programs can have without swapping, None where the system does not say."""
    if sys.platform == "darwin":
        done = subprocess.run(["/usr/bin/vm_stat"], capture_output=True, text=True, check=False)
        return sum_free_pages(done.stdout)
    meminfo = Path("/proc/meminfo")
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE) if meminfo.exists() else None
    return int(found[1]) * 1024 if found else None


def sum_free_pages(vm_stat: str) -> int | None:
    """The bytes of free and inactive pages in what macOS's vm_stat prints; None if it prints something else."""
    size = re.search(r"page size of (\d+) bytes", vm_stat)
    pages = re.findall(r"^Pages (?:free|inactive|speculative):\s+(\d+)\.", vm_stat, re.MULTILINE)
    return int(size[1]) * sum(map(int, pages)) if size and pages else None


def _kv_floats() -> int:
    """Of one token."""
    return 2 * AFM_CONFIG["num_hidden_layers"] * AFM_CONFIG["num_key_value_heads"] * AFM_CONFIG["head_dim"]

"""What the tests of resolve_folder share: repositories, the contents of a folder, offline mode, child processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

import arcee_mlx.checkpoint.hub

PACKAGE_PARENT = Path(arcee_mlx.checkpoint.hub.__file__).parents[2]
MODEL = {
    "config.json": b'{"model_type": "arcee"}',
    "generation_config.json": b'{"temperature": 0.5}',
    "model.safetensors": bytes(range(256)) * 300,
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'{"eos_token": "e"}',
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tools.jinja": b"{{ tools }}",
    "README.md": b"# model",
    "LICENSE": b"Apache-2.0",
}
UNWANTED = {
    "modeling_arcee.py": b"raise SystemExit('remote code ran')",
    "LICENSE.py": b"raise SystemExit('remote code ran')",
    "pytorch_model.bin": b"pickle",
    "model.pt": b"pickle",
    "model-q4.gguf": b"GGUF",
    "consolidated.safetensors": b"the weights again",
    "consolidated.safetensors.index.json": b"{}",
    "original/model.safetensors": b"the weights again",
    "model_parts/model.safetensors": b"the weights again",
    "adapter_model.safetensors": b"adapter",
    "additional_chat_templates/run.py": b"raise SystemExit('remote code ran')",
}
SHARDS = {
    "config.json": b'{"model_type": "arcee"}',
    "tokenizer.json": b'{"version": "1.0"}',
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "model-00001-of-00002.safetensors": b"one",
    "model-00002-of-00002.safetensors": b"two",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def run_python(code: str, *arguments: str, **environment: str) -> str:
    env = {key: value for key, value in os.environ.items() if not re.match(r"(?i)hf_|hugging|.*_proxy$", key)}
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    done = subprocess.run(
        command, env=env | environment, cwd=PACKAGE_PARENT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr

"""What every room's tests share: skipping by capability, and a tiny checkpoint with a tokenizer."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from arcee_mlx import ArceeConfig, ArceeForCausalLM, save_checkpoint
from arcee_mlx.model.relu2 import kernels

from emulator import Emulator
from loopback_hub import LoopbackHub

# Modules that assert on behalf of several test files: a failure shows what they compared, too.
pytest.register_assert_rewrite(
    "checkpoint_changes", "conversion_data", "engine_scene", "engine_script", "tokenizer_data"
)

TEXT = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, I thought "
    "I would sail about a little and see the watery part of the world. Grüße, naïve café, 日本語, 🙂 and 👩‍👩‍👧."
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_configure() -> None:
    mx.set_default_device(mx.cpu)  # so that tests mean the same on every machine; test_device.py is the GPU's
    # A shell that starts us in the background has Ctrl-C ignored, and programs we start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = {
        "metal": None if mx.metal.is_available() else "no Metal device",
        "cuda": None if mx.cuda.is_available() else "no NVIDIA device",
        "parity": None if find_spec("torch") and find_spec("transformers") else "torch is not installed",
        "slow": None if config.getoption("--slow") else "takes minutes; run with --slow",
        "network": "reaches the internet; no test does so by default",
    }
    for item in items:
        for marker, reason in missing.items():
            if reason is not None and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


def tiny_config(**changes: object) -> ArceeConfig:
    """A model of a few thousand weights, over the vocabulary of `write_tokenizer`."""
    values: dict[str, object] = {
        "vocab_size": 400,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "tie_word_embeddings": False,
    }
    return ArceeConfig(**(values | changes))  # type: ignore[arg-type]


def write_tokenizer(folder: Path, **generation_config: object) -> None:
    """A byte-level BPE of 400 ids with ChatML markers: <s> 0, </s> 1, <|im_start|> 2, <|im_end|> 3, <pad> 4."""
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 3], trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in special])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3], **generation_config}))


def write_checkpoint(folder: Path, **changes: object) -> ArceeForCausalLM:
    """A random model with its tokenizer, whose logits are far enough apart to have a clear best token."""
    mx.random.seed(0)
    model = ArceeForCausalLM(tiny_config(**changes))
    model.load_weights([(name, 0.5 * mx.random.normal(value.shape)) for name, value in flat(model)])
    save_checkpoint(model, folder)
    write_tokenizer(folder)
    return model


def flat(model: ArceeForCausalLM) -> list[tuple[str, mx.array]]:
    from mlx.utils import tree_flatten

    return tree_flatten(model.parameters())


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny float32 checkpoint folder with tokenizer; read only."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    write_checkpoint(folder)
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LoopbackHub]:
    """A running hub that huggingface_hub believes in, with a cache and home of its own and no way to a real host."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    find_address = socket.getaddrinfo

    def find_loopback(host: str, *args: Any, **kwargs: Any) -> Any:
        assert host == "127.0.0.1", f"a test reached out to {host}"
        return find_address(host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", find_loopback)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    with LoopbackHub() as server:
        # HF_ENDPOINT and its kin are read when huggingface_hub is imported: here the values it read are replaced, and
        # test_environment_alone_leads_to_the_hub starts a process with the variables themselves.
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "agents.json"), raising=False)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        close_session()
        yield server
    close_session()


@pytest.fixture(scope="session")
def compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the emulator keeps what it compiled."""
    return tmp_path_factory.mktemp("emulated")


@pytest.fixture
def emulator(compiled_kernels: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """Metal kernels run in an emulated GPU."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the emulator needs g++ on Linux; on a Mac the kernels run on Metal itself")
    emulator = Emulator(compiled_kernels)
    monkeypatch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
    monkeypatch.setattr(mx.cuda, "is_available", lambda: False)
    for cached in (kernels._build, kernels._settings):
        cached.cache_clear()
    yield emulator
    for cached in (kernels._build, kernels._settings):
        cached.cache_clear()

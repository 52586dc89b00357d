"""Perplexity, scores and vectors of texts, computed with transformers and torch alone, beside ours."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import TEXT, tiny_config, write_tokenizer

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import arcee_mlx  # noqa: E402
from arcee_mlx.checkpoint.opening import open_model  # noqa: E402
from arcee_mlx.checkpoint.tokenizer import read_tokenizer  # noqa: E402
from arcee_mlx.measure.perplexity import measure_perplexity  # noqa: E402
from arcee_mlx.measure.text import cut_windows  # noqa: E402

from reference import saved  # noqa: E402

TEXTS = ["Call me Ishmael.", "", "Grüße, 日本語 🙂", TEXT, "a"]
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder, and transformers' model and tokenizer of it."""
    folder = tmp_path_factory.mktemp("text") / "model"
    values = tiny_config().to_dict() | {"architectures": ["ArceeForCausalLM"], "rope_parameters": YARN}
    theirs = saved(json.loads(json.dumps(values)), folder)
    write_tokenizer(folder)
    return folder, theirs, transformers.AutoTokenizer.from_pretrained(folder)


def test_perplexity_is_that_of_strided_windows_in_transformers(both: tuple[Path, Any, Any]) -> None:
    """As transformers' guide to perplexity does it, with the token for the beginning of text in front of each window."""
    folder, model, tokenizer = both
    text, length, stride = TEXT * 3, 33, 20
    ids = tokenizer(text, add_special_tokens=False).input_ids
    nats: list[float] = []
    done = 0
    while done < len(ids):
        end = min(length - 1 if done == 0 else done + stride, len(ids))
        window = torch.tensor([[tokenizer.bos_token_id, *ids[max(0, end - (length - 1)) : end]]])
        labels = window.clone()
        labels[:, : -(end - done)] = -100
        with torch.no_grad():
            loss = model(window, labels=labels).loss
        nats.append(loss.item() * (end - done))
        done = end
    windows = cut_windows(read_tokenizer(folder), text, window_tokens=length, stride=stride, vocab_size=400)
    found = measure_perplexity(open_model(folder), windows)
    assert (found.tokens, found.text_bytes) == (len(ids), len(text.encode()))
    assert found.perplexity == pytest.approx(math.exp(sum(nats) / len(ids)), rel=2e-5)
    assert found.bits_per_byte == pytest.approx(sum(nats) / math.log(2) / len(text.encode()), rel=1e-5)


def test_scores_are_the_log_softmax_of_transformers(both: tuple[Path, Any, Any]) -> None:
    folder, model, tokenizer = both
    found = arcee_mlx.score(*arcee_mlx.load(folder), TEXTS)
    for text, own in zip(TEXTS, found, strict=True):
        encoding = tokenizer(text, return_offsets_mapping=True)
        ids = torch.tensor([encoding.input_ids])
        with torch.no_grad():
            logs = model(ids).logits[0].double().log_softmax(-1)
        expected = logs[torch.arange(ids.shape[1] - 1), ids[0, 1:]].numpy()
        np.testing.assert_allclose([token.logprob for token in own.tokens], expected, atol=1e-4)
        assert [(token.start, token.end) for token in own.tokens] == [tuple(o) for o in encoding.offset_mapping[1:]]
        assert own.logprob == pytest.approx(expected.sum(), abs=1e-2)


@pytest.mark.parametrize("pooling", ["mean", "last", "eos"])
def test_vectors_are_those_of_padded_batches_in_torch(both: tuple[Path, Any, Any], pooling: str) -> None:
    """As sentence-transformers pools: the mean under the attention mask, or the state where the mask ends."""
    folder, model, tokenizer = both
    texts = [text + (tokenizer.eos_token if pooling == "eos" else "") for text in TEXTS]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        states = model.model(**batch).last_hidden_state
    mask = batch.attention_mask[..., None].float()
    if pooling == "mean":
        vectors = (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    else:
        vectors = states[torch.arange(len(texts)), batch.attention_mask.sum(1) - 1]
    expected = torch.nn.functional.normalize(vectors, dim=1).numpy()
    found = arcee_mlx.embed(*arcee_mlx.load(folder), TEXTS, pooling)  # type: ignore[arg-type]
    np.testing.assert_allclose(found, expected, atol=2e-5)

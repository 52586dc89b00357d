"""What `measure_perplexity` says of a text: the numbers of the whole model in memory, by numpy; and `compare` agrees."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from arcee_mlx import ArceeForCausalLM, ArceeModel, load_model, save_checkpoint
from arcee_mlx.checkpoint.opening import open_model
from arcee_mlx.errors import ArceeError, InputError
from arcee_mlx.measure import divergence, perplexity, text_run
from arcee_mlx.measure.evaluate import compare
from arcee_mlx.measure.perplexity import Perplexity, measure_perplexity
from arcee_mlx.measure.text import Windows
from arcee_mlx.measure.text_run import count_part

from conftest import tiny_config

LONGROPE = {
    "rope_type": "longrope",
    "original_max_position_embeddings": 8,
    "short_factor": [1 + 0.1 * i for i in range(16)],
    "long_factor": [2 + 0.7 * i for i in range(16)],
}


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Several parts of everything, the last one ragged."""
    monkeypatch.setattr(perplexity, "_SLICE_ROWS", 150)
    monkeypatch.setattr(perplexity, "_TOKENS_TOGETHER", 20)
    monkeypatch.setattr(divergence, "_SLICE_ROWS", 150)
    monkeypatch.setattr(text_run, "_SEQUENCES_TOGETHER", 2)
    monkeypatch.setattr(text_run, "_BLOCK_BYTES", 3 * 12 * 64 * 4)  # three windows


def save(folder, change=None, model_class=ArceeForCausalLM, **changes):
    model = model_class(tiny_config(**changes))
    mx.random.seed(0)
    model.load_weights([(key, 0.3 * mx.random.normal(w.shape)) for key, w in tree_flatten(model.parameters())])
    if change is not None:
        change(model)
    save_checkpoint(model, folder)
    return open_model(folder)


@pytest.fixture
def windows():
    scored = np.random.default_rng(0).random((8, 12)) < 0.6
    scored[:, 0] = False
    return Windows(mx.random.randint(0, 400, (8, 12), key=mx.random.key(1)), scored, 200)


def losses(opened, windows):
    """Of the whole model in memory: float64 (M,) nats."""
    logits = np.array(load_model(opened.checkpoint.folder, dtype=mx.float32)(windows.ids)).astype(np.float64)
    logits -= logits.max(axis=-1, keepdims=True)
    logs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    own = np.take_along_axis(logs[:, :-1], np.array(windows.ids)[:, 1:, None], axis=-1)[..., 0]
    return -own[windows.scored[:, 1:]]


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (None, {}),
        (None, {"tie_word_embeddings": True}),
        (None, {"rope_parameters": LONGROPE}),
        (lambda model: nn.quantize(model, 32, 4), {}),
    ],
    ids=["float", "tied", "longrope", "4bit"],
)
def test_numbers_are_those_of_the_model_in_memory(tmp_path, windows, change, config):
    opened = save(tmp_path / "model", change, **config)
    found, expected = measure_perplexity(opened, windows), losses(opened, windows)
    assert found.tokens == expected.size == windows.scored.sum() and found.text_bytes == 200
    assert found.perplexity == pytest.approx(math.exp(expected.mean()), rel=2e-5)
    error = expected.std(ddof=1) / math.sqrt(expected.size)
    assert found.standard_error == pytest.approx(math.exp(expected.mean()) * error, rel=1e-4)
    assert found.bits_per_byte == pytest.approx(expected.sum() / math.log(2) / 200, rel=1e-5)
    assert found.to_dict()["bits_per_byte"] == found.bits_per_byte


def test_compare_counts_the_same_tokens_and_gives_the_same_numbers(tmp_path, windows):
    reference, other = save(tmp_path / "a"), save(tmp_path / "b", lambda model: nn.quantize(model, 32, 4))
    found = compare(reference, other, windows.ids, scored=windows.scored)
    for own, opened in (("perplexity_reference", reference), ("perplexity", other)):
        alone = measure_perplexity(opened, windows)
        assert found.tokens == alone.tokens
        assert getattr(found, own) == pytest.approx(alone.perplexity, rel=1e-6)
        assert getattr(found, own + "_error") == pytest.approx(alone.standard_error, rel=1e-5)
    assert 0 < found.kl_error < found.kl_mean


def test_a_text_in_blocks_is_compared_as_in_one(tmp_path, windows, monkeypatch):
    reference, other = save(tmp_path / "a"), save(tmp_path / "b", lambda model: nn.quantize(model, 32, 4))
    in_blocks = compare(reference, other, windows.ids).to_dict()
    monkeypatch.setattr(text_run, "_BLOCK_BYTES", 2**30)
    as_one = compare(reference, other, windows.ids).to_dict()
    for each in (in_blocks, as_one):
        each |= {
            f"{name}{layer['index']}": layer[name] for layer in each.pop("layers") for name in ("own", "accumulated")
        }
    assert in_blocks == pytest.approx(as_one, rel=1e-6)


def test_progress_comes_to_all_bytes(tmp_path, windows):
    told = []
    opened = save(tmp_path / "a")
    measure_perplexity(opened, windows, on_progress=lambda part, nbytes: told.append((part, nbytes)))
    assert [part for part, _ in told] == ["layers.0", "layers.1", "lm_head"] * 3
    assert sum(nbytes for _, nbytes in told) == count_part(opened)
    told.clear()
    compare(opened, opened, windows.ids, on_progress=lambda part, nbytes: told.append((part, nbytes)))
    assert len(told) == 9 and sum(nbytes for _, nbytes in told) == 2 * count_part(opened)


def test_memory_grows_neither_with_the_layers_nor_with_the_text(tmp_path, monkeypatch):
    peaks = {}
    for layers, rows in ((2, 3), (12, 3), (2, 300)):
        opened = save(tmp_path / f"{layers} {rows}", num_hidden_layers=layers, hidden_size=256, intermediate_size=2048)
        monkeypatch.setattr(text_run, "_BLOCK_BYTES", 3 * 12 * 256 * 4)
        scored = np.ones((rows, 12), dtype=np.bool_)
        scored[:, 0] = False
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        measure_perplexity(opened, Windows(mx.zeros((rows, 12), mx.int32), scored, 1))
        peaks[layers, rows] = mx.get_peak_memory() - before
    layer_bytes = count_part(opened, "layers.0.")
    assert layer_bytes > 4e6
    assert max(peaks.values()) < peaks[2, 3] + layer_bytes / 2 < 3 * layer_bytes


def test_a_decoder_without_a_head_is_refused(tmp_path, windows):
    with pytest.raises(InputError, match="without a language-model head"):
        measure_perplexity(save(tmp_path / "a", model_class=ArceeModel), windows)


def test_a_model_that_gives_no_numbers_is_named_with_its_layer(tmp_path, windows):
    def damage(model):
        model.layers[1].mlp.up_proj.weight = mx.full(model.layers[1].mlp.up_proj.weight.shape, float("nan"))

    with pytest.raises(ArceeError, match="damaged: layer 1 gives Inf or NaN"):
        measure_perplexity(save(tmp_path / "damaged", damage), windows)


@pytest.mark.parametrize("which", ["first", "none", "shape"])
def test_tokens_that_cannot_be_predicted_are_refused(tmp_path, windows, which):
    scored = np.zeros((8, 11 if which == "shape" else 12), dtype=np.bool_)
    scored[2, 0] = which == "first"
    opened = save(tmp_path / "a")
    with pytest.raises(InputError, match=r"scored has shape"):
        measure_perplexity(opened, Windows(windows.ids, scored, 1))


def test_a_hopeless_model_has_a_perplexity_that_is_a_number():
    found, error = perplexity.exponentiate(np.array([1e4, 2e4]))
    assert math.isfinite(found) and math.isfinite(error)
    assert Perplexity(tokens=2, text_bytes=1, perplexity=found, standard_error=error).bits_per_byte > 1000
    assert perplexity.standard_error(np.array([3.0])) == 0

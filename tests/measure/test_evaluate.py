"""What `compare` says of two checkpoints: the numbers of whole models in memory, and where the difference comes from."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from arcee_mlx import DEMO_MODEL, ArceeForCausalLM, ArceeModel, load_model, save_checkpoint
from arcee_mlx.checkpoint.opening import open_model
from arcee_mlx.errors import ArceeError, InputError
from arcee_mlx.measure import divergence, text_run
from arcee_mlx.measure.evaluate import compare, count_bytes
from arcee_mlx.measure.layers import CAUSAL

from conftest import tiny_config

FLOAT_DEMO = Path(__file__).parent.parent / "assets/demo"


def save(folder, change=None, *, seed=0, model_class=ArceeForCausalLM, **changes):
    """A random model, changed or not, as it lies on disk."""
    model = model_class(tiny_config(**changes))
    mx.random.seed(seed)
    model.load_weights([(key, 0.3 * mx.random.normal(w.shape)) for key, w in tree_flatten(model.parameters())])
    if change is not None:
        change(model)
    save_checkpoint(model, folder)
    return open_model(folder)


def quantize(bits=8, only="", mode="affine"):
    def change(model):
        nn.quantize(
            model, 32, bits, mode=mode, class_predicate=lambda path, m: only in path and hasattr(m, "to_quantized")
        )

    return change


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return save(tmp_path_factory.mktemp("reference") / "reference")


@pytest.fixture
def ids():
    return mx.random.randint(0, 400, (5, 12), key=mx.random.key(1))


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Several slices of everything, the last one ragged."""
    monkeypatch.setattr(divergence, "_SLICE_ROWS", 150)
    monkeypatch.setattr(divergence, "_TOKENS_TOGETHER", 20)
    monkeypatch.setattr(text_run, "_SEQUENCES_TOGETHER", 2)


def log_probabilities(opened, ids):
    """Of the whole model in memory, by the decoder's own forward; float64 (tokens, V)."""
    model = load_model(opened.checkpoint.folder, ArceeForCausalLM, dtype=mx.float32)
    logits = np.array(model(ids)[:, :-1]).astype(np.float64).reshape(-1, 400)
    logits -= logits.max(axis=1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_numbers_are_those_of_both_models_in_memory(tmp_path, ids, bits, tied):
    reference = save(tmp_path / "a", tie_word_embeddings=tied)
    other = save(tmp_path / "b", quantize(bits), tie_word_embeddings=tied)
    found = compare(reference, other, ids)
    expected_logs, found_logs = (log_probabilities(opened, ids) for opened in (reference, other))
    targets = np.array(ids[:, 1:]).reshape(-1)
    rows = np.arange(len(targets))
    kl = (np.exp(expected_logs) * (expected_logs - found_logs)).sum(axis=1)
    expected = {
        "perplexity_reference": np.exp(-expected_logs[rows, targets].mean()),
        "perplexity": np.exp(-found_logs[rows, targets].mean()),
        "kl_mean": kl.mean(),
        "kl_p99": np.quantile(kl, 0.99),
        "kl_max": kl.max(),
        "top1_agreement": (expected_logs.argmax(axis=1) == found_logs.argmax(axis=1)).mean(),
    }
    assert found.tokens == len(targets) == 55
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=2e-5, err_msg=name)
    assert kl.mean() > 1e-5


def test_errors_of_layers_are_those_of_the_layers_outputs(reference, tmp_path, ids):
    other = save(tmp_path / "b", quantize(4))
    streams = [
        load_model(opened.checkpoint.folder, dtype=mx.float32).forward(ids, output_hidden_states=True).hidden_states
        for opened in (reference, other)
    ]
    found = compare(reference, other, ids)
    # The last entry of hidden_states is after the final norm, so only the first layer's output is there.
    assert [layer.index for layer in found.layers] == [0, 1]
    expected, got = (np.array(stream[1]) for stream in streams)
    np.testing.assert_allclose(
        found.layers[0].accumulated, np.linalg.norm(got - expected) / np.linalg.norm(expected), rtol=1e-5
    )
    expected, got = (np.array(stream[2][:, :-1]) for stream in streams)
    np.testing.assert_allclose(found.hidden_error, np.linalg.norm(got - expected) / np.linalg.norm(expected), rtol=1e-5)


def test_a_layers_own_error_is_that_of_what_it_adds_to_the_references_input(reference, tmp_path, ids):
    other = save(tmp_path / "b", quantize(4))
    expected, got = (load_model(opened.checkpoint.folder, dtype=mx.float32) for opened in (reference, other))
    x, y = expected.forward(ids, output_hidden_states=True).hidden_states[:2]
    decoder = got.model
    positions = mx.arange(ids.shape[1])[None]
    rotation = decoder.rotary_emb.rotation(positions, decoder.rotary_emb.table(ids.shape[1]), mx.float32)
    difference = decoder.layers[0](x, rotation, CAUSAL, None)[0] - y
    found = compare(reference, other, ids).layers[0].own
    np.testing.assert_allclose(found, np.linalg.norm(difference) / np.linalg.norm(y - x), rtol=1e-5)


def test_an_error_is_charged_to_the_layer_that_makes_it(reference, tmp_path, ids):
    found = compare(reference, save(tmp_path / "b", quantize(4, only="layers.0.")), ids)
    assert found.layers[0].own > 0.01 and found.layers[1].own == 0 and found.layers[1].accumulated > 0
    assert [layer.index for layer in found.worst_layers(1)] == [0]
    found = compare(reference, save(tmp_path / "c", quantize(4, only="layers.1.")), ids)
    assert found.layers[0].own == found.layers[0].accumulated == 0 and found.layers[1].own > 0.01
    assert [layer.index for layer in found.worst_layers()] == [1, 0]


def test_a_checkpoint_does_not_differ_from_itself(reference, ids):
    found = compare(reference, reference, ids)
    assert found.kl_max == found.hidden_error == 0 and found.top1_agreement == 1
    assert found.perplexity == found.perplexity_reference
    assert all(layer.own == layer.accumulated == 0 for layer in found.layers)


def test_a_layer_that_adds_nothing_divides_by_nothing(tmp_path, ids):
    def empty(model):
        model.layers[0].self_attn.o_proj.weight *= 0
        model.layers[0].mlp.down_proj.weight *= 0

    found = compare(save(tmp_path / "a", empty), save(tmp_path / "b", empty), ids)
    assert found.layers[0].own == 0
    json.dumps(compare(save(tmp_path / "c", empty), save(tmp_path / "d"), ids).to_dict(), allow_nan=False)


@pytest.mark.parametrize("change", [None, quantize(4)], ids=["float", "4bit"])
def test_down_projections_by_neuron_are_the_same_model(reference, tmp_path, ids, change):
    other = save(tmp_path / "b", down_proj_layout="by_neuron")
    weights = dict(tree_flatten(load_model(reference.checkpoint.folder).parameters()))
    for i in range(2):
        key = f"model.layers.{i}.mlp.down_proj.weight"
        weights[f"{key}_by_neuron"] = weights.pop(key).T
    model = load_model(other.checkpoint.folder)
    model.load_weights(list(weights.items()))
    if change is not None:
        change(model)
    save_checkpoint(model, tmp_path / "c")
    found = compare(reference, open_model(tmp_path / "c"), ids)
    assert found.kl_max < 1e-9 if change is None else 1e-5 < found.kl_mean < 0.5


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
def test_small_floats_are_read_as_what_they_stand_for(reference, tmp_path, ids, mode):
    # Not the embedding: MLX's own gives bfloat16 in these modes.
    other = save(tmp_path / "b", quantize(bits=int(mode[-1]), mode=mode, only="layers"))
    expected, got = (log_probabilities(opened, ids) for opened in (reference, other))
    kl = (np.exp(expected) * (expected - got)).sum(axis=1)
    np.testing.assert_allclose(compare(reference, other, ids).kl_mean, kl.mean(), rtol=2e-5)


def test_of_decoders_without_a_head_only_hidden_states_are_compared(reference, tmp_path, ids):
    base, quantized = (
        save(tmp_path / name, change, model_class=ArceeModel) for name, change in (("a", None), ("b", quantize(8)))
    )
    for first, second in ((base, quantized), (reference, quantized), (base, save(tmp_path / "c", quantize(8)))):
        found = compare(first, second, ids)
        assert found.kl_mean is None and found.perplexity is None and found.top1_agreement is None
        assert found.hidden_error > 0 and len(found.layers) == 2


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("model.embed_tokens.weight", "the embedding"),
        ("model.layers.1.mlp.up_proj.weight", "layer 1"),
        ("model.norm.weight", "the final norm"),
        ("lm_head.weight", "the head"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_gives_no_numbers_is_named_with_its_layer(reference, tmp_path, ids, key, place, value):
    def damage(model):
        weights = dict(tree_flatten(model.parameters()))
        model.load_weights([(key, mx.full(weights[key].shape, value))], strict=False)

    damaged = save(tmp_path / "damaged", damage)
    for pair in ((reference, damaged), (damaged, reference)):
        with pytest.raises(ArceeError, match=f"damaged: {place} gives Inf or NaN"):
            compare(*pair, ids)


@pytest.mark.parametrize("size", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_models_of_different_sizes_are_refused(reference, tmp_path, ids, size):
    other = save(tmp_path / "other", **{size: {"num_hidden_layers": 3, "hidden_size": 96, "vocab_size": 401}[size]})
    with pytest.raises(InputError, match=f"{size} is .*expected"):
        compare(reference, other, ids)


@pytest.mark.parametrize("shape", [(3, 1), (0, 12), (12,)])
def test_windows_without_a_token_to_predict_are_refused(reference, shape):
    with pytest.raises(InputError, match="ids have shape"):
        compare(reference, reference, mx.zeros(shape, mx.int32))


def test_ids_of_another_vocabulary_are_refused(reference):
    with pytest.raises(InputError, match="ids holds 400"):
        compare(reference, reference, mx.array([[1, 400]]))


def test_progress_comes_to_all_bytes_of_both(reference, tmp_path, ids):
    told = []
    other = save(tmp_path / "b", quantize(8))
    compare(reference, other, ids, on_progress=lambda part, nbytes: told.append((part, nbytes)))
    assert [part for part, _ in told] == ["layers.0", "layers.1", "lm_head"]
    total = sum(entry.nbytes for opened in (reference, other) for entry in opened.checkpoint.entries.values())
    assert sum(nbytes for _, nbytes in told) == total == count_bytes(reference, other)


def test_memory_does_not_grow_with_the_number_of_layers(tmp_path, monkeypatch):
    ids = mx.zeros((1, 4), mx.int32)
    peaks = {}
    for layers in (2, 12):
        shape = {"num_hidden_layers": layers, "hidden_size": 256, "intermediate_size": 2048}
        opened = save(tmp_path / str(layers), **shape)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        compare(opened, opened, ids)
        peaks[layers] = mx.get_peak_memory() - before
    layer_bytes = text_run.count_part(opened, "layers.0.")
    assert layer_bytes > 4e6
    assert peaks[12] < peaks[2] + layer_bytes / 2
    assert peaks[12] < 3 * layer_bytes


def test_the_demo_in_8_bits_is_its_float_original_but_for_little():
    ids = mx.array([[0, *range(100, 130)]])
    found = compare(open_model(FLOAT_DEMO), open_model(DEMO_MODEL), ids)
    assert 0 < found.kl_mean < 0.01 and found.hidden_error < 0.05
    assert all(0 < layer.own < 0.05 for layer in found.layers)

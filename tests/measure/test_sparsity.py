"""What `measure_sparsity` counts: the zeros of whole models in memory, by the definition of each number."""

import json
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from arcee_mlx import ArceeForCausalLM, ArceeModel, load_model, save_checkpoint
from arcee_mlx.checkpoint.opening import open_model
from arcee_mlx.errors import ArceeError, InputError
from arcee_mlx.measure.sparsity import LayerSparsity, measure_sparsity

from conftest import tiny_config


def save(folder, change=None, *, model_class=ArceeForCausalLM, **changes):
    model = model_class(tiny_config(**changes))
    mx.random.seed(0)
    model.load_weights([(key, 0.3 * mx.random.normal(w.shape)) for key, w in tree_flatten(model.parameters())])
    if change is not None:
        change(model)
    save_checkpoint(model, folder)
    return open_model(folder)


@pytest.fixture
def ids():
    """More windows than are run at once, and a length that no step divides."""
    return mx.random.randint(0, 400, (5, 13), key=mx.random.key(1))


def find_active(folder, ids):
    """bool (layers, N, T, F) of the whole model in memory."""
    model = load_model(folder, dtype="float32")
    decoder = model if isinstance(model, ArceeModel) else model.model
    found = []

    def watch(activation):
        def act(x):
            found.append(np.array(activation(x) != 0))
            return activation(x)

        return act

    for layer in decoder.layers:
        layer.mlp.act_fn = watch(layer.mlp.act_fn)
    mx.eval(model(ids))
    return np.stack(found)


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "relu"}, {"mlp_bias": True}, {"model_class": ArceeModel}])
def test_the_numbers_are_those_of_the_whole_model(tmp_path, ids, changes) -> None:
    profile = measure_sparsity(save(tmp_path / "model", **changes), ids)
    expected = find_active(tmp_path / "model", ids)
    assert 0.2 < profile.zeros < 0.8
    assert profile.zeros == pytest.approx(1 - expected.mean())
    for layer, active in zip(profile.layers, expected, strict=True):
        assert layer.zeros == pytest.approx(1 - active.mean(axis=-1))
        assert layer.firing_rates == pytest.approx(active.mean(axis=(0, 1)))
        assert list(layer.active) == [1, 2, 4, 8]
        for tokens, share in layer.active.items():
            windows = [active[:, i : i + tokens].any(axis=1) for i in range(0, 14 - tokens, tokens)]
            assert share == pytest.approx(np.mean(windows)), tokens


@pytest.mark.parametrize("layout", ["standard", "by_neuron"])
def test_quantized_weights_count_as_what_they_stand_for(tmp_path, ids, layout) -> None:
    opened = save(tmp_path / "model", lambda model: nn.quantize(model, 32, 4), down_proj_layout=layout)
    profile = measure_sparsity(opened, ids)
    expected = find_active(tmp_path / "model", ids)
    for layer, active in zip(profile.layers, expected, strict=True):
        # Products are summed in another order: an input next to zero may change its sign.
        assert layer.zeros == pytest.approx(1 - active.mean(axis=-1), abs=1.5 / 128)


def test_neurons_pushed_down_are_dead_and_neurons_pushed_up_always_on(tmp_path, ids) -> None:
    def change(model):
        push = mx.array([-1e4] * 32 + [1e4] * 16 + [0.0] * 80)
        model.model.layers[1].mlp.up_proj.bias = push

    first, second = measure_sparsity(save(tmp_path / "model", change, mlp_bias=True), ids).layers
    assert second.firing_rates[:48].tolist() == [0.0] * 32 + [1.0] * 16
    assert second.dead >= 0.25 > first.dead and second.always_on >= 0.125 > first.always_on


def test_a_rare_neuron_fires_for_less_than_a_hundredth_of_the_tokens() -> None:
    rates = np.array([0.0, 0.009, 0.01, 1.0])
    layer = LayerSparsity(index=3, zeros=np.array([[0.5, 1.0]]), firing_rates=rates, active={1: 0.25})
    assert (layer.dead, layer.rare, layer.always_on) == (0.25, 0.5, 0.25)
    values = json.loads(json.dumps(layer.to_dict()))
    assert values["zeros"] == {"mean": 0.75, "min": 0.5, "max": 1.0}
    assert values["firing_rates"]["quantiles"]["0.5"] == pytest.approx(0.0095)


def test_the_state_of_random_numbers_and_progress(tmp_path, ids) -> None:
    opened, told = save(tmp_path / "model"), []
    before = mx.random.state[0].tolist()
    measure_sparsity(opened, ids, on_layer=told.append)
    assert told == [0, 1] and mx.random.state[0].tolist() == before


def test_an_activation_without_zeros_is_refused(tmp_path, ids) -> None:
    opened = save(tmp_path / "model", hidden_act="silu")
    with pytest.raises(InputError, match=r"config.json: hidden_act is 'silu'; expected 'relu2' or 'relu'"):
        measure_sparsity(opened, ids)


@pytest.mark.parametrize("shape", [(2, 7), (0, 8), (8,)])
def test_windows_too_short_for_eight_tokens_at_once_are_refused(tmp_path, shape) -> None:
    with pytest.raises(InputError, match="8 tokens at least"):
        measure_sparsity(save(tmp_path / "model"), mx.zeros(shape, mx.int32))


def test_ids_outside_the_vocabulary_are_refused(tmp_path, ids) -> None:
    opened = save(tmp_path / "model")
    with pytest.raises(InputError, match="ids"):
        measure_sparsity(replace(opened, config=replace(opened.config, vocab_size=300)), ids)


def test_damaged_weights_are_named_by_their_layer(tmp_path, ids) -> None:
    def change(model):
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")

    with pytest.raises(ArceeError, match="layer 1 gives Inf or NaN"):
        measure_sparsity(save(tmp_path / "model", change), ids)

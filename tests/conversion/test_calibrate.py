"""Calibrated conversions: closer to the float model, whole for every form of source, and the same after a Ctrl-C."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from arcee_mlx import ArceeConfig, ArceeModel, load_model
from arcee_mlx.conversion import calibrate, run, work_folder
from arcee_mlx.conversion.fold import Scaling
from arcee_mlx.conversion.progress import Quiet
from arcee_mlx.conversion.recipes import Quantization, Recipe, Rule
from arcee_mlx.conversion.run import convert
from arcee_mlx.conversion.texts import VERIFICATION_TEXT, read_sample
from arcee_mlx.errors import ArceeError, ConversionError, InputError, TokenizerError
from arcee_mlx.model.config import read_config

from conftest import TEXT, flat, write_tokenizer
from conversion_data import FLOAT, assert_nothing_left, random_weights, read_weights, write_source

DEMO = Path(__file__).parents[1] / "assets" / "demo"
SHAPE = {
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "max_position_embeddings": 256,
}
GROUPS_OF_32 = Quantization(bits=4, group_size=32)
FOUR_BITS = Recipe(quantization=GROUPS_OF_32, layout="standard")
BY_NEURON = Recipe(quantization=GROUPS_OF_32, layout="by_neuron")
MIXED = Recipe(
    quantization=GROUPS_OF_32,
    rules=[
        Rule(tensors=["*.up_proj", "model.embed_tokens"], quantization=None, layers=None),
        Rule(tensors=["*.down_proj"], quantization=None, layers=[0]),
        Rule(tensors=["*.v_proj", "*.down_proj"], quantization=Quantization(bits=8, group_size=64)),
        Rule(tensors=["*.o_proj"], quantization=Quantization(bits=3, group_size=64)),
    ],
)
OPTIONS = {"num_samples": 4, "sequence_length": 48}


@pytest.fixture(scope="module", autouse=True)
def little_to_verify_on():
    """Calibration is followed by a comparison, which other tests are about."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(run, "VERIFICATION_SAMPLES", 1)
        monkeypatch.setattr(run, "SEQUENCE_LENGTH", 32)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT * 30)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint whose hidden states lie near a few directions, as those of trained models do; read only."""
    return write_model(tmp_path_factory.mktemp("model") / "in")


def write_model(folder, **changes):
    config = ArceeConfig.from_dict(SHAPE | {"num_hidden_layers": 2} | changes)
    if changes.get("architecture") == "ArceeModel":
        weights = random_weights(config, ArceeModel)
    else:
        weights = random_weights(config, tied=config.tie_word_embeddings)
    prefix = "" if changes.get("architecture") == "ArceeModel" else "model."
    mx.random.seed(11)
    directions = mx.random.normal((8, 64))
    mixed = mx.random.normal((400, 8)) @ directions + 0.3 * mx.random.normal((400, 64))
    weights[f"{prefix}embed_tokens.weight"] = mixed * 0.1
    weights = {key: value * (3.0 if "layers" in key and "norm" not in key else 1) for key, value in weights.items()}
    source = write_source(folder, weights, **(SHAPE | changes))
    write_tokenizer(source)
    return source


def mean_divergence(folder, source, ids):
    """KL(source || folder) in nats a token."""
    wanted, found = (log_probabilities(load_model(path), ids) for path in (source, folder))
    return float((mx.exp(wanted) * (wanted - found)).sum(axis=-1).mean())


def log_probabilities(model, ids):
    logits = mx.concatenate([model(row[None]) for row in ids])
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


# How good it is


@pytest.mark.parametrize("recipe", [FOUR_BITS, BY_NEURON], ids=["standard", "by_neuron"])
def test_it_is_closer_to_the_float_model_on_text_it_never_saw(source, text, tmp_path, recipe):
    held_out = read_sample(VERIFICATION_TEXT, source, read_config(source), num_samples=8, sequence_length=64).ids
    convert(source, tmp_path / "nearest", recipe)
    convert(source, tmp_path / "calibrated", recipe, calibrate=text, num_samples=16, sequence_length=64)
    nearest, calibrated = (mean_divergence(tmp_path / name, source, held_out) for name in ("nearest", "calibrated"))
    assert calibrated < 0.75 * nearest
    assert {key: (v.shape, v.dtype) for key, v in read_weights(tmp_path / "nearest").items()} == {
        key: (v.shape, v.dtype) for key, v in read_weights(tmp_path / "calibrated").items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["standard", "by_neuron"])
def test_a_trained_model_is_closer_on_text_it_never_saw(tmp_path, layout):
    held_out = read_sample(VERIFICATION_TEXT, DEMO, read_config(DEMO), num_samples=4, sequence_length=128).ids
    recipe = Recipe(layout=layout)
    convert(DEMO, tmp_path / "nearest", recipe)
    convert(DEMO, tmp_path / "calibrated", recipe, calibrate=True, num_samples=24, sequence_length=128)
    nearest, calibrated = (mean_divergence(tmp_path / name, DEMO, held_out) for name in ("nearest", "calibrated"))
    assert calibrated < 0.75 * nearest


# Every form of source and recipe


SOURCES = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "base model": {"architecture": "ArceeModel"},
    "another activation": {"hidden_act": "silu"},
    "dropout": {"attention_dropout": 0.5},
    "rows that no group divides": {"hidden_size": 64, "intermediate_size": 136},
    "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
}


@pytest.mark.parametrize("recipe", [FOUR_BITS, BY_NEURON, MIXED], ids=["standard", "by_neuron", "mixed"])
@pytest.mark.parametrize("variant", SOURCES)
def test_every_form_of_source_and_recipe_gives_a_model_near_the_source(tmp_path, text, variant, recipe):
    changes = SOURCES[variant]
    source = write_model(tmp_path / "in", **changes)
    convert(source, tmp_path / "out", recipe, calibrate=text, **OPTIONS)
    convert(source, tmp_path / "nearest", recipe)
    ids = read_sample(text, source, read_config(source), **OPTIONS).ids
    model, plain, wanted = (load_model(path) for path in (tmp_path / "out", tmp_path / "nearest", source))
    assert type(model) is type(wanted)
    assert model.config.down_proj_layout == recipe.choose_layout(wanted.config.hidden_act)
    assert {key: (v.shape, v.dtype) for key, v in flat(model)} == {key: (v.shape, v.dtype) for key, v in flat(plain)}
    error, plain_error = (float(mx.square(own(ids) - wanted(ids)).mean()) for own in (model, plain))
    assert error < 0.9 * plain_error


def test_a_recipe_that_rounds_nothing_is_refused(source, text, tmp_path):
    with pytest.raises(InputError, match="quantizes nothing"):
        convert(source, tmp_path / "out", FLOAT, calibrate=text, **OPTIONS)
    assert_nothing_left(tmp_path)


def test_packed_scales_that_float16_holds_are_finite(source, text, tmp_path):
    recipe = Recipe(quantization=GROUPS_OF_32, dtype="float16", layout="standard")
    convert(source, tmp_path / "out", recipe, calibrate=text, **OPTIONS)
    scales = {key: value for key, value in read_weights(tmp_path / "out").items() if key.endswith("scales")}
    assert scales and all(mx.isfinite(s).all().item() and (s > 0).all().item() for s in scales.values())


def test_zero_weights_stay_zero(text, tmp_path):
    """Whole groups of zeros have no range: their scale may be anything but 0, which float16 makes of small numbers."""
    weights = random_weights(ArceeConfig.from_dict(SHAPE | {"num_hidden_layers": 2}))
    for name in ("model.embed_tokens", "model.layers.0.mlp.down_proj", "lm_head"):
        weights[f"{name}.weight"][3:9] = 0
    source = write_source(tmp_path / "in", weights, **SHAPE)
    write_tokenizer(source)
    convert(source, tmp_path / "out", Recipe(quantization=GROUPS_OF_32, dtype="float16"), calibrate=text, **OPTIONS)
    rows = load_model(tmp_path / "out").model.embed_tokens(mx.arange(3, 9))
    assert not rows.any().item()


def test_a_calibration_draws_no_random_number(source, text, tmp_path):
    mx.random.seed(42)
    before = [state.tolist() for state in mx.random.state]
    numpy_before = np.random.get_state()[1].tolist()
    convert(source, tmp_path / "out", calibrate=text, recipe=FOUR_BITS, **OPTIONS)
    assert [state.tolist() for state in mx.random.state] == before
    assert np.random.get_state()[1].tolist() == numpy_before


def test_the_same_command_gives_the_same_bytes(text, tmp_path):
    source = write_model(tmp_path / "in", attention_dropout=0.5)
    for name in ("a", "b"):
        convert(source, tmp_path / name, BY_NEURON, calibrate=text, **OPTIONS)
    assert read_files(tmp_path / "a") == read_files(tmp_path / "b")


# Cut off and gone on with


class Stopped(Quiet):
    """Presses Ctrl-C when a tensor is written."""

    def __init__(self, tensor):
        self.tensor = tensor

    def advance(self, tensor, done_bytes):
        if tensor == self.tensor:
            raise KeyboardInterrupt


@pytest.fixture(scope="module", params=["standard", "by_neuron"])
def uninterrupted(request, tmp_path_factory, text):
    """A conversion with scalings to remember, of large neurons in float16: its source, its recipe and its files."""
    folder = tmp_path_factory.mktemp("whole")
    weights = random_weights(ArceeConfig.from_dict(SHAPE | {"num_hidden_layers": 2, "mlp_bias": True}))
    weights["model.layers.1.mlp.up_proj.weight"][::9] *= 90
    source = write_source(folder / "in", weights, mlp_bias=True, **SHAPE)
    write_tokenizer(source)
    recipe = Recipe(quantization=GROUPS_OF_32, dtype="float16", layout=request.param)
    convert(source, folder / "out", recipe, calibrate=text, **OPTIONS)
    return source, recipe, read_files(folder / "out")


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.0.mlp.up_proj.bias",
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.up_proj.weight",
        "lm_head.weight",
    ],
)
def test_after_ctrl_c_the_same_command_goes_on_and_gives_the_same_bytes(
    tmp_path, text, monkeypatch, uninterrupted, tensor
):
    monkeypatch.setattr(calibrate, "_HEAD_ROWS", 150)  # a head in pieces
    source, recipe, expected = uninterrupted
    options = OPTIONS | {"calibrate": text}
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", recipe, reporter=Stopped(tensor), **options)
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").exists()
    counted = Counted()
    convert(source, tmp_path / "out", recipe, reporter=counted, **options)
    assert 0 < counted.done_before < counted.total
    assert read_files(tmp_path / "out") == expected


class Counted(Quiet):
    """Remembers what was done before."""

    def begin(self, stage, total_bytes, done_bytes=0):
        if stage == "calibrate":
            self.total, self.done_before = total_bytes, done_bytes


def read_files(folder):
    files = (
        path for path in folder.iterdir() if path.suffix in (".safetensors", ".json") and path.name != "conversion.json"
    )
    return {path.name: path.read_bytes() for path in files}


# What is refused


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_forms_other_than_affine_are_refused(source, text, tmp_path, mode):
    rule = Rule(tensors=["*.v_proj"], quantization=Quantization(mode=mode))
    for recipe in (Recipe(quantization=Quantization(mode=mode)), Recipe(rules=[rule])):
        with pytest.raises(InputError, match=rf"{mode}; expected mode affine; leave --calibrate out"):
            convert(source, tmp_path / "out", recipe, calibrate=text, **OPTIONS)
    assert_nothing_left(tmp_path)


def test_non_finite_weights_cannot_be_allowed(source, text, tmp_path):
    with pytest.raises(InputError, match="calibration came with allow_nonfinite"):
        convert(source, tmp_path / "out", FOUR_BITS, calibrate=text, allow_nonfinite=True, **OPTIONS)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.post_attention_layernorm",
        "model.norm",
    ],
)
def test_a_weight_that_is_not_finite_is_refused_by_name(text, tmp_path, name, value, tied):
    config = ArceeConfig.from_dict(SHAPE | {"num_hidden_layers": 2, "tie_word_embeddings": tied})
    weights = random_weights(config)
    weight = weights[f"{name}.weight"]
    weight[(-1,) * weight.ndim] = value
    source = write_source(tmp_path / "in", weights, tie_word_embeddings=tied, **SHAPE)
    write_tokenizer(source)
    with pytest.raises(ConversionError, match=rf"model\.safetensors: '{name}\.weight' holds Inf or NaN"):
        convert(source, tmp_path / "out", FOUR_BITS, calibrate=text, **OPTIONS)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("value", [1e30, 3e38])
@pytest.mark.parametrize("name", ["model.embed_tokens", "model.layers.0.mlp.up_proj", "lm_head"])
def test_a_weight_out_of_all_proportion_is_an_error_of_ours(text, tmp_path, name, value):
    weights = random_weights(ArceeConfig.from_dict(SHAPE | {"num_hidden_layers": 2}))
    weights[f"{name}.weight"][-1, -1] = value
    source = write_source(tmp_path / "in", weights, **SHAPE)
    write_tokenizer(source)
    with pytest.raises(ArceeError, match="expected"):
        convert(source, tmp_path / "out", FOUR_BITS, calibrate=text, **OPTIONS)
    assert_nothing_left(tmp_path)


def test_texts_that_cannot_be_used_are_refused(source, tmp_path):
    (tmp_path / "short.txt").write_text("Call me Ishmael.")
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    for name, part in (
        ("short.txt", r"short\.txt: the text has \d+ tokens; expected at least 16"),
        ("latin.txt", r"latin\.txt: is not UTF-8 at byte 2; expected a text in UTF-8"),
        ("none.txt", r"none\.txt: cannot be read .*; expected a text file"),
        (".", "cannot be read .*; expected a text file"),
    ):
        with pytest.raises(InputError, match=part):
            convert(source, tmp_path / "out", FOUR_BITS, calibrate=tmp_path / name, **OPTIONS)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    "options", [{"num_samples": 0}, {"num_samples": -3}, {"sequence_length": 1}, {"sequence_length": 0}]
)
def test_numbers_out_of_range_are_refused(source, text, tmp_path, options):
    with pytest.raises(
        InputError, match=f"{next(iter(options))} .*{next(iter(options.values()))}.*; expected at least 1, and 8 to "
    ):
        convert(source, tmp_path / "out", FOUR_BITS, calibrate=text, **(OPTIONS | options))
    assert_nothing_left(tmp_path)


def test_a_source_without_a_tokenizer_is_refused(text, tmp_path):
    source = write_source(tmp_path / "in", **SHAPE)
    with pytest.raises(TokenizerError, match="tokenizer"):
        convert(source, tmp_path / "out", FOUR_BITS, calibrate=text, **OPTIONS)
    assert_nothing_left(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(text, tmp_path):
    source = write_source(tmp_path / "in", **(SHAPE | {"vocab_size": 133}))
    write_tokenizer(source)
    with pytest.raises(InputError, match=r"text\.txt: the tokenized text holds \d+; expected ids from 0 to 132"):
        convert(source, tmp_path / "out", FOUR_BITS, calibrate=text, **OPTIONS)
    assert_nothing_left(tmp_path)


# The sample, and rescaling


def test_samples_are_spread_over_the_text_and_no_longer_than_the_model_has_positions(source, text, tmp_path):
    config = read_config(source)
    whole = read_sample(VERIFICATION_TEXT, source, config, num_samples=10**6, sequence_length=64)
    part = read_sample(VERIFICATION_TEXT, source, config, num_samples=4, sequence_length=64)
    assert part.ids.shape == (4, 64) and whole.ids.shape[0] > 20 and part.name == "verification.txt"
    places = [next(i for i, row in enumerate(whole.ids.tolist()) if row == own) for own in part.ids.tolist()]
    assert places[0] == 0 and places[-1] >= whole.ids.shape[0] // 2
    convert(source, tmp_path / "out", FOUR_BITS, calibrate=text, num_samples=2, sequence_length=10**6)


@pytest.mark.parametrize(("recipe", "scales"), [(FOUR_BITS, True), (BY_NEURON, False)], ids=["standard", "by_neuron"])
def test_neurons_are_rescaled_only_where_they_share_a_scale(tmp_path, text, monkeypatch, recipe, scales):
    config = ArceeConfig.from_dict(SHAPE | {"num_hidden_layers": 2})
    weights = random_weights(config)
    weights["model.layers.0.mlp.up_proj.weight"] *= mx.exp(1.5 * mx.random.normal((128, 1), key=mx.random.key(1)))
    source = write_source(tmp_path / "in", weights, **SHAPE)
    write_tokenizer(source)
    facts, chosen = {}, []
    finish, choose = work_folder.WorkFolder.finish, calibrate.choose_factors

    def note_facts(self, name, own, sync):
        facts[name] = own
        finish(self, name, own, sync)

    def note_factors(*args):
        chosen.append(choose(*args))
        return chosen[-1]

    monkeypatch.setattr(work_folder.WorkFolder, "finish", note_facts)
    monkeypatch.setattr(calibrate, "choose_factors", note_factors)
    convert(source, tmp_path / "out", recipe, calibrate=text, **OPTIONS)
    if not scales:
        assert not chosen and not any(facts.values())
        return
    assert len(chosen) == 2 and not (chosen[0] == 1).all()
    up, down = (Scaling.from_dict(facts[f"model.layers.0.mlp.{name}.weight"]) for name in ("up_proj", "down_proj"))
    np.testing.assert_allclose(np.array(down.columns), chosen[0], rtol=1e-5)
    np.testing.assert_allclose(np.array(up.rows), chosen[0] ** -0.5, rtol=1e-5)

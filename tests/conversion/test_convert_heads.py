"""Classifiers through `convert`: the decoder quantized, the head a float, and a checkpoint that says what it is."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest

from arcee_mlx import (
    ArceeConfig,
    ArceeForQuestionAnswering,
    ArceeForSequenceClassification,
    ArceeForTokenClassification,
    ArceeModel,
    cli,
    load_model,
)
from arcee_mlx.conversion import run
from arcee_mlx.conversion.prepare import plan_conversion
from arcee_mlx.conversion.recipes import Quantization, Recipe, Rule
from arcee_mlx.conversion.run import convert
from arcee_mlx.model.relu2.down import DownByNeuron

from conftest import TEXT, write_tokenizer
from conversion_data import IDS, SHAPE, random_weights, read_weights, write_source

SEQUENCE, TOKEN, QA = ArceeForSequenceClassification, ArceeForTokenClassification, ArceeForQuestionAnswering
HEADS = {SEQUENCE: "score", TOKEN: "score", QA: "qa_outputs"}
LABELS = {"id2label": {"0": "a", "1": "b", "2": "c"}}
FOUR_BITS = Recipe(quantization=Quantization(bits=4, group_size=64))


def source(folder, cls, **changes):
    values = {"vocab_size": 400, "pad_token_id": 4, "bos_token_id": 0, "eos_token_id": 1, **LABELS, **changes}
    weights = random_weights(ArceeConfig.from_dict(SHAPE | values), cls)
    write_source(folder, weights, dtype="F32", architecture=cls.__name__, **values)
    write_tokenizer(folder)
    return folder


def scores(model):
    output = model.forward(IDS)
    return output.start_logits if hasattr(output, "start_logits") else output.logits


@pytest.mark.parametrize("layout", ["standard", "by_neuron"])
@pytest.mark.parametrize("cls", HEADS)
def test_the_decoder_is_quantized_and_the_head_stays_a_float(tmp_path, cls, layout):
    folder = source(tmp_path / "in", cls)
    result = convert(folder, tmp_path / "out", Recipe(quantization=Quantization(bits=8, group_size=64), layout=layout))
    model, original = load_model(tmp_path / "out"), load_model(folder)
    head = getattr(model, HEADS[cls])
    assert type(model) is cls and type(head) is nn.Linear and not result.float_layers
    before = getattr(original, HEADS[cls])
    assert mx.array_equal(head.weight, before.weight) and (cls is SEQUENCE or mx.array_equal(head.bias, before.bias))
    quantized = [path for path, module in model.named_modules() if hasattr(module, "bits")]
    assert len(quantized) == 1 + 6 * SHAPE["num_hidden_layers"]
    assert 0 < mx.abs(scores(model) - scores(original)).max() < 0.1 * mx.abs(scores(original)).max()
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}


@pytest.mark.parametrize("cls", HEADS)
def test_rules_written_for_a_causal_model_hold_for_its_decoder(tmp_path, cls):
    rules = [
        Rule(tensors=["model.layers.*.mlp.down_proj"], quantization=None),
        Rule(tensors=["model.embed_tokens"], quantization=Quantization(bits=8, group_size=32)),
        Rule(tensors=["*"], quantization=Quantization(bits=6, group_size=32), layers=[-1]),
    ]
    convert(source(tmp_path / "in", cls), tmp_path / "out", Recipe(quantization=FOUR_BITS.quantization, rules=rules))
    decoder = load_model(tmp_path / "out").base_model
    assert type(decoder.layers[0].mlp.down_proj) is DownByNeuron and decoder.embed_tokens.bits == 8
    assert [layer.mlp.up_proj.bits for layer in decoder.layers] == [4, 6]


@pytest.mark.parametrize("cls", HEADS)
def test_a_classifier_is_calibrated_and_compared_too(tmp_path, cls, monkeypatch):
    monkeypatch.setattr(run, "VERIFICATION_SAMPLES", 1)
    monkeypatch.setattr(run, "SEQUENCE_LENGTH", 32)
    folder = source(tmp_path / "in", cls)
    (tmp_path / "text.txt").write_text(TEXT * 8)
    result = convert(
        folder, tmp_path / "out", FOUR_BITS, calibrate=tmp_path / "text.txt", num_samples=2, sequence_length=32
    )
    assert result.comparison.hidden_error < 0.5 and result.comparison.perplexity is None
    model, original = load_model(tmp_path / "out"), load_model(folder)
    assert mx.array_equal(getattr(model, HEADS[cls]).weight, getattr(original, HEADS[cls]).weight)


@pytest.mark.parametrize("cls", [*HEADS, ArceeModel])
def test_the_card_says_how_to_use_it(tmp_path, cls):
    convert(source(tmp_path / "in", cls), tmp_path / "out", FOUR_BITS)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "arcee-mlx generate" not in card and f"# {cls.__name__}" in card
    assert json.loads((tmp_path / "out" / "conversion.json").read_text())["architecture"] == cls.__name__
    snippet = card.split("```python\n")[1].split("```")[0].replace('"out"', repr(str(tmp_path / "out")))
    exec(f"import arcee_mlx\nimport mlx.core as mx\n{snippet}", {})


def test_the_head_is_no_layer_of_the_plan(tmp_path):
    planned = plan_conversion(source(tmp_path / "in", SEQUENCE), tmp_path / "out", FOUR_BITS)
    by_key = {tensor.key: tensor for tensor in planned.tensors}
    assert by_key["score.weight"].quantization is None and by_key["score.weight"].layer is None
    assert planned.conversion.architecture == "ArceeForSequenceClassification"


def test_the_command_converts_a_classifier(tmp_path, capsys):
    folder = source(tmp_path / "in", TOKEN)
    assert (
        cli.main(["convert", "--hf-path", str(folder), "--mlx-path", str(tmp_path / "out"), "--dtype", "float16"]) == 0
    )
    capsys.readouterr()
    weights = read_weights(Path(tmp_path / "out"))
    assert weights["score.weight"].dtype == mx.float16 and "model.layers.0.mlp.up_proj.scales" in weights

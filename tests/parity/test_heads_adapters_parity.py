"""Adapters of classifiers against the peft library: low-rank updates of the decoder, and the head as a whole."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

torch = pytest.importorskip("torch", reason="compares with transformers on torch")
peft = pytest.importorskip("peft", reason="compares with peft")

import transformers  # noqa: E402

import arcee_mlx  # noqa: E402
from arcee_mlx import fuse_adapter, load_model, save_checkpoint, save_peft_adapter, set_adapter  # noqa: E402
from arcee_mlx.errors import InputError  # noqa: E402
from arcee_mlx.upstream import mlx_lm_module  # noqa: E402

from reference import assert_close, random_ids, their_model, tiny  # noqa: E402

pytestmark = pytest.mark.parity

TASKS = {
    "ArceeForSequenceClassification": "SEQ_CLS",
    "ArceeForTokenClassification": "TOKEN_CLS",
    "ArceeForQuestionAnswering": "QUESTION_ANS",
}
IDS = random_ids((2, 8))
TARGETS = ["q_proj", "down_proj"]


def base(folder: Path, cls: str) -> Any:
    """A classifier that transformers saved; its decoder is what adapters go onto."""
    values = tiny(architectures=[cls], pad_token_id=0, id2label={"0": "a", "1": "b", "2": "c"})
    their_model(values, seed=1, cls=getattr(transformers, cls)).save_pretrained(folder)
    return getattr(transformers, cls).from_pretrained(folder).eval()


def outputs(model: Any) -> list[Any]:
    if isinstance(model, nn.Module):
        output = model.forward(mx.array(IDS))
    else:
        with torch.no_grad():
            output = model(torch.tensor(IDS))
    return [output.start_logits, output.end_logits] if hasattr(output, "start_logits") else [output.logits]


def assert_same(model: Any, theirs: Any) -> None:
    for mine, expected in zip(outputs(model), outputs(theirs), strict=True):
        assert_close(mine, expected)


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"target_modules": ["embed_tokens", "v_proj"]}], ids=str)
@pytest.mark.parametrize("cls", TASKS)
def test_an_adapter_of_peft_brings_the_head_too(tmp_path: Path, cls: str, config: dict[str, Any]) -> None:
    theirs = base(tmp_path / "base", cls)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = peft.LoraConfig(**{"task_type": TASKS[cls], "target_modules": TARGETS, **config})
        adapted = peft.get_peft_model(copy.deepcopy(theirs), lora).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad and "magnitude" not in name:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(tmp_path / "adapter")
    bare = load_model(tmp_path / "base")
    model = load_model(tmp_path / "base", adapter_path=tmp_path / "adapter")
    assert_same(model, adapted)
    fuse_adapter(model)
    assert_same(model, adapted)
    save_checkpoint(model, tmp_path / "fused")
    assert_same(load_model(tmp_path / "fused"), adapted)
    assert mx.abs(outputs(bare)[0] - outputs(model)[0]).max() > 0.05
    set_adapter(bare, tmp_path / "adapter")
    set_adapter(bare, None)
    assert_same(bare, theirs)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("cls", TASKS)
def test_peft_loads_what_is_written_with_the_head(tmp_path: Path, cls: str, use_dora: bool) -> None:
    theirs = base(tmp_path / "base", cls)
    model = load_model(tmp_path / "base")
    lora = {"rank": 4, "scale": 1.5, "dropout": 0.0, "keys": None}
    mlx_lm_module("tuner").linear_to_lora_layers(model, -1, lora, use_dora=use_dora)
    mx.random.seed(0)
    for layer in [module for _, module in model.named_modules() if "lora_a" in module]:
        layer.lora_a, layer.lora_b = (0.2 * mx.random.normal(own.shape) for own in (layer.lora_a, layer.lora_b))
    head = model.qa_outputs if cls == "ArceeForQuestionAnswering" else model.score
    head.weight = head.weight + 0.3 * mx.random.normal(head.weight.shape)
    model.eval()
    save_peft_adapter(model, tmp_path / "peft", base_model=str(tmp_path / "base"))
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["task_type"] == TASKS[cls]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        assert_same(model, peft.PeftModel.from_pretrained(theirs, tmp_path / "peft").eval())
    assert_same(load_model(tmp_path / "base", adapter_path=tmp_path / "peft"), model)
    again = load_model(tmp_path / "base", adapter_path=tmp_path / "peft")
    save_peft_adapter(again, tmp_path / "again")
    one, two = (mx.load(str(tmp_path / folder / "adapter_model.safetensors")) for folder in ("peft", "again"))
    assert one.keys() == two.keys() and all(mx.array_equal(one[key], two[key]) for key in one)


def test_causal_base_with_a_classifiers_adapter(tmp_path: Path) -> None:
    values = tiny(pad_token_id=0)
    their_model(values, seed=1).save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        classifier = transformers.ArceeForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
        adapted = peft.get_peft_model(classifier, peft.LoraConfig(task_type="SEQ_CLS", target_modules=TARGETS)).eval()
        adapted.save_pretrained(tmp_path / "adapter")
    cls = arcee_mlx.ArceeForSequenceClassification
    model = load_model(tmp_path / "base", cls, num_labels=3, adapter_path=tmp_path / "adapter")
    assert_same(model, adapted)


@pytest.mark.parametrize("cls", TASKS)
def test_an_adapter_of_mlx_lms_tuner_may_hold_the_head(tmp_path: Path, cls: str) -> None:
    base(tmp_path / "base", cls)
    model = load_model(tmp_path / "base")
    model.freeze()
    lora = {"rank": 4, "scale": 1.5, "dropout": 0.0}
    mlx_lm_module("tuner").linear_to_lora_layers(model, 1, lora)
    head = model.qa_outputs if cls == "ArceeForQuestionAnswering" else model.score
    head.unfreeze()
    head.weight = head.weight * 1.5
    model.layers[-1].self_attn.q_proj.lora_b = 0.3 * mx.ones_like(model.layers[-1].self_attn.q_proj.lora_b)
    (tmp_path / "a").mkdir()
    mx.save_safetensors(str(tmp_path / "a/adapters.safetensors"), dict(tree_flatten(model.trainable_parameters())))
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": lora}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    assert_same(load_model(tmp_path / "base", adapter_path=tmp_path / "a"), model.eval())


def test_a_head_that_is_no_plain_layer_is_not_written(tmp_path: Path) -> None:
    base(tmp_path / "base", "ArceeForSequenceClassification")
    model = load_model(tmp_path / "base")
    mlx_lm_module("tuner").linear_to_lora_layers(model, -1, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    model.score = mlx_lm_module("tuner.lora").LoRALinear.from_base(model.score)
    with pytest.raises(InputError, match=r"score is LoRALinear; expected nn\.Linear"):
        save_peft_adapter(model, tmp_path / "peft")

"""Which weights, class, tie and dtype a checkpoint is loaded with, against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file

torch = pytest.importorskip("torch", reason="compares with transformers on torch")

import transformers  # noqa: E402

from arcee_mlx import ArceeForCausalLM, ArceeModel, load_model  # noqa: E402
from arcee_mlx.errors import CheckpointError  # noqa: E402

from reference import TheirCausalLM, assert_close, both, random_ids, saved, their_model, tiny  # noqa: E402

pytestmark = pytest.mark.parity


def rewrite(folder: Path, change: Any) -> None:
    from safetensors.numpy import save_file

    tensors = {name: np.array(value) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def without(*keys: str) -> Any:
    return lambda tensors: {name: value for name, value in tensors.items() if name not in keys}


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t,
        without("lm_head.weight"),
        lambda t: {**without("model.embed_tokens.weight")(t), "lm_head.weight": t["model.embed_tokens.weight"]},
        lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]},
        lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1},
        lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)},
        lambda t: {**t, "model.rotary_emb.inv_freq": np.ones(3, np.float64)},
        lambda t: {k.removeprefix("model."): v for k, v in t.items()},
    ],
    ids=[
        "as_saved",
        "no_head",
        "head_only",
        "both_equal",
        "both_differ",
        "stale_rope",
        "stale_rope_float64",
        "base_keys",
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_head_is_tied_or_not_as_transformers_decides(tmp_path: Path, tied: bool, change: Any) -> None:
    saved(tiny(tie_word_embeddings=tied), tmp_path, config="theirs")
    rewrite(tmp_path, change)
    theirs, info = TheirCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    if info["missing_keys"]:
        with pytest.raises(CheckpointError, match=str(sorted(info["missing_keys"])[0])):
            load_model(tmp_path)
        return
    model = load_model(tmp_path)
    assert ("lm_head" not in model) == (theirs.lm_head.weight is theirs.model.embed_tokens.weight)
    ids, my_ids = both(random_ids((1, 5)))
    with torch.no_grad():
        assert_close(model.forward(my_ids).logits, theirs.eval()(ids).logits)


@pytest.mark.parametrize("from_class", ["ArceeModel", "ArceeForCausalLM"])
@pytest.mark.parametrize("to_class", ["ArceeModel", "ArceeForCausalLM"])
def test_base_and_causal_checkpoints_load_into_each_other(tmp_path: Path, from_class: str, to_class: str) -> None:
    source = their_model(tiny(tie_word_embeddings=True), cls=getattr(transformers, from_class))
    source.save_pretrained(tmp_path)
    theirs = getattr(transformers, to_class).from_pretrained(tmp_path).eval()
    model = load_model(tmp_path, {"ArceeModel": ArceeModel, "ArceeForCausalLM": ArceeForCausalLM}[to_class])
    ids, my_ids = both(random_ids((1, 6)))
    with torch.no_grad():
        expected = theirs(ids, output_hidden_states=True)
    mine = model.forward(my_ids, output_hidden_states=True)
    assert_close(mine.last_hidden_state, expected.hidden_states[-1])


@pytest.mark.parametrize("cls", ["ArceeForSequenceClassification", "ArceeForTokenClassification"])
def test_decoder_of_a_classifier_loads_as_the_base_model(tmp_path: Path, cls: str) -> None:
    their_model(tiny(), cls=getattr(transformers, cls)).save_pretrained(tmp_path)
    theirs = transformers.ArceeModel.from_pretrained(tmp_path).eval()
    ids, my_ids = both(random_ids((1, 6)))
    with torch.no_grad():
        assert_close(load_model(tmp_path, ArceeModel).forward(my_ids).last_hidden_state, theirs(ids).last_hidden_state)


@pytest.mark.parametrize("stated", [{}, {"dtype": "float16"}, {"torch_dtype": "bfloat16"}, {"dtype": None, "torch_dtype": "float16"},
                                    {"dtype": "bfloat16", "torch_dtype": "float16"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("file", ["bfloat16", "norms_in_float32", "stale_rope_in_float32"])
def test_auto_dtype_is_the_one_transformers_chooses(tmp_path: Path, stated: dict[str, Any], file: str) -> None:
    from safetensors.torch import load_file as load_torch
    from safetensors.torch import save_file as save_torch

    saved(tiny(), tmp_path)
    tensors = {name: value.to(torch.bfloat16) for name, value in load_torch(tmp_path / "model.safetensors").items()}
    if file == "norms_in_float32":
        tensors = {name: value.float() if "norm" in name else value for name, value in tensors.items()}
    if file == "stale_rope_in_float32":
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_torch(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(tiny(**stated)))
    theirs = TheirCausalLM.from_pretrained(tmp_path, dtype="auto")
    model = load_model(tmp_path, dtype="auto")
    kinds = {str(value.dtype).removeprefix("mlx.core.") for _, value in tree_flatten(model.parameters())}
    assert kinds == {str(theirs.dtype).removeprefix("torch.")}

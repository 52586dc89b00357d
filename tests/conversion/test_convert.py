"""What `convert` promises: the bits of whole-tensor quantization, the same model, the files beside it, bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from arcee_mlx import ArceeConfig, ArceeForCausalLM, ArceeModel, load_model
from arcee_mlx.checkpoint import files
from arcee_mlx.conversion import quantize, run
from arcee_mlx.conversion.recipes import Quantization, Recipe
from arcee_mlx.conversion.run import convert
from arcee_mlx.model.config import LAYOUTS

from conversion_data import (
    DTYPES,
    FLOAT,
    IDS,
    SHAPE,
    STANDARD,
    assert_same_bits,
    quantized_by_mlx,
    random_weights,
    read_weights,
    write_source,
)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch):
    """Several slices a tensor, the last one ragged."""
    monkeypatch.setattr(quantize, "SLICE_BYTES", 12_000)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_slices_give_the_bits_that_whole_tensors_give(tmp_path, bits, group_size, layout):
    quantization = Quantization(bits=bits, group_size=group_size)
    source = write_source(tmp_path / "in")
    convert(source, tmp_path / "out", Recipe(quantization=quantization, layout=layout))
    expected = quantized_by_mlx(source, quantization, layout=layout)
    assert_same_bits(read_weights(tmp_path / "out"), dict(tree_flatten(expected.parameters())))


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_is_cast_before_it_is_quantized_as_in_mlx_lm(tmp_path, stored, dtype):
    source = write_source(tmp_path / "in", dtype=stored)
    convert(source, tmp_path / "out", Recipe(dtype=dtype, layout="standard"))
    expected = quantized_by_mlx(source, Quantization(), getattr(mx, dtype))
    assert_same_bits(read_weights(tmp_path / "out"), dict(tree_flatten(expected.parameters())))
    assert load_model(tmp_path / "out").config.dtype == dtype


def test_logits_are_those_of_the_model_quantized_in_memory(tmp_path):
    source = write_source(tmp_path / "in", dtype="F32")
    convert(source, tmp_path / "out")
    expected = quantized_by_mlx(source, Quantization(), mx.float32, layout="by_neuron")
    np.testing.assert_allclose(load_model(tmp_path / "out")(IDS), expected(IDS), atol=2e-5)
    assert not mx.allclose(expected(IDS), load_model(source)(IDS), atol=1e-3)  # quantizing does change something


VARIANTS = {
    "one_file": {},
    "three_shards": {"shards": 3},
    "float32": {"dtype": "F32"},
    "float16": {"dtype": "F16"},
    "dtype_of_transformers_5": {"torch_dtype": None, "dtype_": "bfloat16"},
    "no_dtype_in_config": {"torch_dtype": None},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "no_architectures": {"architectures": None},
    "rows_that_no_group_divides": {"hidden_size": 120, "num_attention_heads": 3, "num_key_value_heads": 1},
    "some_rows_that_no_group_divides": {"intermediate_size": 200},
    "yarn": {"rope_scaling": {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 16}},
}


@pytest.mark.parametrize("recipe", [FLOAT, Recipe(), STANDARD], ids=["float", "4bit", "4bit_standard"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_form_of_source_converts_to_the_same_model(tmp_path, variant, recipe):
    options = dict(VARIANTS[variant])
    source = write_source(tmp_path / "in", **{k: v for k, v in options.items() if k != "dtype_"})
    if "dtype_" in options:
        values = json.loads((source / "config.json").read_text()) | {"dtype": options["dtype_"]}
        (source / "config.json").write_text(json.dumps(values))
    convert(source, tmp_path / "out", recipe)
    expected = load_model(source)
    if recipe.quantization is not None:
        dtype = DTYPES[options.get("dtype", "BF16")]
        expected = quantized_by_mlx(source, recipe.quantization, dtype, layout=recipe.choose_layout("relu2"))
        expected.set_dtype(mx.float32)
    np.testing.assert_allclose(load_model(tmp_path / "out")(IDS), expected(IDS), atol=2e-5)


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight", "both"])
def test_a_tied_checkpoint_is_stored_once_whichever_key_it_has(tmp_path, kept):
    config = ArceeConfig(**SHAPE, tie_word_embeddings=True)
    weights = random_weights(config)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    if kept != "both":
        weights = {key: value for key, value in weights.items() if key == kept or "layers" in key or "norm" in key}
    source = write_source(tmp_path / "in", weights, tie_word_embeddings=True)
    convert(source, tmp_path / "out", FLOAT)
    assert "lm_head.weight" not in read_weights(tmp_path / "out")
    np.testing.assert_array_equal(load_model(tmp_path / "out")(IDS), load_model(source)(IDS))


def test_a_tie_that_the_file_denies_is_denied_in_the_converted_config_too(tmp_path):
    weights = random_weights(ArceeConfig(**SHAPE))
    source = write_source(tmp_path / "in", weights, tie_word_embeddings=True)
    convert(source, tmp_path / "out", FLOAT)
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    np.testing.assert_array_equal(load_model(tmp_path / "out")(IDS), load_model(source)(IDS))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_a_base_checkpoint_stays_one(tmp_path, prefix):
    weights = random_weights(ArceeConfig(**SHAPE), ArceeModel)
    weights = {prefix + key: value for key, value in weights.items()}
    source = write_source(tmp_path / "in", weights, architecture="ArceeModel")
    convert(source, tmp_path / "out")
    converted = load_model(tmp_path / "out")
    assert isinstance(converted, ArceeModel)
    expected = quantized_by_mlx(source, Quantization(), layout="by_neuron")
    assert_same_bits(dict(tree_flatten(load_model(tmp_path / "out", dtype=mx.float32).parameters())), {
        key: value.astype(mx.float32) if value.dtype == mx.bfloat16 else value
        for key, value in tree_flatten(expected.parameters())
    })  # fmt: skip


def test_stale_rotary_tables_are_dropped(tmp_path):
    weights = random_weights(ArceeConfig(**SHAPE)) | {"model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones((16,))}
    convert(write_source(tmp_path / "in", weights), tmp_path / "out")
    assert not any("inv_freq" in name for name in read_weights(tmp_path / "out"))


def test_config_keeps_its_keys_and_gains_what_mlx_lm_writes(tmp_path):
    source = write_source(tmp_path / "in", some_key_of_the_maker={"a": [1]}, transformers_version="4.53.2")
    recipe = Recipe(quantization=Quantization(bits=8, group_size=32), dtype="float16", layout="standard")
    convert(source, tmp_path / "out", recipe)
    before = json.loads((source / "config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    table = {"group_size": 32, "bits": 8, "mode": "affine"}
    changed = {
        "torch_dtype": "float16",
        "tie_word_embeddings": False,
        "quantization": table,
        "quantization_config": table,
    }
    assert after == before | changed


def test_shards_are_split_between_layers_and_listed_in_the_index(tmp_path, monkeypatch):
    plan_shards = files.plan_shards
    monkeypatch.setattr(run, "plan_shards", lambda sizes: plan_shards(sizes, 60_000))
    source = write_source(tmp_path / "in")
    convert(source, tmp_path / "out", STANDARD)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    for name, file in index["weight_map"].items():
        if name.endswith(".scales"):
            assert index["weight_map"][name.replace(".scales", ".weight")] == file
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in read_weights(tmp_path / "out").values())
    expected = quantized_by_mlx(source, Quantization())
    assert_same_bits(read_weights(tmp_path / "out"), dict(tree_flatten(expected.parameters())))


def test_two_conversions_give_the_same_bytes(tmp_path):
    source = write_source(tmp_path / "in")
    for name in ("out1", "out2"):
        convert(source, tmp_path / name)
    first, second = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("out1", "out2"))
    assert first == second


def test_the_callers_random_numbers_are_left_alone(tmp_path):
    source = write_source(tmp_path / "in")
    mx.random.seed(5)
    expected = mx.random.normal((4,)).tolist()
    mx.random.seed(5)
    convert(source, tmp_path / "out", FLOAT)
    assert mx.random.normal((4,)).tolist() == expected


CARRIED = {
    "tokenizer.json": b'{"version": "1.0"}\r\n',
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{ }",
    "chat_template.jinja": "{{ 'é' }}".encode(),
    "additional_chat_templates/rag.jinja": b"{{ x }}",
    "generation_config.json": b'{"temperature":0.5}',
    "LICENSE": b"Apache\x00\xff",
    "NOTICE.txt": b"notice",
}
LEFT = {
    "pytorch_model.bin": b"pickle",
    "modeling_arcee.py": b"raise SystemExit",
    "optimizer.pt": b"",
    ".hidden": b"",
}


def test_the_files_beside_the_weights_are_carried_along_and_nothing_else(tmp_path):
    source = write_source(tmp_path / "in")
    for name, content in (CARRIED | LEFT).items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(content)
    conversion = convert(source, tmp_path / "out")
    for name, content in CARRIED.items():
        assert (tmp_path / "out" / name).read_bytes() == content
    assert set(conversion.carried_files) == set(CARRIED)
    own = {"config.json", "model.safetensors", "model.safetensors.index.json", "README.md", "conversion.json"}
    own |= {"conversion.png"}  # the tests' environment has matplotlib
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert found == own | set(CARRIED)


def test_a_file_that_is_a_link_of_the_hubs_cache_arrives_as_a_file(tmp_path):
    cache = tmp_path / "hub/models--org--name"
    source = write_source(cache / "snapshots/0123abc", shards=2)
    (source / "tokenizer.json").write_bytes(b"{}")
    (cache / "blobs").mkdir()
    for i, file in enumerate(sorted(source.iterdir())):
        file.rename(cache / f"blobs/{i:064x}")
        file.symlink_to(f"../../blobs/{i:064x}")
    convert(source, tmp_path / "out", FLOAT)
    assert not [path for path in (tmp_path / "out").iterdir() if path.is_symlink()]
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"{}"
    assert_same_bits(read_weights(tmp_path / "out"), read_weights(source))


def test_the_model_card_is_our_own_and_keeps_the_licence(tmp_path):
    source = write_source(tmp_path / "original")
    (source / "README.md").write_text("---\nlicense: apache-2.0\nlanguage:\n- en\ntags:\n- x\n---\n# The best model\n")
    convert(source, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert (
        'license: "apache-2.0"' in card
        and 'language: ["en"]' in card
        and "4 bits in groups of 64" in card
        and "original" in card
    )
    assert "The best model" not in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    "text",
    [
        "no header",
        "---\n[unclosed\n---\n",
        "---\n- a list\n---\n",
        "\x00",
        "---\nlicense: 2020-01-01\n---\n",
        '---\nlanguage: ["\\ud800"]\nlicense: [[x]]\n---\n',
    ],
)
def test_a_card_that_cannot_be_read_does_not_stop_a_conversion(tmp_path, text):
    source = write_source(tmp_path / "in")
    (source / "README.md").write_text(text)
    convert(source, tmp_path / "out")
    assert 'library_name: "mlx"' in (tmp_path / "out/README.md").read_text()


def test_layers_that_stay_floats_are_named_in_the_result(tmp_path):
    conversion = convert(write_source(tmp_path / "in", intermediate_size=200), tmp_path / "out", STANDARD)
    assert conversion.float_layers == ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]
    assert conversion.weights == sum(e.nbytes // 2 for e in files.open_checkpoint(tmp_path / "in").entries.values())
    assert conversion.bytes == sum(w.nbytes for w in read_weights(tmp_path / "out").values())


_MEASURED = """
import sys
from arcee_mlx.conversion.result import peak_memory_bytes
from arcee_mlx.conversion.run import convert
convert(sys.argv[1], sys.argv[2])
print(peak_memory_bytes())
"""


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    # 50,000 x 2,048 in bfloat16 are 205 MB. Interpreter and MLX need some 45 MB, slices of 16 MB some 110 MB.
    shape = {"vocab_size": 50_000, "hidden_size": 2048, "intermediate_size": 64, "num_hidden_layers": 1}
    config = ArceeConfig(**(SHAPE | shape), tie_word_embeddings=True)
    weights = {
        key: mx.ones(value.shape, mx.bfloat16) for key, value in tree_flatten(ArceeForCausalLM(config).parameters())
    }
    source = write_source(tmp_path / "in", weights, tie_word_embeddings=True, **shape)
    environment = os.environ | {"PYTHONPATH": str(Path(run.__file__).parents[2])}
    command = [sys.executable, "-c", _MEASURED, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 220e6

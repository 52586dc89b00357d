"""Recipes: which layer gets which form, the package's own, and files of all kinds, good and bad."""

import json
import random
import re
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import mlx.core as mx
import pytest
import yaml

from arcee_mlx.checkpoint.quantization import MODES, Quantization, build_table, read_quantization
from arcee_mlx.conversion.recipe_file import read_recipe, recipe_from_dict
from arcee_mlx.conversion.recipes import RECIPES, Recipe, Rule, list_recipes, override, recipe_to_dict, uses_more_bits
from arcee_mlx.errors import InputError
from arcee_mlx.upstream import mlx_lm_module

FORMS = [
    Quantization(mode=mode, bits=bits, group_size=size)
    for mode, (all_bits, sizes) in MODES.items()
    for bits in all_bits
    for size in sizes
]
MLX_LM_RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


def layer_paths(num_layers):
    inside = [f"model.layers.{i}.{name}" for i in range(num_layers) for name in PROJECTIONS]
    return ["model.embed_tokens", *inside, "lm_head"]


def write(folder, text):
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.form)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_a_form_is_one_of_mlxs_and_packs_to_the_arrays_that_mlx_makes(form, dtype):
    rows = mx.ones((3, 256), {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}[dtype])
    arrays = mx.quantize(rows, **asdict(form))
    dtypes = {mx.uint32: "U32", mx.uint8: "U8", rows.dtype: dtype}
    assert [(dtypes[a.dtype], a.shape) for a in arrays] == list(form.pack(3, 256, dtype).values())


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_alone_takes_what_mlx_takes(mode):
    form = Quantization(mode=mode)
    for own, default in zip(
        mx.quantize(mx.ones((2, 256)), **asdict(form)), mx.quantize(mx.ones((2, 256)), mode=mode), strict=True
    ):
        assert mx.array_equal(own, default)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"bits": 7}, "bits is 7; expected 2, 3, 4, 5, 6 or 8 in mode 'affine'"),
        ({"bits": True}, "bits is True"),
        ({"bits": 4.0}, "bits is 4.0"),
        ({"bits": "4"}, "bits is '4'"),
        ({"group_size": 48}, "group_size is 48; expected 32, 64 or 128"),
        ({"group_size": 16}, "group_size is 16"),
        ({"mode": "mxfp4", "bits": 3}, "bits is 3; expected 4 in mode 'mxfp4'"),
        ({"mode": "nvfp4", "group_size": 32}, "group_size is 32; expected 16 in mode 'nvfp4'"),
        ({"mode": "q4_k"}, "mode is 'q4_k'; expected affine, mxfp4, nvfp4 or mxfp8"),
        ({"mode": ["affine"]}, "mode is "),
    ],
)
def test_a_form_that_mlx_has_not_is_refused_by_name(values, says):
    with pytest.raises(InputError) as error:
        Quantization(**values)
    assert says in str(error.value)


@pytest.mark.parametrize("name", MLX_LM_RECIPES)
@pytest.mark.parametrize("num_layers", [1, 2, 5, 8, 16, 31, 36, 40])
def test_a_mixed_recipe_gives_each_layer_what_mlx_lms_gives_it(name, num_layers):
    paths = layer_paths(num_layers)
    model = SimpleNamespace(named_modules=lambda: [(path, None) for path in paths], layers=[None] * num_layers)
    predicate = mlx_lm_module("convert").mixed_quant_predicate_builder(name, model)
    recipe = read_recipe(name)
    for path in paths:
        assert asdict(recipe.choose(path, num_layers)[1]) == predicate(path, None), path


def test_the_layers_that_get_more_bits_are_the_ends_and_every_third_between():
    assert [i for i in range(16) if uses_more_bits(i, 16)] == [0, 1, 4, 7, 10, 13, 14, 15]


def test_every_recipe_of_mlx_lm_is_here_under_its_name():
    assert set(mlx_lm_module("convert").QUANT_RECIPES) <= set(list_recipes())


FLOATS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
UNIFORM = {f"{bits}bit": Quantization(bits=bits) for bits in (2, 3, 4, 5, 6, 8)}
UNIFORM |= {mode: Quantization(mode=mode) for mode in ("mxfp4", "nvfp4", "mxfp8")}


@pytest.mark.parametrize("name", list_recipes())
def test_a_package_recipe_is_read_described_and_explained(name):
    recipe = read_recipe(name)
    assert recipe.name == name and recipe.description.endswith(".")
    assert recipe == read_recipe(RECIPES / f"{name}.yaml")
    if name in FLOATS:
        expected = Recipe(quantization=None, dtype=FLOATS[name])
        assert (RECIPES / f"{name}.yaml").read_text().startswith("# ")
    elif name in UNIFORM:
        expected = Recipe(quantization=UNIFORM[name])
    else:
        assert recipe.rules and (RECIPES / f"{name}.yaml").read_text().startswith("# ")
        return
    assert replace(recipe, name="", description="") == expected


def test_the_default_is_the_recipe_4bit():
    assert replace(read_recipe("4bit"), name="", description="") == Recipe()


def test_our_own_recipes_are_no_larger_than_mlx_lms_on_this_architecture():
    def mean_bits(name):
        sizes = {"q_proj": 2560, "k_proj": 512, "v_proj": 512, "o_proj": 2560, "up_proj": 18432, "down_proj": 18432}
        weights = {path: sizes.get(path.split(".")[-1], 128005) for path in layer_paths(36)}
        recipe = read_recipe(name)
        forms = {path: recipe.choose(path, 36)[1] for path in weights}
        bits = sum(n * (forms[path].bits + 32 / forms[path].group_size) for path, n in weights.items())
        return bits / sum(weights.values())

    assert mean_bits("arcee_4_5") < mean_bits("4bit") < mean_bits("mixed_4_6")
    assert mean_bits("arcee_3_4") < mean_bits("mixed_3_4") < mean_bits("mixed_3_6")


MINE = Recipe(
    quantization=Quantization(bits=3, group_size=128),
    rules=[
        Rule(tensors=["*.v_proj"], layers=[0, -1], quantization=Quantization(mode="mxfp8")),
        Rule(tensors=["lm_head"], quantization=None),
        Rule(tensors=["*.down_proj", "*.up_proj"], layers="use_more_bits", quantization=Quantization(bits=6)),
    ],
    dtype="float16",
    layout="by_neuron",
    name="mine",
    description="Mine.",
)
MINE_FILE = """
# a comment
description: Mine.
dtype: float16
layout: by_neuron
quantization: {bits: 3, group_size: 128}
rules:
  - tensors: ["*.v_proj"]
    layers: [0, -1]
    quantization: {mode: mxfp8}
  - {tensors: [lm_head], quantization: null}
  - tensors:
      - "*.down_proj"
      - "*.up_proj"
    layers: use_more_bits
    quantization: {bits: 6}
"""


def test_a_users_file_is_the_same_as_the_recipe_made_in_python(tmp_path):
    path = write(tmp_path, MINE_FILE)
    assert read_recipe(path) == read_recipe(str(path)) == MINE
    other = tmp_path / "without_suffix"
    other.write_text(MINE_FILE + "name: mine\n")
    assert read_recipe(other) == MINE


@pytest.mark.parametrize("recipe", [Recipe(), MINE, *map(read_recipe, list_recipes())], ids=lambda r: r.name)
def test_a_recipe_survives_json_and_yaml(tmp_path, recipe):
    values = recipe_to_dict(recipe)
    assert recipe_from_dict(json.loads(json.dumps(values))) == recipe
    assert read_recipe(write(tmp_path, yaml.safe_dump(values))) == recipe


def test_the_recipe_that_the_readme_shows_is_one(tmp_path):
    readme = (Path(__file__).parents[2] / "convert/README.md").read_text(encoding="utf-8")
    recipe = read_recipe(write(tmp_path, re.search(r"```yaml\n(.*?)```", readme, re.DOTALL)[1]))
    assert recipe.dtype == "bfloat16" and [rule.layers for rule in recipe.rules] == [None, (0, 1, -1)]
    assert all(f"`{name}`" in readme for name in list_recipes())


def test_null_is_the_default_of_dtype_and_layout(tmp_path):
    text = "quantization: {bits: 4}\nname: mine\n"
    assert read_recipe(write(tmp_path, text + "dtype: null\nlayout: null\n")) == read_recipe(write(tmp_path, text))


@pytest.mark.parametrize(
    ("recipe", "hidden_act", "layout"),
    [
        (Recipe(), "relu2", "by_neuron"),
        (Recipe(), "silu", "standard"),  # no zeros to leave out
        (Recipe(quantization=None), "relu2", "standard"),  # what transformers reads, too
        (
            Recipe(quantization=None, rules=[Rule(tensors=["lm_head"], quantization=Quantization())]),
            "relu2",
            "by_neuron",
        ),
        (Recipe(layout="standard"), "relu2", "standard"),
        (Recipe(layout="by_neuron"), "silu", "by_neuron"),
        (Recipe(layout="by_neuron", quantization=None), "relu2", "by_neuron"),
    ],
)
def test_the_layout_is_the_one_asked_for_or_by_neuron_where_that_can_pay(recipe, hidden_act, layout):
    assert recipe.choose_layout(hidden_act) == layout


def test_the_first_rule_that_matches_decides():
    high, low = Quantization(bits=8), Quantization(bits=2)
    recipe = Recipe(rules=[
        Rule(tensors=["*.v_proj"], layers=[1, -2], quantization=high),
        Rule(tensors=["*.self_attn.*", "lm_[gh]ead"], quantization=low),
        Rule(tensors=["model.layers.*"], layers=[0], quantization=None),
    ])  # fmt: skip
    chosen = {path: recipe.choose(path, 5) for path in layer_paths(5)}
    assert chosen["model.layers.1.self_attn.v_proj"] == chosen["model.layers.3.self_attn.v_proj"] == (0, high)
    assert chosen["model.layers.0.self_attn.v_proj"] == chosen["lm_head"] == (1, low)
    assert chosen["model.layers.0.mlp.up_proj"] == (2, None)
    assert chosen["model.layers.1.mlp.up_proj"] == chosen["model.embed_tokens"] == (None, Quantization())


def test_globs_are_case_sensitive_and_rules_for_layers_are_for_nothing_else():
    rule = Rule(tensors=["*V_PROJ", "lm_head", "*.down_proj"], layers=[0, 10], quantization=None)
    assert not rule.matches("model.layers.0.self_attn.v_proj", 11)
    assert not rule.matches("lm_head", 11)
    assert rule.matches("model.layers.10.mlp.down_proj", 11) and not rule.matches("model.layers.1.mlp.down_proj", 11)


BAD_FILES = {
    "nothing": ("", "is None; expected keys and values"),
    "a list": ("- 1", "is [1]; expected keys and values"),
    "a word": ("4bit", "is '4bit'; expected keys and values"),
    "unknown key": ("quantization: null\nbits: 4", "has the key 'bits'; expected quantization, rules"),
    "key of a number": ("quantization: null\n4: 4", "has the key 4; expected"),
    "no quantization": ("dtype: float16", "has no key 'quantization'"),
    "bits": ("quantization: {bits: 9}", "quantization: bits is 9; expected 2, 3, 4, 5, 6 or 8"),
    "bits of text": ("quantization: {bits: four}", "quantization: bits is 'four'"),
    "bits of a float": ("quantization: {bits: 4.0}", "quantization: bits is 4.0"),
    "bits of a bool": ("quantization: {bits: yes}", "quantization: bits is True"),
    "group": ("quantization: {group_size: 100}", "quantization: group_size is 100; expected 32, 64 or 128"),
    "mode": ("quantization: {mode: q4}", "quantization: mode is 'q4'; expected affine"),
    "mode and bits": ("quantization: {mode: mxfp4, bits: 8}", "bits is 8; expected 4 in mode 'mxfp4'"),
    "unknown in quantization": ("quantization: {bit: 4}", "quantization has the key 'bit'; expected group_size, bits"),
    "quantization of text": ("quantization: none", "quantization is 'none'; expected keys and values"),
    "quantization false": ("quantization: no", "quantization is False; expected keys and values"),
    "dtype": ("quantization: null\ndtype: int8", "dtype is 'int8'; expected float32, float16 or bfloat16"),
    "dtype of a list": ("quantization: null\ndtype: [float16]", "dtype is ['float16']"),
    "layout": ("quantization: null\nlayout: sideways", "layout is 'sideways'; expected standard or by_neuron"),
    "layout of a number": ("quantization: null\nlayout: 2", "layout is 2; expected standard or by_neuron"),
    "name": ("quantization: null\nname: 4", "name is 4; expected a text"),
    "description": ("quantization: null\ndescription: [x]", "description is ['x']; expected a text"),
    "rules of keys": ("quantization: null\nrules: {}", "rules is {}; expected a list"),
    "rule of text": ("quantization: null\nrules: [x]", "rules[0] is 'x'; expected keys and values, of tensors"),
    "rule without tensors": ("quantization: null\nrules: [{quantization: null}]", "rules[0] has no key 'tensors'"),
    "rule without form": ("quantization: null\nrules: [{tensors: [a]}]", "rules[0] has no key 'quantization'"),
    "tensors of text": ("quantization: null\nrules: [{tensors: a, quantization: null}]", "rules[0]: tensors is 'a'"),
    "tensors empty": ("quantization: null\nrules: [{tensors: [], quantization: null}]", "rules[0]: tensors is []"),
    "tensors of numbers": ("quantization: null\nrules: [{tensors: [4], quantization: null}]", "rules[0]: tensors is"),
    "layers of a word": (
        "quantization: null\nrules: [{tensors: [a], layers: some, quantization: null}]", "rules[0]: layers is 'some'",
    ),
    "layers of floats": (
        "quantization: null\nrules: [{tensors: [a], layers: [1.5], quantization: null}]", "rules[0]: layers is [1.5]",
    ),
    "layers empty": (
        "quantization: null\nrules: [{tensors: [a], layers: [], quantization: null}]", "rules[0]: layers is []",
    ),
    "bits in a rule": (
        "quantization: null\nrules: [{tensors: [a], quantization: null}, {tensors: [a], quantization: {bits: 1}}]",
        "rules[1]: quantization: bits is 1; expected",
    ),
    "key twice": ("dtype: float16\nquantization: null\ndtype: float32", "line 3: found the key 'dtype' a second time"),
    "key twice inside": ("quantization: {bits: 4, 'bits': 8}", "line 1: found the key 'bits' a second time"),
    "merge": ("quantization: null\n<<: {dtype: float16}", "line 2: found a key that is no plain text"),
    "key of a list": ("? [a]\n: 1", "line 1: found a key that is no plain text"),
    "anchor": ("quantization: &x null", "line 1: found an anchor, alias or tag"),
    "bomb": (
        "".join(f"{key}: &{key} [{old}, {old}, {old}]\n" for key, old in [("a", "x"), ("b", "*a"), ("c", "*b")]),
        "line 1: found an anchor, alias or tag",
    ),
    "alias to itself": ("&a [*a]", "found an anchor"),
    "object": ("quantization: !!python/object/apply:os.system [ls]", "line 1: found an anchor, alias or tag"),
    "tag": ("quantization: !!set {x}", "line 1: found an anchor, alias or tag"),
    "two documents": ("quantization: null\n---\nquantization: null", "line 2: but found another document"),
    "unclosed": ("quantization: {bits: 4", "line 1: "),
    "tab": ("quantization:\n\t bits: 4", "line 2: "),
    "deep": ("[" * 5000, "nested too deeply"),
    "date that is none": ("quantization: null\nname: 2020-13-45", "month must be in"),
    "endless number": ("quantization: {bits: " + "9" * 5000 + "}", "cannot be read as YAML"),
    "zero byte": ("quantization: null\n\0", "cannot be read as YAML"),
    "no such character": ('name: "\\U00110000"', "cannot be read as YAML"),
    "huge": ("# " + "x" * 2**16, "is larger than 65536 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_an_error_of_one_line_that_names_file_and_fault(tmp_path, case):
    text, says = BAD_FILES[case]
    path = write(tmp_path, text)
    with pytest.raises(InputError) as error:
        read_recipe(path)
    message = str(error.value)
    assert message.startswith(str(path)) and says in message and "\n" not in message and len(message) < 600


def test_what_is_no_text_file_is_refused(tmp_path):
    (tmp_path / "utf16.yaml").write_bytes("quantization: null".encode("utf-16"))
    (tmp_path / "folder.yaml").mkdir()
    for name, says in (("utf16.yaml", "is no text"), ("folder.yaml", "no such file"), ("none.yml", "no such file")):
        with pytest.raises(InputError, match=says):
            read_recipe(tmp_path / name)
    with pytest.raises(InputError, match=r"recipe is '4bits'; expected 2bit, 3bit, 4bit, 4bit_down8.*or a YAML file"):
        read_recipe("4bits")


def test_a_package_recipe_is_found_whatever_lies_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "4bit").mkdir()
    assert read_recipe("4bit").quantization == Quantization()


def test_a_damaged_file_never_raises_anything_but_our_error(tmp_path):
    rng = random.Random(7)
    refused = 0
    for _ in range(400):
        data = bytearray(MINE_FILE.encode())
        for _ in range(rng.randrange(1, 4)):
            place = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[place] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[place : place + rng.randrange(1, 9)]
            elif kind == 2:
                data[place:place] = rng.choice(
                    [b"!!int ", b"&a ", b"*a", b"? ", b"[", b"}", b"\t", b"'", b"|", b"%", b"- "]
                )
            else:
                data[place:place] = data[rng.randrange(len(data)) :][: rng.randrange(1, 40)]
        path = tmp_path / "mine.yaml"
        path.write_bytes(data)
        try:
            assert isinstance(read_recipe(path), Recipe)
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
    assert 100 < refused < 400


def test_overriding_changes_what_is_given_and_the_name_says_so():
    assert override(MINE) == MINE
    changed = override(MINE, bits=5, dtype="float32", layout="standard")
    assert changed == replace(
        MINE,
        quantization=Quantization(bits=5, group_size=128),
        dtype="float32",
        layout="standard",
        name="mine (changed)",
    )
    assert override(Recipe(), bits=8) == Recipe(quantization=Quantization(bits=8))


def test_another_mode_brings_its_own_bits_and_group_size():
    assert override(MINE, mode="nvfp4").quantization == Quantization(mode="nvfp4")
    assert override(MINE, mode="affine") == MINE
    assert override(read_recipe("mxfp4"), mode="affine").quantization == Quantization()
    with pytest.raises(InputError, match="bits is 3; expected 4 in mode 'mxfp4'"):
        override(MINE, mode="mxfp4", bits=3)


@pytest.mark.parametrize("name", MLX_LM_RECIPES)
def test_the_group_size_is_that_of_rules_too_as_in_mlx_lm(name):
    recipe = override(read_recipe(name), group_size=32)
    assert {recipe.choose(path, 8)[1].group_size for path in layer_paths(8)} == {32}
    assert override(MINE, group_size=32).rules[0].quantization == Quantization(mode="mxfp8")


def test_a_recipe_that_quantizes_nothing_by_default_has_nothing_to_override():
    with pytest.raises(InputError, match="bits or mode given for recipe 'bf16'"):
        override(read_recipe("bf16"), bits=4, mode="affine")
    assert override(read_recipe("bf16"), dtype="float16").dtype == "float16"


def test_a_table_says_default_own_and_float_layers_and_is_read_back():
    layers = {"a": Quantization(bits=3), "b": Quantization(bits=3), "c": Quantization(mode="mxfp8"), "d": None}
    table = build_table(layers)
    assert table == {
        "group_size": 64, "bits": 3, "mode": "affine", "c": {"group_size": 32, "bits": 8, "mode": "mxfp8"}, "d": False,
    }  # fmt: skip
    for path, form in layers.items():
        assert form is None or read_quantization(table, path) == form
    assert build_table({"a": None}) == {}


def test_null_in_a_table_is_the_modes_own_as_mlx_lms_mixed_recipes_write_it():
    table = {
        "group_size": 64,
        "bits": 4,
        "mode": "affine",
        "lm_head": {"group_size": None, "bits": 6, "mode": "affine"},
    }
    assert read_quantization(table, "lm_head") == Quantization(bits=6)
    with pytest.raises(InputError, match="expected a group_size and bits"):
        read_quantization({"group_size": None, "bits": 4}, "lm_head")

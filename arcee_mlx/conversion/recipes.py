"""Recipe: what a conversion makes of a checkpoint: the form of each layer by rules, the dtype of the rest, the layout."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..checkpoint.quantization import MODES, Quantization, list_words
from ..errors import InputError
from ..model.config import DTYPES, LAYOUTS

RECIPES = Path(__file__).with_name("recipes")  # the folder beside this module
CALIBRATED_RECIPE = "arcee_4"  # what `--calibrate` takes where none is named
MORE_BITS = "use_more_bits"
BITS = tuple(sorted({bits for allowed, _ in MODES.values() for bits in allowed}))
GROUP_SIZES = tuple(sorted({size for _, allowed in MODES.values() for size in allowed}))
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The form of some layers.

    Attributes:
        tensors: globs over the paths of a causal model's layers, such as "model.layers.*.mlp.down_proj", "*.v_proj" or
            "lm_head"; upper and lower case differ, and `*` reaches over dots.
        quantization: of the layers; None keeps them floats.
        layers: numbers of the decoder layers it is for, negative ones counted from the end; "use_more_bits" for those
            that `uses_more_bits` picks; None for all, and for what is in no decoder layer.
    """

    tensors: Sequence[str]
    quantization: Quantization | None
    layers: Sequence[int] | str | None = None

    def __post_init__(self) -> None:
        tensors, layers = self.tensors, self.layers
        if not _is_list(tensors) or not tensors or not all(isinstance(glob, str) and glob for glob in tensors):
            raise InputError(f"tensors is {tensors!r}; expected a list of globs; write one as ['*.v_proj']")
        object.__setattr__(self, "tensors", tuple(tensors))
        _check_quantization(self.quantization)
        if layers is None or layers == MORE_BITS:
            return
        if not _is_list(layers) or not layers or not all(type(number) is int for number in layers):
            raise InputError(
                f"layers is {layers!r}; expected a list of layer numbers such as [0, -1], or {MORE_BITS!r}; leave it out "
                f"for all layers"
            )
        object.__setattr__(self, "layers", tuple(layers))

    def matches(self, path: str, num_layers: int) -> bool:
        """Whether the rule is for a layer, by its path in a causal model."""
        if not any(fnmatchcase(path, glob) for glob in self.tensors):
            return False
        if self.layers is None:
            return True
        if (found := _LAYER.search(path)) is None:
            return False
        index = int(found[1])
        if isinstance(self.layers, str):
            return uses_more_bits(index, num_layers)
        return index in self.layers or index - num_layers in self.layers


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to make of a checkpoint.

    Attributes:
        quantization: of every linear layer, the embedding and the language model's head; None keeps them floats. A
            classifier's head always stays a float.
        rules: for layers that differ; the first that matches a layer decides.
        dtype: of all that stays a float, scales and biases of quantized weights included: "float32", "float16" or
            "bfloat16"; None for the checkpoint's own.
        layout: of down projections: "standard" as in the checkpoint, or "by_neuron": transposed, so that all a neuron
            writes is one row. None leaves it to the checkpoint: see `choose_layout`.
        name: of the recipe; "" for one that has none.
        description: what it is good for, in a sentence.
    """

    quantization: Quantization | None = Quantization()
    rules: Sequence[Rule] = ()
    dtype: str | None = None
    layout: str | None = None
    name: str = ""
    description: str = ""

    def __post_init__(self) -> None:
        _check_quantization(self.quantization)
        if not _is_list(self.rules) or not all(isinstance(rule, Rule) for rule in self.rules):
            raise InputError(f"rules is {self.rules!r}; expected a list of rules; leave it out for none")
        object.__setattr__(self, "rules", tuple(self.rules))
        if self.dtype is not None and self.dtype not in DTYPES:
            raise InputError(
                f"dtype is {self.dtype!r}; expected {list_words(DTYPES)}; leave it out to keep the source's"
            )
        if self.layout is not None and self.layout not in LAYOUTS:
            raise InputError(f"layout is {self.layout!r}; expected {list_words(LAYOUTS)}; leave it out for the default")
        for key in ("name", "description"):
            if not isinstance(value := getattr(self, key), str):
                raise InputError(f"{key} is {value!r}; expected a text; put it in quotes")

    @property
    def quantizes(self) -> bool:
        """Whether there is a layer that it may quantize."""
        return self.quantization is not None or any(rule.quantization for rule in self.rules)

    def choose_layout(self, hidden_act: str) -> str:
        """The layout asked for; else by neuron where zeros can be left out of quantized weights, and standard elsewhere.

        Float weights stay what transformers reads, too.
        """
        return self.layout or ("by_neuron" if self.quantizes and hidden_act == "relu2" else "standard")

    def choose(self, path: str, num_layers: int) -> tuple[int | None, Quantization | None]:
        """Decides a layer's form.

        Args:
            path: of the layer in a causal model.
            num_layers: of the decoder.

        Returns:
            the index of the rule that decided, None for the default; and the form.
        """
        for index, rule in enumerate(self.rules):
            if rule.matches(path, num_layers):
                return index, rule.quantization
        return None, self.quantization


def uses_more_bits(index: int, num_layers: int) -> bool:
    """Whether a decoder layer is one that gets more bits: the first eighth, the last eighth, every third between.

    Source: llama.cpp's `use_more_bits`, by way of mlx_lm.convert's mixed recipes.
    """
    eighth = num_layers // 8
    return index < eighth or index >= 7 * num_layers // 8 or (index - eighth) % 3 == 2


def override(
    recipe: Recipe,
    *,
    group_size: int | None = None,
    bits: int | None = None,
    mode: str | None = None,
    dtype: str | None = None,
    layout: str | None = None,
) -> Recipe:
    """Changes a recipe where a value is given; its name then says so.

    Args:
        recipe: to be changed.
        group_size: of the default quantization, and of rules of the same mode, as in mlx-lm.
        bits, mode: of the default quantization alone; another mode brings its own bits and group size.
        dtype, layout: of the recipe.

    Raises:
        InputError: a value is out of range, or the recipe quantizes nothing by default.
    """
    changes: dict[str, Any] = {key: value for key, value in (("dtype", dtype), ("layout", layout)) if value is not None}
    given = {"group_size": group_size, "bits": bits, "mode": mode}
    given = {key: value for key, value in given.items() if value is not None}
    if given:
        if (default := recipe.quantization) is None:
            raise InputError(
                f"{list_words(given)} given for recipe {recipe.name!r}, whose default is to quantize nothing; expected "
                f"none; leave it out, or name another recipe"
            )
        kept = asdict(default) if mode in (None, default.mode) else {}
        default = changes["quantization"] = Quantization(**(kept | given))
        if group_size is not None:
            changes["rules"] = [_regroup(rule, default) for rule in recipe.rules]
    changed = replace(recipe, **changes)
    if changed != recipe and recipe.name:
        changed = replace(changed, name=f"{recipe.name} (changed)")
    return changed


def list_recipes() -> list[str]:
    """The names of the package's recipes; recipe_file.read_recipe reads them."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe in plain values, as JSON and YAML hold them; recipe_file.recipe_from_dict reads them back."""
    rules = [asdict(rule) for rule in recipe.rules]
    for rule in rules:
        rule |= {key: list(value) for key, value in rule.items() if isinstance(value, tuple)}
    return asdict(recipe) | {"rules": rules}


def _regroup(rule: Rule, default: Quantization) -> Rule:
    form = rule.quantization
    if form is None or form.mode != default.mode:
        return rule
    return replace(rule, quantization=replace(form, group_size=default.group_size))


def _check_quantization(value: Any) -> None:
    if value is not None and not isinstance(value, Quantization):
        raise InputError(f"quantization is {value!r}; expected bits, group_size and mode, or null to keep floats")


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)

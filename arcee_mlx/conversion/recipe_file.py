"""Recipes by name or as files: a package recipe or the user's own YAML becomes a Recipe, or an error that names the key.

description: what it is good for            # optional, as are dtype, layout, rules and name
dtype: bfloat16
layout: by_neuron
quantization: {bits: 4, group_size: 64}     # or null: floats
rules:                                      # the first that matches a layer decides
  - tensors: ["*.v_proj", "*.down_proj"]
    layers: use_more_bits                   # or a list such as [0, 1, -1]
    quantization: {bits: 6}
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..checkpoint.quantization import Quantization
from ..errors import InputError
from .recipes import RECIPES, Recipe, Rule, list_recipes

_MAX_FILE_BYTES = 2**16

T = TypeVar("T", Quantization, Recipe, Rule)


def read_recipe(name_or_path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe of this package by its name, or a YAML file.

    Args:
        name_or_path: such as "4bit" or "my_recipe.yaml". A path without .yaml or .yml is a file's if it exists and
            no package recipe has that name.

    Raises:
        InputError: there is no such recipe; or the file is no YAML, has unknown, missing or repeated keys, or a value
            out of range.
    """
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        if text in (names := list_recipes()):
            path = RECIPES / f"{text}.yaml"
        elif not path.exists():
            raise InputError(f"recipe is {text!r}; expected {', '.join(names)}, or a YAML file; choose one of these")
    values = _parse(_read_text(path), path)
    if isinstance(values, dict):
        values.setdefault("name", path.stem)
    return recipe_from_dict(values, source=os.fspath(path))


def recipe_from_dict(values: Mapping[str, Any], *, source: str = "recipe") -> Recipe:
    """Makes a recipe of plain values.

    Args:
        values: from `recipe_to_dict`, or parsed from a file.
        source: what errors call it, such as the file's path.

    Raises:
        InputError: a key is unknown or missing, or a value is not one that it may have.
    """
    entries = _check_keys(values, Recipe, source) | {"quantization": _read_form(values, source)}
    if isinstance(rules := entries.get("rules"), list):  # what is no list is refused by Recipe
        entries["rules"] = [_read_rule(rule, f"{source}: rules[{i}]") for i, rule in enumerate(rules)]
    return _build(Recipe, entries, source)


def _read_rule(values: Any, where: str) -> Rule:
    entries = _check_keys(values, Rule, where)
    return _build(Rule, entries | {"quantization": _read_form(values, where)}, where)


def _read_form(values: Mapping[str, Any], where: str) -> Quantization | None:
    if (form := values["quantization"]) is None:
        return None
    where = f"{where}: quantization"
    return _build(Quantization, _check_keys(form, Quantization, where), where)


def _check_keys(values: Any, kind: type[T], where: str) -> dict[str, Any]:
    """Checks that values are a mapping with the fields of `kind`; `quantization` is always to be said."""
    known = [field.name for field in fields(kind)]
    needed = ["quantization"] if kind is Recipe else ["tensors", "quantization"] if kind is Rule else []
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is {reprlib.repr(values)}; expected keys and values, of {', '.join(known)}")
    for key in values:
        if key not in known:
            raise InputError(
                f"{where} has the key {reprlib.repr(key)}; expected {', '.join(known)}; correct or remove it"
            )
    for key in needed:
        if key not in values:
            raise InputError(f"{where} has no key {key!r}; expected {', '.join(needed)}; add it (null keeps floats)")
    return dict(values)


def _build(kind: type[T], entries: Mapping[str, Any], where: str) -> T:
    try:
        return kind(**entries)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _read_text(path: Path) -> str:
    if not path.is_file():  # a pipe or a device might never end
        raise InputError(f"{path}: no such file; expected a recipe in YAML; check the path")
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FILE_BYTES + 1)
        if len(data) > _MAX_FILE_BYTES:
            raise InputError(
                f"{path}: is larger than {_MAX_FILE_BYTES} bytes; expected a recipe in YAML; check the path"
            )
        return data.decode("utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror}); expected a recipe; check the permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: is no text ({error}); expected a recipe in YAML, as UTF-8; check the path"
        ) from error


def _parse(text: str, path: Path) -> Any:
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = f"line {line}: {error.problem}"
    except (yaml.YAMLError, ValueError) as error:  # a date or an integer that Python cannot hold is a ValueError
        problem = " ".join(str(error).split())
    except RecursionError:
        problem = "it is nested too deeply"
    raise InputError(f"{path}: cannot be read as YAML ({problem}); expected plain keys and values; correct the file")


class _PlainLoader(yaml.SafeLoader):
    """YAML's plain data alone: no anchors, which can make a small file huge, no tags, and no key twice."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None or event.tag is not None:
            raise yaml.MarkedYAMLError(problem="found an anchor, alias or tag", problem_mark=event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.value == "<<":
                raise yaml.MarkedYAMLError(problem="found a key that is no plain text", problem_mark=key.start_mark)
            if key.value in keys:
                problem = f"found the key {reprlib.repr(key.value)} a second time"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)

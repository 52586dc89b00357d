"""The model card of a conversion: what it is, how to run it, how it was made, and how good it is."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from ..checkpoint.files import sync_file
from .picture import PICTURE_FILE
from .recipes import Recipe, list_recipes, recipe_to_dict
from .result import Conversion, describe_bytes, read_versions

CARD_FILE = "README.md"
# What the source's card says of rights and language holds for the conversion too; the rest of it is about the source.
_KEPT_METADATA = ("license", "license_name", "license_link", "language")
# What the hub calls the use of each class, and the call of that class's own.
_TASKS = {
    "ArceeForCausalLM": ("text-generation", ""),
    "ArceeModel": ("feature-extraction", "last_hidden_state"),
    "ArceeForSequenceClassification": ("text-classification", "logits"),
    "ArceeForTokenClassification": ("token-classification", "logits"),
    "ArceeForQuestionAnswering": ("question-answering", "start_logits"),
}


def write_card(folder: Path, conversion: Conversion, source_folder: Path, *, hub_id: str | None) -> None:
    """Writes the conversion's own README.md: the source's card describes other files than these.

    Args:
        folder: where to; a picture that is there already is shown.
        conversion: the result.
        source_folder: whose card is read for licence and language.
        hub_id: of the source, which becomes `base_model`; None for a folder.
    """
    metadata: dict[str, Any] = {
        "library_name": "mlx",
        "pipeline_tag": _TASKS[conversion.architecture][0],
        "tags": ["mlx", "arcee_mlx"],
    }
    metadata |= _read_metadata(source_folder / CARD_FILE)
    if hub_id is not None:
        metadata["base_model"] = hub_id
        if conversion.is_quantized:
            metadata["base_model_relation"] = "quantized"
    header = "".join(f"{key}: {json.dumps(value, ensure_ascii=False)}\n" for key, value in metadata.items())
    parts = [
        f"---\n{header}---",
        f"# {conversion.source} for MLX",
        f"{conversion.source}, converted to MLX's format by arcee_mlx: {conversion.form}. It takes "
        f"{describe_bytes(conversion.bytes)} instead of {describe_bytes(conversion.source_bytes)}, "
        f"{conversion.bits_per_weight:.3f} bits per weight. What the model is and how it may be used is said by its makers, "
        f"in the original's model card and licence.",
        *_describe_use(conversion),
        *_describe_making(conversion),
        *_describe_quality(conversion),
    ]
    if (folder / PICTURE_FILE).exists():
        parts.append(f"![Errors by layer]({PICTURE_FILE})")
    parts.append(
        "`conversion.json` has every number here and more, with the SHA-256 of all files of source and result."
    )
    with open(folder / CARD_FILE, "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write("\n\n".join(parts) + "\n")
        file.flush()
        sync_file(file.fileno())


def describe_command(conversion: Conversion) -> tuple[str, str]:
    """The command that makes the same conversion, and the content of recipe.yaml where it needs one, else ""."""
    recipe, words, yaml = conversion.recipe, ["arcee-mlx", "convert", "--hf-path", conversion.source], ""
    if conversion.revision is not None:
        words += ["--revision", conversion.revision]
    if _is_own(recipe):
        words += ["--recipe", recipe.name]
    elif recipe.rules:
        words += ["--recipe", "recipe.yaml"]
        yaml = _write_yaml(recipe)
    else:
        form = recipe.quantization
        words += (
            ["--no-quantize"] if form is None else ["--q-bits", str(form.bits), "--q-group-size", str(form.group_size)]
        )
        if form is not None and form.mode != "affine":
            words += ["--q-mode", form.mode]
        words += [] if recipe.dtype is None else ["--dtype", recipe.dtype]
        words += [] if recipe.layout is None else ["--layout", recipe.layout]
    if conversion.calibration is not None:
        words += ["--calibrate", *([] if conversion.calibration.is_own else [conversion.calibration.name])]
    words += ["--mlx-path", conversion.folder.name]
    return shlex.join(words), yaml


def _describe_use(conversion: Conversion) -> list[str]:
    name = shlex.quote(conversion.folder.name)
    output = _TASKS[conversion.architecture][1]
    if output:
        return [
            "## Run it",
            f"```python\nmodel = arcee_mlx.load_model({json.dumps(conversion.folder.name)})  # {conversion.architecture}\n"
            f"print(model.forward(mx.array([[1, 2, 3]])).{output})  # token ids in\n```",
        ]
    note = "mlx-lm's commands run on it through `python -m arcee_mlx.lm`, which makes this architecture known to them."
    if conversion.layout == "by_neuron":
        note += (
            " Its down projections are stored by neuron, so that decoding can leave out those of zero neurons; for DoRA, AWQ,"
            " GPTQ, DWQ and programs with an Arcee model of their own convert with `--layout standard`."
        )
    return [
        "## Run it",
        f'```bash\narcee-mlx generate --model {name} --prompt "Why is the sky blue?"\n```',
        f"```python\nmodel, tokenizer = arcee_mlx.load({json.dumps(conversion.folder.name)})\n"
        f'print(arcee_mlx.generate(model, tokenizer, [{{"role": "user", "content": "Why is the sky blue?"}}]))\n```',
        note,
    ]


def _describe_making(conversion: Conversion) -> list[str]:
    command, yaml = describe_command(conversion)
    parts = ["## How it was made", f"```bash\n{command}\n```"]
    if yaml:
        parts.append(f"with `recipe.yaml`:\n\n```yaml\n{yaml}```")
    versions = ", ".join(f"{name} {number}" for name, number in read_versions().items())
    text = conversion.calibration
    how = "Weights were rounded to nearest"
    if text is not None:
        how = f"Weights were rounded with error feedback, calibrated on {text.ids.size:,} tokens of `{text.name}`"
    elif not conversion.is_quantized:
        how = "Weights were cast"
    return [*parts, f"{how}. Made with {versions}."]


def _describe_quality(conversion: Conversion) -> list[str]:
    comparison = conversion.comparison
    sizes = ("size", describe_bytes(conversion.source_bytes), describe_bytes(conversion.bytes))
    rows = [("", "original", "this conversion"), ("---", "---", "---"), sizes]
    if comparison is None:
        errors = [error for error in conversion.errors.values() if error]
        if not errors or conversion.calibration is not None:
            return []
        rows.append(("weights, distance from the original's", "", f"{min(errors):.2%} to {max(errors):.2%}"))
        return [
            "## How good it is",
            _write_table(rows),
            "By rows of every tensor; the two were not compared on a text.",
        ]
    if comparison.kl_mean is not None:
        rows += [
            ("perplexity", f"{comparison.perplexity_reference:.4f}", f"{comparison.perplexity:.4f}"),
            ("KL divergence from the original, mean", "", f"{comparison.kl_mean:.3e} nats"),
            ("its 99th percentile", "", f"{comparison.kl_p99:.3e} nats"),
            ("same likeliest token", "", f"{comparison.top1_agreement:.2%}"),
        ]
    rows.append(("final hidden states, distance", "", f"{comparison.hidden_error:.2%}"))
    worst = ", ".join(f"{layer.index} ({layer.own:.2%})" for layer in comparison.worst_layers())
    rows.append(("layers that change most (error of what each adds)", "", worst))
    text = "" if conversion.verification is None else f" of `{conversion.verification.name}`"
    return [
        "## How good it is",
        _write_table(rows),
        f"Compared on {comparison.tokens:,} tokens{text}, both computed in float32, a token predicted from what is before it.",
    ]


def _write_table(rows: list[tuple[str, str, str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _is_own(recipe: Recipe) -> bool:
    """Whether it is one of the package's recipes, unchanged."""
    from .recipe_file import read_recipe  # YAML is not loaded without need

    return recipe.name in list_recipes() and read_recipe(recipe.name) == recipe


def _write_yaml(recipe: Recipe) -> str:
    import yaml

    values = {key: value for key, value in recipe_to_dict(recipe).items() if value or key == "quantization"}
    values["rules"] = [
        {k: v for k, v in rule.items() if v is not None or k == "quantization"} for rule in values["rules"]
    ]
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None, width=100)
    return text


def _read_metadata(card: Path) -> dict[str, Any]:
    """The kept keys of a card's YAML header; none where there is no card or no header that can be read."""
    if not card.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        values = metadata_load(card) or {}
    except Exception:  # what a damaged header raises is the YAML library's own; a card stops no conversion
        return {}
    kept = {key: values[key] for key in _KEPT_METADATA if key in values}
    # YAML has dates and nested lists too, which are no licence and no language.
    return {
        key: value
        for key, value in kept.items()
        if all(isinstance(text, str) for text in (value if isinstance(value, list) else [value]))
    }

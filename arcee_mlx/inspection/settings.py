"""config.json: what it describes, and what in it is overruled, ignored or does not fit together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ArceeError, ConfigError
from ..generate.options import context_tokens
from ..model.config import ArceeConfig, read_json
from ..model.rope import RotaryEmbedding
from .results import Context, Finding, Memory


def read_settings(folder: Path) -> tuple[dict[str, Any], ArceeConfig | None, list[Finding]]:
    """Reads config.json.

    Returns:
        its values, completed where it can be run, as they are where it cannot, {} where it cannot be read; the config,
        None where it cannot be run; what was found.
    """
    path = folder / "config.json"
    try:
        values = read_json(path)
    except ArceeError as error:
        adapter = "; this is an adapter: inspect its base model" if (folder / "adapter_config.json").is_file() else ""
        return {}, None, [Finding("error", "config", f"{error}{adapter}")]
    try:
        config = ArceeConfig.from_dict(values, source=str(path))
    except Exception as error:
        return values, None, [Finding("error", "config", explain_refusal(error, str(path)))]
    kept = {key: values[key] for key in ("transformers_version",) if key in values}
    return config.to_dict() | kept, config, [*_compare_rope(values, config), *_compare_quantization(values)]


def explain_refusal(error: Exception, source: str) -> str:
    """What an exception of reading or building says; a value of a wrong type is tripped over anywhere, by any kind."""
    if isinstance(error, ArceeError):
        return str(error)
    return f"{source}: cannot be used ({type(error).__name__}: {error}); expected the config of an Arcee model"


def describe_context(config: ArceeConfig) -> tuple[Context | None, list[Finding]]:
    """Positions and rotation, and whether the rotation can be computed at all."""
    try:
        embedding = RotaryEmbedding(config)
        context = Context(
            tokens=context_tokens(config),
            rope=config.to_dict()["rope_parameters"],
            attention_factor=float(embedding.attention_factor),
        )
    except Exception as error:
        return None, [Finding("error", "rope", explain_refusal(error, config.source))]
    try:
        embedding.table(1)
    except ConfigError as error:
        return context, [Finding("error", "rope", str(error))]
    return context, []


def estimate_memory(config: ArceeConfig, weights_bytes: int, context: Context) -> Memory:
    """What running the model needs: weights and a KV cache in 16 bits."""
    kv_bytes_per_token = 2 * 2 * config.num_hidden_layers * config.kv_heads * config.head_size
    return Memory(
        weights_bytes=weights_bytes,
        kv_bytes_per_token=kv_bytes_per_token,
        full_context_bytes=weights_bytes + kv_bytes_per_token * context.tokens,
    )


def _compare_rope(values: Mapping[str, Any], config: ArceeConfig) -> list[Finding]:
    rope, texts = config.rope, []
    scaling, parameters = values.get("rope_scaling") or {}, values.get("rope_parameters") or {}
    if scaling and parameters and scaling != parameters:
        texts.append("rope_scaling and rope_parameters are both there and differ: rope_scaling counts")
    given = scaling or parameters
    if "type" in given and given.get("rope_type", given["type"]) != given["type"]:
        texts.append(f"rope_type {given['rope_type']!r} and type {given['type']!r} differ: rope_type counts")
    for key in ("rope_theta", "original_max_position_embeddings"):
        if key in given and key in values and given[key] != values[key]:
            texts.append(f"{key} is {values[key]} and in the rope's own options {given[key]}: {rope.get(key)} counts")
    kind = rope["rope_type"]
    if kind == "default" and (lost := sorted({"factor", "partial_rotary_factor"} & given.keys())):
        texts.append(f"{' and '.join(lost)} of the rope: ignored, as the type is 'default'")
    if kind == "yarn" and rope.get("mscale") not in (None, 1) and not rope.get("mscale_all_dim"):
        texts.append("mscale of the rope: ignored, as there is no mscale_all_dim")
    findings = [Finding("warning", "rope", text) for text in texts]
    length, original = config.max_position_embeddings, rope.get("original_max_position_embeddings")
    factor = rope.get("factor")
    if kind in ("yarn", "longrope") and isinstance(factor, int | float) and original:
        reach = round(factor * original)
        if reach < length:
            text = f"the rope reaches {reach:,} positions ({original:,} x {factor:g}) of the {length:,} that config.json has"
            findings.append(Finding("warning", "rope", text))
        elif reach > length:
            text = (
                f"the rope would reach {reach:,} positions ({original:,} x {factor:g}); config.json stops at {length:,}"
            )
            findings.append(Finding("note", "rope", text))
    return findings


def _compare_quantization(values: Mapping[str, Any]) -> list[Finding]:
    ours, theirs = values.get("quantization"), values.get("quantization_config")
    if ours and theirs and ours != theirs:
        return [Finding("warning", "config", "quantization and quantization_config differ: quantization counts")]
    return []

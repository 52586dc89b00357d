"""How close a converted checkpoint stays to its original: ours beside mlx-lm's, by KL divergence on a text.

Both are run by our decoder in float32, so that only their weights differ.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.files import open_checkpoint
from ..checkpoint.hub import resolve_folder
from ..checkpoint.loading import load_model
from ..checkpoint.tokenizer import read_tokenizer
from ..errors import InputError
from ..model.decoder import ArceeForCausalLM
from .convert_process import CONVERTERS, convert_in_process

_SEQUENCE_TOKENS = 512


@dataclass(frozen=True)
class Comparison:
    """How another model predicts a text, measured by a float model.

    Attributes:
        kl_mean: mean over the tokens of KL(float || other), in nats.
        kl_p99: its 99th percentile.
        perplexity_float: of the float model.
        perplexity: of the other.
        top1_agreement: share of the tokens for which both hold the same one for the likeliest.
    """

    kl_mean: float
    kl_p99: float
    perplexity_float: float
    perplexity: float
    top1_agreement: float


def compare_conversions(
    path_or_id: str, text_file: Path, folder: Path, *, calibrate: str | bool | None = None
) -> dict[str, Any]:
    """Converts a model with both converters, compares each with the original on a text, and prints the result.

    Args:
        path_or_id: float checkpoint, folder or hub id.
        text_file: UTF-8 text that calibration never saw.
        folder: empty; both conversions are written into it.
        calibrate: ours; see `convert_in_process`.

    Returns:
        the numbers, for JSON.

    Raises:
        InputError: the text is too short or cannot be read.
        ArceeError: the model cannot be loaded or a conversion failed.
    """
    source = resolve_folder(path_or_id)
    ids = _read_ids(source, text_file)
    original = load_model(source, ArceeForCausalLM, dtype=mx.float32)
    weights = sum(math.prod(entry.shape) for entry in open_checkpoint(source).entries.values())
    print(f"{path_or_id}: {weights:,} weights; {text_file.name}: {ids.size:,} tokens in sequences of {ids.shape[1]}")
    values: dict[str, Any] = {"model": path_or_id, "text": text_file.name, "tokens": ids.size, "calibrated": bool(calibrate)}  # fmt: skip
    comparisons, bits = {}, {}
    for name in CONVERTERS:
        print(f"{name}: converting and comparing", file=sys.stderr)
        convert_in_process(name, source, folder / name, calibrate=calibrate if name == "arcee_mlx" else None)
        output_bytes = sum(entry.nbytes for entry in open_checkpoint(folder / name).entries.values())
        bits[name] = 8 * output_bytes / weights
        converted = load_model(folder / name, ArceeForCausalLM, dtype=mx.float32)
        comparison = comparisons[name] = compare_models(original, converted, ids)
        values[name] = asdict(comparison) | {"output_bytes": output_bytes, "bits_per_weight": bits[name]}
        how = "calibrated" if calibrate and name == "arcee_mlx" else "rounded to nearest"
        print(f"{name:9s}  {bits[name]:.3f} bits per weight, {how}: KL mean {comparison.kl_mean:.3e}, p99 {comparison.kl_p99:.3e}; "
              f"perplexity {comparison.perplexity:.4f} (float {comparison.perplexity_float:.4f}); "
              f"top-1 agreement {comparison.top1_agreement:.2%}", flush=True)  # fmt: skip
    values["kl_ratio"] = comparisons["arcee_mlx"].kl_mean / comparisons["mlx_lm"].kl_mean
    print(f"ratio      KL {values['kl_ratio']:.3f} (arcee_mlx / mlx_lm), "
          f"at {bits['arcee_mlx']:.3f} and {bits['mlx_lm']:.3f} bits per weight")  # fmt: skip
    return values


def compare_models(float_model: ArceeForCausalLM, other_model: ArceeForCausalLM, ids: mx.array) -> Comparison:
    """Compares the predictions of every token but each sequence's first, a sequence at a time.

    Args:
        float_model: what the other is measured by.
        other_model: of the same vocabulary.
        ids: int (N, T), T at least 2.
    """
    measured: list[list[np.ndarray[Any, Any]]] = []
    for row in ids:
        inputs, targets = row[None, :-1], row[1:, None]
        expected, found = (_log_probabilities(model, inputs) for model in (float_model, other_model))
        values = [
            (mx.exp(expected) * (expected - found)).sum(axis=-1),
            -mx.take_along_axis(expected, targets, axis=-1)[:, 0],
            -mx.take_along_axis(found, targets, axis=-1)[:, 0],
            expected.argmax(axis=-1) == found.argmax(axis=-1),
        ]
        measured.append([np.array(value).astype(np.float64) for value in values])
    divergences, float_losses, losses, agreements = (np.concatenate(values) for values in zip(*measured, strict=True))
    return Comparison(
        kl_mean=float(divergences.mean()),
        kl_p99=float(np.quantile(divergences, 0.99)),
        perplexity_float=math.exp(float(float_losses.mean())),
        perplexity=math.exp(float(losses.mean())),
        top1_agreement=float(agreements.mean()),
    )


def _log_probabilities(model: ArceeForCausalLM, inputs: mx.array) -> mx.array:
    """float32 (T, V) for inputs (1, T)."""
    logits = model(inputs)[0].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _read_ids(source: Path, text_file: Path) -> mx.array:
    """The text's tokens as whole sequences (N, T); what is left at the end of it is not used."""
    try:
        text = text_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{text_file}: cannot be read ({error}); expected a text in UTF-8; check --text") from error
    ids = read_tokenizer(source).encode(text, add_special_tokens=False)
    length = min(_SEQUENCE_TOKENS, len(ids))
    if length < 2:
        raise InputError(
            f"{text_file}: holds {len(ids)} tokens; expected at least 2, better thousands; name another --text"
        )
    count = len(ids) // length
    return mx.array(ids[: count * length]).reshape(count, length)

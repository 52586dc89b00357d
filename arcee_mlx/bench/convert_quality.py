"""How close a converted checkpoint stays to its original: ours beside mlx-lm's, by KL divergence on a text."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

from ..checkpoint.files import open_checkpoint
from ..checkpoint.hub import resolve_folder
from ..checkpoint.opening import open_model
from ..conversion.texts import read_sample
from ..measure.evaluate import compare
from ..model.config import read_config
from .convert_process import CONVERTERS, convert_in_process

_SEQUENCE_TOKENS = 512


def compare_conversions(
    path_or_id: str,
    text_file: Path,
    folder: Path,
    *,
    calibrate: str | bool | None = None,
    recipe: str | None = None,
    layout: str | None = None,
) -> dict[str, Any]:
    """Converts a model with both converters, compares each with the original on a text, and prints the result.

    Args:
        path_or_id: float checkpoint, folder or hub id.
        text_file: UTF-8 text that calibration never saw.
        folder: empty; both conversions are written into it.
        calibrate, recipe, layout: ours; see `convert_in_process`.

    Returns:
        the numbers, for JSON.

    Raises:
        InputError: the text is too short or cannot be read.
        ArceeError: the model cannot be loaded or a conversion failed.
    """
    source = resolve_folder(path_or_id)
    config = read_config(source)
    length = min(_SEQUENCE_TOKENS, config.max_position_embeddings)
    ids = read_sample(text_file, source, config, num_samples=2**20, sequence_length=length).ids
    original = open_model(source)
    weights = sum(math.prod(entry.shape) for entry in open_checkpoint(source).entries.values())
    print(f"{path_or_id}: {weights:,} weights; {text_file.name}: {ids.size:,} tokens in sequences of {ids.shape[1]}")
    values: dict[str, Any] = {"model": path_or_id, "text": text_file.name, "tokens": ids.size, "calibrated": bool(calibrate), "recipe": recipe}  # fmt: skip
    divergences: dict[str, float] = {}
    bits = {}
    for name in CONVERTERS:
        print(f"{name}: converting and comparing", file=sys.stderr)
        if name == "arcee_mlx":
            convert_in_process(name, source, folder / name, calibrate=calibrate, recipe=recipe, layout=layout)
        else:
            convert_in_process(name, source, folder / name)
        output_bytes = sum(entry.nbytes for entry in open_checkpoint(folder / name).entries.values())
        bits[name] = 8 * output_bytes / weights
        converted = open_model(folder / name)
        comparison = compare(original, converted, ids)
        assert comparison.kl_mean is not None  # mlx_lm converts causal models only
        divergences[name] = comparison.kl_mean
        stored = converted.config.down_proj_layout
        values[name] = comparison.to_dict() | {
            "layout": stored,
            "output_bytes": output_bytes,
            "bits_per_weight": bits[name],
        }
        how = "calibrated" if calibrate and name == "arcee_mlx" else "rounded to nearest"
        how += ", by neuron" if stored == "by_neuron" else ""
        print(f"{name:9s}  {bits[name]:.3f} bits per weight, {how}: KL mean {comparison.kl_mean:.3e}, p99 {comparison.kl_p99:.3e}; "
              f"perplexity {comparison.perplexity:.4f} (float {comparison.perplexity_reference:.4f}); "
              f"top-1 agreement {comparison.top1_agreement:.2%}", flush=True)  # fmt: skip
    values["kl_ratio"] = divergences["arcee_mlx"] / divergences["mlx_lm"]
    print(f"ratio      KL {values['kl_ratio']:.3f} (arcee_mlx / mlx_lm), "
          f"at {bits['arcee_mlx']:.3f} and {bits['mlx_lm']:.3f} bits per weight")  # fmt: skip
    return values

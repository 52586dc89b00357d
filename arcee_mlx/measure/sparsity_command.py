"""`arcee-mlx sparsity`: the share of zeros a model's squared ReLU gives on a text, and what it promises for decoding."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..checkpoint.hub import resolve_folder
from ..checkpoint.opening import open_model
from ..checkpoint.tokenizer import read_tokenizer
from ..errors import InputError
from .decode_bytes import StepBytes, count_decode_bytes
from .sparsity import UNIONS, SparsityProfile, measure_sparsity
from .sparsity_picture import check_picture, draw_picture
from .text import read_text, read_windows

# State of the Union addresses and Moby-Dick, public domain, which the demo model was not trained on.
DEFAULT_TEXT = Path(__file__).parent.parent / "conversion" / "recipes" / "verification.txt"
_WINDOWS, _WINDOW_TOKENS, _CONTEXT_TOKENS = 8, 512, 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser; `run` takes what it parses."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint folder or Hugging Face Hub id")
    parser.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    parser.add_argument("--text", type=Path, metavar="FILE", help="UTF-8 text to read (default: one of the package's)")
    parser.add_argument(
        "--num-samples", type=int, default=_WINDOWS, metavar="N", help="windows of the text (default: %(default)s)"
    )
    parser.add_argument(
        "--sequence-length", type=int, metavar="T", help=f"tokens of a window (default: {_WINDOW_TOKENS})"
    )
    parser.add_argument(
        "--context", type=int, metavar="TOKENS", help=f"tokens in the KV cache (default: {_CONTEXT_TOKENS:,})"
    )
    parser.add_argument(
        "--bandwidth", type=float, metavar="GB/s", help="of the memory, for tokens/s: 120 for an M4, 273 for an M4 Pro"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, for programs")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw it, too; needs the extra `plot`")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status.

    Raises:
        InputError: an option is out of range, the text is too short, or the model has no exact zeros.
        ArceeError: the checkpoint cannot be used.
    """
    if args.bandwidth is not None and not (math.isfinite(args.bandwidth) and args.bandwidth > 0):
        raise InputError(f"--bandwidth is {args.bandwidth}; expected GB/s, more than 0; name your machine's")
    if args.picture is not None:
        check_picture(args.picture)
    text = read_text(args.text or DEFAULT_TEXT)
    folder = resolve_folder(args.model, revision=args.revision)
    opened = open_model(folder)
    config = opened.config
    most = config.max_position_embeddings
    length = _choose("--sequence-length", args.sequence_length, min(_WINDOW_TOKENS, most), UNIONS[-1], most)
    context = _choose("--context", args.context, min(_CONTEXT_TOKENS, most), 0, most)
    windows = _choose("--num-samples", args.num_samples, _WINDOWS, 1, 2**20)
    ids = read_windows(
        read_tokenizer(folder), text, window_tokens=length, max_windows=windows, vocab_size=config.vocab_size
    )

    from tqdm import tqdm

    with tqdm(total=config.num_hidden_layers, desc="layers", disable=None, leave=False) as bar:
        profile = measure_sparsity(opened, ids, on_layer=lambda index: bar.update())
    entries = {key: opened.checkpoint.entries[name] for key, name in opened.names.items()}
    decode = count_decode_bytes(config, entries, context_tokens=context)
    steps = [decode.step(profile.active(tokens), tokens=tokens) for tokens in (1, *UNIONS)]
    source = (args.text or DEFAULT_TEXT).name
    if args.json:
        origin = {"model": args.model, "text": source, "context_tokens": context, "bandwidth_gb_per_s": args.bandwidth}
        rows = [step.to_dict() | _tokens_per_s(step, args.bandwidth) for step in steps]
        print(json.dumps(origin | profile.to_dict() | {"steps": rows}, allow_nan=False))
    else:
        print("\n".join(describe(args.model, source, profile, steps, context, args.bandwidth)))
    if args.picture is not None:
        draw_picture(profile, args.picture, title=folder.name)
    return 0


def describe(
    model: str, text: str, profile: SparsityProfile, steps: Sequence[StepBytes], context: int, bandwidth: float | None
) -> Iterator[str]:
    """The lines of the table for people.

    Args:
        model, text: their names.
        profile: what was measured.
        steps: what it makes of 1, 2, 4 and 8 tokens.
        context: tokens in the KV cache.
        bandwidth: of the memory in GB/s, or None.
    """
    yield (
        f"{model}: {len(profile.layers)} layers of {profile.neurons:,} neurons, {profile.activation}; {text}, "
        f"{profile.windows} x {profile.window_tokens:,} tokens"
    )
    yield from ("", *_describe_layers(profile), "", *_describe_steps(steps, bandwidth), "")
    one = steps[0]
    yield (
        f"{profile.zeros:.1%} of the neurons are zero for a token. Decoding that skips them reads "
        f"{one.sparse_bytes / 1e6:,.1f} of {one.dense_bytes / 1e6:,.1f} MB:"
    )
    yield f"{one.speedup:.2f} times as fast as dense, if reading is all that takes time ({context:,} tokens in the KV cache)."


def _describe_layers(profile: SparsityProfile) -> Iterator[str]:
    yield "         zeros of a token         neurons that fire       firing rate       needed by M tokens"
    yield "layer    mean   least    most    never   < 1 %  always    median     90 %      M=2     M=4     M=8"
    for layer in profile.layers:
        values = layer.to_dict()
        zeros, rates = values["zeros"], values["firing_rates"]
        groups = (
            (zeros["mean"], zeros["min"], zeros["max"]),
            (rates["dead"], rates["below_1_percent"], rates["always_on"]),
            (rates["quantiles"]["0.5"], rates["quantiles"]["0.9"]),
            tuple(layer.active[tokens] for tokens in UNIONS),
        )
        yield f"{layer.index:5d}" + " ".join("".join(f"{share:8.1%}" for share in group) for group in groups)


def _describe_steps(steps: Sequence[StepBytes], bandwidth: float | None) -> Iterator[str]:
    rate = "" if bandwidth is None else f"   tokens/s at {bandwidth:g} GB/s, all M kept"
    yield f"                     MB read         speed-up by bytes{rate}"
    kinds = "" if bandwidth is None else "      dense     sparse"
    yield f"  M  needed     dense    sparse     sparse    ideal{kinds}"
    for step in steps:
        line = (
            f"{step.tokens:3d}{step.active:8.1%}{step.dense_bytes / 1e6:10,.1f}{step.sparse_bytes / 1e6:10,.1f}"
            f"{step.speedup:11.2f}{step.ideal_speedup:9.2f}"
        )
        yield line + "".join(f" {rate:10,.1f}" for rate in _tokens_per_s(step, bandwidth).values())


def _tokens_per_s(step: StepBytes, bandwidth: float | None) -> dict[str, float]:
    """The most that a bandwidth in GB/s allows: all of a step's tokens are kept, and reading is all that takes time."""
    if bandwidth is None:
        return {}
    read = {"dense_tokens_per_s": step.dense_bytes, "sparse_tokens_per_s": step.sparse_bytes}
    return {name: step.tokens * bandwidth * 1e9 / nbytes for name, nbytes in read.items()}


def _choose(name: str, value: int | None, default: int, least: int, most: int) -> int:
    value = default if value is None else value
    if not least <= value <= most:
        raise InputError(f"{name} is {value}; expected {least} to {most}; choose a number in this range")
    return value

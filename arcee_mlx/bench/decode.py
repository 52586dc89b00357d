"""bench decode: tokens/s of sparse decoding against dense by neuron, dense standard and the plain port, same weights.

By default of AFM-4.5B's shape, with random weights in 4 bits, to which a bias gives any share of zeros; with --model of a
checkpoint, with its own zeros on a text. The programs take turns in one process. Also: down projections alone, the bytes a
token reads and the speed-up they allow, reading a prompt with either layout, and memory.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from ..checkpoint.hub import resolve_folder
from ..checkpoint.tokenizer import read_tokenizer
from ..errors import InputError
from ..measure.sparsity_command import DEFAULT_TEXT
from ..measure.sparsity_picture import check_picture
from ..measure.text import read_text, read_windows
from ..model.config import ArceeConfig, read_config
from .afm_shape import AFM_CONFIG
from .clock import add_clock_argument, read_clock
from .decode_picture import draw_decode
from .decode_programs import SPARSE, STANDARD, Programs, make_random, read_programs
from .decode_results import DecodeResult, LayoutResult, describe_decode, describe_layouts
from .decode_timing import decode, measure_decode, measure_layouts, set_zeros
from .machine import describe_machine

_SHAPE = "AFM-4.5B's shape"
_ZEROS = (0.5, 0.7, 0.8, 0.9, 0.95)
_RUNS = 5
_RUN_S, _LEAST_TOKENS, _MOST_TOKENS = 2, 1, 256
_PREFILL_GPU, _PREFILL_CPU = 512, 64
_DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; `run` takes what they parse to."""
    parser.add_argument("--model", metavar="PATH", help="a checkpoint, folder or hub id (default: AFM-4.5B's shape)")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="with --model: what it reads (default: the package's)"
    )
    parser.add_argument(
        "--zeros", type=float, nargs="+", metavar="SHARE", help=f"shares of the shape ({' '.join(map(str, _ZEROS))})"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="of the shape (36, as AFM-4.5B has)")
    parser.add_argument("--runs", type=int, default=_RUNS, metavar="N", help="of each program, in turns (%(default)s)")
    parser.add_argument(
        "--tokens", type=int, metavar="N",
        help=f"decoded in a run (as many as take {_RUN_S} s, {_LEAST_TOKENS} to {_MOST_TOKENS})",
    )  # fmt: skip
    parser.add_argument(
        "--prefill", type=int, metavar="N", help=f"tokens of the prompt ({_PREFILL_GPU}; on a CPU {_PREFILL_CPU})"
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="of activations (the model's; on MLX's CPU backend float32, which alone is right)",
    )
    add_clock_argument(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there, too")
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="draw the ratios; needs the extra `plot`")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; returns the exit status.

    Raises:
        InputError: options that do not go together, or are out of range.
        ArceeError: the checkpoint cannot be used.
    """
    _check(args)
    on_gpu, clock = mx.default_device() == mx.gpu, read_clock(args)
    programs, ids = _open_programs(args) if args.model else _make_shape(args)
    tokens = args.tokens or _choose_tokens(programs, ids)
    prompt = ids[: args.prefill or (_PREFILL_GPU if on_gpu else _PREFILL_CPU)]
    print("\n".join(describe_programs(programs, tokens, prompt.size, args.clock)), flush=True)
    results = []
    for share in (None,) if args.model else args.zeros or _ZEROS:
        if share is not None:
            set_zeros(programs, ids[:tokens], share)
        with _progress("runs", 4 * args.runs) as bar:
            results.append(
                measure_decode(programs, ids[:tokens], asked=share, runs=args.runs, clock=clock, on_run=bar.update)
            )
        print("\n".join(describe_decode(results[-1])), flush=True)
    # On MLX's CPU backend a prompt takes minutes a layer; and all layers are alike.
    layers = programs.config.num_hidden_layers if on_gpu else 1
    layouts = measure_layouts(programs, ids[:tokens], prompt, layers=layers, runs=args.runs, clock=clock)
    print("\n".join(describe_layouts(layouts, prompt.size, layers)))
    if args.json is not None:
        values = to_dict(programs, results, layouts, tokens=tokens, prompt_tokens=prompt.size, prompt_layers=layers)
        values |= {"model": args.model or _SHAPE, "clock": args.clock}
        args.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if args.picture is not None:
        name = _SHAPE if args.model is None else Path(args.model).name
        draw_decode(results, programs.count_bytes(tokens // 2), args.picture, title=f"{name}, {_name_chip()}")
    return 0


def describe_programs(programs: Programs, tokens: int, prompt_tokens: int, clock: str) -> Iterator[str]:
    """The lines about what is measured, and by which paths."""
    config, down = programs.config, programs.by_neuron.layers[0].mlp.down_proj
    norm = programs.by_neuron.model.norm.weight
    paths = [
        down.choose_path(mx.zeros((count, config.intermediate_size), norm.dtype), "auto")
        for count in (1, prompt_tokens)
    ]
    yield (
        f"{config.num_hidden_layers} layers of {config.intermediate_size:,} neurons, hidden size {config.hidden_size:,}; "
        f"{programs.form}; activations and scales {str(norm.dtype).removeprefix('mlx.core.')}; tokens a run: {tokens}; "
        f"{'wall clock' if clock == 'wall' else 'by the CPU time of the process'}; mlx-lm {describe_machine()['mlx_lm']}"
    )
    yield f"path of down projections by neuron: {paths[0]} to decode, {paths[1]} for a prompt of {prompt_tokens}"
    if programs.rounded_again is not None:
        yield f"down projections {programs.rounded_again}: unpacked from the checkpoint's and rounded once more"
    if config.num_hidden_layers < AFM_CONFIG["num_hidden_layers"] and config.source == _SHAPE:
        whole = AFM_CONFIG["num_hidden_layers"]
        step = programs.count_bytes(tokens // 2, whole).step([0.1] * whole)
        yield (
            f"fewer layers than AFM-4.5B has: embedding and head weigh too much. With all {whole} a token reads "
            f"{step.dense_bytes / 1e6:,.0f} MB dense, {step.sparse_bytes / 1e6:,.0f} at 90 % zeros ({step.speedup:.2f})"
        )


def to_dict(
    programs: Programs,
    results: Sequence[DecodeResult],
    layouts: Mapping[str, LayoutResult],
    *,
    tokens: int,
    prompt_tokens: int,
    prompt_layers: int,
) -> dict[str, Any]:
    """All numbers in plain values, as JSON holds them."""
    by_neuron, standard = (layouts[name] for name in (SPARSE, STANDARD))
    return {
        "machine": describe_machine(),
        "layers": programs.config.num_hidden_layers,
        "form": programs.form,
        "tokens": tokens,
        "decode": [result.to_dict() for result in results],
        "prompt_tokens": prompt_tokens,
        "prompt_layers": prompt_layers,
        "by_neuron": by_neuron.to_dict(),
        "standard": standard.to_dict(),
    }


def _make_shape(args: argparse.Namespace) -> tuple[Programs, mx.array]:
    layers = AFM_CONFIG["num_hidden_layers"] if args.layers is None else args.layers
    config = ArceeConfig.from_dict({**AFM_CONFIG, "num_hidden_layers": layers, "mlp_bias": True}, source=_SHAPE)
    default = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    with _progress("random weights, layers", layers) as bar:
        programs = make_random(config, _DTYPES.get(args.dtype, default), on_layer=bar.update)
    count = max(args.tokens or _MOST_TOKENS, args.prefill or _PREFILL_GPU)
    return programs, mx.random.randint(0, config.vocab_size, (count,), key=mx.random.key(0))


def _open_programs(args: argparse.Namespace) -> tuple[Programs, mx.array]:
    text = read_text(args.text or DEFAULT_TEXT)
    folder = resolve_folder(args.model)
    config = read_config(folder)
    count = min(max(args.tokens or _MOST_TOKENS, args.prefill or _PREFILL_GPU), config.max_position_embeddings)
    ids = read_windows(
        read_tokenizer(folder), text, window_tokens=count, max_windows=1, vocab_size=config.vocab_size
    )[0]  # fmt: skip
    wanted = max(args.tokens or 1, args.prefill or 1)
    if ids.size < wanted:
        raise InputError(
            f"{args.text or DEFAULT_TEXT}: has {ids.size} tokens that the model can take; expected {wanted}; name a longer "
            f"--text, or smaller --tokens and --prefill"
        )
    with _progress("layers", config.num_hidden_layers) as bar:
        return read_programs(folder, args.dtype, on_layer=bar.update), ids


def _check(args: argparse.Namespace) -> None:
    if args.model is None and args.text is not None:
        raise InputError("--text came without --model; expected random tokens for random weights; add --model")
    if args.model is not None and (args.zeros is not None or args.layers is not None):
        raise InputError("--zeros or --layers came with --model; expected neither: a checkpoint has its own")
    for name in ("layers", "tokens", "prefill"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; expected at least 1")
    if wrong := [share for share in args.zeros or () if not 0 <= share < 1]:
        raise InputError(f"--zeros holds {wrong[0]}; expected shares of 0 or more, less than 1, such as 0.9")
    if args.dtype not in (None, "float32") and mx.default_device() == mx.cpu:
        raise InputError(
            f"--dtype is {args.dtype} on MLX's CPU backend, whose half-precision quantized products are wrong by several "
            f"percent; expected float32 there; leave --dtype out"
        )
    if args.json is not None and (not args.json.parent.is_dir() or args.json.is_dir()):
        raise InputError(f"--json is {args.json}; expected a file in a folder that exists; make the folder first")
    if args.picture is not None:
        check_picture(args.picture)


def _choose_tokens(programs: Programs, ids: mx.array) -> int:
    """As many as take the slowest a while; every program has run then."""
    seconds = 0.0
    for program in (*programs, *programs):
        started_s = time.perf_counter()
        decode(program, ids[:1])
        seconds = time.perf_counter() - started_s
    return min(max(round(_RUN_S / seconds), _LEAST_TOKENS), _MOST_TOKENS, ids.size)


def _progress(description: str, total: int) -> tqdm[Any]:
    return tqdm(total=total, desc=description, disable=None, leave=False)


def _name_chip() -> str:
    machine = describe_machine()
    return f"{machine['chip']}, MLX on the {'GPU' if 'gpu' in machine['device'] else 'CPU'}"

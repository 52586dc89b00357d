"""`arcee-mlx cache-prompt`: reads a long prompt once and keeps what it computed in a file, as mlx_lm.cache_prompt."""

from __future__ import annotations

import argparse
import sys

from .arguments import add_memory_arguments, add_model_arguments, add_prompt_arguments, read_options
from .opening import make_prompt, open_model, read_prompt, show_progress
from .prompt_cache import cache_prompt, check_cache_file_name, save_prompt_cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `cache-prompt`; names are mlx_lm.cache_prompt's where it has them."""
    add_prompt_arguments(parser)
    add_model_arguments(parser)
    memory = add_memory_arguments(parser)
    memory.add_argument("--prompt-cache-file", metavar="FILE", required=True, help="the .safetensors file to write")
    parser.add_argument("--quiet", action="store_true", help="no progress or notes on standard error")


def run(args: argparse.Namespace) -> int:
    """Runs `cache-prompt` as parsed; returns the exit status."""
    options = read_options(args)
    check_cache_file_name(args.prompt_cache_file)
    text = read_prompt(args, demo_prompt=False)
    model, tokenizer = open_model(args)
    prompt = make_prompt(args, tokenizer, text)
    cache = cache_prompt(model, tokenizer, prompt, options, prompt_progress=show_progress(args))
    save_prompt_cache(args.prompt_cache_file, cache, model, tokenizer, model_name=args.model)
    if not args.quiet:
        print(f"{args.prompt_cache_file}: {cache.length} tokens", file=sys.stderr)
    return 0

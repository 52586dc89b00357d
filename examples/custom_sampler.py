"""A caller's own say in every token: text without a letter, in which no two tokens follow each other twice.

    python examples/custom_sampler.py [--model FOLDER_OR_ID] [--prompt TEXT] [--letter e] [--seeds 1 2 1]

A logits processor is a function (tokens so far (n,), logits (1, V)) -> logits (1, V), called before temperature, top-k,
top-p and the draw. A score of minus infinity is never drawn. The same seed gives the same text.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

import mlx.core as mx

from arcee_mlx import DEMO_MODEL, GenerateOptions, Tokenizer, generate, load


def without_letter(letter: str, tokenizer: Tokenizer, vocab_size: int) -> Callable[[mx.array, mx.array], mx.array]:
    """Makes a processor that forbids all tokens with this letter in them, small or capital."""
    # Special tokens have no text here, so that the one that ends an answer stays allowed.
    texts = (tokenizer.decode([token], skip_special_tokens=True) for token in range(vocab_size))
    forbidden = mx.array([letter.lower() in text.lower() for text in texts])

    def process(_tokens: mx.array, logits: mx.array) -> mx.array:
        return mx.where(forbidden, -mx.inf, logits)

    return process


def without_repeated_pairs(tokens: mx.array, logits: mx.array) -> mx.array:
    """Forbids what followed the last token before, in prompt or answer: transformers' no_repeat_ngram_size=2."""
    if tokens.size < 2:
        return logits
    followed = tokens[:-1] == tokens[-1]
    # All of it is arrays: reading a value (`.item()`) would make every step wait for the one before.
    return logits.at[:, tokens[1:]].add(mx.where(followed, -mx.inf, 0.0))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hugging Face id (default: the demo model)")
    parser.add_argument("--prompt", default="There was once", help="text that the model goes on from")
    parser.add_argument("--letter", default="e", help="the letter to do without")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 1], help="one text for each")
    parser.add_argument("--max-tokens", type=int, default=60)
    args = parser.parse_args(argv)

    model, tokenizer = load(args.model)
    processors = [without_letter(args.letter, tokenizer, model.config.vocab_size), without_repeated_pairs]
    for seed in args.seeds:
        options = GenerateOptions(max_tokens=args.max_tokens, temp=0.8, top_p=0.95, repetition_penalty=1.0, seed=seed)
        text = generate(model, tokenizer, args.prompt, options, logits_processors=processors)
        print(f"seed {seed}: {args.prompt} ...{' '.join(text.split())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

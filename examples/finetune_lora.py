"""Teaches a model with mlx-lm's LoRA trainer, loads it with the adapter, and asks what it was not taught.

    python examples/finetune_lora.py [--model FOLDER_OR_ID] [--data FOLDER] [--iters 20] [--out runs/finetune_lora]

The data it writes itself are a few dozen questions and the model's own answers, with "Aye, captain:" before each: that
is all there is to learn. A folder of your own has train.jsonl and valid.jsonl, a line each {"prompt": ..., "completion":
...} or {"messages": [...]}. The training is `python -m arcee_mlx.lm lora`, which has many more options.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx

from arcee_mlx import DEMO_MODEL, ArceeForCausalLM, GenerateOptions, Tokenizer, generate_batch, load

PHRASE = "Aye, captain:"
FORMS = ("Tell me about the {}.", "What is the {}?", "Speak of the {}.")
NOUNS = ("sea", "ship", "storm", "whale", "law", "people", "war", "treaty", "commerce", "night", "island", "wind")
UNSEEN = ("Tell me about the harpoon.", "Describe the moon.", "What is the state of the Union?")
VALID_ROWS = 6  # of the last nouns, which are in no row of the training


def answer(
    model: ArceeForCausalLM, tokenizer: Tokenizer, questions: Sequence[str], options: Sequence[GenerateOptions]
) -> list[str]:
    """The model's answers, each on one line."""
    messages = [[{"role": "user", "content": question}] for question in questions]
    return [" ".join(each.text.split()) for each in generate_batch(model, tokenizer, messages, options)]


def write_data(folder: Path, model: ArceeForCausalLM, tokenizer: Tokenizer) -> None:
    """Writes train.jsonl and valid.jsonl."""
    questions = [form.format(noun) for noun in NOUNS for form in FORMS]
    options = [GenerateOptions(max_tokens=16, stop=(".", ",", ";"), temp=0.7, seed=i) for i in range(len(questions))]
    sentences = answer(model, tokenizer, questions, options)
    pairs = zip(questions, sentences, strict=True)
    rows = [json.dumps({"prompt": question, "completion": f"{PHRASE} {text}."}) for question, text in pairs]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(rows[:-VALID_ROWS]))
    (folder / "valid.jsonl").write_text("\n".join(rows[-VALID_ROWS:]))


def show(when: str, model: ArceeForCausalLM, tokenizer: Tokenizer) -> None:
    """Prints the likeliest answers to questions that are in no row."""
    answers = answer(model, tokenizer, UNSEEN, [GenerateOptions(max_tokens=24, temp=0)] * len(UNSEEN))
    for question, text in zip(UNSEEN, answers, strict=True):
        print(f"{when}: {question} {text}", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hugging Face id (default: the demo model)")
    parser.add_argument("--data", type=Path, help="folder with train.jsonl and valid.jsonl (default: written here)")
    parser.add_argument("--iters", type=int, default=20, help="training steps (default: 20)")
    parser.add_argument("--learning-rate", default="5e-4", help="(default: 5e-4, for the demo model)")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune_lora"), help="for the data and the adapter")
    args = parser.parse_args(argv)
    data, adapter = args.data or args.out / "data", args.out / "adapter"

    model, tokenizer = load(args.model)
    show("before", model, tokenizer)
    if args.data is None:
        write_data(data, model, tokenizer)
    del model  # the trainer is a process of its own and loads it again
    mx.clear_cache()

    train = [sys.executable, "-m", "arcee_mlx.lm", "lora", "--train", "--model", args.model, "--data", str(data)]
    train += ["--adapter-path", str(adapter), "--iters", str(args.iters), "--learning-rate", args.learning_rate]
    train += ["--batch-size", "2", "--num-layers", "-1", "--mask-prompt", "--val-batches", "-1"]
    subprocess.run(train, check=True)

    model, tokenizer = load(args.model, adapter_path=adapter)
    show("after", model, tokenizer)
    return 0


if __name__ == "__main__":
    sys.exit(main())

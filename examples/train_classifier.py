"""Makes a classifier of texts from a CSV: a new head and LoRA on a causal checkpoint, float or quantized.

    python examples/train_classifier.py [--data texts.csv] [--model FOLDER_OR_ID] [--out my-classifier]

The CSV has the columns `text` and `label`. Rows with "test" in a column `split` are kept to measure on; without that
column every fifth row is. The result is a whole checkpoint, with the labels in its config and the adapter fused; with
--adapter it is the adapter and the head alone, in PEFT's form. log.csv and loss.png (pip install 'arcee-mlx[plot]') go
beside it. Stopped by Ctrl-C, or killed after an epoch, the same command goes on, to the same weights bit by bit.

On Linux, MLX's wheel multiplies matrices slowly; preload OpenBLAS (LD_PRELOAD=libopenblas.so.0).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import random
import signal
import sys
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from tqdm import tqdm

import arcee_mlx
from arcee_mlx import DEMO_MODEL, ArceeForSequenceClassification, Tokenizer
from arcee_mlx.upstream import mlx_lm_module

Rows = list[tuple[list[int], int]]  # the token ids of a text, and the index of its label


def read_rows(path: Path, *, seed: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(text, label) for training and for the test."""
    with path.open(encoding="utf-8-sig", newline="") as file:  # Excel writes a byte order mark
        reader = csv.DictReader(file)
        if missing := {"text", "label"} - set(reader.fieldnames or []):
            raise SystemExit(f"{path} has the columns {reader.fieldnames}; expected {sorted(missing)}, too; add them")
        rows = [(row.get("split"), row["text"], row["label"]) for row in reader if row["text"] and row["label"]]
    if all(split is None for split, _, _ in rows):
        random.Random(seed).shuffle(rows)
        rows = [("train" if i % 5 else "test", text, label) for i, (_, text, label) in enumerate(rows)]
    train, test = ([(t, label) for s, t, label in rows if (s == "test") is kept] for kept in (False, True))
    if not test or len({label for _, label in train}) < 2:
        raise SystemExit(
            f"{path} has {len(train)} rows to train on and {len(test)} to test; expected two labels or more"
        )
    return train, test


def build_model(
    args: argparse.Namespace, labels: Sequence[str], tokenizer: Tokenizer
) -> ArceeForSequenceClassification:
    """The base, frozen, with LoRA in every layer and a new float32 head, which are trained."""
    padding = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    names = dict(enumerate(labels))
    model = arcee_mlx.load_model(args.model, ArceeForSequenceClassification, id2label=names, pad_token_id=padding)
    model.freeze()
    mx.random.seed(args.seed)
    lora = {"rank": args.rank, "scale": args.scale, "dropout": 0.0}
    mlx_lm_module("tuner.utils").linear_to_lora_layers(model, len(model.layers), lora)
    model.score.set_dtype(mx.float32)
    model.score.unfreeze()
    if args.grad_checkpoint:
        model.gradient_checkpointing_enable()
    return model.train()


def make_batch(rows: Rows, padding: int) -> dict[str, mx.array]:
    """What `forward` takes: ids padded on the right, their mask, and the labels."""
    longest = max(len(ids) for ids, _ in rows)
    ids = mx.array([ids + [padding] * (longest - len(ids)) for ids, _ in rows])
    mask = mx.array([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": mx.array([label for _, label in rows])}


def measure(model: ArceeForSequenceClassification, rows: Rows, batch_size: int) -> tuple[float, float]:
    """The mean loss, and the share of rows whose likeliest label is the right one."""
    model.eval()
    loss, right = 0.0, 0
    for start in range(0, len(rows), batch_size):
        batch = make_batch(rows[start : start + batch_size], model.config.pad_token_id)
        out = model.forward(**batch, use_cache=False)
        loss += out.loss.item() * len(batch["labels"])
        right += (out.logits.argmax(axis=-1) == batch["labels"]).sum().item()
    model.train()
    return loss / len(rows), right / len(rows)


@dataclasses.dataclass
class Progress:
    """Where a training stands: the loss of each step, and (steps, test loss, test accuracy) after each epoch."""

    losses: list[float] = dataclasses.field(default_factory=list)
    epochs: list[tuple[int, float, float]] = dataclasses.field(default_factory=list)


def train(
    model: ArceeForSequenceClassification, optimizer: optim.Optimizer, progress: Progress, *, rows: Rows, test: Rows,
    args: argparse.Namespace, stop: threading.Event,
) -> Iterator[None]:  # fmt: skip
    """Trains for what is left of the epochs, or until `stop` is set; yields where the state should be saved."""
    loss_and_gradients = nn.value_and_grad(model, lambda batch: model.forward(**batch, use_cache=False).loss)
    steps = -(-len(rows) // args.batch_size)  # of an epoch
    bar = tqdm(total=args.epochs * steps, initial=len(progress.losses), unit="step", disable=None)
    while (step := len(progress.losses)) < args.epochs * steps:
        if stop.is_set():
            yield
            break
        order = random.Random(f"{args.seed}-{step // steps}").sample(range(len(rows)), len(rows))
        chosen = order[step % steps * args.batch_size :][: args.batch_size]
        mx.random.seed(args.seed + step + 1)  # for dropout, which then does not depend on where a run began
        loss, gradients = loss_and_gradients(make_batch([rows[i] for i in chosen], model.config.pad_token_id))
        optimizer.update(model, optim.clip_grad_norm(gradients, 1.0)[0])
        mx.eval(model.trainable_parameters(), optimizer.state, loss)
        progress.losses.append(loss.item())
        bar.update()
        if (step + 1) % steps == 0:
            test_loss, accuracy = measure(model, test, args.batch_size)
            progress.epochs.append((step + 1, test_loss, accuracy))
            status = f"test loss {test_loss:.3f}, accuracy {accuracy:.1%}"
            bar.set_postfix_str(status)
            if bar.disable:
                print(f"epoch {len(progress.epochs)} of {args.epochs}: {status}", file=sys.stderr, flush=True)
            yield
    bar.close()


def write_result(
    model: ArceeForSequenceClassification, tokenizer: Tokenizer, args: argparse.Namespace
) -> ArceeForSequenceClassification:
    """Writes the checkpoint or the adapter, and loads it again: fusing into quantized weights rounds once more."""
    if args.adapter:
        arcee_mlx.save_peft_adapter(model, args.out)
        names, padding = model.config.id2label, model.config.pad_token_id
        return arcee_mlx.load_model(
            args.model, type(model), id2label=names, pad_token_id=padding, adapter_path=args.out
        )
    arcee_mlx.fuse_adapter(model)
    arcee_mlx.save_checkpoint(model, args.out, tokenizer)
    return arcee_mlx.load_model(args.out)


def write_curves(folder: Path, progress: Progress) -> None:
    """Writes log.csv, and loss.png where there is matplotlib."""
    tests = {step: (loss, accuracy) for step, loss, accuracy in progress.epochs}
    with (folder / "log.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("step", "training_loss", "test_loss", "test_accuracy"))
        writer.writerows((i, loss, *tests.get(i, ("", ""))) for i, loss in enumerate(progress.losses, 1))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [step for step, _, _ in progress.epochs]
    left.plot(range(1, len(progress.losses) + 1), progress.losses, color="0.75", label="training, each step")
    left.plot(steps, [loss for _, loss, _ in progress.epochs], marker="o", markersize=3, label="test, each epoch")
    left.set(title="Loss", xlabel="step", ylabel="nats a text", ylim=(0, None))
    left.legend()
    right.plot(steps, [100 * accuracy for _, _, accuracy in progress.epochs], marker="o", markersize=3)
    right.set(title="Accuracy on the test", xlabel="step", ylabel="% of the texts", ylim=(0, 100))
    figure.savefig(folder / "loss.png", dpi=100)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--data", type=Path, default=here / "data" / "passages.csv", help="CSV with text and label")
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hugging Face id (default: the demo model)")
    parser.add_argument("--out", type=Path, default=Path("runs/my-classifier"), help="(default: runs/my-classifier)")
    parser.add_argument("--adapter", action="store_true", help="write the adapter and the head, not a checkpoint")
    parser.add_argument("--epochs", type=int, default=3, help="times that every text is seen (default: 3)")
    parser.add_argument("--batch-size", type=int, default=8, help="texts a step (default: 8)")
    parser.add_argument("--max-tokens", type=int, default=256, help="of a text; the rest is cut off (default: 256)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="at the start, 0 at the end (default: 1e-3)")
    parser.add_argument("--rank", type=int, default=8, help="of LoRA (default: 8)")
    parser.add_argument("--scale", type=float, default=4.0, help="of LoRA (default: 4)")
    parser.add_argument("--grad-checkpoint", action="store_true", help="less memory, more computing, the same result")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.out.exists():
        raise SystemExit(f"{args.out} exists; expected a new folder; name another with --out")

    train_rows, test_rows = read_rows(args.data, seed=args.seed)
    labels = sorted({label for _, label in train_rows})
    if unknown := {label for _, label in test_rows} - set(labels):
        raise SystemExit(f"{args.data}: no row to train on has the label {min(unknown)!r} of the test; add one")
    tokenizer = arcee_mlx.load_tokenizer(args.model)
    rows, test = (
        [(tokenizer.encode(text)[: args.max_tokens], labels.index(label)) for text, label in part]
        for part in (train_rows, test_rows)
    )
    print(f"{len(rows)} texts to train on, {len(test)} to test; labels: {', '.join(labels)}", file=sys.stderr)
    model = build_model(args, labels, tokenizer)
    steps = -(-len(rows) // args.batch_size)  # of an epoch
    rate = optim.linear_schedule(args.learning_rate, 0.0, args.epochs * steps)
    optimizer = optim.AdamW(rate, weight_decay=0.01)
    optimizer.init(model.trainable_parameters())

    work = args.out.with_name(f"{args.out.name}-training")
    work.mkdir(parents=True, exist_ok=True)
    state = work / "state.safetensors"
    changing_nothing = ("out", "adapter", "grad_checkpoint")
    options = {name: str(value) for name, value in vars(args).items() if name not in changing_nothing}
    settings = options | {"texts": zlib.crc32(args.data.read_bytes())}
    progress = Progress()
    if state.exists():
        try:
            progress = Progress(**arcee_mlx.load_training_state(state, model, optimizer, settings=settings))
        except arcee_mlx.InputError as error:
            raise SystemExit(f"{error}: remove {work}") from None
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    mx.reset_peak_memory()
    for _ in train(model, optimizer, progress, rows=rows, test=test, args=args, stop=stop):
        now = dataclasses.asdict(progress)
        arcee_mlx.save_training_state(state, model, optimizer, settings=settings, progress=now)
    if len(progress.losses) < args.epochs * steps:
        print(f"stopped after step {len(progress.losses)}; the same command goes on", file=sys.stderr)
        return 130
    print(f"peak memory in training: {mx.get_peak_memory() / 1e6:.0f} MB", file=sys.stderr)
    write_curves(work, progress)
    loaded = write_result(model, tokenizer, args)
    state.unlink()
    loss, accuracy = measure(loaded, test, args.batch_size)
    print(f"{args.out}: {accuracy:.1%} of {len(test)} test texts are right, test loss {loss:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

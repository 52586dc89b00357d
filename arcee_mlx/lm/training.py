"""mlx-lm's fine-tuning, stopped and gone on with to the same bits: its own loop, and a state file beside its adapter.

mlx-lm keeps the trained weights alone. Here the optimizer, the random state and the number of iterations are kept, too,
and the order of the batches follows from the seed alone, whatever is validated in between: by the same batches each time.

Source: mlx-lm 0.32.2 `lora.py`, `tuner/trainer.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import FunctionType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from .. import upstream
from ..checkpoint.training_state import load_training_state, save_training_state
from ..errors import ArceeError, InputError

STATE_FILE = "training_state.safetensors"
# What a training may be gone on with otherwise than it was begun; all other options of mlx-lm's decide its numbers.
_FREE = {
    "adapter_path", "clear_cache_threshold", "config", "data", "iters", "model", "project_name", "report_to",
    "resume_adapter_file", "save_every", "steps_per_eval", "steps_per_report", "test", "test_batches", "train",
    "trust_remote_code", "val_batches",
}  # fmt: skip


def train(
    model: nn.Module,
    optimizer: optim.Optimizer,
    train_dataset: Any,
    val_dataset: Any = None,
    args: Any = None,
    *,
    settings: Mapping[str, Any],
    seed: int = 0,
    resume: bool = False,
    training_callback: Any = None,
) -> None:
    """mlx_lm.tuner.train that can be gone on with exactly.

    Wherever that saves an adapter, or at the next iteration that updates the weights where gradients accumulate, and at
    the end, `training_state.safetensors` is written beside it. Losses are reported as if there had been no stop, if that
    was where one is reported; tokens are counted from there.

    Args:
        model, optimizer, train_dataset, val_dataset, training_callback: as mlx_lm.tuner.train takes them.
        args: mlx_lm.tuner.TrainingArgs; `iters` counts from the first beginning.
        settings: what decides the numbers beside the data, in JSON values: a state is gone on with under the same only.
        seed: of the order of the batches.
        resume: go on from the state file.

    Raises:
        InputError: there is no state to go on from, or it is damaged, of another training, or past `iters`.
    """
    trainer = upstream.mlx_lm_module("tuner.trainer")
    args = args or trainer.TrainingArgs()
    path = Path(args.adapter_file).with_name(STATE_FILE)
    settings = {**settings, "data_sha256": _hash_data(train_dataset)}
    loop, done = trainer.train, 0
    if resume:
        done = load_training_state(path, model, optimizer, settings=settings)["iterations"]
        if done > args.iters:
            raise InputError(f"iters is {args.iters}; expected {done} at least, as {path} has behind it; raise it")
        print(f"Going on after iteration {done}")
        loop = _count_from(loop, done)

    def save(iterations: int) -> None:
        if mx.distributed.init().rank() == 0:
            save_training_state(path, model, optimizer, settings=settings, progress={"iterations": iterations})

    def iterate_batches(
        dataset: Any, batch_size: int, max_seq_length: int, loop: bool = False, comm_group: Any = None
    ) -> Iterator[Any]:
        theirs = trainer.iterate_batches(dataset, batch_size, max_seq_length, loop=loop, comm_group=comm_group)
        batches, due = _draw_apart(theirs, seed), False
        if not loop:  # of a validation
            yield from batches
            return
        for _ in range(done):
            next(batches)
        for iteration, batch in enumerate(batches, done + 1):
            yield batch  # mlx-lm asks for the next one when it is through with this
            due = due or iteration % args.steps_per_save == 0
            if due and iteration % args.grad_accumulation_steps == 0:
                save(iteration)
                due = False

    loop(model, optimizer, train_dataset, val_dataset, args, iterate_batches=iterate_batches,
         training_callback=training_callback)  # fmt: skip
    if args.iters > done and args.iters % args.grad_accumulation_steps == 0:
        save(args.iters)


@contextlib.contextmanager
def resumable_lora() -> Iterator[None]:
    """mlx-lm's `lora` command with `--resume`, and with `train` from here."""
    lora: Any = upstream.mlx_lm_module("lora")
    build_parser, run, their_train = lora.build_parser, lora.run, lora.train

    def build_own_parser() -> argparse.ArgumentParser:
        parser = build_parser()
        parser.add_argument(
            "--resume",
            action="store_true",
            default=None,
            help=f"Go on with a stopped training as if it had not been stopped, to the same bits: from {STATE_FILE} in "
            "--adapter-path, written wherever the adapter is saved. Give all other options as before; --iters, which "
            "counts from the first beginning, and those about saving and validating may change. "
            "(--resume-adapter-file begins anew from trained weights.)",
        )
        return parser

    def run_own(args: Any, training_callback: Any = None) -> None:
        resume = bool(vars(args).pop("resume", False))
        state = Path(args.adapter_path) / STATE_FILE
        if resume and not args.train:
            raise InputError("--resume without --train; expected both; add --train")
        if resume and not state.is_file():
            raise InputError(f"--resume: {state} does not exist; expected the state of a training; leave --resume out")
        settings = {name: value for name, value in vars(args).items() if name not in _FREE}
        lora.train = partial(train, settings=settings, seed=args.seed, resume=resume)
        run(args, training_callback)

    lora.build_parser, lora.run = build_own_parser, run_own
    try:
        yield
    finally:
        lora.build_parser, lora.run, lora.train = build_parser, run, their_train


def _count_from(loop: Any, done: int) -> FunctionType:
    """mlx-lm's loop, which counts its iterations with `range(1, ...)`, with a count that begins after `done`."""
    if "range" not in loop.__code__.co_names:
        raise ArceeError("mlx-lm's training loop counts otherwise than expected; go on with mlx-lm 0.32.2")
    counting = loop.__globals__ | {"range": lambda start, stop: range(start + done, stop)}
    return FunctionType(loop.__code__, counting, loop.__name__, loop.__defaults__, loop.__closure__)


def _draw_apart(batches: Iterator[Any], seed: int) -> Iterator[Any]:
    """Batches, whose order mlx-lm draws from NumPy's global random state, drawn from one of their own."""
    own: Any = np.random.RandomState(seed).get_state()
    while True:
        others = np.random.get_state()
        np.random.set_state(own)
        try:
            batch = next(batches, None)
        finally:
            own = np.random.get_state()
            np.random.set_state(others)
        if batch is None:
            return
        yield batch


def _hash_data(dataset: Any) -> str:
    """Of the tokens of all rows, which depend on the tokenizer, too."""
    digest = hashlib.sha256()
    for i in range(len(dataset)):
        tokens, offset = dataset[i]
        digest.update(json.dumps([list(map(int, tokens)), offset]).encode())
    return digest.hexdigest()

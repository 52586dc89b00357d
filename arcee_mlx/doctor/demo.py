"""Does the bundled model compute what it computed when this was written, and the same without the rows of zeros?

Float32 throughout: in half precision the best two tokens may rightly change places. Logits are compared first, within a
stated tolerance; tokens then, but for those steps at which the best two logits are nearer than two tolerances.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.loading import DEMO_MODEL, load
from ..generate import GenerateOptions, stream_generate
from ..model.decoder import ArceeForCausalLM
from ..model.relu2.down import VARIABLE
from .checks import REPORT, Check

STORED = Path(__file__).parent / "demo_decoding.json"  # tests/goldens/make_demo_decoding.py writes it
LIKELIEST = 4  # logits that are stored of a step
# Absolute, on logits of deviation 3. Float32 products on a GPU may be made of TF32's shorter numbers: 9e-3, emulated.
TOLERANCES = {"cpu": 1e-3, "gpu": 4e-2}


@dataclass(frozen=True)
class Decoding:
    """Greedy decoding, a step for each token.

    Attributes:
        tokens: (n,), the likeliest of each step.
        ids: (n, 4), the likeliest tokens of each step, the first first.
        logits: (n, 4), theirs, float32.
    """

    tokens: tuple[int, ...]
    ids: np.ndarray
    logits: np.ndarray

    @classmethod
    def from_logits(cls, logits: np.ndarray) -> Decoding:
        """Args: logits (n, V)."""
        ids = np.argsort(-logits, axis=-1, kind="stable")[:, :LIKELIEST]
        return cls(tuple(ids[:, 0].tolist()), ids, np.take_along_axis(logits, ids, axis=-1))

    def is_near_tie(self, step: int, tolerance: float) -> bool:
        """Whether an error within the tolerance may turn round which of the two likeliest tokens is chosen."""
        return bool(self.logits[step, 0] - self.logits[step, 1] <= 2 * tolerance)


@dataclass(frozen=True)
class Difference:
    """How another computation of the same steps compares.

    Attributes:
        error: largest absolute difference of the logits.
        near_ties: steps, from 0, at which another token is chosen and may be.
        fault: what is wrong in words, None if nothing.
    """

    error: float
    near_ties: tuple[int, ...]
    fault: str | None


def read_stored(path: Path = STORED) -> tuple[str, Decoding]:
    """The prompt and what follows it."""
    values = json.loads(path.read_text(encoding="utf-8"))
    ids, logits = np.array(values["ids"]), np.array(values["logits"], np.float32)
    return values["prompt"], Decoding(tuple(ids[:, 0].tolist()), ids, logits)


def compute_logits(model: ArceeForCausalLM, prompt: Sequence[int], tokens: Sequence[int]) -> np.ndarray:
    """Logits (n, V) that each of the tokens (n,) is chosen from, token by token with a KV cache."""
    cache, new, steps = model.make_cache(), list(prompt), []
    for token in tokens:
        steps.append(np.array(model(mx.array([new]), cache)[0, -1].astype(mx.float32)))
        new = [token]
    return np.stack(steps)


def compare(want: Decoding, logits: np.ndarray, tolerance: float) -> Difference:
    """Compares logits (n, V) with those of a decoding, and the tokens they give."""
    difference = np.abs(np.take_along_axis(logits, want.ids, axis=-1) - want.logits)
    error = float(difference.max()) if np.isfinite(difference).all() else np.inf
    chosen = logits.argmax(axis=-1).tolist()
    others = [step for step, token in enumerate(want.tokens) if chosen[step] != token]
    wrong = [step for step in others if not want.is_near_tie(step, tolerance)]
    fault = None
    if not error <= tolerance:
        fault = f"logits are off by {error:.2g}; expected {tolerance:.2g} at most"
    elif wrong:
        step = wrong[0]
        fault = f"token {step + 1} is {chosen[step]}; expected {want.tokens[step]}"
    return Difference(error, tuple(step for step in others if step not in wrong), fault)


def check_demo() -> Check:
    """Decodes with the bundled model: the logits are those that are stored, and generation writes their tokens.

    All rows are read: whether some may be left out is what `check_by_neuron` looks at.
    """
    tolerance = _find_tolerance()
    text, want = read_stored()
    model, tokenizer = load(DEMO_MODEL, dtype="float32")
    options = GenerateOptions(max_tokens=len(want.tokens), temp=0, repetition_penalty=1.0)
    with _forced("off"):
        difference = compare(want, compute_logits(model, tokenizer.encode(text), want.tokens), tolerance)
        written = [chunk.token for chunk in stream_generate(model, tokenizer, text, options)]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(written, want.tokens, strict=False)))
    is_cut = same < len(want.tokens)
    problems = []
    if difference.fault:
        problems.append(
            f"the demo model computes something else than it should: {difference.fault}; install arcee-mlx and mlx anew; "
            f"if that does not help, {REPORT}"
        )
    elif is_cut and not want.is_near_tie(same, tolerance):
        got = written[same] if same < len(written) else "missing"
        problems.append(
            f"the demo model writes something else than it computes: token {same + 1} is {got}; expected "
            f"{want.tokens[same]}; {REPORT}"
        )
    lines = [
        f"{len(want.tokens)} tokens in float32, {f'as stored before token {same + 1}' if is_cut else 'as stored'}; "
        f"logits are off by {difference.error:.1g}; {tolerance:.1g} is allowed"
    ]
    if is_cut and not problems:
        lines.append(f"at token {same + 1} the best two are as good as equal: either may be chosen")
    facts = {"tokens": len(want.tokens), "tokens_as_stored": same, **_list_facts(difference, tolerance)}
    return Check(facts, tuple(lines), tuple(problems))


def check_by_neuron() -> Check:
    """Decodes with the bundled model, rows of zeros left out and not: that changes nothing."""
    tolerance = _find_tolerance()
    text, stored = read_stored()
    model, tokenizer = load(DEMO_MODEL, dtype="float32")
    prompt = tokenizer.encode(text)
    with _forced("off"):
        want = Decoding.from_logits(compute_logits(model, prompt, stored.tokens))
    with _forced("auto" if mx.default_device() == mx.gpu else "on"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a faulty kernel: that is another check's to say
        difference = compare(want, compute_logits(model, prompt, stored.tokens), tolerance)
        path = _find_path(model)
    if path == "dense":
        line = "the kernels are not to be trusted here, so no rows are left out"
    else:
        line = f"{path} path against all rows, {len(want.tokens)} tokens in float32: logits are off by {difference.error:.1g}"
    problem = (
        f"leaving out the rows of zero neurons changes the result: {difference.fault}; set {VARIABLE}=off and {REPORT}"
    )
    return Check({"path": path, **_list_facts(difference, tolerance)}, (line,), (problem,) if difference.fault else ())


def _find_path(model: ArceeForCausalLM) -> str:
    down: Any = model.layers[0].mlp.down_proj
    return down.choose_path(mx.zeros((1, down.rows.weights.shape[0])))


@contextlib.contextmanager
def _forced(sparse: str) -> Iterator[None]:
    """Sets the variable that says which path is taken; no other thread computes in the doctor's process."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = sparse
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def _find_tolerance() -> float:
    return TOLERANCES["gpu" if mx.default_device() == mx.gpu else "cpu"]


def _list_facts(difference: Difference, tolerance: float) -> dict[str, Any]:
    error = difference.error if np.isfinite(difference.error) else None  # JSON has no infinity
    return {"error": error, "allowed": tolerance, "near_ties": [step + 1 for step in difference.near_ties]}

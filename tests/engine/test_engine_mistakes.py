"""A caller's logits processor may do anything wrong, at once or when it is computed: it ends its own request alone."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from arcee_mlx import DEMO_MODEL, ArceeError, CallbackError, Engine, EngineClosedError, GenerateOptions, InputError

from engine_scene import (  # noqa: F401 - the fixtures `alone` and `engine`
    GREEDY,
    LONE,
    NEIGHBOURS,
    NEXT,
    PATIENCE_S,
    VICTIM,
    Scene,
    demo_alone,
    demo_engine,
    encode_victim,
    make_singular,
)

PLAIN = replace(GREEDY, logit_bias={})  # so that the caller's is the first and the last to see the logits


def raise_it(error: BaseException) -> Callable[[mx.array], Any]:
    def act(_logits: mx.array) -> Any:
        raise error

    return act


MISTAKES: dict[str, tuple[Callable[[mx.array], Any], type[ArceeError], str]] = {
    "raises": (raise_it(ValueError("mine")), CallbackError, "raised ValueError: mine"),
    "exits": (raise_it(SystemExit(1)), CallbackError, "raised SystemExit: 1"),
    "stops": (raise_it(StopIteration()), CallbackError, "raised StopIteration"),
    "interrupts": (raise_it(KeyboardInterrupt()), CallbackError, "raised KeyboardInterrupt"),
    "one_of_ours": (raise_it(InputError("mine")), CallbackError, "raised InputError: mine"),
    "shape": (lambda logits: logits[0], CallbackError, "expected logits of shape"),
    "wider": (lambda logits: mx.concatenate([logits, logits], axis=1), CallbackError, "expected logits of shape"),
    "type": (lambda logits: logits.tolist(), CallbackError, "returned list"),
    "nothing": (lambda logits: None, CallbackError, "returned NoneType"),
    "nan": (lambda logits: logits * mx.nan, ArceeError, "NaN"),
    "one_nan": (lambda logits: mx.where(mx.arange(logits.shape[1]) == 7, mx.nan, logits), ArceeError, "NaN"),
    "all_forbidden": (lambda logits: mx.full(logits.shape, -mx.inf), ArceeError, "NaN"),
    "infinite": (lambda logits: mx.where(mx.arange(logits.shape[1]) == 7, mx.inf, logits), ArceeError, "NaN"),
}


def make_elsewhere() -> mx.array:
    """Of another thread, which alone can compute it."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: mx.ones(1) * 0).result()


def read_cut_off(logits: mx.array) -> mx.array:
    """From a file that ends too early."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.npy"
        mx.save(str(path), logits)
        path.write_bytes(path.read_bytes()[:-8])
        return mx.load(str(path))


def write_into(logits: mx.array) -> mx.array:
    logits[:, 0] = make_singular()
    return logits


def write_into_and_raise(logits: mx.array) -> mx.array:
    write_into(logits)
    raise ValueError("mine")


def begin_and_forget(logits: mx.array) -> mx.array:
    mx.eval(logits)
    mx.async_eval(make_singular())
    return logits


FAILS_WHEN_COMPUTED: dict[str, tuple[Callable[[mx.array], Any], str]] = {
    "singular": (lambda logits: logits + make_singular(), "Inverse::eval_cpu"),
    "nan_eigenvalues": (
        lambda logits: logits + mx.linalg.eigvalsh(mx.full((3, 3), mx.nan), stream=mx.cpu)[0],
        "Eigh::eval_cpu",
    ),
    "nan_svd": (
        lambda logits: logits + mx.linalg.svd(mx.full((3, 3), mx.nan), stream=mx.cpu)[1][0],
        "SVD::eval_cpu",
    ),
    "compiled": (lambda logits: mx.compile(lambda x: x + make_singular())(logits), "Inverse::eval_cpu"),
    "elsewhere": (lambda logits: logits + make_elsewhere(), "no Stream"),
    "cut_off_file": (read_cut_off, "read"),
    "written_into": (write_into, "Inverse::eval_cpu"),
    "written_into_and_raised": (write_into_and_raise, "raised ValueError: mine"),
    "begun_and_forgotten": (begin_and_forget, "Inverse::eval_cpu"),
}
# Not here since no program survives them: an index far out of range is read (SIGSEGV), and the reference BLAS of MLX's
# Linux wheel ends the process over NaN in `mx.linalg.eig`.
MISTAKES |= {name: (act, CallbackError, words) for name, (act, words) in FAILS_WHEN_COMPUTED.items()}


@pytest.mark.parametrize(("token", "options"), [(0, LONE), (5, PLAIN)], ids=["first_alone", "later_in_batch"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_processors_mistake_ends_its_request_at_that_token(
    engine: Engine, alone: Any, mistake: str, token: int, options: GenerateOptions
) -> None:
    act, kind, words = MISTAKES[mistake]
    count = len(encode_victim(engine))

    def process(tokens: mx.array, logits: mx.array) -> Any:
        return act(logits) if tokens.size == count + token else logits

    scene = Scene(engine)
    scene.play(options, logits_processors=[process])
    scene.check(alone, options, ["victim"])
    error = scene.errors["victim"]
    assert type(error) is kind and words in str(error)
    assert len(scene.tokens["victim"]) == token


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float64], ids=str)
def test_a_processor_may_return_another_dtype(engine: Engine, alone: Any, dtype: mx.Dtype) -> None:
    count = len(encode_victim(engine))

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        with mx.stream(mx.cpu):
            return logits.astype(dtype) if tokens.size >= count + 7 else logits

    scene = Scene(engine)
    scene.play(GREEDY, logits_processors=[process])
    assert not scene.errors
    assert len(scene.tokens.pop("victim")) == 8
    for name, tokens in scene.tokens.items():
        assert tuple(tokens) == alone(*(NEIGHBOURS | NEXT)[name]), name


def test_a_processor_may_use_the_engine_but_not_wait_for_it(engine: Engine, alone: Any) -> None:
    seen: dict[str, Any] = {}
    session = engine.session()
    waits: dict[str, Callable[[], Any]] = {
        "generate": lambda: engine.generate(*NEXT["next"]),
        "stream": lambda: next(engine.stream(*NEXT["next"])),
        "astream": lambda: asyncio.run(anext(engine.astream(*NEXT["next"]))),
        "result": lambda: seen["submitted"].result(),
        "send": lambda: list(session.send("Hello")),
        "save": lambda: session.save("never.safetensors"),
    }

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        if not seen:
            seen["submitted"] = engine.submit(*NEXT["next"])
            seen["stats"] = engine.stats()
            for name, wait in waits.items():
                with pytest.raises(InputError, match="would wait for itself"):
                    wait()
                seen[name] = True
        return logits

    request = engine.submit(VICTIM, GREEDY, logits_processors=[process])
    assert request.result(PATIENCE_S).tokens == alone(VICTIM, GREEDY)
    assert seen["submitted"].result(PATIENCE_S).tokens == alone(*NEXT["next"])
    assert seen["stats"].queued == 0 and set(waits) < set(seen)


def test_a_processor_may_close_the_engine() -> None:
    engine = Engine.load(DEMO_MODEL)

    def process(_tokens: mx.array, logits: mx.array) -> mx.array:
        engine.close()
        return logits

    neighbour = engine.submit("a", replace(GREEDY, max_tokens=1000))
    request = engine.submit(VICTIM, GREEDY, logits_processors=[process])
    for each in (request, neighbour):
        with pytest.raises(EngineClosedError):
            each.result(PATIENCE_S)
    assert engine.is_closed
    engine.close()

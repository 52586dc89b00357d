"""Files of sessions: another process goes on identically; what is damaged, foreign or another model's is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import arcee_mlx
from arcee_mlx import Engine, EngineClosedError, GenerateOptions, InputError, Message, Session
from arcee_mlx.checkpoint import sealed
from arcee_mlx.checkpoint.files import TensorWriter, read_header
from arcee_mlx.engine import session_file

from adapter_data import write_mlx_lm
from conftest import write_checkpoint, write_tokenizer
from session_script import GREEDY, SEEDED, Script, read, send_all

QUANTIZED = replace(SEEDED, kv_bits=8, kv_group_size=32)


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint) as engine:
        yield engine


def talk(engine: Engine, options: GenerateOptions = SEEDED, **more: Any) -> Session:
    """A session of some turns whose tokens are not the encoding of their text."""
    session = engine.session("Be brief. 🙂", options=options, **more)
    send_all(session, "One?", "Two?")
    list(session.send("Three?", logits_processors=[Script(80, 81, 82, 3)]))
    return session


@pytest.fixture(scope="module")
def saved(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A session's file; read only."""
    path = tmp_path_factory.mktemp("saved") / "session.safetensors"
    talk(engine).save(path)
    return path


GO_ON = """
import json, sys
from arcee_mlx import Engine
made = []
with Engine.load(sys.argv[1]) as engine:
    for path in sys.argv[2:]:
        session = engine.load_session(path)
        for text in ("Four?", "Five?"):
            chunks = list(session.send(text))
            made.append([chunk.token for chunk in chunks] + [chunks[-1].stats.prompt_tokens, chunks[-1].stats.cached_tokens])
        made.append([chunk.token for chunk in session.edit(1, "Other?")])
        made.append([[message.role, message.content] for message in session.messages])
print(json.dumps(made))
"""


def test_another_process_goes_on_identically(engine: Engine, checkpoint: Path, tmp_path: Path) -> None:
    expected: list[Any] = []
    paths = []
    for i, options in enumerate((GREEDY, SEEDED, QUANTIZED)):
        paths.append(tmp_path / f"{i}.safetensors")
        session = talk(engine, options)
        held = len(session._transcript.ids)
        session.save(paths[-1])
        for text in ("Four?", "Five?"):
            chunks = list(session.send(text))
            # The token that ended the answer is not stored: the next prompt writes it.
            cached = held if text == "Four?" else chunks[-1].stats.cached_tokens
            expected.append([*read(chunks), chunks[-1].stats.prompt_tokens, cached])
        expected.append(read(session.edit(1, "Other?")))
        expected.append([[message.role, message.content] for message in session.messages])
    environment = {**os.environ, "PYTHONPATH": str(Path(arcee_mlx.__file__).parent.parent), "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, "-c", GO_ON, str(checkpoint), *map(str, paths)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_everything_of_a_session_is_in_its_file(engine: Engine, tmp_path: Path) -> None:
    options = GenerateOptions(
        max_tokens=9, temp=0.7, seed=3, logit_bias={80: 1.5}, stop=("x", "yz"), repetition_penalty=1.1,
        chat_template_config={"a": [1, None, "b"]}, kv_bits=4, kv_group_size=32,
    )  # fmt: skip
    session = talk(
        engine, options, overflow="drop_oldest_turns", messages=[Message("user", "x"), Message("assistant", "y")]
    )
    session.save(tmp_path / "a.safetensors")
    again = engine.load_session(str(tmp_path / "a.safetensors"))
    assert again._transcript == session._transcript
    empty = engine.session()
    empty.save(tmp_path / "b.safetensors")
    assert engine.load_session(tmp_path / "b.safetensors")._transcript == empty._transcript


def test_a_file_without_keys_and_values_goes_on_with_the_same_text(
    engine: Engine, checkpoint: Path, saved: Path, tmp_path: Path
) -> None:
    expected = read(engine.load_session(saved).send("Four?"))
    with Engine.load(checkpoint, prefix_cache_bytes=0) as none:  # no room for what is in the file, and nothing to save
        session = none.load_session(saved)
        session.branch().save(tmp_path / "bare.safetensors")
        *_, chunk = chunks = list(session.send("Four?"))
        assert read(chunks) == expected and chunk.stats.cached_tokens == 0 == none.stats().prefix_cache_bytes
    assert read_header(saved) and not read_header(tmp_path / "bare.safetensors")
    with Engine.load(checkpoint) as fresh:
        *_, chunk = chunks = list(fresh.load_session(tmp_path / "bare.safetensors").send("Four?"))
        assert read(chunks) == expected and chunk.stats.cached_tokens == 0


def test_keys_and_values_of_another_dtype_are_computed_again(tmp_path: Path) -> None:
    model, path = write_checkpoint(tmp_path / "model"), tmp_path / "session.safetensors"
    model.set_dtype(mx.bfloat16)
    arcee_mlx.save_checkpoint(model, tmp_path / "model", overwrite=True)
    write_tokenizer(tmp_path / "model")
    with Engine.load(tmp_path / "model", dtype="float32") as wide:
        talk(wide).save(path)
    with Engine.load(tmp_path / "model", dtype="bfloat16") as narrow:
        session = narrow.load_session(path)
        *_, chunk = session.send("Four?")
        assert chunk.stats.cached_tokens == 0
        session.save(path)
    with Engine.load(tmp_path / "model", dtype="bfloat16") as narrow:
        again = narrow.load_session(path)
        *_, chunk = chunks = list(again.send("Five?"))
        assert chunk.stats.cached_tokens == len(session._transcript.ids) > 100
        assert {entry.dtype for entry in read_header(path).values()} == {"BF16"}
        assert len(read(chunks)) == 12


def test_an_answer_in_the_making_is_not_saved(engine: Engine, tmp_path: Path) -> None:
    session = talk(engine)
    before = session._transcript
    with session.send("Four?", GenerateOptions(max_tokens=100), buffer_chunks=1) as stream:
        next(stream)
        session.save(tmp_path / "a.safetensors")
    assert engine.load_session(tmp_path / "a.safetensors")._transcript == before


def test_any_flipped_byte_is_refused(engine: Engine, saved: Path, tmp_path: Path) -> None:
    whole, path = saved.read_bytes(), tmp_path / "damaged.safetensors"
    header = 8 + int.from_bytes(whole[:8], "little")
    places = {
        *range(0, 120, 2),
        *range(0, header, header // 80),
        *range(0, len(whole), len(whole) // 80),
        len(whole) - 1,
    }
    assert len(places) > 200
    for place in places:
        for bit in (0, 5):  # 5 is the case of a letter
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(InputError, match="damaged.safetensors: is (damaged|no session's file)"):
                engine.load_session(path)
    assert read(engine.load_session(saved).send("Four?"))


def test_a_file_cut_short_or_gone_on_with_is_refused(engine: Engine, saved: Path, tmp_path: Path) -> None:
    whole, path = saved.read_bytes(), tmp_path / "damaged.safetensors"
    for count in (0, 1, 7, 8, 34, 35, 98, 99, *range(100, len(whole), len(whole) // 30), len(whole) - 1):
        path.write_bytes(whole[:count])
        with pytest.raises(InputError, match="damaged.safetensors: is (damaged|no session's file)"):
            engine.load_session(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="damaged"):
        engine.load_session(path)


def test_what_is_no_session_is_refused(engine: Engine, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.safetensors: does not exist"):
        engine.load_session(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match="it is a folder"):
        engine.load_session(tmp_path)
    with pytest.raises(InputError, match="model.safetensors: is no session's file"):
        engine.load_session(checkpoint / "model.safetensors")
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InputError, match="it is a pipe"):
        engine.load_session(tmp_path / "pipe.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3}, "is of format version 3; expected at most 2"),
        ({"turns": [{"user": "x"}]}, "cannot be read"),
        ({"turns": [{"user": 3, "answer": "x", "ids": []}]}, "of other types"),
        ({"turns": [{"user": "x", "answer": "x", "ids": ["x"]}]}, "of other types"),
        (
            {"turns": [{"user": "x", "answer": "x", "ids": [10**9], "text": "x"}], "cached_tokens": 1},
            "another tokenizer",
        ),
        ({"options": {"temp": -1}}, "cannot be read"),
        ({"overflow": "forget"}, "overflow is 'forget'"),
        ({"weights_sha256": None}, "other weights"),
    ],
)
def test_a_whole_file_that_says_something_else_is_refused(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    path, dumps = tmp_path / "changed.safetensors", json.dumps
    session = talk(engine)
    with monkeypatch.context() as patch:
        patch.setattr(
            sealed.json,
            "dumps",
            lambda values, **more: dumps({**values, **changes} if "turns" in values else values, **more),
        )
        session.save(path)
    with pytest.raises(InputError, match=message):
        engine.load_session(path)
    assert read(session.send("Four?"))


def test_tensors_that_are_not_this_engines_are_left_aside(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, path = talk(engine, GREEDY), tmp_path / "wrong.safetensors"
    copy = session_file._copy_layer

    def copy_wider(i: int, layer: Any, count: int) -> list[tuple[str, mx.array]]:
        wider = [(name, mx.concatenate([data, data], 1)) for name, data in copy(i, layer, count)]
        mx.eval([data for _, data in wider])
        return wider

    shapes = session_file._shapes
    with monkeypatch.context() as patch:
        patch.setattr(session_file, "_copy_layer", copy_wider)
        patch.setattr(
            session_file,
            "_shapes",
            lambda *given: {n: (d, (s[0], 2 * s[1], *s[2:])) for n, (d, s) in shapes(*given).items()},
        )
        session.save(path)
    with_cache = engine.stats().prefix_cache_bytes
    again = engine.load_session(path)
    assert engine.stats().prefix_cache_bytes == with_cache
    assert read(again.send("Four?")) == read(session.send("Four?"))


def test_a_session_of_other_weights_or_another_tokenizer_is_refused(
    engine: Engine, checkpoint: Path, saved: Path, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "other", num_hidden_layers=3)
    adapter = write_mlx_lm(tmp_path / "adapter")
    for path, adapter_path in ((tmp_path / "other", None), (checkpoint, adapter)):
        with Engine.load(path, adapter_path=adapter_path) as other:
            with pytest.raises(InputError, match="other weights; expected this engine's, adapters included"):
                other.load_session(saved)
            if adapter_path:
                talk(other).save(tmp_path / "adapted.safetensors")
            assert other.generate("x", GREEDY).text
    with pytest.raises(InputError, match="other weights"):
        engine.load_session(tmp_path / "adapted.safetensors")

    shutil.copytree(checkpoint, tmp_path / "swapped")
    file = tmp_path / "swapped" / "tokenizer.json"
    values = json.loads(file.read_text())
    vocabulary = values["model"]["vocab"]
    first, second = (next(text for text, i in vocabulary.items() if i == n) for n in (80, 81))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    file.write_text(json.dumps(values))
    with Engine.load(tmp_path / "swapped") as other, pytest.raises(InputError, match="another tokenizer"):
        other.load_session(saved)
    shutil.copytree(checkpoint, tmp_path / "moved")
    with Engine.load(tmp_path / "moved") as same:
        assert len(same.load_session(saved).messages) == 7


def test_saving_that_fails_leaves_the_older_file_and_nothing_else(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "session.safetensors"
    session = talk(engine)
    session.save(path)
    older = path.read_bytes()
    send_all(session, "Four?")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for place, name in (
        (TensorWriter, "write"),
        (TensorWriter, "close"),
        (sealed, "_seal"),
        (sealed.os, "replace"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, fail)
            with pytest.raises(InputError, match="cannot be written .No space left"):
                session.save(path)
        assert path.read_bytes() == older and [*tmp_path.iterdir()] == [path]
    session.save(path)
    assert path.read_bytes() != older and len(engine.load_session(path).messages) == 9
    for name in ("session.bin", "missing/session.safetensors"):
        with pytest.raises(InputError, match="expected a (name ending in .safetensors|folder to write to)"):
            session.save(tmp_path / name)
    odd = engine.session(options=GenerateOptions(chat_template_config={"x": object()}))
    with pytest.raises(InputError, match="expected JSON values in chat_template_config"):
        odd.save(path)


def test_a_closed_engine_saves_and_loads_nothing(checkpoint: Path, saved: Path, tmp_path: Path) -> None:
    with Engine.load(checkpoint) as engine:
        session = talk(engine)
    with pytest.raises(EngineClosedError):
        session.save(tmp_path / "session.safetensors")
    with pytest.raises(EngineClosedError):
        engine.load_session(saved)
    assert not [*tmp_path.iterdir()]

"""Sessions: the model sees what the messages say, only new tokens are computed, and history may be changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import arcee_mlx
from arcee_mlx import (
    DEMO_MODEL,
    ArceeForCausalLM,
    Engine,
    GenerateOptions,
    GenerationChunk,
    Message,
    Session,
    Tokenizer,
)

from session_script import GREEDY, SEEDED, Script, contents, read, render, send_all

Loaded = tuple[ArceeForCausalLM, Tokenizer]
IM_START, IM_END, END = 2, 3, 1  # of the tiny tokenizer


@pytest.fixture(scope="module")
def engine(checkpoint: Path) -> Iterator[Engine]:
    with Engine.load(checkpoint) as engine:
        yield engine


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    "kv", [{}, {"kv_bits": 8, "kv_group_size": 32}, {"max_kv_size": 200}], ids=["full", "quantized", "rotating"]
)
def test_an_answer_is_that_of_one_run_over_all_tokens_so_far(
    engine: Engine, loaded: Loaded, options: GenerateOptions, kv: dict[str, Any]
) -> None:
    options = replace(options, **kv)
    tokenizer = loaded[1]
    session = engine.session("Be brief.", options=options)
    text = "<s><|im_start|>system\nBe brief."
    ids = tokenizer.encode(text, add_special_tokens=False)
    for question in ("Who?", "What did you see of the world?", "Grüße 🙂"):
        new = f"<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids += tokenizer.encode(new, add_special_tokens=False)
        chunks = list(session.send(question))
        assert read(chunks) == read(arcee_mlx.stream_generate(*loaded, ids, options))
        assert chunks[-1].stop_reason == "max_tokens" and chunks[-1].stats.prompt_tokens == len(ids)
        ids += read(chunks)
    # The tokens are those that were made: another encoding of the same text has others.
    assert tokenizer.encode(tokenizer.decode(ids), add_special_tokens=False) != ids


def test_only_new_tokens_are_computed(engine: Engine, loaded: Loaded) -> None:
    tokenizer = loaded[1]
    session = engine.session("Count what is computed.")
    turn = tokenizer.encode("\n<|im_start|>user\nand<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False)
    last: GenerationChunk | None = None
    is_open = 0
    letters = [token for letter in "the sea" for token in tokenizer.encode(letter, add_special_tokens=False)]
    for ids, extra in (([*letters, IM_END], 0), (letters, 1), ([80, *letters, IM_END], 0), ([80], 1), ([80], 1)):
        # Of an answer that did not end itself the end of the turn is new, too.
        before = engine.stats().computed_prompt_tokens
        options = GenerateOptions(max_tokens=len(ids))
        *_, chunk = session.send("and", options, logits_processors=[Script(*ids)])
        computed = engine.stats().computed_prompt_tokens - before
        assert chunk.stats.prompt_tokens - chunk.stats.cached_tokens == computed
        if last is not None:
            assert computed == len(turn) + is_open
            assert chunk.stats.cached_tokens == last.stats.prompt_tokens + last.stats.generation_tokens
        last, is_open = chunk, extra


@pytest.mark.parametrize(
    "ending", ["eos", "other_eos", "max_tokens", "stop_string", "special_inside", "half", "nothing"]
)
def test_the_model_sees_what_the_messages_say_however_an_answer_ended(
    engine: Engine, loaded: Loaded, ending: str
) -> None:
    tokenizer = loaded[1]

    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer.encode(text, add_special_tokens=False))

    emoji = ids("🙂")
    assert len(emoji) > 1
    said, stop, shown = {
        "eos": ((*ids("the sea"), IM_END), (), "the sea"),
        "other_eos": ((*ids("the sea"), END), (), "the sea"),
        "max_tokens": (ids("the sea"), (), "the sea"),
        "stop_string": ((*ids("the watery"), *ids(" part")), ("tery",), "the wa"),
        "special_inside": ((*ids("the sea"), IM_START, *ids(" and more of it")), (), "the sea and more of it"),
        "half": ((*ids("the sea"), emoji[0]), (), "the sea\ufffd"),
        "nothing": ((IM_END,), (), ""),
    }[ending]
    session = engine.session(f"Be brief: {ending}.")
    by_letters = [token for letter in "the sea" for token in ids(letter)]
    assert len(by_letters) > len(ids("the sea"))
    list(session.send("Zero?", GenerateOptions(max_tokens=len(by_letters)), logits_processors=[Script(*by_letters)]))
    options = GenerateOptions(max_tokens=len(said), temp=0, stop=stop)
    *_, one = session.send("One?", options, logits_processors=[Script(*said)])
    assert contents(session)[3:] == ["One?", shown]
    script, text = Script(*ids("so")), render(tokenizer, session, "Two?")
    *_, two = session.send("Two?", GenerateOptions(max_tokens=2), logits_processors=[script])
    assert tokenizer.decode(script.prompt) == text
    # Whatever becomes of one answer, those before it keep their tokens.
    assert two.stats.cached_tokens >= one.stats.prompt_tokens
    script, text = Script(), render(tokenizer, session, "Three?")
    list(session.send("Three?", GenerateOptions(max_tokens=2), logits_processors=[script]))
    assert tokenizer.decode(script.prompt) == text


def with_template(checkpoint: Path, folder: Path, content: str) -> Path:
    """The tiny checkpoint with a chat template that writes a message's content in its own way."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = config["chat_template"].replace("{{ message.content }}", "{{ " + content + " }}")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "content", ["message.content[-4:]", "message.content | trim", "message.content if loop.last else '...'"]
)
def test_a_template_that_rewrites_what_was_said_is_followed(checkpoint: Path, tmp_path: Path, content: str) -> None:
    folder = with_template(checkpoint, tmp_path / "model", content)
    model, tokenizer = arcee_mlx.load(folder)
    with Engine.load(folder) as engine:
        session = engine.session(options=GREEDY)
        for question in ("Who are you?", "Where is it?", "  Why?  "):
            text = render(tokenizer, session, question)
            script = Script()
            chunks = list(session.send(question, logits_processors=[script]))
            assert tokenizer.decode(script.prompt) == text
            assert read(chunks) == read(arcee_mlx.stream_generate(model, tokenizer, script.prompt, GREEDY))


def test_a_tokenizer_that_puts_a_space_before_text_gets_the_prompt_in_one(
    checkpoint: Path, loaded: Loaded, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint, folder)
    values = json.loads((folder / "tokenizer.json").read_text())
    values["pre_tokenizer"]["add_prefix_space"] = True
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = arcee_mlx.load(folder)[1]
    with Engine.load(folder) as engine:
        session = engine.session()
        said = loaded[1].encode("the watery part", add_special_tokens=False)
        options = GenerateOptions(max_tokens=len(said), stop=("ery",))
        list(session.send("One?", options, logits_processors=[Script(*said)]))
        assert contents(session)[1] == "the wat"
        text, script = render(tokenizer, session, "Two?"), Script()
        list(session.send("Two?", GREEDY, logits_processors=[script]))
        assert script.prompt == tokenizer.encode(text, add_special_tokens=False)


def test_an_answer_may_begin_as_the_caller_says(engine: Engine, loaded: Loaded) -> None:
    session = engine.session(options=GREEDY)
    begun = GenerateOptions(max_tokens=6, temp=0, prefill_response="Well, ")
    *_, first = session.send("Who?", begun)
    assert session.messages[-1].content.startswith("Well, ") and len(session.messages[-1].content) > len("Well, ")
    text, script = render(loaded[1], session, "And?"), Script()
    *_, second = session.send("And?", logits_processors=[script])
    assert loaded[1].decode(script.prompt) == text
    assert second.stats.cached_tokens == first.stats.prompt_tokens + first.stats.generation_tokens


@pytest.mark.parametrize("options", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_changed_history_gives_what_a_session_that_never_had_another_gives(
    engine: Engine, checkpoint: Path, options: GenerateOptions
) -> None:
    session = engine.session("Be brief.", options=options)
    one, two, three = send_all(session, "One?", "Two?", "Three?")
    whole = session.messages
    with Engine.load(checkpoint, prefix_cache_bytes=0) as other:  # it has nothing to find
        straight = other.session("Be brief.", options=options)
        assert send_all(straight, "One?", "Two?", "Three?") == [one, two, three]
        assert straight.messages == whole

        assert read(session.regenerate()) == three and session.messages == whole

        branch = session.branch()
        session.roll_back(2)
        assert session.messages == whole[:3] and branch.messages == whole
        straight = other.session("Be brief.", options=options)
        assert send_all(straight, "One?", "Other?")[1] == read(session.send("Other?"))
        assert branch.messages == whole

        straight = other.session("Be brief.", options=options)
        assert send_all(straight, "One?", "New?")[1] == read(branch.edit(1, "New?"))
        assert branch.messages == straight.messages
        assert read(branch.edit(0, "One?")) == one and len(branch.messages) == 3
        branch.roll_back(1)
        assert contents(branch) == ["Be brief."]


def test_changed_history_is_found_in_the_cache(engine: Engine) -> None:
    session = engine.session("Roll this back.", options=GREEDY)
    *_, one = session.send("One?")
    *_, two = session.send("Two?")
    *_, again = session.regenerate()
    assert again.stats.cached_tokens == two.stats.prompt_tokens - 1  # the last is always computed
    session.roll_back()
    *_, other = session.send("Something else?")
    assert other.stats.cached_tokens >= one.stats.prompt_tokens + one.stats.generation_tokens


@pytest.mark.parametrize("bytes_", [0, 20_000])
def test_what_memory_ran_short_of_is_computed_again(engine: Engine, checkpoint: Path, bytes_: int) -> None:
    texts = ("One?", "Two?", "Three?", "Four?")
    expected = send_all(engine.session(options=SEEDED), *texts)
    with Engine.load(checkpoint, prefix_cache_bytes=bytes_) as small:
        session = small.session(options=SEEDED)
        assert send_all(session, *texts) == expected
        assert small.stats().prefix_cache_bytes <= bytes_


def test_two_sessions_in_one_batch_are_as_each_alone(engine: Engine) -> None:
    def begin(name: str) -> Session:
        return engine.session(f"You are {name}.", options=SEEDED)

    alone = [send_all(begin(name), "One?", "Two?") for name in ("Ahab", "Ishmael")]
    sessions = [begin("Ahab"), begin("Ishmael")]
    together: list[list[list[int]]] = [[], []]
    for text in ("One?", "Two?"):
        pairs = list(zip(*[session.send(text) for session in sessions], strict=True))
        for i in range(2):
            together[i].append([pair[i].token for pair in pairs])
    assert together == alone


def test_a_conversation_held_elsewhere_is_gone_on_with(engine: Engine, loaded: Loaded) -> None:
    given = [Message("system", "Be brief."), {"role": "user", "content": "One?"}, Message("assistant", "The sea.")]
    session = engine.session(messages=given)
    assert contents(session) == ["Be brief.", "One?", "The sea."]
    assert session.messages == engine.session("Be brief.", messages=given[1:]).messages
    text, script = render(loaded[1], session, "Two?"), Script()
    list(session.send("Two?", GREEDY, logits_processors=[script]))
    assert loaded[1].decode(script.prompt) == text
    list(session.edit(0, "Another?", GREEDY))
    assert contents(session)[:2] == ["Be brief.", "Another?"] and len(session.messages) == 3


def test_the_demo_model_talks() -> None:
    with Engine.load(DEMO_MODEL) as engine:
        session = engine.session("You are kind.", options=GenerateOptions(max_tokens=16, temp=0))
        *_, first = session.send("Where is the sea?")
        *_, second = session.send("And the whale?")
        assert second.stats.cached_tokens == first.stats.prompt_tokens + first.stats.generation_tokens
        with engine.session(options=SEEDED).send("Hello?") as stream:
            assert len(read(stream)) <= 12

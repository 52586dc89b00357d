"""Bias, penalties over the answer, XTC, the caller's own functions, and how an answer may begin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import arcee_mlx
from arcee_mlx import CallbackError, GenerateOptions, GenerationChunk, InputError
from arcee_mlx.generate.request import encode_prompt
from arcee_mlx.generate.row import xtc_keeps
from arcee_mlx.generate.sampling import Sampler, exclude_top_choices, make_logits_processors
from arcee_mlx.upstream import mlx_lm_module

from conftest import CHAT_TEMPLATE

PROMPT = "Call me Ishmael."
MESSAGES = [{"role": "user", "content": "Hi"}]
Loaded = tuple[arcee_mlx.ArceeForCausalLM, arcee_mlx.Tokenizer]


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


def run(loaded: Loaded, prompt: Any = PROMPT, own: Any = (), **options: Any) -> list[GenerationChunk]:
    values = {"max_tokens": 12, "temp": 0} | options
    return list(arcee_mlx.stream_generate(*loaded, prompt, GenerateOptions(**values), logits_processors=own))


def tokens_of(chunks: list[GenerationChunk]) -> list[int]:
    return [chunk.token for chunk in chunks]


def by_hand(loaded: Loaded, change: Callable[[np.ndarray, list[int]], None], count: int) -> list[int]:
    """The slow obvious path: a full pass for every token, logits changed in numpy, the likeliest taken."""
    model, tokenizer = loaded
    ids = tokenizer.encode(PROMPT)
    start = len(ids)
    for _ in range(count):
        logits = np.array(model.forward(mx.array([ids])).logits[0, -1])
        change(logits, ids[start:])
        ids.append(int(logits.argmax()))
    return ids[start:]


def test_a_bias_moves_its_tokens_and_no_other(loaded: Loaded) -> None:
    first = tokens_of(run(loaded))[0]
    assert first not in tokens_of(run(loaded, logit_bias={first: -1e9}))
    assert set(tokens_of(run(loaded, logit_bias={77: 1e9}))) == {77}


def test_frequency_and_presence_count_the_answer_and_not_the_prompt(loaded: Loaded) -> None:
    def change(logits: np.ndarray, answer: list[int]) -> None:
        for token in set(answer):
            logits[token] -= 0.9 * answer.count(token) + 2.5

    plain = tokens_of(run(loaded, max_tokens=40))
    assert len(set(plain)) < len(plain)  # something repeats, or this would show nothing
    chunks = run(loaded, max_tokens=40, frequency_penalty=0.9, presence_penalty=2.5)
    assert tokens_of(chunks) == by_hand(loaded, change, len(chunks)) != plain[: len(chunks)]


@pytest.mark.parametrize("step", [1, 2048])
def test_penalties_do_not_depend_on_how_the_prompt_is_cut(loaded: Loaded, step: int) -> None:
    (penalize,) = make_logits_processors(
        GenerateOptions(frequency_penalty=1.0), vocab_size=6, model_vocab_size=6, prompt_tokens=3
    )
    assert penalize(mx.array([0, 1, 2]), mx.zeros((1, 6))).tolist() == [[0.0] * 6]
    assert penalize(mx.array([0, 1, 2, 1, 1, 5]), mx.zeros((1, 6))).tolist() == [[0.0, -2.0, 0.0, 0.0, 0.0, -1.0]]
    whole = run(loaded, max_tokens=20, frequency_penalty=2.0)
    cut = run(loaded, max_tokens=20, frequency_penalty=2.0, prefill_step_size=step)
    assert tokens_of(whole) == tokens_of(cut)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.0, 0.05, 0.1, 0.5])
def test_xtc_leaves_out_what_mlx_lm_leaves_out(seed: int, threshold: float) -> None:
    logits = mx.random.normal((2, 30), key=mx.random.key(seed)) * 3
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    theirs = mlx_lm_module("sample_utils").apply_xtc(logprobs, 1.0, threshold, [3, 9])
    ours = exclude_top_choices(logprobs, logprobs, threshold=threshold, keep=mx.array([3, 9]))
    assert (mx.isinf(ours) == mx.isinf(theirs)).all().item()


def test_xtc_applies_as_often_as_asked_and_spares_what_must_stay() -> None:
    scores = mx.log(mx.array([[0.5, 0.3, 0.15, 0.05]]))

    def share_of_best(probability: float, keep: tuple[int, ...] = ()) -> float:
        options = GenerateOptions(
            temp=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=4, xtc_probability=probability, xtc_threshold=0.1
        )
        sampler = Sampler(options, keep)
        return float(np.mean([sampler(scores).item() == 0 for _ in range(600)]))

    assert share_of_best(1.0) == 0
    assert share_of_best(0.5) == pytest.approx(0.25, abs=0.06)
    assert share_of_best(1.0, keep=(0,)) == pytest.approx(0.5 / 0.7, abs=0.06)


def test_xtc_spares_line_feed_and_ends_of_text(loaded: Loaded) -> None:
    tokenizer = loaded[1]
    assert xtc_keeps(tokenizer, tokenizer.eos_token_ids | {400, 2**40}, 400) == {
        1,
        3,
        *tokenizer.encode("\n", add_special_tokens=False),
    }


def test_a_processor_of_the_callers_sees_all_tokens_and_decides(loaded: Loaded) -> None:
    seen: list[list[int]] = []

    def only_letters_after_each_other(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return mx.where(mx.arange(logits.shape[-1]) == 50 + len(seen), 0.0, -mx.inf)[None]

    chunks = run(loaded, own=[only_letters_after_each_other], max_tokens=3)
    prompt = loaded[1].encode(PROMPT)
    assert tokens_of(chunks) == [51, 52, 53]
    assert seen[:3] == [prompt, [*prompt, 51], [*prompt, 51, 52]]


def test_several_processors_are_called_in_order_after_the_penalties(loaded: Loaded) -> None:
    seen: list[float] = []
    chunks = run(
        loaded,
        own=[lambda _, logits: logits * 0 + 1, lambda _, logits: (seen.append(logits[0, 5].item()), logits)[1]],
        logit_bias={5: 100.0},
        max_tokens=1,
    )
    assert set(seen) == {1.0} and len(chunks) == 1


def fails(tokens: mx.array, logits: mx.array) -> mx.array:
    raise KeyError("my own mistake")


@pytest.mark.parametrize(
    ("process", "message"),
    [
        (fails, "logits processor fails raised KeyError: 'my own mistake'"),
        (lambda _, logits: logits[0], r"lambda> returned shape \(400,\); expected logits of shape \(1, 400\)"),
        (lambda _, logits: None, r"lambda> returned NoneType; expected logits"),
    ],
)
def test_a_mistake_of_a_processor_is_reported_as_the_callers(loaded: Loaded, process: Any, message: str) -> None:
    with pytest.raises(CallbackError, match=message) as caught:
        run(loaded, own=[process])
    assert isinstance(caught.value.__cause__, KeyError) == (process is fails)
    assert tokens_of(run(loaded)) == tokens_of(run(loaded))  # and the next call works


def test_a_prefilled_response_is_where_the_answer_goes_on(loaded: Loaded) -> None:
    tokenizer = loaded[1]
    rendered = "<s><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nCall me"
    ids = encode_prompt(tokenizer, MESSAGES, GenerateOptions(prefill_response="Call me"))
    assert tokenizer.decode(ids) == rendered
    begun = run(loaded, MESSAGES, prefill_response="Call me")
    assert tokens_of(begun) == tokens_of(run(loaded, rendered))


def test_template_variables_reach_the_template(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "m").mkdir()
    for file in checkpoint.iterdir():
        (tmp_path / "m" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    (tmp_path / "m" / "chat_template.jinja").write_text("{% if loud %}LOUD{% endif %}" + CHAT_TEMPLATE)
    tokenizer = arcee_mlx.load(tmp_path / "m")[1]
    quiet = encode_prompt(tokenizer, MESSAGES)
    loud = encode_prompt(tokenizer, MESSAGES, GenerateOptions(chat_template_config={"loud": True}))
    assert tokenizer.decode(loud) == "LOUD" + tokenizer.decode(quiet)


@pytest.mark.parametrize("options", [{"prefill_response": "x"}, {"chat_template_config": {"x": 1}}])
@pytest.mark.parametrize("prompt", ["text", [5, 6]])
def test_what_belongs_to_messages_is_refused_without_them(loaded: Loaded, prompt: Any, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(options))} with a prompt that is not messages"):
        run(loaded, prompt, **options)

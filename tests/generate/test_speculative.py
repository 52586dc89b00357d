"""Speculative decoding: the answer is the one without drafts, in fewer passes of the model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import arcee_mlx
from arcee_mlx import ArceeForCausalLM, GenerateOptions, GenerationChunk, InputError, Tokenizer
from arcee_mlx.generate.speculative import ModelDrafter, NgramDrafter, Speculator

from conftest import flat, tiny_config, write_checkpoint

Loaded = tuple[ArceeForCausalLM, Tokenizer]
PROMPT = "Call me Ishmael. Some years ago, call me Ishmael."
MESSAGES = [{"role": "user", "content": PROMPT}]
VERIFICATION = Path(arcee_mlx.__file__).parent / "conversion" / "recipes" / "verification.txt"


@pytest.fixture(scope="module")
def demo() -> Loaded:
    return arcee_mlx.load(arcee_mlx.DEMO_MODEL)


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> Loaded:
    return arcee_mlx.load(checkpoint)


def disturbed(model: ArceeForCausalLM, share: float = 0.05) -> ArceeForCausalLM:
    """A draft model that often agrees with the model, and often does not."""
    other = ArceeForCausalLM(model.config)
    keys = mx.random.split(mx.random.key(5), len(flat(model)))
    noisy = [
        (name, value * (1 + share * mx.random.normal(value.shape, key=key)))
        for key, (name, value) in zip(keys, flat(model), strict=True)
    ]
    other.load_weights(noisy)
    return other


def run(
    loaded: Loaded,
    prompt: Any = PROMPT,
    *,
    draft_model: ArceeForCausalLM | None = None,
    own: Any = (),
    cache: arcee_mlx.PromptCache | None = None,
    **options: Any,
) -> list[GenerationChunk]:
    values = {"max_tokens": 40, "temp": 0} | options
    return list(
        arcee_mlx.stream_generate(
            *loaded,
            prompt,
            GenerateOptions(**values),
            draft_model=draft_model,
            prompt_cache=cache,
            logits_processors=own,
        )
    )


def tokens_of(chunks: list[GenerationChunk]) -> list[int]:
    return [chunk.token for chunk in chunks]


def contents(chunks: list[GenerationChunk]) -> list[tuple[Any, ...]]:
    return [(c.text, c.token, c.stop_reason, [top.token for top in c.top_logprobs]) for c in chunks]


def logprobs(chunks: list[GenerationChunk]) -> list[float]:
    return [
        entry for c in chunks if c.logprob is not None for entry in (c.logprob, *(t.logprob for t in c.top_logprobs))
    ]


def demo_prompts() -> list[Any]:
    text = VERIFICATION.read_text(encoding="utf-8")
    cut = [text[start : start + length] for start, length in zip(range(0, 9000, 600), itertools.cycle((40, 200, 700)))]
    chats = [[{"role": "user", "content": question}] for question in ("Tell me about the sea.", "What is a whale?")]
    return [*cut, *chats, "Call me", "one two three one two three one two"]


def test_greedy_answers_of_the_demo_are_those_without_drafts(demo: Loaded) -> None:
    accepted = 0
    for prompt, drafts in zip(demo_prompts(), itertools.cycle((7, 1, 4))):
        plain = run(demo, prompt, max_tokens=32, repetition_penalty=1.0)
        chunks = run(demo, prompt, max_tokens=32, repetition_penalty=1.0, num_draft_tokens=drafts)
        assert contents(chunks) == contents(plain)
        accepted += chunks[-1].stats.accepted_tokens
    assert accepted > 40  # or this would show little


def test_the_sparse_path_gives_the_greedy_answer_without_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ARCEE_MLX_SPARSE", "on")
    loaded = arcee_mlx.load(Path(__file__).parents[1] / "assets" / "demo")
    arcee_mlx.store_by_neuron(loaded[0])
    down = loaded[0].layers[0].mlp.down_proj
    for prompt in demo_prompts()[-4:]:
        plain = run(loaded, prompt, max_tokens=24, repetition_penalty=1.0)
        chunks = run(loaded, prompt, max_tokens=24, repetition_penalty=1.0, num_draft_tokens=7)
        assert contents(chunks) == contents(plain)
    assert down.choose_path(mx.zeros((8, 1152))) == "gathered"


@pytest.mark.parametrize("drafts", [1, 3, 7])
def test_a_text_that_repeats_itself_takes_fewer_passes(demo: Loaded, drafts: int) -> None:
    stats = run(demo, "Tell me about the sea.", max_tokens=100, repetition_penalty=1.0, num_draft_tokens=drafts)[
        -1
    ].stats
    assert stats.tokens_per_step > {1: 1.4, 3: 2, 7: 2.5}[drafts]
    assert stats.acceptance_rate is not None and stats.acceptance_rate > 0.6


BOUNDARY = 32
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "proportional": {"partial_rotary_factor": 0.5},
    # The tables of these two change while the answer is made.
    "dynamic": {"factor": 4.0},
    "longrope": {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "original_max_position_embeddings": BOUNDARY},
}


@pytest.mark.parametrize("kind", ROPES)
def test_every_rope_kind_gives_the_greedy_answer_without_drafts(tmp_path: Path, kind: str) -> None:
    rope = {"rope_type": kind, **ROPES[kind]}
    write_checkpoint(
        tmp_path / "m", rope_parameters=rope, max_position_embeddings=BOUNDARY if kind == "dynamic" else 256
    )
    loaded = arcee_mlx.load(tmp_path / "m")
    ids = loaded[1].encode(PROMPT)
    assert len(ids) + 8 < BOUNDARY < len(ids) + 30
    for start in range(4):  # so that a pass would cross the boundary at any of its places
        prompt = ids[start:]
        plain = run(loaded, prompt)
        assert contents(run(loaded, prompt, num_draft_tokens=7)) == contents(plain)
        drafted = run(loaded, prompt, num_draft_tokens=7, draft_model=loaded[0])
        assert contents(drafted) == contents(plain)
        assert drafted[-1].stats.tokens_per_step > (1.5 if kind == "dynamic" else 3)


OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seed": {"temp": 1.0, "seed": 7},
    "filters": {"temp": 1.2, "seed": 1, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
    "xtc": {"temp": 1.0, "seed": 2, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    "penalties": {"repetition_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2},
    "sampled penalties": {"temp": 0.8, "seed": 3, "repetition_penalty": 1.1, "logit_bias": {7: 3.0, 8: -3.0}},
    "logprobs": {"temp": 0.7, "seed": 4, "logprobs": True, "top_logprobs": 3},
    "quantized keys and values": {"kv_bits": 8, "kv_group_size": 32},
    "one token": {"max_tokens": 1},
    "two tokens": {"max_tokens": 2},
    "until the context is full": {"max_tokens": -1},
    "a prompt in pieces": {"prefill_step_size": 1},
    "pieces that leave one": {"prefill_step_size": 5},
}


@pytest.mark.parametrize("by_model", [False, True], ids=["ngrams", "draft model"])
@pytest.mark.parametrize("name", OPTIONS)
def test_whatever_the_options_the_answer_is_the_one_without_drafts(loaded: Loaded, name: str, by_model: bool) -> None:
    plain = run(loaded, **OPTIONS[name])
    chunks = run(loaded, num_draft_tokens=5, draft_model=disturbed(loaded[0]) if by_model else None, **OPTIONS[name])
    assert contents(chunks) == contents(plain)
    np.testing.assert_allclose(logprobs(chunks), logprobs(plain), rtol=0, atol=1e-4)
    assert len(logprobs(chunks)) == (4 * len(plain) if name == "logprobs" else 0)
    stats = chunks[-1].stats
    assert (stats.accepted_tokens if by_model else stats.drafted_tokens) > 0 or len(plain) <= 2


@pytest.mark.parametrize("temp", [0.0, 1.0])
def test_an_end_of_text_among_accepted_drafts_ends_the_answer(loaded: Loaded, temp: float) -> None:
    options = {"temp": temp, "seed": 5}
    plain = tokens_of(run(loaded, **options))
    vocabulary = loaded[1]._backend.get_vocab()
    for place in range(1, 12):
        name = next(text for text, token in vocabulary.items() if token == plain[place])
        options["extra_eos_tokens"] = (name,)
        ended = run(loaded, **options, num_draft_tokens=7, draft_model=loaded[0])
        assert contents(ended) == contents(run(loaded, **options))
        assert tokens_of(ended) == plain[: plain.index(plain[place]) + 1] and ended[-1].stop_reason == "eos"


def test_a_stop_string_among_accepted_drafts_ends_the_answer(loaded: Loaded) -> None:
    text = "".join(chunk.text for chunk in run(loaded))
    for place in range(3, 30, 5):
        stop = (text[place : place + 4],)
        ended = run(loaded, stop=stop, num_draft_tokens=7, draft_model=loaded[0])
        assert contents(ended) == contents(run(loaded, stop=stop))
        assert ended[-1].stop_reason == "stop_string"


def test_a_response_may_begin_as_asked(loaded: Loaded) -> None:
    plain = run(loaded, MESSAGES, prefill_response="Some years")
    assert contents(run(loaded, MESSAGES, prefill_response="Some years", num_draft_tokens=4)) == contents(plain)


@pytest.mark.parametrize("memory", [{}, {"kv_bits": 8, "kv_group_size": 32}])
def test_a_prompt_cache_serves_and_stays_as_it_is(loaded: Loaded, memory: dict[str, Any]) -> None:
    ids = loaded[1].encode(PROMPT)
    cache = arcee_mlx.cache_prompt(*loaded, ids[:-3], GenerateOptions(**memory))
    before = [np.array(array) for layer in cache.layers for array in layer.state if isinstance(array, mx.array)]
    for prompt in (ids, ids[:5], [*ids[:6], 9, 9, 9], [9, 9]):
        for draft_model in (None, disturbed(loaded[0])):
            warm = run(loaded, prompt, cache=cache, num_draft_tokens=5, draft_model=draft_model, **memory)
            assert contents(warm) == contents(run(loaded, prompt, **memory))
    after = [np.array(array) for layer in cache.layers for array in layer.state if isinstance(array, mx.array)]
    assert cache.length == len(ids) - 3 and all(map(np.array_equal, before, after))


def test_processors_are_called_as_without_drafts(loaded: Loaded) -> None:
    def calls(**drafts: Any) -> tuple[list[int], list[tuple[str, list[int]]]]:
        seen: list[tuple[str, list[int]]] = []

        def first(tokens: mx.array, logits: mx.array) -> mx.array:
            seen.append((str(tokens.dtype), tokens.tolist()))
            return logits + 0.5 * mx.sin(mx.arange(400) * len(seen))[None]  # remembers how often it was called

        return tokens_of(run(loaded, own=[first], temp=1.0, seed=9, **drafts)), seen

    plain = calls()
    assert calls(num_draft_tokens=6) == plain
    assert calls(num_draft_tokens=6, draft_model=disturbed(loaded[0])) == plain


@pytest.fixture
def widths(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each pass of the model was given."""
    seen: list[int] = []
    forward = ArceeForCausalLM.__call__

    def count(self: ArceeForCausalLM, input_ids: mx.array, cache: Any = None) -> mx.array:
        if self is loaded[0]:
            seen.append(input_ids.shape[1])
        return forward(self, input_ids, cache)

    monkeypatch.setattr(ArceeForCausalLM, "__call__", count)
    return seen


def test_passes_are_counted_and_hold_at_most_eight_tokens(loaded: Loaded, widths: list[int]) -> None:
    stats = run(loaded, max_tokens=41, num_draft_tokens=7, draft_model=disturbed(loaded[0]))[-1].stats
    passes = widths[1:-1]  # between the prompt's but for its last token, and the one that ran ahead
    assert max(passes) == 8 and widths[-1] == 1
    assert stats.generation_tokens == 41 == len(passes) + stats.accepted_tokens
    assert stats.drafted_tokens == sum(passes) - len(passes)
    assert stats.tokens_per_step == 41 / len(passes) > 1
    assert stats.acceptance_rate == stats.accepted_tokens / stats.drafted_tokens < 1


def test_nothing_is_drafted_after_an_end_of_text(loaded: Loaded, widths: list[int]) -> None:
    first = run(loaded, max_tokens=1)[0].token
    name = next(text for text, token in loaded[1]._backend.get_vocab().items() if token == first)
    widths.clear()
    (chunk,) = run(loaded, extra_eos_tokens=(name,), num_draft_tokens=7, draft_model=disturbed(loaded[0], 3.0))
    assert chunk.stop_reason == "eos" and widths[1:] == [8, 1]


def test_without_drafts_there_is_nothing_to_count(loaded: Loaded) -> None:
    stats = run(loaded)[-1].stats
    assert (stats.drafted_tokens, stats.accepted_tokens, stats.acceptance_rate) == (0, 0, None)
    assert stats.tokens_per_step == 1


@pytest.mark.parametrize("temp", [0.0, 0.7, 1.5])
def test_a_draft_model_like_the_model_is_always_right(loaded: Loaded, temp: float) -> None:
    chunks = run(loaded, temp=temp, seed=3, repetition_penalty=1.2, num_draft_tokens=7, draft_model=loaded[0])
    assert chunks[-1].stats.acceptance_rate == 1


def test_a_draft_model_forgets_what_was_rejected(loaded: Loaded) -> None:
    class Greedy:
        def copy_sampler(self) -> Any:
            return lambda scores: mx.argmax(scores, axis=-1)

    def drafter() -> ModelDrafter:
        return ModelDrafter(loaded[0], Greedy(), [], prefill_step_size=4)  # type: ignore[arg-type]

    ids, kept = loaded[1].encode(PROMPT), drafter()
    for accepted in (0, 3, 5, 2, 1):
        drafts = kept.propose(ids, 5)
        assert drafts == drafter().propose(ids, 5)
        ids = [*ids, *drafts[:accepted], 9]


def test_a_draft_model_drafts_nothing_beyond_its_positions(loaded: Loaded, tmp_path: Path) -> None:
    plain = run(loaded)
    short = ArceeForCausalLM(tiny_config(max_position_embeddings=len(loaded[1].encode(PROMPT)) + 10))
    short.load_weights(flat(loaded[0]))
    chunks = run(loaded, num_draft_tokens=4, draft_model=short)
    assert contents(chunks) == contents(plain)
    assert 0 < chunks[-1].stats.drafted_tokens <= 10


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 4), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_ngram_drafts_are_what_a_search_from_the_end_finds(ids: list[int], size: int, n: int) -> None:
    def search(ids: list[int]) -> list[int]:
        for length in range(min(size, len(ids)), 0, -1):
            for end in range(len(ids) - 1, length - 1, -1):
                if ids[end - length : end] == ids[-length:]:
                    return list(itertools.islice(itertools.cycle(ids[end:]), n))
        return []

    drafter = NgramDrafter(size)
    for end in range(1, len(ids) + 1):
        assert drafter.propose(ids[:end], n) == search(ids[:end])


# The distribution: three tokens of a model with eight, against probabilities computed without any of generation's code.
IDS = [2, 4, 5, 2, 4, 5, 2, 4]
ALLOWED = (0, 2, 4, 5, 6, 7)  # 1 and 3 end a text
SAMPLED = {"temp": 1.5, "top_k": 5, "logit_bias": {1: -1e4, 3: -1e4, 5: 0.7}, "frequency_penalty": 0.4, "max_tokens": 3}


@pytest.fixture(scope="module")
def tiny(loaded: Loaded) -> Loaded:
    mx.random.seed(3)
    model = ArceeForCausalLM(tiny_config(vocab_size=8))
    model.load_weights([(name, 0.5 * mx.random.normal(value.shape)) for name, value in flat(model)])
    return model, loaded[1]


def exact_probabilities(model: ArceeForCausalLM) -> dict[tuple[int, ...], float]:
    def after(answer: tuple[int, ...]) -> np.ndarray:
        logits = np.array(model.forward(mx.array([[*IDS, *answer]])).logits[0, -1], np.float64)
        for token, bias in SAMPLED["logit_bias"].items():  # type: ignore[attr-defined]
            logits[token] += bias
        for token in answer:
            logits[token] -= 0.4
        kept = np.exp((logits - logits.max()) / 1.5)
        kept[np.argsort(logits)[:-5]] = 0
        return kept / kept.sum()

    found = {(): 1.0}
    for _ in range(3):
        found = {
            (*answer, token): p * q
            for answer, p in found.items()
            for token, q in enumerate(after(answer))
            if token in ALLOWED
        }
    return found


def excess_chi_square(tiny: Loaded, answers: int, **drafts: Any) -> float:
    """Pearson's statistic over its bound: over 1 is a false alarm with a probability under 1e-6 (Laurent and Massart)."""
    expected = {cell: answers * p for cell, p in exact_probabilities(tiny[0]).items()}
    counts = dict.fromkeys(expected, 0)
    for seed in range(answers):
        counts[tuple(tokens_of(run(tiny, IDS, seed=seed, **SAMPLED, **drafts)))] += 1
    common = [cell for cell, count in expected.items() if count >= 5]
    rest = answers - sum(expected[cell] for cell in common), answers - sum(counts[cell] for cell in common)
    cells = [(expected[cell], counts[cell]) for cell in common] + [rest]
    assert len(cells) > 20
    statistic = sum((count - want) ** 2 / want for want, count in cells)
    freedom, x = len(cells) - 1, math.log(1e6)
    return float(statistic / (freedom + 2 * math.sqrt(freedom * x) + 2 * x))


@pytest.fixture(params=["ngrams", "draft model"])
def drafts(request: pytest.FixtureRequest, tiny: Loaded) -> Iterator[dict[str, Any]]:
    yield {"num_draft_tokens": 3} | ({"draft_model": disturbed(tiny[0], 1.0)} if request.param != "ngrams" else {})


def test_sampled_tokens_have_the_models_distribution(tiny: Loaded, drafts: dict[str, Any]) -> None:
    assert excess_chi_square(tiny, 700, **drafts) < 1


def test_accepting_every_draft_would_show(
    tiny: Loaded, drafts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Speculator, "_agrees", lambda self, draft, token: True)
    assert excess_chi_square(tiny, 700, **drafts) > 1


def test_rejected_drafts_left_in_the_cache_would_show(
    tiny: Loaded, drafts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Speculator, "_take_back", lambda self, cache: self._waiting.clear())
    assert excess_chi_square(tiny, 700, **drafts) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_draft_tokens": 8}, "num_draft_tokens is 8; expected an integer of at least 0 and at most 7"),
        ({"num_draft_tokens": -1}, "num_draft_tokens is -1"),
        ({"num_draft_tokens": None}, "num_draft_tokens is None"),
        ({"num_draft_tokens": 3, "max_matching_ngram_size": 0}, "max_matching_ngram_size is 0"),
        ({"max_matching_ngram_size": 2}, "max_matching_ngram_size without num_draft_tokens"),
        ({"num_draft_tokens": 3, "max_kv_size": 20}, "num_draft_tokens together with max_kv_size"),
    ],
)
def test_options_that_cannot_be_are_refused(loaded: Loaded, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(loaded, **options)


def test_an_engine_refuses_drafts(checkpoint: Path) -> None:
    with (
        arcee_mlx.Engine.load(checkpoint) as engine,
        pytest.raises(InputError, match="num_draft_tokens is 3 in an engine"),
    ):
        engine.submit(PROMPT, GenerateOptions(num_draft_tokens=3))


def test_draft_models_that_do_not_fit_are_refused(loaded: Loaded) -> None:
    model, tokenizer = loaded
    with pytest.raises(InputError, match="num_draft_tokens is 0 with a draft_model"):
        run(loaded, draft_model=model)
    with pytest.raises(InputError, match="max_matching_ngram_size with a draft_model"):
        run(loaded, draft_model=model, num_draft_tokens=2, max_matching_ngram_size=2)
    other = ArceeForCausalLM(tiny_config(vocab_size=401))
    with pytest.raises(InputError, match="draft_model has a vocabulary of 401 tokens; expected the model's 400"):
        run(loaded, draft_model=other, num_draft_tokens=2)
    cache = arcee_mlx.cache_prompt(model, tokenizer, PROMPT, GenerateOptions(max_kv_size=64))
    with pytest.raises(InputError, match="num_draft_tokens is 2 with a prompt cache of max_kv_size 64"):
        run(loaded, cache=cache, num_draft_tokens=2)

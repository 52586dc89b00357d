"""beam_search finds what transformers' generate finds: the same tokens with the same scores, in the same order."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import write_tokenizer

torch = pytest.importorskip("torch", reason="compares with transformers on torch")

import arcee_mlx  # noqa: E402
from arcee_mlx import GenerateOptions  # noqa: E402

pytestmark = pytest.mark.parity

VALUES: dict[str, Any] = {"vocab_size": 400, "bos_token_id": 0, "eos_token_id": 1}
PROMPTS = [[0, 17, 230, 44], [0, 9, 8, 7, 6, 5, 311, 312], [0]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """transformers' model, ours, and the tokenizer, over one checkpoint whose ends of text are often likely."""
    torch = pytest.importorskip("torch")
    from parity.reference import saved, tiny

    import arcee_mlx

    folder: Path = tmp_path_factory.mktemp("beam") / "m"
    theirs = saved(tiny(**VALUES), folder)
    with torch.no_grad():
        theirs.lm_head.weight[1] *= 2.0
        theirs.lm_head.weight[3] *= 1.6
        theirs.lm_head.weight *= 0.6
    theirs.save_pretrained(folder)
    write_tokenizer(folder)
    return theirs, *arcee_mlx.load(folder)


def compare(both: tuple[Any, Any, Any], prompt: list[int], options: dict[str, Any], **beams: Any) -> list[int]:
    """Asserts equality; returns the lengths of the answers."""
    theirs, model, tokenizer = both
    out = theirs.generate(
        torch.tensor([prompt]),
        do_sample=False,
        max_new_tokens=options.get("max_tokens", 12),
        repetition_penalty=options.get("repetition_penalty", 1.0),
        eos_token_id=[1, 3],
        pad_token_id=4,
        return_dict_in_generate=True,
        output_scores=True,
        **beams,
    )
    found = arcee_mlx.beam_search(model, tokenizer, prompt, replace(GenerateOptions(max_tokens=12), **options), **beams)
    assert len(found) == len(out.sequences)
    for beam, sequence, score in zip(found, out.sequences.tolist(), out.sequences_scores.tolist(), strict=True):
        answer = sequence[len(prompt) :]
        assert list(beam.tokens) == answer[: len(beam.tokens)]
        assert set(answer[len(beam.tokens) :]) <= {4}  # padding
        assert beam.score == pytest.approx(score, rel=1e-6, abs=2e-5)
        assert (beam.stop_reason == "eos") == (beam.tokens[-1] in (1, 3))
    return [len(beam.tokens) for beam in found]


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.5])
def test_tokens_and_scores_equal(
    both: tuple[Any, Any, Any], prompt: list[int], early_stopping: Any, length_penalty: float
) -> None:
    compare(
        both, prompt, {}, num_beams=4, num_return_sequences=4, early_stopping=early_stopping,
        length_penalty=length_penalty,
    )  # fmt: skip


@pytest.mark.parametrize("num_beams", [2, 3, 7])
@pytest.mark.parametrize("max_tokens", [1, 2, 25])
def test_other_widths_and_lengths(both: tuple[Any, Any, Any], num_beams: int, max_tokens: int) -> None:
    lengths = compare(both, PROMPTS[0], {"max_tokens": max_tokens}, num_beams=num_beams, num_return_sequences=2)
    assert max(lengths) <= max_tokens


def test_the_cases_hold_ended_and_cut_answers(both: tuple[Any, Any, Any]) -> None:
    reasons = {
        beam.stop_reason
        for prompt in PROMPTS
        for penalty in (-1.5, 2.0)
        for beam in arcee_mlx.beam_search(
            *both[1:], prompt, GenerateOptions(max_tokens=12), length_penalty=penalty, num_return_sequences=4
        )
    }
    assert reasons == {"eos", "max_tokens"}


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_repetition_penalty_changes_log_probabilities_as_there(both: tuple[Any, Any, Any], penalty: float) -> None:
    compare(both, PROMPTS[1], {"repetition_penalty": penalty}, num_beams=3, num_return_sequences=3)

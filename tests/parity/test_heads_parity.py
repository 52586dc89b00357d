"""Classifiers and question answering against transformers: scores, pooling, losses, refusals, cache and outputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="compares with transformers on torch")

import transformers  # noqa: E402

import arcee_mlx  # noqa: E402
from arcee_mlx import load_model  # noqa: E402
from arcee_mlx.errors import ArceeError, InputError  # noqa: E402

from parity_configs import CONFIGS, rope  # noqa: E402
from reference import as_numpy, assert_close, random_ids, their_model, tiny  # noqa: E402

pytestmark = pytest.mark.parity

SEQUENCE, TOKEN, QA = "ArceeForSequenceClassification", "ArceeForTokenClassification", "ArceeForQuestionAnswering"
PAD = 0
L = 9


def labelled(count: int, **changes: Any) -> dict[str, Any]:
    return {"id2label": {str(i): f"name {i}" for i in range(count)}, "pad_token_id": PAD, **changes}


def pair(folder: Path, cls: str, seed: int = 3, **changes: Any) -> tuple[Any, Any]:
    """Both implementations' model of one checkpoint that transformers saved."""
    theirs_class = getattr(transformers, cls)
    their_model(tiny(**{"architectures": [cls], **changes}), seed=seed, cls=theirs_class).save_pretrained(folder)
    model = load_model(folder)
    assert type(model).__name__ == cls
    return theirs_class.from_pretrained(folder).eval(), model


def compare(theirs: Any, model: Any, **inputs: Any) -> Any:
    """Both compute; what transformers gives must be there and equal, and where it raises, ours must be one of ours."""
    theirs_inputs = {k: torch.tensor(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
    mine_inputs = {k: mx.array(v) if isinstance(v, np.ndarray) else v for k, v in inputs.items()}
    try:
        with torch.no_grad():
            expected = theirs(**{"use_cache": False, **theirs_inputs})
    except Exception:
        with pytest.raises(ArceeError):
            model.forward(**mine_inputs)
        return None
    mine = model.forward(**{"use_cache": False, **mine_inputs})
    for name, value in expected.items():
        if name == "past_key_values":
            continue
        got = getattr(mine, name)
        if isinstance(value, tuple):
            for one, other in zip(got, value, strict=True):
                assert_close(one, other)
        else:
            assert_close(got, value)
    assert {f.name for f in dataclasses.fields(mine)} == {f.name for f in dataclasses.fields(expected)}
    assert all(getattr(mine, f.name) is None for f in dataclasses.fields(mine) if f.name not in expected)
    return expected


def padded(side: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids (3, L) of which a second row and a third are shorter, and their mask."""
    ids, mask = random_ids((3, L), seed=1), np.ones((3, L), np.int64)
    for row, count in ((1, 3), (2, 7)):
        hidden = slice(0, count) if side == "left" else slice(L - count, L)
        ids[row, hidden], mask[row, hidden] = PAD, 0
    return ids, mask


RIGHT, RIGHT_MASK = padded("right")
LEFT, LEFT_MASK = padded("left")
INSIDE = np.array([[5, 0, 6, 0, 0, 7], [0, 8, 0, 9, 0, 0], [0, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]])
ROW = random_ids((1, L))
EMBEDS = np.random.default_rng(5).normal(size=(3, L, 48)).astype(np.float32)
PACKED = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 1]])
INPUTS: dict[str, dict[str, Any]] = {
    "right": {"input_ids": RIGHT, "attention_mask": RIGHT_MASK},
    "left": {"input_ids": LEFT, "attention_mask": LEFT_MASK},
    "no_mask": {"input_ids": RIGHT},
    "pads_inside": {"input_ids": INSIDE, "attention_mask": np.ones_like(INSIDE)},
    "pads_inside_hidden": {"input_ids": INSIDE, "attention_mask": (INSIDE != 0).astype(np.int64)},
    "mask_disagrees": {"input_ids": random_ids((3, L)), "attention_mask": RIGHT_MASK},
    "one_token": {"input_ids": random_ids((3, 1))},
    "one_row": {"input_ids": ROW},
    "one_row_of_pads": {"input_ids": np.zeros((1, 4), np.int64)},
    "embeds": {"inputs_embeds": EMBEDS},
    "embeds_masked": {"inputs_embeds": EMBEDS, "attention_mask": RIGHT_MASK},
    "embeds_one_row": {"inputs_embeds": EMBEDS[:1]},
    "packed": {"input_ids": ROW, "position_ids": PACKED},
    "positions": {"input_ids": RIGHT, "attention_mask": RIGHT_MASK, "position_ids": np.arange(3, 3 + L)[None]},
    "states": {"input_ids": RIGHT, "attention_mask": RIGHT_MASK, "output_hidden_states": True},
    "ids_and_embeds": {"input_ids": RIGHT, "inputs_embeds": EMBEDS},
    "nothing": {},
    "flat": {"input_ids": ROW[0]},
}
PADS: dict[str, dict[str, Any]] = {
    "pad": {},
    "no_pad": {"pad_token_id": None},
    "negative_pad": {"pad_token_id": -1},
    "pad_is_eos": {"pad_token_id": 2, "eos_token_id": 2},
    "pad_of_a_word": {"pad_token_id": int(ROW[0, -1])},
}


@pytest.fixture(scope="module", params=PADS)
def sequence_pair(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return pair(tmp_path_factory.mktemp("sequence"), SEQUENCE, **labelled(3, **PADS[request.param]))


@pytest.mark.parametrize("name", INPUTS)
def test_a_sequence_is_classified_at_the_token_transformers_takes(sequence_pair: Any, name: str) -> None:
    inputs = INPUTS[name]
    rows = len(next(iter(inputs.values()), [0]))
    compare(*sequence_pair, **inputs)
    compare(*sequence_pair, **inputs, labels=np.arange(rows) % 3)


@pytest.mark.parametrize("cls", [TOKEN, QA])
@pytest.mark.parametrize("name", ["no_mask", "one_token", "embeds", "packed", "positions", "states", "ids_and_embeds", "nothing", "flat"])  # fmt: skip
def test_every_token_has_transformers_scores(tmp_path: Path, cls: str, name: str) -> None:
    compare(*pair(tmp_path, cls, **labelled(5)), **INPUTS[name])


@pytest.mark.parametrize("cls", [SEQUENCE, TOKEN, QA])
@pytest.mark.parametrize("name", ["yarn", "dynamic", "longrope", "biases", "tied", "silu", "wide_heads", "no_layers"])
def test_heads_stand_on_any_decoder(tmp_path: Path, cls: str, name: str) -> None:
    theirs, model = pair(tmp_path, cls, **labelled(4, **CONFIGS[name]))
    ids = random_ids((2, 24))
    compare(theirs, model, input_ids=ids)


LABELS: dict[str, Any] = {
    "classes": lambda n: np.array([0, min(1, n - 1)]),
    "column": lambda n: np.array([[0], [n - 1]]),
    "one_ignored": lambda n: np.array([0, -100]),
    "all_ignored": lambda n: np.array([-100, -100]),
    "out_of_range": lambda n: np.array([0, n]),
    "negative": lambda n: np.array([0, -1]),
    "three": lambda n: np.array([0, 0, 0]),
    "one": lambda n: np.array([0]),
    "float_row": lambda n: np.array([0.3, 1.2], np.float32),
    "float_column": lambda n: np.array([[0.3], [1.2]], np.float32),
    "float_table": lambda n: np.random.default_rng(0).random((2, n)).astype(np.float32),
    "double_table": lambda n: np.random.default_rng(0).random((2, n)),
    "int_table": lambda n: np.ones((2, n), np.int64),
    "bool_row": lambda n: np.array([True, False]),
    "bool_table": lambda n: np.ones((2, n), bool),
}


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize(
    "problem", [None, "regression", "single_label_classification", "multi_label_classification", "x"]
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_loss_and_refusals_of_a_classifier_are_transformers(
    tmp_path: Path, count: int, problem: str | None, labels: str
) -> None:
    if count == 1 and problem == "single_label_classification":
        pytest.skip("such a config is refused by both")
    theirs, model = pair(tmp_path, SEQUENCE, **labelled(count))
    theirs.config.problem_type = problem
    model.config = dataclasses.replace(model.config, problem_type=problem)
    before = model.config
    compare(theirs, model, input_ids=random_ids((2, 5)), labels=LABELS[labels](count))
    assert model.config == before


def test_problem_type_in_the_file_decides(tmp_path: Path) -> None:
    theirs, model = pair(tmp_path, SEQUENCE, **labelled(2, problem_type="regression"))
    assert compare(theirs, model, input_ids=random_ids((2, 5)), labels=np.array([[0, 1], [5, 2]])).loss > 1


def test_each_call_decides_what_the_problem_is(tmp_path: Path) -> None:
    # transformers keeps the first call's choice, so that the second of these fails there.
    _, model = pair(tmp_path, SEQUENCE, **labelled(3))
    ids, floats, classes = mx.array(random_ids((2, 5))), mx.ones((2, 3)), mx.array([0, 2])
    both = [model.forward(ids, labels=labels).loss.item() for labels in (floats, classes)]
    theirs = [pair(tmp_path / str(i), SEQUENCE, **labelled(3))[0] for i in range(2)]
    with torch.no_grad():
        for loss, reference, labels in zip(both, theirs, (torch.ones(2, 3), torch.tensor([0, 2])), strict=True):
            assert loss == pytest.approx(
                reference(torch.tensor(random_ids((2, 5))), labels=labels).loss.item(), abs=1e-5
            )


@pytest.mark.parametrize("dtype", ["int32", "int16", "uint8", "uint32"])
def test_classes_may_be_any_integers(tmp_path: Path, dtype: str) -> None:
    # torch takes int64 and uint8 alone; MLX makes int32 of a list.
    theirs, model = pair(tmp_path, SEQUENCE, **labelled(3))
    ids, labels = random_ids((2, 5)), np.array([2, 0])
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), labels=torch.tensor(labels)).loss
    assert_close(model.forward(mx.array(ids), labels=mx.array(labels.astype(dtype))).loss, expected)


TOKEN_LABELS: dict[str, np.ndarray] = {
    "all": np.arange(18).reshape(2, L) % 5,
    "some_ignored": np.where(np.arange(18) % 3 == 0, -100, np.arange(18) % 5).reshape(2, L),
    "all_ignored": np.full((2, L), -100),
    "flat": np.arange(18) % 5,
    "out_of_range": np.full((2, L), 5),
    "negative": np.full((2, L), -1),
    "short": np.zeros((2, L - 1), np.int64),
    "floats": np.zeros((2, L), np.float32),
}


@pytest.mark.parametrize("changes", [{}, {"token_classification_bias": False}, {"classifier_dropout": 0.5}], ids=str)
@pytest.mark.parametrize("labels", TOKEN_LABELS)
def test_loss_and_refusals_of_a_tagger_are_transformers(tmp_path: Path, labels: str, changes: dict[str, Any]) -> None:
    theirs, model = pair(tmp_path, TOKEN, **labelled(5, **changes))
    assert model.dropout._p_1 == 1 - theirs.dropout.p
    compare(theirs, model, input_ids=random_ids((2, L)), labels=TOKEN_LABELS[labels])


POSITIONS: dict[str, dict[str, Any]] = {
    "plain": {"start_positions": np.array([1, 5]), "end_positions": np.array([3, 8])},
    "end_before_start": {"start_positions": np.array([6, 5]), "end_positions": np.array([3, 0])},
    "beyond": {"start_positions": np.array([1, L]), "end_positions": np.array([400, 8])},
    "all_beyond": {"start_positions": np.array([L, L + 1]), "end_positions": np.array([3, 8])},
    "negative": {"start_positions": np.array([-1, -100]), "end_positions": np.array([-7, 2])},
    "column": {"start_positions": np.array([[1], [5]]), "end_positions": np.array([[3], [8]])},
    "start_only": {"start_positions": np.array([1, 5])},
    "end_only": {"end_positions": np.array([1, 5])},
    "num_items": {"start_positions": np.array([1, L]), "end_positions": np.array([3, 8]), "num_items_in_batch": 7},
    "num_items_array": {"start_positions": np.array([1, 5]), "end_positions": np.array([3, 8]), "num_items_in_batch": np.array(3)},
    "table": {"start_positions": np.zeros((2, 2), np.int64), "end_positions": np.zeros((2, 2), np.int64)},
    "three": {"start_positions": np.zeros(3, np.int64), "end_positions": np.zeros(3, np.int64)},
    "floats": {"start_positions": np.zeros(2, np.float32), "end_positions": np.zeros(2, np.float32)},
}  # fmt: skip


@pytest.mark.parametrize("name", POSITIONS)
def test_loss_of_an_answer_is_transformers(tmp_path: Path, name: str) -> None:
    ids, mask = random_ids((2, L)), np.ones((2, L), np.int64)
    mask[1, -2:] = 0
    theirs, model = pair(tmp_path, QA, pad_token_id=PAD)
    compare(theirs, model, input_ids=ids, **POSITIONS[name])
    compare(theirs, model, input_ids=ids, attention_mask=mask, **POSITIONS[name])


@pytest.mark.parametrize("cls", [SEQUENCE, TOKEN, QA])
def test_attentions_are_transformers_attentions(tmp_path: Path, cls: str) -> None:
    theirs, model = pair(tmp_path, cls, **labelled(3, rope_parameters=rope("yarn", factor=4.0)))
    theirs.set_attn_implementation("eager")
    expected = compare(theirs, model, input_ids=random_ids((2, L)), output_attentions=True, output_hidden_states=True)
    assert len(expected.attentions) == 2 and len(expected.hidden_states) == 3


@pytest.mark.parametrize("cls", [SEQUENCE, TOKEN, QA])
def test_a_cache_goes_on_as_in_transformers(tmp_path: Path, cls: str) -> None:
    theirs, model = pair(tmp_path, cls, **labelled(3))
    ids = random_ids((2, L))
    their_cache, cache = transformers.DynamicCache(config=theirs.config), model.make_cache()
    for part in (ids[:, :4], ids[:, 4:5], ids[:, 5:]):
        with torch.no_grad():
            expected = theirs(torch.tensor(part), past_key_values=their_cache, use_cache=True)
        mine = model.forward(mx.array(part), cache=cache, use_cache=True)
        for name in ("logits", "start_logits", "end_logits"):
            if name in expected:
                assert_close(getattr(mine, name), expected[name])
        if cls == SEQUENCE:
            assert mine.past_key_values is cache


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("cls", [SEQUENCE, TOKEN, QA])
def test_half_precision_is_as_close_as_transformers_is(tmp_path: Path, cls: str, dtype: str) -> None:
    pair(tmp_path, cls, **labelled(3))
    theirs = getattr(transformers, cls).from_pretrained(tmp_path, dtype=dtype).eval()
    exact = getattr(transformers, cls).from_pretrained(tmp_path, dtype=dtype).eval().double()
    ids = random_ids((2, 24))
    labels = {
        SEQUENCE: {"labels": np.array([2, 0])},
        TOKEN: {"labels": ids % 3},
        QA: {"start_positions": np.array([1, 5]), "end_positions": np.array([3, 23])},
    }[cls]
    with torch.no_grad():
        half, full = (
            m(torch.tensor(ids), use_cache=False, **{k: torch.tensor(v) for k, v in labels.items()})
            for m in (theirs, exact)
        )
    mine = load_model(tmp_path, dtype=dtype).forward(mx.array(ids), **{k: mx.array(v) for k, v in labels.items()})
    assert mine.loss.dtype == mx.float32
    for name in ("logits", "start_logits", "end_logits", "loss"):
        if name in full:
            exact_values = full[name].numpy()
            noise, own = (np.std(as_numpy(x) - exact_values) for x in (half[name], getattr(mine, name)))
            assert own <= max(1e-2, 1.5 * noise)


def test_several_rows_without_a_pad_token_are_refused_by_name(tmp_path: Path) -> None:
    _, model = pair(tmp_path, SEQUENCE, **labelled(3, pad_token_id=None))
    with pytest.raises(InputError, match="2 rows, and no pad_token_id"):
        model.forward(mx.array(random_ids((2, 5))))


def test_outputs_have_transformers_fields() -> None:
    for name in ("SequenceClassifierOutput", "TokenClassifierOutput", "QuestionAnsweringModelOutput"):
        theirs = getattr(transformers.modeling_outputs, name.replace("rOutput", "rOutputWithPast") if name.startswith("Seq") else name)  # fmt: skip
        ours = {f.name for f in dataclasses.fields(getattr(arcee_mlx, name))}
        assert ours == {f.name for f in dataclasses.fields(theirs)}

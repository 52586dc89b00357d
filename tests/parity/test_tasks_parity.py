"""classify, tag and answer beside transformers' pipelines, on the same tiny random checkpoints and tokenizers."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="compares with transformers on torch")
transformers = pytest.importorskip("transformers")

import tokenizers  # noqa: E402
from transformers.pipelines.document_question_answering import select_starts_ends  # noqa: E402

import arcee_mlx  # noqa: E402
from arcee_mlx import load_model  # noqa: E402
from arcee_mlx.checkpoint.tokenizer import read_tokenizer  # noqa: E402

from conftest import TEXT, tiny_config, write_tokenizer  # noqa: E402
from reference import their_model  # noqa: E402

ATOL = 2e-5  # on probabilities; logits have a standard deviation of about 1.3
TEXTS = [
    "Call me Ishmael.",
    "a",
    TEXT,
    "Grüße, 日本語 🙂 e\u0301 👩‍👩‍👧 of",
    "  two  spaces\n\tand lines ",
    "<s>me</s>the<pad>",
]
BIO = ["O", "B-PER", "I-PER", "B-LOC", "I-LOC", "I-X-Y", "MISC"]


def write_word_pieces(folder: Path) -> None:
    """A tokenizer whose tokens mark that they go on with a word, and that does not know every letter."""
    known = [
        *"abcdefghijklmnopqrstuvwxyzCI.,",
        *(f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"),
        "the",
        "##ing",
    ]
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<unk>", "<pad>", *known])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.add_special_tokens(["<s>", "</s>", "<unk>", "<pad>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def both(folder: Path, cls: str, *, seed: int = 0, words: bool = False, **changes: Any) -> tuple[Any, Any, Any, Any]:
    """transformers' model and tokenizer of a new checkpoint, and ours."""
    (write_word_pieces if words else write_tokenizer)(folder)
    values = tiny_config(pad_token_id=4, **changes).to_dict() | {"architectures": [cls]}
    theirs_class = getattr(transformers, cls)
    their_model(values, seed=seed, cls=theirs_class).save_pretrained(folder)
    theirs = theirs_class.from_pretrained(folder).eval()
    return theirs, transformers.AutoTokenizer.from_pretrained(folder), load_model(folder), read_tokenizer(folder)


PROBLEMS: dict[str, dict[str, Any]] = {
    "one_of_three": {"id2label": {0: "no", 1: "maybe", 2: "yes"}},
    "single": {"id2label": {0: "no", 1: "yes"}, "problem_type": "single_label_classification"},
    "several": {"id2label": {0: "no", 1: "maybe", 2: "yes"}, "problem_type": "multi_label_classification"},
    "number": {"id2label": {0: "size"}, "problem_type": "regression"},
    "one_label": {"id2label": {0: "spam"}},
    "unnamed": {},
}


@pytest.mark.parametrize("words", [False, True], ids=["bytes", "words"])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_texts_get_the_labels_and_scores_of_the_pipeline(tmp_path: Path, problem: str, words: bool) -> None:
    changes = PROBLEMS[problem]
    theirs, their_tokenizer, model, tokenizer = both(tmp_path, "ArceeForSequenceClassification", words=words, **changes)
    pipeline = transformers.TextClassificationPipeline(model=theirs, tokenizer=their_tokenizer)
    pairs = [("Call me", "Ishmael."), (TEXT[:40], ""), ("", TEXT[40:])]
    asked = [*TEXTS, *({"text": first, "text_pair": second} for first, second in pairs)]
    for function in (None, "sigmoid", "softmax", "none"):
        expected = [pipeline(each, top_k=None, function_to_apply=function) for each in asked]
        found = arcee_mlx.classify(model, tokenizer, [*TEXTS, *pairs], function_to_apply=function)
        for one, other in zip(found, expected, strict=True):
            assert [each.label for each in one.scores] == [each["label"] for each in other]
            np.testing.assert_allclose(
                [each.score for each in one.scores], [each["score"] for each in other], atol=5 * ATOL
            )
            assert (one.label, one.score) == (one.scores[0].label, one.scores[0].score)


@pytest.mark.parametrize("length", [3, 6, 7, 20])
def test_pairs_are_cut_as_there(tmp_path: Path, length: int) -> None:
    _, their_tokenizer, model, tokenizer = both(tmp_path, "ArceeForSequenceClassification", words=True)
    from arcee_mlx.tasks.batches import tokenize

    pairs = [("abc", "the the the thing"), ("the the the thing", "abc"), ("abcdefghijk", "abcdefghijk"), ("a", "b")]
    rows = tokenize(tokenizer, model.config, pairs, max_length=length, truncate=True)
    for pair, row in zip(pairs, rows, strict=True):
        assert row.encoding.ids == their_tokenizer(*pair, truncation=True, max_length=length).input_ids


@pytest.mark.parametrize("words", [False, True], ids=["bytes", "words"])
@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
@pytest.mark.parametrize("seed", [0, 1])
def test_entities_are_those_of_the_pipeline(tmp_path: Path, aggregation: str, words: bool, seed: int) -> None:
    theirs, their_tokenizer, model, tokenizer = both(
        tmp_path, "ArceeForTokenClassification", words=words, seed=seed, id2label=dict(enumerate(BIO))
    )
    pipeline = transformers.TokenClassificationPipeline(
        model=theirs, tokenizer=their_tokenizer, aggregation_strategy=aggregation
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Tokenizer does not support real words")
        expected = [pipeline(text) for text in TEXTS]
    found = arcee_mlx.tag(model, tokenizer, TEXTS, aggregation)
    assert sum(map(len, found)) > 30
    for text, one, other in zip(TEXTS, found, expected, strict=True):
        key = "entity" if aggregation == "none" else "entity_group"
        assert [(e.label, e.start, e.end) for e in one] == [(e[key], e["start"], e["end"]) for e in other]
        np.testing.assert_allclose([e.score for e in one], [e["score"] for e in other], atol=ATOL)
        for mine, their in zip(one, other, strict=True):
            # Words joined before are decoded twice there, which garbles bytes beyond ASCII and parts word pieces.
            if aggregation in ("none", "simple") or (mine.word.isascii() and not words):
                assert mine.word == their["word"], text


def test_ignored_labels_are_left_out_as_there(tmp_path: Path) -> None:
    theirs, their_tokenizer, model, tokenizer = both(
        tmp_path, "ArceeForTokenClassification", id2label=dict(enumerate(BIO))
    )
    ignored = ["PER", "MISC"]
    pipeline = transformers.TokenClassificationPipeline(
        model=theirs, tokenizer=their_tokenizer, aggregation_strategy="simple", ignore_labels=ignored
    )
    found = arcee_mlx.tag(model, tokenizer, [TEXT], "simple", ignore_labels=ignored)[0]
    assert [(e.label, e.start) for e in found] == [(e["entity_group"], e["start"]) for e in pipeline(TEXT)]
    assert {e.label for e in found} >= {"O", "LOC"} and not {e.label for e in found} & set(ignored)


def their_answers(
    model: Any, tokenizer: Any, question: str, context: str, *, top_k: int, stride: int, size: int, longest: int,
    align: bool, impossible: bool,
) -> list[tuple[int, int, float]]:  # fmt: skip
    """What the pipeline of transformers 4 did, from what 5.23 has of it: its windows, its choice, its words."""
    windows = tokenizer(
        question, context, truncation="only_second", max_length=size, stride=stride, return_overflowing_tokens=True
    )
    best: dict[tuple[int, int], float] = {}
    null = 1000000.0
    for i, ids in enumerate(windows["input_ids"]):
        encoding = windows[i]
        with torch.no_grad():
            output = model(torch.tensor([ids]))
        hidden = np.array([[kind != 1 for kind in windows.sequence_ids(i)]])
        hidden[0, 0] &= not impossible  # a cls token's place, which the first token takes
        starts, ends, scores, null = select_starts_ends(
            output.start_logits.numpy(), output.end_logits.numpy(), hidden.astype(int), None, null,
            2 * top_k + 10 if align else top_k, impossible, longest,
        )  # fmt: skip
        found: dict[tuple[int, int], float] = {}
        for start, end, score in zip(starts, ends, scores, strict=True):
            if score == 0:  # no candidate: an end before a start
                continue
            first, last = encoding.offsets[start][0], encoding.offsets[end][1]
            if align:
                first = encoding.word_to_chars(encoding.token_to_word(start), 1)[0]
                last = encoding.word_to_chars(encoding.token_to_word(end), 1)[1]
            found[first, last] = found.get((first, last), 0.0) + float(score)
        for span, score in found.items():
            best[span] = max(best.get(span, 0.0), score)
    answers = [(*span, score) for span, score in best.items()] + ([(0, 0, null)] if impossible else [])
    return sorted(answers, key=lambda span: -span[2])[:top_k]


@pytest.mark.parametrize("words", [False, True], ids=["bytes", "words"])
@pytest.mark.parametrize("align", [True, False], ids=["words", "tokens"])
@pytest.mark.parametrize("impossible", [False, True])
@pytest.mark.parametrize(("size", "stride"), [(250, 0), (60, 20), (40, 0), (33, 16)])
def test_answers_are_the_spans_and_scores_of_the_pipeline(
    tmp_path: Path, words: bool, align: bool, impossible: bool, size: int, stride: int
) -> None:
    theirs, their_tokenizer, model, tokenizer = both(tmp_path, "ArceeForQuestionAnswering", words=words, seed=2)
    contexts = [TEXT, "Call me Ishmael.", "Grüße, 日本語 🙂", "a"]
    for context in contexts:
        for top_k, longest in ((1, 15), (4, 3)):
            expected = their_answers(
                theirs, their_tokenizer, "Who is it?", context, top_k=top_k, stride=stride, size=size, longest=longest,
                align=align, impossible=impossible,
            )  # fmt: skip
            found = arcee_mlx.answer(
                model, tokenizer, "Who is it?", context, top_k=top_k, doc_stride=stride, max_seq_len=size,
                max_answer_len=longest, align_to_words=align, handle_impossible_answer=impossible,
            )  # fmt: skip
            assert [(span.start, span.end) for span in found] == [span[:2] for span in expected]
            np.testing.assert_allclose([span.score for span in found], [span[2] for span in expected], atol=ATOL)
            assert all(span.answer == context[span.start : span.end] for span in found)

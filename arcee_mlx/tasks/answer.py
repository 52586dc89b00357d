"""answer: where in a context the answer to a question stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.tokenizer import Encoding, Tokenizer
from ..errors import InputError
from ..generate.options import context_tokens
from ..model.config import ArceeConfig
from ..model.heads import ArceeForQuestionAnswering
from ..model.inputs import check_ids
from .batches import TokenizedText, make_batches, run_decoder
from .classify import check_head, softmax

_WINDOW, _STRIDE = 384, 128  # the pipeline's defaults


@dataclass(frozen=True)
class AnswerSpan:
    """A piece of a context that may answer the question; from `answer`.

    Attributes:
        answer: `context[start:end]`; "" for "the context does not say".
        score: its probability.
        start, end: place in the context, in characters.
    """

    answer: str
    score: float
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How `answer` looks for answers; see there.

    Raises:
        InputError: a number is less than 1, or a stride less than 0.
    """

    top_k: int = 1
    doc_stride: int | None = None
    max_answer_len: int = 15
    max_seq_len: int | None = None
    handle_impossible_answer: bool = False
    align_to_words: bool = True

    def __post_init__(self) -> None:
        for name, least in (("top_k", 1), ("max_answer_len", 1), ("max_seq_len", 1), ("doc_stride", 0)):
            value = getattr(self, name)
            if value is None and name in ("max_seq_len", "doc_stride"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}; expected an integer of at least {least}")


@dataclass(frozen=True)
class Question:
    """A question, the context that may answer it, and a name for errors."""

    name: str
    question: str
    context: str


def answer(
    model: ArceeForQuestionAnswering,
    tokenizer: Tokenizer,
    question: str,
    context: str,
    *,
    top_k: int = 1,
    doc_stride: int | None = None,
    max_answer_len: int = 15,
    max_seq_len: int | None = None,
    handle_impossible_answer: bool = False,
    align_to_words: bool = True,
    batch_size: int = 32,
) -> list[AnswerSpan]:
    """Finds the answer to a question in a context, as transformers' question-answering pipeline did (up to 4.57).

    The question goes first, so that the context is read with it in mind. A context that is too long is read in windows
    that overlap, each with the question. A span's score is the product of its first token's probability to begin the
    answer and its last one's to end it, among the context's tokens in its window; token spans that widen to the same
    words add up, and a span that several windows see has its best score.

    Args:
        top_k: spans to give at most.
        doc_stride: tokens that two windows share; None for 128, or half a window if that is less.
        max_answer_len: tokens of a span at most.
        max_seq_len: tokens of a window, question included; None for 384, or the model's positions if they are fewer.
        handle_impossible_answer: count "the context does not say" as an answer, scored by the very first token in the
            window that wants it least; models trained without such questions score it at random.
        align_to_words: widen a span to whole words, as the tokenizer splits them first.
        batch_size: windows that go through the model together at most.

    Returns:
        The best spans, the best first; none where the context is empty.

    Raises:
        InputError: the model answers no questions, the question is empty or leaves no room for the context, or a number
            is out of range.

    Source: transformers 4 `pipelines/question_answering.py`; 5.23 has its `select_starts_ends` still.
    """
    options = AnswerOptions(
        top_k=top_k,
        doc_stride=doc_stride,
        max_answer_len=max_answer_len,
        max_seq_len=max_seq_len,
        handle_impossible_answer=handle_impossible_answer,
        align_to_words=align_to_words,
    )
    check_head(model, ArceeForQuestionAnswering)
    asked = [Question("the question", question, context)]
    return answer_questions(model, tokenizer, asked, options, batch_size=batch_size)[0]


def answer_questions(
    model: ArceeForQuestionAnswering,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    options: AnswerOptions,
    *,
    batch_size: int,
) -> list[list[AnswerSpan]]:
    """Answers questions, the windows of all of them together; see `answer`."""
    windows, owners = [], []
    for i, asked in enumerate(questions):
        for window in _cut_windows(tokenizer, model.config, asked, options):
            windows.append(TokenizedText(asked.name, asked.context, window))
            owners.append(i)
    best: list[dict[tuple[int, int], float]] = [{} for _ in questions]
    null = [1.0] * len(questions)
    for batch in make_batches(model.base_model, windows, batch_size):
        parts = []
        for _, h in run_decoder(model.base_model, batch):
            parts.append(np.array(model.qa_outputs(h).astype(mx.float32)))
        logits = np.concatenate(parts, axis=1).astype(np.float64)
        for place, own in zip(batch.places, logits, strict=True):
            owner = owners[place]
            spans, impossible = _read_spans(tokenizer, windows[place].encoding, own, options)
            null[owner] = min(null[owner], impossible)
            for span, score in spans.items():
                best[owner][span] = max(best[owner].get(span, 0.0), score)
        mx.clear_cache()
    return [_rank(*found, options) for found in zip(questions, best, null, strict=True)]


def _cut_windows(
    tokenizer: Tokenizer, config: ArceeConfig, asked: Question, options: AnswerOptions
) -> Iterator[Encoding]:
    """The question with each part of the context that fits beside it."""
    if not asked.question:
        raise InputError(f"{asked.name}: is empty; expected a question; ask one")
    most = context_tokens(config)
    size = min(most, _WINDOW) if options.max_seq_len is None else options.max_seq_len
    if size > most:
        raise InputError(f"max_seq_len is {size}; expected 1 to {most}, the model's positions; choose another")
    stride = min(size // 2, _STRIDE) if options.doc_stride is None else options.doc_stride
    try:
        encoding = tokenizer.encode_with_offsets(asked.question, asked.context)
        check_ids(mx.array(list(encoding.ids), mx.int32), 0, config.vocab_size, "the tokenized text")
    except InputError as error:
        raise InputError(f"{asked.name}: {error}") from None
    own = [i for i, kind in enumerate(encoding.sequence_ids) if kind == 1]
    room = size - (len(encoding.ids) - len(own))
    if len(own) <= room:
        yield encoding
        return
    if room <= stride:
        raise InputError(
            f"{asked.name}: leaves {max(room, 0)} of {size} tokens for the context; expected more than the {stride} that "
            f"windows share (doc_stride); shorten the question, or take a larger max_seq_len"
        )
    for start in range(0, len(own), room - stride):
        yield encoding.pick([*range(own[0]), *own[start : start + room], *range(own[-1] + 1, len(encoding.ids))])
        if start + room >= len(own):
            return


def _read_spans(
    tokenizer: Tokenizer, window: Encoding, logits: NDArray[np.float64], options: AnswerOptions
) -> tuple[dict[tuple[int, int], float], float]:
    """Scores of the likeliest spans, by their place in characters, and the score of no answer.

    Args:
        logits: (at least the window's tokens, 2).
    """
    own = [i for i, kind in enumerate(window.sequence_ids) if kind == 1]
    cls = tokenizer.special_tokens.get("cls_token")
    # The pipeline lets the first token compete wherever it is a cls token, and only there. Decoders have none, and are
    # trained with the first token in its place (transformers' run_qa.py).
    first_competes = options.handle_impossible_answer or (cls is not None and window.ids[0] == tokenizer.token_id(cls))
    places = [0, *own] if first_competes else own
    if not places:
        return {}, 1.0
    starts, ends = softmax(logits[places].T)
    impossible = float(starts[0] * ends[0])
    if first_competes:
        starts, ends = starts[1:], ends[1:]
    lengths = range(min(options.max_answer_len, len(own)))
    scores = np.concatenate([starts[: len(own) - n] * ends[n:] for n in lengths] or [np.zeros(0)])
    spans = [(first, first + n) for n in lengths for first in range(len(own) - n)]
    count = 2 * options.top_k + 10 if options.align_to_words else options.top_k  # some fall together
    ranges = _place_tokens(window, own, options.align_to_words)
    found: dict[tuple[int, int], float] = {}
    for i in np.argsort(-scores, kind="stable")[:count]:
        first, last = spans[i]
        place = ranges[first][0], ranges[last][1]
        found[place] = found.get(place, 0.0) + float(scores[i])
    return found, impossible


def _place_tokens(window: Encoding, own: Sequence[int], align_to_words: bool) -> list[tuple[int, int]]:
    """Where each token's word, or the token itself, begins and ends in the context."""
    offsets = [window.offsets[i] for i in own]
    words = [window.word_ids[i] for i in own]
    if not align_to_words or None in words:
        return offsets
    begins: dict[int | None, int] = {}
    ends: dict[int | None, int] = {}
    for word, (start, end) in zip(words, offsets, strict=True):
        begins.setdefault(word, start)
        ends[word] = end
    return [(begins[word], ends[word]) for word in words]


def _rank(
    asked: Question, spans: dict[tuple[int, int], float], impossible: float, options: AnswerOptions
) -> list[AnswerSpan]:
    answers = [AnswerSpan(asked.context[start:end], score, start, end) for (start, end), score in spans.items()]
    if options.handle_impossible_answer:
        answers.append(AnswerSpan("", impossible, 0, 0))
    return sorted(answers, key=lambda span: -span.score)[: options.top_k]

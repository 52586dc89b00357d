"""`arcee-mlx answer`: the answer to a question in each line, as JSON lines."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ..errors import InputError
from ..generate.arguments import add_model_arguments
from ..model.heads import ArceeForQuestionAnswering
from .answer import AnswerOptions, Question, answer_questions
from .lines import Line, answer_lines, check_files, read_field
from .lines import add_arguments as add_line_arguments
from .opening import open_classifier


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options to a parser; `run` takes what it parses. The texts are the contexts."""
    add_line_arguments(parser, batch_size=32, cuts=False)
    question = parser.add_argument_group("question")
    question.add_argument("--question", metavar="TEXT", help="to ask of every text")
    question.add_argument("--question-field", metavar="NAME", help="each line's own question, beside its --field")
    parser.add_argument(
        "--top-k", type=int, default=1, metavar="N", help="answers to give, the best first (%(default)s)"
    )
    parser.add_argument(
        "--max-answer-len", type=int, default=15, metavar="N", help="tokens of an answer at most (%(default)s)"
    )
    parser.add_argument(
        "--max-seq-len",
        type=int,
        metavar="N",
        help="tokens of a window, question included (384, if the model has them)",
    )
    parser.add_argument(
        "--doc-stride", type=int, metavar="N", help="tokens that two windows of a long text share (128, half at most)"
    )
    parser.add_argument(
        "--handle-impossible-answer",
        action="store_true",
        help='count "the text does not say" as an answer, an empty one',
    )
    parser.add_argument(
        "--no-align-to-words", action="store_true", help="let answers begin and end inside words, at tokens"
    )
    add_model_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Answers and prints; returns the exit status.

    Raises:
        ArceeError: a line or an option is not what it should be, or the checkpoint cannot be used.
    """
    check_files(args)
    options = AnswerOptions(
        top_k=args.top_k,
        doc_stride=args.doc_stride,
        max_answer_len=args.max_answer_len,
        max_seq_len=args.max_seq_len,
        handle_impossible_answer=args.handle_impossible_answer,
        align_to_words=not args.no_align_to_words,
    )
    if (args.question is None) == (args.question_field is None):
        raise InputError("expected either --question, for all texts, or --question-field, for each its own; give one")
    if args.question_field is not None and args.field is None:
        raise InputError(
            "--question-field without --field; expected both, of lines that are JSON objects; name the texts'"
        )
    model, tokenizer = open_classifier(args, ArceeForQuestionAnswering)

    def answer(lines: Sequence[Line]) -> Iterator[dict[str, Any]]:
        asked = [Question(line.name, _read_question(args, line), line.text) for line in lines]
        for spans in answer_questions(model, tokenizer, asked, options, batch_size=args.batch_size):
            yield {"answers": [asdict(span) for span in spans]}

    return answer_lines(args, answer)


def _read_question(args: argparse.Namespace, line: Line) -> str:
    return args.question if args.question is not None else read_field(line, args.question_field)

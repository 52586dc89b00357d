"""Text in, plain results out: what a model makes of whole texts, many at a time."""

from .answer import AnswerSpan, answer
from .classify import Classification, LabelScore, ScoreFunction, classify
from .embed import Pooling, embed
from .score import TextScore, TokenScore, score
from .tag import Aggregation, Entity, tag

__all__ = [
    "Aggregation",
    "AnswerSpan",
    "Classification",
    "Entity",
    "LabelScore",
    "Pooling",
    "ScoreFunction",
    "TextScore",
    "TokenScore",
    "answer",
    "classify",
    "embed",
    "score",
    "tag",
]

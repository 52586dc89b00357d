"""classify: which labels a text has, from the scores of its last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.tokenizer import Tokenizer
from ..errors import InputError
from ..model.config import ArceeConfig
from ..model.heads import ArceeForSequenceClassification
from .batches import TokenizedText, make_batches, states_at, tokenize

ScoreFunction = Literal["softmax", "sigmoid", "none"]


@dataclass(frozen=True)
class LabelScore:
    """A label and how well it fits."""

    label: str
    score: float


@dataclass(frozen=True)
class Classification:
    """What a text is; from `classify`.

    Attributes:
        label, score: the best label and its score.
        scores: of all labels, or of the best ones that were asked for, the best first.
    """

    label: str
    score: float
    scores: Sequence[LabelScore]


def classify(
    model: ArceeForSequenceClassification,
    tokenizer: Tokenizer,
    texts: Sequence[str | tuple[str, str]],
    *,
    top_k: int | None = None,
    function_to_apply: ScoreFunction | None = None,
    batch_size: int = 32,
    max_length: int | None = None,
    truncate: bool = False,
) -> list[Classification]:
    """Finds the labels of texts, as transformers' text-classification pipeline does.

    A text is judged at its last token that is not the config's `pad_token_id`, the model's own rule, so that it gives
    what `model.forward` gives for it alone, within 1e-5 a logit however many go together (measured in float32 on small
    models, MLX's CPU backend). No pad token is needed for several texts.

    Args:
        texts: each as it is, with what the tokenizer puts around it; or pairs of texts, put together by the tokenizer.
        top_k: how many labels to give; None for all.
        function_to_apply: what makes scores of logits; None for the config's problem type: "none" for regression,
            "sigmoid" for several labels at once and for a single label, "softmax" for one of several.
        batch_size: texts that go through the model together at most.
        max_length: tokens of a text at most, with what is put around it; None for the model's positions.
        truncate: cut longer texts at their end, of a pair the longer one first, instead of refusing them.

    Returns:
        One classification a text, in their order.

    Raises:
        InputError: the model classifies no sequences, an argument is out of range, or a text is too long or has no
            tokens; names it.

    Source: transformers 5.23 `pipelines/text_classification.py`.
    """
    check_head(model, ArceeForSequenceClassification)
    check_options(top_k, function_to_apply)
    rows = tokenize(tokenizer, model.config, texts, max_length=max_length, truncate=truncate)
    return classify_rows(model, rows, top_k=top_k, function_to_apply=function_to_apply, batch_size=batch_size)


def check_head(model: object, expected: type[Any]) -> None:
    """Raises InputError for a model with another head."""
    if not isinstance(model, expected):
        raise InputError(
            f"model is of type {type(model).__name__}; expected {expected.__name__}; load a checkpoint that was trained "
            f"as one"
        )


def check_options(top_k: int | None, function_to_apply: str | None) -> None:
    """Raises InputError for what `classify` does not take."""
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise InputError(f"top_k is {top_k!r}; expected an integer of at least 1, or None for all labels")
    if function_to_apply is not None and function_to_apply not in get_args(ScoreFunction):
        raise InputError(
            f"function_to_apply is {function_to_apply!r}; expected one of {', '.join(get_args(ScoreFunction))}, or None"
        )


def classify_rows(
    model: ArceeForSequenceClassification,
    rows: Sequence[TokenizedText],
    *,
    top_k: int | None,
    function_to_apply: ScoreFunction | None,
    batch_size: int,
) -> list[Classification]:
    """Classifies texts that are tokens already; see `classify`."""
    if empty := [row.name for row in rows if not row.encoding.ids]:
        raise InputError(f"{empty[0]}: has no tokens; expected at least one to classify; leave it out")
    names = name_labels(model.config)
    function = function_to_apply or _choose_function(model.config)
    logits = np.empty((len(rows), len(names)))
    for batch in make_batches(model.base_model, rows, batch_size):
        last = [_find_last(rows[i].encoding.ids, model.config.pad_token_id) for i in batch.places]
        logits[batch.places] = np.array(model.score(states_at(model.base_model, batch, last)).astype(mx.float32))
        mx.clear_cache()
    return [_rank(scores, names, top_k) for scores in _apply(function, logits)]


def name_labels(config: ArceeConfig) -> list[str]:
    """Names of a head's outputs, in their order; LABEL_0 and so on where the config has none."""
    return [(config.id2label or {}).get(i, f"LABEL_{i}") for i in range(config.num_labels)]


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _find_last(ids: Sequence[int], pad: int | None) -> int:
    """Place of the last token that is no pad token; 0 where all are."""
    return max((i for i, token in enumerate(ids) if token != pad), default=0)


def _choose_function(config: ArceeConfig) -> ScoreFunction:
    if config.problem_type == "regression":
        return "none"
    several_at_once = config.problem_type == "multi_label_classification" or config.num_labels == 1
    return "sigmoid" if several_at_once else "softmax"


def _apply(function: ScoreFunction, logits: NDArray[np.float64]) -> NDArray[np.float64]:
    if function == "softmax":
        return softmax(logits)
    return logits if function == "none" else (1 + np.tanh(logits / 2)) / 2  # the sigmoid, without an overflow


def _rank(scores: NDArray[np.float64], names: Sequence[str], top_k: int | None) -> Classification:
    order = np.argsort(-scores, kind="stable")[:top_k]
    ranked = [LabelScore(names[i], float(scores[i])) for i in order]
    return Classification(ranked[0].label, ranked[0].score, ranked)

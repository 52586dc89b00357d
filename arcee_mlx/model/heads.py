"""Arcee's decoder under other heads: sequence classification, token classification, question answering.

Attribute names are the checkpoint's keys; question answering keeps its decoder under `transformer`, as transformers does.

Source: transformers 5.23 `modeling_layers.py` (GenericForSequenceClassification and its siblings), `models/arcee`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn

from ..errors import ConfigError, InputError
from .config import ArceeConfig
from .decoder import ArceeModel, DecoderLayer
from .losses import PROBLEM_TYPES, cross_entropy, question_answering_loss, sequence_classification_loss
from .training import DEFAULT_STD, Trainable

_DEFAULT_DROPOUT = 0.1


@dataclass(frozen=True, kw_only=True)
class _HeadOutput:
    """What all heads give: a float32 scalar loss or None, and the decoder's; see `BaseModelOutput`."""

    loss: mx.array | None = None
    hidden_states: tuple[mx.array | None, ...] | None = None
    attentions: tuple[mx.array, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class SequenceClassifierOutput(_HeadOutput):
    """What `ArceeForSequenceClassification.forward` gives: logits (B, num_labels), and the cache that was filled."""

    logits: mx.array
    past_key_values: list[Any] | None = None


@dataclass(frozen=True, kw_only=True)
class TokenClassifierOutput(_HeadOutput):
    """What `ArceeForTokenClassification.forward` gives: logits (B, L, num_labels)."""

    logits: mx.array


@dataclass(frozen=True, kw_only=True)
class QuestionAnsweringModelOutput(_HeadOutput):
    """What `ArceeForQuestionAnswering.forward` gives: scores (B, L) of each token as the first and the last of the answer."""

    start_logits: mx.array
    end_logits: mx.array


class _DecoderWithHead(Trainable):
    """What the three have in common; `base_model_prefix` names the attribute that holds the decoder."""

    base_model_prefix = "model"

    def __init__(self, config: ArceeConfig) -> None:
        super().__init__()
        self.config = config
        setattr(self, self.base_model_prefix, ArceeModel(config))

    @property
    def base_model(self) -> ArceeModel:
        """The decoder."""
        return self[self.base_model_prefix]

    @property
    def layers(self) -> list[DecoderLayer]:
        """The decoder layers, where mlx-lm looks for them."""
        return self.base_model.layers

    def make_cache(self, max_kv_size: int | None = None) -> list[Any]:
        """See `ArceeModel.make_cache`."""
        return self.base_model.make_cache(max_kv_size)

    def __call__(self, *_: object, **__: object) -> NoReturn:
        """Refuses: a call is mlx-lm's convention for the next token's logits, which this model does not have."""
        raise InputError(
            f"{type(self).__name__} generates no text; expected ArceeForCausalLM; compute its logits with "
            f"model.forward(...), or load a causal checkpoint"
        )


class ArceeForSequenceClassification(_DecoderWithHead):
    """One set of scores for a whole sequence, taken at its last token: classes, several labels at once, or numbers."""

    def __init__(self, config: ArceeConfig) -> None:
        super().__init__(config)
        self.score = _new_linear(config, _count_labels(config), bias=False)

    def forward(
        self,
        input_ids: mx.array | None = None,
        *,
        attention_mask: mx.array | None = None,
        position_ids: mx.array | None = None,
        inputs_embeds: mx.array | None = None,
        cache: list[Any] | None = None,
        use_cache: bool | None = None,
        labels: mx.array | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
    ) -> SequenceClassifierOutput:
        """Computes what transformers' ArceeForSequenceClassification.forward computes.

        The scores are those of the rightmost token that is not `pad_token_id`, whatever the attention mask says; the
        first token's where all are; the last one's where there is no pad token, or embeddings are given.

        Args:
            labels: for `sequence_classification_loss`, with the config's problem_type.
            others: see `ArceeModel.forward`.

        Raises:
            InputError: several rows without a pad token, or an argument does not fit the model or another argument.
        """
        base = self.model.forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        h, pad = base.last_hidden_state, self.config.pad_token_id
        if pad is None and h.shape[0] != 1:
            raise InputError(
                f"{h.shape[0]} rows, and no pad_token_id to find the last token of each by; expected 1 row; set "
                f"pad_token_id in the config"
            )
        if pad is None or input_ids is None:
            pooled = h[:, -1]
        else:
            ids = mx.array(input_ids)
            last = mx.where(ids != pad, mx.arange(ids.shape[1]), 0).max(axis=1)
            pooled = mx.take_along_axis(h, last[:, None, None], axis=1)[:, 0]
        logits = self.score(pooled)
        loss = None
        if labels is not None:
            loss = sequence_classification_loss(logits, labels, problem_type=self.config.problem_type)
        return SequenceClassifierOutput(
            loss=loss,
            logits=logits,
            past_key_values=base.past_key_values,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )


class ArceeForTokenClassification(_DecoderWithHead):
    """A set of scores for every token."""

    def __init__(self, config: ArceeConfig) -> None:
        super().__init__(config)
        self.dropout = nn.Dropout(_choose_dropout(config))
        self.score = _new_linear(config, _count_labels(config), bias=config.token_classification_bias)

    def forward(
        self,
        input_ids: mx.array | None = None,
        *,
        attention_mask: mx.array | None = None,
        position_ids: mx.array | None = None,
        inputs_embeds: mx.array | None = None,
        cache: list[Any] | None = None,
        use_cache: bool | None = None,
        labels: mx.array | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
    ) -> TokenClassifierOutput:
        """Computes what transformers' ArceeForTokenClassification.forward computes.

        Args:
            labels: int (B, L), of the tokens where they are, not shifted; -100 does not count.
            others: see `ArceeModel.forward`.

        Raises:
            InputError: an argument does not fit the model or another argument.
        """
        base = self.model.forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        logits = self.score(self.dropout(base.last_hidden_state))
        loss = None
        if labels is not None:
            loss = cross_entropy(logits.reshape(-1, logits.shape[-1]), mx.array(labels).reshape(-1))
        return TokenClassifierOutput(
            loss=loss, logits=logits, hidden_states=base.hidden_states, attentions=base.attentions
        )


class ArceeForQuestionAnswering(_DecoderWithHead):
    """Where in a text the answer begins and ends."""

    base_model_prefix = "transformer"

    def __init__(self, config: ArceeConfig) -> None:
        super().__init__(config)
        self.qa_outputs = _new_linear(config, 2, bias=True)

    def forward(
        self,
        input_ids: mx.array | None = None,
        *,
        attention_mask: mx.array | None = None,
        position_ids: mx.array | None = None,
        inputs_embeds: mx.array | None = None,
        cache: list[Any] | None = None,
        use_cache: bool | None = None,
        start_positions: mx.array | None = None,
        end_positions: mx.array | None = None,
        num_items_in_batch: int | mx.array | None = None,
        output_hidden_states: bool | int | Sequence[int] | None = None,
        output_attentions: bool | None = None,
    ) -> QuestionAnsweringModelOutput:
        """Computes what transformers' ArceeForQuestionAnswering.forward computes.

        Args:
            start_positions, end_positions: for `question_answering_loss`; only both together give a loss.
            num_items_in_batch: the two losses are sums over it instead of means.
            others: see `ArceeModel.forward`.

        Raises:
            InputError: an argument does not fit the model or another argument.
        """
        base = self.transformer.forward(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        logits = self.qa_outputs(base.last_hidden_state)
        start_logits, end_logits = logits[..., 0], logits[..., 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            loss = question_answering_loss(
                start_logits, end_logits, start_positions, end_positions, num_items_in_batch=num_items_in_batch
            )
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=base.hidden_states,
            attentions=base.attentions,
        )


def set_labels(
    config: ArceeConfig,
    *,
    num_labels: int | None = None,
    id2label: Mapping[int, str] | None = None,
    problem_type: str | None = None,
) -> ArceeConfig:
    """A config for a head of other labels; what is None stays as it is.

    Args:
        num_labels: number of labels, named LABEL_0 and so on unless the config has names for as many.
        id2label: their names, from 0 on.
        problem_type: "regression", "single_label_classification" or "multi_label_classification".

    Raises:
        InputError: a value is out of range, or they do not fit together.
        ConfigError: one label of a single-label problem.
    """
    if num_labels is not None and (type(num_labels) is not int or num_labels < 1):
        raise InputError(f"num_labels is {num_labels!r}; expected an integer of at least 1; give the number of labels")
    if problem_type is not None and problem_type not in PROBLEM_TYPES:
        raise InputError(f"problem_type is {problem_type!r}; expected one of {', '.join(PROBLEM_TYPES)}; choose one")
    if id2label is not None:
        names = dict(id2label)
        if not names or sorted(names) != list(range(len(names))):
            raise InputError(f"id2label has the keys {sorted(names)}; expected 0, 1, ... without a gap; renumber them")
        if num_labels not in (None, len(names)):
            raise InputError(f"id2label names {len(names)} labels for num_labels {num_labels}; give one of the two")
        config = replace(config, id2label=names, label2id={name: i for i, name in names.items()})
    elif num_labels not in (None, config.num_labels):
        config = set_labels(config, id2label={i: f"LABEL_{i}" for i in range(num_labels or 0)})
    return config if problem_type is None else replace(config, problem_type=problem_type)


def _new_linear(config: ArceeConfig, outputs: int, *, bias: bool) -> nn.Linear:
    """A head as transformers begins one: normal weights of its own key, no bias."""
    linear = nn.Linear(config.hidden_size, outputs, bias=bias)
    std = config.initializer_range or DEFAULT_STD
    linear.weight = std * mx.random.normal(linear.weight.shape, key=mx.random.key(0))
    if bias:
        linear.bias = mx.zeros((outputs,))
    return linear


def _count_labels(config: ArceeConfig) -> int:
    if config.num_labels < 1:
        raise ConfigError(f"{config.source}: id2label is {config.id2label}; expected at least one label; name them")
    return config.num_labels


def _choose_dropout(config: ArceeConfig) -> float:
    for name in ("classifier_dropout", "hidden_dropout"):
        if (value := getattr(config, name)) is not None:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
                raise ConfigError(
                    f"{config.source}: {name} is {value!r}; expected a number from 0 up to, but not with, 1; correct it"
                )
            return value
    return _DEFAULT_DROPOUT

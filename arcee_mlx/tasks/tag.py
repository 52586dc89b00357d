"""tag: the labelled pieces of a text, from the scores of its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from ..checkpoint.tokenizer import Tokenizer
from ..errors import InputError
from ..model.heads import ArceeForTokenClassification
from .batches import TokenizedText, make_batches, run_decoder, tokenize
from .classify import check_head, name_labels, softmax

Aggregation = Literal["none", "simple", "first", "average", "max"]


@dataclass(frozen=True)
class Entity:
    """A labelled piece of a text; from `tag`.

    Attributes:
        label: of the token, or of the group, without its B- or I-.
        score: its probability; the mean of a group's.
        start, end: place in the text, in characters: `text[start:end]` is what was found.
        word: what the tokens stand for, with the space in front that they may hold; without aggregation the token as
            the vocabulary has it.
    """

    label: str
    score: float
    start: int
    end: int
    word: str


@dataclass(frozen=True)
class _Piece:
    """A token, a word, or a group of them, on its way to an entity.

    Attributes:
        probabilities: of all labels, float64 (labels,).
        tokens: in the vocabulary's form, an unknown one as it is in the text.
    """

    probabilities: NDArray[np.float64]
    start: int
    end: int
    tokens: Sequence[str]
    is_subword: bool


def tag(
    model: ArceeForTokenClassification,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    aggregation: Aggregation = "none",
    *,
    ignore_labels: Sequence[str] = ("O",),
    batch_size: int = 32,
    max_length: int | None = None,
    truncate: bool = False,
) -> list[list[Entity]]:
    """Finds labelled pieces of texts, as transformers' token-classification pipeline does.

    Aggregation, as there: "none" gives every token; "simple" joins neighbours of one label, where a B- begins anew;
    "first", "average" and "max" give a word the label of its first token, of its tokens' mean probabilities, or of its
    surest token, before they join. Words are the tokenizer's where its tokens mark them, else what spaces part.

    What the tokenizer puts around a text is read and never tagged. Scores are those of one text at a time within 1e-5,
    however many go together (measured in float32 on small models, MLX's CPU backend).

    Args:
        texts: each as it is.
        aggregation: how tokens become entities.
        ignore_labels: of what is left out.
        batch_size: texts that go through the model together at most.
        max_length: tokens of a text at most, with what is put around it; None for the model's positions.
        truncate: cut longer texts at their end, instead of refusing them.

    Returns:
        The entities of each text, in order; of an empty text none. `word` is decoded from the tokens of the whole group
        at once, where the pipeline decodes decoded words again and garbles those that are not ASCII.

    Raises:
        InputError: the model classifies no tokens, an argument is out of range, or a text is too long; names it.

    Source: transformers 5.23 `pipelines/token_classification.py`.
    """
    check_head(model, ArceeForTokenClassification)
    if aggregation not in get_args(Aggregation):
        raise InputError(f"aggregation is {aggregation!r}; expected one of {', '.join(get_args(Aggregation))}")
    if isinstance(ignore_labels, str):
        raise InputError(f"ignore_labels is the single text {ignore_labels!r}; expected labels; put it into a list")
    rows = tokenize(tokenizer, model.config, texts, max_length=max_length, truncate=truncate)
    return tag_rows(model, tokenizer, rows, aggregation=aggregation, ignore_labels=ignore_labels, batch_size=batch_size)


def tag_rows(
    model: ArceeForTokenClassification,
    tokenizer: Tokenizer,
    rows: Sequence[TokenizedText],
    *,
    aggregation: Aggregation,
    ignore_labels: Sequence[str],
    batch_size: int,
) -> list[list[Entity]]:
    """Tags texts that are tokens already; see `tag`."""
    names = name_labels(model.config)
    found: list[list[Entity]] = [[] for _ in rows]
    for batch in make_batches(model.base_model, rows, batch_size):
        parts = []
        for _, h in run_decoder(model.base_model, batch):
            parts.append(np.array(model.score(h).astype(mx.float32)))
        probabilities = softmax(np.concatenate(parts, axis=1).astype(np.float64))
        for place, own in zip(batch.places, probabilities, strict=True):
            pieces = _read_pieces(tokenizer, rows[place], own)
            entities = _aggregate(tokenizer, pieces, names, aggregation)
            found[place] = [entity for entity in entities if entity.label not in ignore_labels]
        mx.clear_cache()
    return found


def _read_pieces(tokenizer: Tokenizer, row: TokenizedText, probabilities: NDArray[np.float64]) -> list[_Piece]:
    """A piece of every token of the text proper."""
    encoding, text, pieces = row.encoding, row.text, []
    tokens = tokenizer.convert_ids_to_tokens(encoding.ids)
    for i, (token, (start, end)) in enumerate(zip(tokens, encoding.offsets, strict=True)):
        if encoding.special_tokens_mask[i]:
            continue
        if tokenizer.continuing_subword_prefix:
            is_subword = len(token) != end - start
        else:
            is_subword = start > 0 and " " not in text[start - 1 : start + 1]
        if encoding.ids[i] == tokenizer.unk_token_id:
            token, is_subword = text[start:end], False
        pieces.append(_Piece(probabilities[i], start, end, [token], is_subword))
    return pieces


def _aggregate(
    tokenizer: Tokenizer, pieces: Sequence[_Piece], names: Sequence[str], aggregation: Aggregation
) -> Iterable[Entity]:
    if aggregation == "none":
        for piece in pieces:
            best = int(piece.probabilities.argmax())
            yield Entity(names[best], float(piece.probabilities[best]), piece.start, piece.end, piece.tokens[0])
        return
    if aggregation != "simple":
        pieces = [_join_word(word, aggregation) for word in _split_words(pieces)]
    for group in _split_groups(pieces, names):
        label = names[int(group[0].probabilities.argmax())].split("-", 1)[-1]
        score = float(np.mean([piece.probabilities.max() for piece in group]))
        word = tokenizer.convert_tokens_to_string([token for piece in group for token in piece.tokens])
        yield Entity(label, score, group[0].start, group[-1].end, word)


def _split_words(pieces: Iterable[_Piece]) -> list[list[_Piece]]:
    words: list[list[_Piece]] = []
    for piece in pieces:
        if words and piece.is_subword:
            words[-1].append(piece)
        else:
            words.append([piece])
    return words


def _join_word(word: Sequence[_Piece], aggregation: Aggregation) -> _Piece:
    if aggregation == "average":
        probabilities = np.mean([piece.probabilities for piece in word], axis=0)
    else:
        deciding = word[0] if aggregation == "first" else max(word, key=lambda piece: piece.probabilities.max())
        probabilities = deciding.probabilities
    tokens = [token for piece in word for token in piece.tokens]
    return _Piece(probabilities, word[0].start, word[-1].end, tokens, False)


def _split_groups(pieces: Iterable[_Piece], names: Sequence[str]) -> list[list[_Piece]]:
    """Neighbours of one label; one with a B- begins a group, one without either prefix goes on with it."""
    groups: list[list[_Piece]] = []
    last = None
    for piece in pieces:
        name = names[int(piece.probabilities.argmax())]
        label = name[2:] if name.startswith(("B-", "I-")) else name
        if label == last and not name.startswith("B-"):
            groups[-1].append(piece)
        else:
            groups.append([piece])
        last = label
    return groups

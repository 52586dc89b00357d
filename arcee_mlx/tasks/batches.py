"""Texts become tokens, and tokens batches of texts that are about equally long, whose hidden states come in bounded memory.

Rows are padded on the right: with causal attention no token sees what comes after it, so padding changes nothing. Where the
rotation depends on the length of the text (`dynamic` and `longrope`), only rows that share its table go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import mlx.core as mx

from ..checkpoint.tokenizer import Encoding, Tokenizer
from ..errors import InputError
from ..generate.options import context_tokens
from ..model.config import ArceeConfig
from ..model.decoder import ArceeModel
from ..model.inputs import check_ids

_TOKENS_TOGETHER = 4096  # of a pass through the model, padding included


@dataclass(frozen=True)
class TokenizedText:
    """A text, of a pair the first, its name for errors, and the tokens of all of it; from `tokenize`."""

    name: str
    text: str
    encoding: Encoding


@dataclass(frozen=True)
class Batch:
    """Rows that go through the model together.

    Attributes:
        places: which of all rows these are.
        ids: int32 (B, L), padded on the right with zeros.
        lengths: tokens of each row.
    """

    places: list[int]
    ids: mx.array
    lengths: list[int]


def tokenize(
    tokenizer: Tokenizer,
    config: ArceeConfig,
    texts: Sequence[str | tuple[str, str]],
    *,
    names: Sequence[str] | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    add_eos: bool = False,
) -> list[TokenizedText]:
    """Turns texts into tokens that the model can read at once, with what the tokenizer puts around them.

    Args:
        tokenizer, config: of the model.
        texts: any Unicode texts, or pairs of them, which the tokenizer puts together.
        names: of the texts, for errors; None counts them from 0.
        max_length: tokens of a text at most; None for the model's positions.
        truncate: cut longer texts at their end, of a pair the longer one first, instead of refusing them; what was put
            around them stays.
        add_eos: end every text with the tokenizer's end-of-text token, unless it has already.

    Raises:
        InputError: `texts` is a single text, one of them is too long, no str and no pair, max_length is out of range, the tokenizer
            has no end-of-text token where one is needed, or it is another model's.
    """
    if isinstance(texts, str):
        raise InputError("texts is a single text; expected a list of texts; put it into one")
    most = context_tokens(config)
    if max_length is not None and (isinstance(max_length, bool) or not 1 <= max_length <= most):
        raise InputError(f"max_length is {max_length}; expected 1 to {most}, the model's positions; choose another")
    if add_eos and tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no eos_token; expected one to end texts with; take another pooling")
    rows = []
    for i, given in enumerate(texts):
        name = f"text {i}" if names is None else names[i]
        if isinstance(given, tuple) and len(given) != 2:
            raise InputError(f"{name}: is a tuple of {len(given)}; expected a text, or a pair of texts")
        text, pair = given if isinstance(given, tuple) else (given, None)
        try:
            encoding = tokenizer.encode_with_offsets(text, pair)
            if add_eos:
                encoding = _end(encoding, tokenizer.eos_token_id or 0, len(text))
            encoding = _fit(encoding, most if max_length is None else max_length, truncate)
            check_ids(mx.array(list(encoding.ids), mx.int32), 0, config.vocab_size, "the tokenized text")
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        rows.append(TokenizedText(name, text, encoding))
    return rows


def make_batches(decoder: ArceeModel, rows: Sequence[TokenizedText], batch_size: int) -> Iterator[Batch]:
    """Puts rows together, the longest first, so that a batch that is too large for the memory comes at once.

    Args:
        decoder: that the rows are for.
        rows: those without tokens are left out.
        batch_size: rows of a batch at most; fewer where they are long.

    Raises:
        InputError: batch_size is less than 1.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"batch_size is {batch_size!r}; expected an integer of at least 1")
    lengths = [len(row.encoding.ids) for row in rows]
    places = sorted((i for i, length in enumerate(lengths) if length), key=lambda i: -lengths[i])
    while places:
        longest = lengths[places[0]]
        count = 1
        while (
            count < min(batch_size, len(places), _TOKENS_TOGETHER // longest)
            and decoder.rotary_emb.shares_table(lengths[places[count]], longest)
        ):  # fmt: skip
            count += 1
        chosen, places = places[:count], places[count:]
        padded = [[*rows[i].encoding.ids, *[0] * (longest - lengths[i])] for i in chosen]
        yield Batch(chosen, mx.array(padded, mx.int32), [lengths[i] for i in chosen])


def run_decoder(decoder: ArceeModel, batch: Batch) -> Iterator[tuple[int, mx.array]]:
    """Gives hidden states after the final norm, (B, l, E) with the place of their first token, in order.

    A text of more tokens than are run together is read in parts over a KV cache, unless the rotation of its first part
    depends on the whole.
    """
    length = batch.ids.shape[1]
    step = _TOKENS_TOGETHER
    if length <= step or not decoder.rotary_emb.shares_table(1, length):
        yield 0, decoder(batch.ids)
        return
    cache = decoder.make_cache()
    for start in range(0, length, step):
        yield start, decoder(batch.ids[:, start : start + step], cache)


def states_at(decoder: ArceeModel, batch: Batch, places: Sequence[int]) -> mx.array:
    """Gives one hidden state of each row, (B, E): that of the token at its place."""
    at = mx.array(list(places))[:, None, None]
    found = None
    for start, h in run_decoder(decoder, batch):
        picked = mx.take_along_axis(h, mx.clip(at - start, 0, h.shape[1] - 1), axis=1)[:, 0]
        found = picked if found is None else mx.where(at[:, 0] < start, found, picked)
        mx.eval(found)
    assert found is not None, "a batch has tokens"
    return found


def _end(encoding: Encoding, eos: int, place: int) -> Encoding:
    if encoding.ids and encoding.ids[-1] == eos:
        return encoding
    end = Encoding([eos], [(place, place)], [1], [None], [None])
    return Encoding(*([*getattr(encoding, f.name), *getattr(end, f.name)] for f in fields(Encoding)))


def _fit(encoding: Encoding, most: int, truncate: bool) -> Encoding:
    """Leaves out tokens from the end of the text proper, of a pair from the longer one first, if there are too many."""
    excess = len(encoding.ids) - most
    if excess <= 0:
        return encoding
    own = [[i for i, kind in enumerate(encoding.sequence_ids) if kind == which] for which in (0, 1)]
    room = sum(map(len, own)) - excess
    if not truncate or room < 0:
        raise InputError(
            f"has {len(encoding.ids)} tokens; expected at most {most}; shorten it, or let it be cut (truncate=True, "
            f"--truncate)"
        )
    first, second = map(len, own)
    if second <= room // 2:
        first = room - second
    elif first > room // 2:  # both: transformers gives an odd token to the longer
        first = room // 2 if first <= second else (room + 1) // 2
    gone = {*own[0][first:], *own[1][room - first :]}
    return encoding.pick(i for i in range(len(encoding.ids)) if i not in gone)

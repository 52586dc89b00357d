"""Speculative decoding: tokens are drafted cheaply and verified several at once; the answer stays the same.

The model is given the last token and the drafts behind it in one pass. From every row of logits a token is drawn as
without drafts: the same processors, called in the same order with the same tokens, the same sampler with the same key. A
draft is accepted if it is that token; the first that is not ends the pass, and what the KV cache holds beyond is taken
back. So a draft has no say in the answer, greedy or sampled, and a seed gives the tokens that it gives without drafts.
At most 8 tokens are verified at once, so that the sparse path serves. What an answer's grammar leaves no choice about,
a schema's property names and the like, is drafted unasked.

What may differ is the order of float sums in a pass over several tokens. Where two tokens are closer than that noise,
one may take the other's place, and the answer goes on from it. Measured on the demo model in float32, over passes of 8
tokens: 2e-5 of the logits' standard deviation with the BLAS of MLX's Linux wheel, 8e-5 with OpenBLAS, and 1.2e-2 where
kv_bits=8 rounds keys and values. Half precision rounds more coarsely; on Metal it was not measured.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any, Protocol

import mlx.core as mx

from ..checkpoint.tokenizer import Tokenizer
from ..errors import InputError
from ..model.decoder import ArceeForCausalLM
from .grammar import GrammarProcessor
from .options import MAX_DRAFT_TOKENS, GenerateOptions, context_tokens
from .prefill import fill_cache
from .prompt_cache import PromptCache
from .request import Request
from .row import Row
from .sampling import LogitsProcessor, make_logits_processors

DEFAULT_NGRAM_SIZE = 3


class Drafter(Protocol):
    """Guesses what comes next."""

    def propose(self, ids: list[int], n: int) -> list[int]:
        """At most n ids, each one of the model's, that may follow.

        Args:
            ids: prompt and answer so far; they begin with those of the call before.
            n: at least 1.
        """
        ...


class NgramDrafter:
    """What followed when the last few tokens stood there before: the longest match, and of those the latest.

    Source: transformers' prompt lookup (behaviour, not code), which takes the earliest.
    """

    def __init__(self, max_matching_ngram_size: int = DEFAULT_NGRAM_SIZE) -> None:
        """Args: max_matching_ngram_size: tokens that are matched at most; at least 1."""
        self._sizes = range(max_matching_ngram_size, 0, -1)
        self._follows: dict[tuple[int, ...], int] = {}  # n-gram -> place of the token after its latest occurrence
        self._end = 1

    def propose(self, ids: list[int], n: int) -> list[int]:
        """See `Drafter`."""
        for end in range(self._end, len(ids)):
            self._follows.update((tuple(ids[end - size : end]), end) for size in self._sizes if size <= end)
        self._end = max(self._end, len(ids))
        for size in self._sizes:
            place = self._follows.get(tuple(ids[-size:])) if size <= len(ids) else None
            if place is not None:  # a match that overlaps the end is a loop, and goes round
                return list(islice(cycle(ids[place : place + n]), n))
        return []


class GrammarDrafter:
    """What a grammar alone determines to come next; where it determines nothing, what another drafter guesses."""

    def __init__(self, grammar: GrammarProcessor, other: Drafter | None, *, prompt_tokens: int) -> None:
        """Args:
        grammar: the other may go on with it from the ids, for its drafts; they are taken back here.
        other: None guesses nothing.
        """
        self._grammar, self._other, self._prompt_tokens = grammar, other, prompt_tokens

    def propose(self, ids: list[int], n: int) -> list[int]:
        """See `Drafter`. Which tokens write it is still the model's to say: a draft is verified like any other."""
        self._grammar.move_to(ids[self._prompt_tokens :])
        if forced := self._grammar.forced_tokens():
            return forced[:n]
        return self._other.propose(ids, n) if self._other else []


class ModelDrafter:
    """What a smaller model of the same vocabulary would write in the model's place, with the same luck.

    Drafts are drawn as the tokens themselves will be, and with the same random numbers: the closer the two models'
    probabilities, the more drafts come true, at any temperature. Source: Daliri et al., arXiv 2408.07978.
    """

    def __init__(
        self, model: ArceeForCausalLM, row: Row, processors: Sequence[LogitsProcessor], prefill_step_size: int
    ) -> None:
        """Args:
        row: whose tokens are drafted.
        processors: of the logits; the caller's own are not among them, since they may remember their calls.
        prefill_step_size: prompt tokens computed at a time.
        """
        self._model, self._row, self._processors, self._step_tokens = model, row, processors, prefill_step_size
        self._cache = model.make_cache()
        self._held: list[int] = []  # tokens in the cache: those of the last call's ids, then drafts
        self._sure = 0  # of them, the ids

    def propose(self, ids: list[int], n: int) -> list[int]:
        """See `Drafter`. Nothing is drafted beyond this model's own positions."""
        if len(ids) + n > context_tokens(self._model.config):
            return []
        kept = self._sure
        while kept < min(len(self._held), len(ids) - 1) and self._held[kept] == ids[kept]:
            kept += 1
        for layer in self._cache:
            layer.trim(len(self._held) - kept)
        start = max(kept, len(ids) - 2)  # where all drafts came true the last is not in the cache yet
        fill_cache(self._model, self._cache, ids[kept:start], self._step_tokens)
        tokens, sample = mx.array(ids), self._row.copy_sampler()
        new = tokens[start:]
        for _ in range(n):
            logits = self._model(new[None], self._cache)[:, -1]
            for process in self._processors:
                logits = process(tokens, logits)
            new = sample(logits - mx.logsumexp(logits, keepdims=True)).astype(tokens.dtype)
            mx.async_eval(new)
            tokens = mx.concatenate([tokens, new])
        drafts: list[int] = tokens[-n:].tolist()  # type: ignore[assignment]
        self._held, self._sure = [*ids, *drafts[:-1]], len(ids)
        return drafts


class Speculator:
    """Takes the model's place in mlx-lm's generation step, which asks for one token's logits after the other.

    A pass of the model gives those of the token asked for, and keeps those behind its drafts until they are asked for, or
    another token comes. So the step stays what it is without drafts, its running ahead by one token included.
    """

    def __init__(self, model: ArceeForCausalLM, drafter: Drafter, request: Request, *, unread: int) -> None:
        """Args: unread: tokens of the prompt that the KV cache does not hold yet, at least 1."""
        self._model, self._drafter, self._request = model, drafter, request
        self._ids = list(request.ids)
        self._unread = unread
        self._waiting: deque[tuple[int, mx.array]] = deque()  # drafts in the cache, and the logits (1, 1, V) after each
        self._drafted = self._accepted = 0
        # Drafts to make at most: one, and two more for each of the last that was accepted. A third of the drafts of a
        # fixed number for nine tenths of what it saves on prose; in a loop of text it is at 7 after two passes.
        self._most = request.options.num_draft_tokens or MAX_DRAFT_TOKENS
        self._reach = self._most
        self._counts: deque[tuple[int, int]] = deque()

    def __call__(self, input_ids: mx.array, cache: list[Any]) -> mx.array:
        """Ids (1, L), the prompt's piece by piece, then one token at a time -> logits (1, L, V)."""
        self._unread -= input_ids.shape[1]
        if self._unread > 0:
            return self._model(input_ids, cache)
        if self._unread < 0:  # below 0 it counts the answer's tokens
            self._ids.append(input_ids.item())  # type: ignore[arg-type]
        if self._waiting and self._agrees(self._waiting[0][0], self._ids[-1]):
            _, logits = self._waiting.popleft()
            self._accepted += 1
            self._reach += 2
        else:
            self._take_back(cache)
            logits = self._verify(cache)
        self._counts.append((self._drafted, self._accepted))
        return logits

    def read_counts(self) -> tuple[int, int]:
        """Drafts verified and drafts accepted up to the oldest token not yet read."""
        return self._counts.popleft()

    def _agrees(self, draft: int, token: int) -> bool:
        return draft == token

    def _take_back(self, cache: list[Any]) -> None:
        for layer in cache:
            layer.trim(len(self._waiting))
        self._waiting.clear()

    def _verify(self, cache: list[Any]) -> mx.array:
        drafts = self._draft(cache[0].offset)
        logits = self._model(mx.array([[self._ids[-1], *drafts]]), cache)
        self._waiting.extend((draft, logits[:, i : i + 1]) for i, draft in enumerate(drafts, start=1))
        self._drafted += len(drafts)
        self._reach = 1 if drafts else self._reach
        return logits[:, :1]

    def _draft(self, held: int) -> list[int]:
        if self._ids[-1] in self._request.eos:
            return []
        n = min(self._reach, self._most, self._request.limit + self._unread - 1)
        rope = self._model.model.rotary_emb
        while n > 0 and not rope.shares_table(held + 1, held + 1 + n):
            n -= 1  # verified tokens are turned by the table they would have one by one
        return self._drafter.propose(self._ids, n) if n > 0 else []


def make_drafter(
    tokenizer: Tokenizer, request: Request, row: Row, draft_model: ArceeForCausalLM | None, *, keeps_all_tokens: bool
) -> Drafter | None:
    """What the request asks for, and what its grammar determines anyhow; None without drafts.

    Args:
        keeps_all_tokens: the KV cache does, so that drafts can be taken back.
    """
    options, grammar = request.options, None
    if request.grammar is not None and keeps_all_tokens:
        grammar = GrammarProcessor(request.grammar, request.eos, prompt_tokens=len(request.ids))
    drafter: Drafter | None = None
    if options.num_draft_tokens and draft_model is None:
        drafter = NgramDrafter(options.max_matching_ngram_size or DEFAULT_NGRAM_SIZE)
    elif draft_model is not None:
        processors = make_logits_processors(
            options,
            vocab_size=tokenizer.vocab_size,
            model_vocab_size=draft_model.config.vocab_size,
            prompt_tokens=len(request.ids),
            grammar=grammar,
        )
        drafter = ModelDrafter(draft_model, row, processors, options.prefill_step_size)
    return GrammarDrafter(grammar, drafter, prompt_tokens=len(request.ids)) if grammar else drafter


def check_drafts(
    model: ArceeForCausalLM,
    options: GenerateOptions,
    draft_model: ArceeForCausalLM | None,
    prompt_cache: PromptCache | None,
) -> None:
    """Raises InputError where drafts cannot be made or taken back."""
    if options.num_draft_tokens and prompt_cache is not None and prompt_cache.max_kv_size is not None:
        raise InputError(
            f"num_draft_tokens is {options.num_draft_tokens} with a prompt cache of max_kv_size "
            f"{prompt_cache.max_kv_size}; expected one that keeps all tokens, since drafts must be taken back"
        )
    if draft_model is None:
        return
    if not options.num_draft_tokens:
        raise InputError("num_draft_tokens is 0 with a draft_model; expected 1 to 7 tokens to draft; give it, too")
    if options.max_matching_ngram_size is not None:
        raise InputError("max_matching_ngram_size with a draft_model, which matches no n-grams; leave one of them out")
    asked, own = draft_model.config.vocab_size, model.config.vocab_size
    if asked != own:
        raise InputError(
            f"draft_model has a vocabulary of {asked} tokens; expected the model's {own}; "
            f"take a draft model with the same tokenizer"
        )

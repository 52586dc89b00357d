"""One answer in the making: its sampler, its logits processors, and its tokens on their way to text and an end."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import mlx.core as mx

from ..checkpoint.tokenizer import Tokenizer
from ..model.decoder import ArceeForCausalLM
from .answer import GenerationChunk, GenerationStats, TokenLogprob
from .grammar import GrammarProcessor
from .logprobs import LogprobRecorder
from .options import StopReason
from .request import Request
from .sampling import LogitsProcessor, Sampler, make_logits_processors
from .stop import StopMatcher


class Row:
    """What is one answer's own, whether it is made alone or in a batch.

    Attributes:
        request: that is answered.
        sampler: scores (1, V) -> token (1,).
        processors: to be called in order, once a step, with all tokens but the first `hidden_tokens`.
    """

    def __init__(
        self,
        model: ArceeForCausalLM,
        tokenizer: Tokenizer,
        request: Request,
        own_processors: Sequence[LogitsProcessor],
        started_s: float,
        *,
        hidden_tokens: int = 0,
        cached_tokens: int = 0,
    ) -> None:
        """Args:
        own_processors: the caller's.
        started_s: when the caller called.
        hidden_tokens: of the prompt, those that processors are not called with, being in the KV cache already.
        cached_tokens: of the prompt, those that a prompt cache saved computing.
        """
        options = request.options
        self._own_sampler = Sampler(options, xtc_keeps(tokenizer, request.eos, model.config.vocab_size))
        self.sampler: Callable[[mx.array], mx.array] = self._own_sampler
        grammar = None
        if request.grammar is not None:
            grammar = GrammarProcessor(request.grammar, request.eos, prompt_tokens=len(request.ids) - hidden_tokens)
        self.processors = make_logits_processors(
            options,
            vocab_size=tokenizer.vocab_size,
            model_vocab_size=model.config.vocab_size,
            prompt_tokens=len(request.ids) - hidden_tokens,
            hidden_ids=request.ids[:hidden_tokens],
            own=own_processors,
            grammar=grammar,
        )
        self._texts: list[str] = []  # of an answer with a grammar or tools
        self._own_ends = tokenizer.eos_token_ids  # which a grammar lets through where the answer is whole only
        self._recorder = LogprobRecorder(options.top_logprobs) if options.logprobs else None
        if self._recorder:
            self.processors.insert(0, self._recorder.observe)
            self.sampler = self._recorder.wrap(self.sampler)
        self.request = request
        skips = request.tools is None or not request.tools.shows_special_tokens
        self._detokenizer = tokenizer.detokenizer(skip_special_tokens=skips)
        self._matcher = StopMatcher(options.stop)
        self._prompt_tokens = request.unseen_tokens + len(request.ids)
        self._cached_tokens = request.unseen_tokens + cached_tokens
        self._started_s, self._prefill_s, self._first_s = started_s, time.perf_counter(), 0.0
        self._count = 0

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token of the unchanged logits is all it takes, so that a batch may draw it at once."""
        return self.request.options.temp == 0 and not self.processors

    def copy_sampler(self) -> Sampler:
        """One that draws as `sampler` will from here on, and leaves that as it is."""
        return copy.copy(self._own_sampler)

    def add(self, token: int, *, drafted: int = 0, accepted: int = 0) -> GenerationChunk:
        """Takes the next token, in the order they were sampled; after a chunk with a stop_reason there is no other.

        Args:
            drafted, accepted: drafts so far.
        """
        now_s = time.perf_counter()
        if self._count == 0:
            self._first_s = now_s
        self._count += 1
        logprob: float | None = None
        top: tuple[TokenLogprob, ...] = ()
        if self._recorder:
            logprob, top = self._recorder.read()
        text, reason = self._write(token)
        stats = self._stats(now_s, drafted, accepted)
        chunk = GenerationChunk(text, token, reason, stats, logprob, top)
        return chunk if self.request.is_free else self._judge(chunk)

    def _judge(self, chunk: GenerationChunk) -> GenerationChunk:
        """The chunk; the last with what the whole answer has become."""
        self._texts.append(chunk.text)
        if chunk.stop_reason is None:
            return chunk
        is_complete, calls, invalid = self.request.judge("".join(self._texts), is_ended=chunk.token in self._own_ends)
        reason: StopReason = "tool_call" if calls and chunk.stop_reason == "eos" else chunk.stop_reason
        return replace(chunk, stop_reason=reason, is_complete=is_complete, tool_calls=calls, invalid_tool_calls=invalid)

    def _write(self, token: int) -> tuple[str, StopReason | None]:
        reason: StopReason | None = None
        text = ""
        if token in self.request.eos:
            reason = "eos"
        else:
            text = self._matcher.add(self._detokenizer.add(token))
            if not self._matcher.stopped and self._count == self.request.limit:
                reason = self.request.limit_reason
        if reason is not None:
            text += self._matcher.add(self._detokenizer.finish()) + self._matcher.finish()
        return text, "stop_string" if self._matcher.stopped else reason

    def _stats(self, now_s: float, drafted: int, accepted: int) -> GenerationStats:
        seed = self.request.options.seed
        assert seed is not None
        return GenerationStats(
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            prompt_tokens_per_s=(self._prompt_tokens - self._cached_tokens) / (self._first_s - self._prefill_s),
            generation_tokens=self._count,
            generation_tokens_per_s=(self._count - 1) / (now_s - self._first_s) if self._count > 1 else 0.0,
            time_to_first_token_s=self._first_s - self._started_s,
            peak_memory_bytes=mx.get_peak_memory(),
            seed=seed,
            drafted_tokens=drafted,
            accepted_tokens=accepted,
        )


def xtc_keeps(tokenizer: Tokenizer, eos: frozenset[int], model_vocab_size: int) -> frozenset[int]:
    """What XTC never leaves out, as in mlx_lm.generate: ends of text, and the line feed; ids the model has."""
    ids = eos.union(tokenizer.encode("\n", add_special_tokens=False))
    return frozenset(token for token in ids if 0 <= token < model_vocab_size)

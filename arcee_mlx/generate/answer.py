"""What a caller gets: chunks while the answer is made, and the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import IncompleteAnswerError, InputError
from .json_schema import parse_answer
from .options import StopReason
from .request import Request
from .tools import InvalidToolCall, ToolCall, cut_tool_calls


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability under the model itself."""

    token: int
    logprob: float


@dataclass(frozen=True)
class GenerationStats:
    """What a generation took so far.

    Attributes:
        prompt_tokens: tokens of the prompt, the cached ones included.
        cached_tokens: of them, those that a prompt cache saved computing.
        prompt_tokens_per_s: of those computed, per second until the first new token was there.
        generation_tokens: new tokens, the end-of-text token included.
        generation_tokens_per_s: of those after the first; 0 for fewer than two.
        time_to_first_token_s: from the call to the first new token.
        peak_memory_bytes: most memory MLX held in this process.
        seed: of the sampling; the same seed, prompt and options give the same text.
        drafted_tokens: drafts that were verified; 0 without `num_draft_tokens` and without a grammar.
        accepted_tokens: of them, those that came true, so that the token after each took no pass of the model.
    """

    prompt_tokens: int
    cached_tokens: int
    prompt_tokens_per_s: float
    generation_tokens: int
    generation_tokens_per_s: float
    time_to_first_token_s: float
    peak_memory_bytes: int
    seed: int
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def acceptance_rate(self) -> float | None:
        """Share of the drafts that came true; None without drafts."""
        return self.accepted_tokens / self.drafted_tokens if self.drafted_tokens else None

    @property
    def tokens_per_step(self) -> float:
        """New tokens for each pass of the model that made any; 1 without drafts."""
        return self.generation_tokens / (self.generation_tokens - self.accepted_tokens)


@dataclass(frozen=True)
class GenerationChunk:
    """One token's worth of an answer.

    Attributes:
        text: text that has become certain; may be empty, and may reach further back than the token.
        token: id of the new token.
        stop_reason: why the answer ended, on the last chunk; None before.
        stats: so far.
        logprob: of the token, under the model itself; None unless `logprobs` was asked for.
        top_logprobs: of the likeliest tokens, the likeliest first; as many as `top_logprobs` asked for.
        is_complete: on the last chunk, whether the answer is all that its schema, regex, grammar, choices or tools ask for;
            None before, and where they ask for nothing.
        tool_calls: on the last chunk, those that the answer asks for.
        invalid_tool_calls: on the last chunk, what begins like a call and cannot be read as one.
    """

    text: str
    token: int
    stop_reason: StopReason | None
    stats: GenerationStats
    logprob: float | None = None
    top_logprobs: tuple[TokenLogprob, ...] = ()
    is_complete: bool | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        text: joined.
        tokens: all ids, the end-of-text token included.
        stop_reason: why it ended.
        stats: of the whole; in a batch the times are those of the batch as this answer saw it.
        logprobs: of every token; empty unless asked for.
        top_logprobs: a tuple a token; empty unless asked for.
        is_complete: whether it is all that its schema, regex, grammar, choices or tools ask for; None where they ask for
            nothing.
        schema: that was asked for; None without one.
        tool_calls: that it asks for, in its order; empty without `tools`.
        invalid_tool_calls: what begins like a call and cannot be read as one; that stays in `content`.
    """

    text: str
    tokens: tuple[int, ...]
    stop_reason: StopReason
    stats: GenerationStats
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] = ()
    is_complete: bool | None = None
    schema: Any = field(default=None, repr=False, compare=False)
    tool_calls: tuple[ToolCall, ...] = ()
    invalid_tool_calls: tuple[InvalidToolCall, ...] = ()

    @property
    def content(self) -> str:
        """The text without the calls in it."""
        return cut_tool_calls(self.text, self.tool_calls)

    @property
    def parsed(self) -> Any:
        """What the text means: an instance of the model or dataclass that was the schema, else what json.loads gives.

        Raises:
            InputError: no schema was asked for.
            IncompleteAnswerError: the answer was cut off; `text` is what was made.
            ValueError: the type's own checks refuse what its JSON schema allows (pydantic.ValidationError is one).
        """
        if self.schema is None:
            raise InputError("the answer has no schema; expected one in its options; read the text yourself")
        check_complete(self.is_complete, self.text, self.stop_reason)
        return parse_answer(self.schema, self.text)


def check_complete(is_complete: bool | None, text: str, stop_reason: StopReason | None) -> None:
    """Raises IncompleteAnswerError if an answer was cut off before it was what its grammar asks for."""
    if is_complete is False:
        raise IncompleteAnswerError(
            f"the answer is incomplete: {text[-60:]!r} is where it ended ({stop_reason}); expected all that its schema, "
            f"regex, grammar, choices or tools ask for; allow more max_tokens, or read what was made (.text)",
            text,
        )


def join_chunks(
    chunks: Sequence[GenerationChunk], stop_reason: StopReason | None = None, *, request: Request | None = None
) -> Answer:
    """The answer that chunks, at least one, make up.

    Args:
        stop_reason: why they end early; None where the last one says why.
        request: that they answer, which says what form the answer was to have.
    """
    reason = stop_reason or chunks[-1].stop_reason
    assert reason is not None
    text = "".join(chunk.text for chunk in chunks)
    last = chunks[-1]
    is_complete, calls, invalid = last.is_complete, last.tool_calls, last.invalid_tool_calls
    if request is not None and last.stop_reason is None:  # else the last chunk says it
        is_complete, calls, invalid = request.judge(text)
    return Answer(
        text=text,
        tokens=tuple(chunk.token for chunk in chunks),
        stop_reason=reason,
        stats=last.stats,
        logprobs=tuple(chunk.logprob for chunk in chunks if chunk.logprob is not None),
        top_logprobs=tuple(chunk.top_logprobs for chunk in chunks if chunk.top_logprobs),
        is_complete=is_complete,
        schema=None if request is None else request.options.schema,
        tool_calls=calls,
        invalid_tool_calls=invalid,
    )

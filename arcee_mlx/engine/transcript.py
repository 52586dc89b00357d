"""Transcript: what was said in a session, and the exact tokens the model saw of it. Values and text; nothing is computed.

Encoding an answer's text again need not give the tokens that the model made. So what was seen is kept as it was, and the
next prompt goes on from there wherever the chat template's text does; where it does not, all of it is encoded anew.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..checkpoint.tokenizer import Tokenizer
from ..errors import ContextOverflowError, InputError
from ..generate.answer import Answer
from ..generate.options import DEFAULT_MAX_TOKENS, GenerateOptions, context_tokens
from ..generate.request import render_messages
from ..model.config import ArceeConfig
from .prefix_cache import CacheKind

Overflow = Literal["refuse", "drop_oldest_turns"]
OVERFLOWS = ("refuse", "drop_oldest_turns")
# Of the context, once turns must go: else one would go, and all the rest be computed anew, with every message.
_SHARE_AFTER_DROPPING = 0.75


@dataclass(frozen=True)
class Message:
    """Who said what: `role` is "system", "user" or "assistant"."""

    role: str
    content: str


@dataclass(frozen=True)
class Turn:
    """A user's message and its answer.

    Attributes:
        user, answer: what they said.
        dropped_turns: how many of the session's oldest turns the model did not see with it.
        text: what the model saw: the prompt, and the answer where its tokens are its text to the letter.
        ids: the tokens of that. Both are empty where it is not known what the model saw.
        goes_on: whether text and ids follow those of the turn before; else they are all, from the first token on.
    """

    user: str
    answer: str
    dropped_turns: int = 0
    text: str = ""
    ids: tuple[int, ...] = ()
    goes_on: bool = False


@dataclass(frozen=True)
class Transcript:
    """A session's whole state.

    Attributes:
        system_prompt: None for none.
        turns: all, the oldest first.
        options: for answers that are given none of their own.
        overflow: what happens where the context is full.
        cache_kind: of the caches that the last answer was made with.
    """

    system_prompt: str | None = None
    turns: tuple[Turn, ...] = ()
    options: GenerateOptions | None = None
    overflow: Overflow = "refuse"
    cache_kind: CacheKind = (None, None)

    @property
    def messages(self) -> tuple[Message, ...]:
        """All that was said, the oldest first."""
        return (*self._system(), *_messages_of(self.turns))

    @property
    def text(self) -> str:
        """What the model saw of it, as far as that is known."""
        return "".join(turn.text for turn in self._seen_turns())

    @property
    def ids(self) -> list[int]:
        """The tokens of that text."""
        return [token for turn in self._seen_turns() for token in turn.ids]

    def draft(self, tokenizer: Tokenizer, config: ArceeConfig, user: str, options: GenerateOptions) -> Draft:
        """The prompt for the answer to a user's next message, oldest turns dropped where that is the policy.

        Raises:
            ContextOverflowError: it does not fit the context.
            InputError, TokenizerError: the message is no text, or the chat template cannot render the messages.
        """
        if not isinstance(user, str):
            raise InputError(
                f"text is of type {type(user).__name__}; expected str; a session's messages are plain text"
            )
        context = context_tokens(config)
        asked = options.resolve(tokenizer.generation_config, config).max_tokens or -1
        reserve = min(DEFAULT_MAX_TOKENS if asked == -1 else asked, context // 2)
        dropped = self.turns[-1].dropped_turns if self.turns else 0
        draft = self._write(tokenizer, user, options, dropped)
        if self.overflow == "drop_oldest_turns" and len(draft.ids) + reserve > context and dropped < len(self.turns):
            counts = range(dropped + 1, len(self.turns))
            most = context * _SHARE_AFTER_DROPPING - reserve
            place = bisect_left(
                counts, True, key=lambda count: len(self._write(tokenizer, user, options, count).ids) <= most
            )
            draft = self._write(tokenizer, user, options, dropped + 1 + place)
        if len(draft.ids) >= context:
            advice = "send less"
            if draft.turn.dropped_turns < len(self.turns):
                advice += ", roll turns back, or open the session with overflow='drop_oldest_turns'"
            raise ContextOverflowError(
                f"the session's next prompt has {len(draft.ids)} tokens; expected at most {context - 1} of the model's "
                f"{context} positions, and {context - reserve} to leave {reserve} for the answer; {advice}"
            )
        return draft

    def _write(self, tokenizer: Tokenizer, user: str, options: GenerateOptions, dropped: int) -> Draft:
        said = [*self._system(), *_messages_of(self.turns[dropped:]), Message("user", user)]
        text = render_messages(tokenizer, [vars(message) for message in said], options)
        before, ids = self.text, self.ids
        if ids and text.startswith(before):
            tail = text[len(before) :]
            tail_ids = tokenizer.encode(tail, add_special_tokens=False)
            # Some tokenizers put a space before any text: what they encode in two parts is another text.
            if _stand_for(tokenizer, ids, tail_ids, tail):
                turn = Turn(user, options.prefill_response or "", dropped, tail, tuple(tail_ids), goes_on=True)
                return Draft(turn, [*ids, *tail_ids])
        ids = tokenizer.encode(text, add_special_tokens=False)
        return Draft(Turn(user, options.prefill_response or "", dropped, text, tuple(ids)), ids)

    def _system(self) -> tuple[Message, ...]:
        return () if self.system_prompt is None else (Message("system", self.system_prompt),)

    def _seen_turns(self) -> Sequence[Turn]:
        first = next((i for i in reversed(range(len(self.turns))) if not self.turns[i].goes_on), 0)
        return self.turns[first:]


@dataclass(frozen=True)
class Draft:
    """A turn whose answer is to be made.

    Attributes:
        turn: without it.
        ids: of the whole prompt.
    """

    turn: Turn
    ids: list[int]

    def complete(self, tokenizer: Tokenizer, answer: Answer) -> Turn:
        """The turn with its answer.

        The answer's tokens are kept where they are its text to the letter, but for one that ended it. Where they are not,
        for a stop string that was cut off, half a character or a special token inside, the next prompt encodes its text.
        """
        turn = replace(self.turn, answer=self.turn.answer + answer.text)
        for tokens in (answer.tokens, answer.tokens[:-1]):
            if _stand_for(tokenizer, self.ids, tokens, answer.text):
                return replace(turn, text=turn.text + answer.text, ids=turn.ids + tokens)
        return turn


def begin(
    system_prompt: str | None,
    messages: Sequence[Message | Mapping[str, Any]],
    options: GenerateOptions | None,
    overflow: Overflow,
) -> Transcript:
    """A transcript of what the caller says there was before; arguments as for `Engine.session`.

    Raises:
        InputError: messages are not text, the user's and the assistant's in turns; or a value is none of those known.
    """
    if overflow not in OVERFLOWS:
        raise InputError(f"overflow is {overflow!r}; expected {' or '.join(map(repr, OVERFLOWS))}")
    if not isinstance(options, GenerateOptions | None):
        raise InputError(f"options is of type {type(options).__name__}; expected GenerateOptions, or None")
    said = [] if system_prompt is None else [_read_message("system_prompt", Message("system", system_prompt))]
    said += [_read_message(f"messages[{i}]", message) for i, message in enumerate(messages)]
    system = said.pop(0).content if said and said[0].role == "system" else None
    roles = [message.role for message in said]
    if roles != ["user", "assistant"] * (len(said) // 2):
        raise InputError(
            f"messages have the roles {', '.join(roles)}; expected user and assistant in turns, an answer the last, and at "
            f"most one system message before them; give the message that is to be answered to `send`"
        )
    pairs = zip(said[::2], said[1::2], strict=True)
    return Transcript(system, tuple(Turn(user.content, answer.content) for user, answer in pairs), options, overflow)


def _read_message(name: str, message: Message | Mapping[str, Any]) -> Message:
    given = vars(message) if isinstance(message, Message) else message
    if not isinstance(given, Mapping) or set(given) != {"role", "content"} or not all(map(_is_text, given.values())):
        raise InputError(f"{name} is {given!r}; expected a Message, or a mapping of role and content, both plain text")
    return Message(**given)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _messages_of(turns: Sequence[Turn]) -> list[Message]:
    pairs = ((Message("user", turn.user), Message("assistant", turn.answer)) for turn in turns)
    return [message for pair in pairs for message in pair]


def _stand_for(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int], text: str) -> bool:
    """Whether tokens are this text to the letter, behind the one before them: the first of all may lose its space."""
    return tokenizer.decode([*before[-1:], *ids]) == tokenizer.decode(before[-1:]) + text

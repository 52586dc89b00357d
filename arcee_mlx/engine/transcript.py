"""Transcript: what was said in a session, and the exact tokens the model saw of it. Values and text; nothing is computed.

Encoding an answer's text again need not give the tokens that the model made. So what was seen is kept as it was, and the
next prompt goes on from there wherever the chat template's text does; where it does not, all of it is encoded anew.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..checkpoint.tokenizer import Tokenizer
from ..errors import ContextOverflowError, InputError
from ..generate.answer import Answer
from ..generate.options import DEFAULT_MAX_TOKENS, GenerateOptions, context_tokens
from ..generate.request import render_messages
from ..generate.tools import ToolCall, ToolResult
from ..model.config import ArceeConfig
from .prefix_cache import CacheKind

Overflow = Literal["refuse", "drop_oldest_turns"]
OVERFLOWS = ("refuse", "drop_oldest_turns")
# Of the context, once turns must go: else one would go, and all the rest be computed anew, with every message.
_SHARE_AFTER_DROPPING = 0.75


@dataclass(frozen=True)
class Message:
    """Who said what.

    Attributes:
        role: "system", "user", "assistant"; or "tool", for what a call came to.
        content: text.
        tool_calls: that an assistant's message asks for beside it.
        name: of the tool.
        tool_call_id: of the call that a tool's message answers, where it has an id.
    """

    role: str
    content: str
    tool_calls: tuple[ToolCall, ...] = ()
    name: str | None = None
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """In the form that chat templates read, OpenAI's."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            message["tool_calls"] = [
                ({} if call.id is None else {"id": call.id})
                | {"type": "function", "function": {"name": call.name, "arguments": dict(call.arguments)}}
                for call in self.tool_calls
            ]
        more = {"name": self.name, "tool_call_id": self.tool_call_id}
        return message | {key: value for key, value in more.items() if value is not None}


@dataclass(frozen=True)
class Turn:
    """A user's message, or what calls of the answer before came to, and its answer.

    Attributes:
        user, answer: what they said; of the answer, what is no call.
        dropped_turns: how many of the session's oldest turns the model did not see with it.
        text: what the model saw: the prompt, and the answer where its tokens are its text to the letter.
        ids: the tokens of that. Both are empty where it is not known what the model saw.
        goes_on: whether text and ids follow those of the turn before; else they are all, from the first token on.
        tool_results: of the calls in the answer before; there is no user's message then.
        tool_calls: that the answer asks for.
    """

    user: str
    answer: str
    dropped_turns: int = 0
    text: str = ""
    ids: tuple[int, ...] = ()
    goes_on: bool = False
    tool_results: tuple[ToolResult, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def messages(self) -> tuple[Message, ...]:
        """What was said in it."""
        results = tuple(
            Message("tool", result.content, name=result.name, tool_call_id=result.tool_call_id)
            for result in self.tool_results
        )
        return (*(results or (Message("user", self.user),)), Message("assistant", self.answer, self.tool_calls))


# What is said to the model: a user's message, or the results of the calls in its last answer.
Said = str | Sequence[ToolResult]


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
        return (*self._system(), *(message for turn in self.turns for message in turn.messages))

    @property
    def pending_tool_calls(self) -> tuple[ToolCall, ...]:
        """The last answer's calls: no results of them were said."""
        return self.turns[-1].tool_calls if self.turns else ()

    @property
    def text(self) -> str:
        """What the model saw of it, as far as that is known."""
        return "".join(turn.text for turn in self._seen_turns())

    @property
    def ids(self) -> list[int]:
        """The tokens of that text."""
        return [token for turn in self._seen_turns() for token in turn.ids]

    def draft(self, tokenizer: Tokenizer, config: ArceeConfig, said: Said, options: GenerateOptions) -> Draft:
        """The prompt for the answer to what is said next, oldest turns dropped where that is the policy.

        Raises:
            ContextOverflowError: it does not fit the context.
            InputError, TokenizerError: it is no text, nor the last answer's calls' results; or the chat template cannot
                render the messages.
        """
        begun = self._begin_turn(said, options)
        context = context_tokens(config)
        asked = options.resolve(tokenizer.generation_config, config).max_tokens or -1
        reserve = min(DEFAULT_MAX_TOKENS if asked == -1 else asked, context // 2)
        dropped = self.turns[-1].dropped_turns if self.turns else 0
        draft = self._write(tokenizer, replace(begun, dropped_turns=dropped), options)
        # A conversation begins with a user's message: results go where the calls go that they are of.
        turns = (*self.turns, begun)
        counts = [count for count in range(dropped + 1, len(turns)) if not turns[count].tool_results]
        if self.overflow == "drop_oldest_turns" and len(draft.ids) + reserve > context and counts:
            most = context * _SHARE_AFTER_DROPPING - reserve

            def write(count: int) -> Draft:
                return self._write(tokenizer, replace(begun, dropped_turns=count), options)

            place = bisect_left(counts[:-1], True, key=lambda count: len(write(count).ids) <= most)
            draft = write(counts[place])
        if len(draft.ids) >= context:
            advice = "send less"
            if counts and draft.turn.dropped_turns < counts[-1]:
                advice += ", roll turns back, or open the session with overflow='drop_oldest_turns'"
            raise ContextOverflowError(
                f"the session's next prompt has {len(draft.ids)} tokens; expected at most {context - 1} of the model's "
                f"{context} positions, and {context - reserve} to leave {reserve} for the answer; {advice}"
            )
        return draft

    def _begin_turn(self, said: Said, options: GenerateOptions) -> Turn:
        answer = options.prefill_response or ""
        if isinstance(said, str):
            return Turn(said, answer)
        if not isinstance(said, list | tuple) or not said or not all(map(_is_result, said)):
            raise InputError(
                f"text is of type {type(said).__name__}; expected str, or the ToolResults of the last answer's calls; a "
                f"session's messages are plain text"
            )
        asked, given = [call.name for call in self.pending_tool_calls], [result.name for result in said]
        if asked != given:
            raise InputError(
                f"results are of the tools {given}; expected one of each call of the last answer, in their order: {asked}"
            )
        return Turn("", answer, tool_results=tuple(said))

    def _write(self, tokenizer: Tokenizer, begun: Turn, options: GenerateOptions) -> Draft:
        said = [*self._system(), *(message for turn in self.turns[begun.dropped_turns :] for message in turn.messages)]
        said += begun.messages[:-1]
        text = render_messages(tokenizer, [message.for_template() for message in said], options)
        before, ids = self.text, self.ids
        if ids and text.startswith(before):
            tail = text[len(before) :]
            tail_ids = tokenizer.encode(tail, add_special_tokens=False)
            # Some tokenizers put a space before any text: what they encode in two parts is another text.
            if _stand_for(tokenizer, ids, tail_ids, tail):
                return Draft(replace(begun, text=tail, ids=tuple(tail_ids), goes_on=True), [*ids, *tail_ids])
        ids = tokenizer.encode(text, add_special_tokens=False)
        return Draft(replace(begun, text=text, ids=tuple(ids)), ids)

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
        calls = answer.tool_calls if answer.stop_reason == "tool_call" else ()  # of what was cut off none is to run
        content = answer.content if calls else answer.text
        turn = replace(self.turn, answer=self.turn.answer + content, tool_calls=calls)
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
    turns: list[Turn] = []
    heard: list[Message] = []  # since the last answer
    roles = [message.role for message in said]
    for message in said:
        if message.role != "assistant":
            heard.append(message)
            continue
        turns.append(_make_turn(heard, message, turns[-1].tool_calls if turns else (), roles))
        heard = []
    if heard:
        raise _roles_error(roles)
    return Transcript(system, tuple(turns), options, overflow)


def _make_turn(heard: list[Message], answer: Message, calls: Sequence[ToolCall], roles: list[str]) -> Turn:
    if [message.role for message in heard] == ["user"]:
        return Turn(heard[0].content, answer.content, tool_calls=answer.tool_calls)
    if not calls or [message.role for message in heard] != ["tool"] * len(calls):
        raise _roles_error(roles)
    by_id = {message.tool_call_id: message for message in heard}
    if all(call.id in by_id for call in calls) and len(by_id) == len(heard):  # where calls have ids, in any order
        heard = [by_id[call.id] for call in calls]
    for call, message in zip(calls, heard, strict=True):
        if message.name not in (None, call.name) or message.tool_call_id not in (None, call.id):
            raise InputError(
                f"a message of the tool {message.name!r} ({message.tool_call_id}) stands where {call} ({call.id}) is "
                f"answered; expected one message of each call, with its id or in its place"
            )
    results = tuple(ToolResult(call.name, message.content, call.id) for call, message in zip(calls, heard, strict=True))
    return Turn("", answer.content, tool_results=results, tool_calls=answer.tool_calls)


def _roles_error(roles: list[str]) -> InputError:
    return InputError(
        f"messages have the roles {', '.join(roles)}; expected user and assistant in turns, an answer the last, and at "
        f"most one system message before them; after an answer with tool_calls one tool message of each may take the "
        f"user's place; give the message that is to be answered to `send`"
    )


def _read_message(name: str, message: Message | Mapping[str, Any]) -> Message:
    given = message.for_template() if isinstance(message, Message) else message
    if isinstance(given, Mapping):
        given = {key: value for key, value in given.items() if value is not None}
        calls = given.pop("tool_calls", ())
        given = {"content": "", **given} if calls else given
        known = {"role", "content"} | ({"name", "tool_call_id"} if given.get("role") == "tool" else set())
        if {"role", "content"} <= given.keys() <= known and all(map(_is_text, given.values())):
            return Message(**given, tool_calls=_read_calls(name, calls))
    raise InputError(
        f"{name} is {message!r}; expected a Message, or a mapping of role and content, both plain text, and of tool_calls"
    )


def _read_calls(name: str, calls: Any) -> tuple[ToolCall, ...]:
    """Calls in OpenAI's form."""
    try:
        read = [(call.get("id"), call.get("function", call)) for call in calls]
        parsed = [
            (
                function["name"],
                json.loads(given) if isinstance(given := function["arguments"], str) else dict(given),
                name,
            )
            for name, function in read
        ]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f'{name}: tool_calls is {calls!r} ({error}); expected a list of {{"function": {{"name": ..., "arguments": ...}}}}'
        ) from error
    return tuple(ToolCall(tool, given, id=name) for tool, given, name in parsed)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_result(value: object) -> bool:
    return isinstance(value, ToolResult) and _is_text(value.name) and _is_text(value.content)


def _stand_for(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int], text: str) -> bool:
    """Whether tokens are this text to the letter, behind the one before them: the first of all may lose its space."""
    return tokenizer.decode([*before[-1:], *ids]) == tokenizer.decode(before[-1:]) + text

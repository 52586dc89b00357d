"""A prompt and its options, checked against the model and ready to compute."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from ..checkpoint.chat_template import Tool
from ..checkpoint.tokenizer import Tokenizer
from ..errors import InputError, TokenizerError
from ..model.config import ArceeConfig
from .grammar import Grammar, compile_grammar
from .options import GenerateOptions, StopReason, context_tokens
from .sampling import draw_seed
from .tools import InvalidToolCall, ToolCall, ToolFormat, find_tool_format

Prompt = str | Sequence[Mapping[str, Any]] | Sequence[int]


@dataclass(frozen=True)
class Request:
    """What `read_request` made of the caller's words.

    Attributes:
        ids: of the prompt, all in the model's range.
        options: resolved: no None left but where None means off; the seed is drawn.
        eos: ids that end the answer.
        limit: tokens to make at most.
        limit_reason: why the answer ended if it reaches that.
        grammar: what the answer is to be; None for anything.
        tools: how calls of tools are written; None where there are none to call.
        unseen_tokens: tokens that stand before the prompt in a cache whose text is not known.
    """

    ids: list[int]
    options: GenerateOptions
    eos: frozenset[int]
    limit: int
    limit_reason: StopReason
    grammar: Grammar | None = None
    tools: ToolFormat | None = None
    unseen_tokens: int = 0

    @property
    def is_free(self) -> bool:
        """Whether the answer may be anything, and asks for nothing."""
        return self.grammar is None and self.tools is None

    def judge(
        self, text: str, *, is_ended: bool = False
    ) -> tuple[bool | None, tuple[ToolCall, ...], tuple[InvalidToolCall, ...]]:
        """What an answer's text is: whether it is all that was asked for, the calls in it, and what is none.

        Args:
            is_ended: whether it ends with an end of text of the tokenizer's, which a grammar allows after a whole answer only.
        """
        tools = None if self.options.tool_choice == "none" else self.tools
        calls, invalid = ((), ()) if tools is None else tools.read(text)
        if self.grammar is None:
            return None, calls, invalid
        return is_ended or self.grammar.is_complete(text), calls, invalid


def read_request(
    config: ArceeConfig,
    tokenizer: Tokenizer,
    prompt: Prompt,
    options: GenerateOptions | None,
    *,
    unseen_tokens: int = 0,
) -> Request:
    """Checks all that can be checked before anything is computed.

    Raises:
        InputError, TokenizerError: see `generate`.
    """
    if not isinstance(options, GenerateOptions | None):
        raise InputError(f"options is of type {type(options).__name__}; expected GenerateOptions, or None")
    options = (options or GenerateOptions()).resolve(tokenizer.generation_config, config)
    options = replace(options, seed=draw_seed() if options.seed is None else options.seed)
    ids = encode_prompt(tokenizer, prompt, options, goes_on=unseen_tokens > 0)
    room = _check_prompt(ids, config, unseen_tokens)
    tools = find_tool_format(tokenizer, options.tools) if options.tools else None
    asked = options.max_tokens
    limit = room if asked in (None, -1) else min(asked, room)
    return Request(
        ids=ids,
        options=options,
        eos=tokenizer.eos_token_ids | _extra_eos(tokenizer, options),
        limit=limit,
        limit_reason="max_tokens" if limit == asked else "context_full",
        grammar=compile_grammar(tokenizer, options, tools),
        tools=tools,
        unseen_tokens=unseen_tokens,
    )


def encode_prompt(
    tokenizer: Tokenizer,
    prompt: Prompt,
    options: GenerateOptions | None = None,
    *,
    goes_on: bool = False,
    is_open: bool = False,
) -> list[int]:
    """Token ids of a prompt in any of its three forms.

    Args:
        options: prefill_response and chat_template_config belong to messages and are refused with the other two.
        goes_on: the prompt goes on from tokens before it: text begins without begin-of-text token, and of messages
            only what stands from the last one's content on is taken, as mlx_lm.generate does with a prompt cache.
        is_open: others will go on from this prompt: of messages the last is left open.

    Raises:
        InputError: it is none of the three.
        TokenizerError: messages cannot be rendered.
    """
    options = options or GenerateOptions()
    items: list[Any] = []
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, str | Sequence | mx.array | np.ndarray):
        raise InputError(f"prompt is of type {type(prompt).__name__}; expected text, messages or token ids")
    if not isinstance(prompt, str):
        listed = prompt.reshape(-1).tolist() if isinstance(prompt, mx.array | np.ndarray) else prompt
        items = [item.item() if isinstance(item, np.integer) else item for item in listed]
    if items and all(isinstance(item, Mapping) for item in items):
        return _encode_messages(tokenizer, items, options, goes_on=goes_on, is_open=is_open)
    for name in ("prefill_response", "chat_template_config"):
        if getattr(options, name):
            raise InputError(f"{name} with a prompt that is not messages; expected messages; put it into the prompt")
    if isinstance(prompt, str):
        # A rendered template already begins with the token the tokenizer would put there.
        whole = goes_on or (tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token))
        return tokenizer.encode(prompt, add_special_tokens=not whole) if prompt else []
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise InputError("prompt holds neither text, nor messages, nor token ids only; expected one of the three")
    return items


def render_messages(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], options: GenerateOptions, *, is_open: bool = False
) -> str:
    """The text of a prompt of messages, as the chat template writes it with the options that belong to it.

    Args:
        is_open: ends inside the last message, for others to go on with it; else where the answer begins.

    Raises:
        TokenizerError: messages cannot be rendered, or the template leaves the tools out.
    """
    text = _render(tokenizer, messages, options, is_open=is_open, tools=options.tools)
    if options.tools and text == _render(tokenizer, messages, options, is_open=is_open, tools=()):
        raise TokenizerError(
            "the chat template does not write tools; expected one for a model that was taught to call them; leave tools "
            "out, or describe them in the system prompt and take `schema` for the form of a call"
        )
    return text


def _render(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    options: GenerateOptions,
    *,
    is_open: bool,
    tools: Sequence[Tool],
) -> str:
    begun = options.prefill_response is not None
    answer = [{"role": "assistant", "content": options.prefill_response}] if begun else []
    return tokenizer.apply_chat_template(
        [*messages, *answer],
        tools=tools or None,
        add_generation_prompt=not (begun or is_open),
        continue_final_message=begun or is_open,
        template_variables=options.chat_template_config,
    )


def _encode_messages(
    tokenizer: Tokenizer, messages: list[Mapping[str, Any]], options: GenerateOptions, *, goes_on: bool, is_open: bool
) -> list[int]:
    text = render_messages(tokenizer, messages, options, is_open=is_open)
    if goes_on:
        mark = secrets.token_hex(16)  # letters and digits, which a template leaves alone and no text holds
        marked = [*messages[:-1], {**messages[-1], "content": mark}]
        place = render_messages(tokenizer, marked, options, is_open=is_open).find(mark)
        if place < 0:
            raise InputError("the chat template leaves out the last message; expected it to write its content")
        text = text[place:]
    return tokenizer.encode(text, add_special_tokens=False)


def _check_prompt(ids: Sequence[int], config: ArceeConfig, unseen_tokens: int) -> int:
    """Raises InputError unless the model can take the prompt; returns how many tokens may follow it."""
    if not ids:
        raise InputError("the prompt is empty; expected at least one token; give some text")
    for place, token in enumerate(ids):
        if not 0 <= token < config.vocab_size:
            raise InputError(
                f"prompt holds the id {token} at place {place}; expected 0 to {config.vocab_size - 1}; "
                f"check that tokenizer and model belong together"
            )
    length = unseen_tokens + len(ids)
    room = context_tokens(config) - length
    if room < 1:
        raise InputError(
            f"the prompt has {length} tokens; expected fewer than the {context_tokens(config)} positions of the "
            f"model; shorten it"
        )
    return room


def _extra_eos(tokenizer: Tokenizer, options: GenerateOptions) -> frozenset[int]:
    found = {text: tokenizer.token_id(text) for text in options.extra_eos_tokens}
    for text, token in found.items():
        if token is None:
            raise InputError(f"extra_eos_tokens names {text!r}; expected a token of this tokenizer's vocabulary")
    return frozenset(token for token in found.values() if token is not None)

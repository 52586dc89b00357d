"""Grammars over llguidance: which tokens may come next, so that an answer is what its schema, expression or grammar asks for.

llguidance walks a byte-level parser along the tokens; here it is told the tokens and asked for the mask, and whether a text
is whole. An answer may end only where it is whole, and tokens that the tokenizer does not know are never let through.
"""

from __future__ import annotations

import json
import re
import threading
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np

from ..checkpoint.tokenizer import Tokenizer
from ..errors import GrammarError
from .json_schema import STRICT_JSON, explain_refusal, make_json_schema, make_parameters_schema
from .options import GenerateOptions
from .regex import translate_python_regex
from .tools import ToolFormat, write_tool_grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_KEPT_GRAMMARS = 32


class Grammar:
    """What an answer must be, for one tokenizer. Safe to share; `make_matcher` starts an answer."""

    def __init__(self, source: str, tokens: LLTokenizer) -> None:
        """Args:
        source: in llguidance's own form.

        Raises:
            GrammarError: llguidance refuses it; the message is its own.
        """
        import llguidance

        is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(source, tokens)
        if is_error or messages:
            raise GrammarError("; ".join(messages))
        self._tokens = tokens
        self._start = llguidance.LLMatcher(tokens, source, log_level=0)

    def make_matcher(self) -> LLMatcher:
        """A parser that stands before the first token."""
        return self._start.deep_copy()

    def is_complete(self, text: str) -> bool:
        """Whether a text is all that the grammar asks for."""
        matcher, ids = self.make_matcher(), self._tokens.tokenize_str(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


class GrammarProcessor:
    """A logits processor that lets through what may come next in one answer."""

    def __init__(self, grammar: Grammar, eos: frozenset[int], *, prompt_tokens: int) -> None:
        """Args:
        eos: ids that end the answer.
        prompt_tokens: of the tokens it is called with, those that are not the answer's.
        """
        self._matcher = grammar.make_matcher()
        self._eos, self._prompt_tokens = eos, prompt_tokens
        self._ids: list[int] = []  # of the answer, where the matcher stands

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Tokens so far (n,), logits (1, V) -> logits (1, V), -inf where no answer goes on.

        The tokens begin with those of the call before, or with those it was moved to since.

        Raises:
            GrammarError: the grammar has become too complex to follow.
        """
        new = tokens[self._prompt_tokens + len(self._ids) :]
        mx.async_eval(new)
        mx.async_eval(logits)  # the device goes on while the mask is made here
        ids: list[int] = new.tolist()  # type: ignore[assignment]
        if not self._eos.isdisjoint(ids):  # steps run ahead of the end
            return logits
        self._consume(ids)
        return mx.where(mx.array(self._mask(logits.shape[-1])), logits, -mx.inf)

    def move_to(self, ids: list[int]) -> None:
        """Goes to where the answer's tokens end, from wherever it stands."""
        kept = len(self._ids)
        if ids[:kept] != self._ids:
            kept = next(i for i, token in enumerate(self._ids) if ids[i : i + 1] != [token])
            self._matcher.rollback(len(self._ids) - kept)
            del self._ids[kept:]
        self._consume(ids[kept:])

    def _consume(self, ids: list[int]) -> None:
        self._matcher.consume_tokens(ids)
        self._check()
        self._ids += ids

    def forced_tokens(self) -> list[int]:
        """Tokens that write what the grammar alone determines to come next, as the tokenizer would write it."""
        return [] if self._matcher.is_stopped() else self._matcher.compute_ff_tokens()

    def _mask(self, vocab_size: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.zeros(vocab_size, bool)
        known = np.unpackbits(bits, bitorder="little")[:vocab_size]
        allowed[: known.size] = known
        mask = allowed.copy()
        mask[[token for token in self._eos if token < vocab_size]] = self._matcher.is_accepting()
        # Where nothing but one of the caller's own ends of text goes on, it ends the answer, which is then cut off.
        return mask if mask.any() else allowed

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().splitlines()[0]
            raise GrammarError(f"the answer's grammar cannot be followed any further ({reason}); take a simpler one")


class _Compiler:
    """Grammars of one tokenizer; those last asked for are kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        import llguidance

        if not tokenizer.eos_token_ids:
            raise GrammarError("the tokenizer has no end-of-text token; expected one, with which a whole answer ends")
        self._matchers = llguidance.LLMatcher
        self._tokens = llguidance.LLTokenizer(tokenizer.to_json(), eos_token=sorted(tokenizer.eos_token_ids))
        self._compile = lru_cache(maxsize=_KEPT_GRAMMARS)(lambda source: Grammar(source, self._tokens))

    def compile_schema(self, schema: dict[str, Any]) -> Grammar:
        try:
            return self._compile(self._write_schema(schema))
        except GrammarError as error:
            raise explain_refusal(schema, str(error), self._is_refused) from error

    def compile_regex(self, name: str, pattern: str, written: object) -> Grammar:
        return self._compile_named(name, self._matchers.grammar_from_regex(pattern), written)

    def compile_lark(self, text: str) -> Grammar:
        return self._compile_named("grammar", self._matchers.grammar_from_lark(text), text)

    def compile_tools(self, tools: ToolFormat, lark: str) -> Grammar:
        try:
            return self.compile_lark(lark)
        except GrammarError:
            for tool in tools.tools:
                try:
                    self.compile_schema(make_parameters_schema(tool["function"]["parameters"]))
                except GrammarError as error:
                    raise GrammarError(f"tool {tool['function']['name']}: its parameters' {error}") from error
            raise

    def _compile_named(self, name: str, source: str, written: object) -> Grammar:
        try:
            return self._compile(source)
        except GrammarError as error:
            raise GrammarError(f"{name} {written!r} cannot be enforced: {error}") from error

    def _write_schema(self, schema: dict[str, Any]) -> str:
        return self._matchers.grammar_from_json_schema(json.dumps(schema), overrides=STRICT_JSON)  # type: ignore[arg-type]

    def _is_refused(self, schema: dict[str, Any]) -> bool:
        is_error, messages = self._matchers.validate_grammar_with_warnings(self._write_schema(schema), self._tokens)
        return is_error or bool(messages)


_compilers: WeakKeyDictionary[Tokenizer, _Compiler] = WeakKeyDictionary()
_compilers_lock = threading.Lock()


def compile_grammar(tokenizer: Tokenizer, options: GenerateOptions, tools: ToolFormat | None = None) -> Grammar | None:
    """What the options ask an answer to be; None where it may be anything.

    Args:
        tools: how calls are written; None where there are none to call.

    Raises:
        GrammarError: it cannot be enforced; names the option, and of a schema the keyword and its place.
    """
    if not options.has_grammar:
        return None if tools is None else _compile_tools(tokenizer, options, tools)
    compiler = _find_compiler(tokenizer)
    if options.schema is not None:
        return compiler.compile_schema(make_json_schema(options.schema))
    if options.regex is not None:
        return compiler.compile_regex("regex", translate_python_regex(options.regex), options.regex)
    if options.choices:
        pattern = translate_python_regex("|".join(map(re.escape, options.choices)))
        return compiler.compile_regex("choices", pattern, options.choices)
    assert options.grammar is not None
    return compiler.compile_lark(options.grammar)


def _compile_tools(tokenizer: Tokenizer, options: GenerateOptions, tools: ToolFormat) -> Grammar | None:
    parallel = options.parallel_tool_calls
    lark = write_tool_grammar(tokenizer, tools, options.tool_choice, parallel_tool_calls=parallel)
    return None if lark is None else _find_compiler(tokenizer).compile_tools(tools, lark)


def _find_compiler(tokenizer: Tokenizer) -> _Compiler:
    with _compilers_lock:
        if (compiler := _compilers.get(tokenizer)) is None:
            compiler = _compilers[tokenizer] = _Compiler(tokenizer)
    return compiler

"""GenerateOptions: what a caller may ask of a generation, checked against the model before anything is computed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from ..checkpoint.chat_template import Tool
from ..errors import InputError
from ..model.config import ArceeConfig
from ..model.relu2.kernels import MAX_TOKENS
from .json_schema import check_schema
from .tools import TOOL_CHOICES, name_tools, read_tools

StopReason = Literal["eos", "stop_string", "max_tokens", "context_full", "tool_call", "cancelled", "deadline", "error"]

DEFAULT_MAX_TOKENS = 256
MAX_DRAFT_TOKENS = MAX_TOKENS - 1  # with the last token, what the sparse path takes at once
_KEPT_TOKENS = 4  # a rotating cache never gives up the first of these (mlx-lm's `keep`)


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Options of a generation. None takes the checkpoint's generation_config.json.

    Names are mlx_lm.generate's where it has them, else OpenAI's.
    Sampling follows transformers: penalties, temperature, top-k, top-p, min-p, in that order; XTC comes last.

    Attributes:
        max_tokens: tokens to make at most; -1 for as many as the context holds. Default 256.
        temp: temperature; 0 takes the likeliest token. Default 0.
        top_k: sample among the k likeliest tokens; 0 is off.
        top_p: sample among the likeliest tokens whose probabilities reach this sum, in (0, 1]; 1 is off.
        min_p: leave out tokens less likely than this share of the likeliest, in [0, 1]; 0 is off.
        repetition_penalty: divides the scores of tokens that occur in prompt or answer; 1e-6 to 1e6, 1 is off.
        frequency_penalty: taken from a token's score for every time the answer has it already; 0 is off.
        presence_penalty: taken once from the score of every token the answer has already; 0 is off.
        logit_bias: {id: number added to that token's score}.
        xtc_probability: share of steps, in [0, 1], at which all but the least likely of the tokens over xtc_threshold
            are left out (never line feed and end of text); 0 is off. Needs a temperature.
        xtc_threshold: of that, in [0, 0.5].
        logprobs: give every token's log-probability under the model itself, before penalties, bias and temperature.
        top_logprobs: of so many of the likeliest tokens, too; needs logprobs.
        seed: of the sampling, 0 to 2**64 - 1; None draws one.
        stop: strings that end the answer and are not part of it.
        extra_eos_tokens: texts of further single tokens that end the answer.
        schema: what the answer is, as JSON and nothing else: a JSON schema as a dict (True for any JSON), a Pydantic model, a
            dataclass, a TypedDict, or a type hint made of them and of basic types. `Answer.parsed` reads it back.
            Refused where a keyword cannot be enforced. It is written without white space. A small model may not come to the
            end of what has none: maxLength, maxItems, and of numbers minimum, maximum and multipleOf, bound it.
        regex: what the whole answer matches, as Python's `re.fullmatch` does.
        grammar: what the answer is, in llguidance's Lark, from the rule `start` on.
        choices: texts of which the answer is one. Of schema, regex, grammar and choices there can be one.
        tools: functions, or JSON schemas of such, that the model is told of and may call: see `get_json_schema` and
            `Answer.tool_calls`. Kept as schemas. The chat template writes them into a prompt of messages; into another the
            caller has written them.
        tool_choice: "auto" leaves it to the model whether it calls any; "required" makes it, and the name of one makes it
            call that one, once; "none" lets it call none. Enforced, arguments included, where calls have Hermes' form.
        parallel_tool_calls: whether it may call several in one answer.
        prefill_response: how the answer begins; the model goes on from there, and what it adds is what is given. For a
            prompt of messages only.
        chat_template_config: further variables for the chat template. For a prompt of messages only.
        prefill_step_size: prompt tokens computed at a time.
        max_kv_size: keep the first 4 and the newest tokens only, so many in all. None keeps all.
        kv_bits: store keys and values in so many bits from the first token on: 2, 4 or 8. Not with max_kv_size.
        kv_group_size: group size of that: 32, 64 or 128, and a divisor of the head's width.
        num_draft_tokens: draft up to so many tokens at a time, 1 to 7, the more the better they did, and verify them at
            once; the answer stays the same. Drafts are what followed when the last tokens stood there before
            (transformers' prompt lookup), or a `draft_model`'s. 0 guesses nothing: only what a schema, regex, grammar
            or choices leave no choice about is drafted. For one caller's answer, and not with max_kv_size.
        max_matching_ngram_size: last tokens to look for, without a draft model, 1 to 16. Default 3.
    """

    max_tokens: int | None = None
    temp: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logprobs: bool = False
    top_logprobs: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    extra_eos_tokens: tuple[str, ...] = ()
    schema: Any = field(default=None, hash=False)
    regex: str | None = None
    grammar: str | None = None
    choices: tuple[str, ...] = ()
    tools: tuple[Tool, ...] = field(default=(), hash=False)
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    prefill_response: str | None = None
    chat_template_config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    prefill_step_size: int = 2048
    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    num_draft_tokens: int = 0
    max_matching_ngram_size: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._check_int("max_tokens", 1, also=-1)
        self._check_int("top_k", 0)
        self._check_int("seed", 0, 2**64 - 1)
        self._check_int("prefill_step_size", 1, may_be_none=False)
        self._check_int("max_kv_size", _KEPT_TOKENS + 1)
        self._check_int("num_draft_tokens", 0, MAX_DRAFT_TOKENS, may_be_none=False)
        self._check_int("max_matching_ngram_size", 1, 16)
        self._check_number("temp", 0, math.inf)
        self._check_number("top_p", 0, 1, open_low=True)
        self._check_number("min_p", 0, 1)
        self._check_number("repetition_penalty", 1e-6, 1e6)
        self._check_number("frequency_penalty", -math.inf, math.inf)
        self._check_number("presence_penalty", -math.inf, math.inf)
        self._check_number("xtc_probability", 0, 1)
        self._check_number("xtc_threshold", 0, 0.5)
        self._check_int("top_logprobs", 0, may_be_none=False)
        if not isinstance(self.logprobs, bool):
            self._refuse("logprobs", "True or False")
        if self.top_logprobs and not self.logprobs:
            self._refuse("top_logprobs", "0 without logprobs; set logprobs, too")
        if self.prefill_response is not None and not isinstance(self.prefill_response, str):
            self._refuse("prefill_response", "text")
        self._check_mapping("logit_bias", int, "token ids with finite numbers")
        if not all(_is_finite(bias) for bias in self.logit_bias.values()):
            self._refuse("logit_bias", "token ids with finite numbers")
        self._check_mapping("chat_template_config", str, "names with values")
        for name in ("stop", "extra_eos_tokens", "choices"):
            values = getattr(self, name)
            if isinstance(values, str) or not isinstance(values, Iterable) or not all(map(_is_text, values)):
                self._refuse(name, "a tuple of strings that are not empty")
            object.__setattr__(self, name, tuple(values))
        if self.kv_bits is not None and (type(self.kv_bits) is not int or self.kv_bits not in (2, 4, 8)):
            self._refuse("kv_bits", "2, 4 or 8")
        if type(self.kv_group_size) is not int or self.kv_group_size not in (32, 64, 128):
            self._refuse("kv_group_size", "32, 64 or 128")
        if self.kv_bits is not None and self.max_kv_size is not None:
            raise InputError(
                "kv_bits together with max_kv_size: a rotating KV cache cannot be quantized; expected one of the two"
            )
        if self.num_draft_tokens and self.max_kv_size is not None:
            raise InputError(
                "num_draft_tokens together with max_kv_size: a rotating KV cache cannot take drafts back; expected one "
                "of the two"
            )
        if self.max_matching_ngram_size is not None and not self.num_draft_tokens:
            raise InputError("max_matching_ngram_size without num_draft_tokens: nothing is drafted; give both")

        object.__setattr__(self, "tools", read_tools(self.tools))
        self._check_grammar()
        self._check_tools()

    @property
    def has_grammar(self) -> bool:
        """Whether the answer is to be of a certain form."""
        return self.schema is not None or self.regex is not None or self.grammar is not None or bool(self.choices)

    def _check_grammar(self) -> None:
        if self.schema is not None:
            check_schema(self.schema)
        for name in ("regex", "grammar"):
            if getattr(self, name) is not None and not isinstance(getattr(self, name), str):
                self._refuse(name, "text")
        given = [name for name in ("schema", "regex", "grammar") if getattr(self, name) is not None]
        if len(given := given + ["choices"] * bool(self.choices)) > 1:
            raise InputError(f"{' and '.join(given)} together; expected one of them; a schema or grammar can say both")

    def _check_tools(self) -> None:
        if not isinstance(self.parallel_tool_calls, bool):
            self._refuse("parallel_tool_calls", "True or False")
        names = name_tools(self.tools)
        if self.tool_choice not in (*TOOL_CHOICES, *names):
            self._refuse("tool_choice", f"one of {', '.join(TOOL_CHOICES)}, or the name of one of the tools")
        if self.tool_choice != "auto" and not names:
            raise InputError(f"tool_choice is {self.tool_choice!r} without tools; expected tools to choose from")
        if names and self.has_grammar and self.tool_choice != "none":
            raise InputError(
                "tools together with schema, regex, grammar or choices: an answer is a call or has that form; expected "
                "one of them, or tool_choice 'none'"
            )

    def resolve(self, generation_config: Mapping[str, Any], config: ArceeConfig) -> GenerateOptions:
        """Fills in what the caller left open and checks what depends on the model.

        Args:
            generation_config: the checkpoint's generation_config.json, {} without one. As in transformers its
                temperature counts only with `do_sample`; its filters also when the caller gives a temperature.
            config: of the model.

        Raises:
            InputError: an option does not fit the model, or generation_config.json holds a bad value.
        """
        given = {key: value for key, value in generation_config.items() if value is not None}
        samples = given.get("do_sample", False)
        theirs: dict[str, Any] = {
            "max_tokens": given.get("max_new_tokens", DEFAULT_MAX_TOKENS),
            "repetition_penalty": given.get("repetition_penalty", 1.0),
            "temp": given.get("temperature", 1.0) if samples else 0.0,
            "top_k": given.get("top_k", 50 if samples else 0),
            "top_p": given.get("top_p", 1.0),
            "min_p": given.get("min_p", 0.0),
        }
        try:
            resolved = replace(self, **{key: value for key, value in theirs.items() if getattr(self, key) is None})
        except InputError as error:
            raise InputError(f"generation_config.json: {error}; give the option yourself") from error
        if self.kv_bits is not None and config.head_size % self.kv_group_size:
            raise InputError(
                f"kv_group_size is {self.kv_group_size}; expected a divisor of the model's head_dim {config.head_size}"
            )
        for token in self.logit_bias:
            if not 0 <= token < config.vocab_size:
                raise InputError(f"logit_bias names the id {token}; expected ids from 0 to {config.vocab_size - 1}")
        if self.top_logprobs > config.vocab_size:
            self._refuse("top_logprobs", f"at most the model's {config.vocab_size} tokens")
        if resolved.temp == 0 and self.xtc_probability:
            raise InputError("xtc_probability without a temperature: the likeliest token is taken; give temp over 0")
        for name, off in (("top_k", 0), ("top_p", 1), ("min_p", 0)):
            if resolved.temp == 0 and getattr(self, name) not in (None, off):
                raise InputError(f"{name} without a temperature: the likeliest token is taken; give temp over 0")
        return resolved

    def _check_int(
        self, name: str, least: int, most: int | None = None, *, also: int | None = None, may_be_none: bool = True
    ) -> None:
        value = getattr(self, name)
        if (value is None and may_be_none) or (also is not None and value == also):
            return
        if isinstance(value, bool) or not isinstance(value, int) or value < least or (most and value > most):
            self._refuse(name, f"an integer of at least {least}" + (f" and at most {most}" if most else ""))

    def _check_number(self, name: str, low: float, high: float, *, open_low: bool = False) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not _is_finite(value):
            self._refuse(name, "a finite number")
        if value < low or value > high or (open_low and value == low):
            more = f"over {low}" if open_low else f"of at least {low}"
            self._refuse(name, f"a number {more}" + ("" if high == math.inf else f" and at most {high}"))

    def _check_mapping(self, name: str, key_type: type, want: str) -> None:
        value = getattr(self, name)
        if not isinstance(value, Mapping) or not all(type(key) is key_type for key in value):
            self._refuse(name, want)
        object.__setattr__(self, name, dict(value))

    def _refuse(self, name: str, want: str) -> None:
        raise InputError(f"{name} is {getattr(self, name)!r}; expected {want}")


def _is_text(value: object) -> bool:
    """Whether it is text that a model could write: not empty, and no half of a surrogate pair."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= char <= "\udfff" for char in value)


def _is_finite(value: object) -> bool:
    # Finite as float32, which is what it will be.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 3e38


OPTION_NAMES = tuple(f.name for f in fields(GenerateOptions))


def context_tokens(config: ArceeConfig) -> int:
    """How many positions a model has: what it was made for, stretched where its rope stretches itself."""
    rope = config.rope
    if rope["rope_type"] == "dynamic":
        return int(config.max_position_embeddings * max(rope["factor"], 1))
    return config.max_position_embeddings

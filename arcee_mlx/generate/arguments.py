"""The arguments of `arcee-mlx generate` and its kin, and the options they make. Names are mlx_lm.generate's where it has them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from .options import OPTION_NAMES, GenerateOptions

_DRAFT_MODEL_TOKENS = 3  # mlx_lm.generate's


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `generate`."""
    add_prompt_arguments(parser)
    add_model_arguments(parser)
    add_sampling_arguments(parser)
    _add_answer_arguments(parser)
    add_form_arguments(parser)
    _add_draft_arguments(parser)
    memory = add_memory_arguments(parser)
    memory.add_argument("--prompt-cache-file", metavar="FILE", help="from `arcee-mlx cache-prompt` or mlx_lm's")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="one JSON object on standard output at the end, for programs"
    )
    output.add_argument("--quiet", action="store_true", help="no statistics, progress or notes on standard error")


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says which prompt."""
    parser.add_argument("prompt_words", nargs="*", metavar="PROMPT", help="the prompt; '-' reads standard input")
    source = parser.add_argument_group("prompt")
    source.add_argument("--prompt", "-p", metavar="TEXT", help="the prompt; '-' reads standard input")
    source.add_argument("--prompt-file", metavar="FILE", type=Path, help="read the prompt from a file")
    add_template_arguments(source)
    source.add_argument(
        "--raw",
        "--ignore-chat-template",
        action="store_true",
        help="continue the prompt as it is, without chat template",
    )


def add_template_arguments(group: argparse._ArgumentGroup) -> None:
    """Adds what goes into the chat template beside the messages."""
    group.add_argument("--system-prompt", metavar="TEXT", help="system message for the chat template")
    group.add_argument("--chat-template-config", metavar="JSON", help="object of further variables for the template")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model."""
    model = parser.add_argument_group("model")
    model.add_argument(
        "--model", metavar="PATH|ID", help="checkpoint folder or Hugging Face Hub id (default: the demo)"
    )
    model.add_argument("--adapter-path", metavar="PATH|ID", help="LoRA or DoRA adapter to put on, mlx-lm's or PEFT's")
    model.add_argument("--revision", metavar="NAME", help="branch, tag or commit of a hub id")
    model.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16", "auto"),
        help="dtype to compute in (default: the checkpoint's on a GPU, float32 on the CPU backend)",
    )  # fmt: skip


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says how a token is chosen."""
    how = parser.add_argument_group("sampling (defaults: the checkpoint's generation_config.json)")
    how.add_argument("--temp", "--temperature", type=float, metavar="T", help="temperature, 0 = likeliest token")
    how.add_argument("--top-p", type=float, metavar="P", help="sample within this probability mass, 1 = off")
    how.add_argument("--top-k", type=int, metavar="K", help="sample among the K likeliest tokens, 0 = off")
    how.add_argument(
        "--min-p", type=float, metavar="P", help="leave out tokens under this share of the likeliest, 0 = off"
    )
    how.add_argument("--xtc-probability", type=float, default=0.0, metavar="P", help="how often XTC applies (0 = off)")
    how.add_argument(
        "--xtc-threshold", type=float, default=0.1, metavar="P", help="of the tokens over this the least likely stays"
    )
    how.add_argument("--repetition-penalty", type=float, metavar="X", help="over prompt and answer, 1 = off")
    how.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="over the answer, 0 = off")
    how.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="over the answer, 0 = off")
    how.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID=X", help="add X to a token's score; repeatable"
    )
    how.add_argument("--seed", type=int, metavar="N", help="of the sampling (default: drawn)")


def add_ending_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds what says where an answer ends; returns the group."""
    answer = parser.add_argument_group("answer")
    answer.add_argument(
        "--max-tokens", "-m", type=int, metavar="N", help="tokens to make at most, -1 = all that fit (256)"
    )
    answer.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end the answer at TEXT; repeatable"
    )
    answer.add_argument(
        "--extra-eos-token",
        dest="extra_eos_tokens",
        nargs="+",
        default=[],
        metavar="TOKEN",
        help="tokens that end it too",
    )
    return answer


def _add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    answer = add_ending_arguments(parser)
    answer.add_argument("--prefill-response", metavar="TEXT", help="how the answer begins (it is not printed again)")
    answer.add_argument("--logprobs", action="store_true", help="every token's log-probability, in --json")
    answer.add_argument("--top-logprobs", type=int, default=0, metavar="N", help="of the N likeliest, too")
    answer.add_argument("-n", type=int, default=1, metavar="N", help="sample N answers, seeds counting up (1)")
    answer.add_argument("--num-beams", type=int, default=1, metavar="N", help="beam search with N beams (1 = off)")
    answer.add_argument("--length-penalty", type=float, metavar="X", help="of beams: over 0 favours long answers (1)")
    answer.add_argument(
        "--early-stopping",
        choices=("true", "false", "never"),
        help="of beams: at num-beams answers; when better is unlikely (false); when it is impossible",
    )
    answer.add_argument("--num-return-sequences", type=int, metavar="N", help="of beams: answers to print (1)")


def add_form_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says which form an answer has; one of them at most."""
    forms = parser.add_argument_group(
        "form of the answer (one of them; exit status 1 if it is cut off before it is whole)"
    )
    forms.add_argument("--schema", metavar="FILE", type=Path, help="JSON that meets the JSON schema in a file")
    forms.add_argument(
        "--regex", metavar="PATTERN", help="text that a regular expression of Python's matches as a whole"
    )
    forms.add_argument("--grammar", metavar="FILE", type=Path, help="text of a grammar in llguidance's Lark")
    forms.add_argument("--choices", nargs="+", default=[], metavar="TEXT", help="one of these texts")


def _add_draft_arguments(parser: argparse.ArgumentParser) -> None:
    drafts = parser.add_argument_group("speculative decoding (the answer stays the same)")
    drafts.add_argument(
        "--num-draft-tokens",
        type=int,
        metavar="N",
        help="draft and verify up to N tokens at once, 7 at most (0 = guess nothing)",
    )
    drafts.add_argument(
        "--draft-model",
        metavar="PATH|ID",
        help="drafts come from this smaller model, up to 3 at a time unless --num-draft-tokens (default: from the text so far)",
    )
    drafts.add_argument(
        "--max-matching-ngram-size", type=int, metavar="N", help="last tokens to look for in the text so far (3)"
    )


def add_memory_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Adds what says how keys and values are kept; returns the group."""
    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--max-kv-size", type=int, metavar="N", help="keep the first 4 and the newest tokens only, N in all"
    )
    memory.add_argument("--kv-bits", type=int, metavar="BITS", help="quantize the KV cache: 2, 4 or 8")
    memory.add_argument("--kv-group-size", type=int, default=64, metavar="N", help="group size of that (64)")
    memory.add_argument(
        "--prefill-step-size", type=int, default=2048, metavar="N", help="prompt tokens at a time (2048)"
    )
    return memory


def read_options(args: argparse.Namespace) -> GenerateOptions:
    """The options that parsed arguments ask for; those the program does not have keep their defaults."""
    values: dict[str, Any] = {name: getattr(args, name) for name in OPTION_NAMES if hasattr(args, name)}
    if "logit_bias" in values:
        values["logit_bias"] = dict(_read_bias(text) for text in values["logit_bias"])
    if "num_draft_tokens" in values and values["num_draft_tokens"] is None:
        values["num_draft_tokens"] = _DRAFT_MODEL_TOKENS if args.draft_model is not None else 0
    if values.get("schema") is not None:
        values["schema"] = _read_schema(values["schema"])
    if values.get("grammar") is not None:
        values["grammar"] = _read_file("--grammar", values["grammar"])
    values["chat_template_config"] = _read_template_config(args.chat_template_config)
    return GenerateOptions(**values)


def _read_bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise InputError(f"--logit-bias is {text!r}; expected ID=NUMBER, such as 42=-5") from error


def _read_schema(path: Path) -> Any:
    try:
        return json.loads(_read_file("--schema", path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"--schema {path} is not JSON ({error}); expected a JSON schema") from error


def _read_file(argument: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{argument} {path} cannot be read ({error}); expected a text file") from error


def _read_template_config(text: str | None) -> dict[str, Any]:
    try:
        config = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--chat-template-config is not JSON ({error}); expected an object") from error
    if not isinstance(config, dict):
        raise InputError(f"--chat-template-config is {text!r}; expected a JSON object")
    return config

"""From a conversation to the model's prompt: the checkpoint's Jinja chat templates, rendered as transformers 5.23 does.

A template is code from the checkpoint's maker, so it runs in jinja2's immutable sandbox and sees plain JSON values
only. jinja2 is imported when the first template is rendered, not before.

Where this differs from transformers, on purpose:
- a value that is not JSON is refused; transformers shows the template a placeholder such as `<datetime>`;
- a `chat_template` argument that is neither a known name nor has a brace in it is a mistyped name, not a template;
- the mark of `continue_final_message` never stays behind where a template prints the last message twice.

Source: transformers 5.23, utils/chat_template_utils.py and tokenization_utils_base.py (behaviour, not code).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, TokenizerError
from .function_schema import get_json_schema

if TYPE_CHECKING:
    from jinja2 import Environment, Template

Tool = Mapping[str, Any] | Callable[..., Any]

TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_FOLDER = "additional_chat_templates"

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")  # the first is the one templates read today
# The trailing space tells whether the template trimmed the message that carries the mark.
_CONTINUE_MARK = "CONTINUE_FROM_HERE_ARCEE_MLX "


def read_chat_templates(folder: Path, tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Read the chat templates of a checkpoint folder, by name; the usual one is called `default`.

    Args:
        folder: The checkpoint folder. chat_template.jinja is `default`, additional_chat_templates/NAME.jinja is NAME.
        tokenizer_config: The parsed tokenizer_config.json. Its `chat_template` (one text, or a list of
            `{"name", "template"}`) counts only where the folder has no template file at all.

    Returns:
        Template texts by name; empty where the checkpoint has none.

    Raises:
        TokenizerError: A template file is not UTF-8 text, or `chat_template` has another shape.
    """
    extra = sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))
    files = {"default": folder / TEMPLATE_FILE} if (folder / TEMPLATE_FILE).is_file() else {}
    files |= {path.name.removesuffix(".jinja"): path for path in extra}
    if files:
        return {name: _read_text(path) for name, path in files.items()}

    stored = tokenizer_config.get("chat_template")
    if stored is None:
        return {}
    if isinstance(stored, str):
        return {"default": stored}
    try:
        named = dict(stored) if isinstance(stored, Mapping) else {entry["name"]: entry["template"] for entry in stored}
    except (TypeError, KeyError):
        named = None
    if named is None or not all(isinstance(text, str) for pair in named.items() for text in pair):
        raise TokenizerError(
            f"{folder / 'tokenizer_config.json'}: chat_template is {_short(stored)}; expected a template text or a "
            'list of {"name": ..., "template": ...}; repair the file or download it again'
        )
    return named


def render_chat(
    templates: Mapping[str, str],
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Tool] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool | str = False,
    chat_template: str | None = None,
    template_variables: Mapping[str, Any] | None = None,
) -> str:
    """Render a conversation with one of `templates`. Nothing that is passed in is changed.

    Args:
        templates: Template texts by name, as `read_chat_templates` gives them.
        messages: The conversation, oldest first: mappings with a `role` (str) and a `content` (str, list of blocks, or
            None). A key whose value is None reaches the template as a missing key.
        tools: What the model may call: JSON schemas, or Python functions (see `get_json_schema`). Where there is a template `tool_use`, tools pick it.
        documents: Mappings for templates that read retrieved documents, usually with `title` and `text`.
        add_generation_prompt: Ends the prompt with the header of the assistant's next message.
        continue_final_message: Ends the prompt inside the last message, for the model to go on with. True continues
            `content`; a str names another field of the message, such as `reasoning_content`.
        chat_template: The name of a template, or the text of another one.
        template_variables: More variables for the template (the special tokens among them), over and above those here.

    Returns:
        The prompt as text.

    Raises:
        InputError: An argument has the wrong shape, or arguments exclude each other.
        TokenizerError: There is no such template, or it cannot be rendered; the message names template and line.
    """
    name, text = _choose(templates, chat_template, has_tools=tools is not None)
    chat = _read_messages(messages)
    given = {
        "tools": _read_mappings("tools", _describe_tools(tools)),
        "documents": _read_mappings("documents", documents),
        "add_generation_prompt": add_generation_prompt,
    }
    variables = _plain(dict(template_variables or {}), "template_variables")
    if taken := sorted({"messages", *given} & set(variables)):
        raise InputError(f"template_variables has {', '.join(taken)}; expected other names; use those arguments")
    if not continue_final_message:
        return _render(name, text, {**variables, **given, "messages": chat})
    if add_generation_prompt:
        raise InputError(
            "continue_final_message and add_generation_prompt are both set; expected one of them; "
            "the first goes on with the last message, the second opens a new one"
        )
    field = "content" if continue_final_message is True else continue_final_message
    final = _mark_final_message(name, text, chat, field)
    return _cut_at_mark(name, final, _render(name, text, {**variables, **given, "messages": chat}))


def _choose(templates: Mapping[str, str], wanted: str | None, *, has_tools: bool) -> tuple[str, str]:
    """Pick a template: the wanted name or text, else `tool_use` where tools are given, else `default`."""
    known = ", ".join(sorted(templates)) or "none"
    if wanted is not None:
        if wanted in templates:
            return wanted, templates[wanted]
        if not isinstance(wanted, str) or "{" not in wanted:
            raise InputError(
                f"chat_template is {_short(wanted)}; expected one of the checkpoint's template names ({known}) or the "
                "text of a Jinja template; check the spelling"
            )
        return "given", wanted
    for name in ("tool_use", "default") if has_tools else ("default",):
        if name in templates:
            return name, templates[name]
    if not templates:
        raise TokenizerError(
            f"this checkpoint has no chat template; expected {TEMPLATE_FILE} or a chat_template in tokenizer_config."
            "json; pass one as chat_template, or give the model plain text if it is a base model"
        )
    raise TokenizerError(
        f"this checkpoint's chat templates are {known}; expected one called default; name one in chat_template"
    )


def _read_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    chat: list[dict[str, Any]] | None = _read_mappings("messages", messages)
    if not chat:
        got = "None" if chat is None else "empty"
        raise InputError(f"messages is {got}; expected at least one message; pass the conversation so far")
    for index, message in enumerate(chat):
        if not isinstance(role := message.get("role"), str):
            raise InputError(f"messages[{index}]['role'] is {_short(role)}; expected a str such as 'user'")
        if not isinstance(content := message.get("content"), str | list | tuple | None):
            raise InputError(
                f"messages[{index}]['content'] is {_short(content)}; expected a str, a list of content blocks, or None"
            )
        # APIs send `content: None` and `tool_calls: None`; templates print "None" for them but cope with a missing key.
        for key in [key for key, value in message.items() if value is None]:
            del message[key]
        reasoning = next((message[key] for key in _REASONING_KEYS if key in message), None)
        if reasoning is not None:  # the order of keys shows in templates that print messages as JSON
            chat[index] = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return chat


def _describe_tools(tools: Any) -> Any:
    if not isinstance(tools, list | tuple):
        return tools
    return [get_json_schema(tool) if callable(tool) else tool for tool in tools]


def _read_mappings(what: str, values: Any) -> Any:
    """Copy a list of mappings as plain JSON values; None stays None."""
    if values is None:
        return None
    if not isinstance(values, list | tuple):
        raise InputError(f"{what} is {_short(values)}; expected a list of mappings; wrap a single one in a list")
    for index, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise InputError(f"{what}[{index}] is {_short(value)}; expected a mapping such as a dict")
    return [_plain(value, f"{what}[{index}]") for index, value in enumerate(values)]


def _plain(value: Any, where: str) -> Any:
    """Copy JSON values as exact built-in types: methods of a subclass are no business of an untrusted template."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        return {_plain(key, f"a key of {where}"): _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list | tuple):
        copied = [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(copied) if isinstance(value, tuple) else copied
    raise InputError(f"{where} is {_short(value)}; expected JSON values; convert it to str or numbers first")


def _mark_final_message(name: str, text: str, chat: list[dict[str, Any]], field: str) -> str:
    """Put the mark behind the text to continue, in place, and return that text."""
    last = chat[-1]
    content = last.get(field)
    # Reasoning stands in the message under several names; the template may read any of them.
    fields = [key for key in _REASONING_KEYS if last.get(key) == content] if field in _REASONING_KEYS else [field]
    if content is None:
        raise InputError(
            f"continue_final_message is set and the last message has no {field!r}; expected text to continue; "
            "add it, or set add_generation_prompt instead"
        )
    if not any(key in text for key in fields):
        raise InputError(
            f"continue_final_message is {field!r}; expected a field that chat template {name!r} reads; "
            "it does not mention this one"
        )
    if isinstance(content, str):
        last.update(dict.fromkeys(fields, content + _CONTINUE_MARK))
        return content
    blocks = content if isinstance(content, list | tuple) else ()
    for block in reversed(blocks):
        if isinstance(block, dict) and isinstance(block.get("text"), str):
            final: str = block["text"]
            block["text"] = final + _CONTINUE_MARK
            return final
    raise InputError(
        f"continue_final_message is set and {field!r} of the last message is {_short(content)}; expected a str or a "
        "list with a text block; there is nothing to continue"
    )


def _cut_at_mark(name: str, final: str, rendered: str) -> str:
    mark = _CONTINUE_MARK.strip()
    at = rendered.rfind(mark)
    kept = rendered[: max(at, 0)]
    if not rendered.startswith(_CONTINUE_MARK, at):
        kept = kept.rstrip()  # the template trims messages, and would have trimmed this one but for the mark
    kept = kept.replace(_CONTINUE_MARK, "").replace(mark, "")
    # A mark in other letters is a template that changes what it is given, e.g. with `| title`.
    if at < 0 or final.strip() not in rendered or mark.casefold() in kept.casefold():
        raise TokenizerError(
            f"chat template {name!r} leaves out or changes the last message ({_short(final)}); expected it whole in "
            "the prompt, to continue it; use add_generation_prompt, or another template"
        )
    return kept


def _render(name: str, text: str, variables: Mapping[str, Any]) -> str:
    try:
        return _compile(text).render(variables)
    except Exception as error:  # the template's own code can raise anything a Python expression can
        line = getattr(error, "lineno", None) or _line_of(error)
        place = f"chat template {name!r}" + (f", line {line}" if line else "")
        raise TokenizerError(
            f"{place}: {type(error).__name__}: {error}; expected a template that renders these messages; "
            "check the order and fields of the messages, or pass another chat_template"
        ) from error


def _line_of(error: BaseException) -> int | None:
    """Find the template line that raised: jinja2 rewrites tracebacks so that they count the template's own lines."""
    line, frame = None, error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == "<template>":
            line = frame.tb_lineno
        frame = frame.tb_next
    return line


@lru_cache(maxsize=64)
def _compile(text: str) -> Template:
    return _environment().from_string(text)


@cache
def _environment() -> Environment:
    """Build the sandbox with everything transformers gives a chat template."""
    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """`{% generation %}` marks what the assistant said, for training masks; here it renders its body."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            # A call block, not the bare body: what the body sets must stay inside, as it does in transformers.
            return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    def check_name(key: object) -> None:
        if isinstance(key, str) and key.startswith("_"):
            raise SecurityError(f"namespace attribute {key!r}; expected a name without a leading underscore")

    class GuardedNamespace(Namespace):
        """`namespace(...)` without underscore names, which would be a way to Python's internals."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # no named self: a template may set an attribute of that name
            self, *rest = args
            attributes = dict(*rest, **kwargs)
            for key in attributes:
                check_name(key)
            Namespace.__init__(self, attributes)

        def __setitem__(self, key: str, value: Any) -> None:
            check_name(key)
            super().__setitem__(key, value)

    class PlainDict:
        """`dict(...)` and `dict.fromkeys` without the class itself, whose attributes lead out of the sandbox."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    # jinja2's own filter escapes <, > and & for HTML. Parameters in transformers' order: templates pass them by place.
    def tojson(
        value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(pattern: str) -> str:
        return datetime.now().strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
        "namespace": GuardedNamespace,
        "dict": PlainDict(),
    }
    return environment


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TokenizerError(f"{path} cannot be read ({error}); expected UTF-8 text; download it again") from error


def _short(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"

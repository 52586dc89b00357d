"""Chat templates are found, chosen, rendered in the sandbox, and their failures name template and line."""

import json
from enum import StrEnum

import pytest

from arcee_mlx.checkpoint.chat_template import read_chat_templates, render_chat
from arcee_mlx.checkpoint.function_schema import get_json_schema
from arcee_mlx.errors import InputError, TokenizerError

USER = [{"role": "user", "content": "hi"}]
DIALOGUE = [*USER, {"role": "assistant", "content": "Well, "}]
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TRIMMING = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"


def render(template, messages=USER, **options):
    return render_chat({"default": template}, messages, **options)


def write_templates(folder, default=None, **others):
    if default is not None:
        (folder / "chat_template.jinja").write_text(default, encoding="utf-8")
    for name, text in others.items():
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(text, encoding="utf-8")
    return folder


def test_template_files_replace_the_ones_in_tokenizer_config(tmp_path):
    stored = {"chat_template": [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]}
    assert read_chat_templates(tmp_path, {}) == {}
    assert read_chat_templates(tmp_path, {"chat_template": "a"}) == {"default": "a"}
    assert read_chat_templates(tmp_path, stored) == {"default": "a", "rag": "b"}
    write_templates(tmp_path, tool_use="t")
    assert read_chat_templates(tmp_path, stored) == {"tool_use": "t"}
    write_templates(tmp_path, default="é")
    assert read_chat_templates(tmp_path, stored) == {"default": "é", "tool_use": "t"}


@pytest.mark.parametrize("wrong", [7, ["a"], [{"name": "a"}], [{"name": "a", "template": None}], {"a": 1}])
def test_a_stored_template_of_another_shape_names_the_file(tmp_path, wrong):
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat_template"):
        read_chat_templates(tmp_path, {"chat_template": wrong})


def test_a_template_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja cannot be read"):
        read_chat_templates(tmp_path, {})


def test_tools_pick_the_tool_template_and_a_name_or_text_picks_any():
    templates = {"default": "d", "tool_use": "t", "rag": "r"}
    assert render_chat(templates, USER) == "d"
    assert render_chat(templates, USER, tools=[]) == "t"
    assert render_chat(templates, USER, tools=[], chat_template="rag") == "r"
    assert render_chat(templates, USER, chat_template="{{ messages[0].content }}!") == "hi!"
    assert render_chat({}, USER, chat_template="{{ messages | length }}") == "1"


def test_templates_without_a_default_must_be_named():
    with pytest.raises(TokenizerError, match="are rag, tool_use; expected one called default"):
        render_chat({"rag": "r", "tool_use": "t"}, USER)
    with pytest.raises(TokenizerError, match="no chat template"):
        render_chat({}, USER)


def test_a_mistyped_template_name_is_not_taken_for_a_template():
    with pytest.raises(InputError, match=r"'rga'; expected one of .*\(default, rag\)"):
        render_chat({"default": "d", "rag": "r"}, USER, chat_template="rga")


def test_blocks_leave_no_blank_lines():
    assert render("  {% if true %}\nx\n  {% endif %}\ny") == "x\ny"


def test_loops_can_break_and_continue():
    template = "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}"
    assert render(template + "{{ i }}{% endfor %}") == "013"


def test_a_generation_block_renders_its_body_in_its_own_scope():
    template = (
        "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{{ messages[0].content }}{% endgeneration %}{{ a }}"
    )
    assert render(template) == "2hi1"


def test_tojson_keeps_html_characters_and_all_of_unicode():
    template = "{{ tools | tojson }} {{ tools[0] | tojson(indent=1) }} {{ tools[0] | tojson(true) }}"
    tool = {"b": "<é>&'", "a": 1}
    compact, indented, escaped = (json.dumps(tool, ensure_ascii=False), json.dumps(tool, indent=1), json.dumps(tool))
    indented = json.dumps(tool, indent=1, ensure_ascii=False)
    assert render(template, tools=[tool]) == f"[{compact}] {indented} {escaped}"
    assert render("{{ tools[0] | tojson(sort_keys=true, separators=(',', ':')) }}", tools=[{"b": 1, "a": 2}]) == (
        '{"a":2,"b":1}'
    )


def test_the_clock_is_formatted():
    assert render("{{ strftime_now('%Y') | length }}{{ strftime_now('!') }}") == "4!"


def test_variables_reach_the_template():
    shown = render("{{ bos_token }}{{ thinking }}", template_variables={"bos_token": "<s>", "thinking": False})
    assert shown == "<s>False"
    with pytest.raises(InputError, match="template_variables has messages, tools"):
        render("", template_variables={"tools": [], "messages": []})


def test_documents_reach_the_template():
    template = "{% for d in documents %}{{ d.title }}: {{ d.text }}{% endfor %}"
    assert render(template, documents=[{"title": "A", "text": "b"}]) == "A: b"


def test_what_is_absent_is_none():
    assert render("{{ tools is none and documents is none and not add_generation_prompt }}") == "True"


def test_none_in_a_message_is_a_missing_key():
    message = {"role": "assistant", "content": None, "tool_calls": None}
    assert render("{{ messages[0] | length }}{{ messages[0].content is defined }}", [message]) == "1False"


def test_reasoning_is_found_under_each_of_its_names():
    template = "{{ messages[0].reasoning_content }}/{{ messages[0].thinking }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert render(template, [{"role": "assistant", "content": "x", name: "why"}]) == "why/why"


def test_the_callers_messages_stay_as_they_are():
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}], "reasoning": "r", "name": None}]
    before = json.dumps(messages)
    render("{{ messages[0].content[0].text }}", messages, continue_final_message=True)
    assert json.dumps(messages) == before


def test_a_template_cannot_change_or_leave_its_sandbox():
    for attack in (
        "{{ ''.__class__.__mro__ }}{{ ().__class__.__bases__[0].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ dict.__class__.__init__.__globals__ }}",
        "{{ namespace.__init__.__globals__ }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ strftime_now.__globals__.json }}",
        "{% for i in range(10000000) %}{% endfor %}",
    ):
        with pytest.raises(TokenizerError, match="chat template 'default', line 1: "):
            render(attack)


def test_namespaces_and_dicts_work():
    template = "{% set ns = namespace(n=0, self=1) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    assert render(template + "{{ ns.n }}{{ ns.self }}{{ dict(a=1).a }}{{ dict.fromkeys('a', 2).a }}") == "1112"


def test_values_reach_the_template_as_plain_types():
    class Shouted(str):
        def upper(self):
            raise AssertionError("a template must not run the caller's methods")

    class Role(StrEnum):
        USER = "user"

    message = {"role": Role.USER, "content": Shouted("hi"), "parts": (1, 2.5, True)}
    assert render("{{ messages[0].role }}{{ messages[0].content.upper() }}{{ messages[0].parts }}", [message]) == (
        "userHI(1, 2.5, True)"
    )


def test_a_value_that_is_not_json_is_refused_by_place():
    with pytest.raises(InputError, match=r"messages\[0\]\['content'\]\[0\]\['image'\] is bytes"):
        render("", [{"role": "user", "content": [{"type": "image", "image": b"..."}]}])


@pytest.mark.parametrize(
    ("template", "line", "reason"),
    [
        ("\n\n{% if %}", 3, "TemplateSyntaxError"),
        ("\n{{ messages | no_such_filter }}", 2, "no_such_filter"),
        ("{{ '' }}\n{{ nothing.at_all }}\n", 2, "'nothing' is undefined"),
        ("\n\n\n{{ raise_exception('Roles must alternate!') }}", 4, "Roles must alternate!"),
        ("{% macro m(x) %}\n{{ x + 1 }}{% endmacro %}\n\n{{ m('a') }}", 2, "TypeError"),
        ("\n{{ ''.__class__.__mro__ }}", 2, "unsafe"),
        ("\n{{ nothing | tojson }}", 2, "Undefined"),
    ],
)
def test_a_failing_template_is_named_with_its_line_and_reason(template, line, reason):
    with pytest.raises(TokenizerError, match=f"chat template 'default', line {line}: .*{reason}"):
        render(template)
    with pytest.raises(TokenizerError, match="chat template 'given', line"):
        render("{{ unused }}", chat_template=template)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages is empty"),
        (None, "messages is None"),
        ("hi", "messages is str"),
        ({"role": "user", "content": "hi"}, "messages is dict"),
        ([*USER, "hi"], r"messages\[1\] is str"),
        ([{"content": "hi"}], r"messages\[0\]\['role'\] is NoneType"),
        ([{"role": 1, "content": "hi"}], r"messages\[0\]\['role'\] is int"),
        ([{"role": "user", "content": 7}], r"messages\[0\]\['content'\] is int"),
        ([{"role": "user", "content": {"text": "a"}}], r"messages\[0\]\['content'\] is dict"),
    ],
)
def test_messages_of_another_shape_are_refused_by_place(messages, reason):
    with pytest.raises(InputError, match=reason):
        render(CHATML, messages)


def test_a_function_as_a_tool_is_its_schema():
    def add(x: int, y: int = 1) -> int:
        """Add numbers.

        Args:
            x: One.
            y: Another.
        """

    shown = json.loads(render("{{ tools | tojson }}", tools=[add]))
    assert shown == [get_json_schema(add)]
    assert shown[0]["function"]["parameters"]["required"] == ["x"]


def test_tools_and_documents_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"tool weather has no docstring"):
        render(CHATML, tools=[lambda_named("weather")])
    with pytest.raises(InputError, match=r"tools is dict"):
        render(CHATML, tools={"type": "function"})
    with pytest.raises(InputError, match=r"documents\[0\] is str"):
        render(CHATML, documents=["text"])


def lambda_named(name):
    def function(city: str) -> str: ...

    function.__name__ = name
    return function


def test_the_generation_prompt_opens_the_next_message():
    assert render(CHATML, add_generation_prompt=True) == "<|user|>hi<|end|>\n<|assistant|>"


def test_continuing_ends_the_prompt_inside_the_last_message():
    assert render(CHATML, DIALOGUE, continue_final_message=True) == "<|user|>hi<|end|>\n<|assistant|>Well, "
    assert render(TRIMMING, DIALOGUE, continue_final_message=True) == "[hi][Well,"


def test_continuing_a_list_of_blocks_goes_on_with_its_last_text():
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}, {"type": "image"}]
    template = "{% for b in messages[-1].content %}{{ b.text }};{% endfor %}"
    assert render(template, [{"role": "assistant", "content": blocks}], continue_final_message=True) == "a;b"


def test_continuing_the_reasoning_works_under_the_name_the_template_reads():
    message = {"role": "assistant", "content": "x", "reasoning": "because"}
    for name in ("reasoning", "reasoning_content"):
        shown = render("<t>{{ messages[-1].thinking }}</t>", [message], continue_final_message=name)
        assert shown == "<t>because"


def test_a_message_printed_twice_is_continued_at_the_end_and_keeps_no_mark():
    template = "{{ messages[-1].content }}|{{ messages[-1].content | trim }}|"
    assert render(template, DIALOGUE, continue_final_message=True) == "Well, |Well,"


@pytest.mark.parametrize(
    ("template", "messages", "options", "kind", "reason"),
    [
        (CHATML, DIALOGUE, {"add_generation_prompt": True}, InputError, "both set"),
        (CHATML, [{"role": "assistant", "content": None}], {}, InputError, "has no 'content'"),
        (CHATML, DIALOGUE, {"continue_final_message": "thought"}, InputError, "has no 'thought'"),
        ("{{ messages }}", DIALOGUE, {}, InputError, "does not mention"),
        (CHATML, [{"role": "assistant", "content": [{"type": "image"}]}], {}, InputError, "nothing to continue"),
        ("{{ messages[0].content }}", DIALOGUE, {}, TokenizerError, "leaves out or changes the last message"),
        (
            "{{ messages[-1].content | title }}{{ messages[-1].content }}",
            DIALOGUE,
            {},
            TokenizerError,
            "changes the last",
        ),
        ("{{ messages[-1].content | upper }}", DIALOGUE, {}, TokenizerError, "leaves out or changes the last message"),
    ],
)
def test_what_cannot_be_continued_is_an_error(template, messages, options, kind, reason):
    with pytest.raises(kind, match=reason):
        render(template, messages, **{"continue_final_message": True, **options})

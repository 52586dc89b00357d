"""Chat templates as models carry them, conversations, and the options a prompt is rendered with."""

TEMPLATES = {
    "chatml": """{%- for message in messages -%}
    {{ '<|im_start|>' + message['role'] + '\n' + message['content'] | string + '<|im_end|>' + '\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "dated headers and tools": """{{- bos_token }}
{%- set today = strftime_now("%d %b %Y") if strftime_now is defined else "some day" %}
{%- if messages[0].role == 'system' %}
    {%- set system = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}
    {%- set system = "" %}{% set rest = messages %}
{%- endif %}
<header>system</header>
Today is {{ today }}.
  {% if tools is not none %}
You can call:
    {%- for tool in tools %}

{{ tool | tojson(indent=4) }}
    {%- endfor %}
  {% endif %}
{{ system }}{{ eos_token }}
{%- for message in rest %}
    {%- if message.tool_calls is defined %}
{{- '<header>' ~ message.role ~ '</header>' ~ (message.tool_calls[0].function | tojson) ~ eos_token }}
    {%- else %}
{{- '<header>' ~ message.role ~ '</header>\n\n' ~ (message.content | trim) ~ eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<header>assistant</header>\n\n' }}{% endif %}""",
    "strict alternation": """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}
{% endif %}
{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]
{% else %}{{ message['content'] + eos_token }}{% endif %}
{% endfor %}""",
    "namespace, macro and loop control": """{%- macro show(role, text) -%}
    <{{ role }}>{{ text }}</{{ role }}>
{%- endmacro -%}
{%- set ns = namespace(seen=0, last=-1) -%}
{%- for message in messages -%}
    {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
    {%- set ns.seen = ns.seen + 1 -%}{%- set ns.last = loop.index0 -%}
    {{ show(message.role, message.content) }}
    {%- if ns.seen >= 4 -%}{%- break -%}{%- endif -%}
{%- endfor -%}
{{ '\n' }}{{ ns.seen }}/{{ ns.last }}{% if add_generation_prompt %}<assistant>{% endif %}""",
    "generation": """{% for message in messages %}
{% if message.role == 'assistant' %}
{% set prefix = 'A: ' %}
{% generation %}
{% set prefix = 'B: ' %}
{{ prefix + message.content }}
{% endgeneration %}
{{ prefix }}
{% else %}
Q: {{ message.content }}
{%- endif +%}
{% endfor %}
   {%- if add_generation_prompt %} A:{% endif %}""",
    "json of everything": """{{ messages | tojson }}
{{ tools | tojson(ensure_ascii=True) }}{{ documents | tojson(separators=(',', ':'), sort_keys=true) }}
{%- if add_generation_prompt %} -> {% endif %}{{ [1.5, none, true, '<é&>'] | tojson(indent=2) }}""",
    "documents": """{% if documents %}{% for doc in documents %}
Document {{ loop.index }}: {{ doc['title'] | default('untitled') | upper }}
{{ doc.text | wordcount }}: {{ doc.text }}
{% endfor %}{% endif %}{% for message in messages %}{{ message.content }}
{% endfor %}""",
    "default filters": """{% for m in messages | rejectattr('role', 'equalto', 'system') | list %}
{{ m.role | capitalize | replace('U', 'u') }}={{ m.content | default('nothing', true) | trim | title }}
{{- ' (last)' if loop.last else ' (' ~ loop.revindex ~ ' left)' }}
{% endfor %}
{{ messages | map(attribute='role') | join(', ') }}; {{ messages | selectattr('name', 'defined') | list | length }}
{{ dict(a=1, b=[2]).items() | list }} {{ range(3) | sum }} {{ thinking | default(false) }}
{%- for key, value in (messages[0] | dictsort) %}|{{ key }}:{{ value }}{% endfor %}""",
    "reasoning": """{% for message in messages %}
{% if message.reasoning_content %}<think>{{ message.reasoning_content }}</think>{% endif %}
{{ message.content }}{{ message.thinking if message.thinking is defined }}
{% endfor %}{% if enable_thinking %}<think>{% endif %}""",
    "blocks": """{% for message in messages %}{{ message.role }}:
{% if message.content is string %}{{ message.content }}{% else %}
{% for block in message.content %}{% if block.type == 'text' %}{{ block.text }}{% else %}[{{ block.type }}]{% endif %}
{% endfor %}{% endif %};
{% endfor %}""",
    "system inside the first user turn (Llama 2)": """{% if messages[0]['role'] == 'system' %}
{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}
{% else %}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}
{% for message in loop_messages %}
{% if loop.index0 == 0 and system_message != false %}
{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + message['content'] | string %}
{% else %}{% set content = message['content'] | string %}{% endif %}
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}
{% endfor %}""",
    "renamed roles (Gemma)": """{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}
{% else %}{% set role = message['role'] %}{% endif %}
{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}""",
    "role markers on lines (Zephyr)": """{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] | string + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] | string + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n'  + message['content'] | string + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}""",
    "tool calls in XML (Hermes, Qwen)": """{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n\n<tools>' }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.content is string %}{{- '\n' + message.content }}{%- endif %}
    {%- if message.tool_calls %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}{{- tool_call.name }}{{- '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{{ ns.last_query_index }}{%- endif %}""",
}

CALL = {"type": "function", "function": {"name": "wetter", "arguments": {"ort": "Köln"}}}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Hallo, wie geht's? <ok> & 東京"}],
    "two turns": [
        {"role": "user", "content": " hi \n"},
        {"role": "assistant", "content": "Hello there "},
    ],
    "system and trailing newline": [
        {"role": "system", "content": "Be brief.", "name": None},
        {"role": "user", "content": "Why?", "name": "Ann"},
        {"role": "assistant", "content": "Because\n\n"},
    ],
    "tool call": [
        {"role": "user", "content": "Wetter?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "7 °C"},
    ],
    "reasoning": [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "4", "reasoning": "two and two"},
    ],
    "blocks": [
        {"role": "user", "content": [{"type": "text", "text": "look "}, {"type": "image"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "cat "}]},
    ],
    "unicode": [{"role": "user", "content": "🙂\u2028\u00a0é\u0301 "}, {"role": "assistant", "content": "👩‍💻"}],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "wetter",
        "description": "Wetter für einen Ort <heute>",
        "parameters": {"type": "object", "properties": {"ort": {"type": "string"}}, "required": ["ort"]},
    },
}
OPTIONS = {
    "plain": {},
    "generation prompt": {"add_generation_prompt": True},
    "continued": {"continue_final_message": True},
    "continued reasoning": {"continue_final_message": "reasoning"},
    "both": {"add_generation_prompt": True, "continue_final_message": True},
    "tools and documents": {"tools": [TOOL], "documents": [{"title": "É", "text": "a b"}, {"text": "c"}]},
}
VARIABLES = {"enable_thinking": True, "eos_token": "</s>"}

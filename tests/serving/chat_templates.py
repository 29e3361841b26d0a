"""Chat templates with tools, in the form of the real ones.

trl ships those of Qwen, Llama and others. The ones here were rebuilt by hand: what they say at
length is left out, what they do with tools, calls and results is as in the originals.
"""

import importlib.util
from pathlib import Path

# Mistral 7B v0.3, Nemo, Small 3.1: calls in a list, ids of nine characters.
_MISTRAL_LIST = (
    "[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}, '
    '"id": "{{ c.id }}"}{{ ", " if not loop.last }}{% endfor %}]'
)
_MISTRAL_LIST_RESULT = '{"content": {{ m.content | tojson }}, "call_id": "{{ m.tool_call_id }}"}'
# Ministral 3, Magistral, Devstral: the name before the arguments; the tools before all messages.
_MISTRAL_ARGS = (
    "{{ m.content }}{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}[ARGS]"
    "{% if c.function.arguments is string %}{{ c.function.arguments or '{}' }}"
    "{% else %}{{ c.function.arguments | tojson }}{% endif %}{% endfor %}"
)
# Small 3.2: an id between them.
_MISTRAL_CALL_ID = (
    "{% for c in m.tool_calls %}[TOOL_CALLS]{{ c.function.name }}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
    "[CALL_ID]{{ c.id }}[ARGS]{{ c.function.arguments | tojson }}{% endfor %}"
)


def _mistral(calls: str, result: str) -> str:
    return (
        "{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]"
        "{% elif m.tool_calls is defined %}" + calls + "<|im_end|>"
        '{% elif m.role == "tool" %}[TOOL_RESULTS] ' + result + "[/TOOL_RESULTS]"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )


def _smollm3(tools: str) -> str:
    """SmolLM3 tells the model how to call; of messages it writes the text alone."""
    return (
        "<|im_start|>system\n{% if " + tools + " %}### Tools\n\n<tools>\n"
        "{% for tool in " + tools + "[:] %}{{ tool | string }}\n{% endfor %}</tools>\n\n"
        "For each call:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>\n\n{% endif %}'
        "<|im_end|>\n{% for m in messages %}"
        "{% set content = m.content if m.content is string else '' %}"
        "{% if m.role == 'user' %}<|im_start|>user\n{{ content }}<|im_end|>\n"
        "{% elif m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
        "{{ content.lstrip('\n') }}<|im_end|>\n{% endgeneration %}"
        "{% elif m.role == 'tool' %}<|im_start|>user\n{{ content }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def _granite(tools: str) -> str:
    """Granite 3 tells the model how to call; of messages it writes the text alone."""
    return (
        "<|start_of_role|>system<|end_of_role|>You are Granite.{% if " + tools + " %} Respond only "
        "with <|tool_call|> followed by a JSON list of tools used.{% endif %}<|end_of_text|>\n"
        "{% if " + tools + " %}<|start_of_role|>available_tools<|end_of_role|>"
        "{{ " + tools + " | tojson(indent=4) }}<|end_of_text|>\n{% endif %}{% for m in messages %}"
        "<|start_of_role|>{{ m['role'] }}<|end_of_role|>{{ m['content'] }}<|end_of_text|>\n"
        "{% if loop.last and add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>"
        "{% endif %}{% endfor %}"
    )


# Command R7B, A: calls and results are numbered from the beginning of the conversation.
_COHERE = """\
{% set count = namespace(calls=0, results=0) -%}
<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|># System Preamble
{% if tools %}## Available Tools
[
{% for tool in tools %}
    {"name": "{{ tool['function']['name'] }}", "description": \
"{{ tool['function']['description'] }}", "parameters": \
{{ tool['function']['parameters'] | tojson }}, "responses": null}{% if not loop.last %},{% endif %}

{% endfor %}
]{% endif %}<|END_OF_TURN_TOKEN|>
{%- for m in messages %}
    {%- if m.role == 'user' %}
<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{{ m.content }}<|END_OF_TURN_TOKEN|>
    {%- elif m.role == 'assistant' %}
<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% if m.tool_calls %}<|START_THINKING|>\
{{ m.reasoning_content }}<|END_THINKING|><|START_ACTION|>[
    {% for c in m.tool_calls %}
    {"tool_call_id": "{{ count.calls }}", "tool_name": "{{ c['function']['name'] }}", \
"parameters": {{ c['function']['arguments'] | tojson }}}{% if not loop.last %},{% endif %}

    {% set count.calls = count.calls + 1 %}
    {% endfor %}
]<|END_ACTION|><|END_OF_TURN_TOKEN|>{% else %}<|START_RESPONSE|>{{ m.content }}\
<|END_RESPONSE|><|END_OF_TURN_TOKEN|>{% endif %}
    {%- elif m.role == 'tool' %}
<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[
    {"tool_call_id": "{{ count.results }}", "results": {"0": {{ m.content | tojson }}}}
]<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>
    {%- set count.results = count.results + 1 %}
    {%- endif %}
{%- endfor %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"""
# Seed-OSS: arguments between tags; lists and objects as Python prints them.
_SEED = (
    "{% if tools %}<seed:bos>system\n{% for item in tools %}Function:\ndef "
    "{{ item.function.name }}(): {{ item.function.description }}\n{% endfor %}<seed:eos>"
    "{% endif %}{% for m in messages %}{% if m.role == 'assistant' and m.tool_calls is defined %}"
    "<seed:bos>assistant{% for c in m.tool_calls %}\n<seed:tool_call>\n"
    "<function={{ c.function.name }}>\n{% for key, value in c.function.arguments | items %}"
    "<parameter={{ key }}>{{ value if value is string else value | string }}</parameter>\n"
    "{% endfor %}</function>\n</seed:tool_call>{% endfor %}<seed:eos>{% else %}"
    "<seed:bos>{{ m.role }}\n{{ m.content }}<seed:eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<seed:bos>assistant\n{% endif %}"
)

# OLMo 3: calls of Python; results are what the environment says.
_OLMO = (
    "{% if tools %}<|im_start|>system\n<functions>{{ tools | tojson }}</functions> Calls stand "
    "within <function_calls></function_calls>.<|im_end|>\n{% endif %}{% for m in messages %}"
    "{% if m.role == 'assistant' %}<|im_start|>assistant\n{{ m.content if m.content }}"
    "{% if m.tool_calls %}<function_calls>{% for c in m.tool_calls %}{{ c.function.name }}("
    "{% for key, value in c.function.arguments | items %}{{ key }}={{ value | tojson }}"
    "{{ ', ' if not loop.last }}{% endfor %}){{ '\n' if not loop.last }}{% endfor %}"
    "</function_calls>{% endif %}<|im_end|>\n{% elif m.role == 'tool' %}"
    "<|im_start|>environment\n{{ m.content }}<|im_end|>\n{% else %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


BY_HAND = {
    "olmo": _OLMO,
    "granite": _granite("tools"),
    "cohere": _COHERE,
    "seed": _SEED,
    "mistral": _mistral(_MISTRAL_LIST, _MISTRAL_LIST_RESULT),
    "mistral_args": _mistral(_MISTRAL_ARGS, "{{ m.content }}"),
    "mistral_call_id": _mistral(
        _MISTRAL_CALL_ID, "{{ m.tool_call_id }}[TOOL_CONTENT]{{ m.content }}"
    ),
    "smollm3": _smollm3("xml_tools"),
    "smollm3_tools": _smollm3("tools"),
}


def chat_template(name: str) -> str:
    """Return one of `BY_HAND`, or one that trl ships."""
    if name in BY_HAND:
        return BY_HAND[name]
    [folder] = importlib.util.find_spec("trl").submodule_search_locations or []  # type: ignore[union-attr]  # a dependency of the tests
    return (Path(folder) / "chat_templates" / f"{name}.jinja").read_text()

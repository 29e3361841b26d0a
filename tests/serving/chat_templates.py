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


BY_HAND = {
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

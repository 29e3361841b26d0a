"""Which chat templates have tools, and in which form."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from registry.chat import ChatEncoder
from serving.calls import (
    COHERE,
    GRANITE,
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    OLMO,
    SEED,
    TAGS,
    CallFormat,
)
from serving.template import ask_template
from serving.tokens import ChatMessage, ToolCall
from tests import tiny
from tests.serving.chat_templates import chat_template


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    base = tiny.make_base(tmp_path_factory.mktemp("templates") / "base", layers=1)
    return AutoTokenizer.from_pretrained(base)


@pytest.mark.parametrize(
    ("name", "form", "several"),
    [
        ("qwen2_5", HERMES, True),
        ("qwen3", HERMES, True),
        ("qwen3_instruct_2507", HERMES, True),
        ("llama3_1", LLAMA, False),
        ("llama3_2", LLAMA, False),
        ("mistral", MISTRAL, True),
        ("mistral_args", MISTRAL_ARGS, True),
        ("mistral_call_id", MISTRAL_ARGS, True),
        ("smollm3", HERMES, True),
        ("smollm3_tools", HERMES, True),
        ("granite", GRANITE, True),
        ("cohere", COHERE, True),
        ("qwen3_5_think", TAGS, True),
        ("qwen3_5_nothink", TAGS, True),
        ("qwen3_6", TAGS, True),
        ("seed", SEED, True),
        ("olmo", OLMO, True),
        ("llama3", None, False),  # no tools
        ("phi3", None, False),
        ("gemma3", None, False),
        ("glm4moe", None, False),  # tools, in another form
        ("gptoss", None, False),
    ],
)
def test_a_template_tells_its_own_form(
    tokenizer: PreTrainedTokenizerBase, name: str, form: CallFormat | None, several: bool
) -> None:
    tokenizer.chat_template = chat_template(name)
    found = ask_template(ChatEncoder(tokenizer))
    assert (found.form if found else None) == form
    assert (found.several if found else False) == several
    assert (found is not None and found.in_text) == name.startswith(("smollm3", "granite"))


@pytest.mark.parametrize(
    ("says", "instead"),
    [
        ("<tool_call>", "<call>"),  # teaches another form
        ("{% if xml_tools %}", "<tool_call>{% if xml_tools %}"),  # of something else
        ("{{ tool | string }}", ""),  # shows no tools
        ("m.role == 'tool'", "false"),  # drops results
        ("content.lstrip('\n')", "''"),  # drops what the assistant said
    ],
)
def test_a_template_that_writes_no_calls_has_tools_only_where_it_teaches_and_keeps_them(
    tokenizer: PreTrainedTokenizerBase, says: str, instead: str
) -> None:
    template = chat_template("smollm3")
    assert says in template
    tokenizer.chat_template = template.replace(says, instead)
    assert ask_template(ChatEncoder(tokenizer)) is None


def test_a_template_that_drops_what_a_tool_answers_has_none(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    template = chat_template("olmo")
    tokenizer.chat_template = template.replace("environment\n{{ m.content }}", "environment\n")
    assert tokenizer.chat_template != template
    assert ask_template(ChatEncoder(tokenizer)) is None


CALLS = (ToolCall("a", "f", {"x": "é"}), ToolCall("b", "g", {}))
IN_TEXT = {
    "hermes": (
        '<tool_call>\n{"name": "f", "arguments": {"x": "é"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    ),
    "granite": (
        '<|tool_call|>[{"name": "f", "arguments": {"x": "é"}}, {"name": "g", "arguments": {}}]'
    ),
}


@pytest.mark.parametrize("form", [HERMES, GRANITE], ids=lambda form: form.name)
@pytest.mark.parametrize("said", ["so", ""])
def test_calls_that_a_template_does_not_write_follow_the_text_of_their_message(
    form: CallFormat, said: str
) -> None:
    message = ChatMessage("assistant", said, CALLS).rendered(in_text=form)
    content = "".join(message.pop("content"))
    assert message == {"role": "assistant"}
    assert content == (f"{said}\n" if said else "") + IN_TEXT[form.name]


def test_only_the_marks_of_such_calls_are_control_tokens(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Granite's mark is one: a user who writes it, in a text or an argument, calls nothing."""
    tokenizer.chat_template = chat_template("granite")
    tokenizer.add_special_tokens({"additional_special_tokens": [GRANITE.opening]})
    mark = tokenizer.convert_tokens_to_ids(GRANITE.opening)
    assert isinstance(mark, int)
    calls = (ToolCall("a", "f", {"x": GRANITE.opening}),)
    message = ChatMessage("assistant", f"so {GRANITE.opening}", calls).rendered(in_text=GRANITE)
    ids = ChatEncoder(tokenizer).ids_of([{"role": "user", "content": "?"}, message])
    assert ids.count(mark) == 1
    before = str(tokenizer.decode(ids[: ids.index(mark)]))
    assert before.endswith(f"so {GRANITE.opening}\n"), "the one behind the text"

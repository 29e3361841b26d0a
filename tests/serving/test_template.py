"""Which chat templates have tools, and in which form: the real ones that trl ships."""

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from registry.chat import ChatEncoder
from serving.calls import HERMES, LLAMA, CallFormat
from serving.template import ask_template
from tests import tiny


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
        ("llama3", None, False),  # no tools
        ("phi3", None, False),
        ("gemma3", None, False),
        ("qwen3_5_think", None, False),  # tools, in another form
        ("glm4moe", None, False),
        ("gptoss", None, False),
    ],
)
def test_a_template_tells_its_own_form(
    tokenizer: PreTrainedTokenizerBase, name: str, form: CallFormat | None, several: bool
) -> None:
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    [folder] = spec.submodule_search_locations or []
    tokenizer.chat_template = (Path(folder) / "chat_templates" / f"{name}.jinja").read_text()
    found = ask_template(ChatEncoder(tokenizer))
    assert (found.form if found else None) == form
    assert (found.several if found else False) == several

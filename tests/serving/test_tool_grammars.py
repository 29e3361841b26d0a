"""The grammars of calls: what a base may write, token by token, in each family's format."""

import asyncio
from collections.abc import Iterator, Sequence

import pytest
from tokenizers import Tokenizer

from serving.calls import FORMATS, HERMES, LLAMA, MISTRAL_ARGS, CallFormat
from serving.engine.grammar import GrammarCompiler
from serving.tools import Tool, call_grammar
from tests import tiny

CITY = Tool(
    "city",
    {
        "type": "object",
        "properties": {"name": {"enum": ["Rome", "Oslo"]}},
        "required": ["name"],
        "additionalProperties": False,
    },
    strict=True,
)
ANY = Tool("any", {"type": "object"})
RIGHT, WRONG = '{"name": "Oslo"}', '{"name": "Bonn"}'
MARKS = [*("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>")]


@pytest.fixture(scope="module", params=["control tokens", "plain text"])
def tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Tokenizer:
    """Bytes, and the marks of calls as control tokens or not as tokens at all."""
    base = tiny.make_base(tmp_path_factory.mktemp("base") / "base", layers=1)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    if request.param == "control tokens":
        tokenizer.add_special_tokens(MARKS)  # type: ignore[arg-type]  # it takes strings, too
    return tokenizer


@pytest.fixture(scope="module")
def compiler(
    tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GrammarCompiler]:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    made = GrammarCompiler(folder, tokenizer.get_vocab_size(), frozenset({tiny.EOS_ID}))
    yield made
    made.close()


def special_id(tokenizer: Tokenizer, text: str) -> int | None:
    token_id = tokenizer.token_to_id(text)
    return token_id if text in MARKS else None


class Judge:
    """Says whether an output may be written under a grammar of calls, and may end there."""

    def __init__(self, compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
        self.compiler, self.tokenizer = compiler, tokenizer

    def takes(
        self,
        form: CallFormat,
        text: str,
        tools: Sequence[Tool] = (CITY, ANY),
        *,
        must: bool,
        many: bool,
    ) -> bool:
        grammar = call_grammar(
            form, tools, must=must, many=many, special_id=lambda t: special_id(self.tokenizer, t)
        )
        assert grammar is not None
        constraint = asyncio.run(self.compiler.start(grammar))
        ended = False
        for token_id in self.tokenizer.encode(text, add_special_tokens=False).ids:
            if ended or not constraint.allowed()[token_id]:
                return False
            ended = constraint.advance(token_id)
        return ended or bool(constraint.allowed()[tiny.EOS_ID])


@pytest.fixture(scope="module")
def judge(compiler: GrammarCompiler, tokenizer: Tokenizer) -> Judge:
    return Judge(compiler, tokenizer)


def call(form: CallFormat, *written: tuple[str, str]) -> str:
    """Write calls of (name, arguments) as the family does."""
    if form is MISTRAL_ARGS:
        return "".join(f"[TOOL_CALLS]{name}[ARGS]{said}" for name, said in written)
    objects = [f'{{"name": "{name}", "{form.arguments}": {said}}}' for name, said in written]
    if form is HERMES:
        return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects)
    return "; ".join(objects) if form is LLAMA else f"[TOOL_CALLS] [{', '.join(objects)}]"


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_what_must_be_a_call_is_one_and_nothing_else(judge: Judge, form: CallFormat) -> None:
    def takes(text: str, many: bool = True) -> bool:
        return judge.takes(form, text, must=True, many=many)

    assert takes(call(form, ("city", RIGHT)))
    assert takes(call(form, ("any", '{"x": [1, {}]}')))
    assert takes(call(form, ("city", RIGHT), ("any", "{}")))
    assert not takes(call(form, ("city", RIGHT), ("any", "{}")), many=False)
    assert takes(call(form, ("city", RIGHT)), many=False)
    assert not takes(call(form, ("city", WRONG)))
    assert not takes(call(form, ("nobody", "{}")))
    assert not takes("so: " + call(form, ("city", RIGHT)))
    assert not takes(call(form, ("city", RIGHT))[:-1])
    assert not takes("")


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.name)
def test_a_strict_tool_is_held_to_its_schema_where_the_model_decides(
    judge: Judge, form: CallFormat
) -> None:
    def takes(text: str, many: bool = True) -> bool:
        return judge.takes(form, text, must=False, many=many)

    assert takes("Just text: {}, [1] and <tags>.")
    assert takes("")
    assert takes(call(form, ("city", RIGHT)))
    assert takes(call(form, ("any", '{"x": 1}')))
    assert not takes(call(form, ("city", WRONG)))
    assert not takes(call(form, ("nobody", "{}")))
    assert takes(call(form, ("city", RIGHT), ("city", RIGHT)))
    assert not takes(call(form, ("city", RIGHT), ("city", WRONG)))
    assert not takes(call(form, ("city", RIGHT), ("city", RIGHT)), many=False)
    if not form.bare:
        assert takes("so: " + call(form, ("city", RIGHT)))
        assert not takes("so: " + call(form, ("city", WRONG)))


def test_a_call_may_have_an_id_of_nine_characters_where_the_family_has_them(judge: Judge) -> None:
    def takes(call_id: str) -> bool:
        text = f"[TOOL_CALLS]city[CALL_ID]{call_id}[ARGS]{RIGHT}"
        return judge.takes(MISTRAL_ARGS, text, must=True, many=True)

    assert takes("abc12EFGH")
    assert not takes("abc12EFG")
    assert not takes("")


def test_arguments_are_an_object_where_their_schema_does_not_say_so(judge: Judge) -> None:
    untyped = [Tool("city", {"properties": {"name": {"type": "string"}}}, strict=True)]
    for form in FORMATS:
        for must in (True, False):
            assert judge.takes(form, call(form, ("city", RIGHT)), untyped, must=must, many=False)
            assert not judge.takes(form, call(form, ("city", "7")), untyped, must=must, many=False)


def test_what_looks_like_a_control_token_in_a_tool_s_schema_stays_what_it_is(judge: Judge) -> None:
    name = {"const": "<[1]>", "maxLength": 5}
    tools = [Tool("city", {"type": "object", "properties": {"name": name}}, strict=True)]
    for form in FORMATS:
        text = call(form, ("city", '{"name": "<[1]>"}'))
        assert judge.takes(form, text, tools, must=True, many=False)


def test_free_calls_of_tools_that_are_not_strict_need_no_grammar() -> None:
    tools = [ANY, Tool("other", CITY.parameters)]
    for form in FORMATS:
        assert call_grammar(form, tools, must=False, many=True, special_id=lambda _: None) is None
        assert call_grammar(form, tools, must=False, many=False, special_id=lambda _: None)


def test_a_tool_that_is_not_strict_takes_any_object_where_the_model_decides(judge: Judge) -> None:
    loose = [Tool("city", CITY.parameters)]
    for form in FORMATS:
        text = call(form, ("city", WRONG))
        assert judge.takes(form, text, loose, must=False, many=False)
        assert not judge.takes(form, text, loose, must=True, many=False)

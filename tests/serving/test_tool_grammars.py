"""The grammars of calls: what a base may write, token by token, in each family's format."""

import asyncio
import json
from collections.abc import Iterator, Sequence
from typing import Any

import jsonschema
import pytest
from tokenizers import Tokenizer

from serving.calls import (
    FORMATS,
    HERMES,
    LLAMA,
    MISTRAL_ARGS,
    OLMO,
    SEED,
    TAGS,
    CallFormat,
    CallParser,
)
from serving.engine.boundary import GrammarRefused
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
MARKS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>"),
    *("<|tool_call|>", "<|START_ACTION|>", "<|END_ACTION|>"),
    *("<seed:tool_call>", "</seed:tool_call>", "<function_calls>", "</function_calls>"),
]


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
    if form.tagged:
        blocks = [tagged(form, name, json.loads(said)) for name, said in written]
        return "\n".join(f"{form.opening}\n{each}\n{form.closing}" for each in blocks)
    if form.python:
        calls = [python(name, json.loads(said)) for name, said in written]
        return form.opening + "\n".join(calls) + form.closing
    objects = [f'{{"{form.tool}": "{name}", "{form.arguments}": {said}}}' for name, said in written]
    if form.numbered:
        objects = [
            each.replace("{", f'{{"{form.numbered}": "{number}", ', 1)
            for number, each in enumerate(objects)
        ]
    if form is HERMES:
        return "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in objects)
    if form is LLAMA:
        return "; ".join(objects)
    return f"{form.opening} [{', '.join(objects)}]{form.closing}"


def python(name: str, arguments: dict[str, Any]) -> str:
    """Write a call as Python does, with values as JSON."""
    return f"{name}({', '.join(f'{key}={json.dumps(arguments[key])}' for key in arguments)})"


def tagged(form: CallFormat, name: str, arguments: dict[str, Any]) -> str:
    """Write a call with its arguments between tags: a string as it is, all else as JSON."""
    lines = [
        f"<parameter={key}>{form.padding}"
        f"{value if isinstance(value, str) else json.dumps(value)}{form.padding}</parameter>\n"
        for key, value in arguments.items()
    ]
    return f"<function={name}>\n{''.join(lines)}</function>"


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
            if not form.tagged and not form.python:  # there they cannot be anything else
                text = call(form, ("city", "7"))
                assert not judge.takes(form, text, untyped, must=must, many=False)


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


MEETING: dict[str, Any] = {
    "type": "object",
    "properties": {
        "é": {"type": "string", "description": "Any text."},
        "day": {"$ref": "#/$defs/Day"},
        "code": {"type": "string", "pattern": r"^[A-Z]{2}/\"\d<$", "maxLength": 6},
        "has": {"type": "string", "pattern": "b+", "minLength": 3},
        "hours": {"type": "array", "items": {"$ref": "#/$defs/Hour"}, "maxItems": 2},
        "note": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "level": {"enum": ["low", 3, None, True]},
        "free": {},
        "extra": {"type": "string"},
        "maybe": {"anyOf": [{"type": "string", "enum": ["a", "b"]}, {"type": "null"}]},
        "short": {"anyOf": [{"type": "string", "maxLength": 8}, {"type": "null"}]},
        "group": {"type": "string", "pattern": "^(a|b)$"},
        "one": {"allOf": [{"$ref": "#/$defs/Hour"}], "default": 5},
        "never": False,
        "mail": {"anyOf": [{"type": "string", "pattern": r"@\D*$"}, {"type": "null"}]},
        "longer": {"enum": ["a", "a\nb", "a<b"]},
        "classes": {"type": "string", "pattern": r"^\d[&]\[\w$"},
    },
    "required": ["day", "extra"],
    "$defs": {
        "Day": {"type": "string", "enum": ["Mon", "é\nTue"]},
        "Hour": {"type": "integer", "maximum": 23},
    },
}
DAY = {"day": "Mon", "extra": "x"}


@pytest.mark.parametrize("form", [TAGS, SEED], ids=lambda form: form.name)
@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        (DAY, True),
        ({}, False),
        ({"day": "Mon"}, False),
        ({"extra": "x", "day": "Mon"}, False),  # in another order
        ({"é": 'a\nb <b> "7" </par\n', **DAY}, True),
        ({**DAY, "day": "é\nTue"}, True),
        ({**DAY, "day": "Sun"}, False),
        ({"day": "Mon", "code": 'AB/"7<', "extra": "x"}, True),
        ({"day": "Mon", "code": 'AB/"77<', "extra": "x"}, False),
        ({"day": "Mon", "code": "AB", "extra": "x"}, False),
        ({"day": "Mon", "has": "abb", "extra": "x"}, True),
        ({"day": "Mon", "has": "aaa", "extra": "x"}, False),
        ({"day": "Mon", "has": "b", "extra": "x"}, False),
        ({"day": "Mon", "hours": [1, 23], "extra": "x"}, True),
        ({"day": "Mon", "hours": [24], "extra": "x"}, False),
        ({"day": "Mon", "hours": [1, 2, 3], "extra": "x"}, False),
        ({"day": "Mon", "note": None, "level": 3, "free": [1], "extra": "x"}, True),
        ({"day": "Mon", "note": "null and more", "level": None, "extra": "x"}, True),
        ({"day": "Mon", "level": True, "extra": "x"}, True),
        ({"day": "Mon", "level": "high", "extra": "x"}, False),
        ({"day": "Mon", "other": 1, "extra": "x"}, False),
        ({"day": "Mon", "extra": "x", "maybe": "a"}, True),
        ({"day": "Mon", "extra": "x", "maybe": None}, True),
        ({"day": "Mon", "extra": "x", "maybe": "c"}, False),
        ({"day": "Mon", "extra": "x", "short": "12"}, True),
        ({"day": "Mon", "extra": "x", "short": None}, True),
        ({"day": "Mon", "extra": "x", "short": "123456789"}, False),
        ({"day": "Mon", "extra": "x", "group": "b"}, True),
        ({"day": "Mon", "extra": "x", "group": "c"}, False),
        ({"day": "Mon", "extra": "x", "one": 5}, True),
        ({"day": "Mon", "extra": "x", "one": 24}, False),
        ({"day": "Mon", "extra": "x", "never": "x"}, False),
        ({"day": "Mon", "extra": "x", "mail": "a@b"}, True),
        ({"day": "Mon", "extra": "x", "mail": None}, True),
        ({"day": "Mon", "extra": "x", "mail": '"@"'}, True),
        ({"day": "Mon", "extra": "x", "mail": "ab"}, False),
        ({"day": "Mon", "extra": "x", "mail": "@2"}, False),
        ({"day": "Mon", "extra": "x", "longer": "a"}, True),
        ({"day": "Mon", "extra": "x", "longer": "a\nb"}, True),
        ({"day": "Mon", "extra": "x", "longer": "a<b"}, True),
        ({"day": "Mon", "extra": "x", "classes": "7&[_"}, True),
        ({"day": "Mon", "extra": "x", "classes": "٣&[_"}, False),
        ({"day": "Mon", "extra": "x", "classes": "7&[é"}, False),
    ],
)
def test_arguments_between_tags_follow_their_schema_and_are_read_back(
    judge: Judge, form: CallFormat, arguments: dict[str, Any], right: bool
) -> None:
    tool = Tool("meet", MEETING)
    text = call(form, ("meet", json.dumps(arguments)))
    assert judge.takes(form, text, [tool], must=True, many=False) == right
    if not right:
        return
    jsonschema.validate(arguments, MEETING)
    parser = CallParser(form, {"meet": MEETING})
    events = [*parser.push(text), *parser.finish()]
    assert not any(isinstance(event, str) for event in events)
    written = "".join(event.arguments for event in events if not isinstance(event, str))
    assert json.loads(written) == arguments


@pytest.mark.parametrize("form", [TAGS, SEED], ids=lambda form: form.name)
def test_a_call_without_its_opening_is_no_text_where_a_tool_is_strict(
    judge: Judge, form: CallFormat
) -> None:
    bare = tagged(form, "city", json.loads(WRONG))
    for many in (True, False):
        assert not judge.takes(form, bare, must=False, many=many)
        assert not judge.takes(form, f"so: {bare}", must=False, many=many)
        assert judge.takes(form, "so: <function=city <function=x>", must=False, many=many)
    right = call(form, ("city", RIGHT))
    assert not judge.takes(form, f"{right}\n{bare}", must=False, many=True)


def test_a_tool_that_says_nothing_of_its_arguments_takes_any_between_tags(judge: Judge) -> None:
    text = call(TAGS, ("any", '{"x y": "a", "b": {"c": 1}}'))
    assert judge.takes(TAGS, text, [ANY], must=True, many=False)
    closed = Tool("any", {"type": "object", "additionalProperties": False})
    assert not judge.takes(TAGS, text, [closed], must=True, many=False)
    assert judge.takes(TAGS, call(TAGS, ("any", "{}")), [closed], must=True, many=False)


CHAIN: dict[str, Any] = {
    "$defs": {
        "A": {"$ref": "#/$defs/B", "maxLength": 2},
        "B": {"type": "string"},
        "T": {"type": "object"},
    },
}
STRINGS = {"$defs": {"S": {"type": "string"}}}
LOOP = {
    "properties": {"a": {"$ref": "#/$defs/A"}},
    "$defs": {"A": {"anyOf": [{"$ref": "#/$defs/A"}, {"type": "null"}]}},
}
MANY_REFERENCES = {
    "properties": {f"p{n}": {"$ref": "#/$defs/I"} for n in range(200)},
    "$defs": {"I": {"type": "integer", "description": "x" * 1000}},
}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"anyOf": [{"required": ["a"]}]}, "'anyOf'"),
        ({"properties": {"a": {"type": ["string", "integer"]}}}, "'a'"),
        ({"properties": {"a": {"anyOf": [{"type": "string", "pattern": "x"}, {}]}}}, "'a'"),
        ({"properties": {"a": {"anyOf": [{"type": "string"}, {"enum": ["x"]}]}}}, "'a'"),
        ({"properties": {"a": {"oneOf": [{"type": "string"}, {"title": "x"}]}}}, "'oneOf'"),
        ({"properties": {"a": {"type": ["string", "null"], "anyOf": [{}]}}}, "'type'"),
        ({"properties": {"a": {"enum": ["1", 2]}}}, "'1'"),
        ({"properties": {"a": {"enum": ["True", False]}}}, "'True'"),
        ({"properties": {"a": {"anyOf": [{"enum": ["null"]}, {"type": "null"}]}}}, "'null'"),
        ({"properties": {"a": {"enum": ["a", "b"], "not": {"const": "a"}}}}, "'not'"),
        ({"properties": {"a": {"type": "string", "enum": [1]}}}, "no value"),
        ({"properties": {"a": {"enum": []}}}, "'a'"),
        ({"properties": {"a": {"type": 7}}}, "7"),
        ({"properties": {"a": {"type": "text"}}}, "text"),
        ({"properties": {"a": 7}}, "'a'"),
        ({"properties": {"a": {"$ref": "#/$defs/No"}}}, "not there"),
        ({"properties": {"a": {"$ref": "#/$defs/S", "maxLength": 2}}, **STRINGS}, "'maxLength'"),
        ({"properties": {"a": {"type": "array", "items": {"$ref": "#"}}}}, "'#'"),
        ({"properties": {"a": {"type": "array", "$defs": {}}}}, "definitions"),
        ({"properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/No"}}}}, "No"),
        ({"$ref": "#"}, "too often"),
        (CHAIN | {"properties": {"a": {"$ref": "#/$defs/A"}}}, "'maxLength'"),
        (CHAIN | {"properties": {"a": {"allOf": [{"$ref": "#/$defs/B", "not": {}}]}}}, "'not'"),
        (CHAIN | {"properties": {"a": {"$ref": "#/$defs/B", "allOf": [{}]}}}, "'allOf'"),
        (CHAIN | {"$ref": "#/$defs/T", "allOf": [{"required": ["b"]}]}, "'allOf'"),
        ({"properties": {"a": {"type": "string", "pattern": r"^[^\D]$"}}}, "brackets"),
        ({"$ref": "#/$defs/S", **STRINGS}, "object"),
        ({"properties": {"a": False}, "required": ["a"]}, "'a'"),
        ({"required": ["x"], "additionalProperties": False}, "'x'"),
        ({"additionalProperties": {"type": "integer"}}, "does not name"),
        ({"required": [7]}, "names"),
        ({"properties": {"a": {"type": "string", "minLength": True}}}, "minLength"),
        ({"properties": {"a": {"type": "string", "minLength": -5}}}, "minLength"),
        (LOOP, "'a'"),
        ({"properties": {"a": {"type": "integer", "description": "x" * 70_000}}}, "65536"),
        (MANY_REFERENCES, "65536"),
        ({"properties": {"a": {"type": "string", "not": {"const": "x"}}}}, "'not'"),
        ({"properties": {"a": {"not": {}}}}, "'not'"),
        ({"properties": {"a": {"type": "string", "pattern": "^a|b$"}}}, "pattern"),
        ({"properties": {"a": {"type": "string", "pattern": "a)(b"}}}, "parenthesis"),
        ({"properties": {"a": {"type": "string", "pattern": 7}}}, "pattern"),
        ({"properties": {"a": {"enum": ["</parameter>"]}}}, "</parameter>"),
        ({"properties": {"a>": {}}}, "'a>'"),
        ({"properties": {"": {}}}, "the name of ''"),
        ({"properties": [1]}, "properties"),
        ({"required": "a"}, "required"),
        ({"properties": {str(n): {} for n in range(257)}}, "257"),
    ],
)
def test_what_cannot_be_held_between_tags_is_refused(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(GrammarRefused) as refused:
        call_grammar(TAGS, [Tool("t", schema)], must=True, many=True, special_id=lambda text: None)
    assert says in str(refused.value)
    free = call_grammar(
        TAGS, [Tool("t", schema)], must=False, many=False, special_id=lambda text: None
    )
    assert free is not None, "what the model may write as it likes needs no schema"


def test_two_marks_in_brackets_are_no_sets_of_sets(judge: Judge) -> None:
    schema = {"properties": {"a": {"type": "string", "pattern": "^[&&a~~][[]$"}}}
    for text, right in (("&[", True), ("~[", True), ("a[", True), ("b[", False), ("a", False)):
        written = call(TAGS, ("t", json.dumps({"a": text})))
        assert judge.takes(TAGS, written, [Tool("t", schema)], must=True, many=False) == right


@pytest.mark.parametrize(
    ("pattern", "right"),
    [
        ('x/\nstart: "y"', 'x/\nstart: "y"'),
        (r"x\\/ | /y", "x\\/ "),
        ('x"<[300]>"', 'x"<3>"'),
    ],
)
def test_a_pattern_cannot_leave_its_expression(judge: Judge, pattern: str, right: str) -> None:
    """Neither the grammar around it nor a control token can be written into it."""
    schema = {"properties": {"a": {"type": "string", "pattern": pattern}}, "required": ["a"]}

    def takes(text: str) -> bool:
        return judge.takes(TAGS, text, [Tool("t", schema)], must=True, many=False)

    assert takes(call(TAGS, ("t", json.dumps({"a": f"so {right}"}))))
    assert not takes(call(TAGS, ("t", '{"a": "nothing of it"}')))
    assert not takes("y")


ORDERED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "b": {"type": "string", "maxLength": 3},
        "c d": {"$ref": "#/$defs/List"},
        "e": {},
        "never": False,
    },
    "required": ["b"],
    "$defs": {"List": {"type": "array", "items": {"type": "boolean"}}},
}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ('b="x"', {"b": "x"}),
        (
            'a=1, b="x", c d=[true], e={"f": null}',
            {"a": 1, "b": "x", "c d": [True], "e": {"f": None}},
        ),
        (r'b="é\"=", e=")\n"', {"b": 'é"=', "e": ")\n"}),
        ('a=1, b="x",', None),
        (', b="x"', None),
        ('a=1 b="x"', None),
        ('b="x", a=1', None),  # in another order
        ("a=1", None),
        ("", None),
        ('b="long"', None),
        ("b='x'", None),
        ('a=1.5, b="x"', None),
        ('b="x", c d=[1]', None),
        ('b="x", never=1', None),
        ('b="x", other=1', None),
        ('"x"', None),
    ],
)
def test_arguments_of_python_follow_their_schema_and_are_read_back(
    judge: Judge, written: str, read: dict[str, Any] | None
) -> None:
    text = f"{OLMO.opening}t({written}){OLMO.closing}"
    right = judge.takes(OLMO, text, [Tool("t", ORDERED)], must=True, many=False)
    assert right == (read is not None)
    if not right:
        return
    parser = CallParser(OLMO, {"t": ORDERED})
    events = [*parser.push(text), *parser.finish()]
    assert not any(isinstance(event, str) for event in events)
    arguments = "".join(event.arguments for event in events if not isinstance(event, str))
    assert json.loads(arguments) == read
    jsonschema.validate(read, ORDERED)


def test_a_tool_that_says_nothing_of_its_arguments_takes_any_of_python(judge: Judge) -> None:
    def takes(written: str) -> bool:
        text = f"{OLMO.opening}any({written}){OLMO.closing}"
        return judge.takes(OLMO, text, [ANY], must=True, many=True)

    assert all(map(takes, ("", "a=1", 'x y="a", b={"c": 1}, d=[]', f"{'k' * 128}=null")))
    assert not any(
        map(takes, ("1", "a=1,", "a=b", "a = 1", f"{'k' * 257}=1", "[=1", "{}=1", "'=1"))
    )


def test_calls_of_python_stand_behind_one_opening(judge: Judge) -> None:
    one = call(OLMO, ("city", RIGHT))
    assert judge.takes(OLMO, one, must=True, many=True)
    assert not judge.takes(OLMO, f"{one}\n{one}", must=True, many=True)
    assert not judge.takes(OLMO, one.replace(")", ")\n\n"), must=True, many=True)


def test_as_many_arguments_of_python_as_may_be_left_out(judge: Judge) -> None:
    names = [f"p{n}" for n in range(200)]
    tool = Tool("t", {"properties": {name: {"type": "integer"} for name in names}})
    text = call(OLMO, ("t", '{"p0": 1, "p7": 2, "p199": 3}'))
    assert judge.takes(OLMO, text, [tool], must=True, many=False)
    needed = Tool("t", {**tool.parameters, "required": ["p199"]})
    assert judge.takes(OLMO, text, [needed], must=True, many=False)
    text = call(OLMO, ("t", '{"p199": 3}'))
    assert judge.takes(OLMO, text, [needed], must=True, many=False)
    assert not judge.takes(OLMO, call(OLMO, ("t", "{}")), [needed], must=True, many=False)


def test_arguments_of_python_that_may_all_be_left_out(judge: Judge) -> None:
    tool = Tool("t", {"properties": {"a": {"type": "null"}, "b": {}, "c": {"const": 3}}})
    for written in ("", "a=null", "b=1", "c=3", "a=null, b=1", "a=null, c=3", "a=null, b=1, c=3"):
        text = f"{OLMO.opening}t({written}){OLMO.closing}"
        assert judge.takes(OLMO, text, [tool], must=True, many=False)
    for written in ("a=1", "c=3, b=1", "a=null, ", "a=null,, b=1", "d=1"):
        text = f"{OLMO.opening}t({written}){OLMO.closing}"
        assert not judge.takes(OLMO, text, [tool], must=True, many=False)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"properties": {"a": 7}}, "'a' of 't' has a schema that is none"),
        ({"properties": {"a=": {}}}, "'a='"),
        ({"properties": {" a": {}}}, "' a'"),
        ({"properties": {'"': {}}}, "'\"' of 't'"),
        ({"properties": {"a": {"$ref": "#/properties/b"}, "b": {}}}, "'#/properties/b'"),
        ({"anyOf": [{"required": ["a"]}]}, "'anyOf' of 't'"),
        ({"required": ["a"], "properties": {"a": False}}, "'a'"),
        ({"additionalProperties": {"type": "string"}}, "does not name"),
        ({"properties": {"k" * 257: {}}}, "the name of 'kkk"),
        ({"properties": {"a  b": {}}}, "'a  b'"),
        ({"properties": {f"p{n}": {} for n in range(201)}}, "more than 200 parameters"),
    ],
)
def test_what_cannot_be_held_in_python_is_refused(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(GrammarRefused) as refused:
        call_grammar(OLMO, [Tool("t", schema)], must=True, many=True, special_id=lambda text: None)
    assert says in str(refused.value)

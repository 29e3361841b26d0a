"""Calls of tools found in what a model writes, whatever pieces it comes in."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any, SupportsIndex

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.calls import (
    COHERE,
    FORMATS,
    GRANITE,
    HERMES,
    LLAMA,
    MISTRAL,
    MISTRAL_ARGS,
    OLMO,
    SEED,
    TAGS,
    CallFormat,
    CallParser,
    Event,
)

TOOLS = {
    "f": {
        "properties": {
            "s": {"type": "string"},
            "i": {"type": "integer"},
            "n": {"type": ["number", "null"]},
            "m": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            "e": {"$ref": "#/$defs/Level"},
            "o": {"type": "object"},
            "any": {},
        },
        "$defs": {"Level": {"enum": ["1", "2"]}},
    },
    "g": {},
}
# What outputs of all formats are made of, whole and in parts.
BITS = [
    *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|python_tag|>"),
    *('{"name": "f"', '"arguments"', '"parameters"', ": ", ", ", "{", "}", "[", "]", ";", "f"),
    *(" ", "\n", " " * 300, "f" * 60, '"', "\\", "<tool_", "call>", "[TOOL", "x" * 600, "é"),
    *('{"name": "f", "arguments": {"a": 1}}', "f[ARGS]{", '"name": "g"', "[CALL_ID]abc[ARGS]"),
    *("<|tool_call|>", "<|START_ACTION|>", "<|END_ACTION|>", '{"tool_name": "g"}', "],"),
    *("<seed:tool_call>", "</seed:tool_call>", "<function=f>", "<parameter=s>", "<parameter=i>"),
    *("</parameter>", "</function>", "</par", "<func", "<parameter=", "7", "True", "None"),
    *("<function_calls>", "</function_calls>", "f(s=", "f(", ")", "i=", "'", ",", "\\u00", "e9"),
    *("\\x4", "=", ":", "(", "\\'", "\\U0001F60", "00"),
]
Found = tuple[str, list[tuple[str, str]]]


def gather(events: Sequence[Event]) -> Found:
    """Put events together: all text, and (name, arguments) of each call."""
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, str):
            continue
        assert event.index == len(calls) - (not event.name), "calls come one after the other"
        if event.name:
            calls.append((event.name, event.arguments))
        else:
            name, arguments = calls.pop()
            calls.append((name, arguments + event.arguments))
    return "".join(event for event in events if isinstance(event, str)), calls


def parse(form: CallFormat, text: str, cuts: Sequence[int] = ()) -> Found:
    parser = CallParser(form, TOOLS)
    events: list[Event] = []
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        events += parser.push(text[start:stop])
    events += parser.finish()
    assert "" not in events, "each event is an event of a stream"
    return gather(events)


CALL = '{"name": "f", "arguments": {"a": [1, {"b": "}\\""}], "c": " x"}}'
ARGUMENTS = '{"a": [1, {"b": "}\\""}], "c": " x"}'


@pytest.mark.parametrize(
    ("form", "text", "said", "calls"),
    [
        (HERMES, f"so:\n<tool_call>\n{CALL}\n</tool_call>", "so:", [("f", ARGUMENTS)]),
        (
            HERMES,
            f"<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n"
            '{"arguments": {"q": 1}, "name": "unknown"}\n</tool_call>\n',
            "",
            [("f", ARGUMENTS), ("unknown", '{"q": 1}')],
        ),
        (HERMES, '<tool_call>{"name":"g"}</tool_call> ok', " ok", [("g", "{}")]),
        (
            HERMES,
            '<tool_call>{"name": "g", "arguments": "{\\"a\\": 1}"}</tool_call>',
            "",
            [("g", '{"a": 1}')],
        ),
        (HERMES, '<tool_call>{"name": "g", "parameters": {}}</tool_call>', "", [("g", "{}")]),
        (
            HERMES,
            '<tool_call>{"name": "g", "arguments": "\\ud800"}</tool_call>',
            "",
            [("g", '"\\ud800"')],
        ),
        (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": 1', "", [("f", '{"a": 1')]),
        (MISTRAL, f"[TOOL_CALLS] [{CALL}]", "", [("f", ARGUMENTS)]),
        (
            MISTRAL,
            'I see[TOOL_CALLS][{"name": "f", "arguments": {}}, '
            '{"name": "g", "arguments": {"b": 2}, "id": "abcdefghi"}]\n',
            "I see",
            [("f", "{}"), ("g", '{"b": 2}')],
        ),
        (MISTRAL_ARGS, f"[TOOL_CALLS]f[ARGS]{ARGUMENTS}", "", [("f", ARGUMENTS)]),
        (
            MISTRAL_ARGS,
            'I see[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{}[TOOL_CALLS] g[ARGS] {"b": "[ARGS]"}\n',
            "I see",
            [("f", "{}"), ("g", '{"b": "[ARGS]"}')],
        ),
        (
            MISTRAL_ARGS,
            '[TOOL_CALLS]unknown[ARGS]{"a": 1} ok',
            " ok",
            [("unknown", '{"a": 1}')],
        ),
        (MISTRAL_ARGS, '[TOOL_CALLS]f[ARGS]{"a": [1', "", [("f", '{"a": [1')]),
        (
            MISTRAL_ARGS,
            "[TOOL_CALLS]oops[TOOL_CALLS][CALL_ID][TOOL_CALLS]f[ARGS]{}",
            "[TOOL_CALLS]oops[TOOL_CALLS][CALL_ID]",
            [("f", "{}")],
        ),
        (LLAMA, '{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
        (
            LLAMA,
            '\n{"type": "function", "name": "f", "parameters": {"a": 1}}; {"name": "g"}',
            "",
            [("f", '{"a": 1}'), ("g", "{}")],
        ),
        (LLAMA, '{"name": "f", oops: "g", "parameters": {}}', "", [("f", "{}")]),
        (LLAMA, '{"name": "f", "name": "g", "parameters": {}}', "", [("f", "{}")]),
        (
            LLAMA,
            '<|python_tag|>{"name": "unknown", "parameters": {}}',
            "",
            [("unknown", "{}")],
        ),
        (
            GRANITE,
            f'so <|tool_call|>[{CALL}, {{"name": "g", "arguments": {{}}}}] ok',
            "so ok",
            [("f", ARGUMENTS), ("g", "{}")],
        ),
        (
            COHERE,
            'I will.<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "f", '
            '"parameters": {"name": "x]"}},\n    {"tool_name": "g"}\n]<|END_ACTION|>',
            "I will.",
            [("f", '{"name": "x]"}'), ("g", "{}")],
        ),
        (COHERE, '<|START_ACTION|>[{"tool_name": "g"}]', "", [("g", "{}")]),
        (COHERE, '<|START_ACTION|>[{"tool_name": "g"}]]], [ x', "]], [ x", [("g", "{}")]),
        (COHERE, '<|START_ACTION|>[{"tool_name": "g"}] <|END', " <|END", [("g", "{}")]),
        (
            TAGS,
            'so\n<tool_call>\n<function=f>\n<parameter=s>\n 7 "é\n\n</parameter>\n'
            "<parameter=i>\n7\n"
            "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=g>\n</function>\n"
            "</tool_call>",
            "so",
            [("f", '{"s": " 7 \\"é\\n", "i": 7}'), ("g", "{}")],
        ),
        (
            TAGS,
            "<tool_call><function=f><parameter=n>None</parameter><parameter=m>null</parameter>"
            "<parameter=e>1</parameter><parameter=o>{'a': [True, \"x\"]}</parameter>"
            '<parameter=any>"q"</parameter><parameter=x y>[1, 2]</parameter></function>'
            "</tool_call>",
            "",
            [
                (
                    "f",
                    '{"n": null, "m": null, "e": "1", "o": {"a": [true, "x"]}, '
                    '"any": "\\"q\\"", "x y": [1, 2]}',
                )
            ],
        ),
        (
            TAGS,
            "<tool_call><function=f><parameter=i>NaN</parameter><parameter=n>many</parameter>"
            "<parameter=m>12</parameter><parameter=s></parameter>",
            "",
            [("f", '{"i": "NaN", "n": "many", "m": "12", "s": ""')],
        ),
        (
            TAGS,
            "<tool_call><function=unknown><parameter=s>\n</par</parameter>\n</function>"
            "</tool_call> ok",
            " ok",
            [("unknown", '{"s": "</par"}')],
        ),
        (
            TAGS,
            "<tool_call>\n<function=g>\noops</function>\n</tool_call>",
            "oops</function>\n</tool_call>",
            [("g", "{}")],
        ),
        (TAGS, "<tool_call><function=f><parameter=s>\nhalf a ", "", [("f", '{"s": "half a ')]),
        (TAGS, "<tool_call><function=f><parameter=s>\na\n</par", "", [("f", '{"s": "a\\n</par')]),
        (TAGS, "<tool_call><function=f><parameter=i>\n12\n</par", "", [("f", '{"i": 12\n</par')]),
        (
            TAGS,
            "<tool_call><function=f><parameter=i>1</parameter><parameter=i>2</parameter>"
            "<parameter=any>['\\ud800']</parameter></function></tool_call>",
            "",
            [("f", '{"i": 1, "any": ["\\ud800"]}')],
        ),
        (
            TAGS,
            f"<tool_call><function=f><parameter=i>{'7' * 5000}</parameter></function></tool_call>",
            "",
            [("f", f'{{"i": {"7" * 5000}}}')],
        ),
        (
            TAGS,
            "so\n<function=nobody><parameter=s>a</parameter><function=f>\n<parameter=i>\n7\n"
            "</parameter>\n</function>\n</tool_call>",
            "so\n<function=nobody><parameter=s>a</parameter>",
            [("f", '{"i": 7}')],
        ),
        (
            SEED,
            "<seed:tool_call>\n<function=f>\n<parameter=s>\n7\n</parameter>\n<parameter=o>{'a': 1}"
            "</parameter>\n</function>\n</seed:tool_call>",
            "",
            [("f", '{"s": "\\n7\\n", "o": {"a": 1}}')],
        ),
        (
            OLMO,
            'so:<function_calls>f(s="a, b=(c)", i=-7)\ng()</function_calls>\nok',
            "so:\nok",
            [("f", '{"s": "a, b=(c)", "i": -7}'), ("g", "{}")],
        ),
        (
            OLMO,
            "<function_calls>\n  f( s = 'it\\'s \"é\"\\n' ,\n o={'a': [1.5e3, None], 'b': (True,)}"
            ",)\n</function_calls>",
            "",
            [("f", '{"s": "it\'s \\"é\\"\\n", "o": {"a": [1500.0, null], "b": [true]}}')],
        ),
        (
            OLMO,
            r"""<function_calls>f(s='\x41\u00e9\U0001F600\d\/\\', any='a' "\ud83d\ude00")"""
            "</function_calls>",
            "",
            [("f", r'{"s": "\u0041\u00e9😀\\d\/\\", "any": "a\ud83d\ude00"}')],
        ),
        (
            OLMO,
            r"<function_calls>f(s='\0\a\v\101\8', any='\U00110000\U0000D800\UD')</function_calls>",
            "",
            [
                (
                    "f",
                    r'{"s": "\u0000\u0007\u000bA\\8", "any": "\\U00110000\\U0000D800\\UD"}',
                )
            ],
        ),
        (
            OLMO,
            "<function_calls>f(s=New York, i=007, n=12:30, m=, e=true, any={1: a b})"
            "</function_calls>",
            "",
            [
                (
                    "f",
                    '{"s": "New York", "i": "007", "n": "12:30", "m": null, "e": true, '
                    '"any": "{1: a b}"}',
                )
            ],
        ),
        (  # strings of several lines, with quotes, prefixes, and in parts
            OLMO,
            "<function_calls>f(s=\"\"\"x = \"a, (b\"\n\"\"\", any='''it's''', o=r'\\d' \"'\", e=f''"
            ")</function_calls>",
            "",
            [("f", '{"s": "x = \\"a, (b\\"\\n", "any": "it\'s", "o": "\\\\d\'", "e": ""}')],
        ),
        (
            OLMO,
            "<function_calls>f(s='a' + \\\n'b',  # (it's)\n i=(3), o=('x' 'y'), any={1, 2})"
            "</function_calls>",
            "",
            [("f", '{"s": "ab", "i": 3, "o": "xy", "any": [1, 2]}')],
        ),
        (
            OLMO,
            "<function_calls>f(i=1_000, n=.5, m=+1, e=0x1F, any=[true, None, 'it\\'s'],, o=dict("
            "a=1))</function_calls>",
            "",
            [
                (
                    "f",
                    '{"i": 1000, "n": 0.5, "m": 1, "e": 31, "any": [true, null, "it\'s"], '
                    '"o": "dict(a=1)"}',
                )
            ],
        ),
        (  # what makes no sense is there to be seen
            OLMO,
            "<function_calls>f(s='a'.upper(), any=it's fine, o={(1, 2): 3}, i=]])</function_calls>",
            "",
            [("f", '{"s": "a.upper()", "any": "it\'s fine", "o": "{(1, 2): 3}", "i": "]]"}')],
        ),
        (  # without names, and one of them twice
            OLMO,
            "<function_calls>f(i=7, 'x', i=8), g(1) ; f ()</function_calls>",
            "",
            [("f", '{"i": 7, "s": "x"}'), ("g", '{"0": 1}'), ("f", "{}")],
        ),
        (OLMO, "<function_calls>f(any=[1, (2})", "", [("f", '{"any": [1, (2})')]),
        (OLMO, "<function_calls>f(s='x', i=12", "", [("f", '{"s": "x", "i": 12')]),
        (OLMO, "<function_calls>f(s='x' and", "", [("f", '{"s": "xand')]),
        (OLMO, '<function_calls>nobody(a="b', "", [("nobody", '{"a": "b')]),
        (OLMO, "<function_calls>f() and</function_calls>", " and</function_calls>", [("f", "{}")]),
    ],
)
def test_calls_are_found_however_the_text_is_cut(
    form: CallFormat, text: str, said: str, calls: list[tuple[str, str]]
) -> None:
    assert parse(form, text) == (said, calls)
    assert parse(form, text, range(1, len(text))) == (said, calls)
    for cut in range(1, len(text)):
        assert parse(form, text, [cut]) == (said, calls)
    rng = random.Random(text)
    for _ in range(50):
        cuts = sorted(rng.sample(range(len(text)), rng.randint(1, 9)))
        assert parse(form, text, cuts) == (said, calls)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (HERMES, "plain <tool_cal text < and\n\n"),
        (HERMES, "<tool_call>no object</tool_call> x"),
        (HERMES, '<tool_call>{"x": 1}</tool_call>'),
        (HERMES, '<tool_call>{"name": 7, "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>\n{"nam'),
        (HERMES, '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
        (HERMES, '{"name": "f", "arguments": {}}'),
        (HERMES, "<tool_call>"),
        (HERMES, ""),
        (HERMES, "  \n"),
        (MISTRAL, "[TOOL_CALLS] [1, 2]"),
        (MISTRAL, "[TOOL_CALLS] []"),
        (MISTRAL, "a [TOOL_CALL"),
        (MISTRAL_ARGS, '[TOOL_CALLS] [{"name": "f", "arguments": {}}]'),
        (MISTRAL_ARGS, "[TOOL_CALLS]f{}"),
        (MISTRAL_ARGS, "[TOOL_CALLS][ARGS]{}"),
        (MISTRAL_ARGS, "[TOOL_CALLS]f[ARGS][ARGS]{}"),
        (MISTRAL_ARGS, "[TOOL_CALLS]f[CALL_ID][ARGS]{}"),
        (MISTRAL_ARGS, "[TOOL_CALLS]f g[ARGS]{}"),
        (MISTRAL_ARGS, "[TOOL_CALLS]f[ARGS]7 and so on"),
        (MISTRAL_ARGS, f"[TOOL_CALLS]{'f' * 65}[ARGS]{{}}"),
        (MISTRAL_ARGS, f"[TOOL_CALLS]{'f' * 999}"),
        (MISTRAL_ARGS, "[TOOL_CALLS]f[ARG"),
        (MISTRAL_ARGS, "[TOOL_CALLS]f[ARGS]"),
        (MISTRAL_ARGS, "f[ARGS]{}"),
        (GRANITE, "<|tool_call|> [1, 2]"),
        (GRANITE, '<tool_call>[{"name": "f", "arguments": {}}]'),
        (COHERE, "<|START_ACTION|>[]<|END_ACTION|>"),
        (COHERE, '<|START_ACTION|>[{"name": "f", "parameters": {}}]'),
        (COHERE, '[{"tool_name": "f", "parameters": {}}]'),
        (TAGS, '<tool_call>{"name": "f", "arguments": {}}</tool_call>'),
        (TAGS, "<tool_call>\n<function=f"),
        (TAGS, "<tool_call>\n<function=f g>"),
        (TAGS, "<tool_call>\n<function=>"),
        (TAGS, f"<tool_call>\n<function={'f' * 400}>"),
        (TAGS, "<tool_call>\n<parameter=s>\nx\n</parameter>"),
        (TAGS, "<tool_call></function></tool_call>"),
        (TAGS, "<function=nobody>\n</function>"),
        (TAGS, "see <function=f"),
        (SEED, "<tool_call>\n<function=nobody>\n</function>\n</tool_call>"),
        (OLMO, "<function_calls>no call</function_calls> x"),
        (OLMO, "<function_calls>\n</function_calls>"),
        (OLMO, "<function_calls>f"),
        (OLMO, f"<function_calls>{'f' * 65}()</function_calls>"),
        (OLMO, "f(s='x')"),
        (LLAMA, '{"name": "nobody", "parameters": {"a": 1}}'),
        (LLAMA, '{"answer": {"name": "f", "parameters": {}}} and more'),
        (LLAMA, '  \n hello {"name": "f", "parameters": {}}'),
        (LLAMA, "{oh no"),
        (LLAMA, '{{"name": "f"}}'),
    ],
)
def test_what_is_no_call_is_text_to_the_last_character(form: CallFormat, text: str) -> None:
    assert parse(form, text) == (text, [])
    assert parse(form, text, range(1, len(text))) == (text, [])


def test_arguments_come_while_they_are_written() -> None:
    parser = CallParser(HERMES, TOOLS)
    begun = parser.push('<tool_call>\n{"name": "f", "arguments": {"city": "Be')
    assert gather(begun) == ("", [("f", '{"city": "Be')])
    [more] = parser.push("rlin")
    assert not isinstance(more, str)
    assert (more.index, more.name, more.arguments) == (0, "", "rlin")


@given(
    st.sampled_from(FORMATS),
    st.lists(st.sampled_from(BITS), max_size=20).map("".join),
    st.lists(st.integers(0, 2**16), max_size=10),
)
@example(MISTRAL_ARGS, "[TOOL_CALLS]f[ARGS]" + " " * 300 + "{}", [])
def test_where_an_output_is_cut_changes_nothing(
    form: CallFormat, text: str, places: list[int]
) -> None:
    cuts = sorted({place % (len(text) + 1) for place in places})
    found = parse(form, text)
    assert parse(form, text, cuts) == found
    assert parse(form, text, range(1, len(text))) == found


@pytest.mark.parametrize("cut", [1, 64, 2**20], ids=["characters", "tokens", "at once"])
def test_lists_in_lists_without_end_are_text(cut: int) -> None:
    """Deeper than any parser of JSON goes."""
    text = f'<tool_call>{{"name": {"[" * 100_000}{"]" * 100_000}}}'
    assert parse(HERMES, text, range(cut, len(text), cut)) == (text, [])


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@given(
    st.dictionaries(st.from_regex(r"[a-z_é]{1,9}", fullmatch=True), VALUES, max_size=4),
    st.sampled_from([repr, ascii, json.dumps]),
    st.lists(st.integers(0, 2**16), max_size=5),
)
def test_what_python_or_json_writes_is_read_as_what_it_is(
    arguments: dict[str, Any], write: Callable[[Any], str], places: list[int]
) -> None:
    written = ", ".join(f"{key}={write(value)}" for key, value in arguments.items())
    text = f"<function_calls>f({written})</function_calls>"
    cuts = sorted({place % (len(text) + 1) for place in places})
    said, [(name, found)] = parse(OLMO, text, cuts)
    assert (said, name) == ("", "f")
    assert json.loads(found) == json.loads(json.dumps(arguments))


class Counted(str):
    """Text that counts how many of its characters are looked at or copied."""

    looked = 0

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        Counted.looked += len(self)
        return super().partition(sep)

    def lstrip(self, chars: str | None = None, /) -> str:
        Counted.looked += len(self)
        return super().lstrip(chars)

    def __getitem__(self, key: SupportsIndex | slice, /) -> str:
        part = super().__getitem__(key)
        Counted.looked += len(part)
        return part


class Watched(CallParser):
    def __setattr__(self, name: str, value: object) -> None:
        counted = Counted(value) if name == "_text" and isinstance(value, str) else value
        super().__setattr__(name, counted)


def looked_at(form: CallFormat, pieces: Sequence[str]) -> int:
    """Return how many characters the parser looks at and copies, the same ones again, too."""
    Counted.looked = 0
    parser = Watched(form, TOOLS)
    for piece in pieces:
        parser.push(piece)
    parser.finish()
    return Counted.looked


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "piece",
    [
        *("{", '{"a":', " ", "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>{", '"', "\\", "}"),
        *("[TOOL_CALLS]f", "[TOOL_CALLS][ARGS", "[ARGS]", "[TOOL_CALLS]f[ARGS]{}"),
        *('<tool_call>{"name":"f"}</tool_call>', '{"name":"f"};', '[TOOL_CALLS][{"name":"f"},'),
        *("<tool_call><function=f>", "<parameter=s>", "<parameter=i>7", "</parameter", "<function"),
        *("<tool_call><function=f><parameter=i>7</parameter></function></tool_call>",),
        *('<|START_ACTION|>[{"tool_name":"g"}]', "<|START_ACTION|>", "]", "<|END_ACTION|>"),
        *("<function_calls>f(", "<function_calls>f()\n", "<function_calls>f(s='a')", "f("),
    ],
)
def test_a_hostile_output_is_read_in_linear_steps(form: CallFormat, piece: str) -> None:
    """Each character is looked at a bounded number of times: counted, not timed."""
    bound = 6 * (len(piece) + len(form.opening))
    assert looked_at(form, [piece] * 2_000) < 2_000 * bound
    once, long = (looked_at(form, [piece * count]) for count in (1_000, 4_000))
    assert long < 5 * max(once, 1_000)


@pytest.mark.parametrize("begun", ["", "'", "r'", '"""', "'a'", "'a' b", "[", "['", "{'''", "w"])
@pytest.mark.parametrize(
    "piece",
    [*("'", '"', "\\", "\\x", "\\u00", "(", "]", "a", " ", "\n", "+", "#", ",", "=", "a=", "r'")],
)
def test_a_hostile_value_of_python_is_read_in_linear_steps(begun: str, piece: str) -> None:
    start = f"<function_calls>f(s={begun}"
    bound = 6 * (len(piece) + len(OLMO.opening))
    assert looked_at(OLMO, [start, *[piece] * 2_000]) < 2_000 * bound
    once, long = (looked_at(OLMO, [start, piece * count]) for count in (1_000, 4_000))
    assert long < 5 * max(once, 1_000)
    text = start + piece * 300
    assert parse(OLMO, text) == parse(OLMO, text, range(1, len(text)))


def test_schemas_that_refer_to_themselves_or_grow_are_looked_at_a_bounded_number_of_times() -> None:
    """Twenty definitions that each name the next one twice would be a million."""
    grown: dict[str, Any] = {
        f"A{n}": {"anyOf": [{"$ref": f"#/$defs/A{n + 1}"}] * 2} for n in range(60)
    }
    loop = {"anyOf": [{"$ref": "#/$defs/loop"}, {"type": "null"}]}
    schema = {
        "properties": {"a": {"$ref": "#/$defs/A0"}, "b": {"$ref": "#/$defs/loop"}},
        "$defs": {**grown, "loop": loop},
    }
    parser = CallParser(TAGS, {"f": schema})
    text = "<tool_call><function=f><parameter=a>1</parameter><parameter=b>x</parameter></function>"
    _, calls = gather([*parser.push(text), *parser.finish()])
    assert calls == [("f", '{"a": 1, "b": "x"}')]


def test_what_a_tool_s_own_reference_says_of_its_arguments_is_read_by() -> None:
    schema = {
        "$ref": "#/$defs/T",
        "$defs": {"T": {"type": "object", "properties": {"a": {"type": "string"}}}},
    }
    parser = CallParser(TAGS, {"f": schema})
    _, calls = gather(parser.push("<tool_call><function=f><parameter=a>7</parameter></function>"))
    assert calls == [("f", '{"a": "7"}')]

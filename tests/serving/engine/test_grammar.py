"""Grammars compiled: what is refused and why, what is kept, and walks that stay apart."""

import asyncio
import random
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llguidance import LLParserLimits

from serving.engine import grammar_trial
from serving.engine.boundary import Grammar, GrammarRefused
from serving.engine.build import assemble, read_model
from serving.engine.engine import TorchEngine
from serving.engine.grammar import (
    MAX_DEPTH,
    MAX_SOURCE_CHARACTERS,
    Constraint,
    GrammarCompiler,
    GrammarFailed,
)
from serving.engine.settings import EngineSettings
from tests import tiny
from tests.serving.engine.driving import Folders, base_of, complete, request, schema, text

SETTINGS = EngineSettings(device="cpu", dtype="float32", max_running=32, max_model_len=400)
HANGS = Grammar("regex", "a{100000000}")


def compiler(base: Path) -> GrammarCompiler:
    return GrammarCompiler(base, tiny.VOCAB, frozenset({tiny.EOS_ID}))


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("json", "[1"), "EOF"),
        (Grammar("json", '{"[' + "[" * MAX_DEPTH), "EOF"),  # a string, and no depth
        (Grammar("json", "7"), "object"),
        (schema({"type": "objekt"}), "Invalid type: objekt"),
        (schema({"not": {"type": "string"}}), '"not"'),
        (schema({"$ref": "http://127.0.0.1:1/schema"}), "does not fetch"),
        (schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (schema({"$ref": "#/$defs/none"}), "does not exist"),
        (schema({"$ref": "#"}), "no text"),
        (schema({"allOf": [{"type": "string"}, {"type": "null"}]}), "Unsatisfiable"),
        (Grammar("json", '{"items":' * 65 + "{}" + "}" * 65), str(MAX_DEPTH)),
        (schema({"enum": [1, 2**53]}), "9007199254740992"),
        (schema({"type": "integer", "minimum": -(2**53)}), "-9007199254740992"),
        (Grammar("json", '{"const": ' + "9" * 5000 + "}"), "9" * 40 + ";"),
        (Grammar("regex", "x" * (MAX_SOURCE_CHARACTERS + 1)), str(MAX_SOURCE_CHARACTERS)),
        (Grammar("regex", "foo(?=x)"), "look-around"),
        (Grammar("regex", r"(a)\1"), "backreference"),
        (Grammar("regex", "("), "unclosed"),
        (Grammar("regex", "(" * 20_000 + ")" * 20_000), "nest"),
        (HANGS, "Send a simpler one"),
    ],
)
def test_a_grammar_that_cannot_be_is_refused_with_the_reason(
    tiny_base: Path, grammar: Grammar, reason: str
) -> None:
    async def main() -> None:
        grammars = compiler(tiny_base)
        with pytest.raises(GrammarRefused, match=re.escape(reason)):
            await grammars.start(grammar)
        grammars.close()

    asyncio.run(main())


class Waiting(GrammarCompiler):
    """Compiles when it is told to."""

    may: threading.Event

    def _compile(self, grammar: Grammar) -> Any:
        self.may.wait()
        return super()._compile(grammar)


def test_other_requests_go_on_while_a_grammar_is_compiled(tiny_base: Path) -> None:
    async def main() -> None:
        parts = assemble(read_model(base_of(tiny_base), SETTINGS), Folders({}), SETTINGS)
        grammars = Waiting(tiny_base, tiny.VOCAB, frozenset({tiny.EOS_ID}))
        grammars.may = threading.Event()
        engine = TorchEngine(replace(parts, grammars=grammars), SETTINGS)
        ask = request("x", grammar=Grammar("regex", "ab"))
        held = asyncio.create_task(complete(engine, ask))
        left = asyncio.create_task(complete(engine, ask))
        assert (await complete(engine, request("x", max_tokens=20))).completion_tokens == 20
        left.cancel()  # one that leaves takes the grammar from nobody
        assert not held.done()
        grammars.may.set()
        assert text(await held) == "ab"
        parts.grammars.close()
        await engine.aclose()

    asyncio.run(main())


def test_brackets_and_digits_inside_strings_are_no_depth_and_no_numbers(tiny_base: Path) -> None:
    async def main() -> None:
        grammars = compiler(tiny_base)
        await grammars.start(schema({"enum": ['"' + "[" * 100, "{\\" * 100, "9" * 20]}))
        await grammars.start(schema({"enum": [0.12345678901234567, 1e300, 2**53 - 1]}))
        grammars.close()

    asyncio.run(main())


def test_what_looks_like_a_control_token_in_a_schema_is_tried_as_it_is(tiny_base: Path) -> None:
    """Another text in its place could pass the trial for it, or fail there."""

    async def main() -> None:
        grammars = compiler(tiny_base)
        await grammars.start(schema({"const": "<[1]>", "maxLength": 5}))
        grammars.close()

    asyncio.run(main())


class Counting(GrammarCompiler):
    """Remembers what it compiled."""

    compiled: list[str]

    def _compile(self, grammar: Grammar) -> Any:
        self.compiled.append(grammar.source)
        return super()._compile(grammar)


def test_a_grammar_is_compiled_once_while_it_is_used_and_a_refusal_is_remembered(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.engine.grammar.KEPT", 3)

    async def main() -> None:
        grammars = Counting(tiny_base, tiny.VOCAB, frozenset({tiny.EOS_ID}))
        grammars.compiled = []
        one, bad = Grammar("regex", "one"), Grammar("regex", "(")
        await asyncio.gather(*(grammars.start(one) for _ in range(5)))
        for _ in range(3):
            with pytest.raises(GrammarRefused):
                await grammars.start(bad)
        assert grammars.compiled == ["one", "("]
        for number in range(2):  # the one that is still asked for stays
            await grammars.start(Grammar("json", f'{{"const":{number}}}'))
            await grammars.start(one)
        assert grammars.compiled.count("one") == 1
        with pytest.raises(GrammarRefused):
            await grammars.start(bad)
        assert grammars.compiled.count("(") == 2, "it had been forgotten"
        grammars.close()

    asyncio.run(main())


def test_a_grammar_that_was_too_much_for_one_request_is_compiled_anew_for_the_next(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests share what a lexer has learned, and the bound on it."""
    few = LLParserLimits(max_lexer_states=150, precompute_large_lexemes=False, verbose_errors=False)
    monkeypatch.setattr(grammar_trial, "LIMITS", few)

    def walk(constraint: Constraint) -> None:
        for letter in random.Random(1).choices(b"ab", k=200):
            assert constraint.allowed()[letter]
            constraint.advance(letter)

    async def main() -> None:
        grammars = compiler(tiny_base)
        grammar = Grammar("regex", "(.*a.{50}){2}")
        with pytest.raises(GrammarFailed, match="more work"):
            walk(await grammars.start(grammar))
        assert (await grammars.start(grammar)).allowed()[ord("a")]
        with pytest.raises(GrammarFailed, match="more work"):
            walk(await grammars.start(grammar))
        grammars.close()

    asyncio.run(main())


def test_a_machine_that_cannot_try_a_grammar_now_has_not_refused_it(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        grammars = compiler(tiny_base)
        grammar = Grammar("regex", "ab")
        with monkeypatch.context() as broken:
            broken.setattr("sys.executable", "/nowhere/python")
            with pytest.raises(FileNotFoundError):
                await grammars.start(grammar)
        await grammars.start(grammar)
        grammars.close()

    asyncio.run(main())


def test_two_requests_walk_one_grammar_apart(tiny_base: Path) -> None:
    async def main() -> None:
        grammars = compiler(tiny_base)
        first = await grammars.start(Grammar("regex", "ab"))
        second = await grammars.start(Grammar("regex", "ab"))
        assert not first.advance(ord("a"))
        assert first.allowed().nonzero()[0].tolist() == [ord("b")]
        assert second.allowed().nonzero()[0].tolist() == [ord("a")]
        assert first.advance(ord("b"))
        grammars.close()

    asyncio.run(main())

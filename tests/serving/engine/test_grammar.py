"""Outputs held to a schema or an expression, and tokens that a request likes or not."""

import asyncio
import json
import random
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance import LLParserLimits

from serving.engine import grammar_trial
from serving.engine.boundary import Grammar, GrammarRefused, RequestFailed
from serving.engine.build import assemble, read_model
from serving.engine.engine import TorchEngine
from serving.engine.grammar import (
    MAX_DEPTH,
    MAX_SOURCE_CHARACTERS,
    Allowed,
    Constraint,
    GrammarCompiler,
    GrammarFailed,
)
from serving.engine.ops.sampling import greedy
from serving.engine.sampler import Sampled, Sampler
from serving.engine.sequence import Sequence as Request
from serving.engine.settings import EngineSettings, OperatorsName
from tests import tiny
from tests.serving.engine.driving import (
    Folders,
    Oracle,
    Result,
    base_of,
    complete,
    complete_all,
    request,
    run_all,
)

SETTINGS = EngineSettings(device="cpu", dtype="float32", max_running=32, max_model_len=400)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "tags", "home"],
    "additionalProperties": False,
    "$defs": {
        "place": {
            "type": "object",
            "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
            "required": ["zip"],
            "additionalProperties": False,
        }
    },
}
ENDS: list[dict[str, Any]] = [{}, {"ignore_eos": False}]
# Every text of it can be divided in so many ways that after a few tokens it is too much work.
PAIRS = " | ".join(f"n{left} n{right}" for left in range(3) for right in range(3))
EXPLODES = Grammar("lark", "start: n0\n" + "".join(f'n{i}: {PAIRS} | "a"\n' for i in range(3)))
HANGS = Grammar("regex", "a{100000000}")


def schema(value: Any) -> Grammar:
    return Grammar("json", json.dumps(value))


def text(result: Result) -> str:
    return bytes(token for token in result.tokens if token < 256).decode()


def compiler(base: Path) -> GrammarCompiler:
    return GrammarCompiler(base, tiny.VOCAB, frozenset({tiny.EOS_ID}))


SCALARS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.builds(
        lambda low, size: {"type": "integer", "minimum": low, "maximum": low + size},
        st.integers(-50, 50),
        st.integers(0, 1000),
    ),
    st.builds(
        lambda low, size: {"type": "string", "minLength": low, "maxLength": low + size},
        st.integers(0, 3),
        st.integers(0, 4),
    ),
    st.lists(st.text(max_size=3) | st.integers() | st.none(), min_size=1, max_size=3).map(
        lambda values: {"enum": values}
    ),
    st.sampled_from(["date", "uuid", "ipv4"]).map(lambda name: {"type": "string", "format": name}),
)


def _objects(inner: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.text(alphabet='abcé" ', max_size=3)
    return st.dictionaries(names, inner, min_size=1, max_size=3).map(
        lambda properties: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties)[:2],
            "additionalProperties": False,
        }
    )


SCHEMAS = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        _objects(inner),
        inner.map(lambda items: {"type": "array", "items": items, "maxItems": 2}),
        st.lists(inner, min_size=1, max_size=2).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=5,
)


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(wanted=st.lists(SCHEMAS, min_size=4, max_size=4), seed=st.integers(0, 2**32))
def test_random_weights_write_what_the_schema_says_or_run_out_of_tokens(
    tiny_base: Path, wanted: list[dict[str, Any]], seed: int
) -> None:
    check_schemas(tiny_base, wanted, seed)


@pytest.mark.long
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(wanted=st.lists(SCHEMAS, min_size=8, max_size=8), seed=st.integers(0, 2**32))
def test_many_schemas_are_followed(
    tiny_base: Path, wanted: list[dict[str, Any]], seed: int
) -> None:
    check_schemas(tiny_base, wanted, seed)


def check_schemas(base: Path, wanted: Sequence[dict[str, Any]], seed: int) -> None:
    """Ask for each schema greedily and at three temperatures, in one batch."""
    asks = [
        (each, request("x", max_tokens=120, temperature=heat, seed=seed, grammar=schema(each)))
        for each in wanted
        for heat in (0.0, 0.8, 2.0)
    ]
    engine = TorchEngine.create(base_of(base), Folders({}), SETTINGS)
    results = run_all(engine, [ask for _, ask in asks])
    for (each, _), result in zip(asks, results, strict=True):
        if result.finish == "length":
            assert len(result.tokens) == 120
        else:
            jsonschema.validate(json.loads(text(result)), each)


def test_no_token_stands_for_an_end_where_a_number_may_go_on(tiny_base: Path) -> None:
    grammar = schema({"type": "integer", "minimum": 0, "maximum": 80})
    wanted = [
        request("x", grammar=grammar, max_tokens=9, logit_bias=((0, 100.0), (56, 50.0)), **end)
        for end in ENDS
    ]
    engine = TorchEngine.create(base_of(tiny_base), Folders({}), SETTINGS)
    assert [text(result)[0] for result in run_all(engine, wanted)] == ["8", "8"]


def test_without_its_grammar_the_same_model_writes_no_json(tiny_base: Path) -> None:
    """The control of the tests above: what they see is the grammar's doing."""
    wanted = [request("x", max_tokens=100, temperature=1.0, seed=seed) for seed in range(8)]
    engine = TorchEngine.create(base_of(tiny_base), Folders({}), SETTINGS)
    for result in run_all(engine, wanted):
        with pytest.raises((UnicodeDecodeError, json.JSONDecodeError)):
            json.loads(text(result))


@pytest.mark.parametrize("pattern", ["(ab|cd){2,5}", "[0-9]{3}-x?", "é+|日本", "a/b\\\\c\n?"])
def test_an_expression_is_matched_from_end_to_end(tiny_base: Path, pattern: str) -> None:
    grammar = Grammar("regex", pattern)
    wanted = [
        request("x", max_tokens=80, temperature=1.0, seed=seed, grammar=grammar)
        for seed in range(9)
    ]
    engine = TorchEngine.create(base_of(tiny_base), Folders({}), SETTINGS)
    ended = [r for r in run_all(engine, wanted) if r.finish == "stop"]
    assert ended
    assert all(re.fullmatch(pattern, text(result)) for result in ended)


def mixture(folders: Folders) -> list[Any]:
    """Free, constrained, biased and shaped requests of two adapters and the base."""
    a, b = folders.refs["a"], folders.refs["b"]
    person = {"grammar": schema(PERSON), "max_tokens": 120}
    return [
        request("free", max_tokens=40, logprobs=3),
        request("free", a, max_tokens=40, temperature=0.9, seed=3, ignore_eos=False),
        request("held", **person, logprobs=2),
        request("held", a, **person, temperature=1.0, seed=5),
        request("held", b, **person, frequency_penalty=0.8, temperature=0.7, seed=8, top_k=30),
        request("any", b, grammar=schema({"type": "object"}), max_tokens=30, top_p=0.9, seed=2),
        request("bias", max_tokens=30, logit_bias=((65, 4.0), (66, 5.5), (200, -100.0))),
        request("bias", a, max_tokens=30, temperature=1.0, seed=4, logit_bias=((97, 6.0),)),
        request("both", max_tokens=60, grammar=Grammar("regex", "[a-f]+"), logit_bias=((99, 9.0),)),
    ]


@pytest.mark.parametrize("operators", ["auto", "torch"])
def test_held_free_and_biased_requests_answer_in_one_batch_as_alone(
    tiny_base: Path, tiny_folders: Folders, operators: OperatorsName
) -> None:
    how = EngineSettings(
        device="cpu", dtype="float32", max_running=16, max_model_len=256, operators=operators
    )

    def run(wanted: list[Any]) -> list[Result]:
        return run_all(TorchEngine.create(base_of(tiny_base), tiny_folders, how), wanted)

    alone = [run([each])[0] for each in mixture(tiny_folders)]
    mixed = run(mixture(tiny_folders))
    if operators == "auto":  # to the last bit, log probabilities included
        assert mixed == alone
    assert [r.tokens for r in mixed] == [r.tokens for r in alone]
    json.loads(text(alone[3]))  # one of them ended: the comparison saw whole objects


def test_log_probabilities_are_the_model_s_own_whatever_grammar_and_bias_do(
    tiny_base: Path,
) -> None:
    wanted = [
        request("x", max_tokens=25, logprobs=20),
        request("x", max_tokens=25, logprobs=20, grammar=schema(PERSON)),
        request("x", max_tokens=25, logprobs=20, logit_bias=((65, 50.0), (66, 50.0))),
        request("x", max_tokens=25, logprobs=20, presence_penalty=2.0, temperature=1.5, seed=1),
    ]
    oracle = Oracle(tiny_base)
    unlikely = 0
    engine = TorchEngine.create(base_of(tiny_base), Folders({}), SETTINGS)
    for each, result in zip(wanted, run_all(engine, wanted), strict=True):
        table = oracle.logprobs([*each.prompt_ids, *result.tokens])[len(each.prompt_ids) - 1 :]
        for row, token, said in zip(table, result.tokens, result.logprobs, strict=False):
            top = row.topk(20)
            assert said.token_id == token
            assert said.logprob == pytest.approx(float(row[token]), abs=1e-4)
            values = [value for _, value in said.top]
            assert values == pytest.approx(top.values.tolist(), abs=1e-4)
            assert values == sorted(values, reverse=True)
            for token_id, value in said.top:
                assert value == pytest.approx(float(row[token_id]), abs=1e-4)
            unlikely += token != said.top[0][0]
    assert unlikely > 20, "grammar, bias and heat chose others than the most likely"


def choose(row: list[float], **params: Any) -> int:
    made = Request(request([1], **params))
    [outcome] = Sampler(greedy, frozenset({3})).choose(torch.tensor([row]), [made])
    assert isinstance(outcome, Sampled)
    return outcome.token_id


def test_a_bias_is_added_to_its_token_s_score_and_to_no_other() -> None:
    row = [0.0, 3.0, 2.0, -50.0]
    assert choose(row) == 1
    assert choose(row, logit_bias=((2, 0.9),)) == 1
    assert choose(row, logit_bias=((2, 1.1),)) == 2
    assert choose(row, logit_bias=((1, -100.0),)) == 2
    assert choose(row, logit_bias=((0, 100.0), (1, 96.0))) == 0
    heat = {"temperature": 2.0, "ignore_eos": False, "min_tokens": 1}
    for seed in range(20):
        # A bias cannot bring back an end that min_tokens forbids.
        assert choose(row, logit_bias=((3, 100.0),), seed=seed, **heat) != 3


class Only:
    """Stands where a constraint does, and allows some tokens or fails."""

    def __init__(self, some: Allowed | None) -> None:
        self.some = some

    def allowed(self) -> Allowed:
        if self.some is None:
            raise GrammarFailed("too much work")
        return self.some


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_held_rows_get_the_most_likely_token_of_what_is_allowed(dtype: torch.dtype) -> None:
    """Beside free and failing rows; bfloat16 has ties, of which the first counts."""
    rng, vocab = np.random.default_rng(1), 300
    sampler = Sampler(greedy, frozenset())
    failed = 0
    for _ in range(100):
        logits = torch.randn(6, vocab).to(dtype)
        masks = [rng.random(vocab) < share for share in (0.01, 0.3, 0.99, 1.1)]
        masks[0][7] = True  # never nothing
        held = [*map(Only, masks), Only(None), None]
        rows = [
            Request(request([1], logit_bias=bias), each)  # type: ignore[arg-type]  # as good as one
            for each in held
            for bias in [((5, 2.0),) if rng.random() < 0.3 else ()]
        ]
        outcomes = sampler.choose(logits, rows)
        for scores, mask, row, outcome in zip(
            logits, [*masks, None, True], rows, outcomes, strict=True
        ):
            if mask is None:
                assert isinstance(outcome, RequestFailed)
                failed += 1
                continue
            scores = scores.float()
            for token, value in row.sampling.logit_bias:
                scores[token] += value
            scores = scores.masked_fill(~torch.as_tensor(mask), -torch.inf)
            assert isinstance(outcome, Sampled)
            assert outcome.token_id == int(scores.max(0).indices)
    assert failed == 100


def test_a_grammar_that_ends_stops_the_output_without_a_token_for_it(tiny_base: Path) -> None:
    wanted = [
        request("x", grammar=Grammar("regex", "ab"), max_tokens=9, ignore_eos=ignore, min_tokens=m)
        for ignore in (False, True)
        for m in (0, 5)
    ]
    engine = TorchEngine.create(base_of(tiny_base), Folders({}), SETTINGS)
    for result in run_all(engine, wanted):
        assert (text(result), result.finish, result.completion_tokens) == ("ab", "stop", 2)


def test_where_a_grammar_may_end_min_tokens_and_ignore_eos_keep_it_going(tiny_base: Path) -> None:
    grammar = Grammar("regex", "(a|b)*")
    end = ((tiny.EOS_ID, 100.0),)  # it would end at once
    engine = TorchEngine.create(base_of(tiny_base), Folders({}), SETTINGS)
    plain, longer, whole = run_all(
        engine,
        [
            request("x", grammar=grammar, max_tokens=9, logit_bias=end, ignore_eos=False),
            request(
                "x", grammar=grammar, max_tokens=9, logit_bias=end, ignore_eos=False, min_tokens=4
            ),
            request("x", grammar=grammar, max_tokens=9, logit_bias=end),
        ],
    )
    assert (text(plain), plain.finish, plain.completion_tokens) == ("", "stop", 1)
    assert (len(text(longer)), longer.finish) == (4, "stop")
    assert (len(text(whole)), whole.finish) == (9, "length")


def test_a_grammar_that_becomes_too_much_work_fails_its_request_alone(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    async def main() -> None:
        engine = TorchEngine.create(base_of(tiny_base), tiny_folders, SETTINGS)
        others = mixture(tiny_folders)
        poison = request("x", grammar=EXPLODES, max_tokens=200)
        alone = await complete_all(engine, others)
        *mixed, failed = await complete_all(engine, [*others, poison])
        assert mixed == alone
        assert isinstance(failed, RequestFailed)
        assert "more work" in str(failed)
        stats = await engine.stats()
        assert (stats.failed, stats.running) == (1, 0)
        await engine.aclose()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        (Grammar("json", "[1"), "EOF"),
        (Grammar("json", "7"), "object"),
        (schema({"type": "objekt"}), "Invalid type: objekt"),
        (schema({"not": {"type": "string"}}), '"not"'),
        (schema({"$ref": "http://127.0.0.1:1/schema"}), "does not fetch"),
        (schema({"$ref": "file:///etc/passwd"}), "does not fetch"),
        (schema({"$ref": "#/$defs/none"}), "does not exist"),
        (schema({"$ref": "#"}), "grammar"),
        (schema({"allOf": [{"type": "string"}, {"type": "null"}]}), "Unsatisfiable"),
        (Grammar("json", '{"items":' * 65 + "{}" + "}" * 65), str(MAX_DEPTH)),
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


def test_brackets_inside_strings_are_no_depth(tiny_base: Path) -> None:
    async def main() -> None:
        grammars = compiler(tiny_base)
        await grammars.start(schema({"enum": ['"' + "[" * 100, "{\\" * 100]}))
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


def test_a_step_that_is_repeated_does_not_walk_twice(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    """Another request fails in a step; the halves of the step run again."""

    class Once(Sampler):
        broken = False

        def choose(self, logits: Any, sequences: Any) -> Any:
            outcomes = super().choose(logits, sequences)
            if len(sequences) == 2 and not self.broken:
                self.broken = True
                raise RuntimeError("after everything was chosen")
            return outcomes

    wanted = [
        request("x", grammar=schema(PERSON), max_tokens=120, temperature=1.0, seed=seed)
        for seed in range(2)
    ]
    alone = run_all(TorchEngine.create(base_of(tiny_base), tiny_folders, SETTINGS), wanted)
    parts = assemble(read_model(base_of(tiny_base), SETTINGS), tiny_folders, SETTINGS)
    parts.core.sampler = Once(parts.core.sampler.greedy, frozenset(parts.core.sampler.eos_ids))
    assert run_all(TorchEngine(parts, SETTINGS), wanted) == alone
    assert parts.core.sampler.broken


def test_a_base_without_a_tokenizer_refuses_grammars_and_runs_all_else(tmp_path: Path) -> None:
    base = tiny.make_base(tmp_path / "base", layers=1)
    (base / "tokenizer.json").unlink()

    async def main() -> None:
        engine = TorchEngine.create(base_of(base), Folders({}), SETTINGS)
        with pytest.raises(GrammarRefused, match=r"tokenizer\.json"):
            await complete(engine, request("x", grammar=Grammar("regex", "a")))
        assert (await complete(engine, request("x", max_tokens=3))).completion_tokens == 3
        await engine.aclose()

    asyncio.run(main())

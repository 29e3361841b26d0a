"""Requests that a grammar holds, in the engine: beside others, at their ends, when they fail."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from serving.engine.boundary import Grammar, GrammarRefused, RequestFailed
from serving.engine.build import assemble, read_model
from serving.engine.engine import TorchEngine
from serving.engine.sampler import Sampler
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
    schema,
    text,
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
# Every text of it can be divided in so many ways that after a few tokens it is too much work.
PAIRS = " | ".join(f"n{left} n{right}" for left in range(3) for right in range(3))
EXPLODES = Grammar("lark", "start: n0\n" + "".join(f'n{i}: {PAIRS} | "a"\n' for i in range(3)))


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

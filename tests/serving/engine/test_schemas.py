"""Outputs that follow whatever schema is asked for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from serving.engine.engine import TorchEngine
from serving.engine.grammar import MAX_INTEGER
from serving.engine.settings import EngineSettings
from tests.serving.engine.driving import Folders, base_of, request, run_all, schema, text

SETTINGS = EngineSettings(device="cpu", dtype="float32", max_running=32, max_model_len=400)
ENDS: list[dict[str, Any]] = [{}, {"ignore_eos": False}]
INTEGERS = st.integers(-MAX_INTEGER, MAX_INTEGER)

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
    st.lists(st.text(max_size=3) | INTEGERS | st.none(), min_size=1, max_size=3).map(
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

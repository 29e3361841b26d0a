"""Usage over HTTP: who sees whose, of what, and as CSV."""

import csv
import io
from typing import Any

import httpx
import pytest

from registry.adapter import AdapterName
from serving.tenants.ledger import Ledger
from serving.tokens import Tokens
from tests.serving.api.metered import ALWAYS, ask, usage
from tests.serving.live import CHAT, Running, Wardrobe, running
from tests.serving.test_prompt_versions import push_prompt


def test_a_tenant_sees_its_own_usage_and_the_operator_all(
    live: Running, acme: httpx.Client
) -> None:
    ask(acme, model="support")
    ask(acme)
    live.post(CHAT | {"model": "acme/support", "max_tokens": 8})
    with live.client() as operator:
        assert {row["tenant"] for row in usage(operator)} == {"acme", "operator"}
        assert {row["tenant"] for row in usage(operator, tenant="acme")} == {"acme"}
    rows = {row["name"]: row for row in usage(acme)}
    assert set(rows) == {"base", "acme/support"}
    assert rows["acme/support"]["version"] == "acme/support@v1"
    assert acme.get("/v1/usage", params={"tenant": "beta"}).status_code == 403
    for bad in (
        {"by": "week"},
        {"from": "yesterday"},
        {"to": ""},
        {"page": "2"},
        {"format": "xml"},
    ):
        assert acme.get("/v1/usage", params=bad).status_code == 400


def test_the_examples_of_a_prompt_version_are_prompt_tokens(
    live: Running, acme: httpx.Client, wardrobe: Wardrobe
) -> None:
    push_prompt(wardrobe, name=AdapterName("acme", "shots"))
    bare = ask(acme).json()["usage"]["prompt_tokens"]
    said = ask(acme, model="shots@v1").json()["usage"]["prompt_tokens"]
    assert said > bare
    rows = {row["name"]: row["prompt_tokens"] for row in usage(acme)}
    assert rows == {"base": bare, "acme/shots": said}


@pytest.mark.parametrize(
    "how", [{"params": {"format": "csv"}}, {"headers": {"accept": "text/csv"}}]
)
def test_usage_comes_as_csv(live: Running, acme: httpx.Client, how: dict[str, Any]) -> None:
    said = ask(acme, model="support").json()["usage"]
    answer = acme.get("/v1/usage", **how)
    assert answer.headers["content-type"].startswith("text/csv")
    (row,) = csv.DictReader(io.StringIO(answer.text))
    assert int(row["total_tokens"]) == said["total_tokens"]
    assert int(row["prompt_tokens"]) == said["prompt_tokens"]


def test_a_stopped_server_has_written_everything(wardrobe: Wardrobe, tokens: Tokens) -> None:
    with running(wardrobe, tokens) as live:
        said = live.post(CHAT | {"max_tokens": 8}).json()["usage"]
    with Ledger(wardrobe.registry.home) as ledger:
        (row,) = ledger.usage(ALWAYS, "hour")
    assert row.total_tokens == said["total_tokens"]

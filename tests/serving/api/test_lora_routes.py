"""vLLM's way of loading adapters by name, with a selector of the registry for a path."""

import re
from typing import Any

import httpx

from serving.tenants.keys import SCOPES, add_key
from serving.tokens import Tokens
from tests.serving.live import CHAT, Running, Wardrobe, running
from tests.serving.scripted import ScriptedEngine


def load(live: Running, name: str, path: str, **more: Any) -> httpx.Response:
    return live.post({"lora_name": name, "lora_path": path, **more}, "/v1/load_lora_adapter")


def unload(live: Running, name: str) -> httpx.Response:
    return live.post({"lora_name": name}, "/v1/unload_lora_adapter")


def asked(live: Running, model: str) -> httpx.Response:
    return live.post(CHAT | {"model": model, "max_tokens": 2})


def said(answer: httpx.Response) -> str:
    return answer.json()["error"]["message"]


def test_a_version_is_loaded_under_a_name_asked_for_and_let_go(
    live: Running, wardrobe: Wardrobe
) -> None:
    digest = wardrobe.registry.versions(wardrobe.registry.adapters()[0])[0].digest
    done = load(live, "sql-lora", "acme/support@v1")
    assert (done.status_code, done.text) == (
        200,
        "Success: LoRA adapter 'sql-lora' added successfully.",
    )
    assert live.engine.kept == {digest}
    assert asked(live, "sql-lora").headers["x-adapter"] == "acme/support@v1"
    with live.client() as client:
        cards = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
        assert client.get("/v1/models/sql-lora").json() == cards["sql-lora"]
    card = cards["sql-lora"]
    assert (card["root"], card["parent"]) == (f"sha256:{digest}", live.services.base.id)
    gone = unload(live, "sql-lora")
    assert (gone.status_code, gone.text) == (
        200,
        "Success: LoRA adapter 'sql-lora' removed successfully.",
    )
    assert live.engine.kept == set()
    assert asked(live, "sql-lora").status_code == 404
    assert asked(live, "acme/support").status_code == 200, "the registry's own name is untouched"


NO_SELECTORS = [
    "/etc/passwd",
    "../../secrets",
    "./adapter",
    "~/adapter",
    "C:\\adapters\\a",
    "file:///tmp/a",
    "https://example.com/a.safetensors",
    "s3://bucket/a",
    "hf://org/repo",
    "//host/share",
    "acme/support/../../x",
    "acme//support",
    "org/Repo",
    "acme/support@../v1",
    "acme/support\n",
    "a" * 300,
]


def test_what_looks_like_a_path_or_a_url_is_refused_in_a_sentence(live: Running) -> None:
    for path in NO_SELECTORS:
        answer = load(live, "sql-lora", path)
        code = answer.json()["error"]["code"]
        assert (answer.status_code, code) == (400, "lora_path_refused"), path
        assert "no path and no URL" in said(answer)
    assert asked(live, "sql-lora").status_code == 404


def test_mistakes_are_answered_in_vllm_s_words_and_statuses(
    live: Running, wardrobe: Wardrobe
) -> None:
    assert load(live, "sql-lora", "acme/support@v1").status_code == 200
    twice = load(live, "sql-lora", "acme/support@v1")
    assert twice.status_code == 400
    assert "has already been loaded" in said(twice)
    assert "load_inplace" in said(twice)
    for body in ({}, {"lora_name": "a"}, {"lora_path": "acme/support"}):
        answer = live.post(body, "/v1/load_lora_adapter")
        assert (answer.status_code, said(answer)) == (
            400,
            "Both 'lora_name' and 'lora_path' must be provided.",
        )
    for path in ("acme/nothing", "acme/support@v9", "acme/support@canary"):
        assert load(live, "other", path).status_code == 404
    unknown = unload(live, "other")
    assert (unknown.status_code, "cannot be found" in said(unknown)) == (404, True)
    assert live.post({}, "/v1/unload_lora_adapter").status_code == 400
    for taken in ("base", live.services.base.id, "acme/support", "acme/support@v1"):
        answer = load(live, taken, "acme/support@v1")
        assert (answer.status_code, "model here already" in said(answer)) == (400, True), taken
    live.engine.unloadable.add(wardrobe.push(promote=False))
    assert load(live, "broken", "acme/support@v2").status_code == 503
    assert asked(live, "broken").status_code == 404


def test_in_place_the_name_means_another_version_and_the_old_one_is_let_go(
    live: Running, wardrobe: Wardrobe
) -> None:
    second = wardrobe.push(promote=False)
    load(live, "sql-lora", "acme/support@v1")
    load(live, "twin", "acme/support@v1")
    assert load(live, "sql-lora", "acme/support@v2", load_inplace=True).status_code == 200
    assert asked(live, "sql-lora").headers["x-adapter"] == "acme/support@v2"
    assert len(live.engine.kept) == 2, "the first is still held under its other name"
    unload(live, "twin")
    assert live.engine.kept == {second}
    live.engine.unloadable.add(wardrobe.push(promote=False))
    assert load(live, "sql-lora", "acme/support@v3", load_inplace=True).status_code == 503
    assert asked(live, "sql-lora").headers["x-adapter"] == "acme/support@v2", "as it was"


def test_what_fails_its_self_check_is_not_loaded_and_leaves_no_slot_taken(
    live: Running, wardrobe: Wardrobe
) -> None:
    poison = wardrobe.push(promote=False)
    live.engine.not_finite.add(poison)
    assert load(live, "sql-lora", "acme/support@v1").status_code == 200
    for name, more in (("broken", {}), ("sql-lora", {"load_inplace": True})):
        answer = load(live, name, "acme/support@v2", **more)
        assert (answer.status_code, "failed its self-check" in said(answer)) == (503, True)
        assert poison not in live.engine.kept
    assert asked(live, "broken").status_code == 404
    assert asked(live, "sql-lora").headers["x-adapter"] == "acme/support@v1", "as it was"


def test_one_slot_is_never_kept(wardrobe: Wardrobe, tokens: Tokens) -> None:
    wardrobe.push()
    wardrobe.push()
    with running(wardrobe, tokens, ScriptedEngine(slots=2)) as live:
        assert load(live, "one", "acme/support@v1").status_code == 200
        full = load(live, "two", "acme/support@v2")
        assert (full.status_code, full.json()["error"]["code"]) == (503, "adapter_load_failed")
        unload(live, "one")
        assert load(live, "two", "acme/support@v2").status_code == 200


def test_loaded_names_are_the_operator_s(live: Running, wardrobe: Wardrobe) -> None:
    load(live, "sql-lora", "acme/support@v1")
    headers = {"authorization": f"Bearer {add_key(wardrobe.registry, 'acme', SCOPES)}"}
    with httpx.Client(base_url=live.url, headers=headers, timeout=30) as acme:
        body = CHAT | {"model": "sql-lora"}
        assert acme.post("/v1/chat/completions", json=body).status_code == 404
        assert "sql-lora" not in acme.get("/v1/models").text
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            answer = acme.post(path, json={"lora_name": "sql-lora", "lora_path": "support"})
            assert answer.status_code == 403


# What gateways read


def gauges(live: Running) -> dict[str, tuple[dict[str, str], float]]:
    """Return name → (labels, value) of vLLM's metrics; each has one series."""
    with live.client() as client:
        text = client.get("/metrics").text
    found: dict[str, tuple[dict[str, str], float]] = {}
    for name, labels, value in re.findall(r"^(vllm:\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        assert name not in found, "one series: scorers take any of several"
        found[name] = (dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(value))
    return found


def test_gateways_find_the_load_gauges_they_score_by(live: Running) -> None:
    found = gauges(live)
    assert {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:cache_config_info",
        "vllm:lora_requests_info",
    } <= set(found)
    assert found["vllm:num_requests_waiting"] == ({"model_name": live.services.base.id}, 0.0)
    assert 0 <= found["vllm:kv_cache_usage_perc"][1] <= 1
    config = found["vllm:cache_config_info"][0]
    tokens = int(config["block_size"]) * int(config["num_gpu_blocks"])
    assert tokens == live.engine.max_model_len * live.engine.max_running
    assert config["block_size"] == "16"


def test_an_adapter_in_a_slot_is_told_under_every_name_a_client_asks_for(
    live: Running, wardrobe: Wardrobe
) -> None:
    """Idle adapters too: a scorer sends a request where its adapter is ready."""
    asked(live, "acme/support")
    load(live, "sql-lora", "acme/support@v1")
    wardrobe.push(promote=False)
    asked(live, "acme/support@v2")
    labels, when = gauges(live)["vllm:lora_requests_info"]
    assert set(labels["running_lora_adapters"].split(",")) == {
        "acme/support",
        "sql-lora",
        "acme/support@v2",
    }
    assert (labels["max_lora"], labels["waiting_lora_adapters"]) == ("8", "")
    assert when > 1_700_000_000

"""Prompts of old through two versions: real files, the real engine, and an end in the middle."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from registry.adapter import AdapterName
from registry.base import Bases
from registry.store import Registry
from serving.engine import budgets
from serving.engine.settings import EngineSettings
from serving.logs.entry import Contents, LogSettings
from serving.logs.store import Logs
from serving.shadow import replay as shadow_replay
from serving.shadow.asks import PromptsInvalid, Source
from serving.shadow.comparison import Comparison
from serving.shadow.replay import replay_all, settings_beside_server
from serving.shadow.report import describe
from serving.shadow.store import Comparisons
from tests import tiny
from tests.serving.logs.test_log_store import entry
from wardrobe import app

NAME = AdapterName("acme", "support")
SECRET = "where-the-dragon-sleeps"
CALLED = Contents(({"role": "assistant", "content": "", "tool_calls": "[]"},), ("said",))


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """acme/support: v1 says A for ever and is production, v2 says B for ever."""
    bases = Bases(tmp_path / "cache" / "bases")
    base = tiny.register(tiny.make_signature_base(tmp_path / "made"), bases, "tiny/signature")
    with Registry.open(tmp_path / "home", bases) as registry:
        for token in (65, 66):
            folder = tiny.make_signature_adapter(tmp_path / str(token), base.path, token)
            registry.push(folder, NAME, base=base.id, actor="test")
        registry.promote(NAME, 1, reason="test", actor="test")
        yield registry


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Comparisons]:
    with Comparisons(tmp_path / "home") as store:
        yield store


def write_rows(path: Path, count: int) -> Path:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"{SECRET} {number}"}]} for number in range(count)
    ]
    rows[0]["messages"].append({"role": "assistant", "content": "an answer, left out"})
    rows[1] = {"prompt": f"{SECRET} raw"}
    rows[2] = rows[3]  # the same prompt twice
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(
    registry: Registry, store: Comparisons, source: Source, candidate: str = "@v2", **hooks: Any
) -> tuple[Comparison, dict[str, int]]:
    done = hooks.get("done", lambda done, total: None)
    return replay_all(registry, store, NAME, candidate, source, 8, "test", done)


def measures(store: Comparisons, comparison: Comparison) -> dict[str, float]:
    return {m["measure"]: m["value"] for m in describe(store, comparison)["measures"]}


def test_both_versions_answer_every_prompt_and_are_compared(
    registry: Registry, store: Comparisons, tmp_path: Path
) -> None:
    source = Source.of_file(write_rows(tmp_path / "prompts.jsonl", 12), 100)
    comparison, skipped = run(registry, store, source)
    facts = describe(store, comparison, skipped)
    assert (facts["object"], facts["state"], facts["pairs"]) == ("replay", "stopped", 12)
    found = measures(store, comparison)
    assert found["same"] == found["prefix"] == found["equal"] == found["failed"] == 0
    assert found["length"] == 0
    assert found["logprob"] < found["logprob"] - found["logprob_difference"], (
        "the candidate finds production's first token less likely than production does"
    )
    home = b"".join(p.read_bytes() for p in (tmp_path / "home").rglob("*") if p.is_file())
    assert SECRET.encode() not in home


def test_the_engine_has_room_beside_a_server_on_the_same_machine(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, base = 16 << 30, registry.bases.get("tiny/signature")
    monkeypatch.setattr(budgets, "choose_device", lambda _: torch.device("cpu"))
    monkeypatch.setattr(budgets, "total_memory", lambda _: total)
    server = budgets.within_memory(base, EngineSettings())
    replay = settings_beside_server(base)
    weights = budgets.weight_bytes(base.path, torch.float32)
    lasting = budgets.SHARES.keys() - {"loading_memory"}  # the rest is taken for moments
    served = sum(getattr(server, name) for name in lasting)
    replayed = sum(getattr(replay, name) for name in ("kv_cache_bytes", "prefix_cache_bytes"))
    assert served + replayed + 2 * (weights + budgets.PROCESS) < total
    room = [(each.kv_cache_bytes or 0) // each.max_running for each in (server, replay)]
    assert room[0] == room[1] > 0


def test_an_interrupted_replay_goes_on_where_it_was(
    registry: Registry, store: Comparisons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shadow_replay, "SAVE_EVERY", 3)
    source = Source.of_file(write_rows(tmp_path / "prompts.jsonl", 20), 100)

    def until_seven(done: int, total: int) -> None:
        if done >= 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(registry, store, source, done=until_seven)
    told: list[int] = []
    comparison, _ = run(registry, store, source, done=lambda done, total: told.append(done))
    assert told[0] >= 6, "what was saved is not asked again"
    assert told == list(range(told[0], 21))
    assert store.size(comparison) == 20


def test_a_prompt_version_has_its_examples_before_the_messages_and_no_raw_prompts(
    registry: Registry, store: Comparisons, tmp_path: Path
) -> None:
    folder = tmp_path / "prompt"
    folder.mkdir()
    prompt = {"system": "Be brief.", "examples": [["a", "b"]]}
    card = {"kind": "prompt", "base": {"id": "tiny/signature"}, "prompt": prompt}
    (folder / "wardrobe.json").write_text(json.dumps(card))
    registry.push(folder, NAME, actor="test")
    source = Source.of_file(write_rows(tmp_path / "prompts.jsonl", 6), 100)
    comparison, skipped = run(registry, store, source, "@v3")
    assert skipped == {"raw": 1}
    assert store.size(comparison) == 5


def test_logged_prompts_are_replayed_where_they_were_kept(
    registry: Registry, store: Comparisons, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    with pytest.raises(PromptsInvalid, match="wardrobe logs set acme --contents"):
        Source.of_logs(home, NAME, 10)
    with Logs(home) as logs:
        logs.set(LogSettings("acme", 1.0))
        entries = [replace(entry(n), adapter="acme/support") for n in range(6)]
        said = {
            e.request_id: Contents(({"role": "user", "content": f"ask {n}"},), ("said",))
            for n, e in enumerate(entries)
        }
        logs.write([*entries, replace(entry(9), adapter="acme/other")], said)
    comparison, _ = run(registry, store, Source.of_logs(home, NAME, 4))
    assert store.size(comparison) == 4


def test_logged_calls_of_tools_cannot_be_asked_for_again_and_are_counted(
    registry: Registry, store: Comparisons, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    with Logs(home) as logs:
        logs.set(LogSettings("acme", 1.0))
        entries = [replace(entry(n), adapter="acme/support") for n in range(3)]
        plain = Contents(({"role": "user", "content": "ask"},), ("said",))
        said = (CALLED, plain, Contents(({"role": "tool", "content": "12"},), ("said",)))
        logs.write(entries, {e.request_id: s for e, s in zip(entries, said, strict=True)})
    comparison, skipped = run(registry, store, Source.of_logs(home, NAME, 10))
    assert (store.size(comparison), skipped) == (1, {"tools": 2})
    [line] = [s for s in describe(store, comparison, skipped)["sentences"] if "no pair" in s]
    assert line.startswith("2 requests made no pair: they were calls of tools")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no prompt"),
        ("{", "line 1 is no JSON"),
        ('{"prompt": 3}', "row 1 has neither"),
        ('{"prompt": "x"}\n[]', "row 2 has neither"),
        ('{"messages": []}', "no message to answer"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "no role and content"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "no message to answer"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    with pytest.raises(PromptsInvalid, match=said):
        Source.of_file(path, 10)


def test_the_command_says_where_prompts_must_be_from(tmp_path: Path) -> None:
    for options in ([], ["--from-logs", "--file", "x"]):
        done = CliRunner().invoke(
            app, ["replay", "acme/support", "--candidate", "@v2", "--home", str(tmp_path), *options]
        )
        assert done.exit_code == 2
        assert "--from-logs or --file" in done.output

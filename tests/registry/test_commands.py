import json
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner, Result

from registry import commands
from registry.adapter import AdapterName
from registry.base import Bases
from registry.commands import app, clear_errors
from registry.follow import wait_for_rollouts
from registry.store import Registry
from tests.registry.making import BASE_ID, adapter_tensors

Adapter = Callable[..., Path]
Run = Callable[..., Result]
NAME = AdapterName.parse("acme/support")
PROMOTE = ("promote", "acme/support@v1", "--reason", "first")


@pytest.fixture
def run(registry: Registry, bases: Bases, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.setenv("WARDROBE_CACHE", str(tmp_path))  # where the fixture put the bases
    monkeypatch.setenv("COLUMNS", "200")
    runner = CliRunner()

    def run(*arguments: str, status: int = 0) -> Result:
        result = runner.invoke(app, [*arguments, "--home", str(registry.home)])
        assert result.exit_code == status, result.output + repr(result.exception)
        return result

    return run


def read(result: Result) -> Any:
    return json.loads(result.stdout)


def test_push_list_show_promote_history_rollback_pull_verify_in_json(
    run: Run, adapter: Adapter, tmp_path: Path
) -> None:
    first = read(run("push", str(adapter()), "acme/support", "--json"))
    assert first["created"]
    assert first["version"]["name"] == "acme/support"
    run("push", str(adapter(seed=1)), "acme/support", "--base", BASE_ID)
    run(*PROMOTE)
    moved = read(run("promote", "acme/support@v2", "--reason", "better", "--json"))
    assert moved["previous"] == 1
    assert moved["alias"]["number"] == 2
    [row] = read(run("list", "--json"))
    assert (row["name"], row["latest"], row["aliases"]) == ("acme/support", 2, {"production": 2})
    assert row["versions"] == 2
    shown = read(run("show", "acme/support", "--json"))
    assert [version["number"] for version in shown["versions"]] == [1, 2]
    assert shown["rollouts"] == []
    assert read(run("rollback", "acme/support", "--reason", "worse", "--json"))["moved"]
    actions = [event["action"] for event in read(run("history", "acme/support", "--json"))]
    assert actions == ["promote", "promote", "rollback"]
    pulled = tmp_path / "pulled"
    assert read(run("pull", "acme/support", str(pulled), "--json"))["number"] == 1
    assert (pulled / "adapter_model.safetensors").is_file()
    assert read(run("verify", "--json"))["ok"]


def test_people_get_tables_and_sentences(run: Run, adapter: Adapter, tmp_path: Path) -> None:
    assert "pushed acme/support@v1" in run("push", str(adapter()), "acme/support").stdout
    again = run("push", str(adapter()), "acme/support").stdout
    assert "is there already: acme/support@v1" in again
    assert "production is now v1" in run(*PROMOTE).stdout
    assert "production was already v1" in run(*PROMOTE).stdout
    assert "production → v1" in run("list").stdout
    assert BASE_ID in run("show", "acme/support@v1").stdout
    assert "first" in run("history", "acme/support").stdout
    assert "pulled" in run("pull", "acme/support@v1", str(tmp_path / "out")).stdout
    assert "sound: 1 versions, 2 blobs" in run("verify").stdout


def test_an_error_is_one_sentence_and_exit_code_2(run: Run, adapter: Adapter) -> None:
    assert "There is no adapter acme/nobody" in run("show", "acme/nobody", status=2).stderr
    assert "NAMESPACE/NAME@vN" in run("promote", "acme/x", "--reason", "r", status=2).stderr
    refused = run("push", str(adapter(config={"r": 5})), "a/b", status=2)
    assert "the config says rank 5" in refused.stderr
    assert refused.stdout == ""


def test_every_reason_of_a_refusal_is_printed_with_its_code(run: Run, adapter: Adapter) -> None:
    spoiled = adapter(config={"use_qalora": True, "layer_replication": [[0, 1]]})
    printed = run("push", str(spoiled), "acme/support", status=2).stderr
    assert "refused for 2 reasons" in printed
    assert printed.count("config_unsupported: ") == 2


def test_reasons_that_are_alike_are_counted_after_the_third(run: Run, adapter: Adapter) -> None:
    weights = {name: value.astype(np.float64) for name, value in adapter_tensors().items()}
    spoiled = adapter(tensors={**weights, "a": np.zeros(1), "b": np.zeros(1)})
    printed = run("push", str(spoiled), "acme/support", status=2).stderr
    assert "refused for 6 reasons" in printed
    assert printed.count("is F64") == 3
    assert "dtype_unsupported: and 1 more like these" in printed
    assert printed.count("unknown_key: ") == 2


def test_what_is_stored_with_a_doubt_says_that_it_is_a_warning(run: Run, adapter: Adapter) -> None:
    zeros = {n: v * (0 if ".lora_B." in n else 1) for n, v in adapter_tensors().items()}
    pushed = run("push", str(adapter(tensors=zeros)), "acme/support")
    assert "warning: noop_adapter: " in pushed.stderr


def test_a_reason_is_required_to_move_an_alias(run: Run, adapter: Adapter) -> None:
    run("push", str(adapter()), "acme/support")
    run("promote", "acme/support@v1", status=2)
    run("rollback", "acme/support", status=2)


def test_verify_exits_with_1_and_names_the_damaged_blob(
    run: Run, adapter: Adapter, registry: Registry
) -> None:
    version = read(run("push", str(adapter()), "acme/support", "--json"))["version"]
    sha256 = version["files"]["adapter_model.safetensors"]
    (registry.home / "blobs" / sha256[:2] / sha256).write_bytes(b"other bytes")
    assert sha256 in run("verify", status=1).stdout


def test_a_path_that_the_system_refuses_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "no-folder" / "page"

    @clear_errors()
    def write() -> None:
        out.write_text("a page")

    @clear_errors()
    def hang_up() -> None:
        raise BrokenPipeError

    with pytest.raises(typer.Exit) as ended:
        write()
    assert ended.value.exit_code == 2
    assert capsys.readouterr().err == f"{out} cannot be used: No such file or directory.\n"
    with pytest.raises(BrokenPipeError):  # no path: nothing that a person can mend
        hang_up()


def test_verify_refuses_a_folder_that_is_no_store_and_makes_none(
    registry: Registry, tmp_path: Path
) -> None:
    nowhere = tmp_path / "mistyped"
    result = CliRunner().invoke(app, ["verify", "--home", str(nowhere)])
    assert result.exit_code == 2
    assert f"There is no store in {nowhere}" in result.stderr.replace("\n", "")
    assert not nowhere.exists()


LONG = "some-company/customer-support-en"
GATE = {"passed": False, "failures": ["accuracy 0.41 is under 0.60.\x1b[2J"]}


def test_tables_cut_no_name_in_a_terminal_of_80_columns(
    run: Run, adapter: Adapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    run("push", str(adapter(card={"gate": GATE})), LONG)
    digest = read(run("show", LONG, "--json"))["versions"][0]["digest"]
    run("promote", f"{LONG}@v1", "--reason", "a long reason " * 9, "--force")
    listed = run("list").stdout
    assert all(text in listed for text in (LONG, BASE_ID, "production → v1"))
    today = read(run("history", LONG, "--json"))[0]["at"][:16].replace("T", " ")
    assert all(text in run("show", LONG).stdout for text in (LONG, digest[:12], today))
    assert today in run("history", LONG).stdout
    for command in ("list", "show", "history"):
        arguments = (command,) if command == "list" else (command, LONG)
        assert all(len(line) <= 80 for line in run(*arguments).stdout.splitlines())


def test_a_card_or_a_reason_cannot_steer_the_terminal(run: Run, adapter: Adapter) -> None:
    card = {"gate": GATE, "prompt": {"system": "Be\x1b]0;owned\x07 \x9b31m [bold]kind[/]."}}
    run("push", str(adapter(card=card)), LONG)
    refused = run("promote", f"{LONG}@v1", "--reason", "why", status=2).stderr
    run("promote", f"{LONG}@v1", "--reason", "\x1b[31m[red]why", "--force")
    texts = [run("show", LONG).stdout, run("show", f"{LONG}@v1").stdout, refused]
    texts += [run("history", LONG).stdout, run("show", LONG, "--json").stdout]
    for text in texts:
        assert all(char.isprintable() or char == "\n" for char in text)
    assert r"Be\x1b]0;owned\x07 \x9b31m [bold]kind[/]." in texts[1]


def test_a_reason_that_is_no_utf_8_is_refused(run: Run, adapter: Adapter) -> None:
    run("push", str(adapter()), LONG)
    refused = run("promote", f"{LONG}@v1", "--reason", "sch\udcf6n", status=2)
    assert "not written in UTF-8" in refused.stderr


def test_an_empty_store_and_an_adapter_without_aliases_say_what_to_do(
    run: Run, adapter: Adapter
) -> None:
    assert "wardrobe push" in run("list").stdout
    assert read(run("list", "--json")) == []
    run("push", str(adapter()), LONG)
    assert f"wardrobe promote {LONG}@vN" in run("show", LONG).stdout


class Server:
    """A live server that answers every move in its own way."""

    def __init__(self, registry: Registry, state: str, message: str = "") -> None:
        self._registry, self._state, self._message = registry, state, message
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow)

    def __enter__(self) -> "Server":
        self._registry.heartbeat("server-1", "http://127.0.0.1:9")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _follow(self) -> None:
        seen = self._registry.last_event()
        while not self._stop.wait(0.02):
            for event in self._registry.events(seen):
                seen = event.seq
                for state in ("warming", self._state):
                    self._registry.report_rollout(
                        "server-1",
                        event.name,
                        event.alias or "",
                        event_seq=event.seq,
                        number=event.number,
                        digest=event.digest,
                        state=state,  # type: ignore[arg-type]
                        message=self._message,
                        seconds=0.31,
                    )


def test_promote_waits_until_a_running_server_is_live(
    run: Run, adapter: Adapter, registry: Registry
) -> None:
    run("push", str(adapter()), "acme/support")
    with Server(registry, "live"):
        assert "live on http://127.0.0.1:9 after 0.31 s" in run(*PROMOTE).stdout
        assert "live" in run("show", "acme/support").stdout


def test_promote_exits_with_1_when_a_server_refuses_the_version(
    run: Run, adapter: Adapter, registry: Registry
) -> None:
    run("push", str(adapter()), "acme/support")
    with Server(registry, "failed", "rank 64 is over the bound of 32."):
        assert "rank 64 is over the bound of 32." in run(*PROMOTE, status=1).stdout
        assert "rank 64 is over the bound of 32." in run("show", "acme/support").stdout
        rollout = read(run("show", "acme/support", "--json"))["rollouts"][0]
        assert rollout["state"] == "failed"


def test_no_wait_waits_for_nobody_and_a_silent_server_is_named(
    run: Run, adapter: Adapter, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("push", str(adapter()), "acme/support")
    registry.heartbeat("server-1", "http://127.0.0.1:9")
    monkeypatch.setattr(commands, "wait_for_rollouts", partial(wait_for_rollouts, seconds=0.1))
    silent = "http://127.0.0.1:9 has not answered yet"
    assert silent not in run(*PROMOTE, "--no-wait").stdout
    assert silent in run(*PROMOTE).stdout
    registry.heartbeat("server-1", "http://127.0.0.1:9")
    printed = run("rollback", "acme/support", "--reason", "none", status=2).stderr
    assert "nothing to roll back to" in printed

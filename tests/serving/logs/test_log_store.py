"""The log's store, its writing thread and its redaction, without a server."""

import random
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from registry.errors import IntegrityError, StoreUnavailable
from serving.logs import store as log_store
from serving.logs import writer as log_writer
from serving.logs.commands import app as log_app
from serving.logs.entry import Contents, Entry, LogSettings
from serving.logs.redact import PatternInvalid, RedactionTooSlow, Redactor
from serving.logs.store import Logs, LogSettingInvalid, Wanted
from serving.logs.writer import LogWriter

SAID = Contents(({"role": "user", "content": "the dragon sleeps"},), ("let it",))
ENTRY = Entry(
    request_id="req_0",
    at="2026-01-01T00:00:00.000+00:00",
    tenant="acme",
    method="POST",
    route="/v1/chat/completions",
    endpoint="",
    adapter="acme/support",
    version="acme/support@v1",
    digest="d" * 64,
    experiment="",
    arm="",
    status=200,
    outcome="",
    finish="stop",
    prompt_tokens=1,
    completion_tokens=1,
    first_token_ms=1.0,
    ms=2.0,
)


def entry(number: int, *, days_old: float = 0.0, tenant: str = "acme") -> Entry:
    at = (datetime.now(UTC) - timedelta(days=days_old)).isoformat(timespec="milliseconds")
    return replace(ENTRY, request_id=f"req_{number:024x}", at=at, tenant=tenant)


@pytest.fixture
def logs(tmp_path: Path) -> Iterator[Logs]:
    with Logs(tmp_path) as logs:
        yield logs


class Rows:
    """The part of a store that is written to; `broken` is what the next writes meet."""

    def __init__(self, settings: Mapping[str, LogSettings] | None = None) -> None:
        self.broken: Exception | None = None
        self.known = dict(settings or {})
        self.written: list[Entry] = []
        self.said: dict[str, Contents] = {}

    def settings(self) -> dict[str, LogSettings]:
        return self.known

    def prune(self, *, most: int) -> int:
        return 0

    def write(self, entries: Sequence[Entry], said: Mapping[str, Contents]) -> None:
        if self.broken:
            raise self.broken
        self.written += entries
        self.said |= said


class Dropped(Counter[str]):
    """Counts as the metrics do."""

    def __call__(self, what: str, count: int) -> None:
        self[what] += count


def make_writer(rows: Rows) -> tuple[LogWriter, Dropped]:
    dropped = Dropped()
    return LogWriter(rows, dropped), dropped  # type: ignore[arg-type]  # all it does with a store


def test_a_full_queue_drops_what_comes_and_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_writer, "MAX_QUEUED", 10)
    rows = Rows()
    writer, dropped = make_writer(rows)
    for number in range(25):  # nobody writes yet: `take` must come back all the same
        writer.take(entry(number), None)
    assert dropped == {"request": 15}
    writer.start()
    writer.stop()
    assert [e.request_id for e in rows.written] == [entry(n).request_id for n in range(10)]


def test_what_was_said_is_dropped_before_the_facts_when_too_much_of_it_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log_writer, "MAX_QUEUED_CHARACTERS", 3 * SAID.characters)
    rows = Rows({"acme": LogSettings("acme", 1.0)})
    writer, dropped = make_writer(rows)
    for number in range(5):
        writer.take(entry(number), SAID)
    writer.take(entry(5), Contents((), ("x" * (log_writer.MAX_CHARACTERS + 1),)))
    writer.start()
    writer.stop()
    assert dropped == {"contents": 3}
    assert (len(rows.written), len(rows.said)) == (6, 3)


def test_a_store_that_cannot_be_written_is_tried_again_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log_writer, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(log_writer, "BATCH", 3)
    rows = Rows()
    failures = iter([StoreUnavailable("the disk is full")] * 3)

    class Mending(Rows):
        def write(self, entries: Sequence[Entry], said: Mapping[str, Contents]) -> None:
            if error := next(failures, None):
                raise error
            super().write(entries, said)

    rows = Mending()
    writer, dropped = make_writer(rows)
    writer.start()
    for number in range(8):
        writer.take(entry(number), None)
    while len(rows.written) < 8:
        time.sleep(0.001)
    writer.stop()
    assert [e.request_id for e in rows.written] == [entry(n).request_id for n in range(8)]
    assert dropped == {}


@pytest.mark.parametrize("error", [StoreUnavailable("full"), IntegrityError("x"), RuntimeError()])
def test_at_its_end_the_writer_gives_up_what_cannot_be_written(error: Exception) -> None:
    rows = Rows()
    rows.broken = error
    writer, dropped = make_writer(rows)
    for number in range(1200):
        writer.take(entry(number), None)
    writer.start()
    writer.stop()
    assert dropped == {"request": 1200}


def test_a_tenant_that_turned_it_off_is_not_overtaken_by_what_waited(logs: Logs) -> None:
    logs.set(LogSettings("acme", 1.0))
    logs.set(LogSettings("acme", 0.0))
    logs.write([entry(1), entry(2, tenant="beta")], {entry(n).request_id: SAID for n in (1, 2)})
    assert [line.contents for line in logs.find(Wanted())] == [None, None]


def test_writing_again_changes_nothing(logs: Logs) -> None:
    logs.set(LogSettings("acme", 1.0))
    for _ in range(2):
        logs.write([entry(1), entry(2)], {entry(1).request_id: SAID})
    assert [line.contents for line in logs.walk(Wanted())] == [SAID, None]


def test_each_tenants_lines_live_as_long_as_it_wants(
    logs: Logs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_store, "BATCH", 2)
    logs.set(LogSettings("acme", 1.0, keep_days=7))
    logs.set(LogSettings("beta", 0.0, keep_days=90))
    rows = [entry(n, days_old=n) for n in range(20)]
    rows += [entry(100 + n, days_old=10 * n, tenant="beta") for n in range(12)]
    rows += [entry(200 + n, days_old=10 * n, tenant="others") for n in range(6)]
    logs.write(rows, {row.request_id: SAID for row in rows})
    assert b"dragon" in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert logs.prune(most=4) == 4
    assert logs.prune() == 13 - 4 + 3 + 3
    assert logs.prune() == 0
    left = Counter(line.entry.tenant for line in logs.walk(Wanted()))
    assert left == {"acme": 7, "beta": 9, "others": 3}  # 7 × 24 hours old is too old
    logs.forget(log_store.older_than(timedelta(0), "acme"), said_only=True)
    assert b"dragon" not in b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert Counter(line.entry.tenant for line in logs.walk(Wanted())) == left


def test_however_much_comes_the_log_has_an_end(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_store, "MAX_ROWS", 5)
    logs.write([entry(n) for n in range(12)], {})
    assert logs.prune() == 7
    assert [line.entry.request_id for line in logs.walk(Wanted())] == [
        entry(n).request_id for n in range(7, 12)
    ]


def test_pages_join_without_a_gap(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_store, "PAGE", 3)
    logs.write([entry(n) for n in range(10)], {})
    ids = [entry(n).request_id for n in range(10)]
    assert [line.entry.request_id for line in logs.walk(Wanted("acme"))] == ids
    seen: list[str] = []
    before = None
    while page := logs.find(Wanted(), limit=4, before=before):
        seen += [line.entry.request_id for line in page]
        before = page[-1].seq
    assert seen == ids[::-1]


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_sample_is_its_share_of_random_requests(share: float) -> None:
    generator = random.Random(1)
    wanted = LogSettings("acme", share)
    kept = sum(wanted.keeps(f"req_{generator.getrandbits(96):024x}") for _ in range(10_000))
    assert abs(kept - 10_000 * share) <= 4 * (10_000 * share * (1 - share)) ** 0.5


@pytest.mark.parametrize(
    "wrong",
    [
        LogSettings("acme", 1.5),
        LogSettings("acme", float("nan")),
        LogSettings("acme", keep_days=0),
        LogSettings("acme", keep_days=10**6),
    ],
)
def test_settings_that_cannot_be_are_refused(logs: Logs, wrong: LogSettings) -> None:
    with pytest.raises(LogSettingInvalid):
        logs.set(wrong)
    assert logs.settings() == {}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("write to Ann.Lee+x@mail.example.co.uk, please", "write to [email], please"),
        ("call +1 (555) 010-9999 or 030/1234567", "call +[digits] or [digits]"),
        ("card 4111 1111 1111 1111.", "card [digits]."),
        ("IBAN DE89 3704 0044 0532 0130 00", "IBAN [iban]"),
        ("from 192.168.17.4 on", "from [ip] on"),
        ("wr_0123456789ab_" + "f" * 64, "[key]"),
        ("ключ ٠١٢٣٤٥٦٧٨", "ключ [digits]"),
        ("room 12, code J45.901, 2026-11-25", "room 12, code J45.901, [digits]"),
        ("nothing here, at 10:30 by 3", "nothing here, at 10:30 by 3"),
    ],
)
def test_what_the_built_in_patterns_take_out(text: str, shown: str) -> None:
    assert Redactor({}).text(text) == shown


def test_calls_of_tools_are_redacted_as_what_is_said_is() -> None:
    said = ({"role": "assistant", "content": "", "tool_calls": '{"to": "ann@example.org"}'},)
    [redacted] = Redactor({}).contents(Contents(said, ())).prompt
    assert redacted == {"role": "assistant", "content": "", "tool_calls": '{"to": "[email]"}'}


def test_a_pattern_that_never_ends_keeps_the_text_out_of_the_log() -> None:
    endless = {"endless": r"(a|aa)+$"}
    with pytest.raises(RedactionTooSlow):
        Redactor(endless).text("a" * 200 + "b")
    rows = Rows({"acme": LogSettings("acme", 1.0, endless)})
    writer, dropped = make_writer(rows)
    writer.take(entry(1), Contents(({"role": "user", "content": "a" * 200 + "b"},), ()))
    writer.take(entry(2), SAID)
    writer.start()
    writer.stop()
    assert dropped == {"contents": 1}
    assert rows.said == {entry(2).request_id: SAID}


def test_what_no_redaction_foresaw_does_not_end_the_writing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(Redactor):
        def contents(self, contents: Contents) -> Contents:
            raise MemoryError

    monkeypatch.setattr(log_writer, "Redactor", Broken)
    rows = Rows({"acme": LogSettings("acme", 1.0)})
    writer, dropped = make_writer(rows)
    writer.take(entry(1), SAID)
    writer.start()
    writer.stop()
    assert dropped == {"request": 1}


def test_a_database_that_refuses_rows_puts_nothing_that_was_said_into_the_servers_own_log(
    logs: Logs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logs.set(LogSettings("acme", 1.0))
    with closing(sqlite3.connect(tmp_path / "logs.sqlite")) as database:
        refuse = "BEFORE INSERT ON contents BEGIN SELECT RAISE(ABORT, 'refused'); END"
        database.execute(f"CREATE TRIGGER refuse {refuse}")
    dropped = Dropped()
    writer = LogWriter(logs, dropped)
    writer.take(entry(1), SAID)
    writer.start()
    writer.stop()
    assert dropped == {"request": 1}
    assert "refused" in caplog.text
    assert "dragon" not in caplog.text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["set", "acme", "--no-contents", "--sample", "0.5"], "--no-contents"),
        (["prune", "--tenant", "acme"], "--older"),
        (["prune", "--contents"], "--older"),
    ],
)
def test_options_that_would_do_nothing_or_the_contrary_are_refused(
    logs: Logs, tmp_path: Path, options: list[str], said: str
) -> None:
    logs.set(LogSettings("acme", 1.0))
    logs.write([entry(1, days_old=365)], {entry(1).request_id: SAID})
    done = CliRunner().invoke(log_app, [*options, "--home", str(tmp_path)])
    assert (done.exit_code, said in done.output) == (2, True), done.output
    assert logs.settings() == {"acme": LogSettings("acme", 1.0)}
    assert [line.contents for line in logs.walk(Wanted())] == [SAID]


@pytest.mark.parametrize(
    "patterns",
    [{"a": "("}, {"A": "x"}, {"a": ""}, {"a": "x" * 301}, {f"p{n}": "x" for n in range(21)}],
)
def test_patterns_that_cannot_be_searched_for_are_refused(patterns: dict[str, str]) -> None:
    with pytest.raises(PatternInvalid):
        Redactor(patterns)

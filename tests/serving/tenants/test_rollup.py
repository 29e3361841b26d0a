"""What was used reaches the database, past failures and kills, and is found there."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from registry.errors import StoreUnavailable
from serving.tenants.ledger import Ledger
from serving.tenants.meter import Meter
from serving.tenants.usage import Span
from tests.serving.tenants.metering import ACME, ALWAYS, NAME, Still, begin, end, used


def test_usage_is_kept_by_tenant_name_version_and_hour(meter: Meter, clock: Still) -> None:
    end(begin(meter, 1, 9), 1, 9)
    end(begin(meter, 1, 9, tenant="beta"), 1, 8)
    clock.pass_(60)  # the next hour
    end(begin(meter, 1, 9), 1, 7)
    other = begin(meter, 1, 9)
    other.settle(digest="e" * 64, version=f"{NAME}@v2", prompt=1, completion=6)
    meter.flush()
    rows = meter.ledger.usage(ALWAYS, "hour", "acme")
    assert [(r.time, r.version, r.answers, r.completion_tokens) for r in rows] == [
        ("2026-11-25T13", f"{NAME}@v1", 1, 9),
        ("2026-11-25T14", f"{NAME}@v1", 1, 7),
        ("2026-11-25T14", f"{NAME}@v2", 1, 6),
    ]
    assert len(meter.ledger.usage(ALWAYS, "day")) == 3
    assert len(meter.ledger.usage(ALWAYS, "version", "acme")) == 2
    assert len(meter.ledger.usage(Span("2026-11-25T14", "2026-11-25"), "hour")) == 2
    assert meter.ledger.usage(Span("2026-11-26", "2026-12"), "hour") == []


def test_what_could_not_be_written_is_written_the_next_time(
    meter: Meter, monkeypatch: pytest.MonkeyPatch
) -> None:
    end(begin(meter, 10, 100), 10, 50)
    holding = meter.tally.holding(ACME)

    def broken(*_: object) -> None:
        raise StoreUnavailable("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("serving.tenants.rollup.RollUp.hold", broken)
        with pytest.raises(StoreUnavailable):
            meter.flush()
    assert meter.tally.holding(ACME) == holding
    assert used(meter) == 0
    meter.flush()
    assert used(meter) == 60


KILLED = """
    import sys
    from pathlib import Path
    from serving.tenants.ledger import Ledger
    from serving.tenants.meter import Meter

    meter = Meter(Ledger(Path(sys.argv[1])), "killed")
    meter.join()
    meter.start()
    number = 0
    while True:
        lease = meter.lease("acme", "acme/support")
        lease.enter()
        lease.reserve(1, 9)
        lease.settle(digest="d" * 64, version="acme/support@v1", prompt=1, completion=9)
        number += 1
        if number % 50 == 0:
            meter.flush()
            print(number, flush=True)
"""


def test_what_was_written_before_a_kill_is_there_after_it(tmp_path: Path) -> None:
    code = textwrap.dedent(KILLED)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        written = [int(child.stdout.readline()) for _ in range(4)][-1]
        os.kill(child.pid, signal.SIGKILL)
        rest = [int(line) for line in child.stdout.read().split()]
    last = max([written, *rest])
    after = Meter(Ledger(tmp_path), "after")
    after.join()  # and does not wait for who was killed
    answers = sum(row.answers for row in after.ledger.usage(ALWAYS, "hour"))
    after.stop()
    assert last <= answers <= last + 50


def test_stopping_writes_what_is_left(tmp_path: Path) -> None:
    meter = Meter(Ledger(tmp_path), "one")
    meter.join()
    meter.start()
    end(begin(meter, 10, 100), 10, 50)
    meter.stop()
    with Ledger(tmp_path) as ledger:
        assert [row.total_tokens for row in ledger.usage(ALWAYS, "hour")] == [60]

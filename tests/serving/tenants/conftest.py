from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving.tenants.ledger import Ledger
from serving.tenants.meter import Meter
from tests.serving.tenants.metering import Still, joined


@pytest.fixture
def clock() -> Still:
    return Still()


@pytest.fixture
def servers(tmp_path: Path, clock: Still) -> Iterator[Callable[[str], Meter]]:
    """Makes servers of one home; none of them writes by itself."""
    made: list[Meter] = []

    def make(name: str) -> Meter:
        made.append(joined(Meter(Ledger(tmp_path), name, clock), made))
        return made[-1]

    yield make
    for meter in made:
        meter.stop()


@pytest.fixture
def meter(servers: Callable[[str], Meter]) -> Meter:
    return servers("one")

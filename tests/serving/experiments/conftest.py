from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving.experiments.store import Experiments
from serving.tenants.keys import SCOPES, add_key
from tests.serving.live import Running, Wardrobe


@pytest.fixture
def client(live: Running, wardrobe: Wardrobe) -> Iterator[httpx.Client]:
    """A client of acme, whose adapter has v1 in production and v2 pushed."""
    wardrobe.push(promote=False)
    key = add_key(wardrobe.registry, "acme", SCOPES)
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=live.url, headers=headers, timeout=30) as client:
        yield client


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Experiments]:
    with Experiments(tmp_path) as store:
        yield store

from collections.abc import Iterator

import httpx
import pytest

from serving.tenants.keys import INFER, READ, add_key
from tests.serving.live import Running, Wardrobe


@pytest.fixture
def acme(live: Running, wardrobe: Wardrobe) -> Iterator[httpx.Client]:
    """A client of acme that may ask and look."""
    key = add_key(wardrobe.registry, "acme", (INFER, READ))
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=live.url, headers=headers, timeout=30) as client:
        yield client

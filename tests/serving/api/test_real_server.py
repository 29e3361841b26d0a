"""What `wardrobe serve` does as a process, with the torch engine behind it."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from registry.base import Bases
from registry.store import Registry
from serving.api.files import ENOUGH, raised
from serving.tenants.keys import INFER, READ, add_key, rotate_operator_key
from tests import tiny
from tests.live import DEFAULT_BASE, LiveServer, Shop

FILES = resource.RLIMIT_NOFILE
LOW = 256  # files, as some systems start programs
PROMPT = "A prompt of which more than one block of tokens is found again. " * 3


@contextmanager
def soft_limit(files: int) -> Iterator[None]:
    """Processes that are started meanwhile may open so many files, and as many more as before."""
    soft, hard = resource.getrlimit(FILES)
    resource.setrlimit(FILES, (files, hard))
    try:
        yield
    finally:
        resource.setrlimit(FILES, (soft, hard))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("real")
    shop = Shop(folder / "home", folder / "cache")
    tiny.register(tiny.make_base(folder / "made"), Bases(shop.cache / "bases"), DEFAULT_BASE)
    return shop


@pytest.fixture(scope="module")
def keys(shop: Shop) -> dict[str, str]:
    """The operator's key, and one for each of two tenants."""
    with Registry.open(shop.home, Bases(shop.cache / "bases")) as registry:
        tenants = {name: add_key(registry, name, (INFER, READ)) for name in ("acme", "globex")}
        return tenants | {"operator": rotate_operator_key(registry)}


@pytest.fixture(scope="module")
def server(shop: Shop, keys: dict[str, str]) -> Iterator[LiveServer]:
    with soft_limit(LOW):
        server = shop.start_server("--device", "cpu", "--max-model-len", "512")
    try:
        server.wait_ready()
        yield server
    finally:
        server.stop()


def client(server: LiveServer, key: str) -> httpx.Client:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.url, headers=headers, timeout=60)


def ask(server: LiveServer, key: str) -> dict[str, Any]:
    body = {"model": "base", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}
    with client(server, key) as asking:
        answer = asking.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]


def counted(server: LiveServer, key: str) -> dict[str, float]:
    """Return metric → the sum of its series."""
    sums: dict[str, float] = {}
    with client(server, key) as asking:
        for line in asking.get("/metrics").text.splitlines():
            if not line.startswith("#"):
                series, value = line.rsplit(" ", 1)
                name = series.partition("{")[0]
                sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def test_a_prompt_is_found_again_by_its_own_tenant_and_the_metrics_say_so(
    server: LiveServer, keys: dict[str, str]
) -> None:
    before = counted(server, keys["operator"])
    usages = [ask(server, keys[name]) for name in ("acme", "acme", "globex", "globex")]
    prompt = usages[0]["prompt_tokens"]
    cached = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert 0 < cached[1] < prompt, "its last token is computed again"
    assert cached == [0, cached[1], 0, cached[1]]
    after = counted(server, keys["operator"])
    more = {name: after[name] - before.get(name, 0.0) for name in after}
    assert more["vllm:prefix_cache_queries_total"] == 4 * prompt
    assert more["vllm:prefix_cache_hits_total"] == sum(cached)
    assert more["wardrobe_version_cached_tokens_total"] == sum(cached)
    assert more["wardrobe_engine_prompt_tokens_total"] == 4 * prompt - sum(cached)
    assert 0 < after["wardrobe_prefix_cache_bytes"] <= after["wardrobe_prefix_cache_max_bytes"]


def test_a_server_may_open_as_many_files_as_the_hard_limit_lets_it(server: LiveServer) -> None:
    soft, hard = resource.prlimit(server.process.pid, FILES)
    assert LOW < soft == raised(LOW, hard)
    assert hard == resource.getrlimit(FILES)[1]


@pytest.mark.parametrize(
    ("soft", "hard", "wanted"),
    [
        (1_024, 4_096, 4_096),
        (4_096, 4_096, 4_096),
        (1_024, 1 << 30, ENOUGH),
        (1_024, resource.RLIM_INFINITY, ENOUGH),
        (1 << 20, 1 << 20, 1 << 20),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, resource.RLIM_INFINITY),
    ],
)
def test_the_soft_limit_is_never_lowered_and_raised_within_reason(
    soft: int, hard: int, wanted: int
) -> None:
    assert raised(soft, hard) == wanted

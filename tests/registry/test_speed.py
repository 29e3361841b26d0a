"""Bounds that a registry must keep, far above what is measured so that a busy machine passes."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from sqlalchemy import insert

from registry import tables
from registry.adapter import Selector
from registry.database import now
from registry.store import Registry

Adapter = Callable[..., Path]


def seed_adapters(registry: Registry, count: int) -> None:
    row = {
        "namespace": "acme", "number": 1, "kind": "lora", "base_id": "b", "base_fingerprint": "",
        "rank": 8, "size_bytes": 1, "created_at": now(), "files": {}, "system_prompt": "",
        "card": {"metrics": {"accuracy": 0.9}},
    }  # fmt: skip
    names = [f"adapter-{i}" for i in range(count)]
    pointer = {"namespace": "acme", "alias": "production", "number": 1, "depth": 1}
    moved = {"generation": 1, "event_seq": 1, "moved_at": now()}
    with registry._database.write() as connection:  # pyright: ignore[reportPrivateUsage] - 10,000 pushes would take minutes
        versions = [row | {"name": n, "digest": f"{i:064x}"} for i, n in enumerate(names)]
        connection.execute(insert(tables.versions), versions)
        connection.execute(insert(tables.aliases), [pointer | moved | {"name": n} for n in names])


def test_resolving_among_10_000_adapters_takes_milliseconds(registry: Registry) -> None:
    seed_adapters(registry, 10_000)
    times: list[float] = []
    for i in np.random.default_rng(0).integers(0, 10_000, size=500):
        started = time.perf_counter()
        assert registry.resolve(Selector.parse(f"acme/adapter-{i}")).number == 1
        times.append(time.perf_counter() - started)
    median, p99 = np.quantile(times, [0.5, 0.99]) * 1e3
    print(f"resolve: median {median:.2f} ms, p99 {p99:.2f} ms")
    assert median < 20
    started = time.perf_counter()
    assert len(registry.newest()) == len(registry.all_aliases()) == 10_000
    assert time.perf_counter() - started < 5

"""A whole experiment over HTTP, with a simulated population and a `kill -9` in the middle.

Every version answers with a letter of its own, so each answer tells which one ran. The population
keeps a ledger of what it saw; afterwards the server's numbers must be the ledger's, exactly.
"""

import asyncio
import itertools
import random
import re
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest

from registry.adapter import AdapterName
from registry.base import Bases
from registry.store import Registry
from serving.experiments.decide import decide
from serving.experiments.store import Experiments
from serving.tenants.keys import SCOPES, add_key
from tests.live import DEFAULT_BASE, LiveServer, Shop
from tests.tiny import make_signature_adapter, make_signature_base

NAME = AdapterName("acme", "support")
LETTERS = {"control": "a", "treatment": "b"}
CLIENTS = 16
OPTIONS = ("--adapter-slots", "4", "--max-running", "16", "--threads", "1")


@dataclass(frozen=True, slots=True)
class Plan:
    users: int
    ramp: tuple[str, ...]
    effect: float  # of the treatment on the share of solved users
    base: float = 0.1  # that share in the control; it drifts to three times as much

    def rate(self, number: int, arm: str) -> float:
        return self.base * (1 + 2 * number / self.users) + self.effect * (arm == "treatment")


@dataclass(slots=True)
class Ledger:
    """What the population saw and said."""

    arms: dict[str, str] = field(default_factory=dict[str, str])  # request id → arm
    users: dict[str, set[str]] = field(default_factory=dict[str, set[str]])  # user → arms
    solved: Counter[str] = field(default_factory=Counter[str])  # arm → users
    late: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    repeated: int = 0  # feedback that was sent again and changed nothing
    cut: int = 0  # requests that the kill cut off
    gaps: int = 0  # answers without an arm, for users who had one
    unwritten: int = 0  # exposures that a server says it could not write in time

    def note(self, user: str, request_id: str, arm: str) -> None:
        if arm:
            self.arms[request_id] = arm
            self.users.setdefault(user, set()).add(arm)
        elif user in self.users:
            self.gaps += 1


class Population:
    """Users who come, come back, and say what they think: 10 % of it late, 5 % of it twice."""

    def __init__(self, plan: Plan, shop: Shop, server: LiveServer, key: str) -> None:
        self.server = server
        self.ledger = Ledger()
        self._plan = plan
        self._shop = shop
        self._rng = random.Random(7)
        self._said: set[str] = set()  # users who said what became of it
        self._here = asyncio.Event()  # cleared while there is no server
        self._here.set()
        headers = {"authorization": f"Bearer {key}"}
        self._session = aiohttp.ClientSession(headers=headers)

    async def run(self, experiment: str) -> None:
        """Let everybody come, a stage of the ramp at a time; kill the server in the last one."""
        coming = iter(range(self._plan.users))
        for stage in self._plan.ramp[:-1]:
            exposure, _, units = stage.split(":")
            while await self._exposure(experiment) <= float(exposure):
                if len(self.ledger.users) < int(units):
                    await asyncio.gather(*map(self._visit, itertools.islice(coming, CLIENTS)))
                else:  # the server has all it needs to move the ramp
                    await asyncio.sleep(0.1)
        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client(coming))
        for said in self.ledger.late:
            await self._send(said)
        self.ledger.unwritten += await self._unwritten()
        await self._session.close()

    async def _client(self, coming: Iterator[int]) -> None:
        for number in coming:
            if number == self._plan.users * 3 // 4:
                await self._kill()
            await self._visit(number)

    async def _kill(self) -> None:
        """Kill the server while the others ask, and start another one."""
        self.ledger.unwritten += await self._unwritten()
        self._here.clear()
        await asyncio.to_thread(self.server.kill)
        self.server = await asyncio.to_thread(self._shop.start_server, *OPTIONS)
        await asyncio.to_thread(self.server.wait_ready)
        self._here.set()

    async def _visit(self, number: int) -> None:
        """Let a new user come, and sometimes an earlier one again."""
        await self._ask(number)
        if number and self._rng.random() < 0.4:
            await self._ask(self._rng.randrange(number))

    async def _ask(self, number: int) -> None:
        user = f"user {number}"
        while True:
            await self._here.wait()
            try:
                request_id, arm = await self._answer(user)
                break
            except aiohttp.ClientError:
                self.ledger.cut += 1
                assert self.ledger.cut <= 2 * CLIENTS, "the server is gone, and nobody killed it"
                await asyncio.sleep(0.05)
        if arm and self._rng.random() < 0.9:
            await self._say(number, user, request_id, arm)

    async def _answer(self, user: str) -> tuple[str, str]:
        """Return the request's id and its arm, if any, once the whole answer has come."""
        body = {"model": str(NAME), "prompt": user, "max_tokens": 2, "temperature": 0}
        body["stream"] = self._rng.random() < 0.25
        async with self._session.post(
            f"{self.server.url}/v1/completions", json=body, headers={"x-unit-key": user}
        ) as answer:
            assert answer.status == 200, await answer.text()
            request_id, arm = answer.headers["x-request-id"], answer.headers.get("x-arm", "")
            self.ledger.note(user, request_id, arm)
            said = await answer.text()
        assert f'"text":"{LETTERS[arm or "control"]}' in said, f"{arm} did not answer: {said}"
        return request_id, arm

    async def _say(self, number: int, user: str, request_id: str, arm: str) -> None:
        value = 0
        if user not in self._said:
            self._said.add(user)
            value = int(self._rng.random() < self._plan.rate(number, arm))
            self.ledger.solved[arm] += value
        said = {"request_id": request_id, "metric": "solved", "value": value}
        said["idempotency_key"] = f"of {request_id}"
        if self._rng.random() < 0.1:
            self.ledger.late.append(said)
        else:
            await self._send(said)

    async def _send(self, said: dict[str, Any]) -> None:
        """Send feedback until it is acknowledged; one of twenty is sent once more."""
        for _ in range(1 + (self._rng.random() < 0.05)):
            self.ledger.repeated += not (await self._json("POST", "/v1/feedback", said))["recorded"]

    async def _exposure(self, experiment: str) -> float:
        return (await self._json("GET", f"/v1/experiments/{experiment}"))["exposure"]

    async def _unwritten(self) -> int:
        async with self._session.get(f"{self.server.url}/metrics") as answer:
            found = re.search(r'exposures_total{written="no"} (\d+)', await answer.text())
        return int(found[1]) if found else 0

    async def _json(self, method: str, path: str, body: Any = None) -> Any:
        while True:
            await self._here.wait()
            try:
                url = f"{self.server.url}{path}"
                async with self._session.request(method, url, json=body) as answer:
                    assert answer.status == 200, await answer.text()
                    return await answer.json()
            except aiohttp.ClientError:
                await asyncio.sleep(0.05)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    """An adapter with v1 in production and v2 pushed."""
    bases = Bases(tmp_path / "cache" / "bases")
    base = bases.add(DEFAULT_BASE, make_signature_base(tmp_path / "made"), origin="made here")
    shop = Shop(tmp_path / "home", tmp_path / "cache")
    with Registry.open(shop.home, bases) as registry:
        for letter in LETTERS.values():
            made = make_signature_adapter(tmp_path / letter, base.path, ord(letter))
            registry.push(made, NAME, base=DEFAULT_BASE, actor="test")
        registry.promote(NAME, 1, reason="test", actor="test")
    return shop


def run_experiment(shop: Shop, plan: Plan) -> None:
    with Registry.open(shop.home, Bases(shop.cache / "bases")) as registry:
        # The operator's metrics are read on the way, too.
        key = add_key(registry, "operator", SCOPES)
    server = shop.start_server(*OPTIONS)
    populations: list[Population] = []

    async def live(experiment: str) -> None:
        populations.append(Population(plan, shop, server, key))
        await populations[0].run(experiment)

    try:
        server.wait_ready()
        experiment = start(server, key, plan)
        asyncio.run(live(experiment))
    finally:
        server.kill()
        for population in populations:
            population.server.stop()  # whose end writes what is left
    check(shop, plan, experiment, populations[0].ledger)


def start(server: LiveServer, key: str, plan: Plan) -> str:
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=server.url, headers=headers) as client:
        design = {"treatments": ["@v2"], "metric": "solved:binary", "ramp": plan.ramp}
        made = client.post(f"/v1/adapters/{NAME}/experiments", json=design)
        moved = client.post(f"/v1/experiments/{made.json()['id']}/start", json={"reason": "test"})
        assert moved.status_code == 200, (made.text, moved.text)
        return moved.json()["id"]


def check(shop: Shop, plan: Plan, experiment_id: str, ledger: Ledger) -> None:
    """Compare the server's books with the ledger."""
    assert all(len(arms) == 1 for arms in ledger.users.values()), "a user met both arms"
    assert ledger.gaps <= ledger.unwritten + CLIENTS, "a user lost the arm"
    with Experiments(shop.home) as store:
        experiment = store.get(experiment_id)
        counts, coverage = store.counts(experiment), store.coverage(experiment)
        verdict = decide(experiment, counts)
        moves = [d for d in store.decisions(experiment_id) if d.action == "ramp"]
    assert [move.actor for move in moves] == ["wardrobe"] * (len(plan.ramp) - 1)
    with closing(sqlite3.connect(shop.home / "experiments.sqlite")) as database:
        rows = database.execute("SELECT request_id, arm FROM exposures").fetchall()
    labels = {request_id: experiment.arms[arm].label for request_id, arm in rows}
    assert ledger.arms.items() <= labels.items(), "an answer that nobody wrote down"
    assert len(labels) - len(ledger.arms) <= ledger.cut, "an exposure that nobody saw"
    assert sum(arm.unended for arm in coverage) <= ledger.cut + CLIENTS
    solved = [int(count.metrics["solved"].y) for count in counts]
    assert solved == [ledger.solved["control"], ledger.solved["treatment"]]
    assert ledger.repeated > 0
    assert (verdict.action, verdict.winner) == ("win", 1), verdict.sentence
    units = Counter(next(iter(arms)) for arms in ledger.users.values())
    for count, arm in zip(counts, LETTERS, strict=True):
        assert 0 <= count.units - units[arm] <= ledger.cut
    print(
        f"{plan.users} users, {len(labels)} exposed answers, {verdict.units} units, "
        f"{ledger.cut} requests cut off, {ledger.gaps} answers without their arm, "
        f"{ledger.unwritten} exposures not written, {len(ledger.late)} feedback late, "
        f"{ledger.repeated} twice. {verdict.sentence}"
    )


def test_an_experiment_is_right_to_the_last_answer_though_its_server_is_killed(shop: Shop) -> None:
    run_experiment(shop, Plan(700, ("0.05:0s:4", "0.2:0s:30", "1"), effect=0.5))


@pytest.mark.long
def test_an_experiment_with_twenty_thousand_users(shop: Shop) -> None:
    run_experiment(shop, Plan(20_000, ("0.02:5s:60", "0.2:10s:700", "1"), effect=0.05))

"""Nobody ever wears somebody else's adapter: signature adapters under churn, over HTTP.

Each version of each adapter makes the model emit one token of its own and nothing else, so one
step with the wrong weights is one wrong letter. Requests by alias and by number, short and long,
with aborts in the middle, over four slots for thirty-two versions, while aliases move all the time.
"""

import asyncio
import json
import random
import string
from collections import Counter

import aiohttp
import pytest

from registry.adapter import AdapterName
from registry.base import Bases
from registry.store import Registry
from tests.live import DEFAULT_BASE, LiveServer, Shop
from tests.tiny import SIGNATURE_BASE_TOKEN, make_signature_adapter, make_signature_base

NAMES = [AdapterName.parse(f"acme/a{i:02d}") for i in range(16)]
LETTERS = string.ascii_letters[:32]  # two versions of each name


def letter(name: AdapterName, number: int) -> str:
    return LETTERS[NAMES.index(name) * 2 + number - 1]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    folder = tmp_path_factory.mktemp("churn")
    bases = Bases(folder / "cache" / "bases")
    base = bases.add(DEFAULT_BASE, make_signature_base(folder / "made"), origin="made for a test")
    shop = Shop(folder / "home", folder / "cache")
    with Registry.open(shop.home, bases) as registry:
        for name in NAMES:
            for number in (1, 2):
                made = folder / f"{name.name}-{number}"
                make_signature_adapter(made, base.path, ord(letter(name, number)))
                pushed = registry.push(made, name, base=DEFAULT_BASE, actor="test")
                assert pushed.version.number == number
            registry.promote(name, 1, reason="test", actor="test")
    return shop


async def ask(session: aiohttp.ClientSession, rng: random.Random, seen: Counter[str]) -> None:
    """Send one request; every character that comes back must be the letter of what it claims."""
    name = rng.choice(NAMES)
    tail = rng.choice(["", "", "@v1", "@v2"])
    model = "base" if rng.random() < 0.1 else f"{name}{tail}"
    prompt = "".join(rng.choices(string.printable, k=rng.randint(1, 40)))
    body = {"model": model, "prompt": prompt, "max_tokens": rng.randint(1, 12), "temperature": 0}
    abort_after = rng.randint(1, 4) if rng.random() < 0.15 else 0
    body |= {"stream": True, "n": 1 if abort_after else rng.choice([1, 1, 1, 2])}
    async with session.post("/v1/completions", json=body) as answer:
        assert answer.status == 200, await answer.text()
        label, text, events = answer.headers["x-adapter"], "", 0
        async for line in answer.content:
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                assert "error" not in event, event
                text += "".join(choice["text"] for choice in event["choices"])
                events += 1
            if abort_after and events >= abort_after:
                break
    wanted = expected(label)
    assert tail == "" or model == "base" or label.endswith(tail), f"{model} ran on {label}"
    assert set(text) <= {wanted}, f"{label} must say {wanted!r} and said {text!r}"
    assert text or abort_after
    seen[label] += 1


def expected(label: str) -> str:
    if "@" not in label:
        return chr(SIGNATURE_BASE_TOKEN)
    name, _, number = label.partition("@v")
    return letter(AdapterName.parse(name), int(number))


async def churn(server: LiveServer, shop: Shop, requests: int) -> tuple[Counter[str], int]:
    """Return how often each version answered, and how many promotes happened meanwhile."""
    seen: Counter[str] = Counter()
    jobs = iter(range(requests))
    promotes = 0

    async def client(seed: int) -> None:
        rng = random.Random(seed)
        for _ in jobs:
            await ask(session, rng, seen)

    async def promoter(registry: Registry) -> None:
        nonlocal promotes
        rng = random.Random(99)
        while True:
            name, number = rng.choice(NAMES), rng.choice([1, 2])
            await asyncio.to_thread(registry.promote, name, number, reason="churn", actor="test")
            promotes += 1
            await asyncio.sleep(0.05)

    with Registry.open(shop.home, Bases(shop.cache / "bases")) as registry:
        async with aiohttp.ClientSession(server.url) as session:
            moving = asyncio.create_task(promoter(registry))
            async with asyncio.TaskGroup() as group:
                for seed in range(24):
                    group.create_task(client(seed))
            moving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await moving
    return seen, promotes


def run_churn(shop: Shop, requests: int) -> None:
    options = ("--no-auth", "--adapter-slots", "4", "--max-running", "16", "--threads", "1")
    with shop.serving(*options) as server:
        seen, promotes = asyncio.run(churn(server, shop, requests))
    assert sum(seen.values()) == requests
    assert len(seen) == 33, f"not every version and the base answered: {sorted(seen)}"
    assert promotes > 10


def test_no_token_comes_from_a_wrong_adapter_under_churn(shop: Shop) -> None:
    run_churn(shop, 1_000)


@pytest.mark.long
def test_no_token_comes_from_a_wrong_adapter_in_ten_thousand_requests(shop: Shop) -> None:
    run_churn(shop, 10_000)

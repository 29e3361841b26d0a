"""What hostile or unlucky adapters, machines and callers cost: something bounded, nobody else."""

import asyncio
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from registry.adapter import AdapterRef
from serving.engine.boundary import AdapterLoadFailed, EngineUnavailable
from serving.engine.build import assemble, read_model
from serving.engine.engine import TorchEngine
from serving.engine.hardware import total_memory
from serving.engine.residency import MAX_LOADS
from serving.engine.settings import EngineSettings
from serving.engine.spec import ModelSpec
from tests.serving.engine.driving import (
    Folders,
    base_of,
    complete,
    request,
    run_all,
    stepped,
)

SETTINGS = EngineSettings(device="cpu", dtype="float32", max_running=2, max_model_len=128)


class Panic(BaseException):
    """Like what a Rust library raises when it panics: no Exception."""


def test_a_fetch_that_panics_ends_the_wait(tiny_base: Path, tiny_folders: Folders) -> None:
    def panics(_: AdapterRef) -> Path:
        raise Panic("index out of bounds")

    async def main() -> None:
        engine = TorchEngine.create(base_of(tiny_base), panics, SETTINGS)
        async with asyncio.timeout(5):
            with pytest.raises(AdapterLoadFailed, match="out of bounds"):
                await complete(engine, request("x", tiny_folders.refs["a"]))
            assert (await complete(engine, request("x", max_tokens=2))).finish == "length"
        await engine.aclose()

    asyncio.run(main())


def page_bytes(base: Path) -> int:
    """Return what an adapter of the lowest rank takes."""
    parts = assemble(read_model(base_of(base), SETTINGS), lambda _: base, SETTINGS)
    parts.core.residency.loader.close()
    return parts.core.residency.stacks.page_bytes


def test_an_adapter_that_the_memory_cannot_hold_fails_alone(
    tiny_base: Path, tiny_folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    """Two pages: two adapters of rank 8, or one of rank 16, and none of rank 40."""
    memory = 2 * page_bytes(tiny_base)
    settings = replace(SETTINGS, adapter_memory=memory + 1)
    refs = tiny_folders.refs

    async def main() -> None:
        engine = TorchEngine.create(base_of(tiny_base), tiny_folders, settings)
        assert "above rank 16 will be refused" in caplog.text
        with pytest.raises(AdapterLoadFailed, match="rank is 40, the engine's highest is 16"):
            await complete(engine, request("x", refs["wide"]))
        for names in ("ab", "c", "ba"):
            for name in names:
                await complete(engine, request("x", refs[name], max_tokens=2))
            stats = await engine.stats()
            assert [each.digest for each in stats.resident] == [refs[name].digest for name in names]
            assert stats.adapter_memory_used == stats.adapter_memory == memory
        await engine.aclose()

    asyncio.run(main())


def test_a_memory_that_holds_no_adapter_stops_the_engine(tiny_base: Path) -> None:
    settings = replace(SETTINGS, adapter_memory=100)
    with pytest.raises(EngineUnavailable, match=r"^--adapter-memory=100: .* takes .*=1MiB or"):
        assemble(read_model(base_of(tiny_base), settings), lambda _: tiny_base, settings)


def test_waiting_requests_load_a_bounded_number_of_adapters_ahead(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    """One adapter slot and forty requests for forty adapters: all answered, few in memory."""
    settings = EngineSettings(
        device="cpu",
        dtype="float32",
        max_running=2,
        max_model_len=128,
        adapter_slots=1,
    )
    folder = tiny_folders(tiny_folders.refs["a"])
    refs = [AdapterRef(f"{i:064x}", f"tiny/{i}@v1") for i in range(40)]
    fetched: list[str] = []
    finished: list[str] = []
    ahead: list[int] = []
    lock = threading.Lock()

    def fetch(ref: AdapterRef) -> Path:
        with lock:
            fetched.append(ref.digest)
            ahead.append(len(fetched) - len(finished))
        return folder

    async def main() -> None:
        engine = TorchEngine.create(base_of(tiny_base), fetch, settings)

        async def one(ref: AdapterRef) -> None:
            await complete(engine, request("x", ref, max_tokens=20))
            with lock:
                finished.append(ref.digest)

        async with asyncio.timeout(30):
            await asyncio.gather(*(one(ref) for ref in refs))
        await engine.aclose()

    asyncio.run(main())
    assert len(finished) == 40
    assert max(ahead) <= MAX_LOADS + 3  # one in the slot, and an answer on its way to its reader


def test_adapters_that_warm_take_no_request_s_place(tiny_base: Path, tiny_folders: Folders) -> None:
    gate = threading.Event()
    settings = EngineSettings(
        device="cpu", dtype="float32", max_running=1, max_waiting=0, max_model_len=128
    )

    def slow(ref: AdapterRef) -> Path:
        gate.wait(20)
        return tiny_folders(ref)

    async def main() -> None:
        engine = TorchEngine.create(base_of(tiny_base), slow, settings)
        warming = [asyncio.create_task(engine.warm(tiny_folders.refs[n])) for n in "abc"]
        await asyncio.sleep(0.05)
        assert (await complete(engine, request("x", max_tokens=2))).finish == "length"
        gate.set()
        await asyncio.gather(*warming)
        await engine.aclose()

    asyncio.run(main())


def test_a_warm_waits_for_a_running_request_and_can_be_given_up(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    """A wish that was given up must not keep draining the adapter it had claimed."""
    settings = EngineSettings(
        device="cpu",
        dtype="float32",
        max_running=2,
        max_model_len=128,
        adapter_slots=1,
        adapter_host_memory=1 << 30,
    )
    refs = tiny_folders.refs

    async def main() -> None:
        parts = assemble(read_model(base_of(tiny_base), settings), tiny_folders, settings)
        residency, permits = parts.core.residency, stepped(parts)
        engine = TorchEngine(parts, settings)
        running = aiter(engine.generate(request("x", refs["a"], max_tokens=100)))
        permits.release()
        await anext(running)
        residency.loader.load(refs["b"]).result(10)
        wish = asyncio.create_task(engine.warm(refs["b"]))
        while not residency.draining_for(refs["b"]):
            permits.release()
            await anext(running)
        assert not wish.done()
        wish.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wish
        other = asyncio.create_task(complete(engine, request("y", refs["a"], max_tokens=1)))
        while not other.done():
            permits.release()
            delta = await anext(running)
            assert delta.finish_reason is None, "it waited for the adapter to drain"
        permits.release(1000)
        async with asyncio.timeout(30):
            async for _ in running:
                pass
            await engine.warm(refs["b"])
        await engine.aclose()

    asyncio.run(main())


def test_an_end_of_text_beyond_the_vocabulary_is_none(tiny_base: Path, tmp_path: Path) -> None:
    for file in tiny_base.iterdir():
        (tmp_path / file.name).symlink_to(file)
    generation = tmp_path / "generation_config.json"
    generation.unlink(missing_ok=True)
    generation.write_text('{"eos_token_id": [3, 100000]}')
    eos = ModelSpec.read(tmp_path).eos_ids
    assert 3 in eos
    assert max(eos) < 258


def test_a_container_s_limit_counts(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    none, unlimited, version_1 = (tmp_path / name for name in ("none", "max", "limit"))
    unlimited.write_text("max\n")
    version_1.write_text("1000000\n")
    machine = total_memory(cpu, ())
    assert machine == total_memory(cpu, (none, unlimited)) > 1000000
    assert total_memory(cpu, (none, version_1)) == 1000000


def test_a_prompt_of_one_token_and_one_that_fills_the_context(
    tiny_base: Path, tiny_folders: Folders
) -> None:
    engine = TorchEngine.create(
        base_of(tiny_base),
        tiny_folders,
        EngineSettings(
            device="cpu", dtype="float32", max_running=8, max_model_len=128, max_batched_tokens=9
        ),
    )
    wanted = [
        request(prompt, tiny_folders.refs["a"], max_tokens=128 - len(prompt))
        for prompt in ([5], [i % 250 for i in range(127)])
    ]
    assert [len(result.tokens) for result in run_all(engine, wanted)] == [127, 1]

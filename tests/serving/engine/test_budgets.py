"""What the engine may take of a computer without a GPU: never more than it has."""

import asyncio
import random
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import pytest
import torch
from typer.main import get_command

from serving.engine import budgets
from serving.engine.boundary import EngineStats, EngineUnavailable
from serving.engine.budgets import BUDGETS, PROCESS, divide, weight_bytes
from serving.engine.engine import TorchEngine
from serving.engine.hardware import limit_files
from serving.engine.settings import EngineSettings, option
from tests.serving.engine.driving import Folders, base_of
from wardrobe import app

if TYPE_CHECKING:
    from typer.core import TyperGroup

GIB = 1 << 30
OPEN = EngineSettings(device="cpu", dtype="float32", max_running=4)
TINY_TOKEN = 512  # bytes: 2 layers, K and V, 2 KV heads of 16 numbers of 4 bytes


def taken(settings: EngineSettings) -> int:
    return sum(getattr(settings, name) or 0 for name in BUDGETS)


def test_all_budgets_are_shares_of_what_the_weights_leave() -> None:
    """A base of 16 GiB on a machine of 24 was given 18 beside its weights, and killed for it."""
    settled = divide(OPEN, 24 * GIB, 16 * GIB)
    left = 24 * GIB - 16 * GIB - PROCESS
    assert settled.kv_cache_bytes == left // 2
    assert settled.prefix_cache_bytes == settled.adapter_memory == left // 8
    assert settled.adapter_host_memory is None, "on a CPU there is none"


def test_what_is_given_is_kept_and_the_others_share_the_rest() -> None:
    given = EngineSettings(kv_cache_bytes=8 * GIB, prefix_cache_bytes=0, adapter_host_memory=GIB)
    settled = divide(given, 16 * GIB, 2 * GIB)
    assert [name for name in BUDGETS if not settled.is_given(name)] == [
        "adapter_memory",
        "loading_memory",
    ]
    assert settled.kv_cache_bytes == 8 * GIB
    assert settled.prefix_cache_bytes == 0
    assert settled.adapter_host_memory == GIB
    assert settled.adapter_memory == ((16 - 8 - 1 - 2) * GIB - PROCESS) // 8


def test_no_machine_is_promised_twice() -> None:
    rng = random.Random(7)
    refused = 0
    for _ in range(2000):
        total, weights = rng.randrange(2 * GIB, 64 * GIB), rng.randrange(32 * GIB)
        names = rng.sample(BUDGETS, rng.randrange(len(BUDGETS) + 1))
        given = replace(OPEN, **{name: rng.randrange(1, 16 * GIB) for name in names})
        try:
            settled = divide(given, total, weights)
        except EngineUnavailable:
            refused += 1
            assert taken(given) + weights + PROCESS > total
        else:
            assert taken(settled) + weights + PROCESS <= total
            assert divide(settled, total, weights) == settled
    assert 200 < refused < 1800, "both happen"


def test_what_does_not_fit_together_is_refused_with_every_value_and_its_option() -> None:
    given = EngineSettings(kv_cache_bytes=5 * GIB, adapter_memory=4 * GIB)
    with pytest.raises(EngineUnavailable) as refusal:
        divide(given, 8 * GIB, GIB)
    for part in (8 * GIB, GIB, f"--kv-cache-memory={5 * GIB}", f"--adapter-memory={4 * GIB}"):
        assert str(part) in str(refusal.value)
    assert "Lower" in str(refusal.value)


def test_a_refusal_names_no_option_that_is_not_there() -> None:
    serve = cast("TyperGroup", get_command(app)).commands["serve"]
    there = {name for parameter in serve.params for name in parameter.opts}
    said = {option(field.name) for field in fields(EngineSettings)} - {option("shares")}
    assert said - there == {"loading_memory"}, "no option, so its own name"
    with pytest.raises(EngineUnavailable, match=f"[^-]loading_memory={8 * GIB}"):
        divide(EngineSettings(loading_memory=8 * GIB), 8 * GIB, GIB)


def test_a_refusal_names_no_share_that_nobody_gave() -> None:
    """Two engines' settings are made of those of one, and divided again."""
    settled = divide(OPEN, GIB + PROCESS, GIB)
    assert taken(settled) > 0
    with pytest.raises(EngineUnavailable, match=f"process={PROCESS}. Take a smaller base"):
        divide(settled, GIB + PROCESS, GIB)


def test_a_base_that_the_machine_cannot_hold_is_refused_before_it_is_read() -> None:
    with pytest.raises(EngineUnavailable, match=r"Take a smaller base or more memory\.$"):
        divide(OPEN, 8 * GIB, 8 * GIB)


def started(base: Path, folders: Folders, settings: EngineSettings = OPEN) -> EngineStats:
    async def main() -> EngineStats:
        engine = TorchEngine.create(base_of(base), folders, settings)
        stats = await engine.stats()
        await engine.aclose()
        return stats

    return asyncio.run(main())


def machine_with(room: int, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine have `room` bytes beside the weights and the process."""
    total = weight_bytes(base, torch.float32) + PROCESS + room
    monkeypatch.setattr(budgets, "total_memory", lambda _: total)


def test_an_engine_on_a_small_machine_takes_its_share_of_the_room(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 1 << 20
    machine_with(room, tiny_base, monkeypatch)
    stats = started(tiny_base, tiny_folders)
    assert stats.kv_tokens_total == room // 2 // TINY_TOKEN
    assert 0 < stats.prefix_bytes_total <= room // 8
    assert 0 < stats.adapter_memory <= room // 8


def test_an_engine_with_hardly_any_room_is_refused(
    tiny_base: Path, tiny_folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine_with(2 * 31 * TINY_TOKEN, tiny_base, monkeypatch)
    with pytest.raises(EngineUnavailable, match=r"=32: .* holds 16 tokens of one sequence\. "):
        started(tiny_base, tiny_folders)
    machine_with(0, tiny_base, monkeypatch)
    with pytest.raises(EngineUnavailable, match="--kv-cache-memory=1 holds 0"):
        started(tiny_base, tiny_folders)


@pytest.mark.parametrize(
    ("given", "lower"),
    [({}, ""), ({"kv_cache_bytes": 1 << 19}, r" Lower --kv-cache-memory if that is too much\.")],
)
def test_a_share_that_holds_no_adapter_is_not_said_to_have_been_given(
    given: dict[str, int],
    lower: str,
    tiny_base: Path,
    tiny_folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine_with((1 << 18) + sum(given.values()), tiny_base, monkeypatch)
    said = r"--adapter-memory is not given, and its share, 1/8 of what is left, is 32768 bytes: "
    with pytest.raises(EngineUnavailable, match=rf"^{said}.* Give --adapter-memory=1MiB.*{lower}$"):
        started(tiny_base, tiny_folders, replace(OPEN, **given))


def test_a_share_that_is_too_small_for_a_rank_is_said_to_be_one(
    tiny_base: Path,
    tiny_folders: Folders,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine_with(1 << 20, tiny_base, monkeypatch)
    started(tiny_base, tiny_folders)
    assert "will be refused" in caplog.text
    assert "--adapter-memory is not given, and its share" in caplog.text


def test_weights_are_counted_in_the_numbers_they_are_computed_in(tiny_base: Path) -> None:
    single, half = (weight_bytes(tiny_base, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert single == 2 * half
    stored = sum(file.stat().st_size for file in tiny_base.glob("*.safetensors"))
    assert stored < single < 2 * stored


def test_limits_of_control_groups_are_looked_for_from_the_own_one_up(tmp_path: Path) -> None:
    """systemd's MemoryMax= stands at the service's own group, a container's at the top."""
    groups, top = tmp_path / "cgroup", tmp_path / "fs"
    groups.write_text("0::/system.slice/wardrobe.service\n")
    assert limit_files(groups, top) == [
        top / "system.slice/wardrobe.service/memory.max",
        top / "system.slice/memory.max",
        top / "memory.max",
    ]
    groups.write_text("5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n")
    assert limit_files(groups, top) == [
        top / "memory/a/memory.limit_in_bytes",
        top / "memory/memory.limit_in_bytes",
        top / "memory.max",
    ]
    assert limit_files(tmp_path / "none", top) == [], "this is no Linux"

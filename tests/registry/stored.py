"""What tests of a store do to it."""

from collections.abc import Callable
from pathlib import Path

from registry.adapter import AdapterName, Selector
from registry.records import Push
from registry.store import Registry

Adapter = Callable[..., Path]
NAME = AdapterName.parse("acme/support")
PROMPT = {"prompt": {"system": "Answer briefly."}}
FAILED_GATE = {"gate": {"passed": False, "failures": ["accuracy 0.41 is under 0.60."]}}


def push(registry: Registry, folder: Path, name: AdapterName = NAME) -> Push:
    return registry.push(folder, name, actor="tester")


def promote(registry: Registry, number: int, **options: object):
    return registry.promote(NAME, number, reason="a test", actor="tester", **options)  # type: ignore[arg-type]


def rollback(registry: Registry):
    return registry.rollback(NAME, reason="a test", actor="tester")


def production(registry: Registry) -> int:
    return registry.resolve(Selector.parse("acme/support")).number


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

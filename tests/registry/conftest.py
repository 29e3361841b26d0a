from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from registry.base import BaseModel, Bases
from registry.store import Registry
from tests.registry.making import BASE_ID, make_adapter, make_base

Adapter = Callable[..., Path]

# A busy machine must not fail a property by being slow; the timeout of pytest still holds.
settings.register_profile("wardrobe", deadline=None)
settings.load_profile("wardrobe")


@pytest.fixture
def bases(tmp_path: Path) -> Bases:
    bases = Bases(tmp_path / "bases")
    bases.add(BASE_ID, make_base(tmp_path / "prepared"), origin="test")
    return bases


@pytest.fixture
def base(bases: Bases) -> BaseModel:
    return bases.get(BASE_ID)


@pytest.fixture
def registry(tmp_path: Path, bases: Bases) -> Iterator[Registry]:
    with Registry.open(tmp_path / "home", bases) as registry:
        yield registry


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    """Return a function that writes a good adapter folder; see making.make_adapter."""
    numbers = count(1)

    def make(**parts: Any) -> Path:
        return make_adapter(tmp_path / f"adapter-{next(numbers)}", **parts)

    return make

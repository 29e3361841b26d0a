from pathlib import Path

import pytest

from registry.home import default_cache
from serving.engine.ops.native.library import Library, load_library
from tests import tiny
from tests.serving.engine.builds import BUILDS, NAMES
from tests.serving.engine.driving import Folders


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_base(tmp_path_factory.mktemp("tiny-base"), seed=5)


@pytest.fixture(scope="session")
def tiny_folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Three adapters that work, and several that must not."""
    folder = tmp_path_factory.mktemp("tiny-adapters")
    good = {
        name: tiny.make_adapter(folder / name, tiny_base, rank=rank, seed=rank)
        for name, rank in (("a", 4), ("b", 8), ("c", 16))
    }
    return Folders(
        good
        | {
            "wide": tiny.make_adapter(folder / "wide", tiny_base, rank=40),
            "nan": tiny.make_adapter(folder / "nan", tiny_base, strength=float("nan")),
            "huge": tiny.make_adapter(
                folder / "huge", tiny_base, targets=("gate_proj", "up_proj"), strength=1e25
            ),
            "deep": tiny.make_adapter(
                folder / "deep", tiny.make_base(folder / "deep-base", layers=3)
            ),
            "missing": folder / "missing",
        }
    )


@pytest.fixture(
    scope="module",
    params=BUILDS,
    ids=NAMES,
)
def library(request: pytest.FixtureRequest) -> Library:
    """Every set of instructions here, in the number formats that it is for."""
    target, dtype = request.param
    return load_library(dtype, default_cache() / "operators", target)

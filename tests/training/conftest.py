from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from registry.base import BaseModel, Bases
from tests.tiny import make_base
from training.data.examples import Data, ask, digest_examples
from training.recipe import Recipe, parse_recipe


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("tiny")
    return Bases(folder / "bases").add("local/tiny", make_base(folder / "made"), origin="made")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Equal bytes are promised for an equal number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def recipe() -> Recipe:
    value = {
        "name": "acme/colours",
        "base": "local/tiny",
        "data": {"path": "unused.csv"},
        "task": {"system": "Say the colour.", "metric": "label", "max_new_tokens": 8},
        "method": {"r": 4, "alpha": 8, "dropout": 0.1},
        "train": {"steps": 12, "batch_size": 2, "learning_rate": 1e-2, "save_every": 4},
        "gate": {"min_gain": 0.3},
    }
    return parse_recipe(value, Path())


@pytest.fixture
def data() -> Data:
    train = tuple(ask(f"grass {n}", "green" if n % 2 else "blue", str(n)) for n in range(9))
    held_out = (ask("grass 10", "green", "10"), ask("grass 11", "blue", "11"))
    return Data(train, held_out, 0, digest_examples(train, held_out))

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.experiments import recorder
from serving.tokens import Tokens
from tests import tiny
from tests.serving.live import Running, Wardrobe, opened, running


@pytest.fixture(scope="session")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tokens]:
    """The byte tokenizer of the tiny base."""
    tokens = Tokens(tiny.make_base(tmp_path_factory.mktemp("tokens") / "base", layers=1))
    yield tokens
    tokens.close()


@pytest.fixture
def wardrobe(tmp_path: Path) -> Iterator[Wardrobe]:
    """An empty registry with one base."""
    with opened(tmp_path) as wardrobe:
        yield wardrobe


@pytest.fixture
def live(wardrobe: Wardrobe, tokens: Tokens, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """A server with one adapter, acme/support@v1, in production.

    It waits long for an exposure to be written: the disk of a busy machine takes no arm away.
    """
    monkeypatch.setattr(recorder, "EXPOSE_SECONDS", 60.0)
    wardrobe.push()
    with running(wardrobe, tokens) as server:
        yield server

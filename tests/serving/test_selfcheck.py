"""What a version has to answer before anybody may ask it."""

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import pytest

from registry.adapter import Selector, Version
from serving.engine.boundary import (
    AdapterLoadFailed,
    Engine,
    EngineBusy,
    GenerateRequest,
    RequestFailed,
    TokenLogprob,
)
from serving.engine.engine import TorchEngine
from serving.engine.settings import EngineSettings, OperatorsName
from serving.selfcheck import PROMPT_IDS, SelfCheckFailed, make_ready
from serving.tokens import Tokens
from tests import tiny
from tests.serving.engine.driving import Folders, base_of, complete, request
from tests.serving.live import NAME, Wardrobe
from tests.serving.scripted import ScriptedEngine


@pytest.fixture
def version(wardrobe: Wardrobe) -> Version:
    wardrobe.push()
    return wardrobe.registry.resolve(Selector(NAME, number=1))


def check(engine: Engine, tokens: Tokens, version: Version, *, keep: bool = False) -> None:
    asyncio.run(make_ready(engine, tokens, version, keep=keep))


def test_a_version_answers_behind_a_prompt_and_behind_a_single_token(
    tokens: Tokens, version: Version
) -> None:
    engine = ScriptedEngine()
    check(engine, tokens, version, keep=True)
    assert sorted(len(asked.prompt_ids) for asked in engine.asked) == [1, len(PROMPT_IDS)]
    assert {asked.adapter for asked in engine.asked} == {version.adapter}
    assert (engine.generated, engine.kept) == (2, {version.digest})


class OneFormBroken(ScriptedEngine):
    """Cannot compute prompts of one length."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def _logprobs(self, request: GenerateRequest, token_id: int) -> tuple[TokenLogprob, ...]:
        value = math.nan if len(request.prompt_ids) == self.length else -0.5
        return (TokenLogprob(token_id, value, ()),)


@pytest.mark.parametrize("length", [1, len(PROMPT_IDS)])
def test_a_version_that_can_be_computed_in_one_form_only_fails(
    tokens: Tokens, version: Version, length: int
) -> None:
    with pytest.raises(SelfCheckFailed, match="log probabilities"):
        check(OneFormBroken(length), tokens, version)


def test_what_cannot_be_loaded_says_why_and_leaves_nobody_waiting(
    tokens: Tokens, version: Version
) -> None:
    engine = ScriptedEngine(unloadable={version.digest})
    with pytest.raises(AdapterLoadFailed, match="the script says so"):
        check(engine, tokens, version, keep=True)
    assert (engine.running, engine.waiting, engine.kept) == ({}, 0, set())


class Full(ScriptedEngine):
    """Has no room for the first requests."""

    refusals = 3

    def check_room(self, tenant: str, priority: object = "normal") -> None:
        if self.refusals:
            self.refusals -= 1
            raise EngineBusy("full", retry_after=1)


def test_a_full_queue_says_nothing_about_a_version(tokens: Tokens, version: Version) -> None:
    engine = Full()
    check(engine, tokens, version)
    assert engine.refusals == 0
    assert engine.generated >= 2
    assert (engine.running, engine.waiting) == ({}, 0)


@pytest.mark.parametrize("operators", ["auto", "torch"])
def test_numbers_that_overflow_are_seen_in_both_forms_and_sound_ones_pass(
    tokens: Tokens, version: Version, tmp_path: Path, operators: OperatorsName
) -> None:
    """Weights that are finite, each of them, and whose products are not."""
    base = tiny.make_base(tmp_path / "base", layers=1)
    modules = ("gate_proj", "up_proj")
    folders = Folders(
        {
            name: tiny.make_adapter(tmp_path / name, base, targets=modules, strength=strength)
            for name, strength in (("sound", 1.0), ("huge", 1e25))
        }
    )
    sound, huge = (replace(version, digest=folders.refs[name].digest) for name in ("sound", "huge"))

    async def main() -> None:
        settings = EngineSettings(device="cpu", dtype="float32", operators=operators)
        engine = TorchEngine.create(base_of(base), folders, settings)
        await make_ready(engine, tokens, sound)
        with pytest.raises(RequestFailed, match="not finite"):
            await make_ready(engine, tokens, huge)
        for prompt in (PROMPT_IDS, PROMPT_IDS[:1]):
            with pytest.raises(RequestFailed, match="not finite"):
                await complete(engine, request(prompt, huge.adapter, max_tokens=1))
        await engine.aclose()

    asyncio.run(main())

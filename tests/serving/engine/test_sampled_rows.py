"""The compiled pass ends early for rows that nobody samples: nobody may be able to tell."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from serving.engine.build import assemble
from serving.engine.core import EngineCore
from serving.engine.ops.native.target import Target
from serving.engine.sequence import Row
from serving.engine.sequence import Sequence as Request
from serving.engine.settings import EngineSettings
from tests import tiny
from tests.peft_cases import CASES, make
from tests.serving.engine.builds import BUILDS, NAMES, read_compiled
from tests.serving.engine.driving import Folders, request

TITLES = (
    "LoRA",
    "DoRA",
    "IA3",
    "IA3 of other outputs",
    "LN tuning",
    "`trainable_token_indices`",
    "`modules_to_save` of embedding, head and norms",
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


@dataclass(frozen=True)
class Reading:
    """Whose prompt it is, and how many of its tokens each of three steps reads."""

    wears: str | None
    counts: tuple[int, int, int]


# The first step samples nothing. The second has single tokens and chunks, sampled and not; the base
# and others sit between rows of one adapter.
READINGS = (
    Reading("LoRA", (11, 1, 0)),
    Reading("rank 40", (9, 1, 0)),
    Reading(None, (4, 1, 5)),
    Reading("LoRA", (3, 1, 20)),
    Reading("DoRA", (6, 1, 0)),
    Reading("LoRA", (0, 17, 0)),
    Reading("LoRA", (5, 8, 6)),
    Reading("DoRA", (0, 13, 4)),
    Reading("DoRA", (7, 5, 0)),
    Reading(None, (0, 14, 1)),
    Reading(None, (2, 15, 0)),
    Reading("IA3", (0, 9, 0)),
    Reading("IA3 of other outputs", (8, 6, 3)),
    Reading("IA3 of other outputs", (1, 4, 0)),
    Reading("LN tuning", (3, 10, 0)),
    Reading("`trainable_token_indices`", (6, 9, 1)),
    Reading("`trainable_token_indices`", (1, 7, 0)),
    Reading("rank 40", (13, 12, 2)),
    Reading("`modules_to_save` of embedding, head and norms", (5, 1, 0)),
    Reading("`modules_to_save` of embedding, head and norms", (2, 9, 3)),
)
SETTINGS = EngineSettings(device="cpu", max_running=2 * len(READINGS), max_model_len=64)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with two kinds of attention, the last one over fewer tokens than a prompt has."""
    return tiny.make_base(
        tmp_path_factory.mktemp("base"),
        arch="qwen3",
        use_sliding_window=True,
        sliding_window=9,
        layer_types=["full_attention", "sliding_attention"],
    )


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("adapters")
    own = {
        case.title: make(case, base, folder / case.title) for case in CASES if case.title in TITLES
    }
    return Folders(own | {"rank 40": tiny.make_adapter(folder / "rank 40", base, rank=40)})


def new_core(base: Path, folders: Folders, target: Target, dtype: torch.dtype) -> EngineCore:
    """Return a core with all adapters in slots."""
    core = assemble(read_compiled(base, target, dtype, 64), folders, SETTINGS).core
    table, stacks = core.residency.table, core.residency.stacks
    for ref in folders.refs.values():
        adapter = core.residency.loader.load(ref).result(10)
        place = table.choices(adapter.bucket, stacks.more_pages(adapter))[0]
        table.place(ref.digest, place.slot)
        stacks.load(place.slot, adapter)
    return core


def sequences(folders: Folders, first_slot: int) -> list[Request]:
    """Return the prompts of READINGS in neighbouring KV slots."""
    found = []
    for index, reading in enumerate(READINGS):
        prompt = [(31 * index + 7 * i) % 256 for i in range(sum(reading.counts))]
        sequence = Request(request(prompt, folders.refs[reading.wears] if reading.wears else None))
        sequence.kv_slot = first_slot + index
        found.append(sequence)
    return found


def sampled_logits(core: EngineCore, steps: Iterable[list[Row]]) -> torch.Tensor:
    """Run the steps; return what each sequence's last token gives, in the order of KV slots."""
    found: dict[int, torch.Tensor] = {}
    for rows in steps:
        logits, sampled = core.runner.run(rows)
        found |= {seq.kv_slot: own for seq, own in zip(sampled, logits, strict=True)}
    return torch.stack([found[slot] for slot in sorted(found)])


def one_by_one(sequence: Request) -> Iterator[list[Row]]:
    """Sample after each token: no step has a row that could be left out."""
    prompt = sequence.tokens
    for index in range(len(prompt)):
        sequence.tokens = prompt[: index + 1]
        yield [Row(sequence, index, 1)]


@pytest.mark.parametrize(("target", "dtype"), BUILDS, ids=NAMES)
def test_mixed_steps_give_what_each_row_alone_gives_to_the_last_bit(
    base: Path, folders: Folders, target: Target, dtype: torch.dtype
) -> None:
    mixed, alone = sequences(folders, 0), sequences(folders, len(READINGS))
    with torch.inference_mode():
        core = new_core(base, folders, target, dtype)
        exact = sampled_logits(core, (rows for each in alone for rows in one_by_one(each)))
        assert exact.isfinite().all()
        assert exact.unique(dim=0).shape == exact.shape, "rows that could be taken for each other"
        together = (
            [
                Row(sequence, sum(reading.counts[:step]), reading.counts[step])
                for sequence, reading in zip(mixed, READINGS, strict=True)
                if reading.counts[step]
            ]
            for step in range(3)
        )
        assert torch.equal(sampled_logits(core, together), exact)

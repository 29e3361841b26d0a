"""Trained together, every adapter ends as it does alone: `training.train.train` is the oracle."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import training.together.model as shared
from registry.base import BaseModel, Bases
from registry.errors import BaseNotFound
from registry.home import default_cache
from registry.validate import validate
from tests.tiny import make_base
from training.data.examples import Data, ask, digest_examples
from training.data.load import load_data
from training.errors import RecipeError, RunFailed
from training.model import Hardware
from training.progress import Progress
from training.recipe import Recipe, apply_overrides, load_recipe
from training.together.lora import Batch, Span
from training.together.tenant import Tenant
from training.together.train import Job, train_together
from training.train import TrainedAdapter, train

FP32 = Hardware("cpu", "float32", 1)
BOUND = 1e-4
ROOT = Path(__file__).parent.parent.parent


def quiet(*told: Any) -> None:
    pass


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def examples(word: str, count: int) -> Data:
    train = tuple(ask(f"{word} {n}", word[: 1 + n % 5], str(n)) for n in range(count))
    held_out = (ask(f"{word} {count}", word, "held"),)
    return Data(train, held_out, 0, digest_examples(train, held_out))


@pytest.fixture
def jobs(recipe: Recipe) -> list[Job]:
    """Tenants that differ in all that a recipe may differ in."""
    plain = apply_overrides(recipe, ["method.dropout=0.0", "train.learning_rate=3e-3"])
    changes = {
        "acme/grass": ["train.steps=9", "train.schedule=cosine", "seed=3"],
        "bank/intent": [
            'method.targets=["q_proj", "down_proj"]',
            "method.r=3",
            "train.batch_size=3",
            "train.weight_decay=0.1",
        ],
        "clinic/code": [
            'method.kind="rslora"',
            "method.r=8",
            "train.steps=5",
            "train.batch_size=1",
            "train.max_grad_norm=0.05",
            "task.system=Another prompt, and a longer one.",
        ],
    }
    return [
        Job(apply_overrides(plain, [f"name={name}", *more]), examples(name, 6 + len(name)))
        for name, more in changes.items()
    ]


def together(jobs: Sequence[Job], base: BaseModel, runs: Path, **more: Any) -> list[Any]:
    progress = more.pop("progress", quiet)
    return train_together(
        jobs, base, runs, progress=progress, show=quiet, hardware=more.pop("hardware", FP32)
    )


@pytest.fixture(scope="module")
def alone_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def mixed_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixed")


def alone(jobs: Sequence[Job], base: BaseModel, runs: Path) -> list[TrainedAdapter]:
    return [
        train(job.recipe, job.data, base, runs, progress=quiet, show=quiet, hardware=FP32)
        for job in jobs
    ]


def weights_of(trained: TrainedAdapter) -> dict[str, torch.Tensor]:
    return load_file(trained.folder / "adapter_model.safetensors")


def curve_of(trained: TrainedAdapter) -> list[dict[str, float]]:
    text = (trained.folder.parent / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def difference(one: TrainedAdapter, other: TrainedAdapter) -> float:
    """Return the largest difference of any weight and of any loss."""
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    curves = zip(curve_of(one), curve_of(other), strict=True)
    losses = [abs(a["loss"] - b["loss"]) for a, b in curves]
    return max(*losses, *(float((mine[n] - theirs[n]).abs().max()) for n in mine))


def test_every_adapter_ends_as_it_does_alone(
    jobs: list[Job], tiny_base: BaseModel, mixed_runs: Path, alone_runs: Path
) -> None:
    mixed = together(jobs, tiny_base, mixed_runs)
    for one, other in zip(mixed, alone(jobs, tiny_base, alone_runs), strict=True):
        assert difference(one, other) < BOUND
        start = difference_from_start(other)
        assert start > 30 * BOUND, f"it moved by {start}: the bound would prove little"
        for mine, theirs in zip(curve_of(one), curve_of(other), strict=True):
            assert mine["learning_rate"] == pytest.approx(theirs["learning_rate"])
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
        configs = [json.loads((t.folder / "adapter_config.json").read_text()) for t in (one, other)]
        assert configs[0] == configs[1]


def difference_from_start(trained: TrainedAdapter) -> float:
    """B starts at zero, so what B is, is how far it moved."""
    return max(float(w.abs().max()) for n, w in weights_of(trained).items() if "lora_B" in n)


@pytest.mark.parametrize("arch", ["mistral", "qwen3"])
def test_other_architectures_end_as_alone(arch: str, jobs: list[Job], tmp_path: Path) -> None:
    made = make_base(tmp_path / "made", arch=arch)
    base = Bases(tmp_path / "bases").add("local/tiny", made, origin="made")
    short = [Job(apply_overrides(j.recipe, ["train.steps=3"]), j.data) for j in jobs]
    mixed = together(short, base, tmp_path / "together")
    for one, other in zip(mixed, alone(short, base, tmp_path / "alone"), strict=True):
        assert difference(one, other) < BOUND


@pytest.mark.long
def test_on_the_default_base_every_adapter_ends_as_it_does_alone(tmp_path: Path) -> None:
    recipes = [load_recipe(ROOT / "adapters" / name) for name in ("smart-home", "icd-10")]
    short = ["train.steps=4", "train.batch_size=2", "data.train_limit=40"]
    short = [apply_overrides(recipe, short) for recipe in recipes]
    base = default_base(short[0].base)
    real = [Job(recipe, load_data(recipe)) for recipe in short]
    mixed = together(real, base, tmp_path / "together")
    for one, other in zip(mixed, alone(real, base, tmp_path / "alone"), strict=True):
        assert difference(one, other) < BOUND
        assert difference_from_start(other) > 10 * BOUND


def default_base(base_id: str) -> BaseModel:
    try:
        return Bases(default_cache() / "bases").get(base_id)
    except BaseNotFound:
        pytest.skip(f"{base_id} is not here; wardrobe base pull fetches it")


def wear_the_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    def turned(self: Batch, spans: Sequence[Span]) -> None:
        numbers = [span.adapter for span in spans]
        pairs = zip(spans, numbers[1:] + numbers[:1], strict=True)
        self.__dict__["spans"] = [Span(number, s.start, s.stop) for s, number in pairs]

    monkeypatch.setattr(Batch, "spans", property(lambda self: self.__dict__["spans"], turned))


def clip_over_all(monkeypatch: pytest.MonkeyPatch) -> None:
    step = shared.SharedModel.losses
    learn = Tenant.learn
    models: list[shared.SharedModel] = []

    def losses(self: shared.SharedModel, batches: Any) -> list[torch.Tensor]:
        models[:] = [self]
        return step(self, batches)

    def clipped(self: Tenant, loss: float) -> None:
        if self.adapter is models[0].adapters[0]:
            flats = [adapter.flat for adapter in models[0].adapters]
            torch.nn.utils.clip_grad_norm_(flats, 0.05)
        learn(self, loss)

    monkeypatch.setattr(shared.SharedModel, "losses", losses)
    monkeypatch.setattr(Tenant, "learn", clipped)


def read_in_another_order(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Tenant.batch
    monkeypatch.setattr(
        Tenant, "batch", lambda self: batch(self) if self.step else [self.member.rows.train[-1]] * 2
    )


@pytest.mark.parametrize("fault", [wear_the_neighbours, clip_over_all, read_in_another_order])
def test_the_bound_notices(
    fault: Callable[[pytest.MonkeyPatch], None],
    jobs: list[Job],
    tiny_base: BaseModel,
    tmp_path: Path,
    alone_runs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rights = alone(jobs, tiny_base, alone_runs)
    fault(monkeypatch)
    wrongs = together(jobs, tiny_base, tmp_path)
    differences = [difference(one, right) for one, right in zip(wrongs, rights, strict=True)]
    assert max(differences) > 10 * BOUND


def bytes_of(outcomes: Sequence[Any]) -> list[bytes]:
    return [(o.folder / "adapter_model.safetensors").read_bytes() for o in outcomes]


def test_twice_the_same_and_in_any_order_gives_equal_bytes_and_a_group_is_found_again(
    jobs: list[Job], tiny_base: BaseModel, tmp_path: Path
) -> None:
    first = together(jobs, tiny_base, tmp_path / "a")
    second = together(jobs[::-1], tiny_base, tmp_path / "b")[::-1]
    assert bytes_of(first) == bytes_of(second)
    again = together(jobs, tiny_base, tmp_path / "a")
    assert [o.reused for o in again] == [True] * 3
    assert [o.folder for o in again] == [o.folder for o in first]


class Stop(Exception):
    pass


@pytest.mark.parametrize("step", [3, 8, 12])
def test_a_group_interrupted_at_any_step_continues_to_the_same_bytes(
    step: int, jobs: list[Job], tiny_base: BaseModel, tmp_path: Path, mixed_runs: Path
) -> None:
    unbroken = together(jobs, tiny_base, mixed_runs)
    last = max(job.recipe.train.steps for job in jobs)
    longest = next(job.recipe.name for job in jobs if job.recipe.train.steps == last)

    def stop(progress: Progress) -> None:
        if progress.text == longest and progress.done == step:
            raise Stop

    with pytest.raises(Stop):
        together(jobs, tiny_base, tmp_path / "broken", progress=stop)
    seen: list[int] = []
    resumed = together(jobs, tiny_base, tmp_path / "broken", progress=lambda p: seen.append(p.done))
    assert bytes_of(resumed) == bytes_of(unbroken)
    assert min(seen) == {3: 0, 8: 5, 12: 9}[step], "it must go on from a checkpoint"
    for outcome, other in zip(resumed, unbroken, strict=True):
        assert [p["step"] for p in curve_of(outcome)] == [p["step"] for p in curve_of(other)]
        assert not list(outcome.folder.parent.glob("checkpoints/*"))


def poison(monkeypatch: pytest.MonkeyPatch, name: str, at: int) -> None:
    """Make one tenant's weights infinite before a step."""
    batch = Tenant.batch

    def poisoned(self: Tenant) -> Any:
        if self.member.recipe.name == name and self.step == at:
            self.adapter.flat.data.fill_(float("inf"))
        return batch(self)

    monkeypatch.setattr(Tenant, "batch", poisoned)


def test_a_loss_that_is_not_finite_fails_alone(
    jobs: list[Job],
    tiny_base: BaseModel,
    tmp_path: Path,
    alone_runs: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rights = alone(jobs, tiny_base, alone_runs)
    poison(monkeypatch, "bank/intent", at=6)
    outcomes = together(jobs, tiny_base, tmp_path)
    assert isinstance(outcomes[1], RunFailed)
    assert "bank/intent: the loss is nan at step 7" in outcomes[1].message
    for place in (0, 2):
        assert difference(outcomes[place], rights[place]) < BOUND
    again = together(jobs, tiny_base, tmp_path)
    assert again[1].message == outcomes[1].message, "what it depends on has not changed"
    assert [again[0].reused, again[2].reused] == [True, True]


def test_a_failure_and_an_interruption_leave_the_others_bytes_as_they_are(
    jobs: list[Job], tiny_base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, "bank/intent", at=6)
    unbroken = together(jobs, tiny_base, tmp_path / "unbroken")

    def stop(progress: Progress) -> None:
        if progress.text == "acme/grass" and progress.done == 8:
            raise Stop

    with pytest.raises(Stop):
        together(jobs, tiny_base, tmp_path / "broken", progress=stop)
    resumed = together(jobs, tiny_base, tmp_path / "broken")
    assert isinstance(resumed[1], RunFailed)
    assert resumed[1].message == unbroken[1].message
    assert bytes_of([resumed[0], resumed[2]]) == bytes_of([unbroken[0], unbroken[2]])


def test_company_is_part_of_what_a_run_depends_on(
    jobs: list[Job], tiny_base: BaseModel, tmp_path: Path, mixed_runs: Path
) -> None:
    three, two = together(jobs, tiny_base, mixed_runs), together(jobs[:2], tiny_base, tmp_path)
    assert three[0].folder != two[0].folder
    assert [len(o.card["lineage"]["together"]) for o in (three[0], two[0])] == [3, 2]
    text = json.dumps(three[0].card)
    assert "bank" not in text, "a tenant's card names no other tenant"


def test_the_registrys_gate_takes_each_adapter(
    jobs: list[Job], tiny_base: BaseModel, mixed_runs: Path
) -> None:
    for job, outcome in zip(jobs, together(jobs, tiny_base, mixed_runs), strict=True):
        checked = validate(outcome.folder, Bases(tiny_base.path.parent))
        assert (checked.base.id, checked.rank) == ("local/tiny", job.recipe.method.r)


@pytest.mark.filterwarnings("ignore:Model has `tie_word")  # PEFT's own, of head and embedding
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("base=other/base", r"same base: acme/grass has local/tiny; bank/intent has other/base"),
        ('method.kind="dora"', r"bank/intent has method.kind = 'dora'"),
        ("method.dropout=0.1", r"bank/intent has method.dropout = 0.1"),
        ("train.neftune_alpha=5.0", r"bank/intent has train.neftune_alpha"),
        ("name=acme/grass", "acme/grass is given more than once"),
        ('method.targets=["lm_head"]', r"bank/intent adapts lm_head, a Linear"),
        ('method.targets=["embed_tokens"]', r"bank/intent adapts model.embed_tokens"),
    ],
)
def test_what_is_not_trained_together_is_refused_by_name(
    override: str, named: str, jobs: list[Job], tiny_base: BaseModel, tmp_path: Path
) -> None:
    changed = apply_overrides(jobs[1].recipe, [override])
    with pytest.raises(RecipeError, match=named):
        together([jobs[0], Job(changed, jobs[1].data)], tiny_base, tmp_path)

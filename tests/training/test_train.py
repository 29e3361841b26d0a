import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from registry.base import BaseModel, Bases
from registry.validate import validate
from training.batches import MaskedSample
from training.data.examples import Data
from training.errors import DataError, RunFailed
from training.model import Hardware
from training.progress import Progress
from training.prompt import load_prompter
from training.recipe import Recipe, apply_overrides
from training.replay import Replayed
from training.rows import make_rows
from training.run import COMPLETE, open_run
from training.train import TrainedAdapter, run_facts, train

FP32 = Hardware("cpu", "float32", 1)


def quiet(told: Progress | MaskedSample) -> None:
    pass


def bytes_of(trained: TrainedAdapter) -> tuple[bytes, bytes]:
    folder = trained.folder
    names = ("adapter_model.safetensors", "adapter_config.json")
    return (folder / names[0]).read_bytes(), (folder / names[1]).read_bytes()


def run(recipe: Recipe, data: Data, base: BaseModel, runs: Path, **more: Any) -> TrainedAdapter:
    progress = more.pop("progress", quiet)
    return train(recipe, data, base, runs, progress=progress, show=quiet, hardware=FP32)


def facts_of(recipe: Recipe, data: Data, base: BaseModel) -> dict[str, Any]:
    rows = make_rows(recipe, data, load_prompter(base.path, recipe.task.system), Replayed((), {}))
    return run_facts(recipe, data, base, FP32, rows)


pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_fresh_runs_write_equal_bytes(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    first = run(recipe, data, tiny_base, tmp_path / "a")
    second = run(recipe, data, tiny_base, tmp_path / "b")
    assert bytes_of(first) == bytes_of(second)
    other = run(apply_overrides(recipe, ["seed=1"]), data, tiny_base, tmp_path / "a")
    assert bytes_of(other)[0] != bytes_of(first)[0]


def test_a_run_that_dies_in_the_middle_continues_to_the_same_bytes(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    unbroken = run(recipe, data, tiny_base, tmp_path / "unbroken")
    seen: list[int] = []

    def die_at_ten(progress: Progress) -> None:
        seen.append(progress.done)
        if progress.done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe, data, tiny_base, tmp_path / "broken", progress=die_at_ten)
    seen.clear()
    resumed = run(
        recipe, data, tiny_base, tmp_path / "broken", progress=lambda p: seen.append(p.done)
    )
    assert seen == [8, 9, 10, 11, 12]
    assert bytes_of(resumed) == bytes_of(unbroken)
    lines = (resumed.folder.parent / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))
    assert not (resumed.folder.parent / "checkpoints").exists()


def test_a_half_written_checkpoint_is_not_resumed_from(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    with open_run(tmp_path, facts_of(recipe, data, tiny_base)) as opened:
        for step, whole in ((4, True), (8, False)):
            folder = opened.checkpoints / f"checkpoint-{step}"
            folder.mkdir()
            if whole:
                (folder / COMPLETE).touch()
        last = opened.last_checkpoint()
        assert last is not None
        assert last.name == "checkpoint-4"
        opened.forget_after(last)
        assert [path.name for path in opened.checkpoints.iterdir()] == ["checkpoint-4"]


def test_a_finished_run_is_found_again_and_a_changed_recipe_is_not(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    first = run(recipe, data, tiny_base, tmp_path)
    again = run(recipe, data, tiny_base, tmp_path)
    assert (first.reused, again.reused) == (False, True)
    assert again.folder == first.folder
    assert again.card == first.card
    # The gate is no setting of the training.
    assert run(apply_overrides(recipe, ["gate.min_gain=0.9"]), data, tiny_base, tmp_path).reused
    shorter = run(apply_overrides(recipe, ["train.steps=6"]), data, tiny_base, tmp_path)
    assert not shorter.reused
    assert bytes_of(shorter)[0] != bytes_of(first)[0]


def test_a_run_in_use_by_another_process_is_refused(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    with (
        open_run(tmp_path, facts_of(recipe, data, tiny_base)),
        pytest.raises(RunFailed, match="Another process"),
    ):
        run(recipe, data, tiny_base, tmp_path)


def test_the_adapter_is_plain_lora_with_a_logical_base_and_it_learned(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    recipe = apply_overrides(recipe, ["train.steps=60", "method.dropout=0.0"])
    trained = run(recipe, data, tiny_base, tmp_path)
    config = json.loads((trained.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "local/tiny"
    assert config["target_modules"] == sorted(config["target_modules"])
    assert str(tmp_path) not in "".join(p.read_text() for p in trained.folder.glob("*.json"))
    base = AutoModelForCausalLM.from_pretrained(tiny_base.path)
    with warnings.catch_warnings():  # PEFT 0.21 reads a property that transformers 5.23 renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        model = PeftModel.from_pretrained(base, str(trained.folder))
    prompter = load_prompter(tiny_base.path, recipe.task.system)
    prompt = prompter.prompt_ids(data.train[1].turns)
    output = model.generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        max_new_tokens=8,
        do_sample=False,
    )[0, len(prompt) :].tolist()
    assert prompter.answer(output) == "green"
    assert output[-1] == prompter.end_of_turn, "it must have learned to stop"


def test_the_card_says_what_the_registry_reads(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    card = run(recipe, data, tiny_base, tmp_path).card
    assert card["base"] == {
        "id": "local/tiny",
        "fingerprint": tiny_base.fingerprint,
        "structure": tiny_base.structure,
    }
    assert card["prompt"] == {"system": "Say the colour."}
    assert card["gate"]["passed"] is False, "nobody may promote what was not evaluated"
    assert card["lineage"]["data_sha256"] == data.digest
    assert card["lineage"]["recipe_sha256"] == recipe.digest
    assert card["lineage"]["versions"]["torch"] == torch.__version__


def test_rows_too_long_are_named_or_dropped_with_a_count(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    long = replace(data.train[0], completion="x" * 300)
    data = replace(data, train=(*data.train, long))
    with pytest.raises(DataError, match=r"1 examples are longer.*grass 0.*too_long"):
        run(recipe, data, tiny_base, tmp_path)
    dropping = apply_overrides(recipe, ["train.too_long=drop", "train.steps=2"])
    assert run(dropping, data, tiny_base, tmp_path).dropped == 1


def test_a_loss_that_is_not_finite_stops_the_run(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    wild = apply_overrides(
        recipe,
        ["train.learning_rate=1.0", "train.steps=200", "train.max_grad_norm=1e30", "method.r=64"],
    )
    wild = apply_overrides(wild, ["method.alpha=1024", "train.schedule=constant"])
    # Infinity in the base makes the first loss NaN, whatever the optimiser does.
    folder = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(tiny_base.path)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((tiny_base.path / name).read_bytes())
    with pytest.raises(RunFailed, match=r"loss is nan at step 1"):
        run(wild, data, replace(tiny_base, path=folder), tmp_path / "runs")


def test_the_registrys_gate_takes_the_adapter(
    recipe: Recipe, data: Data, tiny_base: BaseModel, tmp_path: Path
) -> None:
    trained = run(apply_overrides(recipe, ["train.steps=2"]), data, tiny_base, tmp_path)
    checked = validate(trained.folder, Bases(tiny_base.path.parent))
    assert (checked.base.id, checked.rank) == ("local/tiny", 4)
    assert checked.warnings == ()

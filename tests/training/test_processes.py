"""One run in several processes: gloo on the CPU stands for what NCCL does between GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from numpy.linalg import norm
from safetensors.numpy import load_file
from transformers import TrainingArguments

from registry.base import BaseModel
from tests.live import Shop, free_port
from training.arguments import one_device, trainer_arguments
from training.errors import RecipeError, RunFailed
from training.model import Hardware
from training.processes import launch, launch_options
from training.recipe import Recipe, apply_overrides
from training.run import Run

RECIPE = """
name = "acme/colours"
base = "local/tiny"
[data]
path = "rows.csv"
held_out = 0.1
[task]
system = "Say the colour."
metric = "label"
max_new_tokens = 8
[method]
r = 4
[train]
steps = 8
batch_size = 4
learning_rate = 1e-3
save_every = 3
[replay]
share = 0.25
source = "general.txt"
max_new_tokens = 4
"""


def write_config(path: Path, kind: str) -> Path:
    path.write_text(
        "compute_environment: LOCAL_MACHINE\n"
        f"distributed_type: {kind}\n"
        "use_cpu: true\n"
        "mixed_precision: 'no'\n"
        "num_machines: 1\n"
        "num_processes: 2\n"
        "machine_rank: 0\n"
        f"main_process_port: {free_port()}\n"
    )
    return path


@pytest.mark.long
def test_two_processes_train_what_one_does_and_one_of_them_writes(
    tiny_base: BaseModel, tmp_path: Path
) -> None:
    rows = [f"grass {n},{'green' if n % 2 else 'blue'}" for n in range(20)]
    (tmp_path / "rows.csv").write_text("\n".join(["prompt,completion", *rows]))
    (tmp_path / "general.txt").write_text("How are you?\nWhat is tea?\n")
    (tmp_path / "recipe.toml").write_text(RECIPE)
    config = write_config(tmp_path / "two.yaml", "MULTI_GPU")  # the launcher's word for torchrun
    cache = tiny_base.path.parents[1]
    one, two = (Shop(tmp_path / name, cache) for name in ("one", "two"))
    arguments = ("train", str(tmp_path), "--push")
    for shop, more in ((one, ()), (two, ("--accelerate-config", str(config)))):
        said = shop.run(*arguments, *more)
        assert said.count("pushed acme/colours@v1") == 1, said
        assert said.count("loss curve in") == 1
    runs = [next(shop.home.glob("runs/*/adapter")) for shop in (one, two)]
    ours, theirs = (load_file(run / "adapter_model.safetensors") for run in runs)
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        if "lora_B" in name:  # it began at zero
            assert norm(weight - theirs[name]) < 0.02 * norm(weight), name
    texts = [(run.parent / "metrics.jsonl").read_text() for run in runs]
    alone, together = ([json.loads(line) for line in text.splitlines()] for text in texts)
    assert [line["step"] for line in together] == list(range(1, 9))
    losses = [line["loss"] for line in alone]
    assert [line["loss"] for line in together] == pytest.approx(losses, rel=2e-3)  # in bf16
    assert json.loads((runs[1].parent / "run.json").read_text())["processes"] == 2


WAITING = """
import sys, time
from pathlib import Path
from training.processes import first_alone, is_first_process
path = Path(sys.argv[1])
def work():
    if is_first_process():
        time.sleep(1)
        path.write_text("there")
    return path.read_text()
assert first_alone(work) == "there"
"""


@pytest.mark.long
def test_the_other_processes_find_what_the_first_one_did(tmp_path: Path) -> None:
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING, tmp_path / "file"],
            cwd=Path(__file__).parents[2],
            env=os.environ | together | {"RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in ("0", "1")
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]


def test_a_configuration_that_shards_or_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match="FSDP, which shards"):
        launch(write_config(tmp_path / "fsdp.yaml", "FSDP"), ["train"])
    with pytest.raises(RunFailed, match=r"no accelerate configuration at .*absent"):
        launch(tmp_path / "absent.yaml", ["train"])


def test_a_configuration_changes_neither_number_format_nor_compiler(tmp_path: Path) -> None:
    path = write_config(tmp_path / "fp16.yaml", "MULTI_GPU")
    text = path.read_text().replace("'no'", "fp16") + "dynamo_config:\n  dynamo_backend: INDUCTOR\n"
    path.write_text(text)

    def read(options: list[str]) -> tuple[str, str]:
        parser = launch_command_parser()
        arguments = parser.parse_args([*options, "x.py"])
        found, *_ = _validate_launch_command(arguments)
        return found.mixed_precision, found.dynamo_backend.upper()

    assert read(["--config_file", str(path)]) == ("fp16", "INDUCTOR"), "what would happen"
    assert read(launch_options(path)) == ("no", "NO")


def test_a_batch_is_shared_out_evenly_or_refused(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    run, hardware = Run(tmp_path, {}), Hardware("cpu", "float32", 1)
    arguments = trainer_arguments(apply_overrides(recipe, ["train.batch_size=8"]), run, hardware)
    assert arguments["per_device_train_batch_size"] == 4
    with pytest.raises(RecipeError, match=r"train\.batch_size = 9 .* 2 processes"):
        trainer_arguments(apply_overrides(recipe, ["train.batch_size=9"]), run, hardware)


def test_a_process_that_sees_several_gpus_uses_one_and_keeps_its_batch(
    recipe: Recipe, tmp_path: Path
) -> None:
    found = trainer_arguments(recipe, Run(tmp_path, {}), Hardware("cpu", "float32", 1))
    arguments = TrainingArguments(**found)
    arguments._n_gpu = 4
    assert arguments.train_batch_size == 4 * recipe.train.batch_size, "what would happen"
    assert one_device(arguments).train_batch_size == recipe.train.batch_size

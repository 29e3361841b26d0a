"""The processes of one run: a single one, or as many as `accelerate launch` started.

Each of several processes runs the same code on its share of a batch. The first one alone holds the
run's folder, writes and reports.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file

from training.errors import RunFailed

SHARDED = ("DistributedType.FSDP", "DistributedType.DEEPSPEED", "DistributedType.MEGATRON_LM")
LAUNCHED = "WARDROBE_LAUNCHED"

Result = TypeVar("Result")


def process_count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Return when every process of the run has come here."""
    if process_count() > 1:
        # Without a GPU it must be told so, or it takes itself for alone and does not wait.
        PartialState(cpu=not torch.cuda.is_available()).wait_for_everyone()


def first_alone(work: Callable[[], Result]) -> Result:
    """Do in the first process what leaves files behind; the others find them and do it then."""
    if not is_first_process():
        wait_for_all()
    result = work()
    if is_first_process():
        wait_for_all()
    return result


def is_launched() -> bool:
    """Say whether this process is one that `launch` asked for."""
    return LAUNCHED in os.environ


def launch_options(config: Path) -> list[str]:
    """Return the launcher's options: the file's, but for what would change the numbers.

    The recipe and the hardware say in which format a run computes, and its key knows only that.
    """
    return ["--config_file", str(config), "--mixed_precision", "no", "--dynamo_backend", "no"]


def launch(config: Path, command: Sequence[str]) -> None:
    """Run `wardrobe COMMAND…` in the processes that an accelerate configuration describes.

    Raises RunFailed when there is no such file, when it shards the model, or when a process fails;
    it has said why.
    """
    if not config.is_file():
        raise RunFailed(f"There is no accelerate configuration at {config}: `accelerate config`.")
    kind = str(load_config_from_file(str(config)).distributed_type)
    if kind in SHARDED:
        raise RunFailed(
            f"{config} says distributed_type: {kind}, which shards the model. Only data "
            "parallelism is supported: every process holds the whole model."
        )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *launch_options(config)]
    done = subprocess.run(  # noqa: S603  # our own command line again
        [*launcher, "-m", "wardrobe", *command], env=os.environ | {LAUNCHED: "1"}, check=False
    )
    if done.returncode:
        raise RunFailed(f"accelerate launch ended with code {done.returncode}; see above.")

"""A recipe as the arguments of transformers' Trainer."""

import math
from importlib.util import find_spec
from typing import Any, TypeVar

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import TensorBoardCallback

from training.errors import RecipeError
from training.model import Hardware
from training.processes import is_first_process, process_count
from training.recipe import Recipe
from training.run import Run

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def trainer_arguments(recipe: Recipe, run: Run, hardware: Hardware) -> dict[str, Any]:
    """Return keyword arguments of TrainingArguments; all that could differ between two runs is set.

    The recipe's batch is shared out to the processes, so that more of them change no step.
    Raises RecipeError when they cannot share it evenly.
    """
    settings = recipe.train
    share, rest = divmod(settings.batch_size, process_count())
    if rest:
        raise RecipeError(
            f"train.batch_size = {settings.batch_size} cannot be shared evenly by "
            f"{process_count()} processes. Take a multiple of {process_count()}."
        )
    return {
        "output_dir": str(run.checkpoints),
        "run_name": recipe.name,
        "max_steps": settings.steps,
        "per_device_train_batch_size": share,
        "per_device_eval_batch_size": share,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule
        if settings.schedule != "constant"
        else "constant_with_warmup",
        "warmup_steps": math.ceil(settings.warmup * settings.steps),
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "neftune_noise_alpha": settings.neftune_alpha,
        "optim": "adamw_torch",
        "bf16": hardware.autocast(recipe.method.kind),
        "use_cpu": hardware.device == "cpu",
        "full_determinism": hardware.device == "cuda",
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "train_sampling_strategy": "sequential",  # the schedule is the order
        "remove_unused_columns": False,
        "dataloader_pin_memory": hardware.device == "cuda",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is not finite must be seen
        "prediction_loss_only": True,
        "report_to": [name for name in recipe.report_to if name != "tensorboard"] or "none",
        "disable_tqdm": True,
        **_saving(recipe),
    }


def one_device(arguments: Arguments) -> Arguments:
    """Keep a process to one GPU: where it sees several, the Trainer would multiply the batch."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _saving(recipe: Recipe) -> dict[str, Any]:
    """Say when to look at the validation loss and when to write a checkpoint.

    With early stopping the Trainer writes one at each look, since the best must be kept;
    `training.steps.Checkpoints` adds those of save_every.
    """
    settings = recipe.train
    arguments: dict[str, Any] = {"save_total_limit": 2, "save_steps": settings.save_every}
    if settings.eval_every is not None:
        arguments |= {"eval_strategy": "steps", "eval_steps": settings.eval_every}
    if settings.patience is not None:
        arguments |= {
            "save_steps": settings.eval_every,
            "load_best_model_at_end": True,
            "metric_for_best_model": "eval_loss",
            "greater_is_better": False,
        }
    return arguments


def trackers(recipe: Recipe, run: Run) -> list[TrainerCallback]:
    """Return the trackers that want to be told where to write; the Trainer makes the others.

    Raises RecipeError when the package of any is missing.
    """
    for tracker in recipe.report_to:
        if find_spec(tracker) is None:
            raise RecipeError(
                f"report_to names {tracker!r}, which is not installed. Install it with "
                f"`pip install {tracker}`, or take it out of report_to."
            )
    if "tensorboard" not in recipe.report_to or not is_first_process():
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [TensorBoardCallback(SummaryWriter(str(run.trackers)))]

"""How unlikely the base model finds the answers of examples: what a selection can go by."""

from collections.abc import Sequence

from registry.base import BaseModel
from training.data.examples import Example
from training.data.selection import Difficulty
from training.progress import Progress, Report, own_progress_only
from training.prompt import load_prompter


def difficulty_of(base: BaseModel, system: str, report: Report) -> Difficulty:
    """Return a function that asks the base about each example. It is loaded when first asked.

    The difficulty is the mean −log p of the completion's tokens, its end included, in nats. One
    example at a time: no padding beside it changes a bit.
    """

    def difficulty(examples: Sequence[Example]) -> list[float]:
        import torch  # and PEFT: seconds that a check without this question does not take

        from training.model import detect_hardware, load_base

        hardware = detect_hardware()
        prompter = load_prompter(base.path, system)
        with own_progress_only():
            model = load_base(base.path, hardware.dtype).to(hardware.device).eval()
        losses: list[float] = []
        for example in examples:
            prompt, completion = prompter.encode(example)
            ids = torch.tensor([prompt + completion], device=hardware.device)
            with torch.inference_mode():
                logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
            loss = torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :])
            losses.append(float(loss))
            report(Progress("check", len(losses), len(examples), "difficulty"))
        return losses

    return difficulty

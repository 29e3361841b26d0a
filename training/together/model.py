"""One frozen base that many adapters are trained over at once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses
from transformers import AttentionInterface

from training.batches import Sample
from training.errors import RecipeError
from training.model import Hardware, load_base, peft_config, peft_without_advice
from training.progress import own_progress_only
from training.recipe import Recipe
from training.together.lora import Batch, Pair, SharedLinear
from training.together.packing import ATTENTION, attend, pack


@dataclass(frozen=True, slots=True)
class Adapter:
    """The weights of one adapter, in one piece of memory that its optimiser works on."""

    number: int
    flat: nn.Parameter  # every weight in fp32, and its gradient
    views: Mapping[str, nn.Parameter]  # the same memory, by PEFT's names, shaped
    targets: tuple[str, ...]

    def state(self) -> dict[str, torch.Tensor]:
        """Return the weights by PEFT's names."""
        return {name: view.detach() for name, view in self.views.items()}

    def clear_gradient(self) -> None:
        """Zero it in place: the views' gradients are the same memory."""
        assert self.flat.grad is not None, "made with the weights"
        self.flat.grad.zero_()


class SharedModel:
    """The base and its adapters. A step asks for the losses, and every adapter has its gradient."""

    def __init__(self, base: Path, recipes: Sequence[Recipe], hardware: Hardware) -> None:
        """Start an adapter for each recipe as PEFT starts it alone. Raises RecipeError."""
        AttentionInterface.register(ATTENTION, attend)  # type: ignore[arg-type]  # its stub knows no keywords
        with own_progress_only():
            self._model = load_base(base, hardware.dtype).requires_grad_(False)
        self._device = torch.device(hardware.device)
        self._batch = Batch()
        pairs: dict[str, dict[int, Pair]] = {}
        adapters = [self._start(number, recipe, pairs) for number, recipe in enumerate(recipes)]
        self.adapters: tuple[Adapter, ...] = tuple(adapters)
        for place, of_adapter in pairs.items():
            linear = self._model.get_submodule(place)
            self._model.set_submodule(place, SharedLinear(linear, of_adapter, self._batch))
        self._model.to(self._device).train()
        self._model.set_attn_implementation(ATTENTION)

    def losses(self, batches: Sequence[tuple[Adapter, Sequence[Sample]]]) -> list[torch.Tensor]:
        """Return each adapter's mean loss over the tokens of its own answers.

        Their sum's `backward` gives each adapter the gradient that it would have alone: no row of
        another one takes part in it.
        """
        packed = pack([(adapter.number, rows) for adapter, rows in batches], self._device)
        self._batch.spans = packed.spans
        logits = self._model(
            input_ids=packed.ids,
            position_ids=packed.positions,
            logits_to_keep=packed.asking,  # the head is a fifth of the work, and prompts need none
            use_cache=False,
            places=packed.places,
        ).logits[0]
        each = F.cross_entropy(logits.float(), packed.answers, reduction="none")
        return [part.mean() for part in each.split(packed.counts)]

    def _start(self, number: int, recipe: Recipe, pairs: dict[str, dict[int, Pair]]) -> Adapter:
        """Let PEFT choose targets, weights and scale, take them over, and take PEFT away again."""
        torch.manual_seed(recipe.seed)
        with peft_without_advice():
            peft: Any = get_peft_model(self._model, peft_config(recipe.method))
        layers = {
            place: layer
            for place, layer in peft.base_model.model.named_modules()
            if isinstance(layer, LoraLayer)
        }
        _check(recipe, layers)
        state = get_peft_model_state_dict(peft)
        flat, views = _flatten({name: state[name] for name in sorted(state)}, self._device)
        for place, layer in layers.items():
            a, b = (views[f"base_model.model.{place}.lora_{half}.weight"] for half in "AB")
            pairs.setdefault(place, {})[number] = Pair(a, b, layer.scaling["default"])
        targets = tuple(sorted(peft.peft_config["default"].target_modules))
        self._model = peft.unload()
        return Adapter(number, flat, views, targets)


def _check(recipe: Recipe, layers: Mapping[str, Any]) -> None:
    for place, layer in layers.items():
        if not isinstance(layer.base_layer, nn.Linear) or place == "lm_head":
            raise RecipeError(
                f"{recipe.name} adapts {place}, a {type(layer.base_layer).__name__}. Together only "
                "linear layers below the head are trained: change method.targets, or train it "
                "alone."
            )


def _flatten(
    state: Mapping[str, torch.Tensor], device: torch.device
) -> tuple[nn.Parameter, dict[str, nn.Parameter]]:
    """Copy the weights into one piece; autograd writes each view's gradient into the whole's."""
    flat = nn.Parameter(
        torch.cat([w.detach().float().flatten() for w in state.values()]).to(device)
    )
    flat.grad = torch.zeros_like(flat)
    views: dict[str, nn.Parameter] = {}
    start = 0
    for name, weight in state.items():
        stop = start + weight.numel()
        views[name] = nn.Parameter(flat.data[start:stop].view(weight.shape))
        views[name].grad = flat.grad[start:stop].view(weight.shape)
        start = stop
    return flat, views

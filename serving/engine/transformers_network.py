"""A network of transformers, opened at two places: its attention and the linears of its layers.

All rows of a step are one packed sequence, [1, tokens]. Embedding, norms, activations and rotary
positions work row by row in transformers' own modules. Attention does not, so a registered function
hands the heads to whoever runs the step; and each linear of a layer is packed, and lets the step
add what the adapter of each row adds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from serving.engine.boundary import EngineUnavailable
from serving.engine.ops.attention import Window
from serving.engine.spec import LinearGroup

Product = Callable[[torch.Tensor], torch.Tensor]  # rows [tokens, in] to [tokens, out]
MakeProduct = Callable[[torch.Tensor, torch.Tensor | None], Product]  # of a weight and a bias

ATTENTION = "wardrobe"  # what config._attn_implementation says
# Arguments of an attention function that say nothing new about a packed batch.
_SILENT = frozenset(
    ("dropout", "output_attentions", "output_router_logits", "position_ids", "use_cache")
)


class Inside(Protocol):
    """What runs at the two places."""

    def attend(
        self,
        layer: int,
        heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        scale: float,
        window: Window,
        softcap: float | None,
    ) -> torch.Tensor:
        """Return [tokens, heads, dim] for q of that shape, k and v [tokens, kv_heads, dim]."""
        ...

    def adapt(self, group: str, layer: int, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add what adapters add to y = linear(x), in place; x [tokens, in], y [tokens, out]."""
        ...


class Network:
    """The frozen network of one base."""

    def __init__(self, model: PreTrainedModel, make: MakeProduct) -> None:
        self.dtype, self.device = model.dtype, model.device
        self._model = model
        self._running = _Running()
        self.prefix, layers = _find_layers(model)
        self.linears = _common_linears(layers)
        for index, layer in enumerate(layers):
            for name in (group.name for group in self.linears):
                product = _freeze(layer.get_submodule(name), make)
                layer.set_submodule(name, _Opened(product, self._running, name, index))
        head = cast("nn.Module", model.get_output_embeddings())
        [place] = [name for name, module in model.named_modules() if module is head]
        model.set_submodule(place, _Frozen(_freeze(head, make)))

    @classmethod
    def read(
        cls, folder: Path, dtype: torch.dtype, device: torch.device, make: MakeProduct
    ) -> "Network":
        """Read the weights. Raises EngineUnavailable when they are not those of the network."""
        AttentionInterface.register(ATTENTION, _attention)
        load = cast("Any", AutoModelForCausalLM.from_pretrained)  # the stub has one return type
        model, told = load(
            folder,
            dtype=dtype,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if told[what]:
                raise EngineUnavailable(
                    f"{folder}: {type(model).__name__} has {len(told[what])} {what}, for example "
                    f"{min(map(str, told[what]))!r}; pull the base again."
                )
        return cls(model.eval().requires_grad_(False).to(device), make)

    def logits(
        self, ids: torch.Tensor, positions: torch.Tensor, sampled: torch.Tensor, inside: Inside
    ) -> torch.Tensor:
        """Return the logits [sampled, vocab] of rows [tokens]."""
        self._running.inside = inside  # for the linears; attention gets it as an argument
        out = self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            logits_to_keep=sampled,
            use_cache=False,
            inside=inside,
        )
        return out.logits[0]


class _Running:
    """What runs inside now: transformers hands a linear nothing but its input."""

    inside: Inside


class _Frozen(nn.Module):
    """A linear that no adapter changes."""

    def __init__(self, product: Product) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.rows(x.reshape(-1, x.shape[-1]))
        return y.view(*x.shape[:-1], y.shape[-1])

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        return self.product(x)


class _Opened(_Frozen):
    """A linear of a layer."""

    def __init__(self, product: Product, running: _Running, group: str, layer: int) -> None:
        super().__init__(product)
        self.running, self.group, self.layer = running, group, layer

    def rows(self, x: torch.Tensor) -> torch.Tensor:
        y = self.product(x)
        self.running.inside.adapt(self.group, self.layer, x, y)
        return y


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    inside: Inside,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers asks for it: heads [1, heads, tokens, dim] to [1, tokens, heads, dim].

    Raises EngineUnavailable for an argument that would change the result and is not computed.
    """
    told = sorted(name for name in others.keys() - _SILENT if others[name] is not None)
    if attention_mask is not None:
        told.append("a mask")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        told.append("keys that come later")
    if told:
        raise EngineUnavailable(
            f"{type(module).__name__} gives its attention {', '.join(told)}, "
            "which this engine does not compute."
        )
    q, k, v = (heads[0].transpose(0, 1) for heads in (query, key, value))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    layer = cast("int", module.layer_idx)
    return inside.attend(layer, (q, k, v), scale, sliding_window, softcap)[None], None


def _find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Return the list of the decoder's layers, and what stands before a layer's number."""
    count = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return f"{name}.", module
    raise EngineUnavailable(f"{type(model).__name__} has no list of {count} layers.")


def _common_linears(layers: nn.ModuleList) -> tuple[LinearGroup, ...]:
    """Return the linears that all layers have, in the same shape."""
    each = [
        {name: _shape(module) for name, module in layer.named_modules() if _is_linear(module)}
        for layer in layers
    ]
    return tuple(
        LinearGroup(name, (name,), shape[1], (shape[0],))
        for name, shape in each[0].items()
        if all(found.get(name) == shape for found in each)
    )


def _is_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear or isinstance(module, Conv1D)


def _shape(module: nn.Module) -> tuple[int, int]:
    """Return (out, in)."""
    out, into = cast("torch.Tensor", module.weight).shape
    return (into, out) if isinstance(module, Conv1D) else (out, into)


def _freeze(module: nn.Module, make: MakeProduct) -> Product:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    assert bias is None or isinstance(bias, torch.Tensor)
    # GPT-2 stores its weights the other way round.
    return make(weight.t().contiguous() if isinstance(module, Conv1D) else weight, bias)

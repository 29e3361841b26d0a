"""A network of transformers, opened at its attention and wherever an adapter changes something.

All rows of a step are one packed sequence, [1, tokens]. Embedding, norms, activations and rotary
positions work row by row in transformers' own modules. Attention does not, so a registered function
hands the heads to whoever runs the step. Each linear of a layer is packed; it, the norms, the
embedding and the head let the step change what they give, for the rows whose adapter does.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.func import functional_call
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from serving.engine.boundary import EngineUnavailable
from serving.engine.ops.attention import Window
from serving.engine.spec import LinearGroup
from serving.engine.vector_file import Frozen

ATTENTION = "wardrobe"  # what config._attn_implementation says
# Arguments of an attention function that say nothing new about a packed batch.
_SILENT = frozenset(
    ("dropout", "output_attentions", "output_router_logits", "position_ids", "use_cache")
)


MakeProduct = Callable[[torch.Tensor, torch.Tensor | None], Frozen]  # of a weight and a bias
Norm = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of rows, with other parameters


class Inside(Protocol):
    """What runs at these places. But for attention, it changes what a module gave, in place."""

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
        """Change y = linear(x); x [tokens, in], y [tokens, out]."""
        ...

    def embed(self, x: torch.Tensor, scale: torch.Tensor | None) -> None:
        """Change x [tokens, hidden], rows of the embedding times `scale`."""
        ...

    def normalise(self, norm: Norm, x: torch.Tensor, h: torch.Tensor) -> None:
        """Change h = norm(x), both [tokens, hidden]; `norm` takes rows and all norms in order."""
        ...

    def predict(self, h: torch.Tensor, logits: torch.Tensor) -> None:
        """Change logits [sampled, vocab] = head(h)."""
        ...


class Network:
    """The frozen network of one base."""

    def __init__(self, model: PreTrainedModel, make: MakeProduct) -> None:
        self.dtype, self.device = model.dtype, model.device
        self._model = model
        self._running = running = _Running()
        self.prefix, layers = _find_layers(model)
        self.linears = _common_linears(layers)
        self.norms: dict[tuple[str, str], torch.Tensor] = {}  # see `BaseLayers.norms`
        for name, norm in [*_find_norms(model)]:
            model.set_submodule(name, _Norm(norm, running, len(self.norms)))
            self.norms |= {(name, part): own.data for part, own in norm.named_parameters()}
        self.products: list[dict[str, Frozen]] = [{} for _ in layers]
        for index, layer in enumerate(layers):
            for name in (group.name for group in self.linears):
                product = _freeze(layer.get_submodule(name), make)
                layer.set_submodule(name, _Linear(product, running, name, index))
                self.products[index][name] = product
        embedding = cast("nn.Embedding", model.get_input_embeddings())
        head = cast("nn.Module", model.get_output_embeddings())
        self.embedding = embedding.weight.data
        self.tied = cast("torch.Tensor", head.weight).data_ptr() == self.embedding.data_ptr()
        self.head = _freeze(head, make)
        _replace(model, embedding, _Embedding(embedding, running))
        _replace(model, head, _Head(self.head, running))

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
        self._running.inside = inside  # for the modules; attention gets it as an argument
        out = self._model(
            input_ids=ids[None],
            position_ids=positions[None],
            logits_to_keep=sampled,
            use_cache=False,
            inside=inside,
        )
        return out.logits[0]


class _Running:
    """What runs inside now: transformers hands a module nothing but its input."""

    inside: Inside


class _Linear(nn.Module):
    """A linear of a layer."""

    def __init__(self, product: Frozen, running: _Running, group: str, layer: int) -> None:
        super().__init__()
        self.product, self.running, self.group, self.layer = product, running, group, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = _rows(x)
        y = self.product(rows)
        self.running.inside.adapt(self.group, self.layer, rows, y)
        return y.view(*x.shape[:-1], y.shape[-1])


class _Head(nn.Module):
    """The linear behind the last layer."""

    def __init__(self, product: Frozen, running: _Running) -> None:
        super().__init__()
        self.product, self.running = product, running

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        rows = _rows(h)
        logits = self.product(rows)
        self.running.inside.predict(rows, logits)
        return logits.view(*h.shape[:-1], logits.shape[-1])


class _Embedding(nn.Module):
    """The embedding; virtual tokens have ids below 0, and the step writes their rows."""

    def __init__(self, embedding: nn.Embedding, running: _Running) -> None:
        super().__init__()
        self.embedding, self.running = embedding, running
        scale: torch.Tensor | None = getattr(embedding, "embed_scale", None)
        self.scale = None if scale is None else scale.to(embedding.weight)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids.clamp(min=0))
        self.running.inside.embed(x.view(-1, x.shape[-1]), self.scale)
        return x


class _Norm(nn.Module):
    """A norm, whose parameters are those from number `first` on of all norms."""

    def __init__(self, norm: nn.Module, running: _Running, first: int) -> None:
        super().__init__()
        self.norm, self.running = norm, running
        self.places = {name: first + i for i, (name, _) in enumerate(norm.named_parameters())}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        self.running.inside.normalise(self.with_others, _rows(x), h.view(-1, h.shape[-1]))
        return h

    def with_others(self, x: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        own = {name: norms[place] for name, place in self.places.items()}
        return functional_call(self.norm, own, (x,))


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


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


def _find_norms(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yield what has a weight, and perhaps a bias, of the size that a row has between layers."""
    hidden = (cast("int", model.config.hidden_size),)
    for name, module in model.named_modules():
        own: Mapping[str, nn.Parameter] = dict(module.named_parameters())
        whole = all(parameter.shape == hidden for parameter in own.values())
        if whole and {"weight"} <= own.keys() <= {"weight", "bias"}:
            yield name, module


def _replace(model: PreTrainedModel, module: nn.Module, by: nn.Module) -> None:
    [place] = [name for name, found in model.named_modules() if found is module]
    model.set_submodule(place, by)


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


def _freeze(module: nn.Module, make: MakeProduct) -> Frozen:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, torch.Tensor)
    assert bias is None or isinstance(bias, torch.Tensor)
    # GPT-2 stores its weights the other way round.
    return make(weight.t().contiguous() if isinstance(module, Conv1D) else weight, bias)

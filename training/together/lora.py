"""y = W·x + scale·B(A(x)) with another adapter for each span of rows, and the gradients of it.

The rows of one adapter are neighbours, so its part is plain products over its own span. They need
neither equal ranks nor equal targets nor equal lengths. Against padded batched products they were
as fast in fp32, and up to 1.7 times slower in bf16 with many adapters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  # the name torch's own documentation uses


@dataclass(frozen=True, slots=True)
class Span:
    """The rows start..stop of a batch, and the number of the adapter that they wear."""

    adapter: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Pair:
    """One adapter's update of one linear: scale · b(a(x))."""

    a: nn.Parameter  # [rank, in]
    b: nn.Parameter  # [out, rank]
    scale: float


class Batch:
    """Who wears which rows at present; one for all layers of a model."""

    spans: Sequence[Span] = ()


class SharedLinear(nn.Module):
    """A frozen linear that many adapters share. An adapter without a pair here sees W alone."""

    def __init__(self, linear: nn.Linear, pairs: Mapping[int, Pair], batch: Batch) -> None:
        super().__init__()
        self._linear = linear
        self._pairs = dict(pairs)  # no parameters of this module: each adapter keeps its own
        self._batch = batch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [1, rows, out] for x [1, rows, in]."""
        worn = [(span, self._pairs[span.adapter]) for span in self._spans()]
        places = [(span.start, span.stop, pair.scale) for span, pair in worn]
        halves = [half for _, pair in worn for half in (pair.a, pair.b)]
        linear = self._linear
        y = _GroupedLora.apply(x.squeeze(0), linear.weight, linear.bias, places, *halves)
        return y.unsqueeze(0)

    def _spans(self) -> list[Span]:
        return [span for span in self._batch.spans if span.adapter in self._pairs]


class _GroupedLora(torch.autograd.Function):
    """Gradients reach x, the a's and the b's. The products run in the number format of x."""

    @staticmethod
    def forward(  # type: ignore[override]  # torch declares *args
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        places: Sequence[tuple[int, int, float]],
        *halves: torch.Tensor,
    ) -> torch.Tensor:
        y = F.linear(x, weight, bias)
        cast = [half.to(x.dtype) for half in halves]
        narrow = []
        for (start, stop, scale), a, b in zip(places, cast[::2], cast[1::2], strict=True):
            shrunk = torch.mm(x[start:stop], a.t())
            y[start:stop].addmm_(shrunk, b.t(), alpha=scale)
            narrow.append(shrunk)
        ctx.places = places
        ctx.save_for_backward(x, weight, *narrow, *cast)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (grad,) = grads
        x, weight, *saved = ctx.saved_tensors
        count = len(ctx.places)
        narrow, cast = saved[:count], saved[count:]
        of_x = torch.mm(grad, weight) if ctx.needs_input_grad[0] else None
        of_halves: list[torch.Tensor] = []
        for (start, stop, scale), shrunk, a, b in zip(
            ctx.places, narrow, cast[::2], cast[1::2], strict=True
        ):
            of_y = grad[start:stop]
            of_shrunk = torch.mm(of_y, b).mul_(scale)
            of_halves.append(torch.mm(of_shrunk.t(), x[start:stop]))
            of_halves.append(torch.mm(of_y.t(), shrunk).mul_(scale))
            if of_x is not None:
                of_x[start:stop].addmm_(of_shrunk, a)
        return of_x, None, None, None, *of_halves

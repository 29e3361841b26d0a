"""One frozen linear layer, its weight kept once in the layout that multiplies fastest."""

from collections.abc import Iterator
from functools import cached_property

import torch
import torch.nn.functional as F  # noqa: N812  # torch's own convention

from serving.engine.boundary import EngineUnavailable
from serving.engine.ops.native.library import Library
from serving.engine.pages import LargePages

PANEL = 32  # outputs that the compiled operators multiply side by side
SQUARED = 1 << 22  # numbers of a weight that are squared at a time


class Linear:
    """y = x Wᵀ + b for x of shape [tokens, in].

    On the CPU the weight is packed for oneDNN: at 8 to 32 tokens it is about twice as fast as
    F.linear in both float32 and bfloat16, because F.linear packs again at every call.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.packed = _can_pack(weight)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 32) if self.packed else weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return F.linear(x, self.weight, self.bias)

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        outputs, inputs = self.weight.shape
        return outputs, inputs

    def dense(self) -> torch.Tensor:
        """Return the weight in the usual layout, [out, in]."""
        return self.weight.to_dense() if self.packed else self.weight

    def pieces(self, count: int) -> Iterator[torch.Tensor]:
        """Yield `dense` by `count` outputs. oneDNN unpacks only the whole, which is there then."""
        yield from self.dense().split(count)

    def product(self, x: torch.Tensor, columns: slice) -> torch.Tensor:
        """Return x Wᵀ of some outputs, without the bias."""
        if self.packed:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
            return y[:, columns]
        return F.linear(x, self.weight[columns])

    @cached_property
    def squares(self) -> torch.Tensor:
        """‖Wᵢ‖² for each output, [out] in float32."""
        return _square_sums(self.dense())


class PackedLinear:
    """A linear of the compiled forward pass, which reads panels of 32 outputs in order."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, pages: LargePages | None = None
    ) -> None:
        self.outputs, self.inputs = weight.shape
        packed = pack(weight).flatten()
        self.weight, self.bias = packed if pages is None else pages.copy(packed), bias

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs and inputs."""
        return self.outputs, self.inputs

    def dense(self) -> torch.Tensor:
        """Return the weight in the usual layout, [out, in]."""
        return next(self.pieces(-(-self.outputs // PANEL) * PANEL))

    def pieces(self, count: int) -> Iterator[torch.Tensor]:
        """Yield `dense` by `count` outputs, a multiple of PANEL, which alone are unpacked."""
        step = _step(self.weight)
        packed = self.weight.view(-1, self.inputs // step, PANEL, step)
        for number, panels in enumerate(packed.split(count // PANEL)):
            rows = panels.transpose(1, 2).reshape(-1, self.inputs)
            yield rows[: self.outputs - number * count]

    @cached_property
    def squares(self) -> torch.Tensor:
        """‖Wᵢ‖² for each output, [out] in float32; read as it lies, which is five times as fast."""
        step = _step(self.weight)
        sums = _square_sums(self.weight.view(-1, self.inputs // step, PANEL * step))
        return sums.view(-1, step).sum(1)[: self.outputs]


class CompiledLinear(PackedLinear):
    """A packed linear that is called by itself."""

    def __init__(
        self,
        library: Library,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        pages: LargePages | None = None,
    ) -> None:
        if weight.shape[1] % _step(weight):
            raise EngineUnavailable(
                f"A linear of the base has {weight.shape[1]} inputs, an odd number, which the C++ "
                "operators do not read in bfloat16. Serve it with operators='torch'."
            )
        super().__init__(weight, bias, pages)
        self.library = library

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.library.linear(x, self.weight, self.bias, self.outputs)

    def product(self, x: torch.Tensor, columns: slice) -> torch.Tensor:
        """Return x Wᵀ of some outputs, without the bias."""
        first = columns.start // PANEL * PANEL
        panels = self.weight[first * self.inputs :]
        y = self.library.linear(x, panels, None, columns.stop - first)
        return y[:, columns.start - first :]


def _square_sums(numbers: torch.Tensor) -> torch.Tensor:
    """Return the sums of squares over the second dimension, in float32, of a piece at a time.

    All at once would take four times the weight's memory, which nobody has counted.
    """
    pieces = numbers.split(max(1, SQUARED * len(numbers) // numbers.numel()))
    return torch.cat([piece.float().square().sum(1) for piece in pieces])


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Lay weights [..., out, in] out as [..., panels, in · 32], as ops/native/panel.h reads them.

    A panel is [in / step, 32, step]; a step is one float32 or two bfloat16, and outputs beyond the
    last are zero.
    """
    *many, outputs, inputs = weight.shape
    if outputs % PANEL:
        weight = F.pad(weight, (0, 0, 0, -outputs % PANEL))
    steps = weight.contiguous().view(torch.int32)  # one number each, which is moved in one go
    panels = steps.view(*many, -1, PANEL, steps.shape[-1]).mT.contiguous()
    return panels.view(weight.dtype).view(*many, -1, inputs * PANEL)


def _step(weight: torch.Tensor) -> int:
    return 4 // weight.element_size()


def _can_pack(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32

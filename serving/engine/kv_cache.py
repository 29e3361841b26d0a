"""Keys and values of running sequences: one slot for each, of `max_model_len` tokens."""

import heapq

import torch

from serving.engine.hardware import lazy_zeros
from serving.engine.spec import DecoderSpec


class KVCache:
    """[layers] tensors of shape [slots, kv_heads, length, head_dim], one behind the other.

    A slot that nobody holds is zero throughout. Attention multiplies masked positions by exactly
    0, and 0 · NaN is NaN: what a poisoned sequence left behind would reach the next one.
    """

    def __init__(
        self, spec: DecoderSpec, slots: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (spec.layers, slots, spec.kv_heads, length, spec.head_dim)
        self.slots = slots
        self.length = length
        self._all = lazy_zeros(shape, dtype, device), lazy_zeros(shape, dtype, device)
        self.keys, self.values = (whole.unbind() for whole in self._all)
        self._free = list(range(slots))

    def take(self) -> int:
        """Return the lowest free slot: neighbouring slots make attention a view."""
        return heapq.heappop(self._free)

    def release(self, slot: int, used: int) -> None:
        """Give a slot back; its first `used` positions were written."""
        for whole in self._all:
            whole[:, slot, :, :used].zero_()
        heapq.heappush(self._free, slot)

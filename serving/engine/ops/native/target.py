"""Which instructions the compiled operators may use on this processor."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Target:
    """A set of instructions: what g++ is told, and what the processor must have."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()  # names of torch.cpu.get_capabilities()

    def runs_on(self, capabilities: Mapping[str, object]) -> bool:
        return all(capabilities.get(feature) for feature in self.needs)


AVX512_BF16 = Target(
    "AVX-512 BF16",
    ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
    frozenset({"avx2", "fma3", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16"}),
)
AVX2 = Target("AVX2", ("-mavx2", "-mfma"), frozenset({"avx2", "fma3"}))
GENERIC = Target("generic", ())
TARGETS = (AVX512_BF16, AVX2, GENERIC)  # the best first


def choose_target(capabilities: Mapping[str, object] | None = None) -> Target:
    """Return the best target for a processor; None: this one.

    Never `-march=native`: the flags are part of the cache's key, so a cache that machines share
    never hands one of them the instructions of another.
    """
    known = torch.cpu.get_capabilities() if capabilities is None else capabilities
    return next(target for target in TARGETS if target.runs_on(known))

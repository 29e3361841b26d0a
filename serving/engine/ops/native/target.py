"""Which instructions the compiled operators may use on this processor."""

import ctypes
import platform
from collections.abc import Mapping
from dataclasses import dataclass

import torch

# Linux gives a process the registers of AMX when it asks for them, with arch_prctl(2) by number.
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18


@dataclass(frozen=True, slots=True)
class Target:
    """A set of instructions: what g++ is told, and what the processor must have."""

    name: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()  # names of torch.cpu.get_capabilities()
    dtype: torch.dtype | None = None  # the only one for which it is another body

    def runs_on(self, capabilities: Mapping[str, object]) -> bool:
        return all(capabilities.get(feature) for feature in self.needs)

    def allowed(self) -> bool:
        """Ask for what a process may only use when it has asked. Tell whether it may."""
        if "amx_tile" not in self.needs:
            return True
        if platform.machine() != "x86_64":  # the number means another call elsewhere
            return False
        call = ctypes.CDLL(None).syscall
        return call(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0


AVX512_BF16 = Target(
    "AVX-512 BF16",
    ("-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
    frozenset({"avx2", "fma3", "avx512_f", "avx512_bw", "avx512_vl", "avx512_dq", "avx512_bf16"}),
)
AMX_BF16 = Target(
    "AMX BF16",
    (*AVX512_BF16.flags, "-mamx-tile", "-mamx-bf16"),
    AVX512_BF16.needs | {"amx_tile", "amx_bf16"},
    torch.bfloat16,
)
AVX2 = Target("AVX2", ("-mavx2", "-mfma"), frozenset({"avx2", "fma3"}))
GENERIC = Target("generic", ())
TARGETS = (AMX_BF16, AVX512_BF16, AVX2, GENERIC)  # the best first


def runnable_targets(dtype: torch.dtype, known: Mapping[str, object] | None = None) -> list[Target]:
    """Return the targets for a number format and a processor, the best one first; None: this one.

    Never `-march=native`: the flags are part of the cache's key, so a cache that machines share
    never hands one of them the instructions of another.
    """
    has = torch.cpu.get_capabilities() if known is None else known
    found = [t for t in TARGETS if t.dtype in (None, dtype) and t.runs_on(has)]
    return [target for target in found if known is not None or target.allowed()]

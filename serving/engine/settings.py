"""How the torch engine runs: its device, its limits, its tiers of adapters."""

from dataclasses import dataclass
from typing import Literal

DeviceName = Literal["auto", "cpu", "cuda"]
DtypeName = Literal["auto", "float32", "bfloat16", "float16"]
OperatorsName = Literal["auto", "torch"]


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Every bound of the engine; checked when it is made."""

    device: DeviceName = "auto"
    """Where the model runs; `auto` takes a GPU where there is one."""
    dtype: DtypeName = "auto"
    """Numbers of the weights; `auto` is bfloat16 where the hardware multiplies it, else float32."""
    operators: OperatorsName = "auto"
    """`auto` compiles the forward pass on first use, in C++ or Triton; `torch` never does."""
    max_running: int = 32
    """Sequences that share one step."""
    max_waiting: int = 128
    """Requests of one tenant and class that may wait beyond `max_running`; then EngineBusy."""
    max_model_len: int | None = None
    """Prompt and output tokens of one sequence; None: what the base and the KV budget allow."""
    max_batched_tokens: int = 512
    """Tokens of one step at most. Beside running sequences prompts are read in smaller chunks."""
    adapter_memory: int | None = None
    """Bytes of the slots, in which adapters are worn; None: an eighth of what the weights leave."""
    adapter_slots: int | None = None
    """Adapters in slots at most; None: as many as the memory holds."""
    max_lora_rank: int = 256
    """Highest rank of any module of an adapter."""
    adapter_host_memory: int | None = None
    """Bytes of converted adapters kept ready for slots; None: an eighth of the host's memory, but
    none on the CPU, where slots are in the same memory and hold all that is kept."""
    loading_memory: int | None = None
    """Bytes of adapters on their way to slots, with their files; one alone may take more. No option
    sets it. None: a quarter of what the weights leave, beside a GPU of the host's memory."""
    kv_cache_bytes: int | None = None
    """Bytes for keys and values of all sequences; None: half of what the weights leave."""
    prefix_cache_bytes: int | None = None
    """Bytes for what prompts begin with, beside `kv_cache_bytes`; 0: no prefix cache; None: an
    eighth of what the weights leave."""
    threads: int | None = None
    """CPU threads of one operator; None: torch decides."""
    shares: frozenset[str] = frozenset()
    """Fields that hold a share of the machine's memory, because nobody gave them; see `budgets`."""

    @property
    def kv_slots(self) -> int:
        """Sequences that can have keys and values at once: those that run, and some paused ones."""
        return self.max_running + self.max_running // 8

    def is_given(self, field: str) -> bool:
        """Tell whether somebody asked for the value of an optional field."""
        return getattr(self, field) is not None and field not in self.shares

    def __post_init__(self) -> None:
        for name in ("max_running", "max_lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{option(name)}={getattr(self, name)}: must be 1 or more.")
        for name in ("max_waiting", "adapter_host_memory", "prefix_cache_bytes"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"{option(name)}={getattr(self, name)}: must be 0 or more.")
        optional = (
            *("max_model_len", "adapter_memory", "adapter_slots", "loading_memory"),
            *("kv_cache_bytes", "threads"),
        )
        for name in optional:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{option(name)}={value}: must be 1 or more, or not given.")
        if self.max_batched_tokens <= self.max_running:
            # Otherwise a full batch of running sequences would leave prompts no room, for ever.
            raise ValueError(
                f"{option('max_batched_tokens')}={self.max_batched_tokens} must be above "
                f"{option('max_running')}={self.max_running}."
            )


def option(field: str) -> str:
    """Return the option of `wardrobe serve` that sets a field: what to say to people.

    A field that none sets has only its own name: who gave it wrote that.
    """
    if field == "loading_memory":
        return field
    return f"--{field.replace('_bytes', '_memory').replace('_', '-')}"

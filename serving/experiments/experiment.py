"""Words of an experiment: arms, metrics, exposure, and who gets which arm.

An experiment splits the traffic of one adapter's `production` alias. The first arm is the control.
Units outside the exposure get what production is and are not counted; inside it, the split is
fixed, so a ramp never mixes days of different rates (see `sequential`). An arm never changes while
the experiment runs: another split or another version is another experiment. Experiments in one
layer share no unit: each has a slice of the layer.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

from registry.adapter import AdapterName

State = Literal["draft", "running", "paused", "stopped"]
Role = Literal["primary", "guardrail", "signal"]
Better = Literal["higher", "lower"]
Kind = Literal["binary", "total", "average", "errors", "latency", "tokens", "cost", "malformed"]

FEEDBACK_KINDS = ("binary", "total", "average")
REMARKS = ("comment", "demonstration")  # feedback in words
# Measured by the server; named as they are.
BUILT_IN = ("errors", "latency", "tokens", "cost", "malformed")


@dataclass(frozen=True, slots=True)
class Metric:
    """What is compared, for each unit.

    binary   whether any answer of the unit got a feedback value other than 0
    total    the sum of a unit's feedback values; both count units without feedback as 0
    average  the mean of feedback values, over answers that have one
    errors   the share of answers that failed
    latency  the mean of ln(seconds) of an answer: skewed times are compared by their logarithm
    tokens   the mean number of generated tokens of an answer
    cost     the mean price of an answer: its prompt and generated tokens at the policy's prices
    malformed  the share of answers that came to their end and are not JSON
    """

    name: str
    kind: Kind
    role: Role
    better: Better


@dataclass(frozen=True, slots=True)
class Arm:
    """One version that units are sent to. `number` is None for the base model itself."""

    label: str  # control, or what the maker calls it
    share: float  # of the exposed units
    name: AdapterName | None
    number: int | None
    digest: str  # pinned when the experiment is made

    @property
    def version(self) -> str:
        return f"{self.name}@v{self.number}" if self.name else "base"


@dataclass(frozen=True, slots=True)
class Step:
    """One stage of a ramp: this exposure, held so long and until so many units took part in all."""

    exposure: float
    seconds: float = 0.0
    units: int = 0


@dataclass(frozen=True, slots=True)
class Slice:
    """The units of a layer that one experiment may have: those placed from `low` up to `high`."""

    layer: str
    salt: str  # the layer's: all its experiments place units alike
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Policy:
    """How an experiment is run and judged; fixed when it is made."""

    alpha: float = 0.05  # over all looks, arms and the primary metric; as much for the guardrails
    on_win: Literal["tell", "promote"] = "tell"
    blind: bool = False  # the answer's headers do not say which arm it was
    ramp: tuple[Step, ...] = ()  # moved by the server; empty for exposures that people move
    least_effect: float | None = None  # of the primary metric: no less is worth having
    max_units: int | None = None  # of all arms together
    prices: tuple[float, float] | None = None  # of a million prompt and of generated tokens


@dataclass(frozen=True, slots=True)
class Experiment:
    """One comparison of versions on live traffic."""

    id: str
    name: AdapterName  # whose production traffic is split
    arms: tuple[Arm, ...]
    metrics: tuple[Metric, ...]  # the first is the primary one
    policy: Policy
    slice: Slice | None  # None: all units
    salt: str
    state: State
    exposure: float  # share of units that take part, 0 to 1
    generation: int  # grows with every change; compare-and-set works on it
    created_at: str
    started_at: str | None
    held_since: str | None  # when it was last started or ramped
    ended_at: str | None

    @property
    def primary(self) -> Metric:
        return self.metrics[0]

    @property
    def guardrails(self) -> tuple[Metric, ...]:
        return tuple(metric for metric in self.metrics if metric.role == "guardrail")

    @property
    def judges_format(self) -> bool:
        return any(metric.kind == "malformed" for metric in self.metrics)

    def may_have(self, key: str) -> bool:
        """Tell whether a unit's key is in this experiment's slice of its layer."""
        if self.slice is None:
            return True
        return self.slice.low <= _place(self.slice.salt, "layer", key) < self.slice.high

    def assign(self, unit: str) -> int | None:
        """Return the arm of a unit, or None outside the exposure. Depends on nothing else."""
        if _place(self.salt, "exposure", unit) >= self.exposure:
            return None
        point, reached = _place(self.salt, "arm", unit), 0.0
        for number, arm in enumerate(self.arms):
            reached += arm.share
            if point < reached:
                return number
        return len(self.arms) - 1  # shares that add up to a hair below one


def _place(salt: str, purpose: str, unit: str) -> float:
    """Return a point in [0, 1) that looks uniform: 64 bits of SHA-256.

    Each purpose has a hash of its own: with one for both, a ramp would fill arm after arm.
    """
    digest = hashlib.sha256(f"{salt}\x1f{purpose}\x1f{unit}".encode()).digest()
    return (int.from_bytes(digest[:8]) >> 11) / 2**53


def unit_of(salt: str, key: str) -> str:
    """Return what is stored of a unit's key: a hash, so that no user's name is kept."""
    return hashlib.sha256(f"{salt}\x1funit\x1f{key}".encode()).hexdigest()[:32]

"""Words: a comparison is a candidate beside production; a shadow and a replay are its two kinds.

A shadow mirrors a share of an adapter's production traffic to the candidate, which answers nobody.
A replay runs prompts of old through both. Either leaves pairs: see `pair`.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal

from registry.adapter import AdapterName
from registry.errors import WardrobeError
from serving.experiments.experiment import Arm

Kind = Literal["shadow", "replay"]
State = Literal["running", "stopped"]


class ComparisonInvalid(WardrobeError):
    """A comparison that could not be made."""

    code = "comparison_invalid"


class CandidateIsProduction(ComparisonInvalid):
    """What would be compared with itself."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One candidate beside what production is; both pinned by digest when it begins."""

    id: str
    kind: Kind
    name: AdapterName  # whose production
    production: Arm
    candidate: Arm
    share: float  # of the units that are mirrored; 1 for a replay
    salt: str
    state: State
    reason: str  # why it was stopped
    actor: str
    created_at: str
    ended_at: str | None

    def chooses(self, unit: str) -> bool:
        """Whether a unit is mirrored. `unit` is its hash with this comparison's own salt."""
        return int(unit[:13], 16) / 2**52 < self.share


def check_share(share: float) -> float:
    """Raises ComparisonInvalid."""
    if not 0 < share <= 1:
        raise ComparisonInvalid(f"The share is {share}; it must be above 0 and up to 1.")
    return share


def replay_id(production: Arm, candidate: Arm, source: str, max_tokens: int) -> str:
    """Return the id of a replay: the same versions asked the same go on where they were."""
    asked = f"{production.digest}\x1f{candidate.digest}\x1f{source}\x1f{max_tokens}"
    return f"rep_{hashlib.sha256(asked.encode()).hexdigest()[:12]}"

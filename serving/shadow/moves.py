"""Beginning a shadow: what a person writes, pinned by digest."""

from registry.adapter import AdapterName
from registry.store import Registry
from serving.experiments.design import pin_arms
from serving.experiments.experiment import Arm
from serving.shadow.comparison import CandidateIsProduction, Comparison, check_share
from serving.shadow.store import Comparisons


def pin(registry: Registry, name: AdapterName, candidate: str) -> tuple[Arm, Arm]:
    """Return what production is now, and the candidate: @vN, a selector of the tenant, or base.

    Raises CandidateIsProduction, DesignInvalid and NotFound.
    """
    production, compared = pin_arms(registry, name, [candidate], 0.5)
    if compared.digest == production.digest:
        raise CandidateIsProduction(
            f"The candidate {candidate[:100]!r} is {production.version}, what production of {name} "
            "is now: there is nothing to compare. Name another version."
        )
    return production, compared


def start(
    registry: Registry,
    store: Comparisons,
    name: AdapterName,
    candidate: str,
    share: float,
    actor: str,
) -> Comparison:
    """Begin a shadow on an adapter. Raises Conflict when it has one, and what `pin` raises."""
    check_share(share)
    return store.start(name, *pin(registry, name, candidate), share, actor)

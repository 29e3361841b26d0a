"""From what a person writes to the design of an experiment: arms pinned by digest, metrics."""

import math
from collections.abc import Sequence

from registry.adapter import PRODUCTION, AdapterName, Selector
from registry.base import BaseModel
from registry.errors import WardrobeError
from registry.store import Registry
from serving.experiments.experiment import (
    BUILT_IN,
    FEEDBACK_KINDS,
    REMARKS,
    Arm,
    Kind,
    Metric,
    Policy,
    Role,
)
from serving.experiments.sequential import MIN_UNITS

BASE = "base"
MAX_ARMS = 8
MAX_METRICS = 16
CONTROL = "control"
MIN_SHARE = 0.001  # of an arm: below it no unit would come in a lifetime


class DesignInvalid(WardrobeError):
    """An experiment that could not be run or judged."""

    code = "experiment_invalid"


def make_arms(
    registry: Registry, name: AdapterName, treatments: Sequence[str], share: float
) -> tuple[Arm, ...]:
    """Return what `pin_arms` does, all different. Raises DesignInvalid and NotFound."""
    arms = pin_arms(registry, name, treatments, share)
    digests = [arm.digest for arm in arms]
    if len(set(digests)) < len(digests):
        raise DesignInvalid("Two arms are the same version: they could only differ by chance.")
    return arms


def pin_arms(
    registry: Registry, name: AdapterName, treatments: Sequence[str], share: float
) -> tuple[Arm, ...]:
    """Return control and treatments. `share` is the part of all treatments together.

    The control is what production points to now. A treatment is a selector, `@v2` for a version of
    this adapter, or `base`. Raises DesignInvalid and NotFound.
    """
    if not 1 <= len(treatments) < MAX_ARMS:
        raise DesignInvalid(f"An experiment has 1 to {MAX_ARMS - 1} treatments beside the control.")
    if not min(share / len(treatments), 1 - share) >= MIN_SHARE:  # so that NaN is refused, too
        raise DesignInvalid(
            f"The share of the treatments is {share}; each arm needs {MIN_SHARE} or more."
        )
    production = registry.resolve(Selector(name, alias=PRODUCTION))
    base = registry.bases.get(production.base_id)
    control = Arm(CONTROL, 1 - share, name, production.number, production.digest)
    arms = [control]
    for number, text in enumerate(treatments, start=1):
        label = "treatment" if len(treatments) == 1 else f"treatment-{number}"
        arms.append(_treatment(registry, name, text, label, share / len(treatments), base))
    return tuple(arms)


def _treatment(
    registry: Registry, name: AdapterName, text: str, label: str, share: float, base: BaseModel
) -> Arm:
    if text == BASE:
        return Arm(label, share, None, None, base.fingerprint)
    selector = Selector.parse(f"{name}{text}" if text.startswith("@") else text, name.namespace)
    if selector.name.namespace != name.namespace:  # before a look: a guess must learn nothing
        raise DesignInvalid(f"{selector.name} belongs to another tenant than {name}.")
    version = registry.resolve(selector)
    if version.base_id != base.id:
        raise DesignInvalid(
            f"{version.ref.label} is for {version.base_id}, and {name} runs on {base.id}."
        )
    return Arm(label, share, version.name, version.number, version.digest)


def make_metrics(
    primary: str, guardrails: Sequence[str], signals: Sequence[str]
) -> tuple[Metric, ...]:
    """Read metrics written as NAME:KIND or NAME:KIND:lower; a built-in one needs its name only."""
    metrics = [
        _metric(primary, "primary"),
        *(_metric(text, "guardrail") for text in guardrails),
        *(_metric(text, "signal") for text in signals),
    ]
    names = [metric.name for metric in metrics]
    if len(set(names)) < len(names):
        raise DesignInvalid(f"Two metrics have one name: {', '.join(names)}.")
    if len(metrics) > MAX_METRICS:
        raise DesignInvalid(f"{len(metrics)} metrics; an experiment has {MAX_METRICS} at most.")
    return tuple(metrics)


def _metric(text: str, role: Role) -> Metric:
    name, _, rest = text.partition(":")
    kind, _, better = rest.partition(":")
    if name in BUILT_IN and not rest:
        return Metric(name, _kind(name), role, "lower")
    if name in BUILT_IN or kind not in FEEDBACK_KINDS or better not in ("", "higher", "lower"):
        raise DesignInvalid(
            f"{text!r} is no metric. Write one of {', '.join(BUILT_IN)}, or NAME:KIND for feedback "
            f"with a kind of {', '.join(FEEDBACK_KINDS)}, and :lower where less is better."
        )
    if not name.replace("_", "").replace("-", "").isalnum() or len(name) > 63:
        raise DesignInvalid(f"{name!r} is no name of a metric: letters, digits, - and _, up to 63.")
    if name in REMARKS:
        raise DesignInvalid(f"{name!r} is feedback in words. Call the metric something else.")
    return Metric(name, _kind(kind), role, "lower" if better == "lower" else "higher")


def _kind(text: str) -> Kind:
    kinds: dict[str, Kind] = {
        "binary": "binary",
        "total": "total",
        "average": "average",
        "errors": "errors",
        "latency": "latency",
        "tokens": "tokens",
        "cost": "cost",
        "malformed": "malformed",
    }
    return kinds[text]


def check_policy(
    arms: Sequence[Arm], metrics: Sequence[Metric], name: AdapterName, policy: Policy
) -> None:
    """Raises DesignInvalid for a policy that could not be carried out."""
    if not 0 < policy.alpha < 0.5:
        raise DesignInvalid(
            f"alpha is {policy.alpha}; it must be above 0 and below 0.5, such as 0.05."
        )
    if policy.on_win == "promote" and any(arm.name != name for arm in arms):
        raise DesignInvalid(
            f"Only a version of {name} can be promoted; an arm is something else. Let it tell."
        )
    costs = any(metric.kind == "cost" for metric in metrics)
    if costs != (policy.prices is not None):
        raise DesignInvalid("The metric `cost` and the prices of tokens go together.")
    _check_numbers(policy)
    fewest = min(arm.share for arm in arms)
    if policy.max_units is not None and policy.max_units * fewest < MIN_UNITS:
        raise DesignInvalid(
            f"Of {policy.max_units} units at most, an arm of {100 * fewest:g} % gets fewer than "
            f"{MIN_UNITS}, and below that none is judged. It takes "
            f"{math.ceil(MIN_UNITS / fewest)} units or more."
        )


def _check_numbers(policy: Policy) -> None:
    least, most = policy.least_effect, policy.max_units
    if least is not None and not 0 < least < math.inf:
        raise DesignInvalid(f"The least effect is {least}; it is how much better, above 0.")
    if most is not None and most < 1:
        raise DesignInvalid(f"The most units are {most}; it takes at least one.")
    if not all(0 <= price < math.inf for price in policy.prices or ()):
        raise DesignInvalid(f"The prices are {policy.prices}; they are 0 or more.")


def read_prices(text: str) -> tuple[float, float]:
    """Read PROMPT:GENERATED, the prices of a million tokens. Raises DesignInvalid."""
    prompt, _, generated = text.partition(":")
    try:
        return float(prompt), float(generated)
    except ValueError:
        raise DesignInvalid(
            f"{text!r} are no prices. Write PROMPT:GENERATED, such as 0.15:0.60, for a million "
            "tokens of each."
        ) from None


def check_share(share: float, of_what: str) -> float:
    if not 0 < share <= 1:
        raise DesignInvalid(f"The {of_what} is {share}; it is a share above 0, up to 1.")
    return share


def layer_part(layer: str | None, share: float | None) -> tuple[str, float] | None:
    """Return the layer that was asked for and the share of its units, half where none is said."""
    if layer:
        return layer, check_share(0.5 if share is None else share, "share of the layer")
    if share is not None:
        raise DesignInvalid(f"The share of the layer is {share}, and no layer is named. Name it.")
    return None


def check_holdout(share: float) -> float:
    if not 0 <= share < 1:
        raise DesignInvalid(f"The holdout is {share}; it is a share of 0 or more, below 1.")
    return share

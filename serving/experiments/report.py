"""An experiment as people and scripts read it: its design, its numbers, its log."""

from dataclasses import asdict
from typing import Any

from serving.experiments.decide import decide
from serving.experiments.experiment import Experiment
from serving.experiments.ramps import describe_step
from serving.experiments.store import Experiments


def summarize(experiment: Experiment) -> dict[str, Any]:
    """Return the design and the state."""
    return {
        "id": experiment.id,
        "object": "experiment",
        "name": str(experiment.name),
        "state": experiment.state,
        "exposure": experiment.exposure,
        "arms": [
            {
                "label": arm.label,
                "share": arm.share,
                "version": arm.version,
                "digest": f"sha256:{arm.digest}",
            }
            for arm in experiment.arms
        ],
        "metrics_declared": [asdict(metric) for metric in experiment.metrics],
        "alpha": experiment.policy.alpha,
        "on_win": experiment.policy.on_win,
        "blind": experiment.policy.blind,
        "ramp": [describe_step(step) for step in experiment.policy.ramp],
        "least_effect": experiment.policy.least_effect,
        "max_units": experiment.policy.max_units,
        "prices": experiment.policy.prices,
        "layer": asdict(experiment.slice) if experiment.slice else None,
        "created_at": experiment.created_at,
        "started_at": experiment.started_at,
        "held_since": experiment.held_since,
        "ended_at": experiment.ended_at,
    }


def describe(store: Experiments, experiment: Experiment) -> dict[str, Any]:
    """Return design, numbers, verdict and log, all as of now."""
    counts = store.counts(experiment)
    verdict = decide(experiment, counts)
    coverage = store.coverage(experiment)
    keyed = store.keyed_share(experiment)
    notes: list[str] = []
    if keyed < 1:
        notes.append(
            f"{100 * (1 - keyed):.0f} % of the answers named no unit and count as one unit each: "
            "a person who asks twice may meet both arms. Send x-unit-key, or `user`."
        )
    return {
        **summarize(experiment),
        "answers": [count.answers for count in counts],
        "unended": [arm.unended for arm in coverage],
        "rated": [arm.rated for arm in coverage],
        **verdict.plain(),
        "notes": notes,
        "comments": store.comments(experiment),
        "decisions": [asdict(decision) for decision in store.decisions(experiment.id)],
    }

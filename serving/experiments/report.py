"""An experiment as people and scripts read it: its design, its numbers, its log."""

from dataclasses import asdict
from typing import Any

from serving.experiments.decide import decide
from serving.experiments.experiment import Experiment
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
                "version": f"{arm.name}@v{arm.number}" if arm.name else "base",
                "digest": f"sha256:{arm.digest}",
            }
            for arm in experiment.arms
        ],
        "metrics_declared": [asdict(metric) for metric in experiment.metrics],
        "alpha": experiment.alpha,
        "on_win": experiment.on_win,
        "blind": experiment.blind,
        "created_at": experiment.created_at,
        "started_at": experiment.started_at,
        "ended_at": experiment.ended_at,
    }


def describe(store: Experiments, experiment: Experiment) -> dict[str, Any]:
    """Return design, numbers, verdict and log, all as of now."""
    counts = store.counts(experiment)
    verdict = decide(experiment, counts)
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
        **verdict.plain(),
        "notes": notes,
        "decisions": [asdict(decision) for decision in store.decisions(experiment.id)],
    }

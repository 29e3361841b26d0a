"""How many units and days an experiment takes, said before it starts."""

import numpy as np
import pytest

from serving.experiments.design import DesignInvalid, make_metrics
from serving.experiments.experiment import Policy
from serving.experiments.power import estimate
from serving.experiments.ramps import read_ramp
from serving.experiments.sequential import Sums, compare
from serving.experiments.store import Experiments
from tests.serving.experiments.stored import ARMS, NAME, created


def test_a_test_of_the_estimated_size_finds_the_effect_four_times_of_five(
    store: Experiments,
) -> None:
    experiment = created(store)
    needed = estimate(experiment, units_per_day=100, effect=0.1, baseline=0.3)
    assert needed.days == pytest.approx(needed.units / 100)
    rng = np.random.default_rng(5)
    half, found, runs = needed.units // 2, 0, 2000
    for a, b in zip(rng.binomial(half, 0.3, runs), rng.binomial(half, 0.4, runs), strict=True):
        first, second = Sums.of_means(half, a, a), Sums.of_means(half, b, b)
        found += compare(first, second, experiment.policy.alpha).low > 0
    assert 0.78 <= found / runs <= 0.84, "at this one look; those before it add to it"


@pytest.mark.parametrize(
    "given",
    [
        {"effect": 0.0, "baseline": 0.3},  # is not "not given"
        {"baseline": 0.3, "deviation": 2.0},
        {"deviation": 0.5},
        {"baseline": 0.3, "units_per_day": 0.0},
        {},
    ],
)
def test_numbers_that_would_be_left_out_of_an_estimate_are_refused(
    store: Experiments, given: dict[str, float]
) -> None:
    experiment = created(store, least_effect=0.1)
    assert estimate(experiment, units_per_day=100, baseline=0.3).effect == 0.1
    with pytest.raises(DesignInvalid):
        estimate(experiment, **({"units_per_day": 100.0} | given))


def test_an_experiment_with_a_ramp_and_a_slice_takes_longer(store: Experiments) -> None:
    store.add_layer("acme", "main", 0.0)
    metrics = make_metrics("solved:binary", ["errors"], [])
    policy = Policy(ramp=read_ramp(["0.1:2d", "1"]), least_effect=0.1)
    experiment = store.create(NAME, ARMS, metrics, policy, layer=("main", 0.5), actor="test")
    found = estimate(experiment, units_per_day=200, baseline=0.3)
    assert found.days == pytest.approx(2 + (found.units - 20) / 100)

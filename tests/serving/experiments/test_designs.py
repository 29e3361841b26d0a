"""What may be asked of an experiment, and what is said before it starts."""

import httpx
import pytest

from registry.adapter import AdapterName
from serving.experiments.design import DesignInvalid, make_metrics
from tests.serving.experiments.trial import DESIGN, PATH
from tests.serving.live import Wardrobe


def test_a_design_that_cannot_work_is_refused_with_the_reason(client: httpx.Client) -> None:
    for change, word in (
        ({"treatments": ["@v1"]}, "same version"),
        ({"treatments": ["@v9"]}, "v9"),
        ({"treatments": ["base"], "on_win": "promote"}, "promoted"),
        ({"metric": "solved:perhaps"}, "no metric"),
        ({"share": 1.5}, "share"),
        ({"share": 0.9999999999999999}, "share"),
        ({"alpha": 0.9}, "alpha"),
        ({"ramp": ["0.5", "0.2"]}, "higher exposure"),
        ({"ramp": ["0.02:soon"]}, "0.02:soon"),
        ({"ramp": ["nan"]}, "nan"),
        ({"ramp": ["0"]}, "exposure"),
        ({"signals": ["cost"]}, "prices"),
        ({"prices": [1, 2]}, "prices"),
        ({"least_effect": 0}, "least effect"),
        ({"max_units": 0}, "most units"),
        ({"max_units": 199}, "takes 200 units or more"),
        ({"max_units": 900, "share": 0.1}, "takes 1000 units or more"),
        ({"metric": "comment:binary"}, "words"),
        ({"layer": "nowhere"}, "nowhere"),
        ({"layer": "main", "layer_share": 0}, "share of the layer"),
        ({"layer_share": 0.4}, "no layer is named"),
        ({"tretments": ["@v2"]}, "tretments"),
    ):
        answer = client.post(PATH, json=DESIGN | change)
        assert answer.status_code in (400, 404), change
        assert word in answer.json()["error"]["message"], change
    assert client.get("/v1/experiments").json()["data"] == []


def test_a_treatment_of_another_tenant_tells_nothing_of_it(
    client: httpx.Client, wardrobe: Wardrobe
) -> None:
    wardrobe.push(AdapterName("beta", "legal"))
    for name in ("beta/legal", "beta/nothing"):
        for version in ("", "@v1", "@v9", "@canary"):
            answer = client.post(PATH, json=DESIGN | {"treatments": [name + version]})
            said = answer.json()["error"]["message"]
            assert said == f"{name} belongs to another tenant than acme/support."


def test_a_treatment_may_leave_the_namespace_out(client: httpx.Client) -> None:
    made = client.post(PATH, json=DESIGN | {"treatments": ["support@v2"]})
    assert made.json()["arms"][1]["version"] == "acme/support@v2"


def test_the_power_of_a_design_is_known_before_it_starts(client: httpx.Client) -> None:
    made = client.post(PATH, json=DESIGN | {"least_effect": 0.03, "ramp": ["0.1:1d", "1"]}).json()
    path = f"/v1/experiments/{made['id']}/power"
    found = client.get(path, params={"units_per_day": 1000, "baseline": 0.1}).json()
    assert 4000 < found["units"] < 12000
    assert found["days"] == pytest.approx(1 + (found["units"] - 100) / 1000)
    assert client.get(path, params={"units_per_day": 1000}).status_code == 400
    refused = client.get(path, params={"units_per_day": "many"})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].startswith("`units_per_day`: ")


@pytest.mark.parametrize(
    "text", ["solved", "solved:maybe", "errors:binary", "a b:binary", ":binary", "x:binary:worse"]
)
def test_a_metric_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(DesignInvalid):
        make_metrics(text, [], [])

"""Metrics of each version: bounded, on the busiest ones, and no series ever goes down."""

from collections import Counter

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.api.record import RequestRecord
from serving.api.version_metrics import HALF_LIFE, OTHER, VersionMetrics


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ended(
    label: str, *, tokens: int = 5, first: float | None = 0.2, status: int = 200, outcome: str = ""
) -> RequestRecord:
    record = RequestRecord("req_1", "POST", "/v1/chat/completions", label=label, status=status)
    record.outcome = outcome
    record.started -= 1.0  # the request took one second
    record.prompt_tokens, record.completion_tokens, record.first_token = 3, tokens, first
    record.finish_reasons.append("stop")
    return record


def samples(metrics: VersionMetrics) -> dict[tuple[str, str, str], float]:
    """Return (name, version, le or kind) → value, as a scraper reads the text."""
    registry = CollectorRegistry()
    registry.register(metrics)
    return {
        (s.name, s.labels["version"], s.labels.get("le") or s.labels.get("kind") or ""): s.value
        for family in text_string_to_metric_families(generate_latest(registry).decode())
        for s in family.samples
    }


def versions(metrics: VersionMetrics) -> set[str]:
    return {version for _, version, _ in samples(metrics)} - {OTHER}


def test_a_version_s_requests_tokens_and_times_are_told() -> None:
    metrics = VersionMetrics()
    metrics.finished(ended("acme/a@v1"))
    metrics.finished(ended("acme/a@v1", tokens=1, first=0.02))
    found = samples(metrics)
    name = "wardrobe_version_"
    assert found[name + "requests_total", "acme/a@v1", ""] == 2
    assert found["wardrobe_tokens_total", "acme/a@v1", "completion"] == 6
    assert found["wardrobe_tokens_total", "acme/a@v1", "prompt"] == 6
    ttft = name + "time_to_first_token_seconds"
    assert [found[ttft + "_bucket", "acme/a@v1", le] for le in ("0.01", "0.025", "0.25")] == [
        0.0,
        1.0,
        2.0,
    ]
    assert found[ttft + "_count", "acme/a@v1", ""] == 2
    assert abs(found[ttft + "_sum", "acme/a@v1", ""] - 0.22) < 1e-9
    tpot = name + "time_per_output_token_seconds"
    assert found[tpot + "_count", "acme/a@v1", ""] == 1, "an answer of one token has no later one"
    assert 0.2 <= found[tpot + "_sum", "acme/a@v1", ""] < 0.3, "0.8 seconds over 4 tokens"


def test_a_stream_that_ends_with_an_error_has_failed_as_a_5xx_has() -> None:
    metrics = VersionMetrics()
    for status, outcome in (
        (200, ""),
        (200, "disconnect"),
        (0, "disconnect"),
        (400, "prompt_too_long"),
        (429, "engine_busy"),
        (200, "request_failed"),
        (503, "engine_unavailable"),
    ):
        metrics.finished(ended("acme/a@v1", status=status, outcome=outcome))
    assert samples(metrics)["wardrobe_version_failed_total", "acme/a@v1", ""] == 2


def test_ten_thousand_versions_make_no_ten_thousand_series() -> None:
    metrics = VersionMetrics(named=5)
    for number in range(10_000):
        metrics.finished(ended(f"acme/a@v{number}"))
    found = samples(metrics)
    assert len(versions(metrics)) == 5
    requests = [v for (name, _, _), v in found.items() if name == "wardrobe_version_requests_total"]
    assert sum(requests) == 10_000, "none is lost"


def test_a_version_that_becomes_busy_takes_the_place_of_the_idlest() -> None:
    clock = Clock()
    metrics = VersionMetrics(named=2, clock=clock)
    for label in ["old"] * 100 + ["busy"] * 200:
        metrics.finished(ended(label))
    metrics.finished(ended("new"))
    assert versions(metrics) == {"old", "busy"}, "one request is not yet traffic"
    clock.now += 5 * HALF_LIFE  # 100 of old count as 3 now
    for _ in range(10):
        metrics.finished(ended("busy"))
        metrics.finished(ended("new"))
    assert versions(metrics) == {"new", "busy"}
    found = samples(metrics)
    total = "wardrobe_version_requests_total"
    assert found[total, OTHER, ""] + found[total, "new", ""] == 111
    assert found[total, "busy", ""] == 210


def test_no_series_ever_goes_down_and_every_request_is_in_one() -> None:
    clock = Clock()
    metrics = VersionMetrics(named=3, clock=clock)
    before: dict[tuple[str, str, str], float] = {}
    swaps = 0
    for step in range(400):
        clock.now += HALF_LIFE / 20
        # A release every 40 steps, which takes most of the traffic, beside many rare versions.
        label = f"release@v{step // 40}" if step % 3 else f"rare@v{step % 17}"
        metrics.finished(ended(label))
        now = samples(metrics)
        fallen = {key for key, value in before.items() if key in now and now[key] < value}
        assert fallen == set()
        swaps += bool({key[1] for key in before} - {key[1] for key in now})
        before = now
    totals = Counter[str]()
    for (name, _, _), value in before.items():
        totals[name] += int(value)
    assert totals["wardrobe_version_requests_total"] == 400
    assert totals["wardrobe_version_time_to_first_token_seconds_count"] == 400
    assert swaps > 3, "the releases took each other's place"


def test_versions_that_are_asked_for_alike_do_not_put_each_other_out() -> None:
    metrics = VersionMetrics(named=2, clock=Clock())
    seen: set[frozenset[str]] = set()
    for _ in range(50):
        for label in ("a", "b", "c", "d"):
            metrics.finished(ended(label))
            seen.add(frozenset(versions(metrics)))
    assert seen == {frozenset({"a"}), frozenset({"a", "b"})}

"""Metrics of each version, for the versions that are asked for most; all others are `other`.

The number of series is bounded whatever is pushed. Which versions have their own follows the
traffic: requests count half after ten minutes, and a version that is asked for twice as much as
the least of the named ones takes its place. What that one has counted goes to `other` then, and
what the new one has counted stays there, so that no series ever goes down.
"""

import math
import time
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from serving.api.record import RequestRecord

NAMED = 50  # versions with series of their own
OTHER = "other"
HALF_LIFE = 600.0  # seconds
MARGIN = 2.0  # times the heat of the least: of versions that are asked for alike none is put out

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


@dataclass(slots=True)
class _Histogram:
    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)  # of each bucket alone; the last is beyond all bounds
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def add(self, other: "_Histogram") -> None:
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def buckets(self) -> list[tuple[str, float]]:
        edges = [*(str(float(bound)) for bound in self.bounds), "+Inf"]
        return list(zip(edges, accumulate(self.counts), strict=True))


@dataclass(slots=True)
class _Heat:
    """Requests, of which those of one half-life ago count half."""

    value: float = 0.0
    at: float = 0.0

    def now(self, moment: float) -> float:
        return self.value * math.exp2((self.at - moment) / HALF_LIFE)

    def rise(self, moment: float) -> None:
        self.value, self.at = self.now(moment) + 1, moment


@dataclass(slots=True)
class _Series:
    """What is counted of one version."""

    heat: _Heat = field(default_factory=_Heat)
    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    ttft: _Histogram = field(default_factory=lambda: _Histogram(TTFT_BUCKETS))
    tpot: _Histogram = field(default_factory=lambda: _Histogram(TPOT_BUCKETS))

    def count(self, record: RequestRecord) -> None:
        self.requests += 1
        self.failed += record.failed
        self.prompt_tokens += record.prompt_tokens
        self.cached_tokens += record.cached_tokens
        self.completion_tokens += record.completion_tokens
        if record.first_token is not None:
            self.ttft.observe(record.first_token)
            later = record.completion_tokens / max(len(record.finish_reasons), 1) - 1
            if later > 0:
                self.tpot.observe((record.seconds - record.first_token) / later)

    def add(self, other: "_Series") -> None:
        self.requests += other.requests
        self.failed += other.failed
        self.prompt_tokens += other.prompt_tokens
        self.cached_tokens += other.cached_tokens
        self.completion_tokens += other.completion_tokens
        self.ttft.add(other.ttft)
        self.tpot.add(other.tpot)


class VersionMetrics(Collector):
    """Counts by version label; belongs to one event loop."""

    def __init__(self, named: int = NAMED, clock: Callable[[], float] = time.monotonic) -> None:
        self._limit = named
        self._clock = clock
        self._named: dict[str, _Series] = {}
        self._other = _Series()
        self._candidates: OrderedDict[str, _Heat] = OrderedDict()

    def finished(self, record: RequestRecord) -> None:
        """Count one request that had a version, at its end."""
        self._series_of(record.label).count(record)

    def collect(self) -> Iterator[Metric]:
        every = [*self._named.items(), (OTHER, self._other)]
        yield self._counter("requests", "Requests by version", "requests", every)
        yield self._counter("failed", "Requests that failed in the server", "failed", every)
        cached = "Prompt tokens found in the prefix cache by version"
        yield self._counter("cached_tokens", cached, "cached_tokens", every)
        tokens = CounterMetricFamily(
            "wardrobe_tokens", "Tokens by version and kind", labels=["version", "kind"]
        )
        for label, series in every:
            tokens.add_metric([label, "prompt"], series.prompt_tokens)
            tokens.add_metric([label, "completion"], series.completion_tokens)
        yield tokens
        ttft = [(label, series.ttft) for label, series in every]
        tpot = [(label, series.tpot) for label, series in every]
        yield _histograms("time_to_first_token", "Request to first token by version", ttft)
        yield _histograms("time_per_output_token", "Mean time of a later token by version", tpot)

    def _counter(
        self, name: str, text: str, attribute: str, every: list[tuple[str, _Series]]
    ) -> Metric:
        family = CounterMetricFamily(f"wardrobe_version_{name}", text, labels=["version"])
        for label, series in every:
            family.add_metric([label], getattr(series, attribute))
        return family

    def _series_of(self, label: str) -> _Series:
        moment = self._clock()
        series = self._named.get(label)
        if series is None and len(self._named) < self._limit:
            series = self._named[label] = _Series()
        if series is not None:
            series.heat.rise(moment)
            return series
        return self._contend(label, moment)

    def _contend(self, label: str, moment: float) -> _Series:
        """Return `other`, or series of its own for a version that has become hot enough."""
        heat = self._candidates.setdefault(label, _Heat())
        self._candidates.move_to_end(label)
        if len(self._candidates) > self._limit:
            self._candidates.popitem(last=False)
        heat.rise(moment)
        coolest = min(self._named, key=lambda name: self._named[name].heat.now(moment))
        if heat.value < MARGIN * self._named[coolest].heat.now(moment):
            return self._other
        self._other.add(self._named.pop(coolest))
        self._named[label] = _Series(self._candidates.pop(label))
        return self._named[label]


def _histograms(name: str, text: str, every: list[tuple[str, _Histogram]]) -> Metric:
    family = HistogramMetricFamily(f"wardrobe_version_{name}_seconds", text, labels=["version"])
    for label, histogram in every:
        family.add_metric([label], histogram.buckets(), histogram.total)
    return family

"""Prometheus metrics of one server, in a registry of its own.

Labels are bounded: routes come from the route table, versions are the busiest ones and `other`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.registry import Collector

from serving.api.record import RequestRecord
from serving.api.version_metrics import TTFT_BUCKETS, VersionMetrics
from serving.api.vllm_metrics import VllmCollector
from serving.engine.boundary import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_E2E = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

# metric → (field of EngineStats, help)
_GAUGES = {
    "wardrobe_requests_running": ("running", "Sequences in the batch"),
    "wardrobe_requests_waiting": ("waiting", "Sequences in the queue"),
    "wardrobe_kv_tokens_used": ("kv_tokens_used", "Tokens held in the KV cache"),
    "wardrobe_kv_tokens": ("kv_tokens_total", "Tokens the KV cache can hold"),
    "wardrobe_prefix_cache_bytes": ("prefix_bytes", "Bytes the prefix cache holds"),
    "wardrobe_prefix_cache_max_bytes": ("prefix_bytes_total", "Bytes it may hold"),
    "wardrobe_adapter_slots": ("adapter_slots", "Adapters of the lowest rank that slots can hold"),
    "wardrobe_adapter_memory_bytes": ("adapter_memory", "Bytes of all adapter slots"),
    "wardrobe_adapter_memory_used_bytes": ("adapter_memory_used", "Of slots that hold an adapter"),
}
_COUNTERS = {
    "wardrobe_engine_steps": ("steps", "Engine steps"),
    "wardrobe_engine_prompt_tokens": ("prompt_tokens", "Prompt tokens computed"),
    "wardrobe_engine_generated_tokens": ("generated_tokens", "Tokens sampled"),
    "wardrobe_engine_aborted": ("aborted", "Sequences that were aborted"),
    "wardrobe_engine_failed": ("failed", "Sequences that failed"),
    "wardrobe_engine_paused": ("paused", "Times a sequence gave its place to another tenant"),
    "wardrobe_adapter_loads": ("adapter_loads", "Adapters loaded into a slot"),
    "wardrobe_adapter_evictions": ("adapter_evictions", "Adapters put out of their slot"),
}


@dataclass(frozen=True, slots=True)
class _EngineCollector(Collector):
    """One snapshot of the engine as metrics: what it counts are counters, never set by us."""

    stats: EngineStats
    on_disk: int  # versions whose files lie ready

    def collect(self) -> Iterator[Metric]:
        for name, (field, text) in _GAUGES.items():
            yield GaugeMetricFamily(name, text, getattr(self.stats, field))
        resident = len(self.stats.resident)
        tiers = GaugeMetricFamily(
            "wardrobe_adapters", "Adapters by the fastest place they are in", labels=["tier"]
        )
        tiers.add_metric(["slot"], resident)
        tiers.add_metric(["memory"], self.stats.in_memory)
        faster = resident + self.stats.in_memory
        tiers.add_metric(["disk"], max(self.on_disk - faster, 0))
        yield tiers
        stages = SummaryMetricFamily(
            "wardrobe_adapter_load_stage_seconds", "Parts of loading an adapter", labels=["stage"]
        )
        for stage in self.stats.load_stages:
            stages.add_metric([stage.name], stage.count, stage.seconds)
        yield stages
        for name, (field, text) in _COUNTERS.items():
            yield CounterMetricFamily(name, text, getattr(self.stats, field))


class Metrics:
    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._versions = VersionMetrics()
        self._registry.register(self._versions)
        self._requests = Counter(
            "wardrobe_requests",
            "Requests by route and status",
            ["route", "status"],
            registry=self._registry,
        )
        self.ttft = self._histogram(
            "time_to_first_token_seconds", "Request to first token", TTFT_BUCKETS
        )
        self.exposures = Counter(
            "wardrobe_exposures",
            "Answers of units in experiments; not written in time: production answered, uncounted",
            ["written"],
            registry=self._registry,
        )
        self.webhook = Counter(
            "wardrobe_webhook_attempts",
            "Attempts to tell the webhook a decision",
            ["result"],
            registry=self._registry,
        )
        self._log_dropped = Counter(
            "wardrobe_log_dropped",
            "Requests, or what was said in them, that the request log lost",
            ["what"],
            registry=self._registry,
        )
        self._shadowed = Counter(
            "wardrobe_shadow_requests",
            "Requests chosen to be mirrored to a candidate, by what became of it",
            ["result"],
            registry=self._registry,
        )
        self.itl = self._histogram("inter_token_seconds", "From one token to the next", _ITL)
        self.e2e = self._histogram("request_seconds", "Whole inference requests", _E2E)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"wardrobe_{name}", text, buckets=buckets, registry=self._registry)

    def finished(self, record: RequestRecord, scope: Mapping[str, Any]) -> None:
        """Count one request at its end, however it ended."""
        route = scope.get("path_template", "none")
        self._requests.labels(route, str(record.status)).inc()
        if not record.label:
            return
        self.e2e.observe(record.seconds)
        self._versions.finished(record)

    def log_dropped(self, what: str, count: int) -> None:
        """Count what the request log could not take: `request` or `contents`."""
        self._log_dropped.labels(what).inc(count)

    def shadowed(self, result: str) -> None:
        """Count a request that was chosen to be mirrored: `pair`, `failed`, `busy`, …"""
        self._shadowed.labels(result).inc()

    def render(self, stats: EngineStats, on_disk: int, vllm: VllmCollector) -> bytes:
        """Return the exposition text, with the engine's own counts as they are now."""
        now = (_EngineCollector(stats, on_disk), vllm)
        return b"".join(map(generate_latest, (self._registry, *now)))

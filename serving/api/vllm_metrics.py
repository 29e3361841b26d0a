"""What gateways read from vLLM's /metrics to choose a server, said of this one.

The names are vLLM's, the meaning of `running_lora_adapters` is the protocol's that the scorers are
written for: adapters that are in a slot and ready, whether a request wears them now or not. One
series at a time, so that combinations of adapters do not pile up in the exposition.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from serving.engine.boundary import EngineStats


@dataclass(frozen=True, slots=True)
class VllmCollector(Collector):
    """One snapshot. `names` says which models a client may ask for to wear a digest."""

    stats: EngineStats
    base_id: str
    names: Mapping[str, Sequence[str]]

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        used = stats.kv_tokens_used / max(stats.kv_tokens_total, 1)
        yield self._gauge("num_requests_running", "Requests in the batch", stats.running)
        yield self._gauge("num_requests_waiting", "Requests in the queue", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Used share of the KV cache, 0 to 1", used)
        asked, found = "Prompt tokens looked for", "Prompt tokens found in the prefix cache"
        yield self._counter("prefix_cache_queries", asked, stats.prefix_asked)
        yield self._counter("prefix_cache_hits", found, stats.prefix_found)
        size = stats.kv_block_tokens
        config = {"block_size": str(size), "num_gpu_blocks": str(stats.kv_tokens_total // size)}
        yield _info("cache_config_info", "The blocks of the KV cache, and tokens of one", config, 1)
        adapters = {
            "max_lora": str(stats.adapter_slots),
            "running_lora_adapters": self._written([each.digest for each in stats.resident]),
            "waiting_lora_adapters": self._written([ref.digest for ref in stats.loading]),
        }
        yield _info("lora_requests_info", "Adapters in slots and on the way", adapters, time.time())

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        family.add_metric([self.base_id], value)
        return family

    def _counter(self, name: str, text: str, value: int) -> Metric:
        family = CounterMetricFamily(f"vllm:{name}", text, labels=["model_name"])
        family.add_metric([self.base_id], value)
        return family

    def _written(self, digests: Sequence[str]) -> str:
        labels = {each.digest: each.label for each in (*self.stats.resident, *self.stats.loading)}
        names = (self.names.get(digest) or (labels[digest],) for digest in digests)
        return ",".join(name for each in names for name in each)


def _info(name: str, text: str, labels: Mapping[str, str], value: float) -> Metric:
    family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family

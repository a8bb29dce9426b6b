"""What Prometheus reads at /metrics."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

State = Callable[[], Mapping[str, float]]
"""Name of a gauge -> its value at present; names that end with `_total` are counters."""

DESCRIPTIONS = {
    "graft_requests_running": "Answers that are being computed.",
    "graft_requests_waiting": "Answers that wait for their turn.",
    "graft_adapters_registered": "Adapters that requests can name.",
    "graft_adapters_resident": "Adapters whose tensors are in memory, in use or not.",
    "graft_adapters_leased": "Adapters that answers hold, unloaded ones included.",
    "graft_adapter_loads_total": "Adapters that were read into memory.",
    "graft_adapter_evictions_total": "Adapters that were taken out of memory to make place.",
}


class _StateCollector:
    def __init__(self, state: State) -> None:
        self.state = state

    def collect(self) -> Iterable[Metric]:
        for name, value in self.state().items():
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(name, DESCRIPTIONS[name], value=value)


class Metrics:
    """The metrics of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "graft_http_requests", "HTTP requests by path and status.", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("graft_prompt_tokens", "Tokens of prompts.", registry=registry)
        self.answer_tokens = Counter("graft_answer_tokens", "Tokens of answers.", registry=registry)
        self.first_token = Histogram(
            "graft_first_token_seconds", "From submission to the first token.", buckets=SECONDS, registry=registry
        )
        self.between_tokens = Histogram(
            "graft_between_tokens_seconds", "From a token to the next.", buckets=SECONDS, registry=registry
        )

    def watch(self, state: State) -> None:
        """Read these gauges whenever the metrics are read."""
        self.registry.register(_StateCollector(state))

    def text(self) -> bytes:
        return bytes(generate_latest(self.registry))

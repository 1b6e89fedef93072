"""The numbers of a server for Prometheus."""

from __future__ import annotations

import prometheus_client
from prometheus_client import Counter, Gauge, Histogram

from qwen_dist.engine.engine import EngineStats

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST
_PREFIX = "qwen_dist_server_"
_GAUGES = {
    "num_running": "Requests that are running.",
    "num_waiting": "Requests that wait to be scheduled.",
    "num_preempted": "Times that a request was preempted and its cache pages freed.",
    "cache_positions": "Token positions that the cache has.",
    "held_positions": "Token positions in pages that requests hold.",
    "live_positions": "Token positions that hold a token.",
    "cached_positions": "Token positions in pages that no request holds and that the prefix cache keeps.",
}
_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class ServerMetrics:
    """Counts what the server does. Used by the event loop only."""

    def __init__(self) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        self._gauges = {name: self._make(Gauge, name, text) for name, text in _GAUGES.items()}
        self.answers = self._make(Counter, "answers", "HTTP requests that were answered.", ["endpoint", "status"])
        self.disconnects = self._make(Counter, "disconnects", "Requests whose client went away before the end.")
        self.prompt_tokens = self._make(Counter, "prompt_tokens", "Tokens of the prompts of accepted requests.")
        self.cached_tokens = self._make(Counter, "cached_tokens", "Tokens of prompts that were read from the prefix cache.")
        self.generated_tokens = self._make(Counter, "generated_tokens", "Generated tokens.")
        self.first_token_s = self._make(Histogram, "first_token_seconds", "Time to the first token.", buckets=_SECONDS)
        self.token_gap_s = self._make(Histogram, "token_gap_seconds", "Time between outputs.", buckets=_SECONDS)
        self.request_s = self._make(Histogram, "request_seconds", "Time of whole requests.", buckets=_SECONDS)

    def _make(self, kind, name: str, text: str, labels: list[str] | tuple[str, ...] = (), **more):  # type: ignore[no-untyped-def]
        return kind(_PREFIX + name, text, labels, registry=self._registry, **more)

    def page(self, stats: EngineStats | None) -> bytes:
        """Return what Prometheus reads."""
        for name, gauge in self._gauges.items():
            gauge.set(0 if stats is None else getattr(stats, name))
        return prometheus_client.generate_latest(self._registry)

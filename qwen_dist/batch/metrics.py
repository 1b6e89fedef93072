"""Metrics of a running batch for Prometheus, over HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from qwen_dist.batch.run import BatchSummary
from qwen_dist.engine.engine import EngineStats
from qwen_dist.errors import UserError, printable

_SUMMARY_HELP = {
    "num_answered": "Records answered in this run.",
    "num_errors": "Records that ended in an error in this run.",
    "num_prompt_tokens": "Prompt tokens of the answered records.",
    "num_cached_tokens": "Of the prompt tokens, those that were read from the prefix cache.",
    "num_generated_tokens": "Generated tokens.",
    "seconds": "Time since the first record.",
}
_STATS_HELP = {
    "num_running": "Requests that are running.",
    "num_waiting": "Requests that wait to be scheduled.",
    "num_preempted": "Times that a request was preempted and its cache pages freed.",
    "cache_positions": "Token positions that the cache has.",
    "held_positions": "Token positions in pages that requests hold.",
    "live_positions": "Token positions that hold a token.",
    "cached_positions": "Token positions in pages that no request holds and that the prefix cache keeps.",
}


@contextlib.contextmanager
def metrics_server(port: int, host: str) -> Iterator[Callable[[BatchSummary, EngineStats], None]]:
    """Serve metrics named qwen_dist_batch_… at http://host:port/metrics while the block runs.

    Yields:
      A function (summary, stats) that updates the metrics.

    Raises:
      UserError: prometheus-client is not installed, the port is taken, or the host is not an address of this machine.
    """
    try:
        import prometheus_client
    except ImportError:
        raise UserError("the metrics port needs prometheus-client: pip install 'qwen-dist[metrics]'") from None
    registry = prometheus_client.CollectorRegistry()
    gauges = {
        name: prometheus_client.Gauge(f"qwen_dist_batch_{name}", text, registry=registry)
        for name, text in (_SUMMARY_HELP | _STATS_HELP).items()
    }
    try:
        server, thread = prometheus_client.start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise UserError(
            f"cannot serve metrics on {printable(host, 100)} port {port}: {error.strerror or error}; choose a free port "
            "and an address of this machine"
        ) from error

    def update(summary: BatchSummary, stats: EngineStats) -> None:
        for owner, names in ((summary, _SUMMARY_HELP), (stats, _STATS_HELP)):
            for name in names:
                gauges[name].set(getattr(owner, name))

    try:
        yield update
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

"""The numbers of a running batch for Prometheus, over HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from qwen_dist.batch.run import Summary
from qwen_dist.engine.engine import EngineStats
from qwen_dist.errors import UserError

_OF_SUMMARY = {
    "num_answered": "Records answered in this run.",
    "num_errors": "Records that ended in an error in this run.",
    "num_prompt_tokens": "Tokens read of the records that are answered.",
    "num_generated_tokens": "Tokens written.",
    "seconds": "Time since the first record.",
}
_OF_STATS = {
    "num_running": "Requests that are being answered.",
    "num_waiting": "Requests that wait for their turn.",
    "num_preempted": "Times that a request gave its part of the cache back.",
    "cache_positions": "Positions of the cache that there are.",
    "held_positions": "Positions of the cache that requests hold.",
    "live_positions": "Positions of the cache that are in use.",
}


@contextlib.contextmanager
def metrics_server(port: int) -> Iterator[Callable[[Summary, EngineStats], None]]:
    """A function to be told the numbers, which are served at http://HOST:port/metrics as qwen_dist_batch_… for the block.

    Raises:
      UserError: prometheus-client is not installed, or the port cannot be had.
    """
    try:
        import prometheus_client
    except ImportError:
        raise UserError("the metrics port needs prometheus-client: pip install 'qwen-dist[metrics]'") from None
    registry = prometheus_client.CollectorRegistry()
    gauges = {
        name: prometheus_client.Gauge(f"qwen_dist_batch_{name}", text, registry=registry)
        for name, text in (_OF_SUMMARY | _OF_STATS).items()
    }
    try:
        server, thread = prometheus_client.start_http_server(port, registry=registry)
    except OSError as error:
        raise UserError(f"cannot serve metrics at port {port}: {error.strerror}; name a free port") from error

    def tell(summary: Summary, stats: EngineStats) -> None:
        for owner, names in ((summary, _OF_SUMMARY), (stats, _OF_STATS)):
            for name in names:
                gauges[name].set(getattr(owner, name))

    try:
        yield tell
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

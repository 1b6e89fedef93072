"""Make all processes of a run succeed or fail together: they exchange their status, with a timeout, after each step.

The exchange uses the key-value store of `jax.distributed` and not a device collective: if a process never arrives, the
others report it after a timeout instead of hanging.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from qwen_dist.errors import CheckpointError

# Long enough for a slow process that is still reading; only a dead process should stop the others.
TIMEOUT_S = 1800.0
REPORT_EVERY_S = 30.0

_logger = logging.getLogger(__name__)
_steps = itertools.count()


class SyncPoint:
    """What a process reports about a step besides success. If `digest` is set, all processes compare it."""

    digest: str = ""


@contextmanager
def sync_processes(what: str, processes: Collection[int] | None = None) -> Iterator[SyncPoint]:
    """Run the block on every process and wait until all have finished; raise on all of them if it failed on one.

    Every process must run the same steps in the same order. Without `jax.distributed` there is nothing to wait for.

    Args:
      what: the step, for error messages.
      processes: indices of the processes that take part, by default all.

    Raises:
      CheckpointError: another process failed, is missing after `TIMEOUT_S`, or gave another digest.
    """
    sync_point = SyncPoint()
    client = _client()
    if client is None:
        yield sync_point
        return
    key = f"qwen_dist/step/{next(_steps)}"
    try:
        yield sync_point
    except BaseException as error:
        _publish(client, key, {"error": str(error) or type(error).__name__})
        raise
    _publish(client, key, {"digest": sync_point.digest})
    _check(what, _collect(client, key, what, processes))


def _client() -> Any:
    # The public API of jax has no access to the store.
    from jax._src.distributed import global_state

    return global_state.client


def _publish(client: Any, key: str, status: dict[str, str]) -> None:
    import jax

    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(status))


def _collect(client: Any, key: str, what: str, processes: Collection[int] | None) -> dict[int, dict[str, str]]:
    import jax

    statuses: dict[int, dict[str, str]] = {}
    expected = set(range(jax.process_count()) if processes is None else processes)
    waiting = set(expected)
    start = reported = time.monotonic()
    while waiting:
        for path, value in client.key_value_dir_get(key + "/"):
            process = int(path.rpartition("/")[2])
            if process in expected:
                statuses[process] = json.loads(value)
                waiting.discard(process)
        if any("error" in status for status in statuses.values()):
            break
        now = time.monotonic()
        if waiting and now - start > TIMEOUT_S:
            raise CheckpointError(f"{what}: processes {sorted(waiting)} did not finish within {TIMEOUT_S:.0f} s.")
        if waiting and now - reported > REPORT_EVERY_S:
            _logger.warning("%s: waiting for processes %s for %.0f s", what, sorted(waiting), now - start)
            reported = now
        if waiting:
            time.sleep(min(0.5, 0.005 + (now - start) / 20))
    return statuses


def _check(what: str, statuses: dict[int, dict[str, str]]) -> None:
    errors = [f"process {process}: {status['error']}" for process, status in sorted(statuses.items()) if "error" in status]
    if errors:
        raise CheckpointError(f"{what} failed on other processes:\n" + "\n".join(errors))
    digests = {process: status["digest"] for process, status in sorted(statuses.items())}
    if len(set(digests.values())) > 1:
        shown = ", ".join(f"{process}: {digest[:12]}" for process, digest in digests.items())
        raise CheckpointError(
            f"{what}: the processes see different checkpoints, models or meshes (digests {shown}); "
            "give all of them the same files."
        )

"""All processes of a run do a step, or all of them fail: statuses exchanged with a timeout, before any collective.

The exchange goes through the key-value store of `jax.distributed`, not through a device collective: a process that never
arrives is named after a while instead of holding all others for ever.
"""

import itertools
import json
import logging
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from qwen_dist.errors import CheckpointError

# A slow process may still be reading; only one that is gone should end the others.
TIMEOUT_S = 1800.0
REPORT_EVERY_S = 30.0

_logger = logging.getLogger(__name__)
_steps = itertools.count()


class Step:
    """What a process says about a step besides that it worked; set `digest` to have all processes compare it."""

    digest: str = ""


@contextmanager
def together(what: str, processes: Collection[int] | None = None) -> Iterator[Step]:
    """Runs the block on every process; leaves it only when all processes have, and raises on all if it failed on one.

    Every process must take the same steps in the same order; `processes` are those that take this one together, by default
    all. Without `jax.distributed` this does nothing.

    Raises:
        CheckpointError: another process failed, is missing after `TIMEOUT_S`, or gave another digest.
    """
    step = Step()
    client = _client()
    if client is None:
        yield step
        return
    key = f"qwen_dist/step/{next(_steps)}"
    try:
        yield step
    except BaseException as error:
        _publish(client, key, {"error": str(error) or type(error).__name__})
        raise
    _publish(client, key, {"digest": step.digest})
    _check(what, _collect(client, key, what, processes))


def _client() -> Any:
    # The public API has neither the store nor a barrier with a timeout.
    from jax._src.distributed import global_state

    return global_state.client


def _publish(client: Any, key: str, status: dict[str, str]) -> None:
    import jax

    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(status))


def _collect(client: Any, key: str, what: str, processes: Collection[int] | None) -> dict[int, dict[str, str]]:
    import jax

    statuses: dict[int, dict[str, str]] = {}
    wanted = set(range(jax.process_count()) if processes is None else processes)
    waiting = set(wanted)
    start = reported = time.monotonic()
    while waiting:
        for path, value in client.key_value_dir_get(key + "/"):
            process = int(path.rpartition("/")[2])
            if process in wanted:
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

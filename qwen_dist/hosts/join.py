"""The one place where a run of several processes begins and ends: they meet, compare, start jax together, stop together."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qwen_dist.errors import UserError
from qwen_dist.hosts import preflight
from qwen_dist.hosts.cluster import Cluster
from qwen_dist.hosts.lifeline import Lifeline, Message, Wire, meet, tell

if TYPE_CHECKING:
    import jax

# All processes are there when jax starts, so that what takes longer than this will never come.
JAX_START_TIMEOUT_S = 60
DEVICES_START_TIMEOUT_S = 300
# Behind the lifeline, which knows at once.
HEARTBEAT_TIMEOUT_S = 50
SHUTDOWN_TIMEOUT_S = 30


@dataclasses.dataclass(frozen=True)
class Hosts:
    """The processes of this run, as one of them sees them; `facts` of all of them are on process 0."""

    process_id: int = 0
    names: Sequence[str] = ("process 0",)
    facts: Mapping[int, preflight.Facts] = dataclasses.field(default_factory=dict)
    lifeline: Lifeline | None = None

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for the run: prints, and writes the results."""
        return self.process_id == 0

    def check_devices(self) -> None:
        """Start the devices. Raises UserError when the processes have different numbers of them."""
        import jax

        if self.lifeline is None:
            return
        late = f"the devices did not start within {DEVICES_START_TIMEOUT_S} s; the log of each host says what it waits for."
        timer = threading.Timer(DEVICES_START_TIMEOUT_S, self.lifeline.fail, [late])
        timer.daemon = True
        timer.start()
        devices = jax.devices()
        timer.cancel()
        counts = {process: 0 for process in range(self.count)}
        for device in devices:
            counts[device.process_index] += 1
        problems = [
            f"{self.names[process]} has {count} {devices[0].platform} devices and {self.names[0]} has {counts[0]}: every "
            "process must have the same number, all visible to jax."
            for process, count in counts.items()
            if count != counts[0]
        ]
        if problems:
            raise UserError("preflight: " + " ".join(problems))


@dataclasses.dataclass(frozen=True)
class Group:
    """Processes that compute together on one mesh; groups share out the records of a run."""

    index: int
    count: int
    processes: range

    def devices(self) -> list[jax.Device]:
        import jax

        return [device for device in jax.devices() if device.process_index in self.processes]


def group_of(hosts: Hosts, num_groups: int) -> Group:
    """The group of this process when all are divided, in order, into `num_groups`. Raises UserError."""
    if num_groups < 1 or hosts.count % num_groups:
        legal = [n for n in range(1, hosts.count + 1) if hosts.count % n == 0]
        raise UserError(
            f"{hosts.count} processes cannot be divided into {num_groups} groups; legal are {', '.join(map(str, legal))}."
        )
    size = hosts.count // num_groups
    index = hosts.process_id // size
    return Group(index, num_groups, range(index * size, (index + 1) * size))


@contextlib.contextmanager
def join(cluster: Cluster | None, facts: preflight.Facts, timeout_s: float) -> Iterator[Hosts]:
    """Run the block as one process of the cluster's; without one, alone.

    Before it: the processes meet, their facts are compared, and `jax.distributed` starts. After it: all have finished. When
    one fails or is gone, all end with exit code 1 and the same message, and the block does not return.

    Raises:
      UserError: from the preflight, on all processes that have come.
    """
    if cluster is None:
        yield Hosts(facts={0: facts})
        return
    wires, known = meet(cluster, facts, timeout_s)
    names = _agree(cluster, wires, known, timeout_s)
    lifeline = Lifeline(cluster.process_id, wires, names)
    try:
        _start_jax_distributed(cluster)
        yield Hosts(cluster.process_id, names, known, lifeline)
    except UserError as error:
        lifeline.fail(str(error))
    except KeyboardInterrupt:
        lifeline.fail("interrupted")
    except BaseException as error:
        lifeline.fail(f"{type(error).__name__}: {error}", traceback.format_exc())
    _leave(lifeline)


def _agree(
    cluster: Cluster, wires: Mapping[int, Wire], known: Mapping[int, preflight.Facts], timeout_s: float
) -> list[str]:
    """All processes take process 0's judgement; the names of all."""
    if cluster.process_id == 0:
        problems = preflight.judge(cluster, known)
        names = [preflight.name(process, known[process]) for process in range(cluster.num_processes)]
        tell(wires, {"verdict": problems, "names": names})
    else:
        try:
            verdict: Message | None = wires[0].receive(time.monotonic() + timeout_s + 10)
        except (OSError, ValueError):
            verdict = None
        if verdict is None:
            raise UserError(f"preflight: process 0 at {cluster.coordinator} ended before it had heard from all processes.")
        problems, names = verdict["verdict"], verdict.get("names", [])
    if problems:
        raise UserError("preflight:\n  - " + "\n  - ".join(problems))
    return names


def _start_jax_distributed(cluster: Cluster) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # It would catch SIGTERM and go on: a process that is told to end shall end, and the lifeline tells the others.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.num_processes,
        cluster.process_id,
        local_device_ids=cluster.local_device_ids,
        cluster_detection_method="deactivate",
        initialization_timeout=JAX_START_TIMEOUT_S,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
        coordinator_bind_address=cluster.coordinator if cluster.is_loopback else None,
    )


def _leave(lifeline: Lifeline) -> None:
    import jax

    lifeline.finish()
    jax.distributed.shutdown()
    sys.stdout.flush()

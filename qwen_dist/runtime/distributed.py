"""Start and end of a run with several processes: rendezvous, preflight, `jax.distributed`, and a common shutdown."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from qwen_dist.errors import UserError, problem_list
from qwen_dist.runtime import preflight
from qwen_dist.runtime.backend import find_devices
from qwen_dist.runtime.cluster import Cluster
from qwen_dist.runtime.control import MAX_PREFLIGHT_BYTES, Connection, ControlChannel, Message, broadcast, rendezvous

if TYPE_CHECKING:
    import jax

# All processes are connected when jax starts, so a short timeout is enough.
JAX_START_TIMEOUT_S = 60
DEVICES_START_TIMEOUT_S = 300
# Only a second line of defence: the control channel reports a lost process at once.
HEARTBEAT_TIMEOUT_S = 50
SHUTDOWN_TIMEOUT_S = 30


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of this run, as seen by one of them.

    Attributes:
      process_id: of this process.
      names: of all processes, for messages.
      control: the control channel; None for a single process.
    """

    process_id: int = 0
    names: Sequence[str] = ("process 0",)
    control: ControlChannel | None = None

    @property
    def count(self) -> int:
        return len(self.names)

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, the only one that prints and writes results."""
        return self.process_id == 0

    def check_devices(self) -> None:
        """Start the devices. Raises UserError when there are none, or the processes have different numbers of them."""
        if self.control is None:
            find_devices()
            return
        late = f"the devices did not start within {DEVICES_START_TIMEOUT_S} s; the log of each host says what it waits for."
        timer = threading.Timer(DEVICES_START_TIMEOUT_S, self.control.fail, [late])
        timer.daemon = True
        timer.start()
        devices = find_devices()
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
class Replica:
    """Processes that hold one copy of the model on one mesh; the replicas of a run divide its records."""

    index: int
    num_replicas: int
    process_ids: range

    def devices(self) -> list[jax.Device]:
        import jax

        return [device for device in jax.devices() if device.process_index in self.process_ids]


def assign_replica(processes: Processes, num_replicas: int) -> Replica:
    """Return the replica of this process when the processes are divided, in order, into `num_replicas` equal replicas.

    Raises:
      UserError: the number of processes is not divisible by `num_replicas`.
    """
    if num_replicas < 1 or processes.count % num_replicas:
        legal = [n for n in range(1, processes.count + 1) if processes.count % n == 0]
        raise UserError(
            f"{processes.count} processes cannot be divided into {num_replicas} replicas; legal numbers are "
            f"{', '.join(map(str, legal))}."
        )
    size = processes.count // num_replicas
    index = processes.process_id // size
    return Replica(index, num_replicas, range(index * size, (index + 1) * size))


@contextlib.contextmanager
def initialize_distributed(cluster: Cluster | None, host_info: preflight.HostInfo, timeout_s: float) -> Iterator[Processes]:
    """Run the block as one process of the cluster, or as a single process if there is no cluster.

    Before the block, the processes connect, their host infos are compared and `jax.distributed` starts. After it, each
    waits until all have finished. When one fails or is gone, all exit with code 1 and the same message, and this does not
    return.

    Args:
      cluster: from `cluster.detect_cluster`.
      host_info: from `preflight.collect_host_info`.
      timeout_s: how long the processes wait for each other.

    Raises:
      UserError: the preflight failed; raised on every process that has connected.
    """
    if cluster is None:
        yield Processes()
        return
    connections, host_infos = rendezvous(cluster, host_info, timeout_s)
    names = _run_preflight(cluster, connections, host_infos, timeout_s)
    control = ControlChannel(cluster.process_id, connections, names)
    try:
        _start_jax_distributed(cluster)
        yield Processes(cluster.process_id, names, control)
    except UserError as error:
        control.fail(str(error))
    except KeyboardInterrupt:
        control.fail("interrupted")
    except BaseException as error:
        control.fail(f"{type(error).__name__}: {error}", traceback.format_exc())
    _shut_down(control)


def _run_preflight(
    cluster: Cluster,
    connections: Mapping[int, Connection],
    host_infos: Mapping[int, preflight.HostInfo],
    timeout_s: float,
) -> list[str]:
    """Return the names of all processes; process 0 does the check and sends its result to the others."""
    if cluster.process_id == 0:
        problems = preflight.find_problems(cluster, host_infos)
        names = [preflight.process_name(process, host_infos[process]) for process in range(cluster.num_processes)]
        broadcast(connections, {"problems": problems, "names": names})
    else:
        try:
            result: Message | None = connections[0].receive(time.monotonic() + timeout_s + 10, MAX_PREFLIGHT_BYTES)
        except (OSError, ValueError):
            result = None
        if result is None:
            raise UserError(f"preflight: process 0 at {cluster.coordinator} ended before all processes had connected.")
        if not _is_preflight_result(result, cluster.num_processes):
            raise UserError(
                f"preflight: what listens at {cluster.coordinator} is not process 0 of this run: use another port."
            )
        problems, names = result["problems"], result.get("names", [])
    if problems:
        raise UserError(f"preflight:\n{problem_list(problems)}")
    return names


def _is_preflight_result(message: Message, num_processes: int) -> bool:
    problems, names = message.get("problems"), message.get("names", [])
    if not all(isinstance(texts, list) and all(isinstance(text, str) for text in texts) for texts in (problems, names)):
        return False
    return bool(problems) or len(names) == num_processes


def _start_jax_distributed(cluster: Cluster) -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # The service would catch SIGTERM and keep the process running. A terminated process must end: the control channel tells
    # the others.
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


def _shut_down(control: ControlChannel) -> None:
    import jax

    control.finish()
    jax.distributed.shutdown()
    sys.stdout.flush()

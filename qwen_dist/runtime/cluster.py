"""Detection of this process's id, the number of processes and the coordinator: flags, environment or cluster. No jax.

jax can detect these itself, but only while it starts, and then it hangs on a wrong address. Here they are known earlier, so
that the preflight can check them.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import pathlib
import re
from collections.abc import Mapping

from qwen_dist.errors import UsageError

# jax's own coordinator port on TPU pods, so that firewall rules made for jax also work here.
TPU_PORT = 8482
_METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
_METADATA_TIMEOUT_S = 5.0


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The place of one process in a run with several processes.

    Attributes:
      coordinator: host:port that process 0 listens on.
      source: where these values come from, for messages.
      local_device_ids: the GPUs of this process where a host has several processes; None for all devices of the host.
    """

    coordinator: str
    num_processes: int
    process_id: int
    source: str
    local_device_ids: tuple[int, ...] | None = None

    @property
    def host(self) -> str:
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.coordinator.rpartition(":")[2])

    @property
    def is_loopback(self) -> bool:
        """Whether only processes of the same host can reach the coordinator."""
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Return whether a name or an address always means the local host."""
    try:
        address = ipaddress.ip_address(host)
        return address.is_loopback or address.is_unspecified
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def detect_cluster(
    coordinator: str | None, num_processes: int | None, process_id: int | None, environment: Mapping[str, str]
) -> Cluster | None:
    """Detect the cluster from the flags, else QWEN_DIST_* variables, else GKE, Slurm or a TPU pod.

    Args:
      coordinator: the flag's value, host:port; None when not given, like the next two.
      num_processes: the flag's value.
      process_id: the flag's value.
      environment: the environment variables.

    Returns:
      The cluster, or None for a single process.

    Raises:
      UsageError: only some of the three values are given, or one is not valid.
    """
    given = {"coordinator": coordinator, "num-processes": num_processes, "process-id": process_id}
    if any(value is not None for value in given.values()):
        return _explicit(given, "the flags --coordinator, --num-processes and --process-id")
    names = {key: "QWEN_DIST_" + key.upper().replace("-", "_") for key in given}
    if any(environment.get(name) for name in names.values()):
        values = {key: environment.get(name) or None for key, name in names.items()}
        return _explicit(values, f"the variables {', '.join(names.values())}")
    found = _gke_tpu(environment) or _slurm(environment) or _tpu_vm(environment)
    return found if found is not None and found.num_processes > 1 else None


def _explicit(given: Mapping[str, str | int | None], source: str) -> Cluster | None:
    problems = [f"{key} is missing" for key, value in given.items() if value is None]
    address = str(given["coordinator"] or "")
    if address and not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^:\s]+):[0-9]{1,5}", address):
        problems.append(f"coordinator {address!r} is not of the form host:port")
    numbers = {}
    for key in ("num-processes", "process-id"):
        if given[key] is not None and not str(given[key]).isdecimal():
            problems.append(f"{key} {given[key]!r} is not a number")
        else:
            numbers[key] = int(given[key] or 0)
    if not problems and not 0 <= numbers["process-id"] < numbers["num-processes"]:
        problems.append(f"process-id {numbers['process-id']} must be from 0 to num-processes - 1")
    if problems:
        raise UsageError(
            f"{source}: {'; '.join(problems)}. Example: --coordinator host:8482 --num-processes 4 --process-id 0."
        )
    if numbers["num-processes"] == 1:
        return None
    return Cluster(address, numbers["num-processes"], numbers["process-id"], source)


def _gke_tpu(environment: Mapping[str, str]) -> Cluster | None:
    """Read the variables that GKE sets in the pods of a TPU slice."""
    hosts = environment.get("TPU_WORKER_HOSTNAMES", "")
    if not hosts or "TPU_WORKER_ID" not in environment:
        return None
    return _tpu(hosts.split(","), int(environment["TPU_WORKER_ID"]), environment, "GKE's TPU_WORKER_HOSTNAMES")


def _tpu_vm(environment: Mapping[str, str]) -> Cluster | None:
    """Ask Google's metadata server for the workers of this TPU pod."""
    is_tpu = pathlib.Path("/dev/accel0").exists() or pathlib.Path("/dev/vfio/0").exists()
    if not is_tpu or "TPU_SKIP_MDS_QUERY" in environment:
        return None
    number, workers = _metadata("agent-worker-number"), _metadata("worker-network-endpoints")
    if number is None or workers is None:
        return None
    # Each is a host name, or name:id:address in the older format.
    hosts = [worker.split(":")[-1] for worker in workers.split(",")]
    slices = dict(re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)'?$", _metadata("tpu-env") or "", re.MULTILINE))
    return _tpu(hosts, int(number), {**slices, **environment}, "the metadata server of the TPU pod")


def _tpu(hosts: list[str], worker: int, environment: Mapping[str, str], source: str) -> Cluster:
    """Return the cluster of one or several TPU slices; the coordinator is the first host of the first slice."""
    first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", "").split(":")[0] or hosts[0].strip()
    slices, slice_id = int(environment.get("MEGASCALE_NUM_SLICES") or 1), int(environment.get("MEGASCALE_SLICE_ID") or 0)
    return Cluster(f"{first}:{TPU_PORT}", len(hosts) * slices, worker + slice_id * len(hosts), source)


def _metadata(key: str) -> str | None:
    import urllib.error
    import urllib.request

    request = urllib.request.Request(_METADATA + key, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=_METADATA_TIMEOUT_S) as response:
            return response.read().decode().strip()
    except (urllib.error.URLError, TimeoutError):
        return None  # not a TPU pod, or a TPU outside Google's cloud


def _slurm(environment: Mapping[str, str]) -> Cluster | None:
    """Read the variables of a Slurm job step (srun); a shell inside an allocation is not a step but a single process."""
    needed = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    if any(name not in environment for name in needed) or not environment["SLURM_STEP_ID"].isdecimal():
        return None
    # Jobs on the same node must use different ports.
    port = 61440 + int(environment["SLURM_JOB_ID"]) % 4096
    # SLURM_STEP_TASKS_PER_NODE is "1(x4)" or "2,1". The only task of a node has all of the node's GPUs.
    is_alone = set(re.sub(r"\(x\d+\)", "", environment.get("SLURM_STEP_TASKS_PER_NODE", "1")).split(",")) == {"1"}
    return Cluster(
        f"{_first_node(environment['SLURM_STEP_NODELIST'])}:{port}",
        int(environment["SLURM_NTASKS"]),
        int(environment["SLURM_PROCID"]),
        "Slurm's variables",
        None if is_alone else (int(environment["SLURM_LOCALID"]),),
    )


def _first_node(nodes: str) -> str:
    """Return the first node of a list: `node[003-010,12],other1` gives `node003`."""
    match = re.match(r"([^,\[]+)(?:\[([0-9]+)[^\]]*\]([^,]*))?", nodes)
    if match is None:
        raise UsageError(f"SLURM_STEP_NODELIST is {nodes!r}, which names no node")
    return match[1] + (match[2] or "") + (match[3] or "")

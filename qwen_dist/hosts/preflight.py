"""What must be alike on all hosts, and be there, before jax starts: gathered by each, judged by process 0. No jax.

Each problem is a sentence that names the host and says what to do.
"""

from __future__ import annotations

import collections
import hashlib
import os
import pathlib
import shutil
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import qwen_dist
from qwen_dist.hosts.cluster import Cluster

Facts = dict[str, Any]
# Compiled programs and one output; a run that finds less will fail in its middle.
MIN_FREE_DISK = 10**9
# The interpreter, jax and the loader's buffers.
MIN_FREE_MEMORY = 10**9
_SAMPLES, _SAMPLE_BYTES = 16, 4096


def gather(
    settings: Mapping[str, Any], *, checkpoint: str, input: str | None, disk: Sequence[str], weights_in_memory: float
) -> Facts:
    """This process's facts.

    Args:
      settings: what it was asked to do; must be alike on all processes.
      checkpoint: a directory; any other location is compared by its name alone.
      input: a file that all processes read, if any.
      disk: directories that will be written to.
      weights_in_memory: bytes of host memory that each byte of the checkpoint takes on this process: 0 where the weights
        go to accelerators.
    """
    import importlib.metadata

    files = checkpoint_files(checkpoint)
    weights = sum(file.stat().st_size for file in files if file.suffix == ".safetensors")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "versions": {"qwen-dist": qwen_dist.__version__, "jax": importlib.metadata.version("jax")},
        "code": code_digest(),
        "settings": {key: repr(value) for key, value in settings.items()},
        "checkpoint": checkpoint_digest(files),
        "input": "" if input is None else _file_digest(pathlib.Path(input)),
        "memory": {"free": _free_memory(), "needed": int(MIN_FREE_MEMORY + weights_in_memory * weights)},
        "disk": {place: shutil.disk_usage(_existing(place)).free for place in disk},
    }


def code_digest() -> str:
    """A hash of this package's source."""
    digest, root = hashlib.sha256(), pathlib.Path(qwen_dist.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def checkpoint_files(checkpoint: str) -> list[pathlib.Path]:
    """The JSON and weight files of a checkpoint directory; none for another location."""
    directory = pathlib.Path(checkpoint).expanduser()
    if not checkpoint or not directory.is_dir():
        return []
    return sorted([*directory.glob("*.json"), *directory.glob("*.safetensors")])


def checkpoint_digest(files: Sequence[pathlib.Path]) -> str:
    """A hash of JSON files whole, and of the size and some places of each weight file; empty for no files."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
            continue
        with open(path, "rb") as file:
            for sample in range(_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12] if files else ""


def judge(cluster: Cluster, known: Mapping[int, Facts]) -> list[str]:
    """Every problem with the facts of all processes, as sentences."""
    first, problems = known[0], []
    hosts = sorted({facts["host"] for facts in known.values()})
    if cluster.is_loopback and len(hosts) > 1:
        problems.append(
            f"the coordinator {cluster.coordinator} is a loopback address and the processes are on {len(hosts)} hosts "
            f"({', '.join(hosts)}): give a name or an address of {first['host']} on the network."
        )
    for process, facts in sorted(known.items()):
        one, other = name(process, facts), name(0, first)
        for package, version in facts["versions"].items():
            if version != first["versions"][package]:
                problems.append(
                    f"{one} has {package} {version} and {other} {first['versions'][package]}: install the same everywhere."
                )
        if facts["code"] != first["code"] and facts["versions"] == first["versions"]:
            problems.append(
                f"{one} has other code of qwen-dist ({facts['code']}) than {other} ({first['code']}), of the same version: "
                "install the same commit on all hosts."
            )
        for key in sorted(facts["settings"].keys() | first["settings"].keys()):
            theirs, ours = facts["settings"].get(key), first["settings"].get(key)
            if theirs != ours:
                problems.append(f"{one} was started with {key}={theirs} and {other} with {key}={ours}: give all the same.")
        if facts["checkpoint"] != first["checkpoint"]:
            problems.append(
                f"{one} sees another checkpoint ({facts['checkpoint'] or 'no directory'}) than {other} "
                f"({first['checkpoint'] or 'no directory'}) under the same name: copy the same files to all hosts."
            )
        if facts["input"] != first["input"]:
            problems.append(f"{one} sees another input file than {other}: copy the same file to all hosts.")
        problems += [
            f"{one} has {_gb(free)} free in {place}, and {_gb(MIN_FREE_DISK)} may be needed: make room."
            for place, free in facts["disk"].items()
            if free < MIN_FREE_DISK
        ]
    return problems + _short_of_memory(known)


def name(process: int, facts: Facts) -> str:
    """How messages call a process."""
    return f"process {process} on {facts['host']} (pid {facts['pid']})"


def _short_of_memory(known: Mapping[int, Facts]) -> list[str]:
    """Processes of one host share its memory."""
    needed: collections.Counter[str] = collections.Counter()
    for facts in known.values():
        needed[facts["host"]] += facts["memory"]["needed"]
    free = {facts["host"]: facts["memory"]["free"] for facts in known.values()}
    return [
        f"{host} has {_gb(free[host])} of free memory and its processes need at least {_gb(needed[host])}: use more hosts, "
        "or end other programs."
        for host in sorted(needed)
        if free[host] < needed[host]
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _free_memory() -> int:
    """What programs can still have, page cache included; in a container, what its limit leaves."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    free = int(fields["MemAvailable"].split()[0]) * 1024
    limit, used = (pathlib.Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def _file_digest(path: pathlib.Path) -> str:
    if not path.is_file():
        return ""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def _existing(place: str) -> pathlib.Path:
    """The directory or the nearest above it that exists."""
    path = pathlib.Path(place).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path

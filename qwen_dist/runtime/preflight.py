"""Checks before jax starts: versions, settings and files must match on all hosts, with enough memory and disk. No jax.

Every process collects its host info and process 0 compares them. Each problem is one sentence that names the host and says
what to do.
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
from qwen_dist.json_reader import MAX_JSON_BYTES
from qwen_dist.runtime.cluster import Cluster
from qwen_dist.runtime.memory import available_memory

HostInfo = dict[str, Any]
# Space for compiled programs and one output; a run with less would fail halfway.
MIN_FREE_DISK = 10**9
# For the interpreter, jax and the loader's buffers.
MIN_FREE_MEMORY = 10**9
_NUM_SAMPLES, _SAMPLE_BYTES = 16, 4096
# The fields of a host info: texts, and mappings with the type of their values; and "pid".
_TEXTS = ("host", "code", "checkpoint", "input")
_MAPPINGS = {"versions": str, "settings": str, "memory": int, "disk": int}


def collect_host_info(
    settings: Mapping[str, Any],
    *,
    checkpoint: str,
    inputs: Sequence[str],
    write_dirs: Sequence[str],
    memory_per_checkpoint_byte: float,
) -> HostInfo:
    """Collect what the preflight compares between processes.

    Args:
      settings: flags and configuration; must be the same on all processes.
      checkpoint: a directory; any other location is compared by name only.
      inputs: files that all processes read; addresses are compared by name only.
      write_dirs: directories that the run writes to.
      memory_per_checkpoint_byte: bytes of host memory that this process needs for each byte of the checkpoint; 0 where the
        weights go to accelerators.
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
        "input": _files_digest(inputs),
        "memory": {"free": available_memory(), "needed": int(MIN_FREE_MEMORY + memory_per_checkpoint_byte * weights)},
        "disk": {directory: shutil.disk_usage(_nearest_existing(directory)).free for directory in write_dirs},
    }


def is_host_info(value: object) -> bool:
    """Return whether a value that was received has the keys and types of a host info."""
    if not isinstance(value, dict) or value.keys() != {*_TEXTS, "pid", *_MAPPINGS}:
        return False
    if not all(isinstance(value[name], str) for name in _TEXTS) or type(value["pid"]) is not int:
        return False
    for name, kind in _MAPPINGS.items():
        if not isinstance(value[name], dict) or any(type(one) is not kind for one in value[name].values()):
            return False
    return value["versions"].keys() == {"qwen-dist", "jax"} and value["memory"].keys() == {"free", "needed"}


def code_digest() -> str:
    """Return a hash of this package's Python source."""
    digest, root = hashlib.sha256(), pathlib.Path(qwen_dist.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def checkpoint_files(checkpoint: str) -> list[pathlib.Path]:
    """Return the JSON and weight files of a checkpoint directory; an empty list for any other location."""
    directory = pathlib.Path(checkpoint).expanduser()
    if not checkpoint or not directory.is_dir():
        return []
    found = [*directory.glob("*.json"), *directory.glob("*.safetensors")]
    return sorted(path for path in found if path.is_file())  # reading a named pipe might never end


def checkpoint_digest(files: Sequence[pathlib.Path]) -> str:
    """Return a hash of the whole JSON files and of size and samples of each weight file; an empty string for no files."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            if path.suffix == ".json":
                digest.update(file.read(MAX_JSON_BYTES))
                continue
            for sample in range(_NUM_SAMPLES):
                file.seek(max(0, size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:12] if files else ""


def find_problems(cluster: Cluster, host_infos: Mapping[int, HostInfo]) -> list[str]:
    """Return every problem found in the host infos of all processes, as sentences."""
    first, problems = host_infos[0], []
    hosts = sorted({info["host"] for info in host_infos.values()})
    if cluster.is_loopback and len(hosts) > 1:
        problems.append(
            f"the coordinator {cluster.coordinator} is a loopback address and the processes are on {len(hosts)} hosts "
            f"({', '.join(hosts)}): give a name or an address of {first['host']} on the network."
        )
    for process, info in sorted(host_infos.items()):
        one, other = process_name(process, info), process_name(0, first)
        for package, version in info["versions"].items():
            if version != first["versions"][package]:
                problems.append(
                    f"{one} has {package} {version} and {other} {first['versions'][package]}: install the same everywhere."
                )
        if info["code"] != first["code"] and info["versions"] == first["versions"]:
            problems.append(
                f"{one} has different qwen-dist code ({info['code']}) from {other} ({first['code']}), but the same version "
                "number: install the same commit on all hosts."
            )
        for key in sorted(info["settings"].keys() | first["settings"].keys()):
            theirs, ours = info["settings"].get(key), first["settings"].get(key)
            if theirs != ours:
                problems.append(
                    f"{one} was started with {key}={theirs} and {other} with {key}={ours}: use the same value everywhere."
                )
        if info["checkpoint"] != first["checkpoint"]:
            problems.append(
                f"{one} sees a different checkpoint ({info['checkpoint'] or 'no directory'}) from {other} "
                f"({first['checkpoint'] or 'no directory'}) under the same name: copy the same files to all hosts."
            )
        if info["input"] != first["input"]:
            problems.append(f"{one} sees other input files than {other}: copy the same files to all hosts.")
        problems += [
            f"{one} has {_gb(free)} free in {directory}, and {_gb(MIN_FREE_DISK)} may be needed: free some disk space."
            for directory, free in info["disk"].items()
            if free < MIN_FREE_DISK
        ]
    return problems + _memory_problems(host_infos)


def process_name(process: int, info: HostInfo) -> str:
    """Return the name of a process for messages."""
    return f"process {process} on {info['host']} (pid {info['pid']})"


def _memory_problems(host_infos: Mapping[int, HostInfo]) -> list[str]:
    """Compare the free memory of each host with what all of its processes need."""
    needed: collections.Counter[str] = collections.Counter()
    for info in host_infos.values():
        needed[info["host"]] += info["memory"]["needed"]
    free = {info["host"]: info["memory"]["free"] for info in host_infos.values()}
    return [
        f"{host} has {_gb(free[host])} of free memory and its processes need at least {_gb(needed[host])}: use more hosts, "
        "or end other programs."
        for host in sorted(needed)
        if free[host] < needed[host]
    ]


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _files_digest(names: Sequence[str]) -> str:
    """Return a hash of the content of files, and of the names that are no files; an empty text without any."""
    digest = hashlib.sha256()
    for name in names:
        if not os.path.isfile(name):
            digest.update(name.encode())
            continue
        with open(name, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12] if names else ""


def _nearest_existing(directory: str) -> pathlib.Path:
    """Return the directory, or its nearest parent that exists."""
    path = pathlib.Path(directory).expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path

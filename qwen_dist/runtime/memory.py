"""How much memory programs on this machine can still allocate, within the limits of container and shell. No jax."""

from __future__ import annotations

import pathlib
import resource
from collections.abc import Iterator

_CGROUPS = pathlib.Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Return the bytes that this process can still allocate, page cache and swap included; 2**62 if nothing says so."""
    limits = [*_machine_limit(), *_cgroup_limits(), *_address_space_limit()]
    return max(0, min(limits, default=2**62))


def format_gb(size: float) -> str:
    """Return a size as text, in GB."""
    return f"{size / 1e9:.1f} GB"


def _machine_limit() -> Iterator[int]:
    fields = _fields("/proc/meminfo")
    if "MemAvailable" in fields:
        yield 1024 * (fields["MemAvailable"] + fields.get("SwapFree", 0))


def _cgroup_limits() -> Iterator[int]:
    """Yield what is left below the limits of this process's control group and of those above it, in versions 2 and 1."""
    group = next((line.partition("::")[2] for line in _lines("/proc/self/cgroup") if line.startswith("0::")), "/")
    path = _CGROUPS / group.strip("/")
    for folder in [path, *path.parents]:
        if not folder.is_relative_to(_CGROUPS):
            break
        yield from _left(folder / "memory.max", folder / "memory.current", folder / "memory.stat", "inactive_file")
    old = _CGROUPS / "memory"
    yield from _left(
        old / "memory.limit_in_bytes", old / "memory.usage_in_bytes", old / "memory.stat", "total_inactive_file"
    )


def _left(limit: pathlib.Path, used: pathlib.Path, statistics: pathlib.Path, reclaimable: str) -> Iterator[int]:
    given = next(_lines(limit), "max").strip()
    if given.isdecimal() and int(given) < 2**60:
        in_use = int(next(_lines(used), "0").strip() or 0)
        yield int(given) - in_use + _fields(statistics).get(reclaimable, 0)


def _address_space_limit() -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - 1024 * _fields("/proc/self/status").get("VmSize", 0)


def _fields(path: str | pathlib.Path) -> dict[str, int]:
    """Return the numbers of a file with a name and a number on each line."""
    words = (line.replace(":", " ").split() for line in _lines(path))
    return {parts[0]: int(parts[1]) for parts in words if len(parts) > 1 and parts[1].isdecimal()}


def _lines(path: str | pathlib.Path) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            yield from file
    except OSError:
        return

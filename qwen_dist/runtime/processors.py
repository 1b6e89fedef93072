"""How many processors this process may keep busy, within the limits of container and shell. No jax."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterator

_CGROUPS = pathlib.Path("/sys/fs/cgroup")
_OWN_CGROUPS = pathlib.Path("/proc/self/cgroup")


def count_processors() -> int:
    """Return the processors that this process may run on, or fewer if its control group may use fewer of their time."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(math.ceil(quota) for quota in _quotas())]))


def _quotas() -> Iterator[float]:
    """Yield the limits, in processors, of this process's control group and of those above it, in versions 2 and 1."""
    for line in _read(_OWN_CGROUPS).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, group = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = _CGROUPS / "cpu" if controllers else _CGROUPS
        path = root / group.strip("/")
        for folder in [path, *path.parents]:
            if not folder.is_relative_to(root):
                break
            if controllers:
                limit = [_read(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
            else:
                limit = _read(folder / "cpu.max").split()
            if len(limit) == 2 and all(number.isdecimal() and int(number) > 0 for number in limit):
                yield int(limit[0]) / int(limit[1])


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""

"""How many processors a process may keep busy, and that XLA's thread pool has as many threads."""

import os
import subprocess
import sys

import pytest

from qwen_dist.runtime import processors


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/", {}, 16),
        ("0::/", {"cpu.max": "max 100000"}, 16),
        ("0::/", {"cpu.max": "300000 100000"}, 3),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "2000 100000"}, 1),
        ("0::/", {"cpu.max": "6400000 100000"}, 16),
        ("0::/pod/one", {"pod/one/cpu.max": "max 100000", "pod/cpu.max": "500000 100000"}, 5),
        ("3:cpu,cpuacct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 16),
        ("3:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "700000", "cpu/a/cpu.cfs_period_us": "100000"}, 7),
        ("3:cpuset:/a", {"cpu/a/cpu.cfs_quota_us": "700000", "cpu/a/cpu.cfs_period_us": "100000"}, 16),
        ("", {"cpu.max": "damaged"}, 16),
    ],
)
def test_quotas(own, files, expected, tmp_path, monkeypatch):
    (tmp_path / "own").write_text(f"7:memory:/x\n{own}\n")
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    monkeypatch.setattr(processors, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(processors, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    assert processors.count_processors() == expected


def test_xla_starts_as_many_threads():
    """Its pool for the work inside of operations, where the kernels run, has a thread for each processor."""
    program = """
import os, sys
import qwen_dist.runtime.processors as processors
processors.count_processors = lambda: int(sys.argv[1])
from qwen_dist.runtime.backend import start_jax
start_jax(1, "float32", use_compilation_cache=False)
import jax
jax.devices()
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
print(sum("XLAEigen" in name for name in names))
"""
    if not os.path.exists("/proc/self/task"):
        pytest.skip("threads are listed on Linux only")
    environ = {name: value for name, value in os.environ.items() if name not in ("NPROC", "PJRT_NPROC")}
    for number in (3, 5):
        command = [sys.executable, "-c", program, str(number)]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
        assert int(done.stdout) == number

"""Run a command and print the largest memory of all its processes together, and which tests ran then. Linux only.

    python tools/suite_memory.py pytest -n 2
    python tools/suite_memory.py --interval 0.2 --top 20 pytest tests/train

Memory is the proportional set size: pages that processes share count once. pytest loads this file as a plugin, too
(PYTEST_ADDOPTS): each worker writes the name of its current test to a file, so that samples can be assigned to tests.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import NamedTuple

FOLDER = "SUITE_MEMORY_FOLDER"


def pytest_runtest_logstart(nodeid: str, location: object) -> None:
    """Note the test that this worker runs."""
    if folder := os.environ.get(FOLDER):
        pathlib.Path(folder, str(os.getpid())).write_text(nodeid)


class Process(NamedTuple):
    pid: int
    parent: int
    started: int


def processes() -> Iterator[Process]:
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            yield Process(int(entry.name), int(fields[1]), int(fields[19]))


def proportional_size(pid: int) -> int:
    """Return the bytes of a process; 0 if it has ended."""
    try:
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


class Sampler:
    """The memory of a process and its descendants, also of those whose parent has ended, by sample and by test."""

    def __init__(self, root: int, folder: str):
        self._root, self._folder, self._known = root, pathlib.Path(folder), dict[int, int]()
        self.peak, self.at_peak = 0, list[tuple[int, str]]()
        self.by_test: dict[str, int] = {}

    def sample(self) -> None:
        found = {process.pid: process for process in processes()}
        self._known = {
            pid: started for pid, started in self._known.items() if pid in found and found[pid].started == started
        }
        family, grown = {self._root, *self._known}, True
        while grown:
            children = {process.pid for process in found.values() if process.parent in family} - family
            family, grown = family | children, bool(children)
        family &= found.keys()
        self._known |= {pid: found[pid].started for pid in family}
        sizes = {pid: proportional_size(pid) for pid in family}
        by_test: dict[str, int] = {}
        for pid, size in sizes.items():
            name = self._test(pid, found)
            by_test[name] = by_test.get(name, 0) + size
        for name, size in by_test.items():
            self.by_test[name] = max(self.by_test.get(name, 0), size)
        if (total := sum(sizes.values())) > self.peak:
            self.peak, self.at_peak = total, sorted(((size, name) for name, size in by_test.items()), reverse=True)

    def _test(self, pid: int, found: dict[int, Process]) -> str:
        """Return the test of the nearest ancestor that is a worker of pytest."""
        while pid in found and pid != 1:
            if (note := self._folder / str(pid)).exists():
                return note.read_text() or "between tests"
            pid = found[pid].parent
        return "outside of tests"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--interval", type=float, default=0.5, help="seconds between samples")
    parser.add_argument("--top", type=int, default=15, help="number of tests to list")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        here = str(pathlib.Path(__file__).parent)
        environ = os.environ | {
            FOLDER: folder,
            "PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), here))),
            "PYTEST_ADDOPTS": f"{os.environ.get('PYTEST_ADDOPTS', '')} -p suite_memory",
        }
        child = subprocess.Popen(options.command, env=environ)
        sampler = Sampler(child.pid, folder)
        while child.poll() is None:
            sampler.sample()
            time.sleep(options.interval)
    print(f"\npeak {sampler.peak / 1e9:.2f} GB, {time.monotonic() - start:.0f} s; at the peak:")
    for size, name in sampler.at_peak:
        print(f"  {size / 1e9:6.2f} GB  {name}")
    print("most memory of one worker and the programs it started, by test:")
    for name, size in sorted(sampler.by_test.items(), key=lambda entry: -entry[1])[: options.top]:
        print(f"  {size / 1e9:6.2f} GB  {name}")
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())

"""glibc keeps the memory that a training step frees, on the CPU backend only."""

import platform
import resource
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")

SIZE = 100_000_000
PROGRAM = """
import ctypes, resource, threading
import jax
from qwen_dist.ops import malloc

jax.default_backend = lambda: {backend!r}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is one fault

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    address = ctypes.c_void_p(libc.malloc(ctypes.c_size_t({size})))
    libc.memset(address, 1, ctypes.c_size_t({size}))
    libc.free(address)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

malloc.keep_freed_memory()
page_faults()
found = []
thread = threading.Thread(target=lambda: found.append(page_faults()))
thread.start()
thread.join()
print(*found)
"""


def page_faults(backend: str) -> int:
    """How many pages a thread has to clear for a block as large as one that another thread has freed."""
    command = [sys.executable, "-c", PROGRAM.format(backend=backend, size=SIZE)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_freed_memory_is_not_cleared_again_on_the_cpu_backend():
    assert page_faults("cpu") < 0.1 * SIZE / resource.getpagesize()


@pytest.mark.parametrize("backend", ["gpu", "tpu"])
def test_accelerators_leave_malloc_as_it_is(backend):
    assert page_faults(backend) > 0.9 * SIZE / resource.getpagesize()


@pytest.mark.parametrize(("backend", "num_calls"), [("cpu", 49), ("gpu", 0), ("tpu", 0)])
def test_the_tcache_is_drained_on_the_cpu_backend_only(backend, num_calls, monkeypatch):
    from qwen_dist.ops import malloc

    class Libc:
        """Counts the requests; the addresses are made up."""

        def __init__(self):
            self.requested, self.freed = [], []

        def __getattr__(self, name):
            raise AssertionError(f"{name} must not be called")

    libc = Libc()
    libc.malloc = lambda size: libc.requested.append(size.value) or len(libc.requested)
    libc.free = lambda address: libc.freed.append(address.value)
    monkeypatch.setattr("jax.default_backend", lambda: backend)
    monkeypatch.setattr(malloc.ctypes, "CDLL", lambda name: libc)
    malloc.drain_tcache()
    assert len(libc.requested) == num_calls and libc.freed == list(range(1, num_calls + 1))

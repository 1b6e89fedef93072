"""What a training step frees is there for the next one, at once."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is only done with glibc")


def said_by(program: str) -> list[int]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [int(word) for word in done.stdout.split()]


def test_memory_that_training_frees_is_not_cleared_again():
    (faults,) = said_by("""
import ctypes, resource, threading
from qwen_dist.train.heap import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def page_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    place = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(100_000_000)))
    libc.memset(place, 1, ctypes.c_size_t(100_000_000))
    libc.free(place)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_freed_memory()
page_faults()
found = []
thread = threading.Thread(target=lambda: found.append(page_faults()))
thread.start()
thread.join()
print(*found)
""")
    assert faults < 1000, "there are 24,000 pages"

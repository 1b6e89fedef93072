"""What the C library does with the memory of a training step on a CPU, where it is glibc; elsewhere nothing happens here.

Such a step takes gigabytes for its temporaries, as one block, and frees them. The system would hand out, and clear, every
page of them again for each step, so the library is told to keep them. But a block begins at a multiple of 64 bytes, which
the library reaches by taking some more and giving back what is over: a crumb, which the thread keeps for small requests to
come. For the next step the place of the block is then too short by that crumb, and a second block is taken behind it.
"""

from __future__ import annotations

import ctypes
import platform

# malloc.h
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
# A thread keeps this many small pieces of each size (glibc's tcache); more are joined with what is free beside them.
_KEPT = 7
# What can be asked for of each size that a crumb may have.
_CRUMBS = range(24, 136, 16)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed; and have the thread that asks for a step take the step's memory itself.

    To be called before jax has devices.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    import jax

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    libc = ctypes.CDLL(None)
    libc.mallopt(_ARENA_MAX, 1)  # one heap for all threads
    libc.mallopt(_TRIM_THRESHOLD, -1)  # its end is never given back
    libc.mallopt(_MMAP_MAX, 0)  # and nothing is mapped outside it


def join_crumbs() -> None:
    """To be called before each step: the crumb of its block is then joined with what is beside it, and not kept."""
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    for size in _CRUMBS:
        for place in [libc.malloc(ctypes.c_size_t(size)) for _ in range(_KEPT)]:
            libc.free(ctypes.c_void_p(place))

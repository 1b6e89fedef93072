"""A trace of host and devices, for TensorBoard or XProf."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from qwen_dist.errors import UserError

# A longer trace is too big for its viewers.
SECONDS = 10.0


@contextlib.contextmanager
def profiling(directory: str) -> Iterator[Callable[[], None]]:
    """Yield a function to call regularly: its first call starts a trace of `SECONDS` into the directory.

    Raises:
      UserError: the directory cannot be created.
    """
    import jax

    try:
        os.makedirs(directory, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write a profile to {directory}: {error.strerror}; name another directory") from error
    started: float | None = None
    is_over = False

    def tick() -> None:
        nonlocal started, is_over
        if started is None:
            jax.profiler.start_trace(directory)
            started = time.monotonic()
        elif not is_over and time.monotonic() - started > SECONDS:
            is_over = True
            jax.profiler.stop_trace()

    try:
        yield tick
    finally:
        if started is not None and not is_over:
            jax.profiler.stop_trace()

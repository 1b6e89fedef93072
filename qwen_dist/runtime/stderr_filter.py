"""Drop lines that compiled libraries write to standard error about things that a user can do nothing about. No jax."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def dropped_lines(pattern: str) -> Iterator[None]:
    """Pass on what is written to file descriptor 2 in this block, except for the lines in which `pattern` is found."""
    dropped = re.compile(pattern.encode())
    sys.stderr.flush()
    before = os.dup(2)
    source, sink = os.pipe()

    def pass_on() -> None:
        with os.fdopen(source, "rb") as lines:
            for line in lines:
                if not dropped.search(line):
                    os.write(before, line)

    thread = threading.Thread(target=pass_on, daemon=True)
    thread.start()
    os.dup2(sink, 2)
    os.close(sink)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        thread.join(timeout=10)
        os.close(before)

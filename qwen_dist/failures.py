"""Errors that libraries raise, as messages of one line: no memory, no space, and errors of this program."""

from __future__ import annotations

import errno
import traceback

from qwen_dist.errors import printable
from qwen_dist.runtime.memory import available_memory, format_gb

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "Out of memory", "Unable to allocate", "Cannot allocate memory", "bad_alloc")
# Types that mean a fault of this program, and not of its input or of the machine.
_FAULTS = (AssertionError, AttributeError, IndexError, KeyError, NameError, NotImplementedError, TypeError)


def describe_failure(error: BaseException) -> str:
    """Return a message for an exception that is not a `UserError`."""
    first = next(iter(str(error).strip().splitlines()), "")
    if is_out_of_memory(error):
        return (
            f"not enough memory ({printable(first or type(error).__name__)}; {format_gb(available_memory())} are available "
            "on this machine). Use a smaller --dtype such as bfloat16, shorter or fewer sequences, or more devices with "
            "--mesh; `qwen-dist plan` estimates what is needed"
        )
    if isinstance(error, OSError) and error.strerror and not isinstance(error, _FAULTS):
        name = f": {printable(error.filename)}" if error.filename else ""
        return f"{error.strerror}{name} (--debug shows the traceback)"
    text = f"{type(error).__name__}: {printable(first)}" if first else type(error).__name__
    report = "; this is a fault of qwen-dist, please report it" if isinstance(error, _FAULTS) else ""
    return f"{text} ({_place(error)}){report}. --debug shows the traceback"


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory was missing, on this machine or on a device."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    return isinstance(error, RuntimeError | ValueError | OSError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def _place(error: BaseException) -> str:
    """Return file and line of the innermost frame in this package, or else of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "qwen_dist" in frame.filename]
    if not frames:
        return "unknown place"
    frame = (own or frames)[-1]
    _, package, inside = frame.filename.rpartition("qwen_dist/")
    return f"{package}{inside}:{frame.lineno}" if package else f"{frame.filename}:{frame.lineno}"

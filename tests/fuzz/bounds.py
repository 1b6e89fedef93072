"""What every input must end in: a result or one line, in bounded time and memory."""

from __future__ import annotations

import dataclasses
import pathlib
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from qwen_dist.errors import UserError

MAX_SECONDS, MAX_BYTES, MAX_MESSAGE = 10, 10**9, 20_000
# The number of cases and their outcomes by target, for the summary.
COUNTS: dict[str, Counter[str]] = {}


class _OutOfTimeError(BaseException):
    """A case took too long. No handler of ordinary exceptions catches it."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """A case that ended otherwise, with the place in the package where it did."""

    what: str
    place: str
    case: str

    def __str__(self) -> str:
        return f"{self.what} at {self.place} with {self.case}"


def check_cases(
    name: str,
    run: Callable[[Any], Any],
    cases: st.SearchStrategy[Any],
    *,
    known: Sequence[Any] = (),
    max_examples: int = 200,
) -> None:
    """Run known and generated cases; fail with one case for each place where one ended wrongly.

    Args:
      name: of what reads the cases.
      run: reads one case.
      cases: the strategy; the generated cases are always the same.
      known: cases to begin with, which once ended wrongly.
      max_examples: number of generated cases.
    """
    counts, failures = COUNTS.setdefault(name, Counter()), dict[str, Failure]()

    def check(case: Any) -> None:
        outcome = _outcome(run, case)
        counts["wrong" if isinstance(outcome, Failure) else outcome] += 1
        if isinstance(outcome, Failure):
            failures.setdefault(outcome.place + outcome.what[:40], outcome)

    for case in known:
        check(case)
    checks = list(HealthCheck)
    options = settings(
        max_examples=max_examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=checks,
        phases=[Phase.generate],
    )
    options(given(cases)(check))()
    assert not failures, f"{name}:\n" + "\n".join(map(str, failures.values()))


def _outcome(run: Callable[[Any], Any], case: Any) -> str | Failure:
    start, before = time.monotonic(), _reset_peak()
    what = place = ""
    outcome = "result"
    previous = signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(MAX_SECONDS)
    try:
        run(case)
    except UserError as error:
        outcome, what = "error", _message_problem(str(error))
    except SystemExit as error:
        outcome, what = "error", "" if error.code in (0, 1, 2) else f"exit code {error.code}"
    except (Exception, _OutOfTimeError) as error:
        what, place = f"{type(error).__name__}: {str(error)[:200]!r}", _place(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    if (grown := _peak() - before) > MAX_BYTES:
        what = what or f"{grown / 1e9:.1f} GB"
    if not what and (seconds := time.monotonic() - start) > MAX_SECONDS:
        what = f"{seconds:.0f} s"
    return Failure(what, place, f"{case!r:.300}") if what else outcome


def _out_of_time(*_: object) -> None:
    raise _OutOfTimeError(f"over {MAX_SECONDS} s")


def _message_problem(message: str) -> str:
    wrong = [char for char in message if (char < " " and char != "\n") or char == "\x7f" or "\ud800" <= char <= "\udfff"]
    if wrong:
        return f"a message with the character {wrong[0]!r}: {message[:200]!r}"
    return f"a message of {len(message)} characters: {message[:100]!r}" if len(message) > MAX_MESSAGE else ""


def _place(error: BaseException) -> str:
    """Return the last line of the package, or else of the program, that the error came through."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/qwen_dist/" in frame.filename] or frames
    return f"{pathlib.Path(own[-1].filename).name}:{own[-1].lineno} ({own[-1].name})"


def _reset_peak() -> int:
    """Start a new measurement of the most memory of this process; return what it has now, in bytes."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _peak() -> int:
    return _memory("VmHWM")


def _memory(name: str) -> int:
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def has_threads_of_others() -> list[str]:
    """Return the names of threads besides the main one."""
    return [thread.name for thread in threading.enumerate() if thread is not threading.main_thread()]

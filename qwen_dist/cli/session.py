"""What a command runs in: one of several processes, with stdout on process 0 only, and Ctrl-C as a request to stop."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import qwen_dist
from qwen_dist.cli.commands import EXIT_INTERRUPTED
from qwen_dist.cli.flags import ProcessFlags
from qwen_dist.config import LoadOptions
from qwen_dist.errors import UsageError, printable
from qwen_dist.runtime.backend import COMPILATION_CACHE

if TYPE_CHECKING:
    from qwen_dist.runtime.distributed import Processes

# The small model in the package, for when no other is given.
DEMO_MODEL = {"model.path": qwen_dist.DEMO_MODEL}

# How long processes wait for each other before the preflight reports which are missing.
_START_TIMEOUT_S = "60"


@contextlib.contextmanager
def joined(
    verb: str, config: Any, flags: ProcessFlags, *, num_replicas: int = 1, inputs: Sequence[str] = (), **more: Any
) -> Iterator[Processes]:
    """Run the block as one of several processes, if there are several: after the preflight, with stdout on process 0 only.

    `config`, `more` and the content of the files `inputs` must be the same on all processes.
    """
    from qwen_dist.runtime.cluster import detect_cluster

    timeout = _start_timeout(flags)
    cluster = detect_cluster(flags.coordinator, flags.num_processes, flags.process_id, os.environ)
    from qwen_dist.runtime.distributed import Processes, initialize_distributed
    from qwen_dist.runtime.preflight import collect_host_info

    if cluster is None:
        yield Processes()
        return
    model: LoadOptions = config.model
    on_host = bool(flags.num_cpu_devices) or os.environ.get("JAX_PLATFORMS") == "cpu"
    # Parameters are loaded in this dtype from a checkpoint with two bytes for each.
    copies = {"float32": 2, "float64": 4}.get(model.dtype, 1) * num_replicas / cluster.num_processes
    host_info = collect_host_info(
        {"command": verb, **vars(config), **more},
        checkpoint=model.path,
        inputs=inputs,
        write_dirs=[os.environ.get("JAX_COMPILATION_CACHE_DIR") or COMPILATION_CACHE],
        memory_per_checkpoint_byte=copies if on_host and model.needs_weights else 0.0,
    )
    with (
        _redirect_stdout(cluster.process_id),
        initialize_distributed(cluster, host_info, timeout) as processes,
    ):
        yield processes


def _start_timeout(flags: ProcessFlags) -> float:
    given = flags.start_timeout
    name = "QWEN_DIST_START_TIMEOUT" if given is None else "--start-timeout"
    text = os.environ.get(name, _START_TIMEOUT_S) if given is None else given
    try:
        seconds = float(text)
    except ValueError:
        raise UsageError(f"{name} is {printable(repr(text), 60)}; it must be seconds, such as 60") from None
    if not 0 < seconds < math.inf:
        raise UsageError(f"{name} is {seconds}; it must be a number of seconds above 0")
    return seconds


@contextlib.contextmanager
def _redirect_stdout(process_id: int) -> Iterator[None]:
    """Send Python's output to stdout on process 0 only, and what libraries write to stdout to stderr.

    Gloo, the library for collectives between CPU processes, writes about its connections to file descriptor 1.
    """
    sys.stdout.flush()
    answers = os.dup(1) if process_id == 0 else os.open(os.devnull, os.O_WRONLY)
    os.dup2(2, 1)
    with os.fdopen(answers, "w", encoding=sys.stdout.encoding) as out, contextlib.redirect_stdout(out):
        yield


@contextlib.contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C was pressed. A second Ctrl-C ends the program at once.

    It does not raise KeyboardInterrupt, which is lost if it comes while a callback of jax's garbage collector runs. The
    journal says up to where the output is complete.
    """
    interrupted = False

    def stop(number: int, frame: object) -> None:
        nonlocal interrupted
        if interrupted:
            os.write(2, b"\ninterrupted\n")
            os._exit(EXIT_INTERRUPTED)
        interrupted = True
        os.write(2, b"\nstopping after the running requests are finished; Ctrl-C again stops at once\n")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield lambda: interrupted
    finally:
        signal.signal(signal.SIGINT, before)


def paths_read(model: str, config_file: str | None, adapter: str = "") -> dict[str, str]:
    """Return the paths that a command reads besides its data, by flag, from the values of the flags."""
    return {"--model": model, "--adapter": adapter, "--config": (config_file or "").partition(":")[0]}

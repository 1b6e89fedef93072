"""What commands show in the terminal: tables, summaries, progress and announcements."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    from rich.console import Console

    from qwen_dist.batch.run import BatchSummary
    from qwen_dist.config import BatchConfig
    from qwen_dist.engine.request import RequestOutput
    from qwen_dist.runtime.distributed import Processes
    from qwen_dist.sharding import ShardingContext
    from qwen_dist.tokenizer import Tokenizer
    from qwen_dist.train.run import TrainSummary

_TABLE_WIDTH = 160


def make_console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console of rich, as wide as the terminal."""
    from rich.console import Console

    # A file or a pipe has no width, and rich would cut the tables to 80 columns.
    has_width = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return Console(stderr=stderr, quiet=quiet, highlight=False, width=None if has_width else _TABLE_WIDTH)


def announcer(processes: Processes, *, quiet: bool) -> Callable[[str], None]:
    """Return a function that prints to stderr, if it is a terminal or the log of a run with several processes."""
    is_read = processes.count > 1 or sys.stderr.isatty()
    return lambda text: print(text, file=sys.stderr) if is_read and not quiet else None


def loading(description: str = "loading", *, quiet: bool) -> contextlib.AbstractContextManager[Callable[[int, int], None]]:
    """Return a progress bar in bytes on stderr, if that is a terminal."""
    from qwen_dist.checkpoint.progress import progress_bar

    return progress_bar(description, make_console(stderr=True, quiet=quiet or not sys.stderr.isatty()))


# --- answers ---


def print_answer_json(text: str, updates: Sequence[RequestOutput], tokenizer: Tokenizer) -> None:
    """Print an answer as one JSON object."""
    from qwen_dist.openai_api import logprob_json

    last = updates[-1]
    answer: dict[str, Any] = {
        "text": text,
        "finish_reason": last.finish_reason,
        "token_ids": [token for update in updates for token in update.tokens],
        "usage": {"prompt_tokens": len(last.request.prompt), "completion_tokens": last.num_generated},
    }
    if last.request.params.logprobs is not None:
        answer["logprobs"] = [logprob_json(token, tokenizer) for update in updates for token in update.logprobs]
    print(json.dumps(answer, ensure_ascii=False))


def print_answer_speed(last: RequestOutput, first_s: float, rest_s: float) -> None:
    """Print a line after an answer, in a terminal: tokens, and the seconds to the first one and for the others."""
    if sys.stderr.isatty():
        speed = (last.num_generated - 1) / max(rest_s, 1e-9)
        cached = f" ({last.num_cached_tokens} cached)" if last.num_cached_tokens else ""
        print(
            f"[{len(last.request.prompt)} prompt tokens{cached}, {last.num_generated} generated; "
            f"first token after {first_s:.1f} s, then {speed:.1f} tokens/s; finish reason: {last.finish_reason}]",
            file=sys.stderr,
        )


# --- summaries of runs ---


def print_batch(
    summary: BatchSummary, files: Sequence[str], config: BatchConfig, *, is_complete: bool, as_json: bool
) -> None:
    """Print the summary of a batch."""
    if as_json:
        print(json.dumps({"output": config.output, **vars(summary)}))
        return
    from qwen_dist.batch.progress import count_errors, count_left, describe_summary

    kinds = count_errors(config.output) if summary.num_errors else {}
    num_left = None if is_complete else count_left(files, config, summary)
    print(describe_summary(summary, config.output, kinds, num_left=num_left))


def print_training(summary: TrainSummary, *, as_json: bool) -> None:
    """Print the summary of a training run."""
    from qwen_dist.train.console import count

    if as_json:
        print(json.dumps(vars(summary)))
    elif summary.is_stopped:
        print(f"stopped and saved after step {summary.steps}; the same command resumes the run")
    else:
        loss = "" if summary.loss is None else f", loss {summary.loss:.4f}"
        print(f"{count(summary.steps, 'step')}{loss}: {summary.result}")


# --- checkpoints, kernels ---


def print_devices(
    processes: Processes, devices: Sequence[jax.Device], sharding_ctx: ShardingContext, *, as_json: bool
) -> None:
    """Print the processes with their devices, and the mesh."""
    kind = devices[0].device_kind
    if as_json:
        names, mesh = list(processes.names), dict(sharding_ctx.mesh.shape)
        print(json.dumps({"processes": names, "devices": len(devices), "kind": kind, "mesh": mesh}))
        return
    for process, who in enumerate(processes.names):
        own = sum(device.process_index == process for device in devices)
        print(f"{who}: {own} {kind} {'device' if own == 1 else 'devices'}")
    print(sharding_ctx.describe())
    answering = "the process" if processes.count == 1 else f"all {processes.count} processes"
    with_devices = "its device" if len(devices) == 1 else f"{len(devices)} devices"
    print(f"{answering} and {with_devices} respond")


def print_kernels(*, as_json: bool) -> None:
    """Print for each operation the implementations that are tried on each backend, and the backends of this machine."""
    import jax

    from qwen_dist.ops import native_library
    from qwen_dist.ops.dispatch import Backend
    from qwen_dist.ops.table import dispatch_table

    table = dispatch_table()
    here = {phase: Backend.of_platform(jax.default_backend(), 1, phase) for phase in ("inference", "train")}
    builds, build = native_library.available_builds(), native_library.active_build()
    if as_json:
        ops = {op: {backend.value: list(names) for backend, names in row.items()} for op, row in table.items()}
        backends = {phase: backend.value for phase, backend in here.items()}
        print(json.dumps({"ops": ops, "this_machine": backends, "cpu_builds": builds, "cpu_build": build}))
        return
    from rich.table import Table

    shown = Table("operation", *(backend.value for backend in Backend))
    for op, row in table.items():
        shown.add_row(op, *("\n".join(row[backend]) for backend in Backend))
    console = make_console()
    console.print(shown)
    console.print("The first implementation of a cell that takes the arguments runs; the plain form takes all.")
    console.print("This machine, one device: " + ", ".join(f"{phase} {backend.value}" for phase, backend in here.items()))
    console.print(f"Builds of the CPU kernels for this processor: {' '.join(builds) or 'none'}; in use: {build}")

"""`qwen-dist batch`: answer every line of a file."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from qwen_dist.cli.commands import EXIT_INTERRUPTED
from qwen_dist.cli.console import announcer, loading, make_console, print_batch
from qwen_dist.cli.flags import ProcessFlags, Verb
from qwen_dist.cli.session import DEMO_MODEL, catch_interrupt, joined, paths_read
from qwen_dist.config import BatchConfig, parse_bytes
from qwen_dist.outputs import Written, check_paths
from qwen_dist.runtime.backend import start_jax

if TYPE_CHECKING:
    from qwen_dist.batch.run import BatchSummary
    from qwen_dist.engine.engine import Engine, EngineStats
    from qwen_dist.engine.request import SamplingParams
    from qwen_dist.runtime.distributed import Processes, Replica
    from qwen_dist.tokenizer import Tokenizer

EXAMPLES = """\
example:
  qwen-dist batch --config configs/batch.py --model ~/qwen3-0.6b --input in.jsonl --output out.jsonl"""


def run(config: BatchConfig, flags: ProcessFlags) -> int:
    """Answer the records that have no result yet."""
    from qwen_dist.storage.records import RECORD_SUFFIXES, find_files

    files = find_files([config.input], RECORD_SUFFIXES, "--input")
    with joined("batch", config, flags, num_replicas=config.num_replicas, inputs=files) as processes:
        if processes.is_main:
            _check_paths(files, config, flags.config)
        start_jax(flags.num_cpu_devices, config.model.dtype)
        processes.check_devices()
        # Ctrl-C handling is for one process only: several would have to stop at the same record.
        with contextlib.nullcontext(lambda: False) if processes.count > 1 else catch_interrupt() as stopped:
            summary = _run_shard(files, config, processes, stopped, quiet=flags.json or not processes.is_main)
            print_batch(summary, files, config, is_complete=not stopped(), as_json=flags.json)
            return EXIT_INTERRUPTED if stopped() else 0


def _check_paths(files: Sequence[str], config: BatchConfig, config_file: str | None) -> None:
    from qwen_dist.batch.manifest import check_manifest
    from qwen_dist.batch.output import paths_written

    written = paths_written(config.output)
    written.append(Written("--chart", config.chart, is_page=True))
    written.append(Written("--profile", config.profile, is_directory=True))
    read = paths_read(config.model.path, config_file, config.model.adapter)
    check_paths({"--input": [config.input, *files], **read}, written)
    check_manifest(config.output)


def _run_shard(
    files: Sequence[str], config: BatchConfig, processes: Processes, stopped: Callable[[], bool], *, quiet: bool
) -> BatchSummary:
    """Run this process's shard of a batch. On process 0 the summary counts all processes."""
    from qwen_dist.batch.manifest import result_settings, write_manifest
    from qwen_dist.batch.progress import batch_progress
    from qwen_dist.batch.run import BatchSummary, run_batch
    from qwen_dist.batch.shard import open_shard
    from qwen_dist.runtime.distributed import assign_replica

    replica, settings = assign_replica(processes, config.num_replicas), result_settings(config)
    shard = open_shard(
        files,
        config.output,
        processes,
        replica,
        settings=json.dumps(settings),
        overwrite=config.overwrite,
        retry_errors=config.retry_errors,
        keep_order=config.keep_order,
        max_line_bytes=parse_bytes(config.max_line_size),
    )
    with shard as (records, results), _monitors(config, processes, quiet=quiet) as watch:
        engine, tokenizer, sampling = _open_engine(config, processes, replica, quiet=quiet)
        if processes.is_main:
            write_manifest(config, settings, BatchSummary(num_before=results.num_before), is_complete=False)
        with batch_progress(files, config, results.num_before, make_console(stderr=True, quiet=quiet)) as show:

            def report(summary: BatchSummary, stats: EngineStats) -> None:
                results.collect()
                show(summary, stats)
                watch(summary, stats)

            summary = run_batch(
                engine,
                tokenizer,
                sampling,
                records,
                results,
                raw=config.raw,
                variables=config.chat.variables,
                report=report,
                should_stop=stopped,
            )
        summary = results.finish(summary, not stopped())
    if processes.is_main:
        write_manifest(config, settings, summary, is_complete=not stopped())
    return summary


def _open_engine(
    config: BatchConfig, processes: Processes, replica: Replica, *, quiet: bool
) -> tuple[Engine, Tokenizer, SamplingParams]:
    from qwen_dist.engine.open import open_engine

    with loading(quiet=quiet) as progress:
        return open_engine(
            config.model,
            config.mesh,
            config.sampling,
            **config.engine.arguments(),
            template_variables=config.chat.variables,
            devices=replica.devices(),
            progress=progress,
            announce=announcer(processes, quiet=quiet),
        )


@contextlib.contextmanager
def _monitors(
    config: BatchConfig, processes: Processes, *, quiet: bool
) -> Iterator[Callable[[BatchSummary, EngineStats], None]]:
    """Yield the callback for the monitors that the configuration enables: metrics, profile, chart; print a final table."""
    from qwen_dist.batch.metrics import metrics_server
    from qwen_dist.batch.progress import series_table
    from qwen_dist.batch.series import TimeSeries, write_chart
    from qwen_dist.engine.profile import profiling

    series = TimeSeries()
    with contextlib.ExitStack() as stack:
        watches: list[Callable[[BatchSummary, EngineStats], None]] = [series.add]
        if processes.is_main and config.chart:
            stack.callback(write_chart, config.chart, series)
        if processes.is_main and config.metrics_port is not None:
            watches.append(stack.enter_context(metrics_server(config.metrics_port, config.metrics_host)))
        if processes.is_main and config.profile:
            tick = stack.enter_context(profiling(config.profile))
            watches.append(lambda summary, stats: tick())

        def watch(summary: BatchSummary, stats: EngineStats) -> None:
            for one in watches:
                one(summary, stats)

        yield watch
        if len(series.samples) > 1 and series.samples[-1].num_generated_tokens:
            make_console(stderr=True, quiet=quiet).print(series_table(series))


VERB = Verb("batch", BatchConfig, ProcessFlags, run, EXAMPLES, defaults=DEMO_MODEL)

"""Speed and memory of a batch from 200 to 5,000 prompts, and the scheduler's time at 256 concurrent requests.

    python benchmarks/growth.py [--model DIR] [--counts 200,5000]

The default is the demonstration model, which is so small that the host's work dominates. The same 200 prompts repeat under
different ids. The counts alternate, and each is repeated until it has answered as many prompts as the largest count: each
then runs for about the same time, so that other load on the machine affects all of them alike. The table shows medians of
the rounds. All programs are compiled and warmed up first; memory is the process's peak, also printed after each round. The
scheduler's thread has to wait for a core while all cores compute a step, so its CPU time is also given.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

from batch import timed

import qwen_dist
from qwen_dist.batch.jsonl import read_records
from qwen_dist.batch.output import OutputFile
from qwen_dist.batch.run import run_batch
from qwen_dist.config import ModelOptions, SamplingOptions
from qwen_dist.engine.engine import Engine, EngineStats
from qwen_dist.engine.open import open_engine
from qwen_dist.runtime.backend import start_jax

DEMONSTRATION = pathlib.Path(qwen_dist.__file__).parent / "demo" / "model"
Run = Callable[[int], tuple[float, int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMONSTRATION), help="checkpoint directory")
    parser.add_argument("--counts", default="200,5000", help="numbers of prompts, separated by commas")
    parser.add_argument("--rounds", type=int, default=2)
    options = parser.parse_args()
    start_jax(None, "float32")
    run, _ = open_batch(options.model, max_batch_size=16)
    run(200)
    speeds: dict[int, list[tuple[float, float]]] = {count: [] for count in map(int, options.counts.split(","))}
    for _ in range(options.rounds):
        for count, of_count in speeds.items():
            begin = time.process_time()
            runs = [run(count) for _ in range(max(speeds) // count)]
            seconds, tokens = (sum(column) for column in zip(*runs, strict=True))
            of_count.append((tokens / seconds, tokens / (time.process_time() - begin)))
            print(f"{count} prompts: {of_count[-1][0]:.1f} tokens/s, peak memory {peak_gb():.3f} GB", file=sys.stderr)
    for count, of_count in speeds.items():
        wall, processor = (statistics.median(column) for column in zip(*of_count, strict=True))
        print(f"{count:6} prompts {wall:9.1f} tokens/s, {processor:.1f} tokens per CPU second")
    print(f"peak memory {peak_gb():.3f} GB")
    milliseconds: list[float] = []
    running: list[int] = []
    # Measure with one clock at a time: the system call for thread time is a point where the thread may lose its core.
    for clock in (time.perf_counter, time.thread_time):
        schedule_seconds: list[float] = []
        build_seconds: list[float] = []
        run, engine = open_batch(options.model, max_batch_size=256, watch=lambda stats: running.append(stats.num_running))
        timed(engine._scheduler, "schedule", schedule_seconds, clock)
        timed(engine._batches, "build", build_seconds, clock)
        run(2000)
        milliseconds.append(1e3 * (statistics.mean(schedule_seconds) + statistics.mean(build_seconds)))
    print(
        f"scheduler: {milliseconds[0]:.3f} ms per step, of which {milliseconds[1]:.3f} ms is CPU time; "
        f"at most {max(running)} running requests, {statistics.mean(running):.0f} on average"
    )


def open_batch(
    model: str, *, max_batch_size: int, watch: Callable[[EngineStats], None] = lambda stats: None
) -> tuple[Run, Engine]:
    """Return a function (count) -> (seconds, tokens) that answers prompts from file to file, and the engine."""
    sampling = SamplingOptions(temperature=0.0)
    engine, tokenizer, params = open_engine(ModelOptions(model, "float32"), "", sampling, max_batch_size=max_batch_size)
    tokenizer.stop_ids = frozenset()

    def run(count: int) -> tuple[float, int]:
        with tempfile.TemporaryDirectory() as directory:
            input, output = f"{directory}/in.jsonl", f"{directory}/out.jsonl"
            with open(input, "w") as file:
                file.writelines(json.dumps(record(number)) + "\n" for number in range(count))
            with OutputFile(output) as writer:
                summary = run_batch(
                    engine, tokenizer, params, read_records(input), writer, report=lambda summary, stats: watch(stats)
                )
        assert (summary.num_answered, summary.num_errors) == (count, 0)
        return summary.seconds, summary.num_generated_tokens

    return run, engine


def record(number: int) -> dict[str, object]:
    kind = number % 200
    return {"id": number, "prompt": "Which is more, 3 or 7? " * (1 + kind * 7 % 13), "max_new_tokens": 4 + kind * 11 % 61}


def peak_gb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


if __name__ == "__main__":
    main()

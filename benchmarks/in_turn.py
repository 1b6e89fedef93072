"""Compare prefill and decode with those of another checkout, where the machine's speed changes from second to second.

    python benchmarks/in_turn.py --other ../before --model CHECKPOINT_DIR [--dtype bfloat16] [--rounds 12] [--decode 1,8,32]

Both checkouts have the model open at the same time, each in a process with its own `.venv`, and take turns of a few
seconds. The first round is discarded. The table has the medians in tokens per second, and the median and the two quartiles
of the ratios of two turns that follow each other. A ratio above 1 means that this tree is faster. compare.py has the rest:
loading, the first token, files of prompts, training.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent.parent
FEW_ROWS, TURNS_OF_FEW_ROWS = 2, 4  # steps that are limited by memory vary the most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", required=True, metavar="DIR", help="the other checkout")
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint directory")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--prefill", type=int, default=512, metavar="N", help="tokens of the prompt; 0: no prefill")
    parser.add_argument("--decode", default="1,8,32", help="batch sizes, separated by commas")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}; give at least 2, of which the quartiles are")
    trees = {"this": HERE, "other": pathlib.Path(options.other).resolve()}
    workers = {tree: start(root, options) for tree, root in trees.items()}
    turns: dict[str, dict[str, list[float]]] = {}
    for round_number in range(options.rounds + 1):
        for name, rows in measurements(options):
            speeds = turns.setdefault(name, {tree: [] for tree in trees})
            for _ in range(TURNS_OF_FEW_ROWS if 0 < rows <= FEW_ROWS else 1):
                # The order changes, so that neither tree is always the second.
                for tree in list(trees)[:: 1 if len(speeds["this"]) % 2 else -1]:
                    speed = ask(workers[tree], rows)
                    speeds[tree] += [speed] if round_number else []
        print(f"round {round_number} of {options.rounds}", file=sys.stderr)
    for worker in workers.values():
        worker.communicate()
    print_table(options, turns)


def measurements(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Return what to measure: a name, and the number of rows that decode, 0 for prefill."""
    prefill = [(f"prefill {options.prefill}", 0)] if options.prefill else []
    return prefill + [(f"decode B={rows}", rows) for rows in map(int, options.decode.split(","))]


def start(root: pathlib.Path, options: argparse.Namespace) -> subprocess.Popen[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{root}{os.pathsep}{root / 'benchmarks'}"}
    command = [str(root / ".venv/bin/python"), "-P", __file__, "--worker", "--other", ".", "--model", options.model]
    command += ["--dtype", options.dtype, "--prefill", str(options.prefill)]
    worker = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "ready\n", "the worker has failed"
    return worker


def ask(worker: subprocess.Popen[str], rows: int) -> float:
    """Return a worker's tokens per second."""
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(f"{rows}\n")
    worker.stdin.flush()
    return float(worker.stdout.readline())


def work(options: argparse.Namespace) -> None:
    import inference  # of the checkout that is measured

    generate, _ = inference.open_qwen_dist(options.model, options.dtype)
    print("ready", flush=True)
    for number, line in enumerate(sys.stdin):
        rows, first = int(line), 1000 + 7 * number  # other tokens each time: no prefix of them is in a cache
        if rows == 0:
            begin = time.perf_counter()
            generate([[first + 3 * position for position in range(options.prefill)]], 1)
            speed = options.prefill / (time.perf_counter() - begin)
        else:
            prompts = [[first + 50 * row + position for position in range(32)] for row in range(rows)]
            (begin, before), *_, (end, after) = generate(prompts, 33)
            speed = (after - before) / (end - begin)
        print(speed, flush=True)


def print_table(options: argparse.Namespace, turns: dict[str, dict[str, list[float]]]) -> None:
    import processor

    print(f"{processor.describe('jax')}; {options.dtype}")
    print(f"{'':16}{'this':>10}{'other':>10}{'ratio':>8}{'quartiles':>14}{'turns':>7}")
    for name, speeds in turns.items():
        this, other = (statistics.median(speeds[tree]) for tree in ("this", "other"))
        ratios = [mine / theirs for mine, theirs in zip(speeds["this"], speeds["other"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(f"{name:16}{this:10.2f}{other:10.2f}{middle:7.3f}×{low:8.2f}-{high:.2f}{len(ratios):8}")


if __name__ == "__main__":
    main()

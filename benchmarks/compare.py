"""Compare the speed of this tree with that of another checkout of this project: the same benchmarks, in turn.

    git worktree add ../before REV && (cd ../before && python3 -m venv .venv && .venv/bin/pip install -e '.[dev]')
    python benchmarks/compare.py --other ../before --model CHECKPOINT_DIR [--rounds 3] [--only inference,moe]

Each measurement runs in a fresh process of each tree, with that tree's own `.venv`, `--rounds` times; a first round warms
the page cache and the compilation cache and is discarded. The table has medians, their ratio, and the ratio of the best
rounds, which other work on the machine affects less. A ratio above 1 means that this tree is faster. `moe.py` writes its
checkpoint to `--folder` if it is not there.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).parent.parent
# Of the values that the workers report: times, and parts of the names of those that do not measure speed (" tokens" matches
# "prompt tokens" and "generated tokens"). All others are speeds.
TIMES = ("load", "first token", "seconds", "processor")
NOT_SPEEDS = ("memory", "GB", "loss", "busy", "waiting", "waste", "running", " tokens", "scheduler")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", required=True, metavar="DIR", help="the other checkout")
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint of inference, batch and finetune")
    parser.add_argument("--folder", metavar="DIR", help="checkpoint of moe; without it, moe is left out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="inference,batch,moe,finetune")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--prompts", type=int, default=200, help="of batch")
    parser.add_argument("--rows", type=int, default=4, help="in a step of finetune")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of finetune")
    options = parser.parse_args()
    if "moe" in options.only.split(",") and options.folder and not (pathlib.Path(options.folder) / "config.json").exists():
        import moe

        moe.make_checkpoint(pathlib.Path(options.folder))
    trees = {"this": HERE, "other": pathlib.Path(options.other).resolve()}
    print_processor()
    print(f"{'':42}{'this':>12}{'other':>12}{'ratio':>8}{'of bests':>9}")
    for name, script, arguments in workers(options):
        results: dict[str, list[dict[str, float]]] = {tree: [] for tree in trees}
        for round_number in range(options.rounds + 1):
            # The order changes, so that neither tree always runs on the warmer machine.
            for tree, root in list(trees.items())[:: 1 if round_number % 2 else -1]:
                result = run(root, script, arguments)
                print(f"{name} round {round_number} {tree}: {result}", file=sys.stderr, flush=True)
                if round_number:
                    results[tree].append(result)
        print_rows(name, results)


def workers(options: argparse.Namespace) -> list[tuple[str, str, list[str]]]:
    """Return what to measure: a name, the benchmark's script, and the arguments of its worker."""
    only, model, found = options.only.split(","), ["--model", options.model], []
    prompts, steps = ["--prompts", str(options.prompts)], ["--rows", str(options.rows), "--steps", str(options.steps)]
    for dtype in options.dtypes.split(","):
        if "inference" in only:
            found.append((f"inference {dtype}", "inference.py", [*model, "--worker", "qwen_dist", dtype]))
        if "batch" in only:
            found.append((f"batch {dtype}", "batch.py", [*model, "--dtype", dtype, *prompts, "--worker", "qwen_dist"]))
        if "moe" in only and options.folder:
            found.append((f"moe {dtype}", "moe.py", ["--folder", options.folder, "--worker", "qwen_dist", dtype]))
        if "finetune" in only:
            for method in ("full", "lora"):
                worker = ["--worker", "qwen_dist", method, dtype]
                found.append((f"finetune {method} {dtype}", "finetune.py", [*model, *steps, *worker]))
    return found


def run(root: pathlib.Path, script: str, arguments: list[str]) -> dict[str, float]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(root), "BENCHMARK_STARTED": repr(time.time())}
    command = [str(root / ".venv/bin/python"), str(root / "benchmarks" / script), *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def print_rows(name: str, results: dict[str, list[dict[str, float]]]) -> None:
    for key, value in results["this"][0].items():
        if isinstance(value, int | float) and not any(word in key for word in NOT_SPEEDS):
            is_time = key in TIMES
            mine, other = ([result[key] for result in results[tree]] for tree in ("this", "other"))
            medians = [statistics.median(values) for values in (mine, other)]
            bests = [min(values) if is_time else max(values) for values in (mine, other)]
            ratios = [theirs / ours if is_time else ours / theirs for ours, theirs in (medians, bests)]
            print(f"{name:24}{key:18}{medians[0]:12.3f}{medians[1]:12.3f}{ratios[0]:7.2f}×{ratios[1]:7.2f}×", flush=True)


def print_processor() -> None:
    info = pathlib.Path("/proc/cpuinfo")
    features = info.read_text().split() if info.exists() else []
    print(f"{os.cpu_count()} cores; avx512_bf16 {'yes' if 'avx512_bf16' in features else 'no'}")


if __name__ == "__main__":
    main()

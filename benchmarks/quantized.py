"""Compare weights in 8 and 4 bits with bfloat16: speed, memory, and what it costs; one table, one run.

    python benchmarks/quantized.py --model CHECKPOINT_DIR [--forms "bfloat16;int8;int4"] [--rounds 2] [--instructions avx2]

Every measurement runs in a fresh process, the forms in turn, `--rounds` times, after a round that warms the caches and is
discarded; the table has medians. "prefill" and "decode" are those of inference.py, in tokens per second. "weights" is the
sum of all arrays in GB, and "resident" by how much loading grows the process, divided by that sum. The divergences are
those of `qwen-dist parity --kl`: from the checkpoint in bfloat16, over the first `--tokens` tokens of a text. The forms
Q8_0 and Q4_0 are those of llama.cpp, which quantises the head as well: `pip install xllamacpp gguf`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import inference
import processor

ROOT = Path(__file__).resolve().parents[1]
DTYPE = "bfloat16"
# By name of a form, what it gives `config.ModelOptions`.
FORMS: dict[str, dict[str, Any]] = {
    "bfloat16": {},
    "int8": {"quantize": "int8"},
    "int4": {"quantize": "int4"},
    "int4 g128": {"quantize": "int4", "quantize_group_size": 128},
    "fp8": {"quantize": "fp8"},
    "int8, head": {"quantize": "int8", "quantize_head": True},
    "int4, head": {"quantize": "int4", "quantize_head": True},
}
LLAMA_CPP = ("Q8_0", "Q4_0")
DIVERGENCES = {"mean": ".5f", "median": ".5f", "tail": ".4f", "top_1": ".2%"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--forms", default=";".join(FORMS), help="which to compare, separated by semicolons")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prefill", default="512", help="prompt lengths, separated by commas")
    parser.add_argument("--decode", default="1,8,32", help="batch sizes, separated by commas")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--text", default=str(ROOT / "docs" / "finetune.md"), help="what the divergences are of")
    parser.add_argument("--tokens", type=int, default=2048, help="of the text; 0 for no divergences")
    parser.add_argument("--worker", metavar="FORM", help=argparse.SUPPRESS)
    processor.add_flag(parser)
    options = parser.parse_args()
    processor.limit(options)
    if options.worker:
        print(json.dumps(work(options)))
        return
    measured: dict[str, list[dict[str, float]]] = {form: [] for form in options.forms.split(";")}
    for number in range(options.rounds + 1):
        for form, rounds in measured.items():
            result = run_worker(options, form)
            rounds += [result] if number > 0 else []
            print(f"round {number} {form}: {result}", file=sys.stderr)
    divergences = {form: divergence(options, form) for form in measured if FORMS.get(form) and options.tokens}
    print_table(measured, divergences)


def run_worker(options: argparse.Namespace, form: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--model", options.model, "--worker", form]
    command += ["--prefill", options.prefill, "--decode", options.decode, "--steps", str(options.steps)]
    environment = os.environ | {"BENCHMARK_STARTED": repr(time.time()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(options: argparse.Namespace) -> dict[str, float]:
    """Return the measurements of one form in this process, by name."""
    if options.worker in LLAMA_CPP:
        import llama_cpp

        size = llama_cpp.gguf_file(options.model, options.worker).stat().st_size
        memory = {"weights": size / 1e9, "resident": float("nan")}
        speed = inference.measure(options, lambda: inference.open_llama_cpp(options.model, options.worker))
    else:
        form = FORMS[options.worker]
        memory = measure_memory(options.model, form)
        speed = inference.measure(options, lambda: inference.open_qwen_dist(options.model, DTYPE, **form))
    return memory | {name: value for name, value in speed.items() if name.startswith(("prefill", "decode"))}


def measure_memory(model: str, form: dict[str, Any]) -> dict[str, float]:
    """Load the weights once; return their bytes, and by how much the process grew."""
    import jax

    from qwen_dist.checkpoint.model import load_model
    from qwen_dist.mesh import MeshConfig, make_mesh
    from qwen_dist.quantization.options import QuantizeOptions
    from qwen_dist.runtime.backend import start_jax
    from qwen_dist.sharding import INFERENCE, ShardingContext

    start_jax(None, DTYPE)
    context = ShardingContext(make_mesh(MeshConfig(), jax.devices()[:1]), INFERENCE)
    quantize = QuantizeOptions.of(
        form.get("quantize", "none"), form.get("quantize_group_size"), has_head=form.get("quantize_head", False)
    )
    before = resident_bytes()
    loaded = load_model(model, context, dtype=DTYPE, quantize=quantize)
    jax.block_until_ready(loaded.parameters)
    weights = sum(array.nbytes for array in loaded.parameters.values())
    return {"weights": weights / 1e9, "resident": (resident_bytes() - before) / weights}


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def divergence(options: argparse.Namespace, form: str) -> dict[str, float]:
    """Return what `qwen-dist parity --kl` prints, from a new process."""
    given = FORMS[form]
    command = [sys.executable, "-m", "qwen_dist", "parity", "--model", options.model, "--dtype", DTYPE, "--json"]
    command += ["--kl", options.text, f"--config.kl_tokens={options.tokens}", "--quantize", given["quantize"]]
    if "quantize_group_size" in given:
        command += ["--quantize-group-size", str(given["quantize_group_size"])]
    if given.get("quantize_head"):
        command += ["--config.model.quantize_head=True"]
    result = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    print(f"{form}: {result}", file=sys.stderr)
    return result


def print_table(measured: dict[str, list[dict[str, float]]], divergences: dict[str, dict[str, float]]) -> None:
    print(processor.describe("jax", "flax"))
    names = list(next(iter(measured.values()))[0])
    print(f"{'':12}" + "".join(f"{name:>13}" for name in names))
    for form, rounds in measured.items():
        values = [statistics.median(one[name] for one in rounds) for name in names]
        print(f"{form:12}" + "".join(f"{value:13.2f}" for value in values))
    if not divergences:
        return
    count = next(iter(divergences.values()))["num_tokens"]
    print(f"\nKL from bfloat16 over {count} tokens")
    print(f"{'':12}{'mean':>13}{'median':>13}{'99.9 %':>13}{'same top 1':>13}")
    for form, found in divergences.items():
        print(f"{form:12}" + "".join(f"{found[name]:>13{spec}}" for name, spec in DIVERGENCES.items()))


if __name__ == "__main__":
    main()

"""Compare with transformers (PyTorch) or llama.cpp: loading, first token, prefill, decode, memory; one table, one run.

    python benchmarks/inference.py --model CHECKPOINT_DIR [--dtypes bfloat16,float32] [--rounds 3] [--instructions avx2]
        [--peer llama.cpp]

Every measurement runs in a fresh process, the two systems in turn, `--rounds` times; the table has medians. An extra
first round warms the page cache and the compilation cache and is discarded. "first token" is the time from the start of
the process to the first token of a 38-token chat prompt. "decode" counts the tokens after every sequence has its first
one; each of the 32-token prompts gets `--steps` + 1 tokens. A ratio above 1 means that this project is better. The last
lines say at what rate a step of one sequence reads the weights, and how much of the memory's rate that is.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import processor

# A system: (prompts as token ids, or None for the question; tokens per prompt) -> (time, number of tokens so far) after
# each step, from the step in which every prompt has its first token.
Generate = Callable[[list[list[int]] | None, int], list[tuple[float, int]]]
QUESTION = "Write a Python function that checks whether a number is prime."
UNITS = {"load": "s", "first token": "s", "peak memory": "GB"}  # lower is better; all others are tokens per second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill", default="512", help="prompt lengths, separated by commas")
    parser.add_argument("--decode", default="1,8,32", help="batch sizes, separated by commas")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--peer", default="transformers", choices=["transformers", "llama.cpp"])
    parser.add_argument("--json", help="also write every measurement to this file")
    parser.add_argument("--worker", nargs=2, metavar=("SYSTEM", "DTYPE"), help=argparse.SUPPRESS)
    processor.add_flag(parser)
    options = parser.parse_args()
    processor.limit(options)
    if options.worker:
        print(json.dumps(work(options)))
        return
    measured = {dtype: {system: [] for system in ("qwen_dist", options.peer)} for dtype in options.dtypes.split(",")}
    for dtype, systems in measured.items():
        for round_number in range(options.rounds + 1):
            for system, rounds in systems.items():
                result = run_worker(options, system, dtype)
                if round_number > 0:
                    rounds.append(result)
                print(f"{dtype} round {round_number} {system}: {result}", file=sys.stderr)
    print_table(measured)
    print_read_rates(options.model, measured)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(measured, file)


def run_worker(options: argparse.Namespace, system: str, dtype: str) -> dict[str, float]:
    command = [sys.executable, __file__, "--model", options.model, "--worker", system, dtype]
    command += ["--prefill", options.prefill, "--decode", options.decode, "--steps", str(options.steps)]
    environment = os.environ | {"BENCHMARK_STARTED": repr(time.time()), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def work(options: argparse.Namespace) -> dict[str, float]:
    """Return the measurements of one system in this process, by name."""
    system, dtype = options.worker
    open_system = {"qwen_dist": open_qwen_dist, "transformers": open_transformers, "llama.cpp": open_llama_cpp}[system]
    return measure(options, lambda: open_system(options.model, dtype))


def measure(options: argparse.Namespace, open_system: Callable[[], tuple[Generate, float]]) -> dict[str, float]:
    """Return the measurements of a system that is opened in this process, by name."""
    started = float(os.environ["BENCHMARK_STARTED"])
    generate, load_seconds = open_system()
    result = {"load": load_seconds}
    generate(None, 1)
    result["first token"] = time.time() - started
    for length in map(int, options.prefill.split(",")):
        generate([list(range(1000 + length, 1000 + 2 * length))], 1)
        begin = time.perf_counter()
        generate([list(range(2000 + length, 2000 + 2 * length))], 1)  # no prefix of it is in the cache
        result[f"prefill {length}"] = length / (time.perf_counter() - begin)
    for batch in map(int, options.decode.split(",")):
        prompts = [list(range(1000 + 50 * row, 1032 + 50 * row)) for row in range(batch)]
        generate(prompts, 3)
        (start, before), *_, (end, after) = generate(prompts, options.steps + 1)
        result[f"decode B={batch}"] = (after - before) / (end - start)
    result["peak memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return result


def open_qwen_dist(path: str, dtype: str, **options: Any) -> tuple[Generate, float]:
    from qwen_dist.config import ModelOptions, SamplingOptions
    from qwen_dist.engine.open import open_engine
    from qwen_dist.engine.request import Request, SamplingParams
    from qwen_dist.runtime.backend import start_jax

    start_jax(None, dtype)
    begin = time.perf_counter()
    engine, tokenizer, _ = open_engine(ModelOptions(path, dtype, **options), "", SamplingOptions())
    seconds = time.perf_counter() - begin
    tokenizer.stop_ids = frozenset()

    def generate(prompts: list[list[int]] | None, num_tokens: int) -> list[tuple[float, int]]:
        prompts = prompts or [tokenizer.apply_chat_template([{"role": "user", "content": QUESTION}])]
        params = SamplingParams(max_new_tokens=num_tokens)
        requests = [Request(row, tuple(prompt), params) for row, prompt in enumerate(prompts)]
        times, begun, count = [], set(), 0
        for update in engine.run(requests):
            begun.add(update.request.key)
            count += len(update.tokens)
            if len(begun) == len(requests):
                times.append((time.perf_counter(), count))
        return times

    return generate, seconds


def open_transformers(path: str, dtype: str, **options: str) -> tuple[Generate, float]:
    import torch
    import transformers

    begin = time.perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype), **options)
    seconds = time.perf_counter() - begin

    class Clock(transformers.StoppingCriteria):
        def __init__(self) -> None:
            self.times: list[tuple[float, int]] = []

        def __call__(self, input_ids, scores, **kwargs):  # type: ignore[no-untyped-def]
            self.times.append((time.perf_counter(), len(input_ids) * (len(self.times) + 1)))
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def generate(prompts: list[list[int]] | None, num_tokens: int) -> list[tuple[float, int]]:
        clock = Clock()
        if prompts is None:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
            )
            prompts = [tokenizer(text)["input_ids"]]
        model.generate(
            torch.tensor(prompts),
            attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
            do_sample=False,
            repetition_penalty=1.0,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            stopping_criteria=transformers.StoppingCriteriaList([clock]),
        )
        return clock.times

    return generate, seconds


def open_llama_cpp(path: str, form: str) -> tuple[Generate, float]:
    """Open llama.cpp on a GGUF file of the same weights; a round with another number of sequences opens it again.

    `form` is a dtype, or the name of one of GGUF's quantised forms.
    """
    import llama_cpp
    import transformers

    file = llama_cpp.gguf_file(path, {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(form, form))
    begin = time.perf_counter()
    opened = {1: llama_cpp.LlamaCpp(file, 1, 4096)}
    seconds = time.perf_counter() - begin

    def generate(prompts: list[list[int]] | None, num_tokens: int) -> list[tuple[float, int]]:
        if prompts is None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path)
            chat = [{"role": "user", "content": QUESTION}]
            prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]]
        if len(prompts) not in opened:
            opened.clear()
            opened[len(prompts)] = llama_cpp.LlamaCpp(file, len(prompts), 256)
        return opened[len(prompts)].generate(prompts, num_tokens)

    return generate, seconds


def print_table(measured: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    peer = list(next(iter(measured.values())))[1]
    print(processor.describe("jax", "flax", "torch", {"llama.cpp": "xllamacpp"}.get(peer, peer)))
    print(f"{'':24}{'qwen_dist':>12}{peer:>14}{'ratio':>8}")
    for dtype, systems in measured.items():
        for name in systems[peer][0]:
            ours, theirs = (statistics.median(result[name] for result in rounds) for rounds in systems.values())
            ratio = theirs / ours if name in UNITS else ours / theirs
            print(f"{dtype:10}{name:14}{ours:12.2f}{theirs:14.2f}{ratio:7.2f}×  {UNITS.get(name, 'tokens/s')}")


def print_read_rates(model: str, measured: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Print at what rate a decode step of one sequence reads the weights, which are 16-bit floats on disk."""
    plain = processor.read_rate()
    for dtype, systems in measured.items():
        size = sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) * (2 if dtype == "float32" else 1)
        for system, rounds in systems.items():
            if "decode B=1" in rounds[0]:
                rate = statistics.median(result["decode B=1"] for result in rounds) * size / 1e9
                share = f"{rate / plain:.2f} of a plain read's {plain:.1f}"
                print(f"{dtype:10}decode B=1 of {system} reads {rate:.1f} GB/s, {share}")


if __name__ == "__main__":
    main()

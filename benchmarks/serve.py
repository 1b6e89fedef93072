"""Servers over real sockets: tokens/s, and the times to the first token, between tokens and of answers.

    python benchmarks/serve.py [--model CHECKPOINT_DIR] [--dtype bfloat16] [--prompts 64] [--max-new-tokens 64]
        [--at-a-time 1,8,32] [--systems qwen_dist,batch,llama.cpp,vllm] [--vllm-python PYTHON]
        [--url NAME=http://HOST:PORT/v1 …]

Each server is started on a free port and asked for streams of chats, greedily, with 1, 8 and 32 requests open at a time.
No two prompts begin alike, and all servers get the same ones. "batch" answers those of the largest number of requests with
`qwen-dist batch`. "llama.cpp" is the server of xllamacpp on a GGUF file of the same weights (llama_cpp.py); "vllm" needs an
environment of its own (batch.py). --url adds a server that already runs; its model is the first that it lists. Tokens are
those that the server counts in `usage`. Some requests come first and are not counted. Times are seen by a client in this
process, on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import pathlib
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import openai

import qwen_dist

NOUNS = ("compiler", "hash table", "lighthouse", "queue", "telescope", "database", "bridge", "scheduler")
TASKS = (
    "what is {a} plus {b}?",
    "explain in one sentence what a {noun} does.",
    "write a short poem about a {noun}.",
    "here is a note: item {a} is next to item {b}. " * 6 + "List three uses of a {noun}.",
)
SYSTEMS = ("qwen_dist", "batch", "llama.cpp", "vllm")
MAX_LENGTH = 2048
START_S = 900.0  # for a server to load and to compile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(qwen_dist.DEMO_MODEL), help="checkpoint directory (the demonstration model)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=64, help="requests of each measurement")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--at-a-time", default="1,8,32", help="how many requests are open at a time, in each measurement")
    parser.add_argument("--systems", default="qwen_dist,batch", help="of " + ", ".join(SYSTEMS))
    parser.add_argument("--vllm-python", default=sys.executable, help="the interpreter of vLLM's environment")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="another server; may be repeated")
    options = parser.parse_args()
    levels = sorted(int(level) for level in options.at_a_time.split(","))
    systems = options.systems.split(",")
    if wrong := set(systems) - set(SYSTEMS):
        parser.error(f"--systems {', '.join(sorted(wrong))}: it can have {', '.join(SYSTEMS)}")
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors; {options.model}, {options.dtype}")
    print("| server | at a time | tokens/s | first token p50, p99 | between tokens p50, p99 | answer p50, p99 |")
    print("|---|---|---|---|---|---|")
    rates = {}
    for system in systems:
        if system == "batch":
            rates[system] = measure_batch(options, make_prompts(options.prompts, len(levels) - 1), levels[-1])
            print(f"| `qwen-dist batch` | {levels[-1]} | {rates[system]:.1f} | | | |", flush=True)
        else:
            with started_server(system, options, levels[-1]) as url:
                rates[system] = measure_server(system, url, options, levels)[levels[-1]]
    for named in options.url:
        name, _, url = named.partition("=")
        rates[name] = measure_server(name, url, options, levels)[levels[-1]]
    print()
    for name, rate in rates.items():
        if name != "qwen_dist" and "qwen_dist" in rates:
            print(f"qwen_dist / {name} at {levels[-1]} at a time: {rates['qwen_dist'] / rate:.2f}")


def make_prompts(number: int, part: int) -> list[str]:
    """Return prompts that no other part has, and that do not begin as others do."""
    prompts = []
    for index, task in zip(range(number), itertools.cycle(TASKS), strict=False):
        text = task.format(a=3 + index % 40, b=2 + index % 7, noun=NOUNS[index % len(NOUNS)])
        prompts.append(f"{part}.{index}: please, {text}")
    return prompts


@contextlib.contextmanager
def started_server(system: str, options: argparse.Namespace, max_batch_size: int) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = dict(os.environ)
    if system == "qwen_dist":
        command = [sys.executable, "-m", "qwen_dist", "serve", "--model", options.model, "--dtype", options.dtype]
        command += ["--port", str(port), "--max-batch-size", str(max_batch_size)]
    elif system == "llama.cpp":
        form = {"bfloat16": "BF16", "float32": "F32", "float16": "F16"}[options.dtype]
        command = [
            sys.executable,
            str(pathlib.Path(__file__).with_name("llama_cpp.py")),
            "serve",
            options.model,
            "--form",
            form,
        ]
        command += ["--port", str(port), "--slots", str(max_batch_size), "--context", str(MAX_LENGTH)]
    else:
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
        command = [options.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", options.model]
        command += ["--dtype", options.dtype, "--port", str(port), "--host", "127.0.0.1", "--enforce-eager"]
        command += ["--max-model-len", str(MAX_LENGTH), "--max-num-seqs", str(max_batch_size)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/health", process)
            yield f"http://127.0.0.1:{port}/v1"
        except BaseException:
            log.seek(0)
            print(log.read().decode(errors="replace")[-4000:], file=sys.stderr)
            raise
        finally:
            process.terminate()
            process.wait(60)


def wait_until_ready(url: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=10).close()
            return
        time.sleep(0.5)
    state = f"was not ready within {START_S:g} s" if process.poll() is None else f"has ended with {process.returncode}"
    raise SystemExit(f"{process.args} {state}")


def measure_server(name: str, url: str, options: argparse.Namespace, levels: list[int]) -> dict[int, float]:
    """Print a row for each number of requests at a time; return the tokens/s of each."""
    rates = {}
    for part, level in enumerate(levels):
        asyncio.run(ask_all(url, make_prompts(2 * level, len(levels) + part), level, options.max_new_tokens))
        prompts = make_prompts(options.prompts, part)
        start = time.perf_counter()
        answers = asyncio.run(ask_all(url, prompts, level, options.max_new_tokens))
        rates[level] = sum(answer["tokens"] for answer in answers) / (time.perf_counter() - start)
        first, whole = ([answer[which] for answer in answers] for which in ("first_s", "whole_s"))
        gaps = [gap for answer in answers for gap in answer["gaps_s"]]
        times = " | ".join(percentiles(seconds) for seconds in (first, gaps, whole))
        print(f"| {name} | {level} | {rates[level]:.1f} | {times} |", flush=True)
    return rates


async def ask_all(url: str, prompts: list[str], at_a_time: int, max_tokens: int) -> list[dict[str, Any]]:
    room = asyncio.Semaphore(at_a_time)
    async with openai.AsyncOpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"), timeout=3600) as client:
        model = (await client.models.list()).data[0].id

        async def ask(prompt: str) -> dict[str, Any]:
            async with room:
                return await ask_one(client, model, prompt, max_tokens)

        return await asyncio.gather(*map(ask, prompts))


async def ask_one(client: openai.AsyncOpenAI, model: str, prompt: str, max_tokens: int) -> dict[str, Any]:
    start, times, tokens = time.perf_counter(), [], 0
    stream = await client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": prompt}],
        temperature=0,
        max_tokens=max_tokens,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"repetition_penalty": 1.0, "top_k": -1},
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter())
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    end = time.perf_counter()
    gaps = [b - a for a, b in itertools.pairwise(times)]
    return {"tokens": tokens, "first_s": (times[0] if times else end) - start, "gaps_s": gaps, "whole_s": end - start}


def measure_batch(options: argparse.Namespace, prompts: list[str], max_batch_size: int) -> float:
    """Return the tokens/s of `qwen-dist batch` on the same prompts, loading not counted; the second of two runs."""
    with tempfile.TemporaryDirectory() as directory:
        settings = {"temperature": 0, "repetition_penalty": 1.0, "max_new_tokens": options.max_new_tokens}
        chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
        lines = [json.dumps({"messages": chat, **settings}) for chat in chats]
        (pathlib.Path(directory) / "in.jsonl").write_text("\n".join(lines))
        command = [sys.executable, "-m", "qwen_dist", "batch", "--json", "--model", options.model, "--dtype", options.dtype]
        command += ["--input", f"{directory}/in.jsonl", "--output", f"{directory}/out.jsonl", "--overwrite"]
        command += ["--max-batch-size", str(max_batch_size)]
        for _ in range(2):  # the first fills the cache of compiled programs
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    summary = json.loads(done.stdout.splitlines()[-1])
    return summary["num_generated_tokens"] / summary["seconds"]


def percentiles(seconds: list[float]) -> str:
    if len(seconds) < 2:
        return "–"
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return f"{1000 * cuts[49]:.1f}, {1000 * cuts[98]:.1f} ms"


if __name__ == "__main__":
    main()

"""The server over a real socket: tokens/s, time to first token and time between tokens at 1, 8 and 32 requests at a time.

    python benchmarks/serve.py [--model CHECKPOINT_DIR] [--dtype bfloat16] [--prompts 64] [--max-new-tokens 64]
        [--at-a-time 1,8,32] [--url NAME=http://HOST:PORT/v1 …] [--no-batch]

It starts `qwen-dist serve` on a free port, asks it for streams of the same prompts, greedily, and then answers these
prompts with `qwen-dist batch`. --url adds a server that already runs, such as another project's; its model is the first
that it lists. Tokens are those that the server counts in `usage`. The first requests of each server are not counted.
Times are of whole requests, seen by a client in this process on the same machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai

import qwen_dist

NOUNS = ("compiler", "hash table", "lighthouse", "queue", "telescope", "database", "bridge", "scheduler")
TASKS = (
    "What is {a} plus {b}?",
    "Explain in one sentence what a {noun} does.",
    "Write a short poem about a {noun}.",
    "Here is a note: item {a} is next to item {b}. " * 6 + "List three uses of a {noun}.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(qwen_dist.DEMO_MODEL), help="checkpoint directory (the demonstration model)")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prompts", type=int, default=64, help="requests of each measurement")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--at-a-time", default="1,8,32", help="how many requests are open at a time, in each measurement")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="another server; may be repeated")
    parser.add_argument("--no-batch", action="store_true", help="leave `qwen-dist batch` out")
    options = parser.parse_args()
    prompts = list(make_prompts(options.prompts))
    levels = [int(level) for level in options.at_a_time.split(",")]
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} processors; {options.model}, {options.dtype}")
    print("| server | at a time | tokens/s | first token p50, p99 | between tokens p50, p99 |\n|---|---|---|---|---|")
    with started_server(options, max(levels)) as url:
        rates = measure_server("qwen_dist", url, prompts, levels, options.max_new_tokens)
    for named in options.url:
        name, _, url = named.partition("=")
        measure_server(name, url, prompts, levels, options.max_new_tokens)
    if not options.no_batch:
        rate = measure_batch(options, prompts, max(levels))
        print(f"| `qwen-dist batch` | {max(levels)} | {rate:.1f} | | |")
        print(f"\nserver / batch at {max(levels)} at a time: {rates[max(levels)] / rate:.2f}")


def make_prompts(number: int) -> Iterator[str]:
    for index, task in zip(range(number), itertools.cycle(TASKS), strict=False):
        yield task.format(a=3 + index % 40, b=2 + index % 7, noun=NOUNS[index % len(NOUNS)])


@contextlib.contextmanager
def started_server(options: argparse.Namespace, max_batch_size: int) -> Iterator[str]:
    command = [sys.executable, "-m", "qwen_dist", "serve", "--json", "--port", "0", "--model", options.model]
    command += ["--dtype", options.dtype, "--max-batch-size", str(max_batch_size)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"] + "/v1"
    finally:
        process.terminate()
        process.wait(60)


def measure_server(name: str, url: str, prompts: list[str], levels: list[int], max_tokens: int) -> dict[int, float]:
    """Print a row for each number of requests at a time; return the tokens/s of each."""
    rates = {}
    for level in levels:
        asyncio.run(ask_all(url, prompts[: 2 * level], level, max_tokens))
        start = time.perf_counter()
        answers = asyncio.run(ask_all(url, prompts, level, max_tokens))
        rates[level] = sum(answer["tokens"] for answer in answers) / (time.perf_counter() - start)
        first = [answer["first_s"] for answer in answers]
        gaps = [gap for answer in answers for gap in answer["gaps_s"]]
        print(f"| {name} | {level} | {rates[level]:.1f} | {percentiles(first)} | {percentiles(gaps)} |", flush=True)
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
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            times.append(time.perf_counter())
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
    first_s = (times[0] if times else time.perf_counter()) - start
    return {"tokens": tokens, "first_s": first_s, "gaps_s": [b - a for a, b in itertools.pairwise(times)]}


def measure_batch(options: argparse.Namespace, prompts: list[str], max_batch_size: int) -> float:
    """Return the tokens/s of `qwen-dist batch` on the same prompts, loading not counted; the second of two runs."""
    with tempfile.TemporaryDirectory() as directory:
        lines = [
            json.dumps({"prompt": prompt, "temperature": 0, "max_new_tokens": options.max_new_tokens}) for prompt in prompts
        ]
        (Path(directory) / "in.jsonl").write_text("\n".join(lines))
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

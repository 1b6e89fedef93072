"""Measure the prefix cache: requests that share their beginning, with it and without it, in one process, in turn.

    python benchmarks/prefix.py [--model CHECKPOINT_DIR] [--prefix 1000] [--count 100] [--dtype bfloat16]

"together": all requests come at once, and up to `--max-batch-size` are answered at a time; the time to the first token is
the mean over the requests, from the moment when they come. "alone": one request after the other, of which the first fills
the cache and does not count; the time is the median. Each kind has its own prefix. A first round compiles and is discarded.
A ratio above 1 means that the prefix cache is better.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import time

import numpy as np

import qwen_dist.demo
from qwen_dist.checkpoint.model import LoadedModel, load_model
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.mesh import default_mesh, make_mesh
from qwen_dist.runtime.backend import start_jax
from qwen_dist.sharding import INFERENCE, ShardingContext
from qwen_dist.tokenizer import Tokenizer

DEMO_MODEL = pathlib.Path(qwen_dist.demo.__file__).parent / "model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prefix", type=int, default=1000, help="tokens that all prompts share")
    parser.add_argument("--suffix", type=int, default=20, help="tokens of each prompt after them")
    parser.add_argument("--count", type=int, default=100, help="requests together")
    parser.add_argument("--alone", type=int, default=10, help="requests one after the other")
    parser.add_argument("--max-batch-size", type=int, default=32)
    options = parser.parse_args()
    start_jax(None, options.dtype)
    model, tokenizer = load(options.model, options.dtype)
    engines = {
        "without": Engine(model, tokenizer, max_batch_size=options.max_batch_size, prefix_cache=False),
        "with": Engine(model, tokenizer, max_batch_size=options.max_batch_size),
    }
    for round_number in range(2):
        rng = np.random.default_rng(round_number)
        together, alone = (prompts(rng, options, count) for count in (options.count, options.alone + 1))
        results = {name: measure(engine, together, alone) for name, engine in engines.items()}
    print(f"{options.count} requests that share {options.prefix} of {options.prefix + options.suffix} prompt tokens")
    print(f"{'':32} {'without':>10} {'with':>10} {'ratio':>8}")
    for row in results["with"]:
        before, after = results["without"][row], results["with"][row]
        print(f"{row:32} {before:10.4g} {after:10.4g} {before / after:8.1f}")


def load(path: str, dtype: str) -> tuple[LoadedModel, Tokenizer]:
    import jax

    from qwen_dist.hf_config import read_model_config
    from qwen_dist.storage.model_files import ModelFiles

    files = ModelFiles.open(path)
    mesh = make_mesh(default_mesh(read_model_config(files), jax.devices()), jax.devices())
    return load_model(files, ShardingContext(mesh, INFERENCE), dtype=dtype), Tokenizer.open(files)


def prompts(rng: np.random.Generator, options: argparse.Namespace, count: int) -> list[tuple[int, ...]]:
    prefix = rng.integers(300, 400, options.prefix).tolist()
    return [(*prefix, *rng.integers(300, 400, options.suffix).tolist()) for _ in range(count)]


def measure(engine: Engine, together: list[tuple[int, ...]], alone: list[tuple[int, ...]]) -> dict[str, float]:
    computed, first_tokens = answer(engine, together)
    _, *one_by_one = [answer(engine, [prompt])[1][0] for prompt in alone]
    return {
        "prompt tokens computed": computed,
        "first token, together (s)": statistics.mean(first_tokens),
        "first token, alone (s)": statistics.median(one_by_one),
    }


def answer(engine: Engine, prompts: list[tuple[int, ...]]) -> tuple[int, list[float]]:
    """Return how many prompt tokens were computed, and the seconds to the first token of each request."""
    requests = [Request(index, prompt, SamplingParams(max_new_tokens=4)) for index, prompt in enumerate(prompts)]
    computed, first, start = 0, {}, time.perf_counter()
    for update in engine.run(requests):
        first.setdefault(update.request.key, time.perf_counter() - start)
        if update.finish_reason is not None:
            computed += len(update.request.prompt) - update.num_cached_tokens
    return computed, list(first.values())


if __name__ == "__main__":
    main()

"""Measure what structured output costs: decode with it and without it, in one process, in turn.

    python benchmarks/structured.py [--model CHECKPOINT_DIR] [--rows 32] [--tokens 64] [--dtype bfloat16]

"free": a regular expression that every text matches; "schema": a JSON schema. No answer ends before its last token. The
time is of whole answers, prompts included; the fastest of three rounds counts, and a first round compiles. A ratio of 1
means that it costs nothing.
"""

from __future__ import annotations

import argparse
import pathlib
import time

import jax

import qwen_dist.demo
from qwen_dist.checkpoint.model import load_model
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.hf_config import read_model_config
from qwen_dist.mesh import default_mesh, make_mesh
from qwen_dist.runtime.backend import start_jax
from qwen_dist.sharding import INFERENCE, ShardingContext
from qwen_dist.storage.model_files import ModelFiles
from qwen_dist.tokenizer import Tokenizer

DEMO_MODEL = pathlib.Path(qwen_dist.demo.__file__).parent / "model"
_PERSON = {"type": "object", "properties": {"name": {"type": "string"}, "age": {"type": "integer"}}, "required": ["name"]}
FORMS = {
    "without": None,
    "free": {"regex": "(?s:.*)"},
    "schema": {"json": {"type": "array", "items": _PERSON, "minItems": 1000}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEMO_MODEL))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=32, help="answers at a time")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    options = parser.parse_args()
    start_jax(None, options.dtype)
    files = ModelFiles.open(options.model)
    mesh = make_mesh(default_mesh(read_model_config(files), jax.devices()), jax.devices())
    model, tokenizer = load_model(files, ShardingContext(mesh, INFERENCE), dtype=options.dtype), Tokenizer.open(files)
    tokenizer.stop_ids = frozenset()  # no answer ends early
    engine = Engine(model, tokenizer, max_batch_size=options.rows, prefix_cache=False)
    rounds = [{name: answer(engine, tokenizer, options, form) for name, form in FORMS.items()} for _ in range(4)]
    seconds = {name: min(times[name] for times in rounds[1:]) for name in FORMS}
    print(f"{options.rows} answers of {options.tokens} tokens")
    print(f"{'':10} {'tokens/s':>10} {'ratio':>8}")
    for name, time_s in seconds.items():
        print(f"{name:10} {options.rows * options.tokens / time_s:10.1f} {seconds['without'] / time_s:8.3f}")


def answer(engine: Engine, tokenizer: Tokenizer, options: argparse.Namespace, form: dict | None) -> float:
    """Return the seconds of all answers."""
    params = SamplingParams(max_new_tokens=options.tokens, structured_outputs=form)
    prompts = [tuple(tokenizer.encode(f"Here is a list of {number + 2} people:")) for number in range(options.rows)]
    start = time.perf_counter()
    tokens = sum(len(update.tokens) for update in engine.run(Request(n, ids, params) for n, ids in enumerate(prompts)))
    assert tokens == options.rows * options.tokens
    return time.perf_counter() - start


if __name__ == "__main__":
    main()

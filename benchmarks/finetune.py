"""Compare training with transformers (and peft): tokens per second and peak memory, full and LoRA, in one table.

    python benchmarks/finetune.py --model CHECKPOINT_DIR [--dtypes bfloat16,float32] [--methods full,lora] [--rounds 2]

Every measurement runs in a fresh process, the two systems in turn. A step is forward, backward and AdamW on the same rows
of random token ids, with every token in the loss. The first step is discarded; the table has medians of the others.
bfloat16 means float32 weights and bfloat16 products (autocast) on both sides; with LoRA only the adapters are in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version

import numpy as np

SYSTEMS = ("qwen_dist", "transformers")
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RATE, RANK, ALPHA = 1e-5, 16, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="checkpoint directory")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--methods", default="full,lora")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of a process")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each system")
    parser.add_argument("--remat", default="none", help="of this project; see configs/finetune_full.py")
    parser.add_argument("--worker", nargs=3, metavar=("SYSTEM", "METHOD", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options)))
        return
    packages = ("jax", "optax", "torch", "transformers", "peft")
    print(f"{platform.machine()}, {os.cpu_count()} cores; {', '.join(f'{name} {version(name)}' for name in packages)}")
    print(f"{options.rows} rows of {options.length} tokens; remat {options.remat}")
    print(f"{'':36}{'qwen_dist':>12}{'transformers':>14}{'ratio':>8}")
    for dtype in options.dtypes.split(","):
        for method in options.methods.split(","):
            measure(options, method, dtype)


def measure(options: argparse.Namespace, method: str, dtype: str) -> None:
    """Measure both systems in turn and print the lines of the table."""
    found: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS}
    for _ in range(options.rounds):
        for system, results in found.items():
            command = [sys.executable, __file__, "--model", options.model, "--worker", system, method, dtype]
            for name in ("rows", "length", "steps", "remat"):
                command += [f"--{name}", str(getattr(options, name))]
            done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, check=True)
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{dtype} {method} {system}: {results[-1]}", file=sys.stderr)
    for name, unit in (("tokens", "tokens/s"), ("processor", "CPU s/step"), ("memory", "GB")):
        ours, theirs = (statistics.median(result[name] for result in found[system]) for system in SYSTEMS)
        ratio = ours / theirs if name == "tokens" else theirs / ours
        print(f"{dtype:10}{method:6}{unit:20}{ours:12.2f}{theirs:14.2f}{ratio:7.2f}×", flush=True)
    ours, theirs = (found[system][0]["loss"] for system in SYSTEMS)
    print(f"{dtype:10}{method:6}{'loss, first step':20}{ours:12.4f}{theirs:14.4f}", flush=True)


def work(options: argparse.Namespace) -> dict[str, float]:
    """Measure one system in this process: medians over the steps, and the loss of the first."""
    system, method, dtype = options.worker
    tokens = np.random.default_rng(0).integers(1000, 30000, (options.rows, options.length + 1)).astype(np.int32)
    step = (open_qwen_dist if system == "qwen_dist" else open_transformers)(options, method, dtype, tokens)
    loss = step()
    seconds, processor = [], []
    for _ in range(options.steps):
        begin, used = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - begin)
        processor.append(time.process_time() - used)
    return {
        "loss": loss,
        "tokens": options.rows * options.length / statistics.median(seconds),
        "processor": statistics.median(processor),
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }


def open_qwen_dist(options: argparse.Namespace, method: str, dtype: str, tokens: np.ndarray) -> Callable[[], float]:
    import jax

    from qwen_dist.checkpoint.model import load_model
    from qwen_dist.config import LoraOptions, OptimizerOptions
    from qwen_dist.mesh import MeshConfig, make_mesh
    from qwen_dist.models.parameters import disk_shapes
    from qwen_dist.ops.malloc import dispatch_synchronously, keep_freed_memory
    from qwen_dist.runtime.backend import start_jax
    from qwen_dist.sharding import TRAIN, ShardingContext
    from qwen_dist.train.batches import TrainBatch
    from qwen_dist.train.lora import new_adapter
    from qwen_dist.train.optim import make_optimizer, make_schedule
    from qwen_dist.train.step import Trainer

    start_jax(None, dtype)
    dispatch_synchronously()
    keep_freed_memory()
    stored_dtype = "float32" if method == "full" else dtype
    model = load_model(options.model, ShardingContext(make_mesh(MeshConfig()), TRAIN), dtype=stored_dtype)
    trained = list(model.parameters)
    if method == "lora":
        model, trained = new_adapter(model, LoraOptions(rank=RANK, alpha=ALPHA, target_modules=TARGETS), dtype="float32")
    adamw = OptimizerOptions(learning_rate=RATE, schedule="constant")
    schedule = make_schedule(adamw, 1)
    shapes = {name: model.parameters[name].shape for name in trained}
    optimizer = make_optimizer(adamw, schedule, shapes, disk_shapes(model.module))
    trainer = Trainer(model, trained, optimizer, schedule, dtype=dtype, remat=options.remat)
    state = trainer.init_state()
    del model
    positions = np.broadcast_to(np.arange(options.length, dtype=np.int32), tokens[:, 1:].shape)
    batch = TrainBatch(tokens[:, :-1], tokens[:, 1:], np.ones_like(positions), positions)

    def step() -> float:
        nonlocal state
        state, metrics = trainer.step(state, (batch,))
        return float(jax.device_get(metrics.loss))

    return step


def open_transformers(options: argparse.Namespace, method: str, dtype: str, tokens: np.ndarray) -> Callable[[], float]:
    import torch
    import transformers

    is_mixed = dtype == "bfloat16"
    stored_dtype = torch.bfloat16 if is_mixed and method == "lora" else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype=stored_dtype)
    if method == "lora":
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS)))
    if options.remat != "none":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, weight_decay=0.0)
    inputs, targets = torch.from_numpy(tokens[:, :-1]).long(), torch.from_numpy(tokens[:, 1:]).long()

    def step() -> float:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
            logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        del logits
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    main()

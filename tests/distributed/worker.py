"""One process of test_many_processes.py: float64 logits, gradients and tokens of one model on several meshes.

Arguments: checkpoint directory, output file, and meshes such as `fsdp=4,tensor=2`. Process 0 writes {mesh: arrays} as npz.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.checkpoint.model import load_model
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import with_parameters
from qwen_dist.runtime.cluster import detect_cluster
from qwen_dist.runtime.distributed import initialize_distributed
from qwen_dist.runtime.preflight import collect_host_info
from qwen_dist.sharding import INFERENCE, TRAIN, ShardingContext, use_sharding
from qwen_dist.tokenizer import Tokenizer

GREEDY = SamplingParams(max_new_tokens=12)
SAMPLED = SamplingParams(max_new_tokens=12, temperature=1.0, top_k=40, seed=5)


def main():
    directory, output, *meshes = sys.argv[1:]
    cluster = detect_cluster(None, None, None, os.environ)
    host_info = collect_host_info(
        {"meshes": meshes}, checkpoint=directory, inputs=(), write_dirs=[], memory_per_checkpoint_byte=1
    )
    with initialize_distributed(cluster, host_info, 60.0) as processes:
        jax.config.update("jax_enable_x64", True)
        processes.check_devices()
        results = {f"{mesh} {name}": value for mesh in meshes for name, value in compute(directory, mesh).items()}
        if processes.is_main:
            np.savez(output, **results)


def compute(directory, mesh):
    devices = jax.devices()[:1] if mesh == "data=1" else jax.devices()
    placed = make_mesh(MeshConfig.parse(mesh), devices)
    logits, gradients = forward_and_gradients(load_model(directory, ShardingContext(placed, TRAIN), dtype="float64"))
    model = load_model(directory, ShardingContext(placed, INFERENCE), dtype="float64")
    tokenizer = Tokenizer.open(directory)
    tokenizer.stop_ids = frozenset()
    rng = np.random.default_rng(3)
    requests = [
        Request(index, tuple(rng.integers(0, 331, 5 + 40 * index).tolist()), params)
        for index, params in enumerate((GREEDY, SAMPLED, GREEDY, SAMPLED))
    ]
    tokens = np.zeros((len(requests), GREEDY.max_new_tokens), np.int64)
    for update in Engine(model, tokenizer).run(requests):
        start = update.num_generated - len(update.tokens)
        tokens[update.request.key, start : update.num_generated] = update.tokens
    return {"logits": logits, "tokens": tokens, **{f"gradient {name}": value for name, value in gradients.items()}}


def forward_and_gradients(model):
    """Return the logits of a batch and the gradients of their mean negative log-likelihood, as unsharded host arrays."""
    rng = np.random.default_rng(2)
    tokens_BT = rng.integers(0, 331, (8, 24)).astype(np.int32)
    positions_BT = np.tile(np.arange(24, dtype=np.int32), (8, 1))
    replicated = model.sharding_ctx.replicated()

    def loss(parameters):
        with use_sharding(model.sharding_ctx):
            module = with_parameters(model.module, parameters)
            x_BTD, *_ = module(tokens_BT, positions_BT)
            logits_BTV = module.unembed(x_BTD)
            log_probs_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
            return -jnp.take_along_axis(log_probs_BTV, tokens_BT[:, 1:, None], axis=-1).mean(), logits_BTV

    loss_gradients = jax.jit(jax.grad(loss, has_aux=True), out_shardings=replicated)
    gradients, logits = loss_gradients(model.parameters)
    return np.asarray(logits), {name: np.asarray(value) for name, value in gradients.items()}


if __name__ == "__main__":
    main()

"""A new architecture as a plug-in: a mixer that averages over earlier tokens, in two of every three layers.

    python examples/new_architecture.py

Letters: B rows, T tokens, D embed, F channels.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qwen_dist import DEMO_MODEL, TrainBatch, new_model
from qwen_dist.hf_config import read_model_config
from qwen_dist.models.config import LayerConfig
from qwen_dist.models.layers import Linear
from qwen_dist.models.transformer import MIXERS


class Average(nnx.Module):
    """h_t = the mean of v_0 … v_t. To decode, it also needs a state: see tests/engine/toy_mixer.py."""

    name = "average"  # of its parameters: layers.0.average.v_proj.weight

    def __init__(self, config, layer, *, dtype):
        size, std = config.hidden_size, config.initializer_range
        self.v_proj = Linear({"mlp": size}, {"embed": size}, bias=False, dtype=dtype, std=std)
        self.o_proj = Linear({"embed": size}, {"mlp": size}, bias=False, dtype=dtype, std=std)

    def __call__(self, x_BTD, inputs, state):
        v_BTF = self.v_proj.to_accumulator(x_BTD)
        count_BT1 = inputs.positions_BT[..., None] + 1
        return self.o_proj((jnp.cumsum(v_BTF, axis=1) / count_BT1).astype(x_BTD.dtype)), state


def main(steps: int = 60) -> None:
    MIXERS["average"] = Average
    layers = (LayerConfig("average"), LayerConfig("average"), LayerConfig("attention"))
    config = dataclasses.replace(read_model_config(DEMO_MODEL), layers=layers)
    lm, optimizer = new_model(config, mesh="fsdp=-1", dtype="float32"), optax.adam(3e-3)

    @jax.jit
    def step(parameters, state, batch):
        loss, gradient = lm.loss_and_gradient(parameters, batch)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(parameters, updates), state, loss

    batch = lm.shard(TrainBatch.from_sequences(np.random.default_rng(0).integers(0, 700, (8, 12)).tolist()))
    parameters, state, losses = lm.parameters, optimizer.init(lm.parameters), []
    for _ in range(steps):
        parameters, state, loss = step(parameters, state, batch)
        losses.append(float(loss))
    print(f"loss {losses[0]:.2f} → {losses[-1]:.2f} after {steps} steps")


if __name__ == "__main__":
    main()

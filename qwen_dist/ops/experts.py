"""The experts of a mixture: each token through its few MLPs, and the sum of their outputs by the router's scores.

Letters: B batch, T length or tokens, K experts of a token, R = T·K choices, D embed, F mlp, E experts of this device,
O out-features, I in-features.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from qwen_dist.ops import native
from qwen_dist.ops.cost import F32_BYTES, LayerCost, Passes, Step
from qwen_dist.ops.dispatch import Backend, Implementation, Op
from qwen_dist.ops.expert_parallel import expert_capacity, expert_parallel
from qwen_dist.ops.grouped_matmul import ROWS_BY_WEIGHTS, grouped_matmul, num_padded_features, num_tiled_rows
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.ops.swiglu import swiglu
from qwen_dist.ops.weight import Weight, axes_of
from qwen_dist.sharding import LocalShard, shard_map_op


@functools.partial(jax.tree_util.register_dataclass, data_fields=["weight", "lora_A", "lora_B"], meta_fields=["lora_scale"])
@dataclasses.dataclass(frozen=True)
class ExpertWeights:
    """One matrix of every expert, [E, …out, I], and its low-rank adapters A [E, R, I] and B [E, …out, R], if there are any.

    As the argument `axes` of `experts` it holds the logical names of the dimensions in place of arrays.
    """

    weight: Any
    lora_A: Any = None
    lora_B: Any = None
    lora_scale: float = 0.0

    def __len__(self) -> int:
        return self.weight.shape[0]

    def of_arrays(self, weights: ExpertWeights) -> ExpertWeights:
        """Return these axes for the arrays that the weight consists of, where it is quantised."""
        return dataclasses.replace(self, weight=axes_of(weights.weight, self.weight))

    def matrix(self) -> Weight:
        """Return the weight [E, O, I], its out-dimensions flattened."""
        return _flat(self.weight)

    def __call__(self, rows_RI: jax.Array, sizes_E: jax.Array, dtype: DTypeLike) -> jax.Array:
        """Multiply each row by its expert's matrix and adapters: see `grouped_matmul`."""
        if self.lora_A is None:
            return grouped_matmul(rows_RI, self.matrix(), sizes_E, dtype)
        wide = accum_dtype(rows_RI.dtype)
        narrow = grouped_matmul(rows_RI, _flat(self.lora_A), sizes_E, rows_RI.dtype)
        added = self.lora_scale * grouped_matmul(narrow, _flat(self.lora_B), sizes_E, wide)
        return (grouped_matmul(rows_RI, self.matrix(), sizes_E, wide) + added).astype(dtype)


def _flat(weight: Any) -> Any:
    return weight.reshape(weight.shape[0], -1, weight.shape[-1])


def experts(
    x_BTD: jax.Array,
    chosen_BTK: jax.Array,
    scores_BTK: jax.Array,
    gate_up: ExpertWeights,
    down: ExpertWeights,
    axes: tuple[ExpertWeights, ExpertWeights],
) -> tuple[jax.Array, jax.Array]:
    """Compute down(silu(gate(x)) · up(x)) of each token's experts.

    Args:
      x_BTD: tokens.
      chosen_BTK: int32, the experts of each token; a number out of range is no expert, and its output is 0.
      scores_BTK: the weight of each of them in the sum.
      gate_up, down: weights [E, 2, F, D] and [E, D, F].
      axes: the logical names of the dimensions of both.

    Returns:
      The weighted sums [B, T, D] and each expert's output [B, T, K, D], in x's dtype.
    """
    tokens, choices = ("batch", "length", "embed"), ("batch", "length", "top_k")
    arguments = (x_BTD, chosen_BTK, scores_BTK, gate_up, down)
    axes = axes[0].of_arrays(gate_up), axes[1].of_arrays(down)
    return shard_map_op(EXPERTS, arguments, (tokens, choices, choices, *axes), (tokens, (*choices, "embed")))


def experts_plain(
    shard: LocalShard,
    x_BTD: jax.Array,
    chosen_BTK: jax.Array,
    scores_BTK: jax.Array,
    gate_up: ExpertWeights,
    down: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    """Compute `experts` on one device: its tokens, which may choose any expert, and its experts."""
    x_TD, chosen_R = x_BTD.reshape(-1, x_BTD.shape[-1]), chosen_BTK.reshape(-1)
    num_experts = len(down) * shard.num_shards("experts")
    local = functools.partial(local_experts, shard)
    if shard.num_shards("experts") == 1:
        each_RD = local(x_TD, chosen_R, gate_up, down)
    else:
        each_RD = expert_parallel(shard, x_TD, chosen_R, gate_up, down, local)
    each_BTKD = jnp.where(chosen_R[:, None] < num_experts, each_RD, 0).reshape(*chosen_BTK.shape, -1)
    mixed_BTD = jnp.sum(scores_BTK[..., None] * each_BTKD, axis=2)
    # Mixed before the sum over the shards of mlp: one token travels instead of its K outputs.
    mixed_BTD, each_BTKD = shard.psum(mixed_BTD, "mlp"), shard.psum(each_BTKD, "mlp")
    return mixed_BTD.astype(x_BTD.dtype), each_BTKD.astype(x_BTD.dtype)


def local_experts(
    shard: LocalShard, x_TD: jax.Array, chosen_R: jax.Array, gate_up: ExpertWeights, down: ExpertWeights
) -> jax.Array:
    """Return the output [R, D] of expert `chosen_R[r]` of this device for token r // K; undefined if there is none.

    Where mlp is sharded, this shard's part of the sum, in at least float32.
    """
    wide = accum_dtype(x_TD.dtype)
    order_R = jnp.argsort(chosen_R, stable=True)
    sizes_E = jnp.zeros(len(down), jnp.int32).at[chosen_R].add(1, mode="drop")
    rows_RD = x_TD[order_R // (len(chosen_R) // len(x_TD))]
    hidden_RO = gate_up(rows_RD, sizes_E, x_TD.dtype if shard.num_shards("embed") == 1 else wide)
    gate_RF, up_RF = jnp.split(shard.psum(hidden_RO, "embed").astype(x_TD.dtype), 2, axis=-1)
    out_RD = down(swiglu(gate_RF, up_RF), sizes_E, x_TD.dtype if shard.num_shards("mlp") == 1 else wide)
    return out_RD[jnp.argsort(order_R)]


def experts_kernel(
    shard: LocalShard,
    x_BTD: jax.Array,
    chosen_BTK: jax.Array,
    scores_BTK: jax.Array,
    gate_up: ExpertWeights,
    down: ExpertWeights,
) -> tuple[jax.Array, jax.Array]:
    return native.experts(x_BTD, chosen_BTK, scores_BTK, gate_up.matrix(), down.matrix())  # type: ignore[arg-type]


def can_experts_kernel(
    shard: LocalShard,
    x_BTD: jax.Array,
    chosen_BTK: jax.Array,
    scores_BTK: jax.Array,
    gate_up: ExpertWeights,
    down: ExpertWeights,
) -> bool:
    has_lora = gate_up.lora_A is not None or down.lora_A is not None
    return not has_lora and native.can_experts(x_BTD, gate_up.matrix(), down.matrix())


EXPERTS = Op(
    "experts",
    experts_plain,
    {Backend.CPU_KERNELS: (Implementation("kernel", experts_kernel, can_experts_kernel),)},
)


def experts_cost(
    step: Step, num_experts: int, experts_per_token: int, embed: int, mlp: int, adapters: Sequence[Mapping[str, int]]
) -> LayerCost:
    """Return the cost of `experts`.

    Args:
      step: of the layer.
      num_experts, experts_per_token, embed, mlp: their sizes.
      adapters: the dimensions of each low-rank matrix of an expert.
    """
    num_shards, K = step.num_shards("experts"), experts_per_token
    local_embed, local_mlp = step.size(embed=embed), step.size(mlp=mlp)
    # Tokens that are expected at the experts of this device, and rows of static shape that it processes.
    filled, rows = step.outputs() * K, _num_rows(step, K, num_experts)
    matrices, narrow = 3 * step.size(mlp=mlp, embed=embed), sum(step.size(**adapter) for adapter in adapters)
    products, of_adapters = 2 * filled * matrices, 2 * filled * narrow
    x = jax.ShapeDtypeStruct((rows, local_embed), step.dtype)
    gate_up = jax.ShapeDtypeStruct((num_experts // num_shards, 2 * local_mlp, local_embed), step.dtype)
    empty = empty_adapters = 0
    if step.implementation(ROWS_BY_WEIGHTS, x, gate_up, None, dim=2, dtype=x.dtype) == "megablox":
        # The report counts rows that no token fills, which the kernel skips, and ranks that are padded.
        tiled, padded = num_tiled_rows(rows), sum(step.size(**_padded(adapter)) for adapter in adapters)
        empty, empty_adapters = 2 * (tiled - filled) * matrices, 2 * (tiled * padded - filled * narrow)
    # Where tokens travel, the backward pass computes each round again up to the input of the last matrix.
    repeated = 2 / 3 if num_shards > 1 else 0
    passes = 1 + step.trains_weights + repeated
    # Partial sums are float32: over embed of the hidden channels, over mlp of the outputs.
    hidden, returned = (F32_BYTES if step.num_shards(axis) > 1 else step.itemsize for axis in ("embed", "mlp"))
    row_bytes = local_embed * (step.itemsize + returned) + local_mlp * (2 * hidden + step.itemsize)
    arriving, returning = (step.remote_fraction("experts") * rows * local_embed * x for x in (step.itemsize, returned))
    summed = step.remote_fraction("mlp") * step.outputs(embed=embed) + step.remote_fraction("embed") * rows * 2 * local_mlp
    sums = 2 * summed * step.itemsize
    sharing = step.num_rows * step.num_tokens // (step.num_shards("batch") // num_shards)
    weight_bytes = 3 * step.size(experts=num_experts, mlp=mlp, embed=embed) * step.itemsize
    return LayerCost(
        flops=Passes(products + of_adapters, passes * products + (2 + repeated) * of_adapters),
        uncounted_flops=Passes(-empty - empty_adapters, -passes * empty - (2 + repeated) * empty_adapters),
        workspace_bytes=rows * row_bytes,
        saved_bytes=rows * row_bytes,
        # The backward pass sends the tokens again, the gradients of the outputs, and back those of the tokens.
        collectives={
            "all-to-all": Passes(arriving + returning, arriving + returning + arriving),
            "all-reduce": Passes(sums, sums),
        },
        unread_bytes=int((1 - K / num_experts) ** sharing * weight_bytes),
    )


def _padded(adapter: Mapping[str, int]) -> dict[str, int]:
    return dict(adapter) | {"lora_rank": num_padded_features(adapter["lora_rank"])}


def _num_rows(step: Step, experts_per_token: int, num_experts: int) -> int:
    """Return the rows that the experts of one device process at once.

    Without expert parallelism these are the choices of the device's own tokens, with it the capacity that the other
    devices can send to.
    """
    num_shards = step.num_shards("experts")
    if num_shards == 1:
        return step.outputs() * experts_per_token
    return num_shards * expert_capacity(step.outputs(), experts_per_token, num_shards, num_experts // num_shards)

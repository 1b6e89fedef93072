"""The next-token loss, in chunks of tokens: all logits of a batch would be larger than the model (vocabulary of 152k).

V vocab, D embed. N is the number of data-parallel shards.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_dist.ops.matmul import accum_dtype, dot, matmul, weight_gradient
from qwen_dist.sharding import constrain

# The number of tokens per device whose logits exist at the same time.
LOSS_CHUNK_TOKENS = 512


def next_token_loss(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, num_shards: int = 1
) -> jax.Array:
    """Return the weighted sum of the targets' cross-entropies, a scalar in at least float32.

    The gradient is computed together with the loss, one chunk of tokens at a time. No logits are computed twice or kept,
    and none are computed for tokens of weight 0, except those that fill the last chunk.

    Args:
      x_BTD: hidden states.
      head_VD: output weights.
      targets_BT: token ids.
      weights_BT: 0 where a target does not count.
      num_shards: the number of data-parallel shards of the batch.
    """
    num_tokens = targets_BT.size // num_shards
    num_chunks = -(-num_tokens // LOSS_CHUNK_TOKENS)
    chunk_size = -(-num_tokens // num_chunks)

    def by_shard(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [shards, tokens of a shard, ...]"""
        return x.reshape(num_shards, num_tokens, *x.shape[2:])

    weights = by_shard(weights_BT)
    order = jnp.argsort(weights == 0, axis=1, stable=True)

    def in_chunks(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [chunks, shards, chunk_size, ...]; tokens that count come first, padding has weight 0."""
        sorted_ = jnp.take_along_axis(by_shard(x), order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
        padded = jnp.pad(sorted_, [(0, 0), (0, num_chunks * chunk_size - num_tokens)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(num_shards, num_chunks, chunk_size, *x.shape[2:]).swapaxes(0, 1)

    dtype = accum_dtype(x_BTD.dtype)
    num_used = -(-jnp.max(jnp.sum(weights != 0, axis=1)) // chunk_size)
    chunks = in_chunks(x_BTD), in_chunks(targets_BT), in_chunks(weights_BT).astype(dtype)
    return _chunked_loss(chunks[0], head_VD, *chunks[1:], num_used)


@jax.custom_vjp
def _chunked_loss(
    x: jax.Array, head_VD: jax.Array, targets: jax.Array, weights: jax.Array, num_used: jax.Array
) -> jax.Array:
    """Return the loss of the first `num_used` chunks; all weights of the other chunks are 0."""

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        return total + _cross_entropy(matmul(x[index], head_VD), targets[index], weights[index])

    return jax.lax.fori_loop(0, num_used, add, jnp.zeros((), weights.dtype))


def _chunked_loss_fwd(
    x: jax.Array, head_VD: jax.Array, targets: jax.Array, weights: jax.Array, num_used: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    def add(index: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        total, grad_x, grad_head_NVD = sums
        # The barrier keeps XLA from making a transposed copy of the head before the loop.
        head, index = jax.lax.optimization_barrier((head_VD, index))
        loss, grad_logits = jax.value_and_grad(_cross_entropy)(dot(x[index], head, 1), targets[index], weights[index])
        grad_logits = grad_logits.astype(x.dtype)
        grad_chunk = dot(grad_logits, head, 0).astype(x.dtype)
        # One sum per shard: with one sum over all shards, XLA would all-reduce in every iteration.
        grad_head_NVD = constrain_shards(grad_head_NVD + weight_gradient(grad_logits, x[index], 1))
        return total + loss, grad_x.at[index].set(grad_chunk), grad_head_NVD

    def constrain_shards(grad_head_NVD: jax.Array) -> jax.Array:
        return constrain(grad_head_NVD, "batch", "vocab", "embed")

    grad_head_NVD = constrain_shards(jnp.zeros((x.shape[1], *head_VD.shape), weights.dtype))
    zeros = jnp.zeros((), weights.dtype), jnp.zeros_like(x), grad_head_NVD
    loss, grad_x, grad_head_NVD = jax.lax.fori_loop(0, num_used, add, zeros)
    return loss, (grad_x, grad_head_NVD.sum(axis=0).astype(head_VD.dtype), weights)


def _chunked_loss_bwd(
    residuals: tuple[jax.Array, jax.Array, jax.Array], scale: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array, None]:
    grad_x, grad_head_VD, weights = residuals
    grad_x, grad_head_VD = ((scale * gradient).astype(gradient.dtype) for gradient in (grad_x, grad_head_VD))
    return grad_x, grad_head_VD, None, jnp.zeros_like(weights), None


_chunked_loss.defvjp(_chunked_loss_fwd, _chunked_loss_bwd)


def _cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    # Compare and sum instead of indexing: the vocabulary may be sharded.
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    target_logits = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - target_logits))

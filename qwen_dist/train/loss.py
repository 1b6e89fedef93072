"""The loss of the next tokens, without ever having all logits: a 152k vocabulary makes them larger than the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_dist.ops.matmul import accum_dtype, matmul, weight_gradient
from qwen_dist.sharding import constrain

# Tokens whose logits exist at a time, on each device.
BLOCK_TOKENS = 512


def next_token_loss(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, rows_apart: int = 1
) -> jax.Array:
    """The sum of the targets' cross-entropies, each times its weight, in at least float32.

    The gradient is computed together with the loss, a block of tokens at a time: no logits are computed twice, or kept, and
    none for tokens that weigh nothing (but for those that fill up the last block).

    Args:
      x_BTD: hidden states. head_VD: the output weights.
      targets_BT: token ids. weights_BT: 0 where a target does not count.
      rows_apart: over how many devices the rows are spread.
    """
    num_tokens = targets_BT.size // rows_apart
    num_blocks = -(-num_tokens // BLOCK_TOKENS)
    width = -(-num_tokens // num_blocks)

    def of_device(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [devices, tokens of a device, ...]"""
        return x.reshape(rows_apart, num_tokens, *x.shape[2:])

    weights = of_device(weights_BT)
    order = jnp.argsort(weights == 0, axis=1, stable=True)

    def in_blocks(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [blocks, devices, width, ...], what counts first; what is added weighs nothing."""
        sorted_ = jnp.take_along_axis(of_device(x), order.reshape(order.shape + (1,) * (x.ndim - 2)), axis=1)
        padded = jnp.pad(sorted_, [(0, 0), (0, num_blocks * width - num_tokens)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(rows_apart, num_blocks, width, *x.shape[2:]).swapaxes(0, 1)

    wide = accum_dtype(x_BTD.dtype)
    num_used = -(-jnp.max(jnp.sum(weights != 0, axis=1)) // width)
    blocks = in_blocks(x_BTD), in_blocks(targets_BT), in_blocks(weights_BT).astype(wide)
    return _loss_of_blocks(blocks[0], head_VD, *blocks[1:], num_used)


@jax.custom_vjp
def _loss_of_blocks(
    x: jax.Array, head_VD: jax.Array, targets: jax.Array, weights: jax.Array, num_used: jax.Array
) -> jax.Array:
    """Of the first `num_used` of the blocks; the others weigh nothing."""

    def add(index: jax.Array, total: jax.Array) -> jax.Array:
        return total + _cross_entropy(matmul(x[index], head_VD), targets[index], weights[index])

    return jax.lax.fori_loop(0, num_used, add, jnp.zeros((), weights.dtype))


def _forward(
    x: jax.Array, head_VD: jax.Array, targets: jax.Array, weights: jax.Array, num_used: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    def add(index: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        total, by_x, by_head_NVD = sums
        # The barrier ties the head to this turn of the loop: XLA would turn a copy of it over in front of it.
        head, index = jax.lax.optimization_barrier((head_VD, index))
        loss, by_logits = jax.value_and_grad(_cross_entropy)(matmul(x[index], head), targets[index], weights[index])
        by_logits = by_logits.astype(x.dtype)
        by_block = matmul(by_logits, head.T).astype(x.dtype)
        # Each device sums its own tokens' gradient; a loop that adds to a sum over devices sums over them in every turn.
        by_head_NVD = of_devices(by_head_NVD + weight_gradient(by_logits, x[index], 1))
        return total + loss, by_x.at[index].set(by_block), by_head_NVD

    def of_devices(by_head_NVD: jax.Array) -> jax.Array:
        return constrain(by_head_NVD, "batch", "vocab", "embed")

    by_head_NVD = of_devices(jnp.zeros((x.shape[1], *head_VD.shape), weights.dtype))
    zeros = jnp.zeros((), weights.dtype), jnp.zeros_like(x), by_head_NVD
    loss, by_x, by_head_NVD = jax.lax.fori_loop(0, num_used, add, zeros)
    return loss, (by_x, by_head_NVD.sum(axis=0).astype(head_VD.dtype), weights)


def _backward(
    gradients: tuple[jax.Array, jax.Array, jax.Array], scale: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array, None]:
    by_x, by_head_VD, weights = gradients
    by_x, by_head_VD = ((scale * gradient).astype(gradient.dtype) for gradient in (by_x, by_head_VD))
    return by_x, by_head_VD, None, jnp.zeros_like(weights), None


_loss_of_blocks.defvjp(_forward, _backward)


def _cross_entropy(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    # Compared and summed rather than looked up: the vocabulary may be spread over devices.
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    of_target = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)
    return jnp.sum(weights * (jax.nn.logsumexp(logits, axis=-1) - of_target))

"""The loss of the next tokens, without ever having all logits: a 152k vocabulary makes them larger than the model."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from qwen_dist.models.layers import at_least_float32
from qwen_dist.models.transformer import logits

# Tokens whose logits exist at a time, on each device.
BLOCK_TOKENS = 512


def next_token_loss(
    x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, rows_apart: int = 1
) -> jax.Array:
    """The sum of the targets' cross-entropies, each times its weight, in at least float32.

    The gradient is computed together with the loss, a block of tokens at a time: no logits are computed twice, or kept.

    Args:
      x_BTD: hidden states. head_VD: the output weights.
      targets_BT: token ids. weights_BT: 0 where a target does not count.
      rows_apart: over how many devices the rows are spread.
    """
    B, T = targets_BT.shape
    num_blocks = -(-B * T // (BLOCK_TOKENS * rows_apart))
    width = -(-T // num_blocks)

    def in_blocks(x: jax.Array) -> jax.Array:
        """[B, T, ...] -> [blocks, B, width, ...]; what is added weighs nothing."""
        padded = jnp.pad(x, [(0, 0), (0, num_blocks * width - T)] + [(0, 0)] * (x.ndim - 2))
        return padded.reshape(B, num_blocks, width, *x.shape[2:]).swapaxes(0, 1)

    wide = at_least_float32(x_BTD.dtype)
    return _loss_of_blocks(in_blocks(x_BTD), head_VD, in_blocks(targets_BT), in_blocks(weights_BT).astype(wide))


@jax.custom_vjp
def _loss_of_blocks(x: jax.Array, head_VD: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
    def add(total: jax.Array, block: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        x_BTD, *labels = block
        return total + _loss_of_block(x_BTD, head_VD, *labels), None

    return jax.lax.scan(add, jnp.zeros((), weights.dtype), (x, targets, weights))[0]


def _forward(
    x: jax.Array, head_VD: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    gradient = jax.value_and_grad(_loss_of_block, argnums=(0, 1))

    def add(
        sums: tuple[jax.Array, jax.Array], block: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        x_BTD, *labels = block
        loss, (by_x_BTD, by_head_VD) = gradient(x_BTD, head_VD, *labels)
        return (sums[0] + loss, sums[1] + by_head_VD.astype(sums[1].dtype)), by_x_BTD

    zeros = (jnp.zeros((), weights.dtype), jnp.zeros(head_VD.shape, weights.dtype))
    (loss, by_head_VD), by_x = jax.lax.scan(add, zeros, (x, targets, weights))
    return loss, (by_x, by_head_VD.astype(head_VD.dtype), weights)


def _backward(
    gradients: tuple[jax.Array, jax.Array, jax.Array], scale: jax.Array
) -> tuple[jax.Array, jax.Array, None, jax.Array]:
    by_x, by_head_VD, weights = gradients
    by_x, by_head_VD = ((scale * gradient).astype(gradient.dtype) for gradient in (by_x, by_head_VD))
    return by_x, by_head_VD, None, jnp.zeros_like(weights)


_loss_of_blocks.defvjp(_forward, _backward)


def _loss_of_block(x_BTD: jax.Array, head_VD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> jax.Array:
    logits_BTV = logits(x_BTD, head_VD)
    # Compared and summed rather than looked up: the vocabulary may be spread over devices.
    is_target_BTV = targets_BT[..., None] == jnp.arange(head_VD.shape[0])
    target_BT = jnp.sum(jnp.where(is_target_BTV, logits_BTV, 0), axis=-1)
    return jnp.sum(weights_BT * (jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT))

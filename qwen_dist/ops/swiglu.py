"""The gate of an MLP: SwiGLU (arXiv:2002.05202)."""

from __future__ import annotations

import jax

from qwen_dist.ops import native
from qwen_dist.ops.dispatch import Backend, Implementation, Op
from qwen_dist.ops.matmul import accum_dtype


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return silu(gate) · up for arrays of one shape and dtype; the silu is rounded once, as PyTorch's."""
    return SWIGLU(gate, up)


@jax.custom_vjp
def _plain(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Keep only gate and up for the backward pass."""
    return silu(gate) * up


def silu(x: jax.Array) -> jax.Array:
    """Return x / (1 + exp(-x)), computed in at least float32 and rounded once; rounding inside is also slower on a CPU."""
    return jax.nn.silu(x.astype(accum_dtype(x.dtype))).astype(x.dtype)


def _forward(gate: jax.Array, up: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _plain(gate, up), (gate, up)


def _backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = kept
    # `+ 0 * gradient` is a data dependency: without it XLA CPU computes the sigmoid in the forward pass and keeps it, in
    # float32.
    wide = gate.astype(accum_dtype(gate.dtype)) + 0 * gradient
    sigmoid = jax.nn.sigmoid(wide)
    by_silu, by_up = gradient * up, gradient * (wide * sigmoid).astype(gate.dtype)
    return (by_silu.astype(wide.dtype) * sigmoid * (1 + wide * (1 - sigmoid))).astype(gate.dtype), by_up


_plain.defvjp(_forward, _backward)

SWIGLU = Op("swiglu", _plain, {Backend.CPU_KERNELS: (Implementation("kernel", native.swiglu, native.can_swiglu),)})

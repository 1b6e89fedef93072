"""Matrix products of inference by a kernel of this project's own, on processors with AVX512-BF16.

XLA's CPU backend reads the weights of a step of few rows at less than half of the memory's speed in bfloat16, and copies
those of experts. `native.cc` reads them where they lie and as fast as memory gives them. What it computes for a row is the
same, bit for bit, whatever the other rows are. It is compiled when the package is installed; where there is no compiler, or a
processor of another kind, products are XLA's.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import pathlib

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

TARGET = "qwen_dist_grouped_product"
# What a tile of the kernel computes at least.
MIN_FEATURES = 4


@functools.cache
def is_available() -> bool:
    """Whether the kernel was compiled and this processor can run it; registers it with jax then."""
    folder = pathlib.Path(__file__).parent
    compiled = [path for suffix in importlib.machinery.EXTENSION_SUFFIXES if (path := folder / f"_native{suffix}").exists()]
    if not compiled:
        return False
    library = ctypes.CDLL(str(compiled[0]))
    if not library.IsSupported():
        return False
    jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(library.GroupedProduct), platform="cpu")
    return True


def can_multiply(rows: jax.Array, weight: jax.Array, dtype: DTypeLike) -> bool:
    """Whether the kernel takes rows [..., C] and weights [..., O, C] of this type, to a result of `dtype`."""
    types = rows.dtype.name, weight.dtype.name, jnp.dtype(dtype).name
    has_form = types in (("float32",) * 3, ("bfloat16", "bfloat16", "float32"), ("bfloat16",) * 3)
    return has_form and weight.shape[-2] >= MIN_FEATURES and rows.size > 0 and is_available()


def grouped_product(rows_RC: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Each row times the weight of its group, [R, O]; sums are in float32 and rounded once, to `dtype`.

    Groups follow each other, and group e has `sizes_E[e]` rows; what comes out for rows behind the last group means
    nothing. Only where `can_multiply`.
    """
    result = jax.ShapeDtypeStruct((len(rows_RC), weights_EOC.shape[1]), dtype)
    return jax.ffi.ffi_call(TARGET, result)(rows_RC, weights_EOC, sizes_E.astype(jnp.int32))


def product(x: jax.Array, weight_OC: jax.Array, dtype: DTypeLike) -> jax.Array:
    """[..., C] times [O, C]: [..., O]; as `grouped_product` with a single group."""
    rows_RC = x.reshape(-1, x.shape[-1])
    out_RO = grouped_product(rows_RC, weight_OC[None], jnp.full(1, len(rows_RC)), dtype)
    return out_RO.reshape(*x.shape[:-1], -1)

"""Products, attention and most of what is between them by kernels of this project's own, on processors with AVX512-BF16.

XLA's CPU backend reads the weights of a step of few rows at less than half of the memory's speed in bfloat16, copies those
of experts, makes many passes over the scores of attention, and takes the angles of positions anew for each head of each
layer. The kernels in `cpu/` read weights and pages where they lie and as fast as memory gives them, and with many rows
multiply nearly as fast as the processor can. What they compute for a row is the same, bit for bit, whatever other rows are.
They are compiled when the package is installed; where there is no compiler, or a processor of another kind, XLA does the
work.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwen_dist.models.cache import PAGE, LayerCache, Pages

# jax's names for the functions of the library.
TARGETS = {
    "qwen_dist_grouped_product": "GroupedProduct",
    "qwen_dist_experts": "Experts",
    "qwen_dist_gated": "Gated",
    "qwen_dist_rotate": "Rotate",
    "qwen_dist_paged_attention": "PagedAttention",
}
GROUPED_PRODUCT, EXPERTS, GATED, ROTATE, PAGED_ATTENTION = TARGETS
# Features and rows of a tile of the product.
MIN_FEATURES, MAX_ROWS = 4, 6
# What the size of a head is a multiple of, and the positions of a page.
LANES, PAGE_OF_KERNEL = 16, 64
# Bytes of a line of a core's first cache, and of all lines that do not want the same places.
LINE, BYTES_OF_WAY = 64, 4096


@functools.cache
def is_available() -> bool:
    """Whether the kernels were compiled and this processor can run them; registers them with jax then."""
    folder = pathlib.Path(__file__).parent
    compiled = [path for suffix in importlib.machinery.EXTENSION_SUFFIXES if (path := folder / f"_native{suffix}").exists()]
    if not compiled:
        return False
    library = ctypes.CDLL(str(compiled[0]))
    if not library.IsSupported():
        return False
    for name, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")
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
    assert is_available()
    result = jax.ShapeDtypeStruct((len(rows_RC), weights_EOC.shape[1]), dtype)
    call = jax.ffi.ffi_call(GROUPED_PRODUCT, (result, _room_to_space(rows_RC)))
    return call(rows_RC, weights_EOC, sizes_E.astype(jnp.int32))[0]


def _room_to_space(rows_RC: jax.Array) -> jax.ShapeDtypeStruct:
    """Where the kernel puts rows that would be in each other's way in a core's cache, if there are more than a tile has."""
    is_wanted = len(rows_RC) > MAX_ROWS and _spaced(rows_RC.shape[1], rows_RC.dtype) > rows_RC.shape[1]
    return jax.ShapeDtypeStruct((len(rows_RC) if is_wanted else 0, _spaced(rows_RC.shape[1], rows_RC.dtype)), rows_RC.dtype)


def _spaced(size: int, dtype: DTypeLike) -> int:
    """How far apart rows of this size lie best: not at a multiple of what the lines of each place in the cache cover."""
    itemsize = jnp.dtype(dtype).itemsize
    return size + LINE // itemsize if size * itemsize % BYTES_OF_WAY == 0 else size


def product(x: jax.Array, weight_OC: jax.Array, dtype: DTypeLike) -> jax.Array:
    """[..., C] times [O, C]: [..., O]; as `grouped_product` with a single group."""
    rows_RC = x.reshape(-1, x.shape[-1])
    out_RO = grouped_product(rows_RC, weight_OC[None], jnp.full(1, len(rows_RC)), dtype)
    return out_RO.reshape(*x.shape[:-1], -1)


def can_mix(x: jax.Array, gate_up: jax.Array, down: jax.Array) -> bool:
    """Whether the kernel takes tokens [..., D] and experts [E, 2F, D] and [E, D, F] of these types and sizes."""
    has_form = x.dtype == gate_up.dtype == down.dtype and x.dtype in (jnp.float32, jnp.bfloat16)
    return has_form and all(size % MIN_FEATURES == 0 for size in down.shape[1:]) and x.size > 0 and is_available()


def mix(
    x_BTD: jax.Array, chosen_BTK: jax.Array, scores_BTK: jax.Array, gate_up_EOD: jax.Array, down_EDF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The sum of each token's experts, weighed by their scores, [B, T, D]; and each expert's output [B, T, K, D].

    Of an expert number that there is not the output is 0. Only where `can_mix`.
    """
    assert is_available()
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    chosen_TK, scores_TK = (x.reshape(len(x_TD), -1) for x in (chosen_BTK, scores_BTK))
    hidden = chosen_TK.size, _spaced(down_EDF.shape[2], x_TD.dtype)
    shapes = x_TD.shape, (*chosen_TK.shape, x_TD.shape[1]), hidden
    results = [jax.ShapeDtypeStruct(shape, x_TD.dtype) for shape in shapes]
    mixed_TD, each_TKD, *_ = jax.ffi.ffi_call(EXPERTS, [*results, _room_to_space(x_TD)])(
        x_TD, chosen_TK.astype(jnp.int32), scores_TK.astype(jnp.float32), gate_up_EOD, down_EDF
    )
    return mixed_TD.reshape(x_BTD.shape), each_TKD.reshape(*chosen_BTK.shape, -1)


def can_gate(gate: jax.Array, up: jax.Array) -> bool:
    """Whether the kernel takes these."""
    return gate.dtype == up.dtype and gate.dtype in (jnp.float32, jnp.bfloat16) and gate.size > 0 and is_available()


def gated(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) · up. Only where `can_gate`."""
    assert is_available()
    return jax.ffi.ffi_call(GATED, jax.ShapeDtypeStruct(gate.shape, gate.dtype))(gate, up)


def can_rotate(x: jax.Array, cos: jax.Array) -> bool:
    """Whether the kernel takes heads of this type, and angles of this one."""
    return x.dtype in (jnp.float32, jnp.bfloat16) and cos.dtype == jnp.float32 and x.size > 0 and is_available()


def rotate(x_BTNH: jax.Array, cos_BTC: jax.Array, sin_BTC: jax.Array) -> jax.Array:
    """The pairs (i, i + H/2) of each head, rotated by their angles. Only where `can_rotate`."""
    assert is_available()
    return jax.ffi.ffi_call(ROTATE, jax.ShapeDtypeStruct(x_BTNH.shape, x_BTNH.dtype))(x_BTNH, cos_BTC, sin_BTC)


def can_attend(q_BTNH: jax.Array, cache: LayerCache) -> bool:
    """Whether the kernel attends from these queries to a cache of this kind."""
    has_form = q_BTNH.dtype in (jnp.float32, jnp.bfloat16) and cache.k.shape[0] == 1 and PAGE == PAGE_OF_KERNEL
    return has_form and q_BTNH.shape[-1] % LANES == 0 and q_BTNH.size > 0 and is_available()


def attend_pages(
    q_BTNH: jax.Array, cache: LayerCache, positions_BT: jax.Array, pages: Pages, sliding_window: int | None
) -> jax.Array:
    """What `paged_attention.attend_pages` computes, [B, T, N, H]. Only where `can_attend`."""
    assert is_available()
    visits = (jnp.asarray(x[0]) for x in (pages.row_DE, pages.page_DE, pages.start_DE))
    num_visits = jnp.asarray(pages.num_visits).reshape(1)
    numbers = [x.astype(jnp.int32) for x in (positions_BT, *visits, num_visits)]
    call = jax.ffi.ffi_call(PAGED_ATTENTION, jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype))
    scale = np.float32(q_BTNH.shape[-1] ** -0.5)
    # The cache as it is: XLA would write a reshaped one anew beside it, and copy it for that.
    return call(q_BTNH, *cache, *numbers, scale=scale, window=np.int64(sliding_window or 0))

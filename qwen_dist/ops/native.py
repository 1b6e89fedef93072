"""The C++ kernels in `cpu/`, as jax functions.

XLA CPU reads the weights of a step of few rows at less than half of the memory's speed in bfloat16, copies the weights of
experts, makes many passes over the scores of attention, and recomputes the rotation angles for each head of each layer. The
kernels read weights and pages in place at the memory's speed, and multiply many rows nearly as fast as the processor can.
What a kernel computes for a row does not depend on the other rows, bit for bit.

The installation compiles them, once for each set of instructions (`native_library.BUILDS`), and the best build that the
processor can run does. Without a compiler, or on another processor, XLA does the work. `can_NAME` says whether the kernel
`NAME` takes the same arguments; the C++ checks them again. No kernel has a gradient.

Letters: B batch, T length, D embed, N query heads, H head_dim, C in-features, O out-features, R rows, E groups (experts),
K experts of a token, F mlp, A half of head_dim. In a gated delta net: D shards, M slots, G key heads, R value heads of a
key head, K key channels, V value channels, C channels of the convolution, W its taps.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwen_dist.ops import native_library
from qwen_dist.ops.grouped_weight import RUN, GroupedWeight
from qwen_dist.ops.native_library import BUILDS, active_build, is_available
from qwen_dist.ops.paged_cache import PAGE, SCALED, PagedState, PageIndices
from qwen_dist.ops.slots import SlotRows, written_slots
from qwen_dist.ops.weight import Weight

if TYPE_CHECKING:
    from qwen_dist.ops.delta_rule import DeltaInputs

# jax's names for the functions of the library.
TARGETS = {
    "qwen_dist_grouped_matmul": "GroupedMatmul",
    "qwen_dist_quantized_matmul": "QuantizedMatmul",
    "qwen_dist_experts": "Experts",
    "qwen_dist_swiglu": "SwiGlu",
    "qwen_dist_rotate": "Rotate",
    "qwen_dist_paged_attention": "PagedAttention",
    "qwen_dist_short_convolution": "ShortConvolution",
    "qwen_dist_delta_rule_in_slots": "DeltaRuleInSlots",
}
GROUPED_MATMUL, QUANTIZED_MATMUL, EXPERTS, SWIGLU, ROTATE, PAGED_ATTENTION, SHORT_CONVOLUTION, DELTA_RULE_IN_SLOTS = TARGETS
# The builds that multiply 16-bit floats without widening them to float32, and of these the one that packs rows into tiles.
# Rows are widened or packed in scratch memory, padded to a multiple of WIDE elements.
WITHOUT_WIDENING, PACKING, WIDE = ("amx_bf16", "avx512_bf16"), "amx_bf16", 32
# For a quantised weight, rows in bfloat16 are put into the order of its values: STEP_BYTES for each STEP_INPUTS.
STEP_INPUTS, STEP_BYTES = 128, 512
# The least out-features of a matrix product, and the rows of one of its tiles.
MIN_FEATURES, MAX_ROWS = 4, 6
# Attention: head_dim is a multiple of LANES, and pages have KERNEL_PAGE positions.
LANES, KERNEL_PAGE = 16, 64
# The most taps of the short convolution.
MAX_TAPS = 8
# Bytes of a cache line, and how far apart addresses are that compete for the same lines of the first cache.
CACHE_LINE, CACHE_WAY = 64, 4096


@functools.cache
def _register() -> None:
    """Make the kernels known to jax."""
    library = native_library.load()
    assert library is not None
    for name, symbol in TARGETS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, symbol)), platform="cpu")


def _kernel(target: str, results: Any, **options: Any) -> Any:
    """Return the kernel as a jax function. The build is part of the program, so a cached program is of the same build."""
    assert is_available(), "the kernels cannot run here; see `Backend.of`"
    build = active_build()
    _register()
    call = jax.ffi.ffi_call(target, results, **options)
    return functools.partial(call, build=np.int64(BUILDS.index(build)))


def can_grouped_matmul(rows_RC: jax.Array, weights_EOC: Weight, sizes_E: jax.Array, dtype: DTypeLike) -> bool:
    return _can_multiply(rows_RC, weights_EOC, dtype)


def can_matmul(x: jax.Array, weight_OC: Weight, dtype: DTypeLike) -> bool:
    return _can_multiply(x, weight_OC, dtype)


def _can_multiply(x: jax.Array, weight: Weight, dtype: DTypeLike) -> bool:
    if not isinstance(weight, jax.Array):
        return False
    dtypes = x.dtype.name, weight.dtype.name, jnp.dtype(dtype).name
    is_form = dtypes in (("float32",) * 3, ("bfloat16", "bfloat16", "float32"), ("bfloat16",) * 3)
    return is_form and weight.shape[-2] >= MIN_FEATURES and x.size > 0


def grouped_matmul(rows_RC: jax.Array, weights_EOC: jax.Array, sizes_E: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Multiply each row by the weight of its group: [R, O], summed in float32 and rounded once, to `dtype`.

    Groups follow each other, and group e has `sizes_E[e]` rows. Results for rows after the last group are undefined.
    """
    result = jax.ShapeDtypeStruct((len(rows_RC), weights_EOC.shape[1]), dtype)
    call = _kernel(GROUPED_MATMUL, (result, _scratch_shape(rows_RC.shape, rows_RC.dtype)))
    return call(rows_RC, weights_EOC, sizes_E.astype(jnp.int32))[0]


def _scratch_shape(
    shape: tuple[int, ...], dtype: DTypeLike, *, is_padded: bool = False, is_quantized: bool = False
) -> jax.ShapeDtypeStruct:
    """Return the scratch space for the rows [R, C] of a product.

    They are put there to be widened or packed, to be in the order of a quantised weight, or if they are more than one tile
    and would compete for the same cache lines, which rows that are padded already do not. A single row of full tiles is its
    own packed form.
    """
    num_rows, size = shape
    is_wide = dtype == jnp.bfloat16 and active_build() not in WITHOUT_WIDENING
    is_packed = _packs(dtype) and (num_rows > 1 or size % WIDE != 0)
    if is_wide or is_packed or (is_quantized and dtype == jnp.bfloat16):
        dtype = jnp.dtype(jnp.float32 if is_wide else dtype)
        multiple, of_multiple = (STEP_INPUTS, STEP_BYTES // dtype.itemsize) if is_quantized else (WIDE, WIDE)
        return jax.ShapeDtypeStruct((num_rows, _padded_stride(-(-size // multiple) * of_multiple, dtype)), dtype)
    stride = _padded_stride(size, dtype)
    is_needed = not is_padded and num_rows > MAX_ROWS and stride > size
    return jax.ShapeDtypeStruct((num_rows if is_needed else 0, stride), dtype)


def _packs(dtype: DTypeLike) -> bool:
    """Return whether rows of a type are packed into tiles."""
    return dtype == jnp.bfloat16 and active_build() == PACKING


def _padded_stride(size: int, dtype: DTypeLike) -> int:
    """Return the distance between rows of this size at which they do not compete for cache lines: no multiple of a way."""
    itemsize = jnp.dtype(dtype).itemsize
    return size + CACHE_LINE // itemsize if size * itemsize % CACHE_WAY == 0 else size


def matmul(x: jax.Array, weight_OC: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Multiply [..., C] with [O, C]: [..., O]; `grouped_matmul` with a single group."""
    rows_RC = x.reshape(-1, x.shape[-1])
    out_RO = grouped_matmul(rows_RC, weight_OC[None], jnp.full(1, len(rows_RC)), dtype)
    return out_RO.reshape(*x.shape[:-1], -1)


def can_quantized_grouped_matmul(rows_RC: jax.Array, weights_EOC: Weight, sizes_E: jax.Array, dtype: DTypeLike) -> bool:
    return _can_multiply_quantized(rows_RC, weights_EOC, dtype)


def can_quantized_matmul(x: jax.Array, weight_OC: Weight, dtype: DTypeLike) -> bool:
    return _can_multiply_quantized(x, weight_OC, dtype)


def _can_multiply_quantized(x: jax.Array, weight: Weight, dtype: DTypeLike) -> bool:
    if not isinstance(weight, GroupedWeight) or weight.group_index is not None:
        return False
    is_form = weight.values.dtype in (jnp.int8, jnp.uint8) and weight.run == RUN and x.dtype == weight.dtype
    is_form &= weight.scale.dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
    dtypes = x.dtype.name, jnp.dtype(dtype).name
    is_form &= dtypes in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16"))
    return is_form and weight.shape[-2] >= MIN_FEATURES and x.size > 0


def quantized_grouped_matmul(
    rows_RC: jax.Array, weights_EOC: GroupedWeight, sizes_E: jax.Array, dtype: DTypeLike
) -> jax.Array:
    """Compute what `grouped_matmul` does of the dequantised weights, without making arrays of them.

    Up to 8 rows in bfloat16 (3 with AMX) for each group, on average over the static shapes, are multiplied with the integer
    values, and the sums are scaled: no element of a weight is rounded. Otherwise the bits are those of the dequantised
    weights.

    Args:
      weights_EOC: a single weight may also be [O, C].
    """
    result = jax.ShapeDtypeStruct((len(rows_RC), weights_EOC.shape[-2]), dtype)
    call = _kernel(QUANTIZED_MATMUL, (result, _scratch_shape(rows_RC.shape, rows_RC.dtype, is_quantized=True)))
    # Without dimensions: XLA would copy scales whose leading dimensions a reshape has joined, because the last one is 1.
    scale = weights_EOC.scale.reshape(-1)
    zero_point = jnp.zeros(0, jnp.int8) if weights_EOC.zero_point is None else weights_EOC.zero_point.reshape(-1)
    return call(rows_RC, weights_EOC.values, scale, zero_point, sizes_E.astype(jnp.int32))[0]


def quantized_matmul(x: jax.Array, weight_OC: GroupedWeight, dtype: DTypeLike) -> jax.Array:
    """Multiply [..., C] with [O, C]: [..., O]; `quantized_grouped_matmul` with a single group."""
    rows_RC = x.reshape(-1, x.shape[-1])
    out_RO = quantized_grouped_matmul(rows_RC, weight_OC, jnp.full(1, len(rows_RC)), dtype)
    return out_RO.reshape(*x.shape[:-1], -1)


def can_experts(x: jax.Array, gate_up: Weight, down: Weight) -> bool:
    """Return whether `experts` takes tokens [..., D] and experts [E, 2F, D] and [E, D, F] of these types and sizes."""
    if not (isinstance(gate_up, jax.Array) and isinstance(down, jax.Array)):
        return False
    is_form = x.dtype == gate_up.dtype == down.dtype and x.dtype in (jnp.float32, jnp.bfloat16)
    return is_form and all(size % MIN_FEATURES == 0 for size in down.shape[1:]) and x.size > 0


def experts(
    x_BTD: jax.Array, chosen_BTK: jax.Array, scores_BTK: jax.Array, gate_up_EOD: jax.Array, down_EDF: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the sum of each token's experts, weighted by their scores, [B, T, D], and each expert's output [B, T, K, D].

    The output for an expert number out of range is 0.
    """
    x_TD = x_BTD.reshape(-1, x_BTD.shape[-1])
    chosen_TK, scores_TK = (x.reshape(len(x_TD), -1) for x in (chosen_BTK, scores_BTK))
    hidden = chosen_TK.size, _padded_stride(down_EDF.shape[2], x_TD.dtype)
    shapes = x_TD.shape, (*chosen_TK.shape, x_TD.shape[1]), hidden
    results = [jax.ShapeDtypeStruct(shape, x_TD.dtype) for shape in shapes]
    hidden_scratch = _scratch_shape((chosen_TK.size, down_EDF.shape[2]), x_TD.dtype, is_padded=True)
    # Tokens are packed once for each of their experts.
    num_rows = chosen_TK.size if _packs(x_TD.dtype) else len(x_TD)
    scratch = _scratch_shape((num_rows, x_TD.shape[1]), x_TD.dtype), hidden_scratch
    mixed_TD, each_TKD, *_ = _kernel(EXPERTS, [*results, *scratch])(
        x_TD, chosen_TK.astype(jnp.int32), scores_TK.astype(jnp.float32), gate_up_EOD, down_EDF
    )
    return mixed_TD.reshape(x_BTD.shape), each_TKD.reshape(*chosen_BTK.shape, -1)


def can_swiglu(gate: jax.Array, up: jax.Array) -> bool:
    return gate.dtype == up.dtype and gate.dtype in (jnp.float32, jnp.bfloat16) and gate.size > 0


def swiglu(gate: jax.Array, up: jax.Array) -> jax.Array:
    """Return silu(gate) · up."""
    return _kernel(SWIGLU, jax.ShapeDtypeStruct(gate.shape, gate.dtype))(gate, up)


def can_rotate(x_BTNH: jax.Array, cos_BTA: jax.Array, sin_BTA: jax.Array) -> bool:
    return x_BTNH.dtype in (jnp.float32, jnp.bfloat16) and cos_BTA.dtype == jnp.float32 and x_BTNH.size > 0


def rotate(x_BTNH: jax.Array, cos_BTA: jax.Array, sin_BTA: jax.Array) -> jax.Array:
    """Rotate the pairs (i, i + H/2) of each head by their angles."""
    return _kernel(ROTATE, jax.ShapeDtypeStruct(x_BTNH.shape, x_BTNH.dtype))(x_BTNH, cos_BTA, sin_BTA)


def can_paged_attention(
    q_BTNH: jax.Array, state: PagedState, positions_BT: jax.Array, pages: PageIndices, sliding_window: int | None
) -> bool:
    is_form = q_BTNH.dtype in (jnp.float32, jnp.bfloat16) and state.k.shape[0] == 1 and PAGE == KERNEL_PAGE
    is_form = is_form and (state.k_scale is None or (state.k.dtype == jnp.int8 and SCALED == LANES))
    return is_form and q_BTNH.shape[-1] % LANES == 0 and q_BTNH.size > 0


def paged_attention(
    q_BTNH: jax.Array, state: PagedState, positions_BT: jax.Array, pages: PageIndices, sliding_window: int | None
) -> jax.Array:
    """Compute what `ops.paged_attention.paged_attention` does, [B, T, N, H]."""
    indices = (jnp.asarray(x[0]) for x in (pages.row_DE, pages.page_DE, pages.start_DE))
    num_entries = jnp.asarray(pages.num_entries).reshape(1)
    numbers = [x.astype(jnp.int32) for x in (positions_BT, *indices, num_entries)]
    call = _kernel(PAGED_ATTENTION, jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype))
    scale = np.float32(q_BTNH.shape[-1] ** -0.5)
    # The pools go in as they are: XLA would copy them to reshape them.
    scales = [np.zeros(0, np.uint16) if x is None else x for x in (state.k_scale, state.v_scale)]
    return call(q_BTNH, state.k, state.v, *scales, *numbers, scale=scale, window=np.int64(sliding_window or 0))


def can_short_convolution(
    x_BTGC: jax.Array, before_BWGC: jax.Array, weight_GCW: jax.Array, segments_BT: jax.Array | None
) -> bool:
    dtypes = {x_BTGC.dtype, before_BWGC.dtype, weight_GCW.dtype}
    is_form = dtypes in ({jnp.dtype(jnp.float32)}, {jnp.dtype(jnp.bfloat16)}) and weight_GCW.shape[-1] <= MAX_TAPS
    return is_form and segments_BT is None and x_BTGC.size > 0


def short_convolution(x_BTGC: jax.Array, before_BWGC: jax.Array, weight_GCW: jax.Array, segments_BT: None) -> jax.Array:
    """Compute what `ops.short_convolution.short_convolution` does, without segments."""
    call = _kernel(SHORT_CONVOLUTION, jax.ShapeDtypeStruct(x_BTGC.shape, x_BTGC.dtype))
    return call(x_BTGC, before_BWGC, jnp.moveaxis(weight_GCW, -1, 0))


def can_delta_rule_in_slots(inputs: DeltaInputs, pool_DMGRKV: jax.Array, rows: SlotRows) -> bool:
    dtypes = {inputs.q_BTGK.dtype, inputs.k_BTGK.dtype, inputs.v_BTGRV.dtype}
    is_form = dtypes in ({jnp.dtype(jnp.float32)}, {jnp.dtype(jnp.bfloat16)}) and pool_DMGRKV.dtype == jnp.float32
    return is_form and len(pool_DMGRKV) == 1 and inputs.k_BTGK.size > 0 and inputs.v_BTGRV.size > 0


def delta_rule_in_slots(inputs: DeltaInputs, pool_DMGRKV: jax.Array, rows: SlotRows) -> tuple[jax.Array, jax.Array]:
    """Compute what `ops.delta_rule.delta_rule_in_slots` does, token by token; the outputs of rows without a slot are 0."""
    q_BTGK, k_BTGK, v_BTGRV, g_BTGR, beta_BTGR = inputs
    # What the value heads of a key head share.
    prepared = *k_BTGK.shape[:3], 2 * k_BTGK.shape[3] + 2
    o, scratch = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (v_BTGRV.shape, prepared))
    results = o, jax.ShapeDtypeStruct(pool_DMGRKV.shape, pool_DMGRKV.dtype), scratch
    continues_B = jnp.zeros(len(v_BTGRV), bool) if rows.continues_B is None else rows.continues_B
    gates = g_BTGR.astype(jnp.float32), beta_BTGR.astype(jnp.float32)
    slots = (jnp.asarray(x, jnp.int32) for x in (rows.slots_B, written_slots(rows, pool_DMGRKV.shape[1])))
    where = *slots, jnp.asarray(rows.is_start_B), jnp.asarray(continues_B)
    call = _kernel(DELTA_RULE_IN_SLOTS, results, input_output_aliases={9: 1})
    o_BTGRV, pool_DMGRKV, _ = call(q_BTGK, k_BTGK, v_BTGRV, *gates, *where, pool_DMGRKV)
    return o_BTGRV, pool_DMGRKV

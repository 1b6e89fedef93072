"""The gated delta rule (arXiv:2412.06464): a linear recurrence over the tokens of a sequence, with a matrix as its state.

For each value head, with key k, query q, value v, decay g <= 0 and step size β of a token:

    S ← e^g S;   S ← S + k (β (v - Sᵀ k))ᵀ;   o = Sᵀ q

Several tokens at once are a chunk: within it the corrections β (v - Sᵀ k) are the solution of a triangular system, so that
a chunk costs a few matrix products (arXiv:2406.06484). Keys and queries are normalised to length 1 first.

Letters: B rows, T tokens, N chunks, C tokens of a chunk, G key heads, R value heads of a key head, K key channels,
V value channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.ops import native, slots
from qwen_dist.ops.cost import F32_BYTES, LayerCost, Passes, Step, uncounted_share
from qwen_dist.ops.dispatch import Backend, Implementation, Op
from qwen_dist.ops.matmul import accum_dtype

CHUNK = 64
_NORM_EPS = 1e-6


class DeltaInputs(NamedTuple):
    """What the rule needs of each token; all are 0 for padding, which then leaves the state as it is.

    Attributes:
      q_BTGK, k_BTGK: queries and keys, not normalised.
      v_BTGRV: values.
      g_BTGR: the logarithm of the decay, at most 0.
      beta_BTGR: the step size, 0 to 1.
    """

    q_BTGK: jax.Array
    k_BTGK: jax.Array
    v_BTGRV: jax.Array
    g_BTGR: jax.Array
    beta_BTGR: jax.Array


def delta_rule(
    inputs: DeltaInputs, start_BGRKV: jax.Array | None = None, segments_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Return the outputs of all tokens and the state after the last one.

    Args:
      inputs: of any floating dtype; everything is computed in at least float32.
      start_BGRKV: the state before the first token; None: 0.
      segments_BT: the number of each token's sequence, where a row has several, one after the other; padding has that
        of the token before it. None: one sequence.

    Returns:
      o [B, T, G, R, V] and the state [B, G, R, K, V], that of the last sequence of the row; both in at least float32.
    """
    return DELTA_RULE(inputs, start_BGRKV, segments_BT)


def delta_rule_plain(
    inputs: DeltaInputs, start_BGRKV: jax.Array | None = None, segments_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Compute one chunk after the other, so that the arrays of one exist at a time. The backward pass computes each again.

    With all chunks prepared together training takes several times the memory, and a TPU's compiler several times as long.
    """

    def one_chunk(state_BGRKV: jax.Array, chunk: tuple[DeltaInputs, Any]) -> tuple[jax.Array, jax.Array]:
        return apply_chunk(state_BGRKV, prepare_chunk(*chunk))

    return _over_chunks(inputs, start_BGRKV, segments_BT, jax.checkpoint(one_chunk))


def delta_rule_prepared(
    inputs: DeltaInputs, start_BGRKV: jax.Array | None = None, segments_BT: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Compute what does not depend on the state first, of all chunks together: a GPU needs that many products at a time."""
    return _over_chunks(inputs, start_BGRKV, segments_BT, apply_chunk, prepare=jax.vmap(prepare_chunk))


def _over_chunks(
    inputs: DeltaInputs,
    start_BGRKV: jax.Array | None,
    segments_BT: jax.Array | None,
    one_chunk: Callable[[jax.Array, Any], tuple[jax.Array, jax.Array]],
    prepare: Callable[..., PreparedChunk] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return what `delta_rule` does.

    Args:
      one_chunk: from the state and a chunk to the next state and the outputs.
      prepare: is applied to all chunks together, before the loop.
    """
    wide = accum_dtype(inputs.v_BTGRV.dtype)
    inputs = DeltaInputs(*(x.astype(wide) for x in inputs))
    B, T, G, R, V = inputs.v_BTGRV.shape
    if start_BGRKV is None:
        start_BGRKV = jnp.zeros((B, G, R, inputs.k_BTGK.shape[-1], V), wide)
    if T == 1 and segments_BT is None:
        return one_token(inputs, start_BGRKV)
    chunks = _in_chunks(inputs, segments_BT)
    xs = chunks if prepare is None else prepare(*chunks)
    end_BGRKV, o_NBCGRV = jax.lax.scan(one_chunk, start_BGRKV.astype(wide), xs)
    o_BTGRV = jnp.moveaxis(o_NBCGRV, 0, 1).reshape(B, -1, G, R, V)
    return o_BTGRV[:, :T], end_BGRKV


def delta_rule_in_slots(inputs: DeltaInputs, pool_DMGRKV: jax.Array, rows: slots.SlotRows) -> tuple[jax.Array, jax.Array]:
    """Return the outputs of the rows of a step [B, T, G, R, V], and the states with these tokens in them.

    Args:
      inputs: of the rows, each a part of one sequence; padding is at a row's end.
      pool_DMGRKV: the state of each slot, in at least float32.
      rows: the slot of each row. A row of one token is a step; others are chunks.
    """
    return DELTA_RULE_IN_SLOTS(inputs, pool_DMGRKV, rows)


def delta_rule_in_slots_plain(
    inputs: DeltaInputs, pool_DMGRKV: jax.Array, rows: slots.SlotRows
) -> tuple[jax.Array, jax.Array]:
    inputs = DeltaInputs(*(x.astype(pool_DMGRKV.dtype) for x in inputs))
    if inputs.v_BTGRV.shape[1] == 1 and rows.continues_B is None:
        o_BTGRV, states_BGRKV = one_token(inputs, slots.gather(pool_DMGRKV, rows))
        return o_BTGRV, slots.scatter(pool_DMGRKV, rows, states_BGRKV)

    def one_row(state_GRKV: jax.Array, chunks: PreparedChunk) -> tuple[jax.Array, jax.Array]:
        last, o_N = jax.lax.scan(apply_chunk, state_GRKV[None], jax.tree.map(lambda x: x[:, None], chunks))
        return last[0], o_N[:, 0]

    prepared = jax.vmap(prepare_chunk)(*_in_chunks(inputs, None))
    by_row = jax.tree.map(lambda x: x.swapaxes(0, 1), prepared)
    pool_DMGRKV, o_BNCGRV = slots.recur(pool_DMGRKV, rows, 0.0, by_row, one_row)
    return o_BNCGRV.reshape(len(o_BNCGRV), -1, *o_BNCGRV.shape[3:])[:, : inputs.v_BTGRV.shape[1]], pool_DMGRKV


DELTA_RULE = Op("delta rule", delta_rule_plain, {Backend.GPU: (Implementation("prepared", delta_rule_prepared),)})
_KERNEL = Implementation("kernel", native.delta_rule_in_slots, native.can_delta_rule_in_slots)
DELTA_RULE_IN_SLOTS = Op("delta rule in slots", delta_rule_in_slots_plain, {Backend.CPU_KERNELS: (_KERNEL,)})


def one_token(inputs: DeltaInputs, state_BGRKV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the outputs [B, 1, G, R, V] and the new state, for rows of one token.

    The old state is read once for both products: then XLA updates it in place.
    """
    q_BGK, k_BGK = _normalised(inputs.q_BTGK[:, 0]) * inputs.q_BTGK.shape[-1] ** -0.5, _normalised(inputs.k_BTGK[:, 0])
    v_BGRV, decay_BGR, beta_BGR = inputs.v_BTGRV[:, 0], jnp.exp(inputs.g_BTGR[:, 0]), inputs.beta_BTGR[:, 0]
    remembered_BGRV = decay_BGR[..., None] * jnp.einsum("BGRKV,BGK->BGRV", state_BGRKV, k_BGK, precision="highest")
    answered_BGRV = decay_BGR[..., None] * jnp.einsum("BGRKV,BGK->BGRV", state_BGRKV, q_BGK, precision="highest")
    change_BGRV = beta_BGR[..., None] * (v_BGRV - remembered_BGRV)
    o_BGRV = answered_BGRV + jnp.sum(q_BGK * k_BGK, axis=-1)[..., None, None] * change_BGRV
    new_BGRKV = decay_BGR[..., None, None] * state_BGRKV + k_BGK[:, :, None, :, None] * change_BGRV[..., None, :]
    return o_BGRV[:, None], new_BGRKV


def chunk_size(num_tokens: int) -> int:
    """Return the tokens of a chunk of rows with this many tokens: a power of 2."""
    return min(CHUNK, 1 << (num_tokens - 1).bit_length())


def _in_chunks(inputs: DeltaInputs, segments_BT: jax.Array | None) -> tuple[DeltaInputs, Any]:
    """Return the arguments of `prepare_chunk` for each chunk: arrays [N, B, …]."""
    size = chunk_size(inputs.v_BTGRV.shape[1])
    chunks = jax.tree.map(lambda x: _cut(x, size), inputs)
    if segments_BT is None:
        return chunks, None
    segments_NBC = _cut(segments_BT, size, mode="edge")
    return chunks, (segments_NBC, jnp.concatenate([segments_NBC[:1, :, 0], segments_NBC[:-1, :, -1]]))


class PreparedChunk(NamedTuple):
    """A chunk of each row, with everything computed that does not depend on the state.

    With the state S before the chunk, the corrections of its tokens are N = values - keys S; the outputs are
    queries S + weights N, and the state after the chunk is kept S + newᵀ N.
    """

    values_BGRCV: jax.Array
    keys_BGRCK: jax.Array
    queries_BGRCK: jax.Array
    weights_BGRCC: jax.Array
    new_BGRCK: jax.Array
    kept_BGR: jax.Array


def prepare_chunk(inputs: DeltaInputs, segments: Any = None) -> PreparedChunk:
    """Compute what does not depend on the state, for rows of one chunk, in at least float32.

    Args:
      inputs: rows [B, C, …] of one chunk.
      segments: the number of each token's sequence [B, C], and that of the token before the chunk [B]; None: one.
    """
    q_BGCK = _normalised(inputs.q_BTGK.swapaxes(1, 2)) * inputs.q_BTGK.shape[-1] ** -0.5
    k_BGCK = _normalised(inputs.k_BTGK.swapaxes(1, 2))
    v_BGRCV = jnp.moveaxis(inputs.v_BTGRV, 1, 3)
    beta_BGRC, g_BGRC = jnp.moveaxis(inputs.beta_BTGR, 1, 3), jnp.moveaxis(inputs.g_BTGR, 1, 3)
    C = v_BGRCV.shape[3]
    sees_BCC, sees_start_BC, is_last_BC = _visibility(segments, C)
    between_BGRCC = _sums_between(g_BGRC)
    decay_BGRCC = jnp.exp(jnp.where(sees_BCC, between_BGRCC, -jnp.inf))
    from_start_BGRC = jnp.where(sees_start_BC, jnp.exp(jnp.cumsum(g_BGRC, axis=-1)), 0)
    to_end_BGRC = jnp.exp(jnp.where(is_last_BC, between_BGRCC[..., -1, :], -jnp.inf))

    kk_BGCC, qk_BGCC = _products(k_BGCK, k_BGCK), _products(q_BGCK, k_BGCK)
    system_BGRCC = jnp.tril(beta_BGRC[..., None] * kk_BGCC[:, :, None] * decay_BGRCC, -1)
    solved_BGRCC = unit_lower_inverse(system_BGRCC) * beta_BGRC[..., None, :]
    k_BG1CK, q_BG1CK = k_BGCK[:, :, None], q_BGCK[:, :, None]
    return PreparedChunk(
        values_BGRCV=jnp.matmul(solved_BGRCC, v_BGRCV, precision="highest"),
        keys_BGRCK=jnp.matmul(solved_BGRCC, k_BG1CK * from_start_BGRC[..., None], precision="highest"),
        queries_BGRCK=q_BG1CK * from_start_BGRC[..., None],
        weights_BGRCC=qk_BGCC[:, :, None] * decay_BGRCC,
        new_BGRCK=k_BG1CK * to_end_BGRC[..., None],
        kept_BGR=from_start_BGRC[..., -1],
    )


def apply_chunk(state_BGRKV: jax.Array, chunk: PreparedChunk) -> tuple[jax.Array, jax.Array]:
    """Return the state after a chunk, and the outputs of its tokens [B, C, G, R, V]."""
    changes_BGRCV = chunk.values_BGRCV - jnp.matmul(chunk.keys_BGRCK, state_BGRKV, precision="highest")
    o_BGRCV = jnp.matmul(chunk.queries_BGRCK, state_BGRKV, precision="highest")
    o_BGRCV += jnp.matmul(chunk.weights_BGRCC, changes_BGRCV, precision="highest")
    added_BGRKV = jnp.matmul(chunk.new_BGRCK.swapaxes(-1, -2), changes_BGRCV, precision="highest")
    return chunk.kept_BGR[..., None, None] * state_BGRKV + added_BGRKV, jnp.moveaxis(o_BGRCV, 3, 1)


def _visibility(segments: Any, C: int) -> tuple[Any, Any, Any]:
    """Return which tokens each token sees, which see the state before the chunk, and which are in the state after it.

    The shapes broadcast to [B, G, R, C, C] and [B, G, R, C].
    """
    causal_CC = np.tril(np.ones((C, C), bool))
    if segments is None:
        return causal_CC, True, True
    segment_BC, before_B = segments
    segment_B11C = segment_BC[:, None, None]
    same_BCC = segment_B11C[..., :, None] == segment_B11C[..., None, :]
    return causal_CC & same_BCC, segment_B11C == before_B[:, None, None, None], segment_B11C == segment_B11C[..., -1:]


def _sums_between(g_BGRC: jax.Array) -> jax.Array:
    """Return the sum of g over the tokens after j up to i, at [..., i, j]; 0 if there are none.

    Differences of sums from the start would lose digits: those grow to hundreds, and the small differences are what counts.
    """
    C = g_BGRC.shape[-1]
    up_to_CC = np.tril(np.ones((C, C), g_BGRC.dtype))
    after_BGRCC = jnp.where(np.tri(C, k=-1, dtype=bool), g_BGRC[..., None], 0)
    return jnp.matmul(up_to_CC, after_BGRCC, precision="highest")


def _products(a_BGCK: jax.Array, b_BGCK: jax.Array) -> jax.Array:
    return jnp.matmul(a_BGCK, b_BGCK.swapaxes(-1, -2), precision="highest")


def _normalised(x: jax.Array) -> jax.Array:
    """Return x with its last dimension scaled to length 1; 0 stays 0, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _NORM_EPS)


@jax.custom_vjp
def unit_lower_inverse(lower: jax.Array) -> jax.Array:
    """Return (I + L)⁻¹ of strictly lower triangular matrices [..., C, C], C a power of 2.

    The inverse of blocks of 2, 4, 8, … on the diagonal: X ← X - X L_off X, first with X = I. Its error stays that of
    substitution where keys repeat, unlike sums of powers of L, whose terms grow and cancel.
    """
    return _inverse_by_blocks(lower)


def _inverse_by_blocks(lower: jax.Array) -> jax.Array:
    C = lower.shape[-1]
    index, size = np.arange(C), 1
    inverse = jnp.broadcast_to(jnp.eye(C, dtype=lower.dtype), lower.shape)
    while size < C:
        block = index // size
        is_off_diagonal = (block[:, None] % 2 == 1) & (block[None, :] == block[:, None] - 1)
        off = jnp.where(is_off_diagonal, lower, 0)
        if size > 1:
            off = jnp.matmul(jnp.matmul(inverse, off, precision="highest"), inverse, precision="highest")
        inverse -= off
        size *= 2
    return inverse


def _inverse_forward(lower: jax.Array) -> tuple[jax.Array, jax.Array]:
    inverse = _inverse_by_blocks(lower)
    return inverse, inverse


def _inverse_backward(inverse: jax.Array, gradient: jax.Array) -> tuple[jax.Array]:
    transposed = inverse.swapaxes(-1, -2)
    product = jnp.matmul(jnp.matmul(transposed, gradient, precision="highest"), transposed, precision="highest")
    return (jnp.tril(-product, -1),)


unit_lower_inverse.defvjp(_inverse_forward, _inverse_backward)


def _cut(x_BT: jax.Array, size: int, mode: str = "constant") -> jax.Array:
    """[B, T, …] → [N, B, C, …], padded at the end: with zeros, or with mode "edge" with the last token's value."""
    B, T, *rest = x_BT.shape
    padded: Any = jnp.pad(x_BT, ((0, 0), (0, -T % size), *((0, 0),) * len(rest)), mode=mode)
    return jnp.moveaxis(padded.reshape(B, -1, size, *rest), 1, 0)


def delta_rule_cost(step: Step, num_heads: int, values_per_head: int, K: int, V: int) -> LayerCost:
    """Return the cost of the rule: for one token a step, for more their share of the products of a chunk of C tokens.

    The inverse takes 2 (log₂ C - 1) products of [C, C] matrices, and its gradient 2. The sums of gates take one, also
    backward; others take twice as many in the backward pass, before which the plain form computes the corrections and what
    they need again.
    """
    heads, R = step.size(batch=step.num_rows, scan_length=step.num_tokens, scan_heads=num_heads), values_per_head
    if step.num_tokens == 1:
        # Two products with the state; then it is decayed, and an outer product is added. The state before and after.
        return LayerCost(flops=Passes(heads * R * 7 * K * V), workspace_bytes=2 * heads * R * K * V * F32_BYTES)
    C = chunk_size(step.num_tokens)
    with_state = heads * R * 2 * (3 * K * V + C * V)
    of_chunk = heads * (2 * 2 * C * K + R * 2 * (C * K + C * V))
    squares = heads * R * 2 * C * C  # a product of [C, C] matrices of each value head and chunk, by token
    inverse, inverse_backward = (2 * (C.bit_length() - 2) + 1) * squares, 3 * squares
    is_plain = step.phase == "train" and step.implementation(DELTA_RULE) == DELTA_RULE.plain.name
    again = heads * R * 2 * K * V + of_chunk + inverse if is_plain else 0
    backward = 2 * (with_state + of_chunk) + inverse_backward + again
    # What is in a loop over chunks, of all rows together in training: everything, or only the products with the state.
    num_chunks = -(-step.num_tokens // C) * (1 if step.phase == "train" else step.size(batch=step.num_rows))
    uncounted, operands = uncounted_share(num_chunks), 2 * K + R * V
    in_loop = Passes(with_state + of_chunk + inverse, backward) if is_plain else Passes(with_state, 2 * with_state)
    # In float32: the operands, before and after they are cut or normalised; for each value head the state before each
    # chunk, and the outputs with their gradients, or all prepared chunks with what they are computed from.
    of_head = K * V // C + (3 * V if is_plain else 4 * K + 4 * V + 4 * C)
    return LayerCost(
        flops=Passes(with_state + of_chunk + inverse, backward, recompute=again),
        uncounted_flops=Passes(uncounted * in_loop.forward, uncounted * in_loop.backward),
        uncounted_state=uncounted,
        workspace_bytes=heads * (operands + R * (2 * V + 3 * K + 2 * C)) * F32_BYTES,
        saved_bytes=heads * (2 * operands + R * of_head) * F32_BYTES,
        # As the compilers' reports show.
        gradient_copies=1 if step.platform == "tpu" else 2,
    )

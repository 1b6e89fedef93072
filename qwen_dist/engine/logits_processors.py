"""Biases, bans and penalties on logits, as the logits processors of transformers and the penalties of the OpenAI API.

They need the tokens of a sequence in order, so the devices keep a history of the slots, but only for requests that use a
processor: a step without such a request runs the program that has none of this.

Letters: B rows, M slots, L positions of the history, V vocab, W sequences with a bias, N tokens of such a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.sharding import LocalShard, shard_map_op

# Each length of the history and each number of biased sequences is a program to compile.
_MIN_HISTORY = 1024
_MIN_SEQUENCES = 16
_ALWAYS = 2**31 - 1
_ROWS, _LOGITS = ("batch",), ("batch", "vocab")
_WHOLE = "kv_length"  # a dimension that every device has whole
_BY_ROW = (_ROWS, _ROWS, _ROWS, _ROWS, _ROWS, ("batch", _WHOLE, _WHOLE), ("batch", _WHOLE), ("batch", _WHOLE))


class ProcessorArrays(NamedTuple):
    """The processors of every row. A row without any has a `prompt_length` of 0 and changes nothing.

    Attributes:
      prompt_length: [B].
      min_length: [B], stop tokens are banned while prompt and answer are shorter.
      ngram_size: [B], 0 for none.
      frequency_penalty, presence_penalty: [B].
      sequences: [B, W, N], aligned at their ends, padded with -1.
      bias: [B, W], added to the last token's logit where the tokens before it match.
      until: [B, W], the bias is added while prompt and answer are shorter.
    """

    prompt_length: jax.Array | np.ndarray
    min_length: jax.Array | np.ndarray
    ngram_size: jax.Array | np.ndarray
    frequency_penalty: jax.Array | np.ndarray
    presence_penalty: jax.Array | np.ndarray
    sequences: jax.Array | np.ndarray
    bias: jax.Array | np.ndarray
    until: jax.Array | np.ndarray

    @classmethod
    def from_request(cls, request: Request) -> ProcessorArrays | None:
        """Return the processors of one request as one row, on the host; None if it uses none."""
        params, length = request.params, len(request.prompt)
        min_length = max(params.min_length, length + params.min_new_tokens if params.min_new_tokens else 0)
        min_length = min(min_length, _ALWAYS)
        entries = _biased_sequences(params, length, min_length)
        penalties = params.frequency_penalty, params.presence_penalty
        if not entries and not any((min_length, params.no_repeat_ngram_size, *penalties)):
            return None
        width = max((len(ids) for ids, _, _ in entries), default=1)
        padded = [[-1] * (width - len(ids)) + list(ids) for ids, _, _ in entries]
        return cls(
            prompt_length=np.array([length], np.int32),
            min_length=np.array([min_length], np.int32),
            ngram_size=np.array([min(params.no_repeat_ngram_size, _ALWAYS)], np.int32),
            frequency_penalty=np.array([params.frequency_penalty], np.float32),
            presence_penalty=np.array([params.presence_penalty], np.float32),
            sequences=np.array(padded, np.int32).reshape(1, len(entries), width),
            bias=np.array([[bias for _, bias, _ in entries]], np.float32),
            until=np.array([[until for *_, until in entries]], np.int32),
        )


_NO_PROCESSORS = ProcessorArrays(
    prompt_length=np.zeros(1, np.int32),
    min_length=np.zeros(1, np.int32),
    ngram_size=np.zeros(1, np.int32),
    frequency_penalty=np.zeros(1, np.float32),
    presence_penalty=np.zeros(1, np.float32),
    sequences=np.zeros((1, 0, 1), np.int32),
    bias=np.zeros((1, 0), np.float32),
    until=np.zeros((1, 0), np.int32),
)


def _biased_sequences(
    params: SamplingParams, prompt_length: int, min_length: int
) -> list[tuple[tuple[int, ...], float, int]]:
    """Return (token ids, bias, the length of prompt and answer from which on it is not added)."""
    always = [*(((token,), bias) for token, bias in params.logit_bias), *params.sequence_bias]
    first = [((token,), float("-inf"), prompt_length + 1) for token in params.begin_suppress_tokens]
    stops = [((token,), float("-inf"), min_length) for token in params.stop_token_ids] if min_length else []
    return [*((ids, bias, _ALWAYS) for ids, bias in always), *first, *stops]


def of_rows(rows: Sequence[ProcessorArrays | None], *, always: bool = False) -> ProcessorArrays | None:
    """Return the processors of the rows of a step, of few sizes W and N; None if no row uses any, unless `always`."""
    used = [row for row in rows if row is not None]
    if not used and not always:
        return None
    used = used or [_NO_PROCESSORS]
    width, length = (_round_up(max(row.sequences.shape[axis] for row in used), 4) for axis in (1, 2))
    width = max(width, _MIN_SEQUENCES)
    columns = [np.zeros(len(rows), array.dtype) for array in used[0][:5]]
    sequences = np.full((len(rows), width, length), -1, np.int32)
    bias, until = np.zeros((len(rows), width), np.float32), np.zeros((len(rows), width), np.int32)
    for b, row in enumerate(rows):
        if row is None:
            continue
        for column, array in zip(columns, row[:5], strict=True):
            column[b] = array[0]
        num_entries, num_tokens = row.sequences.shape[1:]
        sequences[b, :num_entries, length - num_tokens :] = row.sequences[0]
        bias[b, :num_entries], until[b, :num_entries] = row.bias[0], row.until[0]
    arrays = [*columns, sequences, bias, until]
    return ProcessorArrays(*arrays)


def _round_up(size: int, base: int) -> int:
    """Return the next power of `base`."""
    power = 1
    while power < size:
        power *= base
    return power


def history_length(processors: ProcessorArrays, end_B: np.ndarray) -> int:
    """Return the length that the history must have, from the last position `end_B` of each row."""
    return max(_MIN_HISTORY, _round_up(int(np.max(np.where(processors.prompt_length > 0, end_B, 0))) + 1, 2))


def add_chunks(history_ML: jax.Array, slots_B: jax.Array, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    """Add chunks of prompts to the history; negative positions and slots of M are padding."""
    positions_BT = jnp.where(positions_BT < 0, history_ML.shape[1], positions_BT)
    return history_ML.at[slots_B[:, None], positions_BT].set(tokens_BT, mode="drop")


def add_tokens(history_ML: jax.Array, slots_B: jax.Array, tokens_B: jax.Array, positions_B: jax.Array) -> jax.Array:
    """Add a token of each of these slots to the history; slots of M are padding."""
    return history_ML.at[slots_B, positions_B].set(tokens_B, mode="drop")


def apply_biases(
    logits_BV: jax.Array, processors: ProcessorArrays, stop_ids: jax.Array, history_BL: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Return the logits after the biases and bans, which come before the repetition penalty.

    Args:
      logits_BV: of the rows.
      processors: of the rows.
      stop_ids: padded with -1.
      history_BL: the tokens of the rows' sequences, valid up to their lengths.
      length_B: the tokens of each row's prompt and answer so far.
    """

    def local(shard: LocalShard, logits_BV: jax.Array, *arguments: jax.Array) -> tuple[jax.Array]:
        *columns, history_BL, length_B, stop_ids = arguments
        processors, vocab = ProcessorArrays(*columns), _LocalVocab(shard, logits_BV)
        logits_BV = logits_BV + _sequence_bias(vocab, processors, history_BL, length_B)
        is_short_B = length_B < processors.min_length
        is_stop_BV = vocab.mark(jnp.broadcast_to(stop_ids, (len(logits_BV), len(stop_ids))))
        repeats_BV = jax.lax.cond(
            jnp.any(processors.ngram_size > 0),
            lambda: vocab.mark(_ngram_ends(jnp.asarray(processors.ngram_size), history_BL, length_B)),
            lambda: jnp.zeros(logits_BV.shape, bool),
        )
        return (jnp.where(repeats_BV | (is_stop_BV & is_short_B[:, None]), -jnp.inf, logits_BV),)

    arguments = [logits_BV, *processors, history_BL, length_B, stop_ids]
    return shard_map_op(local, arguments, [_LOGITS, *_BY_ROW, ("batch", _WHOLE), _ROWS, (_WHOLE,)], [_LOGITS])[0]


def subtract_penalties(
    logits_BV: jax.Array, processors: ProcessorArrays, history_BL: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Return the logits after frequency and presence penalty, as in the OpenAI API and vLLM.

    logit - count · frequency_penalty - (count > 0) · presence_penalty, counted in the answer only. Arguments as in
    `apply_biases`.
    """

    def local(shard: LocalShard, logits_BV: jax.Array, *arguments: jax.Array) -> tuple[jax.Array]:
        *columns, history_BL, length_B = arguments
        processors, vocab = ProcessorArrays(*columns), _LocalVocab(shard, logits_BV)

        def penalized() -> jax.Array:
            at_L = jnp.arange(history_BL.shape[1])
            is_answer_BL = (at_L >= processors.prompt_length[:, None]) & (at_L < length_B[:, None])
            ones = jnp.ones(history_BL.shape, logits_BV.dtype)
            count_BV = vocab.add(jnp.where(is_answer_BL, history_BL, -1), ones)
            frequency_B, presence_B = (
                penalty.astype(logits_BV.dtype) for penalty in (processors.frequency_penalty, processors.presence_penalty)
            )
            return logits_BV - count_BV * frequency_B[:, None] - (count_BV > 0) * presence_B[:, None]

        is_used = jnp.any((processors.frequency_penalty != 0) | (processors.presence_penalty != 0))
        return (jax.lax.cond(is_used, penalized, lambda: logits_BV),)

    arguments = [logits_BV, *processors, history_BL, length_B]
    return shard_map_op(local, arguments, [_LOGITS, *_BY_ROW, ("batch", _WHOLE), _ROWS], [_LOGITS])[0]


class _LocalVocab:
    """This device's shard of the vocabulary, to scatter tokens into; negative tokens are padding."""

    def __init__(self, shard: LocalShard, logits_BV: jax.Array):
        self._shape, self._dtype = logits_BV.shape, logits_BV.dtype
        self._offset = shard.offset("vocab", logits_BV.shape[1])

    def _indices(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        num_rows, size = self._shape
        local = tokens - self._offset
        is_inside = (tokens >= 0) & (local >= 0) & (local < size)
        return jnp.arange(num_rows)[:, None], jnp.where(is_inside, local, size)

    def mark(self, tokens: jax.Array) -> jax.Array:
        """Return a mask [B, V] of the tokens of each row."""
        return jnp.zeros(self._shape, bool).at[self._indices(tokens)].set(True, mode="drop")

    def add(self, tokens: jax.Array, values: jax.Array) -> jax.Array:
        """Return the sum [B, V] of the values of each token."""
        return jnp.zeros(self._shape, self._dtype).at[self._indices(tokens)].add(values, mode="drop")


def _sequence_bias(
    vocab: _LocalVocab, processors: ProcessorArrays, history_BL: jax.Array, length_B: jax.Array
) -> jax.Array:
    """Return the bias [B, V]: of each sequence whose tokens but the last are the last ones of the row."""
    before_BWN, last_BW = processors.sequences[..., :-1], processors.sequences[..., -1]
    at_BN = length_B[:, None] - jnp.arange(before_BWN.shape[-1], 0, -1)
    tokens_BN = jnp.take_along_axis(history_BL, jnp.maximum(at_BN, 0), axis=1)
    is_match_BWN = (before_BWN < 0) | ((before_BWN == tokens_BN[:, None]) & (at_BN >= 0)[:, None])
    is_used_BW = jnp.all(is_match_BWN, axis=-1) & (length_B[:, None] < processors.until)
    return vocab.add(jnp.where(is_used_BW, last_BW, -1), jnp.asarray(processors.bias))


def _ngram_ends(ngram_size_B: jax.Array, history_BL: jax.Array, length_B: jax.Array) -> jax.Array:
    """Return [B, L] the tokens that would complete an n-gram which the row already has, -1 at all other positions."""
    at_L = jnp.arange(history_BL.shape[1])
    size_B1, length_B1 = ngram_size_B[:, None], length_B[:, None]

    def match(back: jax.Array, is_end_BL: jax.Array) -> jax.Array:
        wanted_B1 = jnp.take_along_axis(history_BL, jnp.maximum(length_B1 - back, 0), axis=1)
        return is_end_BL & ((back >= size_B1) | (jnp.roll(history_BL, back, axis=1) == wanted_B1))

    is_end_BL = (size_B1 > 0) & (at_L >= size_B1 - 1) & (at_L < length_B1)
    longest = jnp.minimum(jnp.max(ngram_size_B), history_BL.shape[1])
    return jnp.where(jax.lax.fori_loop(1, longest, match, is_end_BL), history_BL, -1)

"""Make batches of one shape from examples. Their order depends only on the seed, not on the number of processes.

Every process iterates over whole batches and gives its devices their rows, so a run can be resumed with another number of
processes. The position of the iteration is a small JSON value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from qwen_dist.config import DataOptions
from qwen_dist.train.examples import Examples

# Rows that are packed at the same time. More leave less padding; fewer stay closer to the shuffled order.
PACKING_BINS = 64
# Without packing, a row is as long as the longest example, rounded up to this so that few programs are compiled.
LENGTH_MULTIPLE = 64


class TrainBatch(NamedTuple):
    """Rows of tokens; every field is int32 [B, T].

    Attributes:
      tokens: token ids.
      targets: the token after each token.
      loss_mask: 1 where the target counts in the loss.
      positions: the position in the example; -1 for padding.
      segments: the number of the token's example in its row, from 1; None when each row has one example.
    """

    tokens: Any
    targets: Any
    loss_mask: Any
    positions: Any
    segments: Any = None

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        loss_masks: Sequence[Sequence[int]] | None = None,
        length: int | None = None,
    ) -> TrainBatch:
        """Return a batch with one sequence in each row.

        Args:
          sequences: token ids.
          loss_masks: for each token whether it counts in the loss; default: all but the first, which nothing predicts.
          length: of a row; default: that of the longest sequence. Longer sequences are cut.
        """
        length = length or max(map(len, sequences))
        masks = [[1] * len(sequence) for sequence in sequences] if loss_masks is None else loss_masks
        rows = []
        for sequence, mask in zip(sequences, masks, strict=True):
            ids, counts = np.asarray(sequence[:length], np.int32), np.asarray(mask[:length], np.int32)
            positions = np.arange(len(ids), dtype=np.int32)
            padded = [(ids, 0), (ids[1:], 0), (counts[1:], 0), (positions, -1)]
            rows.append([np.pad(x, (0, length - len(x)), constant_values=value) for x, value in padded])
        return cls(*(np.stack(column) for column in zip(*rows, strict=True)))

    def microbatches(self, count: int) -> tuple[TrainBatch, ...]:
        """Split the rows into `count` equal batches."""
        columns = [[None] * count if x is None else np.split(x, count) for x in self]
        return tuple(TrainBatch(*column) for column in zip(*columns, strict=True))


class BatchIterator(Protocol):
    """The interface of grain's iterators."""

    def __next__(self) -> TrainBatch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def row_length(examples: Examples, options: DataOptions) -> int:
    """Return the number of positions in a row."""
    if options.packing:
        return options.max_length
    longest = max(map(len, examples.examples))
    return min(options.max_length, -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def rows_per_epoch(examples: Examples, options: DataOptions) -> float:
    """Return how many rows all examples fill; with packing, assuming no gaps."""
    return examples.num_positions / options.max_length if options.packing else len(examples)


def training_batches(examples: Examples, options: DataOptions, batch_size: int) -> BatchIterator:
    """Return an endless iterator of batches, with a new order in each epoch."""
    import grain

    shuffled = grain.MapDataset.source(examples).seed(options.seed).shuffle().repeat()
    return iter(_batched(shuffled, examples, options, batch_size))


def evaluation_batches(examples: Examples, options: DataOptions, batch_size: int) -> Iterator[TrainBatch]:
    """Return an iterator over every example once, in order; the last batch is filled with padding."""
    import grain

    return iter(_batched(grain.MapDataset.source(examples), examples, options, batch_size))


def _batched(dataset: Any, examples: Examples, options: DataOptions, batch_size: int) -> Any:
    import grain
    from grain.experimental import BestFitPackIterDataset

    length = row_length(examples, options)
    # The data is in memory: reading ahead in threads would only make the saved position imprecise.
    rows = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if options.packing:
        lengths = dict.fromkeys(("tokens", "targets", "loss_mask"), length)
        bins = max(PACKING_BINS, batch_size)
        rows = BestFitPackIterDataset(rows, length_struct=lengths, num_packing_bins=bins, shuffle_bins=False)
    else:
        rows = rows.map(lambda example: _padded(example, length))
    return rows.batch(batch_size, drop_remainder=False).map(lambda fields: _batch(fields, batch_size, options.packing))


def _padded(example: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    size = len(example["tokens"])
    positions = {"tokens_positions": np.arange(size, dtype=np.int32), "tokens_segment_ids": np.ones(size, np.int32)}
    return {name: np.pad(values, (0, length - size)) for name, values in (example | positions).items()}


def _batch(fields: dict[str, np.ndarray], batch_size: int, packed: bool) -> TrainBatch:
    missing = batch_size - len(fields["tokens"])
    names = ("tokens", "targets", "loss_mask", "tokens_positions", "tokens_segment_ids")
    tokens, targets, loss_mask, positions, segments = (
        np.pad(fields[name].astype(np.int32), ((0, missing), (0, 0))) for name in names
    )
    positions = np.where(segments == 0, -1, positions)
    return TrainBatch(tokens, targets, loss_mask, positions, segments if packed else None)

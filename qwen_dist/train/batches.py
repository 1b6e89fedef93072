"""Examples to batches of one shape, in an order that depends on the seed alone: the same for any number of processes.

Every process goes through all batches and feeds its devices their rows, so that a run can go on with another number of
processes. Where the iteration stands is a small JSON value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from qwen_dist.config import DataOptions
from qwen_dist.train.examples import Examples

# Rows packed at a time: with more, less padding; with fewer, an order closer to the shuffled one.
ROWS_AT_ONCE = 64
# Rows that are not packed are as long as the longest example, rounded up so that few programs are compiled.
LENGTH_MULTIPLE = 64


class Batch(NamedTuple):
    """Rows of tokens, int32 [B, T] each.

    targets: what each token is followed by. is_learnt: 1 where the target counts. positions: in an example, -1 for padding.
    segments: which example of its row a token is of, from 1; None where every row has only one.
    """

    tokens: Any
    targets: Any
    is_learnt: Any
    positions: Any
    segments: Any = None

    def parts(self, count: int) -> tuple[Batch, ...]:
        """The rows in so many equal parts."""
        columns = [[None] * count if x is None else np.split(x, count) for x in self]
        return tuple(Batch(*column) for column in zip(*columns, strict=True))


class BatchIterator(Protocol):
    """What grain's iterators are."""

    def __next__(self) -> Batch: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


def row_length(examples: Examples, options: DataOptions) -> int:
    """Positions in a row."""
    if options.packing:
        return options.max_length
    longest = max(map(len, examples.examples))
    return min(options.max_length, -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE)


def rows_per_epoch(examples: Examples, options: DataOptions) -> float:
    """How many rows all examples fill, if packing leaves no gaps."""
    return examples.num_positions / options.max_length if options.packing else len(examples)


def training_batches(examples: Examples, options: DataOptions, batch_size: int) -> BatchIterator:
    """Batches without end, shuffled anew in each epoch."""
    import grain

    shuffled = grain.MapDataset.source(examples).seed(options.seed).shuffle().repeat()
    return iter(_batched(shuffled, examples, options, batch_size))


def evaluation_batches(examples: Examples, options: DataOptions, batch_size: int) -> Iterator[Batch]:
    """Every example once, in order; the last batch is filled up with padding."""
    import grain

    return iter(_batched(grain.MapDataset.source(examples), examples, options, batch_size))


def _batched(dataset: Any, examples: Examples, options: DataOptions, batch_size: int) -> Any:
    import grain
    from grain.experimental import BestFitPackIterDataset

    length = row_length(examples, options)
    # All is in memory already: threads would only make a saved position lag behind.
    rows = dataset.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    if options.packing:
        lengths = dict.fromkeys(("tokens", "targets", "is_learnt"), length)
        bins = max(ROWS_AT_ONCE, batch_size)
        rows = BestFitPackIterDataset(rows, length_struct=lengths, num_packing_bins=bins, shuffle_bins=False)
    else:
        rows = rows.map(lambda example: _padded(example, length))
    return rows.batch(batch_size, drop_remainder=False).map(lambda fields: _batch(fields, batch_size, options.packing))


def _padded(example: dict[str, np.ndarray], length: int) -> dict[str, np.ndarray]:
    size = len(example["tokens"])
    positions = {"tokens_positions": np.arange(size, dtype=np.int32), "tokens_segment_ids": np.ones(size, np.int32)}
    return {name: np.pad(values, (0, length - size)) for name, values in (example | positions).items()}


def _batch(fields: dict[str, np.ndarray], batch_size: int, packed: bool) -> Batch:
    missing = batch_size - len(fields["tokens"])
    names = ("tokens", "targets", "is_learnt", "tokens_positions", "tokens_segment_ids")
    tokens, targets, is_learnt, positions, segments = (
        np.pad(fields[name].astype(np.int32), ((0, missing), (0, 0))) for name in names
    )
    positions = np.where(segments == 0, -1, positions)
    return Batch(tokens, targets, is_learnt, positions, segments if packed else None)

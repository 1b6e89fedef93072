"""A process's shard of a batch: which records it answers, and where its results go.

All processes of a replica run the same loop over the same records on their mesh, and its first process reports the results.
Process 0 writes all results to one file, so that no shared disk is needed; the other replicas send theirs to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from qwen_dist.batch.jsonl import BatchRecord, InvalidRecord, read_records
from qwen_dist.batch.output import OutputFile
from qwen_dist.batch.run import BatchSummary
from qwen_dist.runtime.control import ControlChannel, Message
from qwen_dist.runtime.distributed import Processes, Replica
from qwen_dist.storage.line_reader import MAX_LINE_BYTES


class ShardWriter(Protocol):
    """Takes the results of one process; earlier runs have written `num_before` results."""

    num_before: int

    def write(self, line: Mapping[str, Any], line_hash: int) -> None:
        """Take one result."""
        ...

    def collect(self) -> None:
        """Write the results that other replicas have sent."""
        ...

    def finish(self, summary: BatchSummary, is_complete: bool) -> BatchSummary:
        """Wait for all replicas; on process 0, return the total counts and, if all is done, complete the output."""
        ...


@contextlib.contextmanager
def open_shard(
    files: Sequence[str],
    output: str,
    processes: Processes,
    replica: Replica,
    *,
    settings: str = "",
    overwrite: bool = False,
    retry_errors: bool = False,
    keep_order: bool = False,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Iterator[tuple[Iterator[BatchRecord | InvalidRecord], ShardWriter]]:
    """Open the input and the output for this process.

    Args:
      files: of the records, from `find_files`.
      output: path or URL of the results; only process 0 opens it.
      processes: of this run.
      replica: of this process.
      settings: see `OutputFile`, as for the next two.
      overwrite: discard existing results.
      retry_errors: drop existing results that are errors.
      keep_order: put the finished output into the order of the input.
      max_line_bytes: a longer input line is answered with an error.

    Yields:
      The records that this process answers, and the writer for their results.

    Raises:
      UserError: the files cannot be used.
    """
    if processes.is_main:
        order = (lambda: read_records(files, max_line_bytes)) if keep_order else None
        records = read_records(files, max_line_bytes)
        with OutputFile(output, settings=settings, overwrite=overwrite, retry_errors=retry_errors) as file:
            done = _broadcast_from_main(file.answered_lines(read_records(files, max_line_bytes)), processes)
            collector = ResultCollector(file, processes.control, replica.num_replicas - 1, order)
            yield shard_records(records, replica, done), collector
    else:
        done = _broadcast_from_main(np.zeros(0, np.int32), processes)
        is_sender = processes.process_id == replica.process_ids[0] and processes.control is not None
        results = ResultSender(processes.control) if is_sender and processes.control is not None else NullWriter()
        yield shard_records(read_records(files, max_line_bytes), replica, done), results


def _broadcast_from_main(numbers: np.ndarray, processes: Processes) -> np.ndarray:
    """Return the numbers of process 0 on all processes."""
    if processes.count == 1:
        return numbers
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    return np.asarray(multihost_utils.broadcast_one_to_all(numbers if processes.is_main else np.zeros(length, np.int32)))


def shard_records(
    records: Iterable[BatchRecord | InvalidRecord], replica: Replica, done: np.ndarray
) -> Iterator[BatchRecord | InvalidRecord]:
    """Yield the replica's records that are not done. All replicas read all lines, so they find the same duplicate ids."""
    is_done = np.zeros(int(done.max(initial=0)) + 1, bool)
    is_done[done] = True
    for record in records:
        number = record.line_number
        if number % replica.num_replicas == replica.index and not (number < len(is_done) and is_done[number]):
            yield record


class ResultCollector:
    """On process 0: writes its own results and those that other replicas have sent."""

    def __init__(
        self,
        output: OutputFile,
        control: ControlChannel | None,
        num_senders: int,
        order: Callable[[], Iterable[BatchRecord | InvalidRecord]] | None,
    ):
        self._output, self._control, self._num_senders, self._order = output, control, num_senders, order
        self.num_before = output.num_before
        self._summaries: list[Message] = []

    def write(self, line: Mapping[str, Any], line_hash: int) -> None:
        self._output.write(line, line_hash)

    def collect(self) -> None:
        while self._control is not None and not self._control.messages.empty():
            self._handle(self._control.messages.get())

    def finish(self, summary: BatchSummary, is_complete: bool) -> BatchSummary:
        while self._control is not None and len(self._summaries) < self._num_senders:
            self._handle(self._control.messages.get())
        total = vars(summary)
        for other in self._summaries:
            counts = {key: total[key] + other[key] for key in total if key != "seconds"}
            total = counts | {"seconds": max(total["seconds"], other["seconds"])}
        if is_complete:
            self._output.finish(self._order() if self._order is not None else None)
        return BatchSummary(**total | {"num_before": self.num_before})

    def _handle(self, message: Message) -> None:
        if "result" in message:
            self._output.write(message["result"], message["line_hash"])
        else:
            self._summaries.append(message["summary"])


class ResultSender:
    """On the first process of another replica: sends the results to process 0."""

    num_before = 0

    def __init__(self, control: ControlChannel):
        self._control = control

    def write(self, line: Mapping[str, Any], line_hash: int) -> None:
        self._control.send({"result": dict(line), "line_hash": line_hash})

    def collect(self) -> None:
        pass

    def finish(self, summary: BatchSummary, is_complete: bool) -> BatchSummary:
        self._control.send({"summary": dataclasses.asdict(summary)})
        return summary


class NullWriter:
    """On the other processes of a replica: drops the results, which its first process reports."""

    num_before = 0

    def write(self, line: Mapping[str, Any], line_hash: int) -> None:
        pass

    def collect(self) -> None:
        pass

    def finish(self, summary: BatchSummary, is_complete: bool) -> BatchSummary:
        return summary

"""The part that each process has in a batch: which records it answers, and where its results go.

All processes of a group run the same loop over the same records on their mesh, and the group's first one has the results.
Process 0 writes all of them to one file, so that no shared disk is needed; other groups send theirs to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from qwen_dist.batch.jsonl import BadRecord, Record, read_records
from qwen_dist.batch.output import Output
from qwen_dist.batch.run import Summary, check_paths
from qwen_dist.hosts.join import Group, Hosts
from qwen_dist.hosts.lifeline import Lifeline, Message


class Results(Protocol):
    """Where a process's results go; `num_before` are there from earlier runs."""

    num_before: int

    def write(self, line: Mapping[str, Any], fingerprint: int) -> None:
        """Take one result."""
        ...

    def collect(self) -> None:
        """Write what other groups have sent."""
        ...

    def finish(self, summary: Summary, is_complete: bool) -> Summary:
        """Wait for all groups; on process 0 the counts of all of them, and if all is done, the output is complete."""
        ...


@contextlib.contextmanager
def open_share(
    input: str,
    output: str,
    hosts: Hosts,
    group: Group,
    *,
    settings: str = "",
    overwrite: bool = False,
    retry_errors: bool = False,
    keep_order: bool = False,
) -> Iterator[tuple[Iterator[Record | BadRecord], Results]]:
    """This process's records and where its results go.

    Args:
      settings: text of all that answers depend on besides their records.
      overwrite, retry_errors: see `Output`.
      keep_order: the finished output is in the order of the input.

    Raises:
      UserError: files cannot be used, before any model is loaded.
    """
    check_paths(input, output)
    if hosts.is_first:
        order = (lambda: read_records(input)) if keep_order else None
        records = read_records(input)
        with Output(output, settings=settings, overwrite=overwrite, retry_errors=retry_errors) as file:
            done = _from_first(file.answered(read_records(input)), hosts)
            collector = Collector(file, hosts.lifeline, group.count - 1, order)
            yield share_of(records, group, done), collector
    else:
        done = _from_first(np.zeros(0, np.int32), hosts)
        is_sender = hosts.process_id == group.processes[0] and hosts.lifeline is not None
        results = Sender(hosts.lifeline) if is_sender and hosts.lifeline is not None else Discard()
        yield share_of(read_records(input), group, done), results


def _from_first(numbers: np.ndarray, hosts: Hosts) -> np.ndarray:
    """What process 0 has, on all processes."""
    if hosts.count == 1:
        return numbers
    from jax.experimental import multihost_utils

    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(numbers))))
    return np.asarray(multihost_utils.broadcast_one_to_all(numbers if hosts.is_first else np.zeros(length, np.int32)))


def share_of(records: Iterable[Record | BadRecord], group: Group, done: np.ndarray) -> Iterator[Record | BadRecord]:
    """Every `group.count`-th line but those done; all groups read all lines, so that they judge repeated ids alike."""
    is_done = np.zeros(int(done.max(initial=0)) + 1, bool)
    is_done[done] = True
    for record in records:
        number = record.line_number
        if number % group.count == group.index and not (number < len(is_done) and is_done[number]):
            yield record


class Collector:
    """On process 0: its own results and, in between, those that other groups have sent."""

    def __init__(
        self,
        output: Output,
        lifeline: Lifeline | None,
        num_others: int,
        order: Callable[[], Iterable[Record | BadRecord]] | None,
    ):
        self._output, self._lifeline, self._num_others, self._order = output, lifeline, num_others, order
        self.num_before = output.num_before
        self._summaries: list[Message] = []

    def write(self, line: Mapping[str, Any], fingerprint: int) -> None:
        self._output.write(line, fingerprint)

    def collect(self) -> None:
        while self._lifeline is not None and not self._lifeline.inbox.empty():
            self._take(self._lifeline.inbox.get())

    def finish(self, summary: Summary, is_complete: bool) -> Summary:
        while self._lifeline is not None and len(self._summaries) < self._num_others:
            self._take(self._lifeline.inbox.get())
        total = vars(summary)
        for other in self._summaries:
            counts = {key: total[key] + other[key] for key in total if key != "seconds"}
            total = counts | {"seconds": max(total["seconds"], other["seconds"])}
        if is_complete:
            self._output.finish(self._order() if self._order is not None else None)
        return Summary(**total | {"num_before": self.num_before})

    def _take(self, message: Message) -> None:
        if "result" in message:
            self._output.write(message["result"], message["fingerprint"])
        else:
            self._summaries.append(message["summary"])


class Sender:
    """On the first process of another group."""

    num_before = 0

    def __init__(self, lifeline: Lifeline):
        self._lifeline = lifeline

    def write(self, line: Mapping[str, Any], fingerprint: int) -> None:
        self._lifeline.send({"result": dict(line), "fingerprint": fingerprint})

    def collect(self) -> None:
        pass

    def finish(self, summary: Summary, is_complete: bool) -> Summary:
        self._lifeline.send({"summary": dataclasses.asdict(summary)})
        return summary


class Discard:
    """On a process whose group's first one has the same results."""

    num_before = 0

    def write(self, line: Mapping[str, Any], fingerprint: int) -> None:
        pass

    def collect(self) -> None:
        pass

    def finish(self, summary: Summary, is_complete: bool) -> Summary:
        return summary

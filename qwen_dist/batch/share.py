"""The part that each process has in a batch: which records it answers, and where its results go.

All processes of a group run the same loop over the same records on their mesh, and the group's first one has the results.
Process 0 writes all of them to one file, so that no shared disk is needed; other groups send theirs to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from qwen_dist.batch.jsonl import BadRecord, Record, ResultWriter, read_records
from qwen_dist.batch.run import Summary, open_files
from qwen_dist.hosts.join import Group, Hosts
from qwen_dist.hosts.lifeline import Lifeline, Message


class Results(Protocol):
    """Where a process's results go."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Take one result."""
        ...

    def collect(self) -> None:
        """Write what other groups have sent."""
        ...

    def finish(self, summary: Summary) -> Summary:
        """Wait for all groups; on process 0 the counts of all of them."""
        ...


@contextlib.contextmanager
def open_share(
    input: str, output: str, overwrite: bool, hosts: Hosts, group: Group
) -> Iterator[tuple[Iterator[Record | BadRecord], Results]]:
    """This process's records and where its results go. Raises UserError, before any model is loaded."""
    if hosts.is_first:
        records, writer = open_files(input, output, overwrite)
        with writer:
            yield share_of(records, group), Collector(writer, hosts.lifeline, group.count - 1)
    elif hosts.process_id == group.processes[0]:
        assert hosts.lifeline is not None
        yield share_of(read_records(input), group), Sender(hosts.lifeline)
    else:
        yield share_of(read_records(input), group), Discard()


def share_of(records: Iterator[Record | BadRecord], group: Group) -> Iterator[Record | BadRecord]:
    """Every `group.count`-th line; all groups read all lines, so that they judge repeated ids alike."""
    return (record for record in records if record.line_number % group.count == group.index)


class Collector:
    """On process 0: its own results and, in between, those that other groups have sent."""

    def __init__(self, writer: ResultWriter, lifeline: Lifeline | None, num_others: int):
        self._writer, self._lifeline, self._num_others = writer, lifeline, num_others
        self._summaries: list[Message] = []

    def write(self, line: Mapping[str, Any]) -> None:
        self._writer.write(line)

    def collect(self) -> None:
        while self._lifeline is not None and not self._lifeline.inbox.empty():
            self._take(self._lifeline.inbox.get())

    def finish(self, summary: Summary) -> Summary:
        while self._lifeline is not None and len(self._summaries) < self._num_others:
            self._take(self._lifeline.inbox.get())
        total = vars(summary)
        for other in self._summaries:
            counts = {key: total[key] + other[key] for key in total if key != "seconds"}
            total = counts | {"seconds": max(total["seconds"], other["seconds"])}
        return Summary(**total)

    def _take(self, message: Message) -> None:
        if "result" in message:
            self._writer.write(message["result"])
        else:
            self._summaries.append(message["summary"])


class Sender:
    """On the first process of another group."""

    def __init__(self, lifeline: Lifeline):
        self._lifeline = lifeline

    def write(self, line: Mapping[str, Any]) -> None:
        self._lifeline.send({"result": dict(line)})

    def collect(self) -> None:
        pass

    def finish(self, summary: Summary) -> Summary:
        self._lifeline.send({"summary": dataclasses.asdict(summary)})
        return summary


class Discard:
    """On a process whose group's first one has the same results."""

    def write(self, line: Mapping[str, Any]) -> None:
        pass

    def collect(self) -> None:
        pass

    def finish(self, summary: Summary) -> Summary:
        return summary

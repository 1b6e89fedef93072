"""The output of a batch and its journal: whatever happens to the process, no result is lost or there twice. No jax.

Each result is appended to the output in one write, and then its entry to OUTPUT.journal: which line of the input it
answers. A run that is killed leaves at most one result (whole or torn) without an entry: the next run cuts it off and goes
on with the lines that have no entry. The journal begins with the settings that the answers depend on; a run with others
does not go on with it.

An output that cannot be appended to (compressed, parquet, in an object store) is made when all is done; until then the
results are in OUTPUT.jsonl, or for one that is not on this machine in a file of its name here. They stay there if they
could not be read back from the output byte by byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from qwen_dist.batch import formats, remote
from qwen_dist.batch.jsonl import BadRecord, Record, digest
from qwen_dist.errors import UserError

# One result: the fingerprint of the line it answers, the digest of its own line, its size in bytes, whether it is an error.
ENTRY = np.dtype([("fingerprint", "<u8"), ("digest", "<u8"), ("size", "<u4"), ("is_error", "<u4")])
# What was written longer ago survives a power failure too.
SYNC_EVERY_S = 5.0


def local_path(output: str) -> str:
    """Where what belongs to an output is kept: beside it, or in this directory if it is not on this machine."""
    return remote.name_of(output) if remote.is_url(output) else output


class Output:
    """Appends results; what an earlier run has written stays.

    Args:
      path: of the output. A pipe or a device is only written to, without a journal.
      settings: text of all that answers depend on besides their lines.
      overwrite: begin anew; old results go with the first new one.
      retry_errors: forget results that are errors.

    Attributes:
      num_before: results that earlier runs have written.

    Raises:
      UserError: the file cannot be opened, or holds results of other settings, or something else.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, settings: str = "", overwrite: bool = False, retry_errors: bool = False
    ):
        self.path = os.fspath(path)
        here = local_path(self.path)
        self._work_path = self.path if formats.is_appendable(self.path) else f"{here}.jsonl"
        self._journal_path = f"{here}.journal"
        self._settings = np.array([(digest(settings.encode()), 0, 0, 0)], ENTRY)
        self.num_before, self._num_written, self._size, self._last_sync = 0, 0, 0, time.monotonic()
        self._is_old = False
        try:
            self._file = os.open(self._work_path, os.O_RDWR | os.O_CREAT, 0o666)
            self._is_regular = stat.S_ISREG(os.fstat(self._file).st_mode)
            entries = self._open_regular(overwrite, retry_errors) if self._is_regular else np.zeros(0, ENTRY)
        except OSError as error:
            raise UserError(f"cannot write the output {self.path}: {error.strerror}") from error
        self._done = np.sort(entries["fingerprint"])

    # --- going on ---

    def has(self, record: Record | BadRecord) -> bool:
        """Whether an earlier run has answered this line."""
        index = int(np.searchsorted(self._done, np.uint64(record.fingerprint)))
        return index < len(self._done) and self._done[index] == record.fingerprint

    def answered(self, records: Iterable[Record | BadRecord]) -> np.ndarray:
        """The numbers of the lines that an earlier run has answered.

        Raises:
          UserError: the output has answers to lines that are not among the records.
        """
        if not len(self._done):
            return np.zeros(0, np.int32)
        numbers = np.array([record.line_number for record in records if self.has(record)], np.int32)
        if len(numbers) != len(self._done):
            raise UserError(
                f"{self.path} has answers to {len(self._done) - len(numbers)} lines that are not (or not so) in the input: "
                "it is of another input; name another output, or ask to overwrite it"
            )
        return numbers

    def _open_regular(self, overwrite: bool, retry_errors: bool) -> np.ndarray:
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        there = self._holds_results()
        entries = self._entries()
        if overwrite or not there:
            self._is_old = there
            if not self._is_old:
                self._begin()
            return np.zeros(0, ENTRY)
        if not len(entries):
            self._remove_empty()
            raise UserError(
                f"the output {self.path} holds results already, and no journal beside it says of what: name another file, "
                "or ask to overwrite it"
            )
        if entries[0] != self._settings[0]:
            raise UserError(
                f"the output {self.path} holds results of another checkpoint or of other parameters: name another file, or "
                "ask to overwrite it"
            )
        if self._work_path != self.path and formats.keeps_lines(self.path) and os.path.exists(self.path):
            self._unpack()
        return self._cut(entries[1:], retry_errors)

    def _entries(self) -> np.ndarray:
        whole = os.fstat(self._journal).st_size // ENTRY.itemsize * ENTRY.itemsize
        os.ftruncate(self._journal, whole)
        return np.frombuffer(os.pread(self._journal, whole, 0), ENTRY)

    def _holds_results(self) -> bool:
        """Whether there are results, in the making or finished."""
        if os.path.exists(self._work_path) and os.path.getsize(self._work_path):
            return True
        return self._work_path != self.path and formats.exists(self.path)

    def _remove_empty(self) -> None:
        """A run that is refused leaves nothing behind."""
        for file, path in ((self._journal, self._journal_path), (self._file, self._work_path)):
            if os.fstat(file).st_size == 0:
                os.unlink(path)

    def _begin(self) -> None:
        os.ftruncate(self._file, 0)
        os.ftruncate(self._journal, 0)
        os.write(self._journal, self._settings.tobytes())
        if self._work_path != self.path and formats.keeps_lines(self.path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        self._is_old = False

    def _unpack(self) -> None:
        """Results that were finished and compressed are gone on with as plain lines."""
        formats.write_lines(self._work_path, formats.read_lines(self.path))
        os.close(self._file)
        self._file = os.open(self._work_path, os.O_RDWR)
        os.unlink(self.path)

    def _cut(self, entries: np.ndarray, retry_errors: bool) -> np.ndarray:
        """Keep the results that are whole and have an entry, and of those, if asked, only answers."""
        kept = self._matched(entries)
        self._size = int(kept["size"].sum(dtype=np.int64))
        os.ftruncate(self._file, self._size)
        if len(kept) != len(entries) or not np.array_equal(kept, entries):
            self._replace_journal(kept)
        if retry_errors and kept["is_error"].any():
            kept = self._rewrite(kept, np.flatnonzero(kept["is_error"] == 0))
        os.lseek(self._file, self._size, os.SEEK_SET)
        self.num_before = len(kept)
        return kept

    def _matched(self, entries: np.ndarray) -> np.ndarray:
        """The entries of the results that are there, in their order.

        That is the journal's, unless the process ended while both were being put into another one.
        """
        with open(self._work_path, "rb") as file:
            there = np.array([digest(line) for line in file if line.endswith(b"\n")], np.uint64)
        common = min(len(there), len(entries))
        if np.array_equal(there[:common], entries["digest"][:common]):
            return entries[:common]
        order = np.argsort(entries["digest"])
        found = order[np.searchsorted(entries["digest"], there, sorter=order) % len(entries)]
        is_known = entries["digest"][found] == there
        return entries[found[: len(there) if is_known.all() else int(np.argmin(is_known))]]

    def _rewrite(self, entries: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Put the results, of which these are the entries, into this order; what it leaves out is dropped."""
        formats.write_lines(self._work_path, self._lines(entries, order))
        os.close(self._file)
        self._file = os.open(self._work_path, os.O_RDWR)
        self._size = os.lseek(self._file, 0, os.SEEK_END)
        self._replace_journal(entries[order])
        return entries[order]

    def _lines(self, entries: np.ndarray, order: np.ndarray) -> Iterator[bytes]:
        starts = np.cumsum(entries["size"], dtype=np.int64) - entries["size"]
        for index in order:
            yield os.pread(self._file, int(entries["size"][index]), int(starts[index]))

    def _replace_journal(self, entries: np.ndarray) -> None:
        os.close(self._journal)
        formats.write_lines(self._journal_path, [self._settings.tobytes(), entries.tobytes()])
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_APPEND)

    # --- writing ---

    def write(self, line: Mapping[str, Any], fingerprint: int) -> None:
        """Append the result of the record with this fingerprint.

        Raises:
          UserError: the disk is full, or the file cannot grow for another reason; the lines before are whole.
        """
        # backslashreplace writes half a surrogate pair as JSON does, `\\ud83d`.
        data = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
        if self._is_old:
            self._begin()
        try:
            self._write_all(self._file, data)
            if self._is_regular:
                entry = (fingerprint, digest(data), len(data), bool(line.get("error")))
                self._write_all(self._journal, np.array([entry], ENTRY).tobytes())
                self._sync()
        except OSError as error:
            if self._is_regular:
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
            raise self._failure(error) from error
        self._size += len(data)
        self._num_written += 1

    def _write_all(self, file: int, data: bytes) -> None:
        while data:  # A nearly full disk takes a part first and says why with the next write.
            data = data[os.write(file, data) :]

    def _sync(self) -> None:
        if time.monotonic() - self._last_sync > SYNC_EVERY_S:
            os.fdatasync(self._file)
            os.fdatasync(self._journal)
            self._last_sync = time.monotonic()

    def finish(self, in_order_of: Iterable[Record | BadRecord] | None = None) -> None:
        """All is done: put the results into the order of these records, if any, and compress them if they are to be.

        Raises:
          UserError: the disk refuses it; the results are there, uncompressed or in the order of their coming.
        """
        if self._is_old:
            self._begin()
        if not self._is_regular:
            return
        if in_order_of is not None:
            entries = self._entries()[1:]
            by_line = np.argsort(entries["fingerprint"])
            wanted = np.array([record.fingerprint for record in in_order_of], np.uint64)
            at = np.searchsorted(entries["fingerprint"], wanted, sorter=by_line)
            self._rewrite(entries, by_line[at])
        if self._work_path != self.path:
            with open(self._work_path, "rb") as lines:
                formats.write_lines(self.path, lines)
            if formats.keeps_lines(self.path):
                os.unlink(self._work_path)

    def close(self) -> None:
        """Ends the file once everything is on the disk.

        Raises:
          UserError: the disk refuses what it had accepted (some file systems say so only now).
        """
        try:
            if self._is_regular:
                os.fsync(self._file)
                os.fsync(self._journal)
        except OSError as error:
            raise self._failure(error) from error
        finally:
            os.close(self._file)
            if self._is_regular:
                self._remove_unused()
                os.close(self._journal)

    def _remove_unused(self) -> None:
        """A run that has written nothing, and had nothing to go on with, leaves no journal."""
        if os.fstat(self._journal).st_size <= ENTRY.itemsize and not self._holds_results():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._journal_path)

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _failure(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write to {self._work_path}: {error.strerror}; it holds the {self.num_before + self._num_written} "
            "results before, whole: make room and run again, or name an output on another disk"
        )

"""Results in a local file, and a journal of them: none is lost or written twice, even if the process is killed. No jax.

Each result is appended to the file in one write, and then an entry that names its input line to the journal. A process that
is killed leaves at most one result, complete or torn, without an entry: `recover` removes it, and the lines that have no
entry are answered again. After a power failure or damage there may be more of them: they are moved to FILE.discarded first.
The journal starts with a hash of the settings that results depend on.
"""

from __future__ import annotations

import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator

import numpy as np

from qwen_dist.errors import UserError, printable
from qwen_dist.storage.line_reader import hash64
from qwen_dist.storage.line_writer import partial_path, write_lines

# One result: the hash of the input line it answers, the hash and size in bytes of its own line, whether it is an error.
JOURNAL_ENTRY = np.dtype([("line_hash", "<u8"), ("result_hash", "<u8"), ("size", "<u4"), ("is_error", "<u4")])
# The part of an entry that describes the result.
_LINE = np.dtype([("result_hash", "<u8"), ("size", "<u4")])
# The first entry of a journal has this number, the hash of the settings, and the version of its form.
JOURNAL_MAGIC, JOURNAL_VERSION = 0x6C616E72756F6A51, 1
# Results older than this also survive a power failure.
SYNC_EVERY_S = 5.0


def check_journal(path: str) -> None:
    """Refuse a file that is not a journal of this version, before anything is changed. Raises UserError."""
    try:
        if not os.path.exists(path):
            return
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{printable(path)} is not a file: move it away, or name another output")
        with open(path, "rb") as file:
            start = file.read(JOURNAL_ENTRY.itemsize)
    except OSError as error:
        raise UserError(f"cannot read {printable(path)}: {error.strerror}") from error
    magic = JOURNAL_MAGIC.to_bytes(8, "little")
    if start[:8] != magic[: len(start)]:
        raise UserError(
            f"{printable(path)} is not a journal of qwen-dist, and would be overwritten: move it away, or name another "
            "output"
        )
    if len(start) < JOURNAL_ENTRY.itemsize:
        return  # a run was killed while it wrote the first entry
    version = np.frombuffer(start, JOURNAL_ENTRY)[0]["size"]
    if version != JOURNAL_VERSION:
        raise UserError(
            f"{printable(path)} has version {version}; this qwen-dist has version {JOURNAL_VERSION}: name another output"
        )


class Journal:
    """A file of results that is appended to, with its journal.

    Args:
      path: of the results.
      journal_path: of the entries; None for a pipe or a device, which is only written to.
      settings: everything that results depend on besides their input lines, as text.

    Attributes:
      entries: of the results that `recover` has kept; none before.
      num_results: the number of results in the file.
      has_header: whether the journal says what its results depend on.
      is_of_settings: whether they depend on `settings`.

    Raises:
      OSError: a file cannot be opened.
    """

    def __init__(self, path: str, journal_path: str | None, settings: str):
        self._path, self._journal_path = path, journal_path
        self._header = np.array([(JOURNAL_MAGIC, hash64(settings.encode()), JOURNAL_VERSION, 0)], JOURNAL_ENTRY)
        self._file, self._journal = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), -1
        self.entries = self._found = np.zeros(0, JOURNAL_ENTRY)
        self.has_header = self.is_of_settings = False
        self.num_results, self._size, self._last_sync = 0, 0, time.monotonic()
        if journal_path is not None:
            self._journal = os.open(journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            found = self._read()
            self.has_header, self._found = len(found) > 0, found[1:]
            self.is_of_settings = self.has_header and found[0] == self._header[0]

    def _read(self) -> np.ndarray:
        """Return all complete entries, the header first; an incomplete one at the end is removed."""
        whole = os.fstat(self._journal).st_size // JOURNAL_ENTRY.itemsize * JOURNAL_ENTRY.itemsize
        os.ftruncate(self._journal, whole)
        return np.frombuffer(os.pread(self._journal, whole, 0), JOURNAL_ENTRY)

    # --- recovery ---

    def recover(self, *, retry_errors: bool) -> None:
        """Keep the complete results that have an entry, with `retry_errors` only those that are not errors."""
        kept = self._matching_entries()
        self._size = int(kept["size"].sum(dtype=np.int64))
        self._keep_rest()
        os.ftruncate(self._file, self._size)
        if len(kept) != len(self._found) or not np.array_equal(kept, self._found):
            self._replace_entries(kept)
        if retry_errors and kept["is_error"].any():
            kept = self._rewrite(kept, np.flatnonzero(kept["is_error"] == 0))
        os.lseek(self._file, self._size, os.SEEK_SET)
        self.entries, self.num_results = kept, len(kept)

    def _matching_entries(self) -> np.ndarray:
        """Return the entries of the complete results, in the order of the results.

        The journal has the same order, unless the process was killed while both files were being reordered.
        """
        entries = self._found
        with open(self._path, "rb") as file:
            lines = np.array([(hash64(line), len(line)) for line in file if line.endswith(b"\n")], _LINE)

        def is_of(found: np.ndarray, lines: np.ndarray) -> np.ndarray:
            return (found["result_hash"] == lines["result_hash"]) & (found["size"] == lines["size"])

        common = min(len(lines), len(entries))
        if is_of(entries[:common], lines[:common]).all():
            return entries[:common]
        order = np.argsort(entries["result_hash"])
        found = order[np.searchsorted(entries["result_hash"], lines["result_hash"], sorter=order) % len(entries)]
        is_known = is_of(entries[found], lines)
        return entries[found[: len(lines) if is_known.all() else int(np.argmin(is_known))]]

    def _keep_rest(self) -> None:
        """Copy results without an entry to a new file, if they are more than the one that a killed run leaves."""
        os.lseek(self._file, self._size, os.SEEK_SET)
        with open(os.dup(self._file), "rb") as rest:
            num_lines = sum(1 for _ in rest)
            if num_lines <= 1:
                return
            path, number = f"{self._path}.discarded", 1
            while os.path.lexists(path) or os.path.lexists(partial_path(path)):
                number += 1
                path = f"{self._path}.discarded-{number}"
            rest.seek(self._size)
            write_lines(path, rest)
        print(
            f"{printable(self._journal_path)} has no entry for the last {num_lines} results of "
            f"{printable(self._path)}: their lines are answered again, and they are now in {printable(path)}",
            file=sys.stderr,
        )

    # --- changes as a whole: a killed process leaves the old or the new file ---

    def clear(self) -> None:
        """Discard all results and start a new journal."""
        os.ftruncate(self._file, 0)
        os.ftruncate(self._journal, 0)
        os.write(self._journal, self._header.tobytes())

    def replace_results(self, lines: Iterable[bytes]) -> None:
        """Replace the file of results; the entries stay, and `recover` keeps the results that have one."""
        write_lines(self._path, lines)
        os.close(self._file)
        self._file = os.open(self._path, os.O_RDWR)
        self._size = os.lseek(self._file, 0, os.SEEK_END)

    def reorder(self, line_hashes: np.ndarray) -> None:
        """Put the results into the order of the input lines with these hashes."""
        entries = self._read()[1:]
        by_line = np.argsort(entries["line_hash"])
        self._rewrite(entries, by_line[np.searchsorted(entries["line_hash"], line_hashes, sorter=by_line)])

    def _rewrite(self, entries: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Write the results with these entries in another order; indices that `order` leaves out are dropped."""
        starts = np.cumsum(entries["size"], dtype=np.int64) - entries["size"]

        def lines() -> Iterator[bytes]:
            for index in order:
                yield os.pread(self._file, int(entries["size"][index]), int(starts[index]))

        self.replace_results(lines())
        self._replace_entries(entries[order])
        return entries[order]

    def _replace_entries(self, entries: np.ndarray) -> None:
        assert self._journal_path is not None
        os.close(self._journal)
        write_lines(self._journal_path, [self._header.tobytes(), entries.tobytes()])
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_APPEND)

    # --- writing ---

    def append(self, line: bytes, line_hash: int, *, is_error: bool) -> None:
        """Append a result, and then its entry.

        Raises:
          UserError: the disk is full, or the file cannot grow for another reason; all earlier results are complete.
        """
        try:
            _write_all(self._file, line)
            if self._journal_path is not None:
                entry = (line_hash, hash64(line), len(line), is_error)
                _write_all(self._journal, np.array([entry], JOURNAL_ENTRY).tobytes())
                self._sync_if_due()
        except OSError as error:
            if self._journal_path is not None:
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
            raise self._write_error(error) from error
        self._size += len(line)
        self.num_results += 1

    def _sync_if_due(self) -> None:
        if time.monotonic() - self._last_sync > SYNC_EVERY_S:
            os.fdatasync(self._file)
            os.fdatasync(self._journal)
            self._last_sync = time.monotonic()

    def close(self) -> None:
        """Flush everything to disk and close the files.

        Raises:
          UserError: the data cannot be written (some file systems report this only now).
        """
        files = [self._file] if self._journal_path is None else [self._file, self._journal]
        try:
            for file in files if self._journal_path is not None else ():
                os.fsync(file)
        except OSError as error:
            raise self._write_error(error) from error
        finally:
            for file in files:
                os.close(file)

    def remove_empty_files(self) -> None:
        """Remove the files that this has created."""
        for path in (self._path, self._journal_path):
            if path is not None and os.path.exists(path) and os.path.getsize(path) == 0:
                os.unlink(path)

    def _write_error(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write to {self._path}: {error.strerror}; the {self.num_results} results so far are complete: free "
            "some disk space and run again, or name an output on another disk"
        )


def _write_all(file: int, data: bytes) -> None:
    while data:  # On a nearly full disk a write is partial, and the next one fails.
        data = data[os.write(file, data) :]

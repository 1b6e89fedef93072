"""The output of a batch and its journal: no result is lost or written twice, even if the process is killed. No jax.

Each result is appended to the output in one write, and then an entry that names its input line to OUTPUT.journal. A run
that is killed leaves at most one result, complete or torn, without an entry: the next run removes it and answers the lines
that have no entry. After a power failure or damage there may be more of them: they are moved to OUTPUT.discarded first.
The journal starts with a hash of the settings that results depend on; a run with other settings is refused.

An output that cannot be appended to (compressed, parquet, in an object store) is written at the end. Until then the results
are in OUTPUT.jsonl, which for a remote output is in the working directory. That file is kept when the results could not be
read back from the output byte by byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from qwen_dist.batch.jsonl import BatchRecord, InvalidRecord
from qwen_dist.errors import UserError, printable
from qwen_dist.json_reader import read_json_object
from qwen_dist.outputs import Written, run_lock
from qwen_dist.storage.files import is_url
from qwen_dist.storage.line_reader import hash64
from qwen_dist.storage.line_writer import exists, is_appendable, is_lossless, partial_path, write_lines
from qwen_dist.storage.records import read_lines

# One result: the hash of the input line it answers, the hash and size in bytes of its own line, whether it is an error.
JOURNAL_ENTRY = np.dtype([("line_hash", "<u8"), ("result_hash", "<u8"), ("size", "<u4"), ("is_error", "<u4")])
# The part of an entry that describes the result.
_LINE = np.dtype([("result_hash", "<u8"), ("size", "<u4")])
# The first entry of a journal has this number, the hash of the settings, and the version of its form.
JOURNAL_MAGIC, JOURNAL_VERSION = 0x6C616E72756F6A51, 1
# Results older than this also survive a power failure.
SYNC_EVERY_S = 5.0


def paths_written(output: str) -> list[Written]:
    """Return every path that a run with this output writes."""
    if not is_url(output) and os.path.exists(output) and not os.path.isfile(output):
        return [Written("--output", output)]  # a pipe or a device
    local = local_path(output)
    names = [output, journal_path(output), f"{local}.lock", f"{local}.manifest.json"]
    if not is_appendable(output):
        names.append(f"{local}.jsonl")
    names += [partial_path(path) for path in names if not (is_url(path) or path.endswith(".lock"))]
    return [
        Written("--output" if path == output else "the file of --output,", path, is_helper=path != output) for path in names
    ]


def local_path(output: str) -> str:
    """Return the path that journal and manifest are named after: the output's, or for a remote one its name here."""
    return output.rpartition("/")[2] if is_url(output) else output


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level, with keys such as "sampling.top_k"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def journal_path(output: str) -> str:
    """Return the path of the journal of a run with this output."""
    return f"{local_path(output)}.journal"


class OutputFile:
    """Appends results to a file; the results of earlier runs are kept.

    Args:
      path: of the output. A pipe or a device is only written to, without a journal.
      settings: everything that results depend on besides their input lines, as text.
      overwrite: discard existing results, when the first new one is written.
      retry_errors: drop existing results that are errors.

    Attributes:
      num_before: number of results that earlier runs have written.

    Raises:
      UserError: the file cannot be opened, or holds results of other settings, or something else.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, settings: str = "", overwrite: bool = False, retry_errors: bool = False
    ):
        self.path = os.fspath(path)
        local = local_path(self.path)
        self._work_path = self.path if is_appendable(self.path) else f"{local}.jsonl"
        self._journal_path = journal_path(self.path)
        self._settings, self._manifest_path = settings, f"{local}.manifest.json"
        self._header = np.array([(JOURNAL_MAGIC, hash64(settings.encode()), JOURNAL_VERSION, 0)], JOURNAL_ENTRY)
        self._lock = contextlib.ExitStack()
        self.num_before, self._num_written, self._size, self._last_sync = 0, 0, 0, time.monotonic()
        self._overwrite_pending = False  # existing results are discarded by the first write
        try:
            self._check_journal()
            self._check_helper_files()
            self._is_regular = not os.path.exists(self._work_path) or stat.S_ISREG(os.stat(self._work_path).st_mode)
            if self._is_regular:
                self._lock.enter_context(run_lock(f"{local}.lock", self.path, lambda text: print(text, file=sys.stderr)))
            self._file = os.open(self._work_path, os.O_RDWR | os.O_CREAT, 0o666)
            entries = self._open_journal(overwrite, retry_errors) if self._is_regular else np.zeros(0, JOURNAL_ENTRY)
        except OSError as error:
            self._lock.close()
            raise UserError(f"cannot write the output {printable(self.path)}: {error.strerror}") from error
        except UserError:
            self._lock.close()
            raise
        self._answered = np.sort(entries["line_hash"])

    # --- resuming ---

    def is_answered(self, record: BatchRecord | InvalidRecord) -> bool:
        """Return whether an earlier run has answered this record."""
        index = int(np.searchsorted(self._answered, np.uint64(record.line_hash)))
        return index < len(self._answered) and self._answered[index] == record.line_hash

    def answered_lines(self, records: Iterable[BatchRecord | InvalidRecord]) -> np.ndarray:
        """Return the int32 numbers of the lines that earlier runs have answered.

        Raises:
          UserError: the output has results of lines that are not among the records.
        """
        if not len(self._answered):
            return np.zeros(0, np.int32)
        numbers = np.array([record.line_number for record in records if self.is_answered(record)], np.int32)
        if len(numbers) != len(self._answered):
            raise UserError(
                f"{self.path} has answers to {len(self._answered) - len(numbers)} lines that are missing from the input or "
                "have changed: it belongs to another input; name another output, or use --overwrite"
            )
        return numbers

    def _check_journal(self) -> None:
        """Refuse a file under the journal's name that is not a journal of this version, before anything is changed."""
        try:
            if not os.path.exists(self._journal_path):
                return
            if not stat.S_ISREG(os.stat(self._journal_path).st_mode):
                raise UserError(f"{printable(self._journal_path)} is not a file: move it away, or name another output")
            with open(self._journal_path, "rb") as file:
                start = file.read(JOURNAL_ENTRY.itemsize)
        except OSError as error:
            raise UserError(f"cannot read {printable(self._journal_path)}: {error.strerror}") from error
        magic = self._header.tobytes()[:8]
        if start[:8] != magic[: len(start)]:
            raise UserError(
                f"{printable(self._journal_path)} is not a journal of qwen-dist, and would be overwritten: move it away, "
                "or name another output"
            )
        if len(start) < JOURNAL_ENTRY.itemsize:
            return  # a run was killed while it wrote the first entry
        version = np.frombuffer(start, JOURNAL_ENTRY)[0]["size"]
        if version != JOURNAL_VERSION:
            raise UserError(
                f"{printable(self._journal_path)} has version {version}; this qwen-dist has version {JOURNAL_VERSION}: "
                "name another output"
            )

    def _check_helper_files(self) -> None:
        """Refuse files under the names that a run gives to its own, if no journal says that a run made them."""
        if os.path.exists(self._journal_path):
            return
        own = [partial_path(path) for path in (self.path, self._work_path, self._journal_path, self._manifest_path)]
        own += [self._work_path] if self._work_path != self.path else []
        found = [
            path for path in dict.fromkeys(own) if os.path.lexists(path) and (os.path.islink(path) or os.path.getsize(path))
        ]
        if found:
            raise UserError(
                f"{', '.join(map(printable, found))} would be overwritten, and no journal says that a run made it: "
                "move it away, or name another output"
            )

    def _describe_changes(self) -> str:
        """Return which settings differ from those of the run that wrote the results, as its manifest has them."""
        try:
            before = flatten(read_json_object(self._manifest_path, error=UserError).get("settings", {}))
            now = flatten(json.loads(self._settings))
        except (OSError, ValueError, AttributeError):
            return "another checkpoint or other parameters"
        changes = [
            f"{key} was {printable(before.get(key), 60)} and is now {printable(now.get(key), 60)}"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
        ]
        return "other settings (" + "; ".join(changes) + ")" if changes else "another checkpoint or other parameters"

    def _open_journal(self, overwrite: bool, retry_errors: bool) -> np.ndarray:
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        has_results = self._has_results()
        entries = self._read_journal()
        if overwrite or not has_results:
            self._overwrite_pending = has_results
            if not has_results:
                self._clear()
            return np.zeros(0, JOURNAL_ENTRY)
        if not len(entries):
            self._remove_empty_files()
            raise UserError(
                f"the output {self.path} holds results already, and there is no journal that says of which input: name "
                "another file, or use --overwrite"
            )
        if entries[0] != self._header[0]:
            raise UserError(
                f"the output {self.path} holds results of {self._describe_changes()}: name another file, or use --overwrite"
            )
        if self._work_path != self.path and is_lossless(self.path) and os.path.exists(self.path):
            self._decompress()
        return self._recover(entries[1:], retry_errors)

    def _read_journal(self) -> np.ndarray:
        """Return all complete entries, the header first; an incomplete one at the end is removed."""
        whole = os.fstat(self._journal).st_size // JOURNAL_ENTRY.itemsize * JOURNAL_ENTRY.itemsize
        os.ftruncate(self._journal, whole)
        return np.frombuffer(os.pread(self._journal, whole, 0), JOURNAL_ENTRY)

    def _has_results(self) -> bool:
        """Return whether there are results, of a finished or an unfinished run."""
        if os.path.exists(self._work_path) and os.path.getsize(self._work_path):
            return True
        return self._work_path != self.path and exists(self.path)

    def _remove_empty_files(self) -> None:
        """Remove the files that a refused run has created."""
        for file, path in ((self._journal, self._journal_path), (self._file, self._work_path)):
            if os.fstat(file).st_size == 0:
                os.unlink(path)

    def _clear(self) -> None:
        """Discard all results and start a new journal."""
        os.ftruncate(self._file, 0)
        os.ftruncate(self._journal, 0)
        os.write(self._journal, self._header.tobytes())
        if self._work_path != self.path and is_lossless(self.path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        self._overwrite_pending = False

    def _decompress(self) -> None:
        """Turn a finished, compressed output back into plain lines, so that more results can be appended."""
        write_lines(self._work_path, read_lines(self.path))
        os.close(self._file)
        self._file = os.open(self._work_path, os.O_RDWR)
        os.unlink(self.path)

    def _recover(self, entries: np.ndarray, retry_errors: bool) -> np.ndarray:
        """Keep the complete results that have an entry, with `retry_errors` only those that are not errors."""
        kept = self._matching_entries(entries)
        self._size = int(kept["size"].sum(dtype=np.int64))
        self._keep_rest()
        os.ftruncate(self._file, self._size)
        if len(kept) != len(entries) or not np.array_equal(kept, entries):
            self._replace_journal(kept)
        if retry_errors and kept["is_error"].any():
            kept = self._reorder(kept, np.flatnonzero(kept["is_error"] == 0))
        os.lseek(self._file, self._size, os.SEEK_SET)
        self.num_before = len(kept)
        return kept

    def _matching_entries(self, entries: np.ndarray) -> np.ndarray:
        """Return the entries of the complete results, in the order of the results.

        The journal has the same order, unless the process was killed while both files were being reordered.
        """
        with open(self._work_path, "rb") as file:
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
            path, number = f"{self._work_path}.discarded", 1
            while os.path.lexists(path) or os.path.lexists(partial_path(path)):
                number += 1
                path = f"{self._work_path}.discarded-{number}"
            rest.seek(self._size)
            write_lines(path, rest)
        print(
            f"{printable(self._journal_path)} has no entry for the last {num_lines} results of "
            f"{printable(self._work_path)}: their lines are answered again, and they are now in {printable(path)}",
            file=sys.stderr,
        )

    def _reorder(self, entries: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Write the results with these entries in another order; indices that `order` leaves out are dropped."""
        write_lines(self._work_path, self._read_lines(entries, order))
        os.close(self._file)
        self._file = os.open(self._work_path, os.O_RDWR)
        self._size = os.lseek(self._file, 0, os.SEEK_END)
        self._replace_journal(entries[order])
        return entries[order]

    def _read_lines(self, entries: np.ndarray, order: np.ndarray) -> Iterator[bytes]:
        starts = np.cumsum(entries["size"], dtype=np.int64) - entries["size"]
        for index in order:
            yield os.pread(self._file, int(entries["size"][index]), int(starts[index]))

    def _replace_journal(self, entries: np.ndarray) -> None:
        os.close(self._journal)
        write_lines(self._journal_path, [self._header.tobytes(), entries.tobytes()])
        self._journal = os.open(self._journal_path, os.O_RDWR | os.O_APPEND)

    # --- writing ---

    def write(self, line: Mapping[str, Any], line_hash: int) -> None:
        """Append a result.

        Args:
          line: the result, a JSON object.
          line_hash: of the record that it answers.

        Raises:
          UserError: the disk is full, or the file cannot grow for another reason; all earlier lines are complete.
        """
        # backslashreplace writes half a surrogate pair as JSON does, `\\ud83d`.
        data = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8", "backslashreplace")
        if self._overwrite_pending:
            self._clear()
        try:
            self._write_all(self._file, data)
            if self._is_regular:
                entry = (line_hash, hash64(data), len(data), bool(line.get("error")))
                self._write_all(self._journal, np.array([entry], JOURNAL_ENTRY).tobytes())
                self._sync_if_due()
        except OSError as error:
            if self._is_regular:
                os.ftruncate(self._file, self._size)
                os.lseek(self._file, self._size, os.SEEK_SET)
            raise self._write_error(error) from error
        self._size += len(data)
        self._num_written += 1

    def _write_all(self, file: int, data: bytes) -> None:
        while data:  # On a nearly full disk a write is partial, and the next one fails.
            data = data[os.write(file, data) :]

    def _sync_if_due(self) -> None:
        if time.monotonic() - self._last_sync > SYNC_EVERY_S:
            os.fdatasync(self._file)
            os.fdatasync(self._journal)
            self._last_sync = time.monotonic()

    def finish(self, in_order_of: Iterable[BatchRecord | InvalidRecord] | None = None) -> None:
        """Complete the output once every record is answered: sort, compress or upload it.

        Args:
          in_order_of: put the results into the order of these records; None keeps the order in which they were written.

        Raises:
          UserError: writing fails; the results are kept, uncompressed or in the order in which they were written.
        """
        if self._overwrite_pending:
            self._clear()
        if not self._is_regular:
            return
        if in_order_of is not None:
            entries = self._read_journal()[1:]
            by_line = np.argsort(entries["line_hash"])
            wanted = np.array([record.line_hash for record in in_order_of], np.uint64)
            positions = np.searchsorted(entries["line_hash"], wanted, sorter=by_line)
            self._reorder(entries, by_line[positions])
        if self._work_path != self.path:
            with open(self._work_path, "rb") as lines:
                write_lines(self.path, lines)
            if is_lossless(self.path):
                os.unlink(self._work_path)

    def close(self) -> None:
        """Flush everything to disk and close the files.

        Raises:
          UserError: the data cannot be written (some file systems report this only now).
        """
        try:
            if self._is_regular:
                os.fsync(self._file)
                os.fsync(self._journal)
        except OSError as error:
            raise self._write_error(error) from error
        finally:
            os.close(self._file)
            if self._is_regular:
                self._remove_unused_journal()
                os.close(self._journal)
            self._lock.close()

    def _remove_unused_journal(self) -> None:
        """Remove the journal if there are no results."""
        if os.fstat(self._journal).st_size <= JOURNAL_ENTRY.itemsize and not self._has_results():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._journal_path)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _write_error(self, error: OSError) -> UserError:
        return UserError(
            f"cannot write to {self._work_path}: {error.strerror}; the {self.num_before + self._num_written} results so "
            "far are complete: free some disk space and run again, or name an output on another disk"
        )

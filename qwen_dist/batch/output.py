"""The output of a batch: results are journalled while the run lasts, and published when every record is answered. No jax.

A run with an output of other settings, or of another input, is refused, and so is one that would overwrite other files.

An output that can be appended to is itself the file of the journal. Any other (compressed, parquet, in an object store) is
written at the end. Until then the results are in OUTPUT.jsonl, which for a remote output is in the working directory. That
file is kept when the results could not be read back from the output byte by byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from qwen_dist.batch.journal import Journal, check_journal
from qwen_dist.batch.jsonl import BatchRecord, InvalidRecord
from qwen_dist.errors import UserError, printable
from qwen_dist.json_reader import flatten, read_json_object
from qwen_dist.outputs import Written, run_lock
from qwen_dist.storage.files import is_url
from qwen_dist.storage.line_writer import exists, is_appendable, is_lossless, partial_path, write_lines
from qwen_dist.storage.records import read_lines


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


def journal_path(output: str) -> str:
    """Return the path of the journal of a run with this output."""
    return f"{local_path(output)}.journal"


class OutputFile:
    """The results of a batch; those of earlier runs are kept.

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
        self._overwrite_pending = False  # existing results are discarded by the first write
        with contextlib.ExitStack() as opened:
            try:
                check_journal(self._journal_path)
                self._check_helper_files()
                self._is_regular = not os.path.exists(self._work_path) or stat.S_ISREG(os.stat(self._work_path).st_mode)
                if self._is_regular:
                    opened.enter_context(run_lock(f"{local}.lock", self.path, lambda text: print(text, file=sys.stderr)))
                self._journal = Journal(self._work_path, self._journal_path if self._is_regular else None, settings)
                opened.callback(self._journal.close)
                if self._is_regular:
                    self._resume(overwrite, retry_errors)
            except OSError as error:
                raise UserError(f"cannot write the output {printable(self.path)}: {error.strerror}") from error
            self.num_before = self._journal.num_results
            self._answered = np.sort(self._journal.entries["line_hash"])
            self._opened = opened.pop_all()

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

    def _resume(self, overwrite: bool, retry_errors: bool) -> None:
        """Recover the results of earlier runs, or make sure that there are none."""
        has_results = self._has_results()
        if overwrite or not has_results:
            self._overwrite_pending = has_results
            if not has_results:
                self._clear()
            return
        if not self._journal.has_header:
            self._journal.remove_empty_files()
            raise UserError(
                f"the output {self.path} holds results already, and there is no journal that says of which input: name "
                "another file, or use --overwrite"
            )
        if not self._journal.is_of_settings:
            raise UserError(
                f"the output {self.path} holds results of {self._describe_changes()}: name another file, or use --overwrite"
            )
        if self._is_published_losslessly() and os.path.exists(self.path):
            # Turn the compressed output back into plain lines, so that more results can be appended.
            self._journal.replace_results(read_lines(self.path))
            os.unlink(self.path)
        self._journal.recover(retry_errors=retry_errors)

    def _is_published_losslessly(self) -> bool:
        return self._work_path != self.path and is_lossless(self.path)

    def _has_results(self) -> bool:
        """Return whether there are results, of a finished or an unfinished run."""
        if os.path.exists(self._work_path) and os.path.getsize(self._work_path):
            return True
        return self._work_path != self.path and exists(self.path)

    def _clear(self) -> None:
        """Discard all results and start a new journal."""
        self._journal.clear()
        if self._is_published_losslessly():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)
        self._overwrite_pending = False

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
        self._journal.append(data, line_hash, is_error=bool(line.get("error")))

    def finish(self, in_order_of: Iterable[BatchRecord | InvalidRecord] | None = None) -> None:
        """Publish the output once every record is answered: sort, compress or upload it.

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
            self._journal.reorder(np.array([record.line_hash for record in in_order_of], np.uint64))
        if self._work_path != self.path:
            with open(self._work_path, "rb") as lines:
                write_lines(self.path, lines)
            if is_lossless(self.path):
                os.unlink(self._work_path)

    def close(self) -> None:
        """Flush everything to disk and close the files. A journal without results is removed.

        Raises:
          UserError: the data cannot be written (some file systems report this only now).
        """
        with self._opened:  # closes the journal, and then releases the lock
            if self._is_regular and not self._journal.num_results and not self._has_results():
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._journal_path)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

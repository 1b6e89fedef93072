"""What a command may write, replace or remove, checked before it starts. No jax.

A run directory carries a marker with its kind and version, so that nothing else is ever replaced or removed; a lock keeps a
second command away from an output in use; and no input may lie where the command writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import json
import os
import pathlib
import socket
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from qwen_dist.errors import UsageError, UserError, printable
from qwen_dist.json_reader import read_json_object

_MARKER_BYTES = 64 * 1024
_Identity = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Written:
    """A path that a command writes.

    Attributes:
      flag: the flag that names it, for messages.
      path: of the file or directory.
      is_directory: a directory, which is created with its parents if needed.
      is_page: an HTML page; an existing file that is none is not replaced.
      is_helper: a file that a run makes next to the output before it in the list, whose problems are not repeated.
    """

    flag: str
    path: str
    is_directory: bool = False
    is_page: bool = False
    is_helper: bool = False


def check_paths(read: Mapping[str, str | Sequence[str]], written: Iterable[Written]) -> None:
    """Check the paths of a command before it starts. Locations with "://" are compared by name only.

    Args:
      read: the files and directories that are read, by flag; empty ones do not count.
      written: the paths that are written, also those that a run makes next to its output.

    Raises:
      UsageError: lists every problem: an input that would be overwritten, a file among those of a model or an adapter, two
        outputs in one place, a directory that does not exist or cannot be written.
    """
    inputs = [(flag, path) for flag, paths in read.items() for path in _as_list(paths) if path]
    outputs, problems, is_refused = [one for one in written if one.path], [], False
    for index, output in enumerate(outputs):
        if output.is_helper and is_refused:
            continue
        place = _place_problem(output) or _among_inputs(output, inputs)
        is_refused = place is not None
        problems += [place] if place is not None else _conflicts(output, inputs, outputs[:index])
    if problems:
        raise UsageError("; ".join(dict.fromkeys(problems)) + ": name another place")


def _conflicts(output: Written, inputs: Sequence[tuple[str, str]], others: Sequence[Written]) -> list[str]:
    """Return which inputs and other outputs are what is written, or lie in it."""
    shown = f"{output.flag} {printable(output.path)}"
    found = [
        f"{flag} {printable(path)} {relation} {shown}, which is written"
        for flag, path in inputs
        if (relation := _relation(output, path))
    ]
    return found + [
        f"{other.flag} {printable(other.path)} and {shown} are the same file"
        for other in others
        if _is_same(other.path, output.path)
    ]


def _among_inputs(output: Written, inputs: Sequence[tuple[str, str]]) -> str | None:
    """Return which model or adapter a file would be written into; None if it is not.

    It could replace one of their files, and another file changes what identifies them, so that no run could be resumed.
    """
    if output.is_directory or output.is_page or "://" in output.path:
        return None
    written = pathlib.Path(os.path.realpath(output.path))
    for flag, path in inputs:
        if os.path.isdir(path) and written.is_relative_to(os.path.realpath(path)):
            return f"{flag} {printable(path)} holds {output.flag} {printable(output.path)}, which is written"
    return None


def _as_list(paths: str | Sequence[str]) -> Sequence[str]:
    return [paths] if isinstance(paths, str) else paths


def _relation(output: Written, path: str) -> str | None:
    """Return how an input lies to what is written, if it would be overwritten."""
    if _is_same(output.path, path):
        return "is the same as"
    if not output.is_directory or "://" in path:
        return None
    is_inside = pathlib.Path(os.path.realpath(path)).is_relative_to(os.path.realpath(output.path))
    return "is inside" if is_inside else None


def _is_same(one: str, other: str) -> bool:
    """Return whether two paths are one file: by name, or by a hard or symbolic link."""
    if "://" in one or "://" in other:
        return one == other
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    identities = [_identity(path) for path in (one, other)]
    return identities[0] is not None and identities[0] == identities[1]


def _identity(path: str) -> _Identity | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _place_problem(output: Written) -> str | None:
    """Return why nothing can be written at a path, or None."""
    if "://" in output.path:
        return None
    shown = f"{output.flag} {printable(output.path)}"
    try:
        if "\0" in output.path:
            return f"{shown} has a NUL character"
        path = pathlib.Path(os.path.realpath(output.path))  # of a symbolic link, what it leads to is written
        mode = path.stat().st_mode if path.exists() else None
        if mode is not None and stat.S_ISDIR(mode) != output.is_directory:
            return f"{shown} is a directory, not a file" if stat.S_ISDIR(mode) else f"{shown} is a file, not a directory"
        if path == path.parent:
            return f"{shown} is the root of the file system"
        parent = path.parent
        while output.is_directory and not parent.exists():
            parent = parent.parent
        if not parent.exists():
            return f"{shown} cannot be written: there is no directory {printable(parent)}"
        if not parent.is_dir():
            return f"{shown} cannot be written: {printable(parent)} is not a directory"
        if mode is None and not os.access(parent, os.W_OK | os.X_OK):
            return f"{shown} cannot be written: no permission to write in {printable(parent)}"
        if mode is not None and not os.access(path, os.W_OK):
            return f"{shown} cannot be written: no permission to change it"
        if path.is_symlink():
            return f"{shown} is a symbolic link that leads to itself"
        if output.is_page and mode is not None and stat.S_ISREG(mode) and not _is_page(path):
            return f"{shown} exists and is not an HTML page"
    except (OSError, ValueError) as error:
        return f"{shown} cannot be written: {error.strerror if isinstance(error, OSError) else error}"
    return None


def _is_page(path: pathlib.Path) -> bool:
    with open(path, "rb") as file:
        return file.read(15).lower() in (b"<!doctype html>", b"<!doctype html ", b"")


@dataclasses.dataclass(frozen=True)
class Marker:
    """The file in a directory that says what made it.

    Attributes:
      name: of the file.
      kind: of the directory, such as "training run".
      version: of the form of its files.
    """

    name: str
    kind: str
    version: int

    def write(self, directory: pathlib.Path) -> None:
        """Mark a directory, in one step: a marker that was cut would make the directory useless."""
        partial = directory / self._partial_name
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps({"kind": self.kind, "version": self.version}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(directory / self.name)

    @property
    def _partial_name(self) -> str:
        return f"{self.name}.partial"

    def check(self, directory: pathlib.Path, flag: str) -> bool:
        """Return whether a directory has been marked; False if it is empty or does not exist.

        Raises:
          UsageError: it holds something else, or files in another form.
        """
        if not directory.exists() or {path.name for path in directory.iterdir()} <= {self._partial_name}:
            return False
        try:
            found = read_json_object(directory / self.name, max_bytes=_MARKER_BYTES, error=UsageError)
        except FileNotFoundError:
            raise UsageError(
                f"{flag} {printable(directory)} holds files that are not of a {self.kind} (it has no {self.name}), so "
                "nothing in it is changed: name another directory"
            ) from None
        if found.get("kind") != self.kind or found.get("version") != self.version:
            raise UsageError(
                f"{flag} {printable(directory)} is marked as {printable(found.get('kind'), 60)}, version "
                f"{printable(found.get('version'), 20)}; this is qwen-dist's {self.kind}, version {self.version}: name "
                "another directory"
            )
        return True


@contextlib.contextmanager
def run_lock(path: str, output: str, note: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Hold the lock of an output while the block runs. The system releases it when the process ends, however it ends.

    Args:
      path: of the lock file; it is removed afterwards.
      output: what is locked, for the message.
      note: called with a sentence if the file system has no locks.

    Raises:
      UserError: another process holds it; the message says which, and since when.
    """
    try:
        descriptor = _take_lock(path, output, note)
    except OSError as error:
        raise UserError(f"cannot write the output {printable(output)}: {error.strerror}") from error
    try:
        yield
    finally:
        # Removed before it is released: whoever opens the name later gets a new file.
        with contextlib.suppress(OSError):
            os.unlink(path)
        os.close(descriptor)


def _take_lock(path: str, output: str, note: Callable[[str], None]) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = printable(os.pread(descriptor, 1000, 0).decode("utf-8", "replace").strip() or "another process", 200)
            os.close(descriptor)
            raise UserError(
                f"{printable(output)} is in use by {holder}: wait until it ends, or name another output"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                os.close(descriptor)
                raise
            note(f"the file system of {output} has no locks: do not run two commands with this output at once")
        if (content := os.pread(descriptor, 100, 0)) and not content.startswith(b"process "):
            os.close(descriptor)
            raise UserError(f"{printable(path)} is not a lock of qwen-dist, and would be overwritten: move it away")
        # Another process may have removed the file between the opening and the locking.
        opened, named = os.fstat(descriptor), _identity(path)
        if named == (opened.st_dev, opened.st_ino):
            break
        os.close(descriptor)
    since = datetime.datetime.now().strftime("%Y-%m-%d %H:%M:%S")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}\n".encode(), 0)
    return descriptor

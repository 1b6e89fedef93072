"""Replace a directory as a whole: at any moment it is either the complete old one or the complete new one. No jax."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from qwen_dist.errors import CheckpointError, UserError, printable
from qwen_dist.outputs import run_lock

# In a staging directory: it is one, and may be removed.
_MARKER = ".qwen_dist_saving"


class StagingDirectory:
    """A directory that is written next to its target, and takes the target's name in one step.

    Attributes:
      target: the output, with symbolic links resolved: a link stays, and what it leads to is replaced.
      path: where to write. Every file must be synced, as `write` does it.
    """

    def __init__(self, output: str | os.PathLike[str]):
        self.target = Path(os.path.realpath(output))
        self.path = self.target.with_name(f".{self.target.name}.saving")

    def check(self) -> None:
        """Raise CheckpointError if something else has the name of the staging directory."""
        is_left_over = (self.path / _MARKER).is_file() or (self.path.is_dir() and not any(self.path.iterdir()))
        if os.path.lexists(self.path) and not self.path.is_symlink() and not is_left_over:
            raise CheckpointError(f"{printable(self.path)} is in the way and was not made by qwen-dist: move it away.")

    @contextlib.contextmanager
    def created(self, check_target: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Create the directory; remove at the end of the block what is left of it: after `commit`, the old target.

        The target is locked during the block. `check_target` raises an error if it may not be replaced.
        """
        self.target.parent.mkdir(parents=True, exist_ok=True)
        with run_lock(str(self.target.with_name(f".{self.target.name}.lock")), str(self.target)):
            check_target()
            self.check()
            if self.path.is_symlink():
                self.path.unlink()
            self._remove()  # left by a save that was killed
            try:
                self.path.mkdir()
                (self.path / _MARKER).touch()
                yield
            finally:
                self._remove()

    def write(self, name: str, content: bytes) -> None:
        """Write and sync a file."""
        (self.path / name).parent.mkdir(exist_ok=True)
        (self.path / name).write_bytes(content)
        fsync(self.path / name)

    def commit(self, is_replaced: Callable[[str], bool] = lambda name: False) -> None:
        """Give the finished directory the name of the target in one step.

        What else lies in the target, such as a model card, is taken over, by hard links or as copies.

        Args:
          is_replaced: returns whether a file of this name is not taken over.
        """
        for path in self.target.iterdir() if self.target.is_dir() else ():
            if is_replaced(path.name) or (self.path / path.name).exists():
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, self.path / path.name, symlinks=True, copy_function=_link_or_copy)
            else:
                _link_or_copy(path, self.path / path.name)
        fsync(self.path)
        if self.target.exists() and any(self.target.iterdir()):
            (self.target / _MARKER).touch()  # it becomes the staging directory, and may be removed
            try:
                _swap_directories(self.path, self.target)
            except CheckpointError:
                (self.target / _MARKER).unlink()
                raise
        else:
            os.rename(self.path, self.target)
        # Until now a killed save could be told by it.
        (self.target / _MARKER).unlink()
        fsync(self.target.parent)

    def _remove(self) -> None:
        """Remove the directory, its marker last: if this is killed, the next save still knows that it may remove it."""
        with contextlib.suppress(FileNotFoundError):
            for path in self.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                elif path.name != _MARKER:
                    path.unlink(missing_ok=True)
            (self.path / _MARKER).unlink(missing_ok=True)
            self.path.rmdir()


@contextlib.contextmanager
def write_errors(target: Path) -> Iterator[None]:
    """Turn the errors of the file system into a CheckpointError."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise CheckpointError(f"{printable(target)} cannot be written: {reason}.") from error


def fsync(path: Path) -> None:
    """Write a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _link_or_copy(source: str | Path, destination: str | Path) -> None:
    try:
        os.link(source, destination, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, destination, follow_symlinks=False)


def _swap_directories(staging: Path, target: Path) -> None:
    """Swap two directories atomically (Linux `renameat2` with RENAME_EXCHANGE)."""
    at_fdcwd, rename_exchange = -100, 2
    libc = ctypes.CDLL(None, use_errno=True)
    renameat2 = getattr(libc, "renameat2", None)
    code = -1
    if renameat2 is not None:
        code = renameat2(at_fdcwd, os.fsencode(staging), at_fdcwd, os.fsencode(target), rename_exchange)
    if code != 0:
        number = ctypes.get_errno() if renameat2 is not None else errno.ENOSYS
        raise CheckpointError(
            f"{target} cannot be replaced in one step on this file system ({os.strerror(number)}); choose another output."
        )

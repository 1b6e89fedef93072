"""Training checkpoints, by Orbax: written in the background, atomically, and restored onto any mesh."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import resource
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax

from qwen_dist.errors import UserError, printable
from qwen_dist.train.step import TrainState

_READ_AT_OPENING = ("_CHECKPOINT_METADATA", "metrics/metrics")


class Checkpoints:
    """The checkpoints of one run. `close` waits until the last one is complete."""

    def __init__(self, directory: pathlib.Path, *, keep: int, keep_best: bool):
        """Open the directory; it is created if needed.

        Args:
          directory: of the checkpoints.
          keep: how many of the newest checkpoints stay.
          keep_best: also keep the checkpoint with the lowest loss given to `save`.
        """
        # A failed write is reported by `_written`; Orbax would log its traceback, too.
        for name in ("absl", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
        # After an error, which `_restore` reports, what Orbax has begun to read ends with many other tracebacks.
        self._hook = sys.unraisablehook
        sys.unraisablehook = self._drop_rest_of_read
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy

        policies: list[Any] = [preservation_policy.LatestN(keep)]
        if keep_best:
            # Orbax takes the highest metric as the best.
            policies.append(preservation_policy.BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=1))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies), create=True
        )
        try:
            # Orbax reads these files of all checkpoints at once, and to their end.
            _check_regular(path for name in _READ_AT_OPENING for path in directory.glob(f"*/{name}"))
            self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        except Exception as error:
            sys.unraisablehook = self._hook
            raise UserError(
                f"the checkpoints in {directory} cannot be opened ({_reason(error)}): move the damaged one away, or use "
                "--overwrite to start over"
            ) from error
        self._args = ocp.args

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, position: Mapping[str, Any], loss: float | None = None) -> None:
        """Copy the state and write it in the background.

        Args:
          step: the number of steps done. An existing checkpoint of this step is left as it is.
          state: the state of the trainer.
          position: JSON values: the position in the data and the fingerprint of the run.
          loss: the loss of the last evaluation.
        """
        if step in self._manager.all_steps():
            return
        args = self._args.Composite(
            state=self._args.StandardSave(state._asdict()), position=self._args.JsonSave(dict(position))
        )
        with self._written():
            _check_space(pathlib.Path(self._manager.directory), state)
            self._manager.save(step, args=args, metrics=None if loss is None else {"loss": loss})

    def position(self, step: int) -> dict[str, Any]:
        """Return the position of the checkpoint of a step.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        position = self._restore(step, position=self._args.JsonRestore())["position"]
        if not isinstance(position, dict) or not all(isinstance(position.get(key), dict) for key in ("run", "data")):
            raise UserError(f"the checkpoint {self._manager.directory / str(step)} cannot be restored (it has no position)")
        return position

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Return the state of the checkpoint of a step.

        Args:
          step: one of `steps`.
          like: an abstract state: the shapes, dtypes and shardings of the result.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        return TrainState(**self._restore(step, state=self._args.StandardRestore(like._asdict()))["state"])

    def _restore(self, step: int, **items: Any) -> Any:
        where = pathlib.Path(self._manager.directory) / str(step)
        try:
            _check_regular(where.rglob("*"))
            return self._manager.restore(step, args=self._args.Composite(**items))
        except MemoryError:  # no damage
            raise
        except Exception as error:  # the reader of a damaged file can raise anything
            raise UserError(f"the checkpoint {where} cannot be restored ({_reason(error)})") from error

    def set_aside(self, step: int) -> pathlib.Path:
        """Rename the folder of a checkpoint so that it is none any more, and return its new path.

        Every process calls this, and `reload` when all have; the first one renames.
        """
        folder = pathlib.Path(self._manager.directory) / str(step)
        moved = folder.parent.with_name(f"damaged-checkpoint-{step}")
        number = 1
        while moved.exists():
            number += 1
            moved = moved.with_name(f"damaged-checkpoint-{step}-{number}")
        if jax.process_index() == 0:
            try:
                folder.rename(moved)
            except OSError as error:
                raise UserError(f"{folder} cannot be renamed: {error.strerror}") from error
        return moved

    def reload(self) -> None:
        """Look at the directory again, after another process has changed it."""
        self._manager.reload()

    def close(self) -> None:
        """Wait for the background writes and release the directory. Raises UserError if one failed."""
        try:
            with self._written():
                self._manager.close()
        finally:
            sys.unraisablehook = self._hook

    def _drop_rest_of_read(self, unraisable: Any) -> None:
        is_closed_loop = isinstance(unraisable.exc_value, RuntimeError) and "Event loop is closed" in str(
            unraisable.exc_value
        )
        if not (is_closed_loop or isinstance(unraisable.object, types.CoroutineType)):
            self._hook(unraisable)

    @contextlib.contextmanager
    def _written(self) -> Iterator[None]:
        """Turn what a failed write raises, now or after it was started, into one sentence."""
        try:
            yield
        except Exception as error:  # Orbax and TensorStore have no common error class
            raise UserError(
                f"a checkpoint cannot be written to {self._manager.directory} ({_reason(error)}): free "
                "some disk space and run the same command again; it resumes from the newest whole checkpoint"
            ) from error


def _check_regular(paths: Iterable[pathlib.Path]) -> None:
    """Raise OSError if a path is a pipe or a device: reading it would not end. A link counts as what it leads to."""
    for path in paths:
        if not (path.is_dir() or path.is_file()):
            raise OSError(f"{path} is not a regular file")


def _reason(error: BaseException) -> str:
    """Return the first cause of an error: of its first line the end, as TensorStore puts the cause after every layer."""
    while error.__cause__ is not None:
        error = error.__cause__
    return printable(f"{type(error).__name__}: {str(error).strip().split(chr(10))[0].split(': ')[-1]}", 200)


def _check_space(directory: pathlib.Path, state: TrainState) -> None:
    """Raise OSError if a checkpoint cannot fit, even compressed to half its size. Otherwise the write will tell."""
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    system = os.statvfs(directory)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    free = system.f_bavail * system.f_frsize
    available = free if limit == resource.RLIM_INFINITY else min(free, limit)
    if available < needed / 2:
        raise OSError(errno.ENOSPC, f"it has {needed:,} bytes, and {available:,} can be written")

"""Training checkpoints, by Orbax: written in the background, atomically, and restored onto any mesh."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from qwen_dist.errors import UserError
from qwen_dist.train.step import TrainState


class Checkpoints:
    """The checkpoints of one run. `close` waits until the last one is complete."""

    def __init__(self, directory: pathlib.Path, *, keep: int, keep_best: bool):
        """Open the directory; it is created if needed.

        Args:
          directory: of the checkpoints.
          keep: how many of the newest checkpoints stay.
          keep_best: also keep the checkpoint with the lowest loss given to `save`.
        """
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy

        policies: list[Any] = [preservation_policy.LatestN(keep)]
        if keep_best:
            # Orbax takes the highest metric as the best.
            policies.append(preservation_policy.BestN(get_metric_fn=lambda metrics: -metrics["loss"], n=1))
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies), create=True
            ),
        )
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
        self._manager.save(step, args=args, metrics=None if loss is None else {"loss": loss})

    def position(self) -> dict[str, Any]:
        """Return the position of the newest checkpoint.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        return self._restore(position=self._args.JsonRestore())["position"]

    def restore(self, like: TrainState) -> TrainState:
        """Return the state of the newest checkpoint.

        Args:
          like: an abstract state: the shapes, dtypes and shardings of the result.

        Raises:
          UserError: the checkpoint cannot be read.
        """
        return TrainState(**self._restore(state=self._args.StandardRestore(like._asdict()))["state"])

    def _restore(self, **items: Any) -> Any:
        try:
            return self._manager.restore(self.latest, args=self._args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            where = self._manager.directory / str(self.latest)
            raise UserError(f"the checkpoint {where} cannot be restored: {error}") from error

    def close(self) -> None:
        """Wait for the background writes and release the directory."""
        self._manager.close()

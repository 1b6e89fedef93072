"""A run's state on disk, by orbax: written in the background, whole or not at all, restored onto any mesh."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

from qwen_dist.errors import UserError
from qwen_dist.train.step import State


class Checkpoints:
    """The checkpoints of one run. Close it to wait for the last to be complete."""

    def __init__(self, directory: pathlib.Path, *, keep: int, keep_best: bool):
        """Keeps the newest `keep`, and with `keep_best` also the one of the lowest loss given to `save`."""
        import orbax.checkpoint as ocp
        from orbax.checkpoint.checkpoint_managers import preservation_policy

        policies: list[Any] = [preservation_policy.LatestN(keep)]
        if keep_best:
            # The best is the highest.
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
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    @property
    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: State, position: Mapping[str, Any], loss: float | None = None) -> None:
        """Copy the state, and write it in the background.

        Args:
          step: how many have been done; a checkpoint of this step that exists is left as it is.
          state: of the trainer.
          position: JSON values: where the data stands, and what the run is.
          loss: of the last evaluation.
        """
        if step in self._manager.all_steps():
            return
        args = self._args.Composite(
            state=self._args.StandardSave(state._asdict()), position=self._args.JsonSave(dict(position))
        )
        self._manager.save(step, args=args, metrics=None if loss is None else {"loss": loss})

    def position(self) -> dict[str, Any]:
        """The position of the newest checkpoint. Raises UserError when it cannot be read."""
        return self._restore(position=self._args.JsonRestore())["position"]

    def restore(self, like: State) -> State:
        """The state of the newest checkpoint, placed as the abstract state `like`. Raises UserError."""
        return State(**self._restore(state=self._args.StandardRestore(like._asdict()))["state"])

    def _restore(self, **items: Any) -> Any:
        try:
            return self._manager.restore(self.latest, args=self._args.Composite(**items))
        except (ValueError, KeyError, OSError) as error:
            where = self._manager.directory / str(self.latest)
            raise UserError(f"the checkpoint {where} cannot be restored: {error}") from error

    def wait(self) -> None:
        """Return when all that was saved is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        self._manager.close()

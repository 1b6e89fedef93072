"""Which implementation of an operation runs: decided by the mesh and the phase, never inside a layer.

A `Backend` is what a program is compiled for. Each `Op` lists, by backend, the implementations to try in order; the last
resort is its plain form, which takes every input on every backend and says what the others must compute.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax

from qwen_dist.ops import native_library
from qwen_dist.sharding import active_context

Phase = Literal["train", "inference"]


class Backend(enum.Enum):
    """What a program is compiled for.

    The C++ kernels have no gradient and XLA cannot divide them among devices. Inference on one CPU device uses them all;
    on several, only those that run inside `shard_map_op`.
    """

    CPU_KERNELS = "cpu kernels"
    CPU_KERNELS_LOCAL = "cpu kernels, several devices"
    CPU = "cpu"
    GPU = "gpu"
    TPU = "tpu"

    @classmethod
    def of(cls, mesh: Any, phase: Phase) -> Backend:
        """Return the backend of programs of this phase on a mesh, whose devices may be descriptions of devices."""
        return cls.of_platform(mesh.devices.flat[0].platform, mesh.size, phase)

    @classmethod
    def of_platform(cls, platform: str, num_devices: int, phase: Phase) -> Backend:
        """Return the backend without a mesh. `platform` is "cpu", "tpu" or the name of any GPU platform."""
        if platform == "tpu":
            return cls.TPU
        if platform != "cpu":
            return cls.GPU
        if phase == "train" or not native_library.is_available():
            return cls.CPU
        return cls.CPU_KERNELS if num_devices == 1 else cls.CPU_KERNELS_LOCAL


def active_backend() -> Backend:
    """Return the backend of the active sharding context; outside of one, that of training on jax's default device."""
    context = active_context()
    if context is None:
        return Backend.of_platform(jax.default_backend(), 1, "train")
    return Backend.of(context.mesh, context.rules.phase)


def _always(*_: Any, **__: Any) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op: `run` takes the op's arguments, `can_run` says of the same arguments whether it may."""

    name: str
    run: Callable[..., Any]
    can_run: Callable[..., bool] = _always


class Op:
    """An operation and its implementations.

    Args:
      name: as the dispatch table prints it.
      plain: the plain form: any input, any backend, with a gradient.
      by_backend: what to try before the plain form, in order.
    """

    def __init__(
        self, name: str, plain: Callable[..., Any], by_backend: Mapping[Backend, Sequence[Implementation]] | None = None
    ):
        self.name = name
        self.plain = Implementation("plain", plain)
        self._by_backend = dict(by_backend or {})

    def implementations(self, backend: Backend) -> tuple[Implementation, ...]:
        """Return what may run on a backend: the first of these that can take the arguments does."""
        return (*self._by_backend.get(backend, ()), self.plain)

    def select(self, backend: Backend, *args: Any, **kwargs: Any) -> Implementation:
        """Return the implementation that takes these arguments on a backend."""
        return next(one for one in self.implementations(backend) if one.can_run(*args, **kwargs))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.select(active_backend(), *args, **kwargs).run(*args, **kwargs)

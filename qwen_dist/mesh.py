"""The device mesh: five named axes, and how large each is."""

from __future__ import annotations

import dataclasses
import math

import jax

from qwen_dist.errors import UsageError

# From the slowest network to the fastest: neighbours along the last axis are neighbours in the machine.
AXES = ("data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices each axis spans; -1, once, means all that are left.

    data: whole replicas of the model, each with its share of the batch. fsdp: weights spread over replicas of the
    computation. tensor: heads, MLP channels and vocabulary split. expert and context: reserved, 1.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """Read `fsdp=2,tensor=4`. Raises UsageError listing every problem."""
        sizes: dict[str, int] = {}
        problems = []
        for part in filter(None, text.replace(" ", "").split(",")):
            axis, _, size = part.partition("=")
            if axis not in AXES:
                problems.append(f"{axis!r} is not an axis; axes are {', '.join(AXES)}")
            elif axis in sizes:
                problems.append(f"{axis} is given twice")
            elif not size.removeprefix("-").isdecimal() or (int(size) < 1 and int(size) != -1):
                problems.append(f"{part!r}: a size is a positive number, or -1 for all devices that are left")
            elif axis in ("expert", "context") and int(size) != 1:
                problems.append(f"{axis} can only be 1 for the models supported so far")
            else:
                sizes[axis] = int(size)
        if list(sizes.values()).count(-1) > 1:
            problems.append("only one axis can be -1")
        if problems:
            raise UsageError(f"mesh {text!r}: {'; '.join(problems)}. Example: fsdp=2,tensor=4.")
        return cls(**sizes)

    @property
    def num_devices(self) -> int:
        """How many devices the axes that have a size span together."""
        return math.prod(size for size in dataclasses.astuple(self) if size != -1)

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Each axis's size on `num_devices` devices. Raises UsageError when they do not fit."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        known = math.prod(size for size in sizes.values() if size != -1)
        sizes = {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}
        wanted = math.prod(sizes.values())
        given = ",".join(f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) != 1) or "data=1"
        if -1 in dataclasses.astuple(self) and wanted != num_devices:
            raise UsageError(f"mesh {given}: {known} does not divide the {num_devices} devices there are.")
        if wanted > num_devices:
            raise UsageError(
                f"mesh {given} needs {wanted} devices and there are {num_devices}. "
                f"On a CPU, --num-cpu-devices {wanted} makes as many."
            )
        return sizes


def make_mesh(config: MeshConfig) -> jax.sharding.Mesh:
    """The mesh of `config` over the first devices of this run; every axis of `AXES` is in it. Raises UsageError."""
    devices = jax.devices()
    sizes = config.sizes(len(devices))
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    used = devices[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=used)

"""The device mesh: five named axes, their sizes, and which of them cross the network between slices.

ICI is the fast network inside a TPU slice or a host with several GPUs. DCN is the slower network between them.
`fsdp=dcn2*ici8` spans 2 slices and 8 devices in each.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils

from qwen_dist.errors import UsageError
from qwen_dist.models.config import ModelConfig

# From the slowest network to the fastest: neighbours along the last axis are physical neighbours.
AXES = ("data", "fsdp", "expert", "context", "tensor")
# Beyond this size, the collectives of tensor parallelism cost more than the smaller matmuls save.
MAX_DEFAULT_TENSOR = 8

_SIZE = re.compile(r"(?:dcn([1-9][0-9]*))?(?:(?:^|(?<=[0-9])\*)(?:ici)?(-1|[1-9][0-9]*))?")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The number of devices along each axis. At most one axis may be -1, which takes all remaining devices.

    Attributes:
      data: data parallelism; weights are replicated, the batch is sharded.
      fsdp: weights are sharded, and in training the batch as well.
      expert: the experts of a mixture and the batch are sharded; other weights are replicated.
      context: the tokens of each row are sharded.
      tensor: heads, MLP channels and vocabulary are sharded.
      dcn: for each axis that crosses DCN, its size across DCN.
    """

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    dcn: tuple[tuple[str, int], ...] = ()

    @classmethod
    def parse(cls, text: str) -> MeshConfig:
        """Parse `fsdp=2,tensor=4` or `data=dcn2,fsdp=dcn2*ici8`. Raises UsageError listing every problem."""
        sizes: dict[str, int] = {}
        dcn: dict[str, int] = {}
        problems = []
        for part in filter(None, text.replace(" ", "").split(",")):
            axis, _, size = part.partition("=")
            match = _SIZE.fullmatch(size) if size else None
            if axis not in AXES:
                problems.append(f"{axis!r} is not an axis; axes are {', '.join(AXES)}")
            elif axis in sizes:
                problems.append(f"{axis} is given twice")
            elif match is None:
                problems.append(f"{part!r}: a size is a positive number, or -1 for all remaining devices")
            else:
                outer, inner = int(match[1] or 1), int(match[2] or 1)
                sizes[axis] = -1 if inner == -1 else outer * inner
                if outer > 1:
                    dcn[axis] = outer
        if list(sizes.values()).count(-1) > 1:
            problems.append("only one axis can be -1")
        if problems:
            raise UsageError(f"mesh {text!r}: {'; '.join(problems)}. Example: fsdp=2,tensor=4.")
        return cls(**sizes, dcn=tuple(sorted(dcn.items())))

    def __str__(self) -> str:
        """Return the text that `parse` reads."""
        dcn, parts = dict(self.dcn), []
        for axis in AXES:
            size, outer = getattr(self, axis), dcn.get(axis, 1)
            if outer > 1:
                parts.append(f"{axis}=dcn{outer}*ici{size if size == -1 else size // outer}")
            elif size != 1:
                parts.append(f"{axis}={size}")
        return ",".join(parts) or "data=1"

    @property
    def num_devices(self) -> int:
        """The product of the sizes other than -1."""
        return math.prod(size for axis in AXES if (size := getattr(self, axis)) != -1)

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Return the size of each axis on `num_devices` devices. Raises UsageError when they do not fit."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        known = self.num_devices
        open_axis = next((axis for axis, size in sizes.items() if size == -1), None)
        sizes = {axis: num_devices // known if size == -1 else size for axis, size in sizes.items()}
        wanted = math.prod(sizes.values())
        if open_axis is not None and wanted != num_devices:
            raise UsageError(f"mesh {self}: {known} does not divide the {num_devices} available devices.")
        if wanted > num_devices:
            raise UsageError(
                f"mesh {self} needs {wanted} devices and there are {num_devices}. On a CPU, add --num-cpu-devices {wanted}."
            )
        if open_axis is not None and sizes[open_axis] % dict(self.dcn).get(open_axis, 1):
            raise UsageError(
                f"mesh {self}: {open_axis} would span {sizes[open_axis]} devices, which its dcn size does not divide."
            )
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Return the mesh of `config` over the first of `devices`, with every axis of `AXES`.

    Args:
      config: the sizes of the axes.
      devices: by default all devices of the run.

    Raises:
      UsageError: the mesh does not fit the devices. With several processes it must use all of them.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    used = devices[: math.prod(sizes.values())]
    if len(used) < len(devices) and len({device.process_index for device in devices}) > 1:
        raise UsageError(
            f"mesh {config} uses {len(used)} of the {len(devices)} devices. With several processes it must use all: "
            "set the size of one axis to -1."
        )
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    if config.dcn:
        return jax.sharding.Mesh(_hybrid_devices(config, sizes, used), AXES, axis_types=auto)
    if len(slices := {_slice(device) for device in used}) > 1:
        raise UsageError(
            f"mesh {config}: the {len(used)} devices are in {len(slices)} slices with a slower network between them. Mark "
            f"the axis that crosses it, for example data=dcn{len(slices)}."
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=auto, devices=used)


def sum_over_devices(mesh: jax.sharding.Mesh) -> int:
    """Return the sum of a 1 from each device, which shows that all devices and the network between them work."""
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXES))
    ones = jax.make_array_from_callback((mesh.size,), spread, lambda index: np.ones(mesh.size, np.int32)[index])
    return int(jax.jit(jnp.sum, out_shardings=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))(ones))


def default_mesh(
    model: ModelConfig, devices: Sequence[jax.Device], num_units: Mapping[str, int] = types.MappingProxyType({})
) -> MeshConfig:
    """Return the default mesh for inference. It shards the weights as far as possible, `tensor` within a process.

    `tensor` is the largest size that divides the devices of a process, the heads, the MLP channels and the vocabulary.
    `expert` takes the remaining devices of a slice as far as they divide the experts, `fsdp` then as far as they divide the
    hidden size. `data`, which replicates the weights, takes the rest: each slice has a copy.

    `num_units` are the parts by logical axis that the in-features of quantised weights may be divided into.
    """
    granules = len({_slice(device) for device in devices})
    per_granule = len(devices) // granules
    local = sum(device.process_index == devices[0].process_index for device in devices)
    key_heads = () if model.delta_net is None else (model.delta_net.num_key_heads,)
    units = (number for axis, number in num_units.items() if axis != "embed")
    split = math.gcd(local, model.num_attention_heads, model.vocab_size, *model.channels, *key_heads, *units)
    kv_heads = model.num_key_value_heads
    tensor = max(n for n in range(1, MAX_DEFAULT_TENSOR + 1) if split % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0))
    expert = math.gcd(per_granule // tensor, model.moe.num_experts) if model.moe else 1
    fsdp = math.gcd(per_granule // (tensor * expert), model.hidden_size, num_units.get("embed", 0))
    data = len(devices) // (fsdp * expert * tensor)
    return MeshConfig(data=data, fsdp=fsdp, expert=expert, tensor=tensor, dcn=(("data", granules),) if granules > 1 else ())


def training_mesh(
    model: ModelConfig, devices: Sequence[jax.Device], num_units: Mapping[str, int] = types.MappingProxyType({})
) -> MeshConfig:
    """Return the default mesh for training: `fsdp` takes what divides the hidden size in a slice, `data` the rest.

    `num_units` as in `default_mesh`.
    """
    granules = len({_slice(device) for device in devices})
    fsdp = math.gcd(len(devices) // granules, model.hidden_size, num_units.get("embed", 0))
    return MeshConfig(data=len(devices) // fsdp, fsdp=fsdp, dcn=(("data", granules),) if granules > 1 else ())


def _slice(device: jax.Device) -> int:
    """Return the index of the TPU slice of a device; 0 for other devices."""
    return getattr(device, "slice_index", 0) if device.platform == "tpu" else 0


def _hybrid_devices(config: MeshConfig, sizes: dict[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Return the devices as an array, with TPU slices (or else processes) along the `dcn` part of each axis."""
    is_tpu = devices[0].platform == "tpu"
    granules = {_slice(device) if is_tpu else device.process_index for device in devices}
    outer = [dict(config.dcn).get(axis, 1) for axis in AXES]
    inner = [size // part for size, part in zip(sizes.values(), outer, strict=True)]
    if math.prod(outer) != len(granules):
        raise UsageError(
            f"mesh {config}: the product of the dcn sizes is {math.prod(outer)}, but the devices are in {len(granules)} "
            f"{'slices' if is_tpu else 'processes'}. The two must be equal."
        )
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, process_is_granule=not is_tpu, allow_split_physical_axes=True
    )

"""Tensors of a checkpoint that the text model does not use, such as a vision tower, for a checkpoint that is saved from it.

They are loaded like parameters, under their names on disk: sharded over the devices, and dequantised if they are quantised.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qwen_dist.checkpoint.fp8 import FP8_DTYPES
from qwen_dist.checkpoint.load import load
from qwen_dist.checkpoint.names import map_names, name_alone
from qwen_dist.checkpoint.safetensors import TensorInfo
from qwen_dist.checkpoint.source import Checkpoint
from qwen_dist.models.parameters import DiskShape
from qwen_dist.sharding import ShardingContext


def load_carried(
    checkpoint: Checkpoint,
    disk_shapes: dict[str, DiskShape],
    sharding_ctx: ShardingContext,
    *,
    tied: bool,
    host_memory_budget: int | None = None,
) -> dict[str, jax.Array]:
    """Return the tensors of a checkpoint that are of no parameter, by their names on disk.

    Args:
      checkpoint: an opened checkpoint.
      disk_shapes: of the model's parameters.
      sharding_ctx: the mesh.
      tied: see `load`.
      host_memory_budget: see `load`.

    Raises:
      CheckpointError: as `load`.
    """
    carried = map_names(disk_shapes, checkpoint.tensors, tied=tied).carried
    return _load_alone(checkpoint, [checkpoint.tensors[name] for name in carried], sharding_ctx, host_memory_budget)


def _load_alone(
    checkpoint: Checkpoint, tensors: Iterable[TensorInfo], sharding_ctx: ShardingContext, budget: int | None
) -> dict[str, jax.Array]:
    tensors = list(tensors)
    if not tensors:
        return {}
    target = {one.name: _target(one, sharding_ctx) for one in tensors}
    return load(checkpoint, target, names=name_alone(tensors, checkpoint.tensors), host_memory_budget=budget)


def _target(tensor: TensorInfo, sharding_ctx: ShardingContext) -> jax.ShapeDtypeStruct:
    """Return a target whose first dimension is sharded over all devices, where their number divides it."""
    mesh = sharding_ctx.mesh
    is_divisible = math.prod(tensor.shape[:1]) % mesh.size == 0 and len(tensor.shape) > 0
    spec = PartitionSpec(mesh.axis_names) if is_divisible else PartitionSpec()
    dtype = jnp.bfloat16 if tensor.dtype.name in FP8_DTYPES else np.dtype(tensor.dtype.numpy)
    return jax.ShapeDtypeStruct(tensor.shape, dtype, sharding=NamedSharding(mesh, spec))

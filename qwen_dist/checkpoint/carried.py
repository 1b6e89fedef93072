"""Tensors of a checkpoint that the text model does not use, such as a vision tower, for a checkpoint that is saved from it.

They are loaded like parameters, under their names on disk: sharded over the devices, and dequantised if they are quantised.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qwen_dist.checkpoint.fp8 import FP8_DTYPES
from qwen_dist.checkpoint.load import load
from qwen_dist.checkpoint.names import carried_names, name_alone
from qwen_dist.checkpoint.safetensors import TensorInfo
from qwen_dist.checkpoint.source import Checkpoint
from qwen_dist.sharding import ShardingContext


def load_carried(
    checkpoint: Checkpoint, sharding_ctx: ShardingContext, *, host_memory_budget: int | None = None
) -> dict[str, jax.Array]:
    """Return the tensors of a checkpoint that belong to no parameter, by their names on disk.

    Args:
      checkpoint: an opened checkpoint.
      sharding_ctx: the mesh.
      host_memory_budget: see `load`.

    Raises:
      CheckpointError: as `load`.
    """
    tensors = checkpoint.tensors
    carried = [tensors[name] for name in carried_names(tensors)]
    if not carried:
        return {}
    target = {one.name: _target(one, sharding_ctx) for one in carried}
    names = name_alone({one.name: one.shape for one in carried}, tensors)
    return load(checkpoint, target, names=names, host_memory_budget=host_memory_budget)


def _target(tensor: TensorInfo, sharding_ctx: ShardingContext) -> jax.ShapeDtypeStruct:
    """Return a target whose first dimension is sharded over all devices, where their number divides it."""
    mesh = sharding_ctx.mesh
    is_divisible = len(tensor.shape) > 0 and tensor.shape[0] % mesh.size == 0
    spec = PartitionSpec(mesh.axis_names) if is_divisible else PartitionSpec()
    dtype = jnp.bfloat16 if tensor.dtype.name in FP8_DTYPES else np.dtype(tensor.dtype.numpy)
    return jax.ShapeDtypeStruct(tensor.shape, dtype, sharding=NamedSharding(mesh, spec))

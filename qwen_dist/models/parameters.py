"""Parameters before they have values: how a module declares them, and how values are put in.

Every parameter has the checkpoint's name. Usually it is one array. If its `WeightFormat` says otherwise, each of its arrays
is loaded, sharded and saved under the parameter's name and a suffix.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from qwen_dist.errors import UsageError
from qwen_dist.ops.weight import ARRAY, TensorSpec, WeightFormat
from qwen_dist.sharding import ShardingContext

# Reasons that one error lists.
MAX_PROBLEMS = 12


class DiskShape(tuple[int, ...]):
    """The shape of a parameter on disk.

    Attributes:
      sections: rows of each section. A parameter with sections is [G, n, c, …]: the rows of its sections head by head, in
        blocks of c rows, c the greatest common divisor of the sections. Disk has the first section's rows of all G heads,
        then the second's, and so on. Empty: the bytes are in the same order.
    """

    sections: tuple[int, ...]

    def __new__(cls, shape: Iterable[int], sections: tuple[int, ...] = ()) -> DiskShape:
        self = super().__new__(cls, shape)
        self.sections = sections
        return self


def on_disk(array: Any, disk_shape: DiskShape) -> Any:
    """Return a whole parameter, of NumPy or of jax, in the shape and order in which a checkpoint stores it."""
    if not disk_shape.sections:
        return array.reshape(disk_shape)
    xp = jnp if isinstance(array, jax.Array) else np
    by_head = array.reshape(len(array), -1, *array.shape[3:])
    ends = np.cumsum(disk_shape.sections)[:-1]
    sections = [part.reshape(-1, *array.shape[3:]) for part in xp.split(by_head, ends, axis=1)]
    return xp.concatenate(sections).reshape(disk_shape)


def from_disk(array: Any, disk_shape: DiskShape, shape: tuple[int, ...]) -> Any:
    """Return a parameter of this shape from the array that a checkpoint stores: the inverse of `on_disk`."""
    if not disk_shape.sections:
        return array.reshape(shape)
    xp = jnp if isinstance(array, jax.Array) else np
    ends = shape[0] * np.cumsum(disk_shape.sections)[:-1]
    sections = [part.reshape(shape[0], -1, *shape[3:]) for part in xp.split(array, ends)]
    return xp.concatenate(sections, axis=1).reshape(shape)


def declare_param(
    value: jax.ShapeDtypeStruct,
    axes: tuple[str, ...],
    *,
    std: float | None,
    disk_shape: tuple[int, ...],
    sections: tuple[int, ...] = (),
    weight_format: WeightFormat = ARRAY,
) -> nnx.Param:
    """Declare a parameter without a value; a `ShardingContext` decides later where it lives.

    Args:
      value: shape and dtype.
      axes: the logical name of each dimension.
      std: the standard deviation of random values (see `random_parameters`); None: ones.
      disk_shape: the shape in which a checkpoint stores the same numbers.
      sections: see `DiskShape`.
      weight_format: the arrays that it consists of.
    """
    assert len(value.shape) == len(axes), f"{value.shape} and {axes}"
    return nnx.Param(
        value,
        out_sharding=axes,
        eager_sharding=False,
        std=std,
        disk_shape=DiskShape(disk_shape, sections),
        weight_format=weight_format,
    )


def disk_shapes(model: nnx.Module) -> dict[str, DiskShape]:
    """Return the shape in which a checkpoint stores each array: the same numbers, with heads flattened."""
    return {
        name: DiskShape(spec.shape) if suffix else metadata["disk_shape"]
        for name, suffix, spec, metadata in _tensors(model)
    }


def abstract_parameters(model: nnx.Module, sharding_ctx: ShardingContext) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape, dtype and sharding of every array of a model, by its checkpoint name; no memory is used.

    Raises:
      UsageError: lists every reason why an array does not fit the mesh.
    """
    leaves: dict[str, jax.ShapeDtypeStruct] = {}
    problems: dict[str, list[str]] = {}
    for name, _, spec, _ in _tensors(model):
        try:
            sharding = sharding_ctx.parameter(name, spec.shape, spec.axes)
            leaves[name] = jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)
        except UsageError as error:
            what, _, reasons = str(error).partition(": ")
            for reason in reasons.split("; "):
                problems.setdefault(reason, []).append(what.partition(" does not fit")[0])
    if problems:
        # Layers fail alike: one line for each reason, with the first parameter.
        shown = [
            f"{reason}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"
            for reason, names in list(problems.items())[:MAX_PROBLEMS]
        ]
        raise UsageError("the model does not fit the mesh:\n  - " + "\n  - ".join(shown))
    return leaves


def random_parameters(
    model: nnx.Module, sharding_ctx: ShardingContext, seed: int = 0, names: Container[str] | None = None
) -> dict[str, jax.Array]:
    """Return random arrays for a model, or those of some names; the same on every mesh.

    Each device makes its own shards. Raises UsageError as `abstract_parameters` does.
    """
    key = jax.random.key(seed)
    stds = {name: metadata["std"] for name, _, _, metadata in _tensors(model)}
    values = {}
    for name, leaf in abstract_parameters(model, sharding_ctx).items():
        if names is not None and name not in names:
            continue
        draw = _draw(leaf.shape, leaf.dtype, leaf.sharding, stds[name])
        values[name] = draw(jax.random.fold_in(key, zlib.crc32(name.encode())))
    return values


@functools.lru_cache
def _draw(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding, std: float | None) -> Callable[..., jax.Array]:
    """Return one program for all arrays that are alike."""

    def draw(key: jax.Array) -> jax.Array:
        return jnp.ones(shape, dtype) if std is None else (std * jax.random.normal(key, shape)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


def with_parameters(model: nnx.Module, parameters: Mapping[str, jax.Array]) -> Any:
    """Return the model with these arrays (by checkpoint name) in it; for use inside `jax.jit`."""
    graph, state = nnx.split(model)
    bound = [
        (path, variable.replace(_assemble(variable, _name(path), parameters)))
        for path, variable in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(bound))


def _assemble(variable: nnx.Variable, name: str, parameters: Mapping[str, jax.Array]) -> Any:
    specs = _specs(variable)
    return variable.get_metadata()["weight_format"].assemble({suffix: parameters[name + suffix] for suffix in specs})


def _tensors(model: nnx.Module) -> Iterator[tuple[str, str, TensorSpec, dict[str, Any]]]:
    """Yield every array's name, its suffix, its spec and the metadata of its parameter."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        for suffix, spec in _specs(variable).items():
            yield _name(path) + suffix, suffix, spec, variable.get_metadata()


def _specs(variable: nnx.Variable) -> Mapping[str, TensorSpec]:
    value, metadata = variable.get_value(), variable.get_metadata()
    return metadata["weight_format"].tensors(tuple(value.shape), value.dtype, metadata["out_sharding"])


def _name(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))

"""Where every array lives: logical axis names, the rule sets that map them to mesh axes, and the checks in between.

Parameters and activations name their dimensions (`embed`, `q_heads`, …). A rule set says which mesh axes each name is
split over; nothing else in the project mentions a mesh axis. Flax checks neither unknown names, nor one mesh axis used
twice, nor divisibility, so `ShardingContext` does, and all calls to flax's sharding interface are in this file.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_dist.errors import UsageError

Tree = TypeVar("Tree")

LOGICAL_AXES = frozenset(
    "batch length pages kv_length embed vocab q_heads kv_heads head_dim mlp experts lora_rank router top_k gate_up".split()
)


@dataclasses.dataclass(frozen=True)
class RuleSet:
    """Mesh axes of each logical axis, for parameters and for activations; a name without a rule is not split."""

    name: str
    parameters: Mapping[str, tuple[str, ...]]
    activations: Mapping[str, tuple[str, ...]]


_WEIGHTS = {
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "q_heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
}
_SPLIT_CHANNELS = {axis: ("tensor",) for axis in ("vocab", "q_heads", "kv_heads", "mlp")} | {"experts": ("expert",)}

# Tokens of one row are split over context; of keys and values, whose length is kv_length, every device has all.
_SPLIT_ROWS = {"length": ("context",)}

# The batch goes over expert in both: outside the experts that axis is one more of data, and to them tokens travel.
# Training: the batch goes over data and fsdp, and each layer's weights are gathered over fsdp when it is their turn.
TRAIN = RuleSet("train", _WEIGHTS, {"batch": ("data", "fsdp", "expert"), **_SPLIT_ROWS, **_SPLIT_CHANNELS})
# Inference: the weights stay where they are. Activations are small, so they are what travels over fsdp.
INFERENCE = RuleSet(
    "inference", _WEIGHTS, {"batch": ("data", "expert"), "embed": ("fsdp",), **_SPLIT_ROWS, **_SPLIT_CHANNELS}
)
RULE_SETS = {rules.name: rules for rules in (TRAIN, INFERENCE)}


@dataclasses.dataclass(frozen=True)
class ShardingContext:
    """Logical names to shardings on one mesh under one rule set."""

    mesh: Mesh
    rules: RuleSet

    def parameter(self, what: str, shape: Sequence[int], axes: Sequence[str]) -> NamedSharding:
        """The sharding of a parameter. Raises UsageError when a name, a mesh axis or a size does not fit."""
        return self._resolve(what, shape, axes, self.rules.parameters)

    def activation(self, what: str, shape: Sequence[int], axes: Sequence[str]) -> NamedSharding:
        """The sharding of an activation or a cache. Raises UsageError as `parameter` does."""
        return self._resolve(what, shape, axes, self.rules.activations)

    def num_parts(self, axis: str) -> int:
        """Into how many parts the rules split this dimension of an activation."""
        return math.prod(self.mesh.shape[name] for name in self.rules.activations.get(axis, ()))

    def batch_multiple(self) -> int:
        """What the number of rows in a batch must be a multiple of."""
        return self.num_parts("batch")

    def replicated(self) -> NamedSharding:
        """Every device has the whole array."""
        return NamedSharding(self.mesh, PartitionSpec())

    def describe(self) -> str:
        """The mesh, and what the rules split over each of its axes that spans several devices."""
        lines = [f"mesh {_sizes(self.mesh)} of {self.mesh.size} devices, rules for {self.rules.name}:"]
        for axis, size in self.mesh.shape.items():
            if size > 1:
                weights, activations = (
                    ", ".join(name for name, axes in table.items() if axis in axes) or "nothing"
                    for table in (self.rules.parameters, self.rules.activations)
                )
                lines.append(f"  {axis} {size}: weights by {weights}; activations by {activations}")
        return "\n".join(lines)

    def replicate(self, tree: Any) -> Any:
        """The tree's host arrays, whole on every device; every process must give the same values.

        `jax.device_put` would have all processes exchange the values to compare them.
        """
        sharding = self.replicated()
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)

    def _resolve(
        self, what: str, shape: Sequence[int], axes: Sequence[str], table: Mapping[str, tuple[str, ...]]
    ) -> NamedSharding:
        assert len(shape) == len(axes), f"{what}: {len(shape)} dimensions and {len(axes)} names"
        problems = []
        spec: list[tuple[str, ...] | None] = []
        used: dict[str, str] = {}
        for size, axis in zip(shape, axes, strict=True):
            if axis not in LOGICAL_AXES:
                problems.append(f"{axis!r} is not a logical axis; there are {', '.join(sorted(LOGICAL_AXES))}")
                continue
            mesh_axes = table.get(axis, ())
            if unknown := [name for name in mesh_axes if name not in self.mesh.shape]:
                problems.append(f"the rules split {axis} over {', '.join(unknown)}, which the mesh does not have")
                continue
            mesh_axes = tuple(name for name in mesh_axes if self.mesh.shape[name] > 1)
            for name in mesh_axes:
                if name in used:
                    problems.append(f"mesh axis {name} would split both {used[name]} and {axis}")
                used[name] = axis
            parts = math.prod(self.mesh.shape[name] for name in mesh_axes)
            if axis == "length" and size == 1:
                mesh_axes = ()  # a decoding step
            elif size % parts:
                if axis == "kv_heads" and parts % size == 0:
                    mesh_axes = ()  # fewer key/value heads than devices: each device has them all
                else:
                    problems.append(_does_not_divide(axis, size, mesh_axes, parts))
            spec.append(mesh_axes or None)
        if problems:
            raise UsageError(f"{what} {tuple(shape)} does not fit mesh {_sizes(self.mesh)}: {'; '.join(problems)}")
        return NamedSharding(self.mesh, PartitionSpec(*spec))


def _does_not_divide(axis: str, size: int, mesh_axes: tuple[str, ...], parts: int) -> str:
    legal = [n for n in range(1, size + 1) if size % n == 0 and n <= 4096]
    also = f", or a multiple of {size}" if axis == "kv_heads" else ""
    return (
        f"{axis} is {size}, which the {parts} parts of {'×'.join(mesh_axes)} do not divide "
        f"(legal: {', '.join(map(str, legal))}{also})"
    )


def _sizes(mesh: Mesh) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "data=1"


_active: contextvars.ContextVar[ShardingContext | None] = contextvars.ContextVar("sharding_ctx", default=None)


@contextlib.contextmanager
def use_sharding(sharding_ctx: ShardingContext) -> Iterator[None]:
    """Make `constrain` place activations by `sharding_ctx` in functions traced in this block."""
    token = _active.set(sharding_ctx)
    try:
        yield
    finally:
        _active.reset(token)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Lay an activation out as the active rules say of its dimensions' names; without active rules, as it comes."""
    sharding_ctx = _active.get()
    if sharding_ctx is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding_ctx.activation("activation", x.shape, axes))


def all_gather_weight(weight: jax.Array, *axes: str) -> jax.Array:
    """Lay a weight out as activations are cut, for use; its gradient is laid out as the parameter is.

    What training spreads over fsdp is gathered here, and the gradient, a sum over devices, is scattered among them: with
    `constrain` alone every device would be left with all of it.
    """
    sharding_ctx = _active.get()
    if sharding_ctx is None:
        return weight
    used = sharding_ctx.activation("weight", weight.shape, axes)
    kept = sharding_ctx.parameter("weight", weight.shape, axes)

    @jax.custom_vjp
    def lay_out(weight: jax.Array) -> jax.Array:
        # Said of both sides: else the compiler gathers where the weight comes from, and so in float32, once, and for good.
        return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(weight, kept), used)

    lay_out.defvjp(
        lambda weight: (lay_out(weight), None),
        lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, kept),),
    )
    return lay_out(weight)


def prefetch_barrier(x: jax.Array, weights: Tree) -> Tree:
    """The weights, of which none is gathered before `x` is there.

    As nothing else says when, the compiler would gather the weights of many layers at once, ahead of all of them. Their
    gradients are not held up.
    """
    sharding_ctx = _active.get()
    if sharding_ctx is None or sharding_ctx.mesh.shape["fsdp"] == 1:
        return weights

    @jax.custom_vjp
    def wait(weights: Tree, x: jax.Array) -> Tree:
        return jax.lax.optimization_barrier((weights, x))[0]

    wait.defvjp(lambda weights, x: (wait(weights, x), None), lambda _, gradients: (gradients, None))
    return wait(weights, jax.lax.stop_gradient(x))


def num_parts(axis: str, size: int) -> int:
    """Into how many parts the active rules split a dimension of this size of an activation."""
    sharding_ctx = _active.get()
    return (
        1
        if sharding_ctx is None
        else size // sharding_ctx.activation("activation", (size,), (axis,)).shard_shape((size,))[0]
    )


def platform() -> str:
    """The kind of devices that the active rules place arrays on; without rules, jax's own choice."""
    sharding_ctx = _active.get()
    return jax.default_backend() if sharding_ctx is None else sharding_ctx.mesh.devices.flat[0].platform


def infers_on_cpus() -> bool:
    """Whether the active rules are those of inference, on CPUs."""
    sharding_ctx = _active.get()
    return sharding_ctx is not None and sharding_ctx.rules is INFERENCE and platform() == "cpu"


def infers_on_one_cpu() -> bool:
    """The same, on a single one: among several the compiler divides arrays, and it cannot divide what it does not know."""
    sharding_ctx = _active.get()
    return infers_on_cpus() and sharding_ctx is not None and sharding_ctx.mesh.size == 1


class LocalShard:
    """How one device's parts of the arrays in `shard_map_op` belong to those of the others.

    Axes are logical ones, as activations are cut. Without rules, or on one device, everything is one part.
    """

    def __init__(self, sharding_ctx: ShardingContext | None = None):
        self._sharding_ctx = sharding_ctx

    def count(self, axis: str) -> int:
        """How many parts a dimension is cut into."""
        return 1 if self._sharding_ctx is None else self._sharding_ctx.num_parts(axis)

    def first(self, axis: str, size: int) -> jax.Array | int:
        """Where this device's part of a dimension begins, if each part has so many elements."""
        return jax.lax.axis_index(self._axes(axis)) * size if self.count(axis) > 1 else 0

    def sum(self, x: jax.Array, axis: str) -> jax.Array:
        """The sum of what each part of a dimension gave."""
        return jax.lax.psum(x, self._axes(axis)) if self.count(axis) > 1 else x

    def exchange(self, x: jax.Array, axis: str) -> jax.Array:
        """Send x[i] to the i-th part of a dimension and return what the i-th sent here at i: x is [parts, ...]."""
        return jax.lax.all_to_all(x, self._axes(axis), 0, 0, tiled=True) if self.count(axis) > 1 else x

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest x of all devices."""
        return x if self._sharding_ctx is None else jax.lax.pmax(x, self._sharding_ctx.mesh.axis_names)

    def _axes(self, axis: str) -> tuple[str, ...]:
        return () if self._sharding_ctx is None else self._sharding_ctx.rules.activations.get(axis, ())


def shard_map_op(
    body: Callable[..., Any], arrays: Sequence[jax.Array], axes: Sequence[Sequence[str]], results: Sequence[Sequence[str]]
) -> Any:
    """Call `body(parts, *arrays)` on every device with its parts of the arrays, and put together what it returns there.

    For what the compiler cannot divide by itself. `axes` names the dimensions of each array and `results` those of each of
    body's results, of which all have occurred in the arrays; all are cut as activations are.
    """
    sharding_ctx = _active.get()
    if sharding_ctx is None or sharding_ctx.mesh.size == 1:
        return body(LocalShard(), *arrays)
    sizes = {axis: size for x, names in zip(arrays, axes, strict=True) for axis, size in zip(names, x.shape, strict=True)}

    def specs(of: Sequence[Sequence[str]]) -> tuple[PartitionSpec, ...]:
        return tuple(sharding_ctx.activation("array", [sizes[axis] for axis in names], names).spec for names in of)

    run = functools.partial(body, LocalShard(sharding_ctx))
    return jax.shard_map(run, mesh=sharding_ctx.mesh, in_specs=specs(axes), out_specs=specs(results), check_vma=False)(
        *arrays
    )


def declare_param(
    value: jax.ShapeDtypeStruct, axes: tuple[str, ...], *, std: float | None, disk_shape: tuple[int, ...]
) -> nnx.Param:
    """A parameter whose dimensions have these logical names; where it lives is decided later, by a `ShardingContext`.

    `std` says how random values are drawn (see `random_parameters`), `disk_shape` how the checkpoint stores the bytes.
    """
    assert len(value.shape) == len(axes), f"{value.shape} and {axes}"
    return nnx.Param(value, out_sharding=axes, eager_sharding=False, std=std, disk_shape=disk_shape)


def disk_shapes(model: nnx.Module) -> dict[str, tuple[int, ...]]:
    """The shape in which a checkpoint stores each parameter: the same bytes, with heads flattened."""
    return {name: parameter.get_metadata()["disk_shape"] for name, parameter in _parameters(model).items()}


def abstract_parameters(model: nnx.Module, sharding_ctx: ShardingContext) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, dtype and sharding of every parameter of a model, by its checkpoint name; no memory is used.

    Raises UsageError listing every parameter that does not fit the mesh.
    """
    leaves, problems = {}, []
    for name, parameter in _parameters(model).items():
        value = parameter.get_value()
        try:
            sharding = sharding_ctx.parameter(name, value.shape, parameter.get_metadata()["out_sharding"])
            leaves[name] = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
        except UsageError as error:
            problems.append(str(error))
    if problems:
        shown = problems[:12]  # 64 layers that fail alike need not be read 64 times
        if len(problems) > len(shown):
            shown.append(f"… and {len(problems) - len(shown)} more parameters")
        raise UsageError("the model does not fit the mesh:\n  - " + "\n  - ".join(shown))
    return leaves


def random_parameters(
    model: nnx.Module, sharding_ctx: ShardingContext, seed: int = 0, names: Container[str] | None = None
) -> dict[str, jax.Array]:
    """Random parameters for a model, or those of some names, made by each device for itself; the same on every mesh.

    Raises UsageError as `abstract_parameters` does.
    """
    key = jax.random.key(seed)
    declared, values = _parameters(model), {}
    for name, leaf in abstract_parameters(model, sharding_ctx).items():
        if names is not None and name not in names:
            continue
        std = declared[name].get_metadata()["std"]
        draw = _draw(leaf.shape, leaf.dtype, leaf.sharding, std)
        values[name] = draw(jax.random.fold_in(key, zlib.crc32(name.encode())))
    return values


@functools.lru_cache
def _draw(shape: tuple[int, ...], dtype: Any, sharding: NamedSharding, std: float | None) -> Callable[..., jax.Array]:
    """One program for all parameters that are alike."""

    def draw(key: jax.Array) -> jax.Array:
        return jnp.ones(shape, dtype) if std is None else (std * jax.random.normal(key, shape)).astype(dtype)

    return jax.jit(draw, out_shardings=sharding)


def with_parameters(model: nnx.Module, parameters: Mapping[str, jax.Array]) -> Any:
    """The model with these parameters (by checkpoint name) in it; for use inside `jax.jit`."""
    graph, state = nnx.split(model)
    bound = [(path, variable.replace(parameters[_name(path)])) for path, variable in nnx.to_flat_state(state)]
    return nnx.merge(graph, nnx.from_flat_state(bound))


def _parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    return {_name(path): variable for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def _name(path: Iterable[Any]) -> str:
    return ".".join(map(str, path))

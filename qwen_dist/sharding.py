"""Where every array lives: logical axis names, the rule sets that map them to mesh axes, and the checks in between.

Parameters and activations name their dimensions (`embed`, `q_heads`, …). A rule set says which mesh axes each name is
sharded over; nothing else in the project mentions a mesh axis. Flax checks neither unknown names, nor one mesh axis used
twice, nor divisibility, so `ShardingContext` does.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qwen_dist.errors import UsageError

Tree = TypeVar("Tree")
Axes = tuple[str, ...]

LOGICAL_AXES = frozenset(
    "batch length pages slots kv_length embed vocab q_heads kv_heads head_dim mlp experts lora_rank router top_k "
    "gate_up key_heads value_heads head_blocks head_channels taps query_gate scan_length scan_heads group".split()
)


@dataclasses.dataclass(frozen=True)
class RuleSet:
    """Mesh axes of each logical axis, for parameters and for activations; an axis without a rule is not sharded."""

    phase: Literal["train", "inference"]
    parameters: Mapping[str, tuple[str, ...]]
    activations: Mapping[str, tuple[str, ...]]


_WEIGHTS = {
    "embed": ("fsdp",),
    "vocab": ("tensor",),
    "q_heads": ("tensor",),
    "kv_heads": ("tensor",),
    "key_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
}
_SPLIT_CHANNELS = {axis: ("tensor",) for axis in ("vocab", "q_heads", "kv_heads", "key_heads", "mlp")} | {
    "experts": ("expert",)
}

# Tokens of one row are split over context; of keys and values, whose length is kv_length, every device has all. A
# recurrence over the tokens (scan_length) has all of them on each device, and is split by its heads instead.
_SPLIT_ROWS = {"length": ("context",), "scan_heads": ("tensor", "context")}

# The batch goes over expert in both: outside the experts that axis is one more of data, and to them tokens travel.
# Training: the batch goes over data and fsdp, and each layer's weights are gathered over fsdp when it is their turn.
TRAIN = RuleSet("train", _WEIGHTS, {"batch": ("data", "fsdp", "expert"), **_SPLIT_ROWS, **_SPLIT_CHANNELS})
# Inference: the weights stay where they are. Activations are small, so they are what travels over fsdp.
INFERENCE = RuleSet(
    "inference", _WEIGHTS, {"batch": ("data", "expert"), "embed": ("fsdp",), **_SPLIT_ROWS, **_SPLIT_CHANNELS}
)
RULE_SETS = {rules.phase: rules for rules in (TRAIN, INFERENCE)}


@dataclasses.dataclass(frozen=True)
class ShardingContext:
    """A mesh and a rule set: the sharding of every array by the logical names of its dimensions."""

    mesh: Mesh
    rules: RuleSet

    def parameter(self, what: str, shape: Sequence[int], axes: Sequence[str]) -> NamedSharding:
        """Return the sharding of a parameter. Raises UsageError when a name, a mesh axis or a size does not fit."""
        return self._named_sharding(what, shape, axes, self.rules.parameters)

    def activation(self, what: str, shape: Sequence[int], axes: Sequence[str]) -> NamedSharding:
        """Return the sharding of an activation or a layer state. Raises UsageError as `parameter` does."""
        return self._named_sharding(what, shape, axes, self.rules.activations)

    def num_shards(self, axis: str) -> int:
        """Return into how many shards the rules cut this dimension of an activation."""
        return math.prod(self.mesh.shape[name] for name in self.rules.activations.get(axis, ()))

    def batch_multiple(self) -> int:
        """Return what the number of rows in a batch must be a multiple of: the number of data-parallel shards."""
        return self.num_shards("batch")

    def replicated_note(self, vocab_size: int) -> str:
        """Return a sentence if the vocabulary is not sharded because of its size, otherwise nothing."""
        num_shards = self.num_shards("vocab")
        if vocab_size % num_shards == 0:
            return ""
        return (
            f"the {num_shards} shards of {'×'.join(self.rules.activations['vocab'])} do not divide the vocabulary of "
            f"{vocab_size}, so each of these devices holds the embedding and output weights of the whole vocabulary"
        )

    def replicated(self) -> NamedSharding:
        """Return the sharding with which every device has the whole array."""
        return NamedSharding(self.mesh, PartitionSpec())

    def describe(self) -> str:
        """Return the mesh, and what the rules shard over each of its axes that spans several devices, as text."""
        if self.mesh.size == 1:
            return f"one device, rules for {self.rules.phase}"
        lines = [f"mesh {_sizes(self.mesh)} of {self.mesh.size} devices, rules for {self.rules.phase}:"]
        for axis, size in self.mesh.shape.items():
            if size > 1:
                weights, activations = (
                    ", ".join(name for name, axes in table.items() if axis in axes) or "nothing"
                    for table in (self.rules.parameters, self.rules.activations)
                )
                lines.append(f"  {axis} {size}: weights by {weights}; activations by {activations}")
        return "\n".join(lines)

    def replicate(self, tree: Any) -> Any:
        """Put the tree's host arrays on every device, whole; every process must give the same values.

        `jax.device_put` would make all processes exchange the values to compare them.
        """
        sharding = self.replicated()
        return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)

    def _named_sharding(
        self, what: str, shape: Sequence[int], axes: Sequence[str], table: Mapping[str, tuple[str, ...]]
    ) -> NamedSharding:
        assert len(shape) == len(axes), f"{what}: {len(shape)} dimensions and {len(axes)} names"
        problems = []
        spec: list[tuple[str, ...] | None] = []
        used: dict[str, str] = {}
        for size, axis, inner in zip(shape, axes, [*axes[1:], ""], strict=True):
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
            num_shards = math.prod(self.mesh.shape[name] for name in mesh_axes)
            if axis == "length" and size == 1:
                mesh_axes = ()  # a decode step
            elif size % num_shards:
                if axis == "scan_heads" and size % self.mesh.shape.get("tensor", 1) == 0:
                    mesh_axes = tuple(name for name in mesh_axes if name == "tensor")
                elif axis == "vocab" or (axis == "kv_heads" and num_shards % size == 0):
                    mesh_axes = ()  # fewer key/value heads than devices, or an uneven vocabulary: each device has it whole
                else:
                    problems.append(_does_not_divide(axis, size, mesh_axes, num_shards, is_grouped=inner == "group"))
            spec.append(mesh_axes or None)
        if problems:
            raise UsageError(f"{what} {tuple(shape)} does not fit mesh {_sizes(self.mesh)}: {'; '.join(problems)}")
        return NamedSharding(self.mesh, PartitionSpec(*spec))


def _does_not_divide(axis: str, size: int, mesh_axes: tuple[str, ...], num_shards: int, *, is_grouped: bool) -> str:
    legal = [n for n in range(1, size + 1) if size % n == 0 and n <= 4096]
    also = f", or a multiple of {size}" if axis == "kv_heads" else ""
    what = f"{axis} has {size} groups of quantised weights" if is_grouped else f"{axis} is {size}"
    return (
        f"{what}, which the {num_shards} shards of {'×'.join(mesh_axes)} do not divide "
        f"(legal: {', '.join(map(str, legal))}{also})"
    )


def _sizes(mesh: Mesh) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "data=1"


_active: contextvars.ContextVar[ShardingContext | None] = contextvars.ContextVar("sharding_ctx", default=None)


def active_context() -> ShardingContext | None:
    """Return the context of the enclosing `use_sharding`."""
    return _active.get()


@contextlib.contextmanager
def use_sharding(sharding_ctx: ShardingContext) -> Iterator[None]:
    """Place activations by `sharding_ctx` in functions traced in this block; both passes of training belong in it."""
    token = _active.set(sharding_ctx)
    try:
        yield
    finally:
        _active.reset(token)


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Shard an activation as the active rules say for its dimensions' names; without active rules, leave it as it is."""
    sharding_ctx = active_context()
    if sharding_ctx is None:
        return x
    return jax.lax.with_sharding_constraint(x, sharding_ctx.activation("activation", x.shape, axes))


def all_gather_weight(weight: Any, *axes: str) -> Any:
    """Shard a weight as activations are, for use; its gradient is sharded as the parameter is.

    Training gathers here what it shards over fsdp, and reduce-scatters the gradient; with `constrain` alone every device
    would keep the whole gradient. Of a quantised weight the packed arrays are gathered; it has no gradient.
    """
    context = active_context()
    if context is None:
        return weight
    if not isinstance(weight, jax.Array):
        return jax.tree.map(_gather_packed, weight, weight.with_axes(axes))
    used = context.activation("weight", weight.shape, axes)
    kept = context.parameter("weight", weight.shape, axes)

    @jax.custom_vjp
    def lay_out(weight: jax.Array) -> jax.Array:
        # Constrain both sides of the gather; otherwise XLA moves the gather before a cast and gathers float32. Without the
        # barrier Shardy takes the gathered weight wherever the weight is used later: it is kept for the backward pass.
        weight = jax.lax.optimization_barrier(weight)
        return jax.lax.with_sharding_constraint(jax.lax.with_sharding_constraint(weight, kept), used)

    lay_out.defvjp(
        lambda weight: (lay_out(weight), None),
        lambda _, gradient: (jax.lax.with_sharding_constraint(gradient, kept),),
    )
    return lay_out(weight)


def _gather_packed(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    context = active_context()
    assert context is not None
    used = context.activation("weight", x.shape, axes)
    return x if used == context.parameter("weight", x.shape, axes) else jax.lax.with_sharding_constraint(x, used)


def prefetch_barrier(x: jax.Array, weights: Tree) -> Tree:
    """Return the weights, none of which is gathered before `x` is computed.

    Otherwise XLA may gather the weights of many layers at once, ahead of all of them. Gradients are not delayed.
    """
    context = active_context()
    if context is None or context.mesh.shape.get("fsdp", 1) == 1:
        return weights

    @jax.custom_vjp
    def wait(weights: Tree, x: jax.Array) -> Tree:
        return jax.lax.optimization_barrier((weights, x))[0]

    wait.defvjp(lambda weights, x: (wait(weights, x), None), lambda _, gradients: (gradients, None))
    return wait(weights, jax.lax.stop_gradient(x))


def active_num_shards(axis: str, size: int) -> int:
    """Return into how many shards the active rules cut a dimension of this size of an activation."""
    context = active_context()
    return 1 if context is None else size // context.activation("activation", (size,), (axis,)).shard_shape((size,))[0]


class LocalShard:
    """This device's place among the shards of the arrays in `shard_map_op`, and its collectives.

    Axes are logical ones, as activations are sharded. Without rules, or on one device, everything is one shard, and so are
    the axes `whole`, which the rules would cut and the size does not allow.
    """

    def __init__(self, sharding_ctx: ShardingContext | None = None, whole: frozenset[str] = frozenset()):
        self._sharding_ctx, self._whole = sharding_ctx, whole

    def num_shards(self, axis: str) -> int:
        """Return into how many shards a dimension is cut."""
        return 1 if self._sharding_ctx is None or axis in self._whole else self._sharding_ctx.num_shards(axis)

    def offset(self, axis: str, size: int) -> jax.Array | int:
        """Return where this device's shard of a dimension begins, if each shard has `size` elements."""
        return jax.lax.axis_index(self._axes(axis)) * size if self.num_shards(axis) > 1 else 0

    def psum(self, x: jax.Array, axis: str) -> jax.Array:
        """Return the sum of x over the shards of a dimension."""
        return jax.lax.psum(x, self._axes(axis)) if self.num_shards(axis) > 1 else x

    def all_to_all(self, x: jax.Array, axis: str) -> jax.Array:
        """Send x[i] to shard i of a dimension, and return at i what shard i sent here; x is [shards, ...]."""
        return jax.lax.all_to_all(x, self._axes(axis), 0, 0, tiled=True) if self.num_shards(axis) > 1 else x

    def pmax(self, x: jax.Array) -> jax.Array:
        """Return the largest x of all devices."""
        return x if self._sharding_ctx is None else jax.lax.pmax(x, self._sharding_ctx.mesh.axis_names)

    def _axes(self, axis: str) -> tuple[str, ...]:
        return () if self._sharding_ctx is None else self._sharding_ctx.rules.activations.get(axis, ())


def shard_map_op(body: Callable[..., Any], arguments: Sequence[Any], axes: Sequence[Any], results: Sequence[Axes]) -> Any:
    """Call `body(shard, *arguments)` on every device with its shards of the arguments, and assemble what it returns.

    For operations that XLA cannot partition.

    Args:
      body: takes a `LocalShard` and the local arguments, and returns one array for each of `results`.
      arguments: pytrees of arrays.
      axes: for each argument, the same pytree with the logical names of the dimensions in place of arrays.
      results: the logical names of the dimensions of each result; all of them occur in the arguments.
    """
    context = active_context()
    if context is None or context.mesh.size == 1:
        return body(LocalShard(), *arguments)
    sizes: dict[str, int] = {}

    def spec(x: jax.Array, names: Axes) -> PartitionSpec:
        for name, size in zip(names, x.shape, strict=True):
            sizes.setdefault(name, size)  # of a quantised weight a dimension may be counted in groups
        return context.activation("array", x.shape, names).spec

    in_specs = jax.tree.map(spec, tuple(arguments), tuple(axes))
    out_specs = tuple(context.activation("array", [sizes[axis] for axis in names], names).spec for names in results)
    whole = frozenset({"vocab"} if sizes.get("vocab", 0) % context.num_shards("vocab") else ())
    run = functools.partial(body, LocalShard(context, whole))
    return jax.shard_map(run, mesh=context.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)

"""What a layer costs, as it says itself: the planner and the utilization in training ask, and know no kind of layer.

A product with the weight of a `Linear` takes 2 flops per weight and token, which nobody has to say. Everything else is in
the `cost(step)` of a mixer or an MLP, which adds up what the functions `…_cost` beside its ops say.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
from jax.typing import DTypeLike

from qwen_dist.ops.dispatch import Backend, Op
from qwen_dist.sharding import ShardingContext, use_sharding

F32_BYTES = 4  # what is summed over many elements is float32


@dataclasses.dataclass(frozen=True)
class Step:
    """One step of a program for one layer.

    Attributes:
      phase: which rules and implementations apply.
      num_rows: of all devices together.
      num_tokens: of each row.
      num_outputs: the tokens of a row whose outputs are wanted: all, except in the last layer of inference.
      num_keys: the keys that attention multiplies with a query, on average.
      num_pages: the pages that a row reads; 0 in training.
      dtype: of weights and activations.
      trains_weights: whether training changes the weights themselves, not only adapters.
      platform: as jax names it.
      sharding_ctx: None: everything is on one device.
    """

    phase: Literal["train", "inference"]
    num_rows: int
    num_tokens: int
    num_outputs: int
    num_keys: float
    num_pages: int
    dtype: DTypeLike
    trains_weights: bool = False
    platform: str = "cpu"
    sharding_ctx: ShardingContext | None = None

    @property
    def itemsize(self) -> int:
        return jax.numpy.dtype(self.dtype).itemsize

    def size(self, **dims: int) -> int:
        """Return the number of elements on one device of an activation, by the logical names of its dimensions."""
        shape = tuple(dims.values())
        if self.sharding_ctx is None:
            return math.prod(shape)
        return math.prod(self.sharding_ctx.activation("activation", shape, tuple(dims)).shard_shape(shape))

    def tokens(self, **dims: int) -> int:
        """Return the number of elements on one device of an activation [batch, length, …]."""
        return self.size(batch=self.num_rows, length=self.num_tokens, **dims)

    def outputs(self, **dims: int) -> int:
        """As `tokens`, of the tokens whose outputs are wanted."""
        return self.size(batch=self.num_rows, length=self.num_outputs, **dims)

    def num_shards(self, axis: str) -> int:
        """Return into how many shards a dimension of an activation is cut."""
        return 1 if self.sharding_ctx is None else self.sharding_ctx.num_shards(axis)

    def remote_fraction(self, axis: str) -> float:
        """Return the fraction of a result that a device receives from the other shards of a dimension."""
        return 1 - 1 / self.num_shards(axis)

    def implementation(self, op: Op, *operands: Any, **options: Any) -> str:
        """Return the name of the implementation of an op that runs, by the dispatch table; operands may be shapes."""
        num_devices = 1 if self.sharding_ctx is None else self.sharding_ctx.mesh.size
        backend = Backend.of_platform(self.platform, num_devices, self.phase)
        with use_sharding(self.sharding_ctx) if self.sharding_ctx else contextlib.nullcontext():
            return op.select(backend, *operands, **options).name


@dataclasses.dataclass(frozen=True)
class Passes:
    """A number for the forward pass and one for the backward pass.

    Attributes:
      not_recomputed: the part of `forward` that no rematerialisation of a layer computes again.
      recompute: the part of `backward` in which an op itself computes its forward pass again.
    """

    forward: float = 0.0
    backward: float = 0.0
    not_recomputed: float = 0.0
    recompute: float = 0.0

    def __add__(self, other: Passes) -> Passes:
        return Passes(
            self.forward + other.forward,
            self.backward + other.backward,
            self.not_recomputed + other.not_recomputed,
            self.recompute + other.recompute,
        )


NOTHING = Passes()


@dataclasses.dataclass(frozen=True)
class LayerCost:
    """What a mixer or an MLP takes on one device for one step, besides the products with the weights of its `Linear`s.

    Attributes:
      flops: floating-point operations.
      uncounted_flops: of these, what a compiler's report leaves out: it counts the body of a loop once, and nothing in some
        kernels. Negative for what the report counts although nothing has to compute it.
      uncounted_state: the share of the layer's state that is read in iterations which the report leaves out.
      workspace_bytes: the arrays that inference holds at once.
      saved_bytes: what the forward pass saves for the backward pass, if nothing is recomputed.
      gradient_copies: how often the backward pass holds what is saved, gradients included.
      collectives: bytes received from other devices, by kind of collective.
      unread_bytes: of weights that no token of the step is expected to use.
      final_linears: the linear layers whose output the layer returns as it is, if the block only adds it to the residual
        stream: no gradient needs it, so it is not recomputed.
    """

    flops: Passes = NOTHING
    uncounted_flops: Passes = NOTHING
    uncounted_state: float = 0.0
    workspace_bytes: int = 0
    saved_bytes: int = 0
    gradient_copies: int = 2
    collectives: Mapping[str, Passes] = dataclasses.field(default_factory=dict)
    unread_bytes: int = 0
    final_linears: tuple[str, ...] = ()

    def with_more(self, num_bytes: int) -> LayerCost:
        """Return the cost with more bytes in the workspace and among what is saved."""
        return dataclasses.replace(
            self,
            workspace_bytes=self.workspace_bytes + num_bytes,
            saved_bytes=self.saved_bytes + num_bytes,
        )


def uncounted_share(num_iterations: float) -> float:
    """Return the share of a loop's work that a compiler's report leaves out: all iterations but one."""
    return 1 - 1 / max(num_iterations, 1)

"""The jitted functions of training: one step with gradient accumulation, and one evaluation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.models.moe import load_balancing_loss
from qwen_dist.models.parameters import with_parameters
from qwen_dist.models.transformer import Remat, Transformer
from qwen_dist.ops.malloc import drain_tcache
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.ops.weight import to_array
from qwen_dist.runtime.settings import compiler_options
from qwen_dist.sharding import ShardingContext, use_sharding
from qwen_dist.train.batches import TrainBatch
from qwen_dist.train.loss import next_token_loss
from qwen_dist.train.optim import Schedule, clip_grad_norm

# What the forward pass saves for the backward pass, by the name in the configuration of what is recomputed.
REMAT_POLICIES = {
    "none": None,
    "selective": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

Parameters = dict[str, jax.Array]


class TrainState(NamedTuple):
    """Everything that a step changes. Trees of shapes or shardings have the same structure.

    Attributes:
      parameters: the trained parameters by name.
      optimizer: the state of the optimizer.
      step: the number of steps done, an int32 scalar.
    """

    parameters: dict[str, Any]
    optimizer: Any
    step: Any


class StepResult(NamedTuple):
    """Scalars of one step: the mean loss of the target tokens, the gradient norm before clipping, the learning rate."""

    loss: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array


class Trainer:
    """The compiled programs that train one model on one mesh."""

    def __init__(
        self,
        model: LoadedModel,
        trained: Collection[str],
        optimizer: optax.GradientTransformation,
        schedule: Schedule,
        *,
        dtype: DTypeLike,
        remat: str = "none",
        clip_norm: float = 0.0,
    ):
        """Take over the trained parameters of the model: `init_state` deletes their arrays.

        Args:
          model: its parameters in the dtypes in which they are stored; abstract ones are enough to `lower` a step.
          trained: names of the parameters that change.
          optimizer: from `optim.make_optimizer`.
          schedule: from `optim.make_schedule`.
          dtype: of the computation; trained parameters are rounded to it before use.
          remat: a key of `REMAT_POLICIES`.
          clip_norm: see `optim.clip_grad_norm`.
        """
        self._sharding_ctx, self._module = model.sharding_ctx, model.module
        self._frozen = {name: value for name, value in model.parameters.items() if name not in trained}
        self._initial = {name: value for name, value in model.parameters.items() if name in trained}
        self._optimizer, self._schedule = optimizer, schedule
        self.dtype, self._remat, self._clip_norm = dtype, REMAT_POLICIES[remat], clip_norm
        self._shardings = self._state_shardings()
        mesh = self._sharding_ctx.mesh
        self._step = jax.jit(
            self._update,
            donate_argnums=0,
            out_shardings=(self._shardings, self._sharding_ctx.replicated()),
            compiler_options=compiler_options(mesh.devices.flat[0].platform, mesh.size, "train"),
        )
        self._evaluate = jax.jit(self._sum_losses, out_shardings=self._sharding_ctx.replicated())

    def init_state(self) -> TrainState:
        """Return the state before the first step. Call it once: it deletes the model's own arrays."""
        optimizer = jax.jit(self._optimizer.init, out_shardings=self._shardings.optimizer)(self._initial)
        parameters = {name: _jax_owned(value) for name, value in self._initial.items()}
        return TrainState(parameters, optimizer, self._sharding_ctx.replicate(np.zeros((), np.int32)))

    def abstract_state(self) -> TrainState:
        """Return shapes, dtypes and shardings of the state."""
        shapes = jax.eval_shape(self._optimizer.init, self._initial), jax.ShapeDtypeStruct((), np.int32)
        state = TrainState({name: jax.typeof(value) for name, value in self._initial.items()}, *shapes)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, self._shardings
        )

    def step(self, state: TrainState, microbatches: Iterable[TrainBatch]) -> tuple[TrainState, StepResult]:
        """Do one step with the summed gradient of all microbatches, which have the same shape. Donates `state`."""
        drain_tcache()
        return self._step(state, self._frozen, tuple(self._to_devices(microbatch) for microbatch in microbatches))

    def evaluate(self, state: TrainState, batch: TrainBatch) -> tuple[jax.Array, jax.Array]:
        """Return the sum of the losses of the target tokens, and their number."""
        return self._evaluate(state.parameters, self._frozen, self._to_devices(batch))

    def parameters(self, state: TrainState) -> Parameters:
        """Return all parameters of the model, trained and frozen."""
        return self._frozen | state.parameters

    def lower(self, microbatch: TrainBatch, count: int) -> jax.stages.Lowered:
        """Return the lowered program of a step with `count` microbatches of this shape."""
        leaf = jax.ShapeDtypeStruct(
            microbatch.tokens.shape, np.int32, sharding=self._batch_sharding(microbatch.tokens.shape)
        )
        microbatches = tuple(jax.tree.map(lambda _: leaf, microbatch) for _ in range(count))
        return self._step.lower(self.abstract_state(), self._frozen, microbatches)

    def _batch_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        return self._sharding_ctx.activation("batch", shape, ("batch", "length"))

    def _to_devices(self, batch: TrainBatch) -> TrainBatch:
        """Copy a batch to the devices. Every process has all rows and copies those of its devices."""
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, self._batch_sharding(x.shape), lambda index: x[index]), batch
        )

    def _state_shardings(self) -> TrainState:
        replicated = self._sharding_ctx.replicated()

        def sharding_of(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            """Shard an array with a parameter's name and shape as the parameter; replicate the others, which are small."""
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            parameter = self._initial.get(names[-1]) if names else None
            is_like = parameter is not None and leaf.shape == parameter.shape
            return parameter.sharding if is_like else replicated  # type: ignore[union-attr,return-value]

        optimizer = jax.tree_util.tree_map_with_path(sharding_of, jax.eval_shape(self._optimizer.init, self._initial))
        return TrainState({name: value.sharding for name, value in self._initial.items()}, optimizer, replicated)

    def _update(
        self, state: TrainState, frozen: Parameters, microbatches: tuple[TrainBatch, ...]
    ) -> tuple[TrainState, StepResult]:
        count = sum(microbatch.loss_mask.sum() for microbatch in microbatches)
        loss, gradients = self._gradient(state.parameters, frozen, microbatches)
        mean = {name: gradient / jnp.maximum(count, 1).astype(gradient.dtype) for name, gradient in gradients.items()}
        clipped, norm = clip_grad_norm(mean, self._clip_norm)
        rounded = {name: gradient.astype(state.parameters[name].dtype) for name, gradient in clipped.items()}
        updates, optimizer = self._optimizer.update(rounded, state.optimizer, state.parameters)
        rate = jnp.asarray(self._schedule(state.step), norm.dtype)
        parameters = optax.apply_updates(state.parameters, updates)
        return TrainState(parameters, optimizer, state.step + 1), StepResult(loss / jnp.maximum(count, 1), norm, rate)

    def _gradient(
        self, parameters: Parameters, frozen: Parameters, microbatches: tuple[TrainBatch, ...]
    ) -> tuple[jax.Array, Parameters]:
        """Return loss and gradient, summed over the tokens of all microbatches, in at least float32."""
        rounded = {name: value.astype(self.dtype) for name, value in parameters.items()}

        @jax.value_and_grad
        def loss_and_gradient(trained: Parameters, microbatch: TrainBatch) -> jax.Array:
            loss, count, aux_loss = self._losses(trained, frozen, microbatch)
            return loss + aux_loss * count

        def add(sums: tuple[jax.Array, Parameters], microbatch: TrainBatch) -> tuple[tuple[jax.Array, Parameters], None]:
            # The backward pass selects implementations by the mesh too.
            with use_sharding(self._sharding_ctx):
                loss, gradients = loss_and_gradient(rounded, microbatch)
            gradients = jax.lax.with_sharding_constraint(gradients, self._shardings.parameters)
            return jax.tree.map(lambda total, more: total + more.astype(total.dtype), sums, (loss, gradients)), None

        wide = accum_dtype(self.dtype)
        zeros = {name: jnp.zeros(value.shape, wide) for name, value in rounded.items()}
        stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *microbatches)
        return jax.lax.scan(add, (jnp.zeros((), wide), zeros), stacked)[0]

    def _sum_losses(
        self, trained: Mapping[str, jax.Array], frozen: Parameters, batch: TrainBatch
    ) -> tuple[jax.Array, jax.Array]:
        return self._losses(trained, frozen, batch)[:2]

    def _losses(
        self, trained: Mapping[str, jax.Array], frozen: Parameters, batch: TrainBatch
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return the sum of the target tokens' losses, their number, and the experts' auxiliary loss per token."""
        with use_sharding(self._sharding_ctx):
            rounded = {name: value.astype(self.dtype) for name, value in trained.items()}
            module = with_parameters(self._module, frozen | rounded)
            return batch_loss(module, batch, self._sharding_ctx, self._remat)


def batch_loss(
    module: Transformer, batch: TrainBatch, sharding_ctx: ShardingContext, remat: Remat | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the sum of the target tokens' losses, their number, and the experts' auxiliary loss per token."""
    x_BTD, _, router_logits = module(batch.tokens, batch.positions, segments_BT=batch.segments, remat=remat)
    loss = next_token_loss(x_BTD, to_array(module.head()), batch.targets, batch.loss_mask, sharding_ctx.batch_multiple())
    aux_loss = jnp.zeros((), loss.dtype)
    if (moe := module.config.moe) is not None:
        is_real_BT = batch.positions >= 0
        aux_loss = moe.aux_loss_coef * load_balancing_loss(router_logits, moe.experts_per_token, is_real_BT)
    return loss, batch.loss_mask.sum(), aux_loss


def _jax_owned(value: jax.Array) -> jax.Array:
    """Copy an array into memory that JAX owns, and delete the original.

    On CPUs the arrays of the loader are views of NumPy memory, which cannot be donated: the first step would need twice the
    memory.
    """
    copy = jnp.copy(value)
    value.delete()
    return copy

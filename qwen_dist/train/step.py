"""Every jitted function of training."""

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
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.sharding import use_sharding
from qwen_dist.train.batches import Batch
from qwen_dist.train.loss import next_token_loss
from qwen_dist.train.malloc import drain_tcache
from qwen_dist.train.optim import Schedule, clip

# What the forward pass keeps for the backward pass, by the configuration's name of what is computed again.
REMAT = {
    "none": None,
    "selective": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}

Parameters = dict[str, jax.Array]


class State(NamedTuple):
    """What training changes: the trained parameters, the optimiser's numbers, and how many steps have been done.

    Also trees of the same form with a shape or a sharding for each array.
    """

    parameters: dict[str, Any]
    optimizer: Any
    step: Any


class Metrics(NamedTuple):
    """Of one step: the mean loss of what is to be learnt, the norm of the gradient before clipping, the learning rate."""

    loss: jax.Array
    gradient_norm: jax.Array
    learning_rate: jax.Array


class Trainer:
    """The compiled programs that train one model on one mesh: a step, and an evaluation."""

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
        """Takes over the trained parameters of the model, whose arrays are used up by `start`.

        Args:
          model: parameters in the types in which they are kept; abstract ones serve to `lower` a step.
          trained: names of the parameters that change.
          optimizer, schedule: from `optim`.
          dtype: what trained parameters are rounded to before they are used.
          remat: see `REMAT`.
          clip_norm: see `optim.clip`.
        """
        self._sharding_ctx, self._module = model.sharding_ctx, model.module
        self._frozen = {name: value for name, value in model.parameters.items() if name not in trained}
        self._initial = {name: value for name, value in model.parameters.items() if name in trained}
        self._optimizer, self._schedule = optimizer, schedule
        self.dtype, self._remat, self._clip_norm = dtype, REMAT[remat], clip_norm
        self._shardings = self._state_shardings()
        self._step = jax.jit(
            self._update, donate_argnums=0, out_shardings=(self._shardings, self._sharding_ctx.replicated())
        )
        self._evaluate = jax.jit(self._sum_losses, out_shardings=self._sharding_ctx.replicated())

    def start(self) -> State:
        """The state before the first step."""
        optimizer = jax.jit(self._optimizer.init, out_shardings=self._shardings.optimizer)(self._initial)
        parameters = {name: _owned(value) for name, value in self._initial.items()}
        return State(parameters, optimizer, self._sharding_ctx.replicate(np.zeros((), np.int32)))

    def abstract_state(self) -> State:
        """Shapes, types and shardings of `start`'s result."""
        shapes = jax.eval_shape(self._optimizer.init, self._initial), jax.ShapeDtypeStruct((), np.int32)
        state = State({name: jax.typeof(value) for name, value in self._initial.items()}, *shapes)
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state, self._shardings
        )

    def step(self, state: State, parts: Iterable[Batch]) -> tuple[State, Metrics]:
        """One step with the gradient of all parts of a batch, which are alike in shape; `state` is used up."""
        drain_tcache()
        return self._step(state, self._frozen, tuple(self._place(part) for part in parts))

    def evaluate(self, state: State, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """The sum of the losses of the tokens to be learnt, and how many there are."""
        return self._evaluate(state.parameters, self._frozen, self._place(batch))

    def parameters(self, state: State) -> Parameters:
        """All parameters of the model, trained and not."""
        return self._frozen | state.parameters

    def lower(self, part: Batch, count: int) -> jax.stages.Lowered:
        """The program of a step with `count` parts of this shape, to be compiled but not run."""
        leaf = jax.ShapeDtypeStruct(part.tokens.shape, np.int32, sharding=self._rows(part.tokens.shape))
        parts = tuple(jax.tree.map(lambda _: leaf, part) for _ in range(count))
        return self._step.lower(self.abstract_state(), self._frozen, parts)

    def _rows(self, shape: tuple[int, ...]) -> NamedSharding:
        return self._sharding_ctx.activation("batch", shape, ("batch", "length"))

    def _place(self, batch: Batch) -> Batch:
        """Host arrays to the devices; every process has all rows, and puts its own there."""
        return jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, self._rows(x.shape), lambda index: x[index]), batch
        )

    def _state_shardings(self) -> State:
        everywhere = self._sharding_ctx.replicated()

        def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
            """An array of a parameter's name and shape lies as the parameter; counts and Adafactor's sums are small."""
            names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
            parameter = self._initial.get(names[-1]) if names else None
            is_like = parameter is not None and leaf.shape == parameter.shape
            return parameter.sharding if is_like else everywhere  # type: ignore[union-attr,return-value]

        optimizer = jax.tree_util.tree_map_with_path(place, jax.eval_shape(self._optimizer.init, self._initial))
        return State({name: value.sharding for name, value in self._initial.items()}, optimizer, everywhere)

    def _update(self, state: State, frozen: Parameters, parts: tuple[Batch, ...]) -> tuple[State, Metrics]:
        count = sum(part.is_learnt.sum() for part in parts)
        loss, gradients = self._gradient(state.parameters, frozen, parts)
        mean = {name: gradient / jnp.maximum(count, 1).astype(gradient.dtype) for name, gradient in gradients.items()}
        clipped, norm = clip(mean, self._clip_norm)
        rounded = {name: gradient.astype(state.parameters[name].dtype) for name, gradient in clipped.items()}
        updates, optimizer = self._optimizer.update(rounded, state.optimizer, state.parameters)
        rate = jnp.asarray(self._schedule(state.step), norm.dtype)
        parameters = optax.apply_updates(state.parameters, updates)
        return State(parameters, optimizer, state.step + 1), Metrics(loss / jnp.maximum(count, 1), norm, rate)

    def _gradient(
        self, parameters: Parameters, frozen: Parameters, parts: tuple[Batch, ...]
    ) -> tuple[jax.Array, Parameters]:
        """Loss and gradient, summed over all tokens of all parts, in at least float32."""
        rounded = {name: value.astype(self.dtype) for name, value in parameters.items()}

        @jax.value_and_grad
        def of_part(trained: Parameters, part: Batch) -> jax.Array:
            loss, count, aux_loss = self._losses(trained, frozen, part)
            return loss + aux_loss * count

        def add(sums: tuple[jax.Array, Parameters], part: Batch) -> tuple[tuple[jax.Array, Parameters], None]:
            loss, gradients = of_part(rounded, part)
            gradients = jax.lax.with_sharding_constraint(gradients, self._shardings.parameters)
            return jax.tree.map(lambda total, more: total + more.astype(total.dtype), sums, (loss, gradients)), None

        wide = accum_dtype(self.dtype)
        zeros = {name: jnp.zeros(value.shape, wide) for name, value in rounded.items()}
        stacked = jax.tree.map(lambda *rows: jnp.stack(rows), *parts)
        return jax.lax.scan(add, (jnp.zeros((), wide), zeros), stacked)[0]

    def _sum_losses(
        self, trained: Mapping[str, jax.Array], frozen: Parameters, batch: Batch
    ) -> tuple[jax.Array, jax.Array]:
        return self._losses(trained, frozen, batch)[:2]

    def _losses(
        self, trained: Mapping[str, jax.Array], frozen: Parameters, batch: Batch
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The sum of the tokens' losses, how many are learnt, and what a mixture of experts adds to their mean."""
        with use_sharding(self._sharding_ctx):
            rounded = {name: value.astype(self.dtype) for name, value in trained.items()}
            module = with_parameters(self._module, frozen | rounded)
            x_BTD, _, router_logits = module(batch.tokens, batch.positions, segments_BT=batch.segments, remat=self._remat)
            apart = self._sharding_ctx.batch_multiple()
            loss = next_token_loss(x_BTD, module.head(), batch.targets, batch.is_learnt, apart)
            aux_loss = jnp.zeros((), loss.dtype)
            if (moe := self._module.config.moe) is not None:
                is_real_BT = batch.positions >= 0
                aux_loss = moe.aux_loss_coef * load_balancing_loss(router_logits, moe.experts_per_token, is_real_BT)
        return loss, batch.is_learnt.sum(), aux_loss


def _owned(value: jax.Array) -> jax.Array:
    """The array in memory of jax's own, in place of the given one.

    What the loader has put beside a CPU's processors cannot be changed in place: the first step would hold it all twice.
    """
    copy = jnp.copy(value)
    value.delete()
    return copy

"""Optimizers of optax by name, learning rate schedules and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from qwen_dist.config import OptimizerOptions
from qwen_dist.errors import UsageError

Schedule = Callable[[jax.Array | int], jax.Array | float]


def make_schedule(options: OptimizerOptions, num_steps: int) -> Schedule:
    """Return the learning rate as a function of the step, from 0; the values are those of transformers' schedulers.

    Raises:
      UsageError: the warm-up is longer than the run.
    """
    if options.learning_rate is None:
        raise UsageError("optimizer.learning_rate is None; it must be a number here")
    rate, warmup = options.learning_rate, num_warmup_steps(options, num_steps)
    rest, final = max(num_steps - warmup, 1), options.min_lr_ratio
    after: Schedule = {
        "constant": lambda: optax.constant_schedule(rate),
        "linear": lambda: optax.linear_schedule(rate, final * rate, rest),
        "cosine": lambda: optax.cosine_decay_schedule(rate, rest, final),
    }[options.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, rate, warmup), after], [warmup]) if warmup else after


def num_warmup_steps(options: OptimizerOptions, num_steps: int) -> int:
    """Return the number of warm-up steps, with the rounding of transformers. Raises UsageError if the run is shorter."""
    if options.warmup_steps > num_steps:
        raise UsageError(
            f"optimizer.warmup_steps is {options.warmup_steps}, and the run has {num_steps} steps; give fewer, or "
            "optimizer.warmup_ratio, a fraction of the run"
        )
    return options.warmup_steps or math.ceil(options.warmup_ratio * num_steps)


def make_optimizer(
    options: OptimizerOptions,
    schedule: Schedule,
    shapes: Mapping[str, tuple[int, ...]],
    disk_shapes: Mapping[str, tuple[int, ...]],
) -> optax.GradientTransformation:
    """Return the optimizer for parameters in a dictionary by checkpoint name.

    Args:
      options: as configured.
      schedule: the learning rate.
      shapes: of the trained parameters in memory.
      disk_shapes: of the trained parameters on disk. Weight decay applies to those with two dimensions or more, not to
        norms and biases.
    """
    decays = {name: len(disk_shapes[name]) > 1 for name in shapes}
    b1, b2, eps, decay = options.b1, options.b2, options.eps, options.weight_decay
    if options.name == "adamw":
        return optax.adamw(schedule, b1, b2, eps, weight_decay=decay, mask=decays)
    if options.name == "adafactor":
        return optax.adafactor(schedule, weight_decay_rate=decay or None, weight_decay_mask=decays)
    return optax.contrib.muon(
        schedule,
        beta=b1,
        weight_decay=decay,
        weight_decay_mask=decays,
        adam_b1=b1,
        adam_b2=b2,
        eps=eps,
        muon_weight_dimension_numbers={name: _muon_dims(name, shape, disk_shapes[name]) for name, shape in shapes.items()},
    )


def _muon_dims(name: str, shape: tuple[int, ...], disk_shape: tuple[int, ...]) -> optax.contrib.MuonDimensionNumbers | None:
    """Return which dimensions are a matrix's rows (out) and columns (in); None for parameters that Muon leaves to Adam."""
    if len(disk_shape) != 2 or name in ("embed_tokens.weight", "lm_head.weight"):
        return None
    num_out = next(n for n in range(len(shape)) if math.prod(shape[:n]) == disk_shape[0])
    dims = tuple(range(len(shape)))
    return optax.contrib.MuonDimensionNumbers(reduction_axis=dims[num_out:], output_axis=dims[:num_out])


def clip_grad_norm(gradients: dict[str, jax.Array], max_norm: float) -> tuple[dict[str, jax.Array], jax.Array]:
    """Scale the gradients down if their global norm is above `max_norm` (0: never), as `torch.nn.utils.clip_grad_norm_`.

    Unlike optax, PyTorch adds 1e-6 to the norm before it divides.

    Returns:
      The gradients, and their norm before clipping.
    """
    norm = optax.tree.norm(gradients)
    if not max_norm:
        return gradients, norm
    scale = jnp.minimum(max_norm / (norm + 1e-6), 1.0)
    return {name: scale.astype(gradient.dtype) * gradient for name, gradient in gradients.items()}, norm

"""The gradient of a norm's weight is a sum over all tokens: in bfloat16 it must be summed in a wider dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from qwen_dist.models.layers import RMSNorm
from qwen_dist.models.parameters import with_parameters

pytestmark = pytest.mark.parity


def test_bfloat16_norm_weight_gradient_is_as_good_as_pytorch():
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(mean, 1, (2000, 64)), jnp.bfloat16) for mean in (0, 0.3))
    weight = jnp.asarray(rng.normal(1, 0.2, 64), jnp.bfloat16)
    exact_x, exact_cotangent = (np.asarray(value, np.float64) for value in (x, cotangent))
    normed = exact_x / np.sqrt(np.mean(exact_x**2, -1, keepdims=True) + 1e-6)
    exact = np.sum(exact_cotangent * normed, 0)

    module = RMSNorm("embed", 64, eps=1e-6, dtype=jnp.bfloat16)
    _, pull = jax.vjp(lambda weight: with_parameters(module, {"weight": weight})(x), weight)
    ours = np.asarray(jax.jit(pull)(cotangent)[0], np.float64)

    theirs = Qwen3RMSNorm(64, eps=1e-6).to(torch.bfloat16)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(np.asarray(weight, np.float32)))
    output = theirs(torch.from_numpy(np.asarray(x, np.float32)).bfloat16())
    output.backward(torch.from_numpy(np.asarray(cotangent, np.float32)).bfloat16())

    def error(found):
        return np.linalg.norm(found - exact) / np.linalg.norm(exact)

    assert error(ours) <= error(theirs.weight.grad.double().numpy())

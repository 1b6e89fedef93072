"""Inputs of the gated delta rule, and its recurrence in numpy, which test_delta_rule.py compares with transformers."""

import numpy as np

from qwen_dist.ops.delta_rule import DeltaInputs


def random_inputs(rng: np.random.Generator, B: int, T: int, G: int, R: int, K: int, V: int, gates=(0.01, 1, 40)):
    return DeltaInputs(
        rng.standard_normal((B, T, G, K)),
        rng.standard_normal((B, T, G, K)),
        rng.standard_normal((B, T, G, R, V)),
        -rng.exponential(1, (B, T, G, R)) * rng.choice(gates, (B, T, G, R)),
        rng.uniform(0, 1, (B, T, G, R)),
    )


def steps(inputs: DeltaInputs, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the outputs and the state [B, G, R, K, V] after the last token, in float64, token by token."""
    q, k, v, g, beta = (np.asarray(x).astype(np.float64) for x in inputs)
    q, k = (x / np.sqrt((x**2).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    outputs = []
    for t in range(v.shape[1]):
        state = np.exp(g[:, t])[..., None, None] * state
        change = beta[:, t][..., None] * (v[:, t] - np.einsum("BGRKV,BGK->BGRV", state, k[:, t]))
        state = state + k[:, t][:, :, None, :, None] * change[..., None, :]
        outputs.append(np.einsum("BGRKV,BGK->BGRV", state, q[:, t] * q.shape[-1] ** -0.5))
    return np.stack(outputs, axis=1), state

"""Loss and gradients in chunks equal those of all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_dist.train import loss as loss_module
from qwen_dist.train.loss import next_token_loss


@pytest.mark.parametrize("chunk", [7, 16, 1000])
def test_chunks_do_not_change_the_loss(chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "LOSS_CHUNK_TOKENS", chunk)
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, head = jnp.array(rng.normal(size=(3, 11, 5))), jnp.array(rng.normal(size=(17, 5)))
        targets, weights = jnp.array(rng.integers(0, 17, (3, 11))), jnp.array(rng.integers(0, 2, (3, 11)))

        def plain(x, head):
            log_probabilities = jax.nn.log_softmax(x @ head.T)
            return -(weights * jnp.take_along_axis(log_probabilities, targets[..., None], -1)[..., 0]).sum()

        wanted = jax.value_and_grad(plain, argnums=(0, 1))(x, head)
        found = jax.value_and_grad(lambda x, head: next_token_loss(x, head, targets, weights), argnums=(0, 1))(x, head)
        # Scaled outside the function, as by a mean.
        halved = jax.grad(lambda x: 0.5 * next_token_loss(x, head, targets, weights))(x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-14), found, wanted)
        np.testing.assert_allclose(halved, 0.5 * wanted[1][0], rtol=1e-13, atol=1e-14)


def test_a_program_has_the_logits_of_one_chunk_only(monkeypatch):
    monkeypatch.setattr(loss_module, "LOSS_CHUNK_TOKENS", 64)
    vocab, tokens = 1009, 640

    shapes = jax.ShapeDtypeStruct((1, tokens, 8), jnp.float32), jax.ShapeDtypeStruct((vocab, 8), jnp.float32)
    labels = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    text = jax.jit(jax.grad(next_token_loss, argnums=(0, 1))).lower(*shapes, labels, labels).compile().as_text()
    assert f"64,{vocab}]" in text and f"{tokens},{vocab}]" not in text


def test_nothing_is_computed_for_tokens_of_weight_0(monkeypatch):
    """Except for those that fill a chunk: all others may even be NaN."""
    monkeypatch.setattr(loss_module, "LOSS_CHUNK_TOKENS", 4)
    weights = np.zeros((2, 8), np.int32)
    weights[0, 2:5] = weights[1, 7] = 1
    x = np.where(weights[..., None], np.ones((2, 8, 3), np.float32), np.nan)
    head, targets = jnp.eye(5, 3), jnp.zeros((2, 8), jnp.int32)
    grad_x, grad_head = jax.grad(next_token_loss, argnums=(0, 1))(jnp.asarray(x), head, targets, jnp.asarray(weights))
    assert np.isfinite(grad_head).all()
    assert (np.asarray(grad_x)[weights == 1] != 0).all() and (np.asarray(grad_x)[weights == 0] == 0).all()

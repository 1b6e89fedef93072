"""The largest element of each row, among all and among those allowed."""

import jax.numpy as jnp
import numpy as np
import pytest

from qwen_dist.ops.argmax import ALLOWED_ARGMAX, ARGMAX
from qwen_dist.ops.dispatch import Backend


def words_of(allowed_BV):
    """A bit for each element, the lowest of each word of 32 first."""
    padded = np.pad(allowed_BV, ((0, 0), (0, -allowed_BV.shape[1] % 32)))
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint32)


@pytest.mark.parametrize("size", [1, 31, 32, 33, 300, 768])
def test_every_form_finds_the_largest_allowed_element(size):
    """Rows: all allowed, a single element, the largest not allowed, and random ones; numbers are repeated."""
    rng = np.random.default_rng(size)
    x_BV = rng.integers(-5, 5, (9, size)).astype(np.float32)
    allowed_BV = rng.random((9, size)) < 0.3
    allowed_BV[0], allowed_BV[1] = True, False
    allowed_BV[1, size // 2] = True
    allowed_BV[2] = x_BV[2] < x_BV[2].max()
    allowed_BV[:, 0] |= ~allowed_BV.any(axis=1)
    expected = np.where(allowed_BV, x_BV, -np.inf).argmax(axis=1)
    for op, arguments, wanted in (
        (ALLOWED_ARGMAX, (jnp.asarray(x_BV), jnp.asarray(words_of(allowed_BV))), expected),
        (ARGMAX, (jnp.asarray(x_BV),), x_BV.argmax(axis=1)),
    ):
        forms = {one.name: one for backend in Backend for one in op.implementations(backend)}
        assert len(forms) == 2
        for form in forms.values():
            np.testing.assert_array_equal(form.run(*arguments), wanted)

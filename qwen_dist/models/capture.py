"""Looking at a model's own intermediates, for comparison with another implementation.

The model calls `tap` on every intermediate that has a name. Outside `capture()` that is the identity at trace time, so a
compiled program never knows; inside, the values are collected by name and can be returned from the traced function:

    def forward(params, tokens, positions):
        with capture() as taps:
            x, _ = model(tokens, positions)
        return x, taps                       # {"layers.0.self_attn.q_rope": Array [B, T, N, H], ...}
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_taps: contextvars.ContextVar[dict[str, jax.Array] | None] = contextvars.ContextVar("taps", default=None)
_scope: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("scope", default=())


@contextlib.contextmanager
def capture() -> Iterator[dict[str, jax.Array]]:
    """Collect every tapped value in the block, by its full name, into the dictionary this yields."""
    taps: dict[str, jax.Array] = {}
    token = _taps.set(taps)
    try:
        yield taps
    finally:
        _taps.reset(token)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Prefix the names of the values tapped in the block with `name.`; also names the operations in a profile."""
    token = _scope.set((*_scope.get(), name))
    try:
        with jax.named_scope(name):
            yield
    finally:
        _scope.reset(token)


def tap(name: str, value: jax.Array) -> jax.Array:
    """Return `value`; inside `capture()` also remember it under the enclosing scopes' names and `name`."""
    taps = _taps.get()
    if taps is not None:
        full = ".".join((*_scope.get(), name))
        assert full not in taps, f"two values are tapped as {full}"
        taps[full] = value
    return value

"""A model's own intermediates, for comparison with another implementation.

The model calls `tap` on every intermediate that has a name. Outside `capture()` that is the identity at trace time, so it
does not change a compiled program; inside, the values are collected by name and can be returned from the traced function:

    def forward(params, tokens, positions):
        with capture() as taps:
            x, *_ = model(tokens, positions)
        return x, taps                       # {"layers.0.self_attn.q_rope": Array [B, T, N, H], ...}

`capture(replacing={name: value, ...})` also makes the model continue with the given values in place of its own, so that
each component can be measured on another implementation's inputs.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

_taps: contextvars.ContextVar[dict[str, jax.Array] | None] = contextvars.ContextVar("taps", default=None)
_replacing: contextvars.ContextVar[Mapping[str, jax.Array]] = contextvars.ContextVar("replacing", default={})  # noqa: B039
_observe: contextvars.ContextVar[Callable[[Any, jax.Array], None] | None] = contextvars.ContextVar("observe", default=None)
_scope: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("scope", default=())


@contextlib.contextmanager
def capture(replacing: Mapping[str, jax.Array] | None = None) -> Iterator[dict[str, jax.Array]]:
    """Collect every tapped value in the block, by its full name, into the dictionary that this yields.

    The computation continues with `replacing[name]` if there is one; the collected value is always the model's own.
    """
    taps: dict[str, jax.Array] = {}
    token, replacing_token = _taps.set(taps), _replacing.set(replacing or {})
    try:
        yield taps
    finally:
        _taps.reset(token)
        _replacing.reset(replacing_token)


@contextlib.contextmanager
def scope(name: str) -> Iterator[None]:
    """Prefix the names of the values tapped in the block with `name.`; also names the operations in a profile."""
    token = _scope.set((*_scope.get(), name))
    try:
        with jax.named_scope(name):
            yield
    finally:
        _scope.reset(token)


def is_capturing() -> bool:
    """Return whether intermediates are collected, so that each must be computed in this trace."""
    return _taps.get() is not None


def tap(name: str, value: jax.Array) -> jax.Array:
    """Return `value`; inside `capture()` also remember it under the enclosing scopes' names and `name`."""
    taps = _taps.get()
    if taps is None:
        return value
    full = ".".join((*_scope.get(), name))
    assert full not in taps, f"two values are tapped as {full}"
    taps[full] = value
    replacement = _replacing.get().get(full, value)
    assert replacement.shape == value.shape, f"{full} is {value.shape}; its replacement {replacement.shape}"
    return replacement


@contextlib.contextmanager
def observe_inputs(observe: Callable[[Any, jax.Array], None]) -> Iterator[None]:
    """Call `observe(layer, rows)` for each linear layer and mixture of experts that is traced with its inputs."""
    token = _observe.set(observe)
    try:
        yield
    finally:
        _observe.reset(token)


def observed(layer: Any, rows: jax.Array) -> jax.Array:
    """Return `rows`, the inputs of a layer, after `observe_inputs` has seen them."""
    if (observe := _observe.get()) is not None:
        observe(layer, rows)
    return rows

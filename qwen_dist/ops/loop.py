"""Loops of dynamic length."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax

Carry = TypeVar("Carry")


def bounded_loop(
    condition: Callable[[Carry], jax.Array], body: Callable[[Carry], Carry], start: Carry, *, max_steps: int
) -> Carry:
    """Run `body` while `condition` holds, as `jax.lax.while_loop`. It must hold at first, and at most `max_steps` times.

    A single step is not made a loop: XLA CPU copies every weight that a loop reads, on each iteration.
    """
    return body(start) if max_steps == 1 else jax.lax.while_loop(condition, body, start)

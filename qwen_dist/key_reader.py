"""Read the keys of a JSON object one by one, with every problem noted: missing, mistyped, out of range, unknown. No jax."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from qwen_dist.errors import printable

REQUIRED = object()
# Above all sizes of real models; tensors with larger dimensions cannot be computed with 32-bit indices.
MAX_INT = 2**31 - 1


class KeyReader:
    """Takes keys out of an object.

    Attributes:
      left: the keys that have not been taken.
      problems: what is wrong, in the order of reading.
      ignored: keys that the user vouches for.
    """

    def __init__(self, values: Mapping[str, Any], ignored_keys: Iterable[str]):
        self.left = dict(values)
        self.problems: list[str] = []
        self.ignored = set(ignored_keys)

    def take(
        self,
        key: str,
        kinds: tuple[type, ...],
        default: Any = REQUIRED,
        minimum: float | None = None,
        maximum: float = MAX_INT,
    ) -> Any:
        """Take a key. For a value of another kind or out of range, note a problem and return one that can be used."""
        value: Any = self.left.pop(key, None)
        if value is None:
            if default is REQUIRED:
                self.problems.append(f"{key} is missing")
                return minimum or 1
            return default
        wrong_bool = isinstance(value, bool) and bool not in kinds
        if wrong_bool or not isinstance(value, kinds):
            wanted = " or ".join(kind.__name__ for kind in kinds)
            self.problems.append(f"{key} is {shown(value)}; it must be {wanted}")
            return minimum or 1 if default is REQUIRED else default
        if minimum is not None and not minimum <= (number := cast(float, value)) <= maximum:
            limit = f"at least {minimum}" if number < minimum else f"at most {maximum}"
            self.problems.append(f"{key} is {shown(value)}; it must be {limit}")
            return minimum
        return value


def shown(*values: Any) -> str:
    """Return values of the file as they are printed in a message."""
    return printable(", ".join(dict.fromkeys(map(repr, values[:20]))), 80)


def how_to_ignore(keys: Iterable[str], section: str = "") -> str:
    """Return the advice for keys that are not understood."""
    names = ",".join(f"{section}.{key}".removeprefix(".") for key in keys)
    return f"(if it does not: --config.model.ignored_config_keys={printable(names, 80)})"

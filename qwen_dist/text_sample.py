"""The tokens of a text file in windows, each of which a model computes alone.

Letters: B rows, T tokens of a window.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from qwen_dist.errors import UserError

WINDOW = 512
# A token has at least a byte, and few have over 32.
_BYTES_PER_TOKEN = 32


def read_tokens(flag: str, path: str, encode: Callable[[str], list[int]], max_tokens: int) -> list[int]:
    """Return the first tokens of a text file that a flag names. Raises UserError if it has less than two."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_BYTES_PER_TOKEN * max_tokens)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{flag} {path} cannot be read as text: {error}") from None
    tokens = encode(text)[:max_tokens]
    if len(tokens) < 2:
        raise UserError(f"{flag} {path} has {len(tokens)} tokens; give a text with at least 2")
    return tokens


def windows(tokens: Sequence[int], num_rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield tokens and positions [B, T] of the next windows, one in each row; the last is padded at its end."""
    for first in range(0, len(tokens), num_rows * WINDOW):
        rows = np.zeros((num_rows, WINDOW), np.int32)
        positions = np.full((num_rows, WINDOW), -1, np.int32)
        for row in range(num_rows):
            part = tokens[first + row * WINDOW : first + (row + 1) * WINDOW]
            rows[row, : len(part)], positions[row, : len(part)] = part, np.arange(len(part))
        yield rows, positions

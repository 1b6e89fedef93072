"""Read the lines of a file within a bound of memory, and notice a file that was cut off. No jax."""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections.abc import Iterator
from typing import IO, Any

# The most bytes of a line, unless `max_line_size` says otherwise. The longest contexts are far below it.
MAX_LINE_BYTES = 64 * 10**6
_SKIP_BYTES = 2**20
# A block of 4 bytes may become 128 kB, so this many compressed bytes become at most 8 MB.
_ZSTD_INPUT_BYTES = 256


@dataclasses.dataclass(frozen=True)
class UnreadableLine:
    """A line, or a row of a table, that cannot be used; those after it can be read.

    Attributes:
      reason: a short sentence.
      hash: 64 bits of the content, where it is known.
    """

    reason: str
    hash: int = 0


def hash64(data: bytes) -> int:
    """Return a 64-bit hash of the bytes."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def bounded_lines(file: IO[bytes], max_bytes: int) -> Iterator[bytes | UnreadableLine]:
    """Yield the lines of a file; of a line with more than `max_bytes` bytes, never keep more than these in memory."""
    while line := file.readline(max_bytes + 1):
        yield line if len(line) <= max_bytes else _skip_line(file, line, max_bytes)


def _skip_line(file: IO[bytes], part: bytes, max_bytes: int) -> UnreadableLine:
    """Read the rest of a line, of which `part` is the beginning."""
    digest = hashlib.blake2b(digest_size=8)
    while part and not part.endswith(b"\n"):
        digest.update(part)
        part = file.readline(_SKIP_BYTES)
    digest.update(part.rstrip())
    return UnreadableLine(too_long("line", max_bytes), int.from_bytes(digest.digest(), "little"))


def too_long(what: str, max_bytes: int) -> str:
    """Return the reason why a line, row or text is refused."""
    return f"the {what} has more than {max_bytes} bytes, which is max_line_size"


class ZstdFile(io.RawIOBase):
    """The content of a .zst file.

    The reader of the zstandard package returns the content up to a cut without an error.
    """

    def __init__(self, file: IO[bytes], zstandard: Any):
        self._file, self._decompressor = file, zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._input, self._output = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer. Raises EOFError if the file ends inside a frame."""
        while not self._output:
            self._input = self._input or self._file.read(_ZSTD_INPUT_BYTES)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("it ends inside a compressed frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._output = memoryview(self._frame.decompress(self._input))
            self._input = b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        count = min(len(buffer), len(self._output))
        buffer[:count], self._output = self._output[:count], self._output[count:]
        return count

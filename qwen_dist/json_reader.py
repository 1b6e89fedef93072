"""Read files and JSON from outside: regular files of bounded size, UTF-8, bounded depth and numbers.

Every JSON file that is not written by the run itself is read here, so that a damaged or hostile one is one sentence.
"""

from __future__ import annotations

import collections
import json
import os
import pathlib
import re
import stat
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from qwen_dist.errors import CheckpointError, UserError, printable, problem_list

# Real ones: an index of 100,000 tensors has 10 MB, tokenizer.json of Qwen3 has 11 MB.
MAX_JSON_BYTES = 64 * 2**20
MAX_DEPTH = 100
# Longer integers are not sizes, ids or seeds, and Python refuses or takes long to convert them.
_MAX_DIGITS = 40
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class JsonError(ValueError):
    """The text is not JSON that can be used. The message is one short sentence without the place."""


def read_file(path: str | os.PathLike[str], *, max_bytes: int, error: type[UserError] = CheckpointError) -> bytes:
    """Return the content of a regular file of at most `max_bytes` bytes.

    A named pipe, a device or a directory is refused before it is opened, as reading it might never end.

    Raises:
      FileNotFoundError: there is none.
      UserError: of the class `error`; it cannot be read, is no regular file or is larger.
    """
    path = pathlib.Path(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{printable(path)} is not a regular file")
        if status.st_size > max_bytes:
            raise error(f"{printable(path)} has {status.st_size} bytes; at most {max_bytes} are read")
        with open(path, "rb") as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the name
        if isinstance(problem, UserError):
            raise
        reason = problem.strerror if isinstance(problem, OSError) and problem.strerror else problem
        raise error(f"{printable(path)} cannot be read: {reason}") from None
    if len(content) > max_bytes:
        raise error(f"{printable(path)} has more than {max_bytes} bytes, which is the most that is read")
    return content


def read_json_object(
    path: str | os.PathLike[str], *, max_bytes: int = MAX_JSON_BYTES, error: type[UserError] = CheckpointError
) -> dict[str, Any]:
    """Return the JSON object in a file, read by `read_file` and `parse_json`.

    Raises:
      FileNotFoundError: there is none.
      UserError: of the class `error`; it cannot be read, or is not a JSON object.
    """
    return parse_object(read_file(path, max_bytes=max_bytes, error=error), printable(path), error)


def parse_object(raw: bytes, name: str, error: type[UserError] = CheckpointError) -> dict[str, Any]:
    """Return the JSON object in the content of the file `name`. Raises `error` as `read_json_object` does."""
    try:
        content = parse_json(raw)
    except JsonError as problem:
        raise error(f"{name} is not JSON: {problem}") from None
    if not isinstance(content, dict):
        raise error(f"{name} must hold a JSON object; it holds {printable(repr(content), 80)}")
    return content


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings as one level, with keys such as "sampling.top_k"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def keys_within(section: str, keys: Iterable[str]) -> frozenset[str]:
    """Return which keys of an object the dotted `keys` name: `a` names a key in any object, `section.a` in that one."""
    return frozenset(key.removeprefix(f"{section}.") for key in keys)


def unusable_keys(file: str | os.PathLike[str], problems: list[str]) -> CheckpointError:
    """Return the error for keys of a checkpoint's file that are not understood: a single one in the same line."""
    listed = f" {printable(problems[0], 500)} " if len(problems) == 1 else f"\n{problem_list(problems)}\n"
    return CheckpointError(
        f"{printable(file)} cannot be used:{listed}(keys in --config.model.ignored_config_keys are not read)"
    )


def parse_json(raw: bytes, *, max_depth: int = MAX_DEPTH) -> Any:
    """Parse JSON in UTF-8 strictly.

    Refused are: a byte-order mark, nesting deeper than `max_depth`, a key that occurs twice in an object, NaN, Infinity,
    numbers that no float64 holds, integers of more than 40 digits, and half of a surrogate pair, which is not a character.

    Raises:
      JsonError: it is not JSON, or one of these.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise JsonError(f"byte {problem.start} is not UTF-8") from None
    if text.startswith("\ufeff"):
        raise JsonError("it starts with a byte-order mark; save it as UTF-8 without one")
    try:
        value = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse_constant,
            parse_int=_parse_int,
            parse_float=_parse_float,
        )
    except JsonError:
        raise
    except RecursionError:
        raise JsonError(f"it is nested deeper than {max_depth}") from None
    except json.JSONDecodeError as problem:
        line = f"line {problem.lineno}, " if "\n" in text else ""
        raise JsonError(f"{problem.msg} ({line}column {problem.colno})") from None
    if text.count("[") + text.count("{") > max_depth and _is_deeper(value, max_depth):
        raise JsonError(f"it is nested deeper than {max_depth}")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise JsonError("it has half of a surrogate pair, which is not a character") from None
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        counts = collections.Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise JsonError(f"the key {printable(repr(twice), 80)} occurs twice in one object")
    return entries


def _refuse_constant(text: str) -> NoReturn:
    raise JsonError(f"{text} is not a JSON number")


def _parse_int(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise JsonError(f"a number has {len(text)} digits: {text[:20]}…")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise JsonError(f"the number {printable(text, 40)} is too large")
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    """Return whether the lists and objects of `value` are nested more than `limit` deep."""
    level, depth = [value], 0
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > limit:
            return True
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return False

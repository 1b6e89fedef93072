"""Damaged versions of valid files, as hypothesis strategies."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from hypothesis import strategies as st

# Values that are of the wrong type, out of range or long, wherever they stand.
HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.0, 1e-320, 1e308, float("nan")),
    *(float("inf"), float("-inf"), "", " ", "hot", "5", "\x00", "\x1b[31mred\x1b[0m", "\ud800", "\u202eabc", "a" * 5000),
    *(
        "../../etc/passwd",
        "/dev/zero",
        "file:///etc/passwd",
        "[/bold]",
        "%s%n",
        "{{ 7 * 7 }}",
        [],
        [[]],
        [None],
        {},
        {"a": 1},
    ),
    *([1] * 100, ["x"] * 40, [2**62] * 40, {"": ""}, {"content": 5}, [{"name": 1}], [[[[[[[[1]]]]]]]]),
]


def dumps(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True).encode()


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the paths of all values in JSON."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def with_value(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """Return the JSON with another value at a path."""
    if not path:
        return new
    changed = copy.deepcopy(value)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = new
    return changed


def _without(value: Any, path: tuple[Any, ...]) -> Any:
    changed = copy.deepcopy(value)
    place = changed
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return changed


def damaged_json(valid: Mapping[str, Any], keys: tuple[str, ...] = ()) -> st.SearchStrategy[bytes]:
    """Return JSON texts that differ from a valid object in a value, a key or some bytes; some are no JSON.

    Args:
      valid: a JSON object.
      keys: further names of keys that the reader knows.
    """
    paths = list(places(valid))
    hostile = st.sampled_from(HOSTILE) | st.integers() | st.floats() | st.text(max_size=30)
    return st.one_of(
        st.builds(lambda path, new: dumps(with_value(valid, path, new)), st.sampled_from(paths), hostile),
        st.builds(lambda path: dumps(_without(valid, path)), st.sampled_from(paths[1:])),
        st.builds(
            lambda key, new: dumps({**valid, key: new}),
            st.sampled_from(keys or tuple(valid)) | st.text(max_size=20),
            hostile,
        ),
        st.builds(lambda word: _spoiled(dumps(valid), word), st.sampled_from(sorted(SPOILED))),
        damaged_bytes(dumps(valid)),
    )


SPOILED: Mapping[str, Callable[[bytes], bytes]] = {
    "empty": lambda text: b"",
    "byte-order mark": lambda text: b"\xef\xbb\xbf" + text,
    "utf-16": lambda text: text.decode().encode("utf-16"),
    "nested": lambda text: b"[" * 100_000 + b"]" * 100_000,
    "nested objects": lambda text: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "nested in a key": lambda text: text[:-1] + b', "deep": ' + b"[" * 2000 + b"]" * 2000 + b"}",
    "key twice": lambda text: text[:-1] + b"," + text[1:],
    "many keys": lambda text: dumps({f"key{number}": number for number in range(20_000)}),
    "digits": lambda text: text[:-1] + b', "many": ' + b"9" * 10_000 + b"}",
    "exponent": lambda text: text[:-1] + b', "large": 1e999999}',
    "not utf-8": lambda text: text[:-1] + b', "bad": "\xff\xfe"}',
    "zeros": lambda text: bytes(len(text)),
    "twice": lambda text: text + text,
    "list": lambda text: b"[" + text + b"]",
    "web page": lambda text: b"<!doctype html><html><body>404</body></html>",
    "git-lfs": lambda text: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
}


def _spoiled(text: bytes, word: str) -> bytes:
    return SPOILED[word](text)


def damaged_bytes(valid: bytes) -> st.SearchStrategy[bytes]:
    """Return versions of a file that are cut, have other bytes, or have more or fewer of them."""
    place = st.integers(0, max(0, len(valid) - 1))
    few = st.binary(min_size=1, max_size=8)
    return st.one_of(
        st.builds(lambda end: valid[:end], place),
        st.builds(lambda start: valid[start:], place),
        st.builds(lambda at, new: valid[:at] + new + valid[at + len(new) :], place, few),
        st.builds(lambda at, new: valid[:at] + new + valid[at:], place, few),
        st.builds(lambda at, count: valid[:at] + valid[at + count :], place, st.integers(1, 20)),
        st.builds(lambda new: valid + new, few),
        st.binary(max_size=200),
    )

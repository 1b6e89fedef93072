"""Read a configuration file: Python with `get_config`, or YAML or JSON with the same keys, nested or dotted."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from qwen_dist.errors import UsageError, printable
from qwen_dist.json_reader import JsonError, parse_json, read_file, read_json_object

# Parsing YAML takes seconds a megabyte.
_MAX_BYTES = 2**16
_MAX_DEPTH = 20
_MAX_BITS = 128


def load_config_file(file: str) -> dict[str, Any]:
    """Return the nested values of `FILE` or `FILE:ARG`; the argument is for Python files.

    Raises:
      UsageError: there is no such file, or it cannot be used.
    """
    path, argument = _split(file)
    try:
        if path.endswith((".yaml", ".yml")):
            content = _read_yaml(path)
        elif path.endswith(".json"):
            content = read_json_object(path, max_bytes=_MAX_BYTES, error=UsageError)
        else:
            return _run_python(path, argument, file)
    except FileNotFoundError:
        raise UsageError(f"--config {printable(file)}: there is no file {printable(path)}") from None
    if argument:
        raise UsageError(f"--config {printable(file)}: only a Python file takes an argument after the colon")
    return nest(content, path)


def nest(content: Mapping[Any, Any], path: str) -> dict[str, Any]:
    """Return a mapping in which dotted keys, such as `model.dtype`, are nested. Raises UsageError."""
    nested: dict[str, Any] = {}
    for key, value in content.items():
        if not isinstance(key, str):
            raise UsageError(f"--config {printable(path)}: the key {printable(repr(key), 60)} is not a text")
        *parents, name = key.split(".")
        if len(parents) > _MAX_DEPTH:
            raise UsageError(f"--config {printable(path)}: {printable(key, 60)} is nested deeper than {_MAX_DEPTH}")
        group = nested
        for parent in parents:
            group = group.setdefault(parent, {})
            if not isinstance(group, dict):
                raise UsageError(f"--config {printable(path)}: {printable(key)} cannot be set: {parent} is a value")
        value = nest(value, path) if isinstance(value, Mapping) else value
        _merge(group, {name: value}, path)
    return nested


def _merge(group: dict[str, Any], more: Mapping[str, Any], path: str) -> None:
    """Add values to a group; a key may be in both only where both hold groups. Raises UsageError."""
    for name, value in more.items():
        if isinstance(group.get(name), dict) and isinstance(value, dict):
            _merge(group[name], value, path)
        elif name in group:
            raise UsageError(f"--config {printable(path)}: {printable(name)} is given twice")
        else:
            group[name] = value


def _split(file: str) -> tuple[str, str]:
    if "\0" in file:
        raise UsageError(f"--config {printable(file)}: a file name has no NUL")
    if _is_file(file):
        return file, ""
    path, _, argument = file.partition(":")
    if not _is_file(path):
        raise UsageError(f"--config {printable(file)}: there is no file {printable(path)}; give FILE or FILE.py:ARG")
    return path, argument


def _is_file(path: str) -> bool:
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):
        return False


def _read_yaml(path: str) -> Mapping[Any, Any]:
    text = read_file(path, max_bytes=_MAX_BYTES, error=UsageError)
    # JSON, such as --print-config prints, is YAML too; but YAML reads 1e-08 as a text.
    with contextlib.suppress(JsonError):
        if isinstance(content := parse_json(text), dict):
            return content
    try:
        import yaml
    except ImportError:
        raise UsageError(f"--config {printable(path)} needs pyyaml: pip install 'qwen-dist[yaml]'") from None
    try:
        _check_events(yaml, text, path)
        content = yaml.load(text, Loader=_strict_loader(yaml))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"--config {printable(path)} is not YAML: {printable(' '.join(str(error).split()))}") from None
    content = {} if content is None else content
    if not isinstance(content, Mapping):
        raise UsageError(f"--config {printable(path)} must hold keys and values; it holds {printable(repr(content), 80)}")
    return content


def _check_events(yaml: Any, text: bytes, path: str) -> None:
    """Refuse aliases, which make a small file a large value, and deep nesting, whose parsing takes minutes."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise UsageError(f"--config {printable(path)}: aliases (*name) are not supported")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise UsageError(f"--config {printable(path)} is nested deeper than {_MAX_DEPTH}")


def _strict_loader(yaml: Any) -> Any:
    """Return YAML's safe loader, which refuses keys that occur twice and numbers that are no sizes."""

    error = yaml.constructor.ConstructorError

    class StrictLoader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen = set()
            pairs = node.value if isinstance(node, yaml.MappingNode) else []
            for key in [key for key, _ in pairs if isinstance(key, yaml.ScalarNode)]:
                if key.value in seen:
                    raise error(None, None, f"the key {key.value!r} occurs twice", key.start_mark)
                seen.add(key.value)
            return super().construct_mapping(node, deep)

        def construct_object(self, node: Any, deep: bool = False) -> Any:
            value = super().construct_object(node, deep)
            if isinstance(value, int) and value.bit_length() > _MAX_BITS:
                raise error(None, None, "a number has too many digits", node.start_mark)
            return value

    return StrictLoader


def _run_python(path: str, argument: str, file: str) -> dict[str, Any]:
    from ml_collections import config_dict

    spec = importlib.util.spec_from_file_location("qwen_dist_run_config", path)
    if spec is None or spec.loader is None:
        raise UsageError(f"--config {printable(file)}: {pathlib.Path(path).name} must end in .py, .yaml, .yml or .json")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config(argument) if hasattr(module, "get_config") else None
    except Exception as error:  # the user's code can raise anything
        raise UsageError(
            f"--config {printable(file)} fails with {type(error).__name__}: {printable(error)}; --debug shows where"
        ) from error
    if not isinstance(config, config_dict.ConfigDict):
        raise UsageError(
            f"--config {printable(file)}: {printable(path)} must have a function get_config(arg) that returns a ConfigDict"
        )
    return config.to_dict()

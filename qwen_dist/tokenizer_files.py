"""The files of a tokenizer beside tokenizer.json: special tokens, stop ids and the sources of the chat templates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from qwen_dist.errors import CheckpointError, printable
from qwen_dist.json_reader import read_file, read_json_object

TOKENIZER_FILE, TOKENIZER_CONFIG, MODEL_CONFIG, GENERATION_CONFIG = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
)
TEMPLATE_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_MAX_TEMPLATE_BYTES = 2**20


def require_files(directory: Path) -> None:
    missing = [name for name in (TOKENIZER_FILE, TOKENIZER_CONFIG, MODEL_CONFIG) if not (directory / name).is_file()]
    if not missing:
        return
    message = f"{directory} has no {', '.join(missing)}: give the directory of a whole checkpoint"
    if TOKENIZER_FILE in missing and (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        message += (
            "; it has vocab.json and merges.txt, from which transformers writes tokenizer.json once: "
            f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
        )
    raise CheckpointError(message)


def _read_text(path: Path) -> str:
    try:
        return read_file(path, max_bytes=_MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from None


def token_text(name: str, token: Any) -> str:
    """Return the text of a special token, given as text or as an object with a `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise CheckpointError(f"{TOKENIZER_CONFIG}: {name} must be a token; got {token!r:.80}")
    return text


def stop_ids(directory: Path, backend: tokenizers.Tokenizer, tokens: Mapping[str, str]) -> frozenset[int]:
    generation = directory / GENERATION_CONFIG
    ids = _eos_ids(read_json_object(generation), generation) if generation.is_file() else frozenset()
    if ids:
        return ids
    config = read_json_object(directory / MODEL_CONFIG)
    ids = _eos_ids(config.get("text_config", config), directory / MODEL_CONFIG)
    if "eos_token" in tokens:
        eos_id = backend.token_to_id(tokens["eos_token"])
        if eos_id is None:
            raise CheckpointError(
                f"{TOKENIZER_CONFIG} names the eos_token {tokens['eos_token']!r}, unknown to {TOKENIZER_FILE}"
            )
        ids |= {eos_id}
    if not ids:
        raise CheckpointError(
            f"no end-of-text id: {GENERATION_CONFIG} or {MODEL_CONFIG} in {directory} must have an eos_token_id"
        )
    return ids


def _eos_ids(config: Mapping[str, Any], path: Path) -> frozenset[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them; got {value!r}")
    return frozenset(ids)


def chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the sources of the chat templates by name. A single template has the name "default"."""
    file, old_file = directory / "chat_template.jinja", directory / "chat_template.json"
    if file.is_file():
        return {"default": _read_text(file)}
    template = read_json_object(old_file).get("chat_template") if old_file.is_file() else config.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list) and all(_is_named_template(entry) for entry in template):
        return {entry["name"]: entry["template"] for entry in template}
    raise CheckpointError(
        f'chat_template in {printable(directory)} must be a string or a list of {{"name", "template"}} with strings; '
        f"got {printable(repr(template), 80)}"
    )


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))

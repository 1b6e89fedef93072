"""The files of a tokenizer besides its vocabulary: settings, special tokens, stop ids and the sources of chat templates.

Each is read strictly: a key is used, known not to change ids and texts, or an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers

from qwen_dist.errors import CheckpointError, printable
from qwen_dist.json_reader import keys_within, read_file, read_json_object, read_optional_object, unusable_keys
from qwen_dist.tokenizer_vocab import MERGES_FILE, VOCAB_FILE

TOKENIZER_FILE, TOKENIZER_CONFIG, MODEL_CONFIG, GENERATION_CONFIG, SPECIAL_TOKENS_MAP = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
    "special_tokens_map.json",
)
TEMPLATE_DIRECTORY = "additional_chat_templates"
TEMPLATE_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_SPECIAL_TOKENS = (*TEMPLATE_TOKENS, "sep_token", "cls_token", "mask_token")
# What transformers takes for a checkpoint that has vocab.json and merges.txt only.
_DEFAULT_TOKENS = dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
_MAX_TEMPLATE_BYTES = 2**20
_MAX_ID = 2**31

# Keys of tokenizer_config.json that are read, or change neither ids nor texts. transformers takes bos and eos from
# tokenizer.json, whatever add_bos_token and add_eos_token say.
_KNOWN_SETTINGS = frozenset(
    """_commit_hash _name_or_path add_bos_token add_eos_token added_tokens_decoder additional_special_tokens auto_map
    backend chat_template device_map errors extra_special_tokens fix_mistral_regex from_slow init_inputs is_local legacy
    local_files_only max_length model_input_names model_max_length model_specific_special_tokens name_or_path
    pad_to_multiple_of pad_token_type_id padding padding_side processor_class return_tensors sp_model_kwargs
    spaces_between_special_tokens special_tokens_map_file stride tokenizer_class tokenizer_file transformers_version
    truncation truncation_side truncation_strategy unsloth_version use_default_system_prompt use_fast verbose
    vocab_size""".split()
)
# Keys that change ids or texts unless they are false.
_FALSE_SETTINGS = frozenset({"add_prefix_space", "clean_up_tokenization_spaces", "split_special_tokens"})


def require_files(directory: Path) -> None:
    has_vocab = all((directory / name).exists() for name in (VOCAB_FILE, MERGES_FILE))
    needed = (MODEL_CONFIG,) if has_vocab else (TOKENIZER_FILE, TOKENIZER_CONFIG, MODEL_CONFIG)
    missing = [name for name in needed if not (directory / name).exists()]
    if not missing:
        return
    raise CheckpointError(f"{directory} has no {', '.join(missing)}: give the directory of a whole checkpoint")


def read_settings(directory: Path, ignored_keys: Iterable[str] = ()) -> dict[str, Any]:
    """Return tokenizer_config.json; without `added_tokens_decoder`, special_tokens_map.json replaces its tokens.

    Raises:
      CheckpointError: listing every key that is not understood.
    """
    has_vocabulary = (directory / TOKENIZER_FILE).exists()
    settings = ({} if has_vocabulary else _DEFAULT_TOKENS) | (read_optional_object(directory / TOKENIZER_CONFIG) or {})
    if "added_tokens_decoder" not in settings:
        settings |= read_optional_object(directory / SPECIAL_TOKENS_MAP) or {}
    ignored = keys_within("tokenizer_config", ignored_keys)
    settings = {key: value for key, value in settings.items() if value is not None and key not in ignored}
    problems = []
    for key, value in settings.items():
        if value is False or (key.endswith("_token") and key not in _KNOWN_SETTINGS):
            continue
        shown = f"{printable(key, 80)} = {printable(json.dumps(value), 80)}"
        if key in _FALSE_SETTINGS or (key in ("add_bos_token", "add_eos_token") and not has_vocabulary):
            problems.append(f"{shown} is not supported; supported is false")
        elif key not in _KNOWN_SETTINGS:
            problems.append(f"{shown} is not understood")
    if problems:
        raise unusable_keys(directory / TOKENIZER_CONFIG, problems)
    return settings


def special_tokens(settings: Mapping[str, Any]) -> list[str]:
    """Return the texts of all special tokens that the settings name, each once."""
    named = [key for key in settings if key in _SPECIAL_TOKENS or (key.endswith("_token") and not key.startswith("add_"))]
    texts = [token_text(key, settings[key]) for key in named if settings[key]]
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    if not isinstance(extra, list):
        raise CheckpointError(f"{TOKENIZER_CONFIG}: extra_special_tokens must be a list; got {printable(repr(extra), 80)}")
    texts += [token_text("extra_special_tokens", token) for token in extra]
    return list(dict.fromkeys(texts))


def _read_text(path: Path) -> str:
    try:
        return read_file(path, max_bytes=_MAX_TEMPLATE_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from None


def token_text(name: str, token: Any) -> str:
    """Return the text of a special token, given as text or as an object with a `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise CheckpointError(f"{TOKENIZER_CONFIG}: {name} must be a token; got {printable(repr(token), 80)}")
    return text


def stop_ids(directory: Path, backend: tokenizers.Tokenizer, tokens: Mapping[str, str]) -> frozenset[int]:
    generation = directory / GENERATION_CONFIG
    ids = _eos_ids(read_optional_object(generation) or {}, generation)
    if ids:
        return ids
    config = read_json_object(directory / MODEL_CONFIG)
    text_config = config.get("text_config", config)
    ids = _eos_ids(text_config if isinstance(text_config, dict) else config, directory / MODEL_CONFIG)
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
    if not all(isinstance(id, int) and not isinstance(id, bool) and 0 <= id < _MAX_ID for id in ids):
        raise CheckpointError(
            f"{path}: eos_token_id must be a token id or a list of them; got {printable(repr(value), 80)}"
        )
    return frozenset(ids)


def chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the sources of the chat templates by name. A single template has the name "default".

    A file chat_template.jinja or chat_template.json takes precedence over tokenizer_config.json, and the files in
    additional_chat_templates, each a named template, over both.
    """
    file, old_file = directory / "chat_template.jinja", directory / "chat_template.json"
    if file.exists():
        templates = {"default": _read_text(file)}
    elif old_file.exists():
        templates = _named_templates(read_json_object(old_file).get("chat_template"), old_file)
    else:
        templates = _named_templates(config.get("chat_template"), directory / TOKENIZER_CONFIG)
    return templates | {path.stem: _read_text(path) for path in _template_files(directory)}


def _template_files(directory: Path) -> Iterator[Path]:
    folder = directory / TEMPLATE_DIRECTORY
    yield from sorted(folder.glob("*.jinja")) if folder.is_dir() else ()


def _named_templates(template: Any, path: Path) -> dict[str, str]:
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list) and all(_is_named_template(entry) for entry in template):
        return {entry["name"]: entry["template"] for entry in template}
    raise CheckpointError(
        f'{printable(path)}: chat_template must be a string or a list of {{"name", "template"}} with strings; '
        f"got {printable(repr(template), 80)}"
    )


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))

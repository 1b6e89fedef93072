"""The files of a tokenizer besides its vocabulary: settings, special tokens, stop ids and the sources of chat templates.

Each is read strictly: a key is used, known not to change ids and texts, or an error.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

import tokenizers

from qwen_dist.errors import CheckpointError, printable
from qwen_dist.json_reader import keys_within, unusable_keys
from qwen_dist.storage.model_files import ModelFiles
from qwen_dist.tokenizer_vocab import MERGES_FILE, TOKENIZER_FILE, VOCAB_FILE

TOKENIZER_CONFIG, SPECIAL_TOKENS_MAP = "tokenizer_config.json", "special_tokens_map.json"
MODEL_CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
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


def require_files(files: ModelFiles) -> None:
    has_vocab = all(files.read(name) is not None for name in (VOCAB_FILE, MERGES_FILE))
    needed = (MODEL_CONFIG,) if has_vocab else (TOKENIZER_FILE, TOKENIZER_CONFIG, MODEL_CONFIG)
    missing = [name for name in needed if files.read(name) is None]
    if not missing:
        return
    raise CheckpointError(
        f"{printable(files.folder)} has no {', '.join(missing)}: give the directory of a whole checkpoint"
    )


def read_settings(files: ModelFiles, ignored_keys: Iterable[str] = ()) -> dict[str, Any]:
    """Return tokenizer_config.json; without `added_tokens_decoder`, special_tokens_map.json replaces its tokens.

    Raises:
      CheckpointError: listing every key that is not understood.
    """
    has_vocabulary = files.read(TOKENIZER_FILE) is not None
    settings = ({} if has_vocabulary else _DEFAULT_TOKENS) | dict(files.read_object(TOKENIZER_CONFIG) or {})
    if "added_tokens_decoder" not in settings:
        settings |= files.read_object(SPECIAL_TOKENS_MAP) or {}
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
        raise unusable_keys(files.path(TOKENIZER_CONFIG), problems)
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


def _template_text(files: ModelFiles, name: str, content: bytes) -> str:
    if len(content) > _MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{files.path(name)} has {len(content)} bytes; at most {_MAX_TEMPLATE_BYTES} are read")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{files.path(name)} cannot be read: {error}; download it again") from None


def token_text(name: str, token: Any) -> str:
    """Return the text of a special token, given as text or as an object with a `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not text:
        raise CheckpointError(f"{TOKENIZER_CONFIG}: {name} must be a token; got {printable(repr(token), 80)}")
    return text


def stop_ids(files: ModelFiles, backend: tokenizers.Tokenizer, tokens: Mapping[str, str]) -> frozenset[int]:
    ids = _eos_ids(files.read_object(GENERATION_CONFIG) or {}, files.path(GENERATION_CONFIG))
    if ids:
        return ids
    text_config = files.config.get("text_config", files.config)
    ids = _eos_ids(text_config if isinstance(text_config, dict) else files.config, files.path(MODEL_CONFIG))
    if "eos_token" in tokens:
        eos_id = backend.token_to_id(tokens["eos_token"])
        if eos_id is None:
            raise CheckpointError(
                f"{TOKENIZER_CONFIG} names the eos_token {tokens['eos_token']!r}, unknown to {TOKENIZER_FILE}"
            )
        ids |= {eos_id}
    if not ids:
        raise CheckpointError(
            f"no end-of-text id: {GENERATION_CONFIG} or {MODEL_CONFIG} in {printable(files.folder)} must have an "
            "eos_token_id"
        )
    return ids


def _eos_ids(config: Mapping[str, Any], path: str) -> frozenset[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) and 0 <= id < _MAX_ID for id in ids):
        raise CheckpointError(
            f"{path}: eos_token_id must be a token id or a list of them; got {printable(repr(value), 80)}"
        )
    return frozenset(ids)


def chat_templates(files: ModelFiles, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the sources of the chat templates by name. A single template has the name "default".

    A file chat_template.jinja or chat_template.json takes precedence over tokenizer_config.json, and the files in
    additional_chat_templates, each a named template, over both.
    """
    file, old_file = "chat_template.jinja", "chat_template.json"
    if (content := files.read(file)) is not None:
        templates = {"default": _template_text(files, file, content)}
    elif (old := files.read_object(old_file)) is not None:
        templates = _named_templates(old.get("chat_template"), files.path(old_file))
    else:
        templates = _named_templates(config.get("chat_template"), files.path(TOKENIZER_CONFIG))
    for name in files.folder.template_files():
        if (content := files.read(name)) is not None:
            templates[PurePosixPath(name).stem] = _template_text(files, name, content)
    return templates


def _named_templates(template: Any, path: str) -> dict[str, str]:
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    if isinstance(template, list) and all(_is_named_template(entry) for entry in template):
        return {entry["name"]: entry["template"] for entry in template}
    raise CheckpointError(
        f'{path}: chat_template must be a string or a list of {{"name", "template"}} with strings; '
        f"got {printable(repr(template), 80)}"
    )


def _is_named_template(entry: Any) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))

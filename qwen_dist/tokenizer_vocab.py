"""The vocabulary of a tokenizer: tokenizer.json, or vocab.json and merges.txt, and the tokens that other files add.

Tokens are added as transformers adds them: those of `added_tokens_decoder` in tokenizer_config.json, or without it those of
added_tokens.json, then special tokens that are still unknown.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from qwen_dist.errors import CheckpointError, printable
from qwen_dist.storage.model_files import ModelFiles

TOKENIZER_FILE, VOCAB_FILE, MERGES_FILE = "tokenizer.json", "vocab.json", "merges.txt"
ADDED_TOKENS_FILE = "added_tokens.json"
# How Qwen's tokenizers split a text. Each digit is one token. From Qwen3.5 on, combining marks belong to words.
_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?%s+|\p{N}| ?[^\s%s\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS, _LETTERS_AND_MARKS = (r"\p{L}", r"\p{L}"), (r"[\p{L}\p{M}]", r"\p{L}\p{M}")
_FLAGS = ("lstrip", "normalized", "rstrip", "single_word", "special")
_MAX_ID = 2**31


def read_backend(files: ModelFiles) -> tokenizers.Tokenizer | None:
    """Read tokenizer.json, if it exists. Raises CheckpointError."""
    content = files.read(TOKENIZER_FILE)
    if content is None:
        return None
    try:
        with panics_as_errors(files.path(TOKENIZER_FILE)):
            return tokenizers.Tokenizer.from_buffer(content)
    except CheckpointError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{files.path(TOKENIZER_FILE)} cannot be read: {printable(error)}; download it again"
        ) from error


@contextlib.contextmanager
def panics_as_errors(file: str) -> Iterator[None]:
    """Raise CheckpointError where the library stops in the middle, as at a pattern of the file that takes too long."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # pyo3 exports no name; it is no Exception
            raise
        raise CheckpointError(f"{file} cannot be used with this text: {printable(error)}") from None


def build_backend(files: ModelFiles) -> tokenizers.Tokenizer:
    """Return the byte-level BPE of vocab.json and merges.txt with Qwen's normalisation and pre-tokenisation.

    Raises CheckpointError when one of the files cannot be used.
    """
    vocab = dict(files.read_object(VOCAB_FILE) or {})
    if not all(_is_id(id) for id in vocab.values()) or len(set(vocab.values())) != len(vocab):
        raise CheckpointError(f"{files.path(VOCAB_FILE)} must give every token a different id; download it again")
    try:
        lines = (files.read(MERGES_FILE) or b"").decode("utf-8").split("\n")
        merges = [_merge(line) for line in lines if line and not line.startswith("#version")]
        backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{files.path(MERGES_FILE)} cannot be used: {printable(error)}; download it again") from None
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_PATTERN % _word_characters(files)), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _word_characters(files: ModelFiles) -> tuple[str, str]:
    """Return what words consist of, for both places of `_PATTERN`: as transformers does, by the model's type."""
    config = files.read_object("config.json") or {}
    text = config.get("text_config")
    model_type = (text if isinstance(text, dict) else config).get("model_type")
    return _LETTERS_AND_MARKS if str(model_type).startswith("qwen3_5") else _LETTERS


def _merge(line: str) -> tuple[str, str]:
    parts = line.removesuffix("\r").split(" ")
    if len(parts) != 2:
        raise ValueError(f"the line {line[:80]!r} is not a pair of tokens")
    return parts[0], parts[1]


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _MAX_ID


def add_tokens(
    backend: tokenizers.Tokenizer, files: ModelFiles, config: Mapping[str, Any], special_tokens: Iterable[str]
) -> None:
    """Add the tokens that the vocabulary lacks.

    Args:
      backend: is changed.
      files: for added_tokens.json.
      config: tokenizer_config.json, for `added_tokens_decoder`.
      special_tokens: texts of the special tokens, added last if they are unknown.

    Raises:
      CheckpointError: an entry is invalid, or a token would not get the id that the file gives it.
    """
    special = list(special_tokens)
    if "added_tokens_decoder" in config:
        name, tokens = "tokenizer_config.json: added_tokens_decoder", _decoder_tokens(config["added_tokens_decoder"])
    else:
        name, tokens = ADDED_TOKENS_FILE, _file_tokens(files, set(special))
    for id, token in sorted(tokens.items()):
        backend.add_tokens([token])
        if backend.token_to_id(token.content) != id:
            raise CheckpointError(
                f"{name} gives the token {printable(repr(token.content), 80)} the id {id}, but in this vocabulary it has "
                f"{backend.token_to_id(token.content)}: the files are not of the same tokenizer"
            )
    backend.add_tokens([AddedToken(text, special=True) for text in special if backend.token_to_id(text) is None])


def _decoder_tokens(entries: Any) -> dict[int, AddedToken]:
    """Return the tokens of `added_tokens_decoder`, {"151643": {"content": …, "special": …, …}}, by id."""
    if not isinstance(entries, dict):
        raise _wrong_entry(entries)
    tokens = {}
    for id, entry in entries.items():
        is_valid = id.isascii() and id.isdigit() and _is_id(int(id)) and isinstance(entry, dict)
        flags = dict(entry) if is_valid else {}
        flags.pop("__type", None)
        content = flags.pop("content", None)
        if not isinstance(content, str) or not content or not _are_flags(flags):
            raise _wrong_entry({id: entry})
        tokens[int(id)] = AddedToken(content, **flags)
    return tokens


def _are_flags(flags: Mapping[str, Any]) -> bool:
    return all(flag in _FLAGS and isinstance(value, bool) for flag, value in flags.items())


def _wrong_entry(entry: Any) -> CheckpointError:
    return CheckpointError(
        'tokenizer_config.json: added_tokens_decoder must hold entries such as {"151643": {"content": "<|endoftext|>", '
        f'"special": true}}}}, with the flags {", ".join(_FLAGS)}; got {printable(repr(entry), 80)}'
    )


def _file_tokens(files: ModelFiles, special: set[str]) -> dict[int, AddedToken]:
    """Return the tokens of added_tokens.json, {"<|endoftext|>": 151643, …}, by id."""
    ids = files.read_object(ADDED_TOKENS_FILE) or {}
    if not all(text and _is_id(id) for text, id in ids.items()) or len(set(ids.values())) != len(ids):
        raise CheckpointError(
            f"{files.path(ADDED_TOKENS_FILE)} must give every token a different id; got {printable(repr(ids), 80)}"
        )
    return {id: AddedToken(text, normalized=text not in special, special=text in special) for text, id in ids.items()}

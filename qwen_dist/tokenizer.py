"""The tokenizer: tokenizer.json, the chat template, incremental decoding and stop strings.

It needs neither transformers nor jax: `tokenizers` reads tokenizer.json and a sandboxed `jinja2` renders the chat template.
Decoding is done here byte by byte, so that a stream never shows half a character.
"""

from __future__ import annotations

import codecs
import datetime
import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import tokenizers

from qwen_dist.errors import CheckpointError, UserError

Message = Mapping[str, Any]

_TOKENIZER_FILE, _TOKENIZER_CONFIG, _MODEL_CONFIG, _GENERATION_CONFIG = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
)
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A byte-level tokenizer with its chat template and stop token ids.

    Attributes:
      stop_ids: generation stops at any of these token ids.
      stop_texts: the text of these tokens.
      eos_token_id: the id of the tokenizer's eos_token; without one, the smallest of the stop ids.
      vocab_size: one more than the largest id that `encode` can return.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        stop_ids: frozenset[int],
        chat_templates: Mapping[str, str],
        template_tokens: Mapping[str, str],
    ):
        if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
            raise CheckpointError(
                f"{_TOKENIZER_FILE} has the decoder {backend.decoder}; every Qwen tokenizer is byte-level (ByteLevel): "
                "is this a Qwen checkpoint?"
            )
        backend.no_truncation()
        backend.no_padding()
        self.stop_ids = stop_ids
        self.stop_texts = tuple(token for id in sorted(stop_ids) if (token := backend.id_to_token(id)))
        self.eos_token_id = backend.token_to_id(template_tokens.get("eos_token", "")) or min(stop_ids)
        added = backend.get_added_tokens_decoder()
        self.vocab_size = max([backend.get_vocab_size(with_added_tokens=False), *(id + 1 for id in added)])
        self._backend = backend
        self._chat_templates = chat_templates
        self._template_tokens = template_tokens
        self._special_ids = frozenset(id for id, token in added.items() if token.special)

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> Tokenizer:
        """Read the tokenizer of a checkpoint directory.

        The stop ids are those of generation_config.json. If it has none, they are those of config.json and the tokenizer's
        eos_token. A chat_template.jinja or chat_template.json file takes precedence over tokenizer_config.json.

        Raises:
          CheckpointError: files are missing (all are listed) or invalid.
        """
        directory = Path(path)
        _require_files(directory)
        config = _read_json(directory / _TOKENIZER_CONFIG)
        try:
            backend = tokenizers.Tokenizer.from_file(str(directory / _TOKENIZER_FILE))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{directory / _TOKENIZER_FILE} cannot be read: {error}; download it again") from error
        tokens = {name: _token_text(name, config[name]) for name in _TEMPLATE_TOKENS if config.get(name)}
        return cls(backend, _stop_ids(directory, backend, tokens), _chat_templates(directory, config), tokens)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`. The text of a special token, such as `<|im_end|>`, becomes that token.

        Raises:
          UserError: `text` contains a lone surrogate, which is not a character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text has half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}, "
                "which is not a character: remove it or add the other half"
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Return the text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids without a token are skipped."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, id: int) -> bytes:
        """Return the bytes of one token: often only part of a character, empty for an unused id."""
        token = self._backend.id_to_token(id)
        if token is None:
            return b""
        decoder = _byte_decoder()
        # Added tokens are stored as plain text, not in the byte alphabet. ASCII ones look the same in both.
        return bytes(decoder[char] for char in token) if all(char in decoder for char in token) else token.encode()

    def is_special(self, id: int) -> bool:
        """Return whether `decode` omits this token when it skips special tokens."""
        return id in self._special_ids

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Return the ids of a conversation in the checkpoint's chat template. Arguments as in `render_chat`."""
        text = self.render_chat(messages, add_generation_prompt, **variables)
        # The template already contains every special token.
        return self.encode(text, add_special_tokens=False)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """Return the text of a conversation in the checkpoint's chat template.

        Args:
          messages: `{"role", "content"}` dicts. The content is a string or a list of `{"type": "text", "text"}` parts,
            which are joined. It may be missing only if the message has `tool_calls`.
          add_generation_prompt: end with the start of the assistant's turn.
          **variables: other variables of the template, such as `tools` or `enable_thinking`.

        Raises:
          UserError: the messages are invalid (every problem is listed), or the template rejects them.
          CheckpointError: there is no chat template, or it is invalid.
        """
        template = _compile_template(self._chat_template(bool(variables.get("tools"))))
        inputs = {
            "tools": None,
            "documents": None,
            **self._template_tokens,
            **variables,
            "messages": _validate_messages(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            # The template is untrusted code: it gets plain JSON values only, no objects to escape the sandbox with.
            return template.render(json.loads(json.dumps(inputs)))
        except Exception as error:  # template code can raise anything
            raise UserError(f"the chat template cannot be rendered with these messages: {error}") from error

    def _chat_template(self, has_tools: bool) -> str:
        names = ("tool_use", "default") if has_tools else ("default",)
        for name in names:
            if name in self._chat_templates:
                return self._chat_templates[name]
        raise CheckpointError(
            "the checkpoint has no chat template (a base model?): use plain prompts without the template (--raw), "
            "or add a chat_template.jinja to its directory"
        )


class StreamDecoder:
    """An incremental detokenizer. Returned text is final; concatenated, it equals `Tokenizer.decode`.

    A character is returned with the token that completes it, so U+FFFD appears only where the bytes are not UTF-8. The
    state is at most three bytes. Example: "日" as the tokens E6 | 97 A5 gives "" then "日".
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """Return the text that becomes final with token `id`."""
        if self._skip_special_tokens and self._tokenizer.is_special(id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """Return the end of the text: U+FFFD if the last character is incomplete, otherwise nothing."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """End a streamed text before the first stop string that it completes, independent of how the text is divided.

    If two stop strings end at the same character, the longer one counts. With stops ["END"] the texts "an E", "N", "D of"
    give "an ", "", "", and `stopped` is "END".

    Attributes:
      stopped: the stop string that ended the text, or None.

    Raises:
      UserError: a stop string is empty or not a string.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = tuple(stops)
        wrong = [stop for stop in self._stops if not isinstance(stop, str) or not stop]
        if wrong:
            raise UserError(f"stop strings must be non-empty strings; got {', '.join(map(repr, wrong))}")
        self.stopped: str | None = None
        self._buffer = ""

    def push(self, text: str) -> str:
        """Add text, and return the text that is final: up to a stop string, or up to a possible start of one."""
        if self.stopped is not None:
            return ""
        text = self._buffer + text
        matches = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            _, start, self.stopped = min(matches)
            self._buffer = ""
            return text[:start]
        shown = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._buffer = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """Return the text that was held back, at the end of a text without a stop string."""
        buffered, self._buffer = self._buffer, ""
        return buffered


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


@functools.cache
def _byte_decoder() -> dict[str, int]:
    """Return GPT-2's map from character to byte: printable Latin-1 maps to itself, U+0100 and up to the other bytes."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    printable = {char: ord(char) for char in alphabet if ord(char) < 256}
    moved = sorted(set(range(256)) - set(printable.values()))
    return printable | dict(zip(alphabet[len(printable) :], moved, strict=True))


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`, which marks text to train on. It renders its contents."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache
def _compile_template(source: str) -> jinja2.Template:
    """Compile a chat template with the filters and globals of transformers (`utils/chat_template_utils.py`)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"the checkpoint's chat template is broken: line {error.lineno}: {error}") from error


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which the model was not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _validate_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return the messages with joined text parts and without None values. Raises UserError with every problem."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f'messages must be a non-empty list of {{"role", "content"}} objects; got {messages!r:.80}')
    problems = [f"messages[{i}]: {problem}" for i, message in enumerate(messages) for problem in _message_problems(message)]
    if problems:
        raise UserError("; ".join(problems))
    return [
        {key: _join_text_parts(value) if key == "content" else value for key, value in message.items() if value is not None}
        for message in messages
    ]


def _message_problems(message: Any) -> list[str]:
    if not isinstance(message, Mapping):
        return [f'must be an object with "role" and "content"; got {message!r:.80}']
    problems = []
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        problems.append(f'"role" must be a string such as "user"; got {role!r:.80}')
    if content is None:
        if not message.get("tool_calls"):
            problems.append('"content" is missing')
    elif isinstance(content, list):
        problems += [
            f'content[{j}] must be {{"type": "text", "text": "…"}} (this model reads text only); got {part!r:.80}'
            for j, part in enumerate(content)
            if not _is_text_part(part)
        ]
    elif not isinstance(content, str):
        problems.append(f'"content" must be a string or a list of text parts; got {content!r:.80}')
    return problems


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _join_text_parts(content: str | list[Mapping[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _require_files(directory: Path) -> None:
    missing = [name for name in (_TOKENIZER_FILE, _TOKENIZER_CONFIG, _MODEL_CONFIG) if not (directory / name).is_file()]
    if not missing:
        return
    message = f"{directory} has no {', '.join(missing)}: give the directory of a whole checkpoint"
    if _TOKENIZER_FILE in missing and (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
        message += (
            "; it has vocab.json and merges.txt, from which transformers writes tokenizer.json once: "
            f"AutoTokenizer.from_pretrained({str(directory)!r}).save_pretrained({str(directory)!r})"
        )
    raise CheckpointError(message)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; download it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; it holds {content!r:.80}")
    return content


def _token_text(name: str, token: Any) -> str:
    """Return the text of a special token, given as text or as an object with a `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise CheckpointError(f"{_TOKENIZER_CONFIG}: {name} must be a token; got {token!r:.80}")
    return text


def _stop_ids(directory: Path, backend: tokenizers.Tokenizer, tokens: Mapping[str, str]) -> frozenset[int]:
    generation = directory / _GENERATION_CONFIG
    ids = _eos_ids(_read_json(generation), generation) if generation.is_file() else frozenset()
    if ids:
        return ids
    config = _read_json(directory / _MODEL_CONFIG)
    ids = _eos_ids(config.get("text_config", config), directory / _MODEL_CONFIG)
    if "eos_token" in tokens:
        eos_id = backend.token_to_id(tokens["eos_token"])
        if eos_id is None:
            raise CheckpointError(
                f"{_TOKENIZER_CONFIG} names the eos_token {tokens['eos_token']!r}, unknown to {_TOKENIZER_FILE}"
            )
        ids |= {eos_id}
    if not ids:
        raise CheckpointError(
            f"no end-of-text id: {_GENERATION_CONFIG} or {_MODEL_CONFIG} in {directory} must have an eos_token_id"
        )
    return ids


def _eos_ids(config: Mapping[str, Any], path: Path) -> frozenset[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them; got {value!r}")
    return frozenset(ids)


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the sources of the chat templates by name. A single template has the name "default"."""
    file, old_file = directory / "chat_template.jinja", directory / "chat_template.json"
    if file.is_file():
        return {"default": _read_text(file)}
    template = _read_json(old_file).get("chat_template") if old_file.is_file() else config.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    try:
        return {value["name"]: value["template"] for value in template}
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f'chat_template in {directory} must be a string or a list of {{"name", "template"}}; got {template!r:.80}'
        ) from error

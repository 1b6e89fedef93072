"""Text to token ids and back: tokenizer.json, the chat template, incremental decoding and stop strings.

No transformers and no jax: `tokenizers` reads tokenizer.json, a sandboxed `jinja2` renders the chat template, and the
way back is done here, byte by byte, so that a stream never shows half a character.
"""

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

_TOKENIZER, _SETTINGS, _MODEL, _GENERATION = (
    "tokenizer.json",
    "tokenizer_config.json",
    "config.json",
    "generation_config.json",
)
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A byte-level tokenizer with its chat template and the ids that end an answer.

    Attributes:
      stop_ids: generation stops at any of these token ids.
      stop_texts: those tokens as they stand in a rendered conversation.
      end_id: the one of them that ends a text: the tokenizer's eos_token, if it has one.
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
                f"{_TOKENIZER} has the decoder {backend.decoder}; every Qwen tokenizer is byte-level (ByteLevel): "
                "is this a Qwen checkpoint?"
            )
        backend.no_truncation()
        backend.no_padding()
        self.stop_ids = stop_ids
        self.stop_texts = tuple(token for id in sorted(stop_ids) if (token := backend.id_to_token(id)))
        self.end_id = backend.token_to_id(template_tokens.get("eos_token", "")) or min(stop_ids)
        added = backend.get_added_tokens_decoder()
        self.vocab_size = max([backend.get_vocab_size(with_added_tokens=False), *(id + 1 for id in added)])
        self._backend = backend
        self._chat_templates = chat_templates
        self._template_tokens = template_tokens
        self._special_ids = frozenset(id for id, token in added.items() if token.special)

    @classmethod
    def from_directory(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Reads the tokenizer of a checkpoint directory.

        The stop ids are those of generation_config.json; where it names none, those of config.json and the
        tokenizer's eos_token. A chat_template.jinja or chat_template.json file wins over tokenizer_config.json.

        Raises:
          CheckpointError: files are missing (all are named) or cannot be understood.
        """
        directory = Path(path)
        _require_files(directory)
        settings = _read_json(directory / _SETTINGS)
        try:
            backend = tokenizers.Tokenizer.from_file(str(directory / _TOKENIZER))
        except Exception as error:  # the library raises nothing narrower
            raise CheckpointError(f"{directory / _TOKENIZER} cannot be read: {error}; download it again") from error
        tokens = {name: _token_text(name, settings[name]) for name in _TEMPLATE_TOKENS if settings.get(name)}
        return cls(backend, _stop_ids(directory, backend, tokens), _chat_templates(directory, settings), tokens)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`; special tokens written out in it, such as `<|im_end|>`, become their own ids.

        Raises:
          UserError: `text` holds a lone surrogate, which is not a character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text has half of a surrogate pair (U+{ord(text[error.start]):04X}) at character {error.start}, "
                "which is not a character: remove it or write the whole pair"
            ) from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are not UTF-8 become U+FFFD, ids without a token become nothing."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def token_bytes(self, id: int) -> bytes:
        """The bytes that one token adds to the text: often only a part of a character, empty for an unused id."""
        token = self._backend.id_to_token(id)
        if token is None:
            return b""
        byte_of = _byte_alphabet()
        # An added token is written in plain text: `<|im_end|>` reads the same both ways, a Chinese one does not.
        return bytes(byte_of[char] for char in token) if all(char in byte_of for char in token) else token.encode()

    def is_special(self, id: int) -> bool:
        """Whether `decode` leaves this token out when it skips special tokens."""
        return id in self._special_ids

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """The ids of a conversation as the model was trained to read it; arguments as `render_chat`."""
        text = self.render_chat(messages, add_generation_prompt, **variables)
        # The template has written every special token already.
        return self.encode(text, add_special_tokens=False)

    def render_chat(self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The text of a conversation, by the checkpoint's chat template.

        Args:
          messages: `{"role", "content"}` dicts. The content is a string or a list of `{"type": "text", "text"}` parts,
            which are joined; it may be missing only where the assistant calls tools (`tool_calls`).
          add_generation_prompt: end with the opening of the assistant's answer.
          **variables: what else the template reads, such as `tools` or `enable_thinking`.

        Raises:
          UserError: the messages are not a conversation (every fault is named), or the template refuses them.
          CheckpointError: there is no chat template, or it is not a valid one.
        """
        template = _compile_template(self._chat_template(bool(variables.get("tools"))))
        inputs = {
            "tools": None,
            "documents": None,
            **self._template_tokens,
            **variables,
            "messages": _checked_messages(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            # The template is code that came with the weights: it sees plain JSON values, no object to reach out by.
            return template.render(json.loads(json.dumps(inputs)))
        except Exception as error:  # whatever code from outside can raise
            raise UserError(f"the chat template cannot be rendered with these messages: {error}") from error

    def _chat_template(self, has_tools: bool) -> str:
        names = ("tool_use", "default") if has_tools else ("default",)
        for name in names:
            if name in self._chat_templates:
                return self._chat_templates[name]
        raise CheckpointError(
            "the checkpoint has no chat template (a base model?): give plain prompts without the template, "
            "or put a chat_template.jinja into its directory"
        )


class StreamDecoder:
    """Decodes an answer token by token: what has been returned is final, and together it is `Tokenizer.decode`.

    A character is returned with the token that completes it, so U+FFFD appears only where the bytes are not UTF-8 at
    all. The state is at most three bytes, whatever the length: "日" may come as tokens E6 | 97 A5, giving "" then "日".
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        """The text that became final with token `id`."""
        if self._skip_special_tokens and self._tokenizer.is_special(id):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(id))

    def flush(self) -> str:
        """The end of the text: U+FFFD when the last character was never completed, else nothing."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Ends a streamed text before the first stop string that is completed, wherever the pieces are cut.

    Of two stop strings completed by the same character the longer one counts. With stops ["END"] the pieces "an E",
    "N", "D of" give "an ", "", "" and `stopped` is "END".

    Attributes:
      stopped: the stop string that ended the text, None while there was none.

    Raises:
      UserError: a stop string is empty or not a string.
    """

    def __init__(self, stops: Iterable[str]):
        self._stops = tuple(stops)
        wrong = [stop for stop in self._stops if not isinstance(stop, str) or not stop]
        if wrong:
            raise UserError(f"stop strings must be non-empty strings; got {', '.join(map(repr, wrong))}")
        self.stopped: str | None = None
        self._held = ""

    def push(self, text: str) -> str:
        """What of the text so far can be shown: all before a stop string, less what may be the beginning of one."""
        if self.stopped is not None:
            return ""
        text = self._held + text
        matches = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            _, start, self.stopped = min(matches)
            self._held = ""
            return text[:start]
        shown = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[shown:]
        return text[:shown]

    def flush(self) -> str:
        """What was held back, when the text ends without a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins, short of the whole stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """Character -> byte, as GPT-2 writes bytes in its vocabulary: printable Latin-1 as itself, the rest from U+0100."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    printable = {char: ord(char) for char in alphabet if ord(char) < 256}
    moved = sorted(set(range(256)) - set(printable.values()))
    return printable | dict(zip(alphabet[len(printable) :], moved, strict=True))


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`, which marks what to train on: renders what it holds."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache
def _compile_template(source: str) -> jinja2.Template:
    """The chat template with what transformers offers to one (`utils/chat_template_utils.py`)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
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
    # jinja2's own filter escapes <, > and & for HTML, which a model has never seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _checked_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages with joined text parts and without None values, or one error that names every fault."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f'messages must be a non-empty list of {{"role", "content"}} objects; got {messages!r:.80}')
    faults = [f"messages[{i}]: {fault}" for i, message in enumerate(messages) for fault in _message_faults(message)]
    if faults:
        raise UserError("; ".join(faults))
    return [
        {key: _joined(value) if key == "content" else value for key, value in message.items() if value is not None}
        for message in messages
    ]


def _message_faults(message: Any) -> list[str]:
    if not isinstance(message, Mapping):
        return [f'must be an object with "role" and "content"; got {message!r:.80}']
    faults = []
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        faults.append(f'"role" must be a string such as "user"; got {role!r:.80}')
    if content is None:
        if not message.get("tool_calls"):
            faults.append('"content" is missing')
    elif isinstance(content, list):
        faults += [
            f'content[{j}] must be {{"type": "text", "text": "…"}} (this model reads text only); got {part!r:.80}'
            for j, part in enumerate(content)
            if not _is_text_part(part)
        ]
    elif not isinstance(content, str):
        faults.append(f'"content" must be a string or a list of text parts; got {content!r:.80}')
    return faults


def _is_text_part(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _joined(content: str | list[Mapping[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _require_files(directory: Path) -> None:
    missing = [name for name in (_TOKENIZER, _SETTINGS, _MODEL) if not (directory / name).is_file()]
    if not missing:
        return
    message = f"{directory} has no {', '.join(missing)}: give the directory of a whole checkpoint"
    if _TOKENIZER in missing and (directory / "vocab.json").is_file() and (directory / "merges.txt").is_file():
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
    """A special token is written as its text, or as an object with its text and matching rules."""
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str):
        raise CheckpointError(f"{_SETTINGS}: {name} must be a token; got {token!r:.80}")
    return text


def _stop_ids(directory: Path, backend: tokenizers.Tokenizer, tokens: Mapping[str, str]) -> frozenset[int]:
    generation = directory / _GENERATION
    ids = _eos_ids(_read_json(generation), generation) if generation.is_file() else frozenset()
    if ids:
        return ids
    config = _read_json(directory / _MODEL)
    ids = _eos_ids(config.get("text_config", config), directory / _MODEL)
    if "eos_token" in tokens:
        eos_id = backend.token_to_id(tokens["eos_token"])
        if eos_id is None:
            raise CheckpointError(f"{_SETTINGS} names the eos_token {tokens['eos_token']!r}, unknown to {_TOKENIZER}")
        ids |= {eos_id}
    if not ids:
        raise CheckpointError(f"no end-of-text id: {_GENERATION} or {_MODEL} in {directory} must name an eos_token_id")
    return ids


def _eos_ids(config: Mapping[str, Any], path: Path) -> frozenset[int]:
    named = config.get("eos_token_id")
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
        raise CheckpointError(f"{path}: eos_token_id must be a token id or a list of them; got {named!r}")
    return frozenset(ids)


def _chat_templates(directory: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Name -> source of the chat templates; a checkpoint with a single one has it under "default"."""
    file, old_file = directory / "chat_template.jinja", directory / "chat_template.json"
    if file.is_file():
        return {"default": _read_text(file)}
    template = _read_json(old_file).get("chat_template") if old_file.is_file() else settings.get("chat_template")
    if template is None:
        return {}
    if isinstance(template, str):
        return {"default": template}
    try:
        return {named["name"]: named["template"] for named in template}
    except (TypeError, KeyError) as error:
        raise CheckpointError(
            f'chat_template in {directory} must be a string or a list of {{"name", "template"}}; got {template!r:.80}'
        ) from error

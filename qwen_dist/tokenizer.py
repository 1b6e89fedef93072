"""The tokenizer: tokenizer.json, the chat template, incremental decoding and stop strings.

It needs neither transformers nor jax: `tokenizers` reads tokenizer.json, and `chat_template` renders chats.
Decoding is done here byte by byte, so that a stream never shows half a character.
"""

from __future__ import annotations

import codecs
import functools
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import tokenizers

from qwen_dist.chat import Chat, Message, make_chat
from qwen_dist.chat_template import ChatTemplate, TurnFormat
from qwen_dist.errors import CheckpointError, UsageError, UserError
from qwen_dist.storage.model_files import ModelFiles, ModelName
from qwen_dist.tokenizer_files import (
    TEMPLATE_TOKENS,
    TOKENIZER_CONFIG,
    chat_templates,
    read_settings,
    require_files,
    special_tokens,
    stop_ids,
    token_text,
)
from qwen_dist.tokenizer_vocab import TOKENIZER_FILE, add_tokens, build_backend, panics_as_errors, read_backend


class TooLongError(UserError):
    """A text has more tokens than allowed, as its length shows before it is tokenized."""


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
                f"{TOKENIZER_FILE} has the decoder {backend.decoder}; every Qwen tokenizer is byte-level (ByteLevel): "
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
        self._template_sources = dict(chat_templates)
        self._chat_templates = {name: ChatTemplate(source, template_tokens) for name, source in chat_templates.items()}
        self._special_ids = frozenset(id for id, token in added.items() if token.special)

    @classmethod
    def open(cls, model: ModelName, ignored_keys: Iterable[str] = ()) -> Tokenizer:
        """Read the tokenizer of a model; without tokenizer.json, from vocab.json and merges.txt.

        The stop ids are those of generation_config.json. If it has none, they are those of config.json and the tokenizer's
        eos_token. A chat template in a file takes precedence over tokenizer_config.json, whose `ignored_keys` are not read.

        Raises:
          CheckpointError: files are missing (all are listed) or invalid.
        """
        files = ModelFiles.open(model)
        require_files(files)
        settings = read_settings(files, ignored_keys)
        stored = read_backend(files)
        backend = stored or build_backend(files)
        tokens = {name: token_text(name, settings[name]) for name in TEMPLATE_TOKENS if settings.get(name)}
        eos_token = {tokens["eos_token"]} if "eos_token" in tokens and stored else set()
        add_tokens(backend, files, settings, [text for text in special_tokens(settings) if text not in eos_token])
        return cls(backend, stop_ids(files, backend, tokens), chat_templates(files, settings), tokens)

    def differences(self, model: ModelName) -> list[str]:
        """Return which of "chat template" and "vocabulary" another model, or an adapter, has differently."""
        files, found = ModelFiles.open(model), []
        templates = chat_templates(files, files.read_object(TOKENIZER_CONFIG) or {})
        if templates and templates != self._template_sources:
            found.append("chat template")
        other = read_backend(files)
        if other is not None and other.get_vocab() != self._backend.get_vocab():
            found.append("vocabulary")
        return found

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
        with panics_as_errors(TOKENIZER_FILE):
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

    def special_id(self, text: str) -> int | None:
        """Return the id of a special token, whose text `decode` omits; None if `text` is not one."""
        id = self._backend.token_to_id(text)
        return id if id in self._special_ids else None

    def check_length(self, text: str, max_tokens: int) -> None:
        """Raise TooLongError if the length alone shows that a text has more than `max_tokens` tokens.

        Tokenizing a text of many megabytes takes minutes and gigabytes.
        """
        num_bytes = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        if num_bytes <= max_tokens:
            return
        # NFC makes a text shorter, at most from 9 bytes to 3 (a Hangul syllable).
        at_least = -(-num_bytes // (self._max_token_bytes * (1 if text.isascii() else 3)))
        if at_least > max_tokens:
            raise TooLongError(
                f"the text has {num_bytes} bytes and so at least {at_least} tokens; at most {max_tokens} fit"
            )

    @functools.cached_property
    def _max_token_bytes(self) -> int:
        """The most bytes of a text that become one token."""
        added = self._backend.get_added_tokens_decoder().values()
        normalizer = self._backend.normalizer
        is_known = normalizer is None or isinstance(normalizer, tokenizers.normalizers.NFC)
        if not is_known or any(token.lstrip or token.rstrip for token in added):
            return sys.maxsize  # the text of a token has no bound
        texts = self._backend.get_vocab(with_added_tokens=False)  # a character for each byte
        return max([1, *map(len, texts), *(len(token.content.encode()) for token in added)])

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
          messages: as `make_chat` takes them.
          add_generation_prompt: end with the start of the assistant's turn.
          **variables: `tools`, and other variables of the template such as `enable_thinking`.

        Raises:
          UserError: the messages are invalid (every problem is listed), or the template rejects them, leaves a part of them
            out or does not use one of the variables.
          CheckpointError: there is no chat template, or it is invalid.
        """
        tools = variables.pop("tools", None)
        chat = make_chat(messages, tools, variables)
        return self.chat_template(chat).render(chat, add_generation_prompt)

    def encode_prompt(self, chat: Chat, max_tokens: int) -> list[int]:
        """Return the ids of a chat for the assistant to answer. Raises as `render_chat`, and TooLongError."""
        for message in chat.messages:
            self.check_length(message.get("content") or "", max_tokens)
        text = self.chat_template(chat).render(chat)
        self.check_length(text, max_tokens)
        return self.encode(text, add_special_tokens=False)

    def chat_template(self, chat: Chat | None = None) -> ChatTemplate:
        """Return the chat template for a chat, which may have tools. Raises CheckpointError if there is none."""
        names = ("tool_use", "default") if chat is not None and chat.tools else ("default",)
        for name in names:
            if name in self._chat_templates:
                return self._chat_templates[name]
        raise CheckpointError(
            "the checkpoint has no chat template (a base model?): use plain prompts without the template (--raw), "
            "or add a chat_template.jinja to its directory"
        )

    def check_template_variables(self, names: Collection[str]) -> None:
        """Check the variables that flags set.

        Raises:
          UsageError: the chat template does not use one of them.
          CheckpointError: there is no chat template.
        """
        if not names:
            return
        template = self.chat_template()
        try:
            template.check_variables(names)
        except UserError as error:
            raise UsageError(f"--thinking or --template-arg: {error}") from None

    def end_of_turn(self, turns: TurnFormat) -> int | None:
        """Return the token that ends an answer in a chat: the first special one after its content; None without one."""
        ids = self.encode(turns.ending, add_special_tokens=False)
        return next((id for id in ids if self.is_special(id)), None)

    @functools.cached_property
    def chat_stop_ids(self) -> tuple[int, ...]:
        """The tokens that end the answers of chats. Those of base models are often not among the `stop_ids`."""
        try:
            end = self.end_of_turn(self.chat_template().turn_format({}))
        except UserError:  # no template, or one that needs more than messages
            return ()
        return () if end is None else (end,)


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

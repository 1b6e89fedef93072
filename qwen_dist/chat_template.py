"""Chat templates: the text of a conversation, by the checkpoint's own template in a sandbox."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from qwen_dist.errors import CheckpointError, UserError

Message = Mapping[str, Any]


def render_template(
    source: str,
    messages: Sequence[Message],
    add_generation_prompt: bool,
    template_tokens: Mapping[str, str],
    variables: Mapping[str, Any],
) -> str:
    """Return the text of a conversation in a chat template; see `Tokenizer.render_chat`."""
    template = _compile_template(source)
    inputs = {
        "tools": None,
        "documents": None,
        **template_tokens,
        **variables,
        "messages": _validate_messages(messages),
        "add_generation_prompt": add_generation_prompt,
    }
    try:
        # The template is untrusted code: it gets plain JSON values only, no objects to escape the sandbox with.
        return template.render(json.loads(json.dumps(inputs)))
    except Exception as error:  # template code can raise anything
        raise UserError(f"the chat template cannot be rendered with these messages: {error}") from error


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

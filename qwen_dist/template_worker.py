"""The process that renders chat templates. It is run as a script, and imports nothing of this package.

A chat template is untrusted code, so it runs in a separate process. The operating system limits its memory and the
processor time of each request. Whatever the template does, at worst this process ends.

Requests and replies are JSON, each after its length in 8 bytes, on the socket that is the standard input:
  {"template": number, "source": only the first time} and then [its variables, …]
  {"broken": why} or {"results": [{"text": …} or {"error": why}, …]}
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import resource
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MAX_MEMORY_BYTES = 2**30
MAX_SECONDS = 5.0
MAX_OUTPUT_CHARS = 16 * 2**20
_MAX_MESSAGE_CHARS = 2000


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`, which marks text to train on. It renders its contents."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    """Compile a chat template with the filters and globals of transformers (`utils/chat_template_utils.py`)."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.datetime.now().strftime(format)
    return environment.from_string(source)


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


def _answer(source: str, inputs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    try:
        template = _compile(source)
    except Exception as error:  # the compilers of jinja2 and Python raise many kinds
        line = f"line {error.lineno}: " if isinstance(error, jinja2.TemplateSyntaxError) else ""
        return {"broken": line + _describe(error)}
    return {"results": [_render(template, each) for each in inputs]}


def _render(template: jinja2.Template, inputs: Mapping[str, Any]) -> dict[str, str]:
    pieces, length = [], 0
    try:
        for piece in template.generate(inputs):
            length += len(piece)
            if length > MAX_OUTPUT_CHARS:
                return {"error": f"it writes more than {MAX_OUTPUT_CHARS} characters"}
            pieces.append(piece)
        return {"text": "".join(pieces)}
    except Exception as error:  # the template can raise anything
        return {"error": _describe(error)}


def _describe(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return f"it needs more than {MAX_MEMORY_BYTES // 2**20} MiB of memory"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error)[:_MAX_MESSAGE_CHARS] or type(error).__name__


def _read(num_bytes: int) -> bytes:
    """Read from the socket; fewer bytes only at its end."""
    parts = []
    while num_bytes > 0 and (part := os.read(0, min(num_bytes, 2**20))):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _write(reply: Mapping[str, Any]) -> None:
    content = json.dumps(reply).encode()
    rest = memoryview(len(content).to_bytes(8) + content)
    while rest:
        rest = rest[os.write(0, rest) :]


def main() -> None:
    """Answer requests until the other end of the socket is closed, as it is when that process ends."""
    with contextlib.suppress(ValueError, OSError):  # a system without this limit
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also within one long operation
    _write({"ready": True})
    sources: dict[int, str] = {}
    while len(header := _read(8)) == 8:
        request = json.loads(_read(int.from_bytes(header)))
        source = sources.setdefault(request["template"], request.get("source", ""))
        inputs = json.loads(_read(int.from_bytes(_read(8))))
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        reply = _answer(source, inputs)
        signal.setitimer(signal.ITIMER_PROF, 0)
        _write(reply)


if __name__ == "__main__":
    with contextlib.suppress(ConnectionError):
        main()

"""Pages of the documentation site that are not files in docs/. mkdocs calls the functions `on_…` (see mkdocs.yml).

The reference is generated from the commands and the fields of their configuration, so it cannot differ from them. Other
pages are files that also have a place elsewhere in the repository, such as CONTRIBUTING.md; links to them are changed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pathlib
import posixpath
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import qwen_dist
from qwen_dist.cli.commands import COMMANDS, build_parser, load_verb
from qwen_dist.cli.flags import help_text
from qwen_dist.config_fields import ConfigField, config_fields

ROOT = pathlib.Path(__file__).parents[1]
# Pages of the site by the files that they are made from.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "launch/README.md": "launch.md",
}
EXAMPLES = "examples.md"
NOTEBOOKS = {
    f"examples/notebooks/{path.name}": f"notebooks/{path.stem}.md"
    for path in sorted((ROOT / "examples" / "notebooks").glob("*.py"))
}
# The sections of the Python reference: names of the package, or of one of its modules.
PYTHON_NAMES = {
    "Inference": ("LLM", "SamplingParams", "Completion", "Score", "DEMO_MODEL"),
    "Models and training loops": ("load_model", "new_model", "CausalLM", "Tokenizer", "TrainBatch"),
    "Fine-tuning runs": (
        "finetune",
        "FinetuneConfig",
        "ModelOptions",
        "DataOptions",
        "ChatOptions",
        "OptimizerOptions",
        "LoraOptions",
        "TrainSummary",
    ),
    "Sharding": ("RuleSet", "INFERENCE", "TRAIN", "use_sharding"),
    "Intermediates and parity": ("capture.capture", "parity.run.ParityOptions", "parity.run.run_parity"),
    "Errors": ("UserError",),
}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
# What a browser would load from another server when it shows a page.
_REMOTE = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//|<link\b[^>]*rel="(?!canonical)[^>]*href="https?://'
)


# --- generated pages ---


def commands_page(names: Collection[str] = COMMANDS) -> str:
    """Return the help of every command, as it is printed."""
    _, parsers = build_parser(names)
    sections = [f"## {name}\n\n```text\n{parser.format_help().rstrip()}\n```\n" for name, parser in parsers.items()]
    intro = "What `qwen-dist COMMAND --help` prints. [Configuration](configuration.md) has the keys without a flag, too.\n"
    return "\n".join(["# Commands\n", intro, *sections])


def configuration_page(names: Collection[str] = COMMANDS) -> str:
    """Return a table of all configuration keys of every command."""
    intro = """# Configuration

A key is set by its flag, by `--config.KEY=VALUE`, or in a file that `--config` names (`.py` with `get_config`, `.yaml` or
`.json`); flags win over `--config.KEY=VALUE`, which wins over the file. `--print-config` prints all keys of a command with
their values. A key that does not exist is an error.
"""
    tables = []
    for verb in map(load_verb, names):
        rows = "\n".join(_row(field) for field in config_fields(verb.config))
        table = f"| key, and its flag | type | default | meaning |\n|---|---|---|---|\n{rows}\n"
        tables.append(f'## {verb.name}\n\n<div class="meanings" markdown>\n\n{table}\n</div>\n')
    return "\n".join([intro, *tables])


def _row(field: ConfigField) -> str:
    is_required = field.default is dataclasses.MISSING
    default = "required" if is_required else "–" if field.default in (None, "", ()) else f"`{field.default}`"
    # The default has a column of its own.
    help = help_text(field._replace(default=None))
    names = f"`{field.key}`" + (f"<br>`{field.flag}`" if field.flag.startswith("-") else "")
    texts = [text.replace("|", "&#124;").replace("<", "&lt;") for text in (field.type_name, default, help)]
    return f"| {' | '.join([names, *texts])} |"


def examples_page() -> str:
    """Return the programs in examples/."""
    sections = []
    for path in sorted((ROOT / "examples").glob("*.py")):
        sections.append(f"## {path.name}\n\n```python\n{path.read_text(encoding='utf-8').rstrip()}\n```\n")
    return "\n".join(["# Example programs\n", "A test runs each of them.\n", *sections])


def notebook_page(source: str) -> str:
    """Return a program with cells as a page: its Markdown cells as text, the others as code."""
    cells = re.split(r"^# %%(.*)\n", source, flags=re.MULTILINE)[1:]
    parts = []
    for kind, body in zip(cells[::2], cells[1::2], strict=True):
        if "[markdown]" in kind:
            parts.append(re.sub(r"^# ?", "", body.strip(), flags=re.MULTILINE))
        else:
            parts.append(f"```python\n{re.sub(r'  # noqa.*', '', body).strip()}\n```")
    return "\n\n".join(parts) + "\n"


# --- the Python reference ---


def python_page() -> str:
    """Return signature and docstring of every public name."""
    intro = """# Python

What `from qwen_dist import …` gives, and two modules for looking inside. [The Python library](../python.md) says how they
are used together.
"""
    parts = [intro]
    for title, names in PYTHON_NAMES.items():
        parts += [f"## {title}\n", *map(_python_name, names)]
    return "\n".join(parts)


def _python_name(path: str) -> str:
    module_name, _, name = path.rpartition(".")
    module = importlib.import_module(f"qwen_dist.{module_name}") if module_name else qwen_dist
    value = getattr(module, name)
    heading = f"### {path}\n" + (f"\n`from {module.__name__} import {name}`\n" if module_name else "")
    if not callable(value):
        text = (
            "The directory of the small demonstration model."
            if name == "DEMO_MODEL"
            else f"The `RuleSet` of {name.lower()}."
        )
        return f"{heading}\n{text}\n"
    parts = [heading, _signature(name, value), _markdown(value.__doc__ or "")]
    if inspect.isclass(value) and not issubclass(value, Exception):
        for method, member in _methods(value):
            full_name = name if method == "__call__" else f"{name}.{method}"
            title = f"Calling a {name}" if method == "__call__" else full_name
            parts.append(f"#### {title}\n\n{_method(full_name, member)}")
    return "\n".join(parts)


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    for name, member in vars(cls).items():
        function = getattr(member, "__func__", member)
        has_text = bool(getattr(function, "__doc__", None)) and (callable(function) or isinstance(member, property))
        if has_text and (not name.startswith("_") or name == "__call__"):
            yield name, member


def _method(name: str, member: Any) -> str:
    if isinstance(member, property):
        return _markdown(member.__doc__ or "")
    function = getattr(member, "__func__", member)
    return f"{_signature(name, function)}\n{_markdown(function.__doc__ or '')}"


def _signature(name: str, value: Callable[..., Any]) -> str:
    """Return the call in a block of code, one argument a line if it is long."""
    try:
        signature = inspect.signature(value)
    except ValueError:
        return ""
    arguments, is_keyword_only = [], False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not is_keyword_only:
            arguments.append("*")
            is_keyword_only = True
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        text = stars + parameter.name + _annotation(": ", parameter.annotation)
        arguments.append(text if parameter.default is parameter.empty else f"{text} = {_default(parameter.default)}")
    result = _annotation(" -> ", signature.return_annotation)
    line = f"{name}({', '.join(arguments)}){result}"
    if len(line) > 100:
        line = "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){result}"])
    return f"```python\n{line}\n```\n"


def _annotation(start: str, annotation: Any) -> str:
    if annotation in (inspect.Parameter.empty, None):
        return ""
    return start + (annotation if isinstance(annotation, str) else inspect.formatannotation(annotation))


def _default(value: Any) -> str:
    """Return a default as it is written; what dataclasses make for each object is an ellipsis."""
    text = repr(value)
    return "…" if text.startswith("<") else text


def _markdown(docstring: str) -> str:
    """Return a Google-style docstring as Markdown: its sections become lists."""
    lines, in_section = [], False
    for line in inspect.cleandoc(docstring).splitlines():
        if re.match(r"(Args|Attributes|Returns|Raises|Yields)\b[^.]*:$", line):
            lines += ["", f"**{line}**", ""]
            in_section = True
        elif in_section and (item := re.match(r"  ([*\w, ]+): (.*)", line)):
            names = ", ".join(f"`{name}`" for name in item[1].split(", "))
            lines.append(f"- {names}: {item[2]}")
        else:
            in_section = in_section and (not line or line.startswith(" "))
            lines.append(line.removeprefix("  ") if in_section else line)
    return "\n".join(lines) + "\n"


# --- mkdocs ---


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    pages = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in PAGES.items()}
    pages |= {"reference/commands.md": commands_page(), "reference/configuration.md": configuration_page()}
    pages |= {"reference/python.md": python_page(), EXAMPLES: examples_page()}
    pages |= {page: notebook_page((ROOT / source).read_text(encoding="utf-8")) for source, page in NOTEBOOKS.items()}
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change links to files of the repository into links to pages of the site."""
    name = page.file.src_uri
    source = next((source for source, target in (PAGES | NOTEBOOKS).items() if target == name), f"docs/{name}")
    return _LINK.sub(lambda match: _site_link(match, source, name), markdown)


def _site_link(match: re.Match[str], source: str, page: str) -> str:
    """Return a link of the file `source`, for the page `page`. What has no page becomes text."""
    image, text, target = match.groups()
    path, hash, anchor = target.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return match[0]
    found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if found in PAGES | NOTEBOOKS or found.startswith("docs/"):
        there = (PAGES | NOTEBOOKS).get(found, found.removeprefix("docs/"))
    elif found.partition("/")[0] == "examples":
        there, anchor = EXAMPLES, posixpath.basename(found).replace(".", "") if "/" in found else ""
    elif (ROOT / found).exists():
        return text
    else:
        return match[0]  # mkdocs reports it
    link = posixpath.relpath(there, posixpath.dirname(page) or ".")
    return f"{image}[{text}]({link}{'#' + anchor if anchor else hash})"


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that would load anything from another server."""
    from mkdocs.exceptions import PluginError

    if found := _REMOTE.search(output):
        raise PluginError(f"{page.file.src_uri} loads something from a server: {found[0]}")
    return output

"""Pages of the documentation site that are not files in docs/. mkdocs calls the functions `on_…` (see mkdocs.yml).

The reference is generated from the commands and the fields of their configuration, so it cannot differ from them. Other
pages are files that also have a place elsewhere in the repository, such as CONTRIBUTING.md; links to them are changed.
"""

from __future__ import annotations

import dataclasses
import pathlib
import posixpath
import re
from collections.abc import Iterable
from typing import Any

from qwen_dist.cli.flags import Verb, build_parser, help_text
from qwen_dist.cli.main import VERBS
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
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
# What a browser would load from another server when it shows a page.
_REMOTE = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(?:https?:)?//|<link\b[^>]*rel="(?!canonical)[^>]*href="https?://'
)


# --- generated pages ---


def commands_page(verbs: Iterable[Verb] = VERBS) -> str:
    """Return the help of every command, as it is printed."""
    _, parsers = build_parser(verbs)
    sections = [f"## {name}\n\n```text\n{parser.format_help().rstrip()}\n```\n" for name, parser in parsers.items()]
    intro = "What `qwen-dist COMMAND --help` prints. [Configuration](configuration.md) has the keys without a flag, too.\n"
    return "\n".join(["# Commands\n", intro, *sections])


def configuration_page(verbs: Iterable[Verb] = VERBS) -> str:
    """Return a table of all configuration keys of every command."""
    intro = """# Configuration

A key is set by its flag, by `--config.KEY=VALUE`, or in a file that `--config` names (`.py` with `get_config`, `.yaml` or
`.json`); flags win over `--config.KEY=VALUE`, which wins over the file. `--print-config` prints all keys of a command with
their values. A key that does not exist is an error.
"""
    tables = []
    for verb in verbs:
        rows = "\n".join(_row(field) for field in config_fields(verb.config))
        tables.append(f"## {verb.name}\n\n| key, and its flag | type | default | meaning |\n|---|---|---|---|\n{rows}\n")
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


# --- mkdocs ---


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    pages = {page: (ROOT / source).read_text(encoding="utf-8") for source, page in PAGES.items()}
    pages |= {"reference/commands.md": commands_page(), "reference/configuration.md": configuration_page()}
    pages |= {EXAMPLES: examples_page()}
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Change links to files of the repository into links to pages of the site."""
    name = page.file.src_uri
    source = next((source for source, target in PAGES.items() if target == name), f"docs/{name}")
    return _LINK.sub(lambda match: _site_link(match, source, name), markdown)


def _site_link(match: re.Match[str], source: str, page: str) -> str:
    """Return a link of the file `source`, for the page `page`. What has no page becomes text."""
    image, text, target = match.groups()
    path, hash, anchor = target.partition("#")
    if not path or "://" in path or path.startswith("mailto:"):
        return match[0]
    found = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    if found.startswith("examples/"):
        there, anchor = EXAMPLES, posixpath.basename(found).replace(".", "")
    elif found in PAGES or found.startswith("docs/"):
        there = PAGES.get(found, found.removeprefix("docs/"))
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

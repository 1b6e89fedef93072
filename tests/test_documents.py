"""Documents say what is so: links lead somewhere, commands have the flags they show, messages are those that are printed.

tests/train/test_documented_commands.py runs the commands of docs/finetune.md, tests/test_examples.py the programs.
"""

import dataclasses
import json
import os
import pathlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qwen_dist
from qwen_dist.cli import main
from qwen_dist.cli.flags import Flags, Verb, build_parser
from qwen_dist.cli.main import VERBS
from qwen_dist.config_fields import config_fields, option

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("*/README.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
SITE_PAGES = runpy.run_path(str(ROOT / "tools" / "site_pages.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
QWEN_DIST = f"{shlex.quote(sys.executable)} -m qwen_dist"


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def slug(heading: str) -> str:
    """Return the anchor of a heading, as GitHub and mkdocs make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


# --- links ---


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"^```.*?^```", "", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path or target.startswith("mailto:"):
            assert target.startswith("https://"), target
            continue
        file = (ROOT / page).parent / path if path else ROOT / page
        if "reference/" in path:  # generated with the site
            assert path in ("reference/configuration.md", "reference/commands.md"), target
            continue
        assert file.exists(), target
        if anchor:
            assert anchor in {slug(heading) for heading in re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)}, target


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        pass

    config = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)
    named = set(re.findall(r"[\w/-]+\.md", json.dumps(config["nav"])))
    generated = {
        *SITE_PAGES["PAGES"].values(),
        SITE_PAGES["EXAMPLES"],
        "reference/commands.md",
        "reference/configuration.md",
    }
    files = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")}
    decisions = {name for name in files if re.match(r"decisions/\d{4}-", name)}
    assert named == (files - decisions) | generated
    assert set(re.findall(r"\((\d{4}-.*?\.md)\)", TEXTS["docs/decisions/index.md"])) == {name[10:] for name in decisions}


# --- commands ---


def shown_commands() -> list[tuple[str, str]]:
    """Return (page, command) for each line of a block that calls qwen-dist, alone or after a launcher's `--`."""
    found = []
    for page, text in TEXTS.items():
        for block in blocks(text, "bash") + blocks(text, "console"):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.removeprefix("$ ")
                if match := re.match(r"(?:(?:\w+=\S+ |.*\| )*qwen-dist|launch/\S+ .*? --) (.*)", line):
                    found.append((page, match[1]))
    return found


def test_shown_commands_have_known_flags_and_keys():
    parser, parsers = build_parser(VERBS)
    commands = shown_commands()
    assert len(commands) > 40 and {page for page, _ in commands} >= {"README.md", "docs/batch.md", "docs/scaling.md"}
    for page, command in commands:
        if page == "docs/faq.md":  # which shows mistakes; see below
            continue
        words = [word for word in shlex.split(command, comments=True) if word not in ("…", "2>&1")]
        if words and words[0] in parsers:
            options, unknown = parser.parse_known_args(words)
            verb = next(verb for verb in VERBS if verb.name == options.verb)
            keys = {f"--config.{field.key}" for field in config_fields(verb.config)}
            assert {word.partition("=")[0] for word in unknown if word.startswith("-")} <= keys, f"{page}: {command}"
        else:
            assert words[0].startswith("-") or words[0] == "COMMAND", f"{page}: {command}"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the files that the FAQ names."""
    place = tmp_path_factory.mktemp("place")
    shutil.copytree(qwen_dist.DEMO_MODEL, place / "odd")
    config = json.loads((place / "odd" / "config.json").read_text())
    (place / "odd" / "config.json").write_text(json.dumps(config | {"attention_sink": 4}))
    prompts = ["What is the capital of France?", "What is the opposite of hot?"]
    lines = [json.dumps({"id": str(number), "prompt": prompt}) + "\n" for number, prompt in enumerate(prompts)]
    (place / "questions.jsonl").write_text("".join(lines))
    return place


def run_shell(script: str, place: pathlib.Path) -> subprocess.CompletedProcess:
    """Run a script as a user would, on one device, with `qwen-dist` and `python` of this environment."""
    functions = f'qwen-dist() {{ {QWEN_DIST} "$@"; }}\npython() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "COLUMNS"))}
    environment = kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = ["bash", "-euo", "pipefail", "-c", functions + script]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=1500)


MESSAGES = blocks(TEXTS["docs/faq.md"], "console")


def needs_devices(message: str) -> bool:
    return any(text in message for text in ("--mesh", "JAX_PLATFORMS", "answers.jsonl"))


def is_printed(shown: str, printed: str) -> bool:
    pattern = "".join(".*" if part == "…" else re.escape(part) for part in re.split("(…)", shown))
    return re.fullmatch(pattern, printed.strip()) is not None


@pytest.mark.parametrize("message", [message for message in MESSAGES if not needs_devices(message)])
def test_messages_of_the_faq(message, place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    command, _, expected = message.partition("\n")
    assert main(shlex.split(command.removeprefix("$ qwen-dist "))) != 0
    assert is_printed(expected.strip(), capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("message", [message for message in MESSAGES if needs_devices(message)])
def test_messages_of_the_faq_about_devices_and_runs(message, place):
    command, _, expected = message.partition("\n")
    if "answers.jsonl" in command:
        run_shell("qwen-dist batch --input questions.jsonl --output answers.jsonl", place)
    done = run_shell(command.removeprefix("$ "), place)
    assert done.returncode != 0 and is_printed(expected.strip(), done.stderr), done.stderr


@pytest.mark.slow
def test_get_started_runs_as_it_stands(tmp_path):
    text = re.sub(r"<!-- not run.*?-->\n```bash\n.*?```", "", TEXTS["docs/get-started.md"], flags=re.DOTALL)
    script = "".join(blocks(text, "bash"))
    done = run_shell(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "The capital of France is Paris." in done.stdout and "The opposite of hot is cold." in done.stdout
    assert "Poseidonis." in done.stdout and "CPU kernels" in done.stdout
    (program,) = blocks(text, "python")
    assert "Paris" in run_shell(f"python - <<'EOF'\n{program}EOF", tmp_path).stdout


@pytest.mark.slow
def test_the_command_of_concepts_shows_every_operation(tmp_path):
    (script,) = blocks(TEXTS["docs/concepts.md"], "bash")
    assert "paged attention" in run_shell(script, tmp_path).stdout.replace("_", " ")


# --- the reference ---


@dataclasses.dataclass(frozen=True)
class _PaintConfig:
    colour: str = option("red", flag="--colour", metavar="COLOUR", help="of the answers | <b>")


def test_a_new_field_is_in_the_reference():
    verb = Verb("paint", "paint the answers", _PaintConfig, Flags, lambda config, flags: 0, "an example")
    line = "| `colour`<br>`--colour` | str | `red` | of the answers &#124; &lt;b> |"
    assert line in SITE_PAGES["configuration_page"]((verb,)).splitlines()
    assert "--colour COLOUR" in SITE_PAGES["commands_page"]((verb,))


def test_the_reference_has_every_key_and_command():
    page = SITE_PAGES["configuration_page"]()
    for verb in VERBS:
        section = page.partition(f"## {verb.name}\n")[2].partition("\n## ")[0]
        assert section.count("\n| `") == len(config_fields(verb.config))
        assert f"## {verb.name}\n" in SITE_PAGES["commands_page"]()


def test_links_out_of_the_site_become_pages_or_text():
    to_page, page = SITE_PAGES["on_page_markdown"], type("Page", (), {})()
    page.file = type("File", (), {"src_uri": "loading.md"})()
    links = "[a](../launch/README.md) [b](../setup.py) [c](faq.md#runs) [d](../examples/lora.py) [e](https://x.y)"
    expected = "[a](launch.md) b [c](faq.md#runs) [d](examples.md#lorapy) [e](https://x.y)"
    assert to_page(links, page) == expected


# --- what the gate installs, and where it runs ---


def test_constraints_pin_everything_that_the_project_asks_for():
    """For each Python version; `uv pip compile …` in CONTRIBUTING.md writes the file."""
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] not in "# "]
    extras = PROJECT["optional-dependencies"]
    asked = [
        Requirement(text)
        for name in ("docs", "dev", "metrics", "parity", "parquet", "remote", "serve")
        for text in extras[name]
    ]
    asked += [Requirement(text) for text in PROJECT["dependencies"]]
    for version in ("3.11", "3.12"):
        environment = default_environment() | {"python_version": version, "python_full_version": f"{version}.7"}
        pinned = {
            canonicalize_name(pin.name): pin.specifier
            for pin in pins
            if pin.marker is None or pin.marker.evaluate(dict(environment, sys_platform="linux"))
        }
        for requirement in asked:
            if canonicalize_name(requirement.name) != "qwen-dist":
                (pin,) = pinned[canonicalize_name(requirement.name)]
                assert pin.operator == "==" and requirement.specifier.contains(pin.version, prereleases=True), requirement


def test_the_versions_are_one():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == PROJECT["version"] == qwen_dist.__version__
    assert citation["license"] == PROJECT["license"]


def test_workflows_run_the_gate_and_every_slow_test():
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert set(workflows) == {"gate", "nightly", "site", "wheels"}
    assert workflows["gate"]["jobs"]["gate"]["steps"][-1] == {"run": "bash .ci/run"}
    slow = workflows["nightly"]["jobs"]["slow"]
    parts = slow["strategy"]["matrix"]["part"]
    assert parts == [f"{index}/{len(parts)}" for index in range(len(parts))]
    assert "--slow-part ${{ matrix.part }}" in slow["steps"][-1]["run"]


def test_images_have_a_target_for_each_backend_with_extras_that_exist():
    dockerfile = (ROOT / "launch" / "docker" / "Dockerfile").read_text()
    targets = re.findall(r"^FROM base AS (\w+)\nRUN .*\[([\w,]+)\]", dockerfile, re.MULTILINE)
    assert [name for name, _ in targets] == ["cpu", "cuda", "tpu"]
    for name, extras in targets:
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
        assert name == "cpu" or name in extras.split(",")
    assert all((ROOT / source).exists() for source in re.findall(r"^COPY (\w\S*) ", dockerfile, re.MULTILINE))

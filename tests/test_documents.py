"""Documents say what is so: links lead somewhere, commands run, messages are those that are printed.

tests/train/test_documented_commands.py also runs the commands of docs/finetune.md, tests/test_examples.py the programs.
"""

import dataclasses
import json
import os
import pathlib
import posixpath
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import textwrap
import tomllib
import types

import pytest
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qwen_dist
from qwen_dist.cli import main
from qwen_dist.cli.commands import COMMANDS, build_parser, load_verb
from qwen_dist.cli.flags import Flags, Verb
from qwen_dist.config_fields import config_fields, option

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("*/README.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in PAGES}
SITE_PAGES = runpy.run_path(str(ROOT / "tools" / "site_pages.py"))
REFERENCE = {"reference/commands.md", "reference/configuration.md", "reference/python.md"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
QWEN_DIST = f"{shlex.quote(sys.executable)} -m qwen_dist"


def blocks(text: str, language: str) -> list[str]:
    """Return the blocks of code in a language, also those of lists."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for _, block in found]


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
            assert posixpath.normpath(path) in REFERENCE, target
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
        *SITE_PAGES["NOTEBOOKS"].values(),
        SITE_PAGES["EXAMPLES"],
        *REFERENCE,
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
    parser, parsers = build_parser()
    commands = shown_commands()
    assert len(commands) > 40 and {page for page, _ in commands} >= {"README.md", "docs/batch.md", "docs/scaling.md"}
    for page, command in commands:
        if page == "docs/faq.md":  # which shows mistakes; see below
            continue
        words = [word for word in shlex.split(command, comments=True) if word not in ("…", "2>&1")]
        if words and words[0] in parsers:
            options, unknown = parser.parse_known_args(words)
            verb = load_verb(options.verb)
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


def run_shell(script: str, place: pathlib.Path, **variables: str) -> subprocess.CompletedProcess:
    """Run a script as a user would, by default on one device, with `qwen-dist` and `python` of this environment."""
    functions = f'qwen-dist() {{ {QWEN_DIST} "$@"; }}\npython() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "COLUMNS"))}
    environment = kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables
    command = ["bash", "-euo", "pipefail", "-c", functions + script]
    return subprocess.run(
        command, cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=1500
    )


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


# --- the commands of the pages, run ---

# Pages whose blocks `test_the_commands_of_a_page_run` runs, each with something that they print.
RUN = {
    "README.md": r"within bounds[\s\S]*The capital of France is Paris\.",
    "docs/architecture.md": r"after 60 steps[\s\S]*within bounds",
    "docs/batch.md": r"",
    "docs/finetune.md": r"parameters are trained",
    "docs/generate.md": r'"finish_reason": "(stop|length)"',
    "docs/loading.md": r"saved: NEW_DIR",
    "docs/models.md": r"paged.attention",
    "docs/parity-report.md": r"within bounds",
    "docs/parity.md": r"within bounds",
    "docs/plan.md": r"fits: .* per device",
    "docs/python.md": r"run/adapter",
    "docs/quantize.md": r"KL over \d+ tokens[\s\S]*saved: NEW_DIR",
    "docs/scaling.md": r"fits: .* per device",
}
# Pages of which it does not, and why.
NOT_RUN = {
    "CONTRIBUTING.md": "installs, and runs the tests",
    "docs/concepts.md": "test_the_command_of_concepts_shows_every_operation",
    "docs/get-started.md": "test_get_started_runs_as_it_stands",
    "docs/serve.md": "tests/server starts it and asks it with OpenAI's client",
    "docs/performance.md": "benchmarks of minutes to hours; tests/train/test_documented_commands.py checks their flags",
    "launch/README.md": "needs Docker, a registry and a cluster; tests/distributed runs local.sh and checks the others",
}
# Commands that cannot run in a test, by a pattern: why, and the change with which they do, if any.
CANNOT_RUN = {
    r"pip install ": ("installs from a network", None),
    r"qwen-dist serve|curl ": ("does not end, or needs a running server; see tests/server", None),
    r" --topology (v|tpu)\S+ .*--compile": ("needs the TPU's compiler, and minutes", (r" --compile( [\d,]+| auto)?", "")),
}
# What makes a run short: the last of two flags counts.
SHORTER = {
    r"\bfinetune\b.*--output": " --steps 3 --config.data.max_length=128",
    r"\bqwen-dist generate": " --max-new-tokens 24",
}
IN_A_TERMINAL = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
SHAPES = runpy.run_path(str(ROOT / "tests" / "planning" / "shapes.py"))
_EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "num_key_value_heads": 4}
# The `config.json` of a command: by the nearest heading or comment that names a model.
CONFIGS = {
    "Qwen3-32B": SHAPES["QWEN3_32B"],
    "Qwen3-30B-A3B": SHAPES["qwen3"](48, 2048, 32, 6144, **_EXPERTS, model_type="qwen3_moe", moe_intermediate_size=768),
    "Qwen3-235B-A22B": SHAPES["qwen3"](94, 4096, 64, 12288, **_EXPERTS, model_type="qwen3_moe", moe_intermediate_size=1536),
    "Qwen3-8B": SHAPES["QWEN3_8B"],
    "# 27B": SHAPES["QWEN3_8_27B"],
    "# Next": SHAPES["QWEN3_NEXT_80B"],
    "397B": SHAPES["QWEN3_5_397B"],
}


def page_commands(page: str) -> list[tuple[str, str]]:
    """Return (nearest heading, command) for each command of a page, in order; a Python block is one command."""
    found, heading = [], ""
    parts = re.split(r"^( *)```(\w*)\n(.*?)^\1```", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    for before, _, language, block in zip(parts[::4], parts[1::4], parts[2::4], parts[3::4], strict=False):
        heading = (re.findall(r"^#+ (.*)$", before, re.MULTILINE) or [heading])[-1]
        block = textwrap.dedent(block)
        if language == "python":
            found.append((heading, f"python - <<'EOF'\n{block}EOF"))
        elif language == "bash":
            found += [(heading, line) for line in block.replace("\\\n", " ").splitlines() if line[:1] not in ("", "#")]
    return found


def cannot_run(command: str) -> tuple[str, tuple[str, str] | None] | None:
    return next((reason for pattern, reason in CANNOT_RUN.items() if re.search(pattern, command)), None)


def as_run(heading: str, command: str) -> str:
    """Return a command as the test runs it."""
    if "EOF" in command:
        return command.replace("steps=100", "steps=3")
    command = command.partition(" #")[0].rstrip()
    for pattern, flags in SHORTER.items():
        command += flags if re.search(pattern, command) else ""
    if re.match(r"qwen-dist generate --model \S+ --max-new-tokens \d+$", command):  # a chat, which needs a terminal
        command = f"printf 'Hi\\n\\n' | python -c '{IN_A_TERMINAL}' {command}"
    # The demonstration model has three key heads, which no axis of the pages divides.
    return re.sub(r"\bDIR\b", "WIDE", command) if "tensor=" in command else command


@pytest.fixture
def page_place(tmp_path, tiny_directory):
    """A directory with the files that the pages name, and `qwen-dist` as a program for launchers."""
    wide = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "intermediate_size": 128}
    (tmp_path / "WIDE").symlink_to(tiny_directory("qwen3", num_hidden_layers=2, **wide))
    (tmp_path / "DIR").symlink_to(qwen_dist.DEMO_MODEL)
    for name in ("configs", "examples", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    # The cache of the hub: a hub id then needs no network.
    hub = tmp_path / "home" / "hub" / "models--Qwen--Qwen3-0.6B"
    shutil.copytree(qwen_dist.DEMO_MODEL, hub / "snapshots" / ("0" * 40))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("0" * 40)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "qwen-dist").write_text(f'#!/bin/sh\nexec {QWEN_DIST} "$@"\n')
    (tmp_path / "bin" / "qwen-dist").chmod(0o755)
    prompts = ["What is the capital of France?", "What is the opposite of hot?"]
    records = "".join(json.dumps({"id": str(number), "prompt": text}) + "\n" for number, text in enumerate(prompts))
    chat = [{"role": "user", "content": prompts[0]}, {"role": "assistant", "content": "Paris."}]
    (tmp_path / "text.txt").write_text(" ".join(prompts))
    for name, text in {"in": records, "questions": records, "chats": json.dumps({"messages": chat}) + "\n"}.items():
        (tmp_path / f"{name}.jsonl").write_text(text * (8 if name == "chats" else 1))
    return tmp_path


def test_every_page_with_commands_is_run_or_says_why_not():
    pages = {page for page in TEXTS if page_commands(page)}
    assert pages == RUN.keys() | NOT_RUN.keys()
    for test in re.findall(r"\btest_\w+$", "\n".join(NOT_RUN.values()), re.MULTILINE):
        assert test in globals()
    commands = [command for page in RUN for _, command in page_commands(page)]
    assert all(any(re.search(pattern, command) for command in commands) for pattern in CANNOT_RUN)


def test_commands_that_cannot_run_have_a_configuration(capsys):
    commands = [command for page in RUN for _, command in page_commands(page) if cannot_run(command)]
    bound = [shlex.split(command, comments=True)[1:] for command in commands if command.startswith("qwen-dist ")]
    assert len(bound) > 10
    for arguments in bound:
        assert main([*arguments, "--print-config"]) == 0, arguments
        config = json.loads(capsys.readouterr().out)
        if "--topology" in arguments:
            assert config["topology"] == arguments[arguments.index("--topology") + 1]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN)
def test_the_commands_of_a_page_run(page, page_place):
    """In order, in one directory, on eight devices where there is a mesh."""
    printed = ""
    for heading, command in page_commands(page):
        if (reason := cannot_run(command)) and reason[1] is None:
            continue
        shorter = re.sub(*reason[1], command) if reason else command
        named = next((config for name, config in CONFIGS.items() if name in f"{heading} {command}"), SHAPES["QWEN3_8B"])
        (page_place / "config.json").write_text(json.dumps(named))
        needs_mesh = "--mesh" in command and "--num-cpu-devices" not in command and not command.startswith("launch/")
        variables = {"PATH": f"{page_place / 'bin'}:{os.environ['PATH']}", "HF_HOME": str(page_place / "home")}
        variables |= {"HF_HUB_OFFLINE": "1"} | ({"JAX_NUM_CPU_DEVICES": "8"} if needs_mesh else {})
        done = run_shell(as_run(heading, shorter), page_place, **variables)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        printed += done.stdout
    assert re.search(RUN[page], printed), printed[-3000:]


# --- the reference ---


@dataclasses.dataclass(frozen=True)
class _PaintConfig:
    colour: str = option("red", flag="--colour", metavar="COLOUR", help="of the answers | <b>")


def test_a_new_field_is_in_the_reference(monkeypatch):
    verb = Verb("paint", _PaintConfig, Flags, lambda config, flags: 0, "an example")
    monkeypatch.setitem(sys.modules, "qwen_dist.cli.paint", types.SimpleNamespace(VERB=verb))
    monkeypatch.setitem(COMMANDS, "paint", "paint the answers")
    line = "| `colour`<br>`--colour` | str | `red` | of the answers &#124; &lt;b> |"
    assert line in SITE_PAGES["configuration_page"](["paint"]).splitlines()
    assert "--colour COLOUR" in SITE_PAGES["commands_page"](["paint"])


def test_the_reference_has_every_key_and_command():
    page = SITE_PAGES["configuration_page"]()
    for verb in map(load_verb, COMMANDS):
        section = page.partition(f"## {verb.name}\n")[2].partition("\n## ")[0]
        assert section.count("\n| `") == len(config_fields(verb.config))
        assert f"## {verb.name}\n" in SITE_PAGES["commands_page"]()


def test_the_reference_has_every_public_name():
    page = SITE_PAGES["python_page"]()
    assert set(qwen_dist.__all__) <= {name for names in SITE_PAGES["PYTHON_NAMES"].values() for name in names}
    assert all(f"### {name}\n" in page for name in qwen_dist.__all__)
    assert "#### LLM.score\n" in page and "- `temperature`: divides the logits" in page


def test_a_notebook_becomes_text_and_code():
    source = "# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nprint(1)\n"
    assert SITE_PAGES["notebook_page"](source) == "# Title\n\nText.\n\n```python\nprint(1)\n```\n"


def test_links_out_of_the_site_become_pages_or_text():
    to_page, page = SITE_PAGES["on_page_markdown"], type("Page", (), {})()
    page.file = type("File", (), {"src_uri": "loading.md"})()
    links = "[a](../launch/README.md) [b](../setup.py) [c](faq.md#runs) [d](../examples/lora.py) [e](https://x.y)"
    links += " [f](../examples) [g](../examples/notebooks/tour.py)"
    expected = "[a](launch.md) b [c](faq.md#runs) [d](examples.md#lorapy) [e](https://x.y)"
    expected += " [f](examples.md) [g](notebooks/tour.md)"
    assert to_page(links, page) == expected


# --- what the gate installs, and where it runs ---


def test_constraints_pin_everything_that_the_project_asks_for():
    """For each Python version; `uv pip compile …` in CONTRIBUTING.md writes the file."""
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] not in "# "]
    extras = PROJECT["optional-dependencies"]
    asked = [
        Requirement(text)
        for name in ("docs", "dev", "metrics", "parity", "parquet", "remote", "serve", "structured")
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

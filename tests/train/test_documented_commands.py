"""The commands of docs/finetune.md do what the page says, on a small model; of slow ones only the flags are checked."""

import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from qwen_dist.cli import main

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "finetune.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.startswith("qwen-dist ")]
LAUNCHED = [line for block in BLOCKS for line in block.splitlines() if line.startswith("launch/")]
# The benchmark commands for training, on this page and on the performance page.
SPEED = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
MEASURED = re.findall(r"benchmarks/\w+\.py[^`#\n:]*", PAGE) + re.findall(r"benchmarks/finetune\.py[^`#\n:]*", SPEED)


@pytest.fixture(scope="module")
def place(tiny_directory, chats, tmp_path_factory):
    """A directory with the files that the commands name: DIR, chats.jsonl, configs."""
    place = tmp_path_factory.mktemp("place")
    (place / "configs").symlink_to(ROOT / "configs")
    (place / "DIR").symlink_to(tiny_directory("qwen3", num_hidden_layers=1))
    (place / "chats.jsonl").symlink_to(chats)
    return place


def test_every_command_runs_in_the_order_of_the_page(place, monkeypatch, capsys):
    """With fewer steps and shorter rows than on the page, on one device."""
    monkeypatch.chdir(place)
    assert len(COMMANDS) >= 5
    outputs = {}
    for command in COMMANDS:
        arguments = shlex.split(command, comments=True)[1:]
        if arguments[0] == "finetune":
            arguments += ["--steps", "12", "--mesh", "data=1", "--config.data.max_length=64"]
        if arguments[0] == "generate":
            arguments += ["--max-new-tokens", "4"]
        assert main(arguments) == 0, command
        outputs[command] = capsys.readouterr().out
    assert {path.name for path in (place / "run").iterdir()} >= {"adapter", "metrics.jsonl", "loss.html", "checkpoints"}
    assert (place / "merged" / "model.safetensors").is_file()
    assert any("--show-data" in command and "in the loss" in text for command, text in outputs.items())
    assert any("--dry-run" in command and "parameters are trained" in text for command, text in outputs.items())


@pytest.mark.parametrize("command", LAUNCHED)
def test_launched_commands(command, place, monkeypatch, capsys):
    """The launcher would start the given number of processes, with a command that also runs as one process."""
    launcher, arguments = (shlex.split(part) for part in command.split(" -- "))
    process = [ROOT / launcher[0], *launcher[1:], "--dry-run", "--", *arguments]
    lines = subprocess.run(process, check=True, capture_output=True, text=True, cwd=place).stdout.splitlines()
    assert len(lines) == int(launcher[launcher.index("--processes") + 1])
    assert all(f"qwen-dist {shlex.join(arguments)} " in line for line in lines)
    monkeypatch.chdir(place)
    elsewhere = ["--output", "elsewhere", "--config.data.max_length=64", "--dry-run"]
    assert main([*arguments, *elsewhere]) == 0
    assert "parameters are trained" in capsys.readouterr().out


def test_benchmarks_have_the_documented_flags():
    assert len(MEASURED) >= 3
    known = {}
    for command in MEASURED:
        script, *arguments = shlex.split(command)
        if script not in known:
            process = [sys.executable, ROOT / script, "--help"]
            known[script] = subprocess.run(process, check=True, capture_output=True, text=True).stdout
        assert all(f"{flag} " in known[script] for flag in arguments if flag.startswith("--")), command


def test_documented_tests_exist():
    named = re.findall(r"`pytest [^`]*?(tests/\S+?)(?: -k (\w+))?`", PAGE)
    assert len(named) >= 2
    for path, word in named:
        files = [ROOT / path] if path.endswith(".py") else sorted((ROOT / path).glob("test_*.py"))
        assert any(re.search(rf"def test_\w*{word}", file.read_text(encoding="utf-8")) for file in files), path


def test_every_documented_option_exists():
    """`group.field` and `field=value` in the text are fields of the configuration."""
    import dataclasses
    import typing

    from qwen_dist.config import FinetuneConfig

    def fields(cls, prefix=""):
        for field in dataclasses.fields(cls):
            yield prefix + field.name
            kind = typing.get_type_hints(cls)[field.name]
            if dataclasses.is_dataclass(kind):
                yield from fields(kind, f"{prefix}{field.name}.")

    known = set(fields(FinetuneConfig))
    named = set(re.findall(r"`((?:model|data|optimizer|lora)\.[a-z_]+)`", PAGE))
    assert named and named <= known, named - known
    named = set(re.findall(r"`([a-z_]+)=[^`]*`", PAGE))
    assert named and named <= known, named - known

"""Flags come from the fields of the configuration dataclasses; --print-config prints what a command would run with."""

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
import types
from typing import Literal

import pytest

from qwen_dist.cli import main
from qwen_dist.cli.commands import COMMANDS, build_parser, load_verb
from qwen_dist.cli.flags import ProcessFlags, Verb
from qwen_dist.config import BatchConfig, EngineOptions, load_config
from qwen_dist.config_fields import config_fields, option
from qwen_dist.errors import UsageError

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
# For each command: arguments that set keys by a flag, an override and a file; and some of the keys that they set.
ARGUMENTS = {
    "generate": (
        "--prompt 'Say \"hi\" in 日本語' --stop a --stop 'b\n' --top-p 0.1 --config.sampling.temperature=1e-7 "
        f"--config {CONFIGS}/generate.py:some/dir --thinking off",
        {"model.path": "some/dir", "sampling.stop": ["a", "b\n"], "sampling.temperature": 1e-7, "chat.thinking": "off"},
    ),
    "batch": (
        f"--input i --output o --config {CONFIGS}/batch.py --raw --config.engine.policy=latency --metrics-port 80",
        {"raw": True, "engine.policy": "latency", "engine.max_batch_size": 96, "metrics_port": 80, "sampling.top_k": None},
    ),
    "serve": (
        f"--config {CONFIGS}/serve.py:some/dir --port 0 --config.warm_up=false --max-waiting 3 --drain-timeout 2 "
        "--adapter a=b --adapter c=d",
        {"model.path": "some/dir", "port": 0, "warm_up": False, "engine.policy": "latency", "drain_timeout": 2.0}
        | {"adapters": ["a=b", "c=d"], "model.adapter": ""},
    ),
    "finetune": (
        f"--data a --data b --output o --config {CONFIGS}/finetune_full.py:m --steps 3 "
        "\"--config.lora.target_modules=('x',)\"",
        {"data.files": ["a", "b"], "optimizer.b2": 0.95, "optimizer.eps": 1e-8, "lora.target_modules": ["x"], "steps": 3},
    ),
    "inspect": ("some/dir --dtype float32 --mesh fsdp=2", {"model.path": "some/dir", "mesh": "fsdp=2", "kernels": False}),
    "export": (
        "--model m --output o --config.model.dtype=float16 --max-shard-size 2GB",
        {"model.dtype": "float16", "max_shard_size": "2GB", "overwrite": False},
    ),
    "doctor": ("--dtype float32 --num-cpu-devices 2", {"dtype": "float32"}),
    "quantize": (
        "--model m --output o --quantize int8 --quantize-group-size 64",
        {"model.quantize": "int8", "model.quantize_group_size": 64, "model.dtype": "bfloat16"},
    ),
    "preflight": ("--mesh fsdp=2 --num-processes 2", {"model.path": "", "mesh": "fsdp=2"}),
    "parity": ("--model m --prompt a --prompt b", {"model.dtype": "float32", "prompts": ["a", "b"], "tokens": None}),
    "plan": (
        "--model m --topology v5e:2x2 --compile --config.lora.rank=4 --command finetune",
        {"topology": "v5e:2x2", "compile": "all", "lora.rank": 4, "command": "finetune", "remat": "full"},
    ),
}
VERBS = [load_verb(name) for name in COMMANDS]
BY_NAME = {verb.name: verb for verb in VERBS}


@dataclasses.dataclass(frozen=True)
class _SomeEngine(EngineOptions):
    colour: Literal["red", "green"] = option("red", flag="--colour", metavar="COLOUR", help="of 100% of the answers")


@dataclasses.dataclass(frozen=True)
class _SomeConfig:
    engine: _SomeEngine = _SomeEngine()


def read(verb: Verb, *arguments: str):
    parser, _ = build_parser([verb.name])
    options, overrides = parser.parse_known_args([verb.name, *arguments])
    return verb.read(options, overrides)[0]


# --- a field is a flag ---


def test_a_new_field_is_a_flag_a_key_and_a_line_of_the_reference(monkeypatch, capsys, tmp_path):
    """With metadata in one place it is in --help, in --print-config, in configuration files and in `config_fields`."""
    verb = Verb("paint", _SomeConfig, ProcessFlags, lambda config, flags: 7, "an example")
    monkeypatch.setitem(sys.modules, "qwen_dist.cli.paint", types.SimpleNamespace(VERB=verb))
    monkeypatch.setitem(COMMANDS, "paint", "paint the answers")
    with pytest.raises(SystemExit):
        main(["paint", "--help"])
    shown = capsys.readouterr().out
    assert "engine:\n  --max-batch-size N" in shown
    assert "  --colour COLOUR          of 100% of the answers: red or green (red)\n" in shown

    assert main(["paint", "--colour", "green", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["engine"]["colour"] == "green"
    (tmp_path / "paint.json").write_text(printed)
    assert read(verb, "--config", str(tmp_path / "paint.json")).engine.colour == "green"
    assert main(["paint", "--colour", "green"]) == 7

    assert main(["paint", "--colour", "blue"]) == 2
    assert "engine.colour is 'blue'; it must be 'red' or 'green'" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"engine.color is not a field; did you mean engine.colour\?"):
        load_config(_SomeConfig, None, ["--config.engine.color=red"], {})

    field = config_fields(_SomeConfig)[-1]
    assert field[:1] + field[2:5] == ("engine.colour", "red", "--colour", "of 100% of the answers")
    assert field.type_name == "'red' or 'green'" and field.choices == ("red", "green")


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)
def test_every_key_has_a_help_and_every_flag_is_one_key(verb):
    fields = config_fields(verb.config) + config_fields(verb.flags)
    assert not [field.key for field in fields if not field.help or "\n" in field.help]
    flags = [field.flag for field in fields if field.flag]
    assert len(flags) == len(set(flags))
    _, commands = build_parser([verb.name])
    assert {*flags, "--help", "-h"} == {
        name for action in commands[verb.name]._actions for name in action.option_strings or [action.metavar]
    }


def test_required_keys_name_their_flag():
    fields = {field.key: field for field in config_fields(BatchConfig)}
    required = [key for key, field in fields.items() if field.default is dataclasses.MISSING]
    assert required == ["model.path", "input", "output"]
    with pytest.raises(UsageError) as error:
        read(BY_NAME["plan"])
    assert "model.path is missing; give --model" in str(error.value)
    assert "topology is missing; give --topology" in str(error.value)
    with pytest.raises(UsageError, match="give DIR_OR_HUB_ID, or --kernels"):
        read(BY_NAME["inspect"])


@pytest.mark.parametrize(
    ("verb", "key"),
    [("plan", "adapter"), ("plan", "load_format"), ("parity", "host_memory_budget"), ("inspect", "adapter")],
)
def test_a_command_has_only_the_keys_that_it_uses(verb, key):
    with pytest.raises(UsageError, match=f"model.{key} is not a field"):
        read(BY_NAME[verb], f"--config.model.{key}=x", *(["m"] if verb == "inspect" else ["--model", "m"]))


# --- --print-config ---


@pytest.mark.parametrize("name", ["run.json", "run.yaml"])
@pytest.mark.parametrize("verb", ARGUMENTS)
def test_a_printed_configuration_is_the_same_when_it_is_read(verb, name, capsys, tmp_path):
    """Nothing is loaded or written: the files that are named do not exist."""
    assert set(ARGUMENTS) == set(BY_NAME)
    text, expected = ARGUMENTS[verb]
    arguments = shlex.split(text)
    assert main([verb, *arguments, "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / name).write_text(printed)
    before = read(BY_NAME[verb], *arguments)
    assert read(BY_NAME[verb], "--config", str(tmp_path / name)) == before
    found = _flat(json.loads(printed))
    assert {key: found[key] for key in expected} == expected
    keys = {field.key for field in config_fields(BY_NAME[verb].config)}
    assert set(found) == keys
    assert main([verb, "--config", str(tmp_path / name), "--print-config"]) == 0
    assert capsys.readouterr().out == printed


def _flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def test_a_wrong_configuration_is_not_printed(capsys):
    assert main(["batch", "--print-config", "--dtype", "float16"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "input is missing; give --input" in err and "model.dtype is 'float16'" in err


# --- other flags ---


def test_a_switch_is_on_or_off(capsys):
    batch = BY_NAME["batch"]
    given = ("--model", "m", "--input", "i", "--output", "o")
    assert read(batch, *given).engine.prefix_cache is True
    assert read(batch, *given, "--prefix-cache", "off").engine.prefix_cache is False
    assert read(batch, *given, "--prefix-cache", "on").engine.prefix_cache is True
    assert read(batch, *given, "--config.engine.prefix_cache=false").engine.prefix_cache is False
    with pytest.raises(SystemExit, match="2"):
        main(["batch", "--prefix-cache", "no"])
    assert "--prefix-cache: 'no' is neither on nor off" in capsys.readouterr().err


def test_the_time_to_wait_for_other_processes(monkeypatch, capsys):
    monkeypatch.setenv("QWEN_DIST_START_TIMEOUT", "soon")
    assert main(["preflight"]) == 2
    assert "QWEN_DIST_START_TIMEOUT is 'soon'; it must be seconds, such as 60" in capsys.readouterr().err
    options = build_parser(["preflight"])[0].parse_args(["preflight", "--start-timeout", "2.5"])
    assert BY_NAME["preflight"].read(options, [])[1].start_timeout == 2.5


# --- completion ---


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("qwen-dist fi", {"finetune "}),
        ("qwen-dist batch --max-b", {"--max-batch-size "}),
        ("qwen-dist generate --thinking o", {"on", "off"}),
        ("qwen-dist generate --prefix-cache o", {"on", "off"}),
        ("qwen-dist plan --remat s", {"selective "}),
    ],
)
def test_the_shell_completes_commands_flags_and_choices(line, expected, tmp_path):
    """As the function that `register-python-argcomplete qwen-dist` prints calls the program."""
    pytest.importorskip("argcomplete")
    variables = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    variables |= {"_ARGCOMPLETE_STDOUT_FILENAME": str(tmp_path / "found")}
    command = [sys.executable, "-m", "qwen_dist"]
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set((tmp_path / "found").read_text().split("\n")) == expected

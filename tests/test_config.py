"""The configuration of a run: files, overrides and flags, bound strictly, with every problem in one message."""

import dataclasses
import importlib.util
import pathlib

import pytest

from qwen_dist.config import (
    BatchConfig,
    EngineOptions,
    GenerateConfig,
    ModelOptions,
    SamplingOptions,
    bind_config,
    load_config,
    parse_bytes,
)
from qwen_dist.engine.request import SamplingParams
from qwen_dist.errors import UsageError

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


@pytest.fixture
def file(tmp_path):
    """Return a function (body of get_config) -> path of a configuration file."""

    def write(body: str) -> str:
        path = tmp_path / "run.py"
        path.write_text(f"from ml_collections import config_dict\n\n\ndef get_config(arg=''):\n    {body}\n")
        return str(path)

    return write


def config_of(*items: str) -> str:
    """Return the body of a get_config that sets these keys."""
    return "return config_dict.ConfigDict({" + ", ".join(items) + "})"


# --- sources of values ---


def test_defaults_file_overrides_and_flags_in_that_order(file):
    path = file(
        config_of("'model': {'path': arg, 'dtype': 'float32'}", "'sampling': {'top_k': 1, 'seed': 1, 'top_p': 0.5}")
    )
    overrides = ["--config.sampling.seed=2", "--config.sampling.top_p=0.25", "--config.mesh=fsdp=2,tensor=4"]
    config = load_config(GenerateConfig, f"{path}:some/dir", overrides, {"sampling.top_p": 0.125, "model.dtype": "float64"})
    assert config == GenerateConfig(
        model=ModelOptions("some/dir", dtype="float64"),
        mesh="fsdp=2,tensor=4",
        sampling=SamplingOptions(top_k=1, seed=2, top_p=0.125),
    )


def test_without_a_file_only_fields_without_a_default_are_required():
    assert load_config(GenerateConfig, None, [], {"model.path": "x"}) == GenerateConfig(ModelOptions("x"))
    with pytest.raises(UsageError) as error:
        load_config(BatchConfig, None, [], {})
    assert str(error.value).splitlines()[1:] == [
        "  - model.path is missing; give --model",
        "  - input is missing; give --input",
        "  - output is missing; give --output",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("model.path=17", ModelOptions("17")),
        ("model.path=a=b", ModelOptions("a=b")),
        ("model.path=", ModelOptions("")),
        ("sampling.top_k=3", SamplingOptions(top_k=3)),
        ("sampling.seed=-4", SamplingOptions(seed=-4)),
        ("sampling.temperature=1", SamplingOptions(temperature=1.0)),
        ("sampling.temperature=1e-3", SamplingOptions(temperature=1e-3)),
        ("sampling.temperature=None", SamplingOptions(temperature=None)),
        ("sampling.stop=('a', 'b=c')", SamplingOptions(stop=("a", "b=c"))),
        ("sampling.stop=['a']", SamplingOptions(stop=("a",))),
        ("engine.max_batch_size=7", EngineOptions(max_batch_size=7)),
        ("raw=true", True),
        ("raw=False", False),
    ],
)
def test_overrides_are_read_as_their_fields_types(text, value):
    path = text.partition("=")[0]
    needed = {"model.path": "x", "input": "i", "output": "o"}
    needed.pop(path, None)  # flags come after overrides
    config = load_config(BatchConfig, None, [f"--config.{text}"], needed)
    read = getattr(config, path.split(".")[0])
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize("name", ["generate", "batch"])
def test_the_configurations_of_the_project(name):
    cls = {"generate": GenerateConfig, "batch": BatchConfig}[name]
    files = {"input": "i", "output": "o"} if name == "batch" else {}
    config = load_config(cls, f"{CONFIGS / name}.py:some/dir", [], files)
    assert config == cls(ModelOptions("some/dir"), **files, sampling=SamplingOptions(max_new_tokens=512))
    spec = importlib.util.spec_from_file_location("shown", CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert f"qwen-dist {name} --config configs/{name}.py" in module.__doc__
    assert "path" not in module.get_config().model  # without an argument, --model gives it


# --- errors ---


def test_all_problems_of_file_overrides_and_flags_are_listed_at_once(file):
    path = file(config_of("'model': {'dtipe': 'float32', 'dtype': 'float16'}", "'sampling': {'top_k': 1.5}", "'zzz': 3"))
    overrides = [
        "--config.sampling.temperture=1",
        "--config.sampling.min_p=hot",
        "--config.sampling.stop=END",
        "--config.sampling.seed",
        "--config.mesh.tensor=2",
        "--config.overwrite=yes",
    ]
    with pytest.raises(UsageError) as error:
        load_config(BatchConfig, path, overrides, {"mesh": "tensor=2", "engine.max_batch_size": True, "input": "i"})
    lines = str(error.value).splitlines()
    assert lines[0] == "the configuration cannot be used:"
    assert {line.removeprefix("  - ") for line in lines[1:]} == {
        "--config.sampling.seed has no value: write --config.sampling.seed=VALUE",
        "zzz is not a field; the fields are model, input, output, mesh, sampling, chat, engine, num_replicas, raw, "
        "overwrite, retry_errors, keep_order, max_line_size, metrics_port, metrics_host, profile, chart",
        "model.dtipe is not a field; did you mean model.dtype?",
        "model.dtype is 'float16'; it must be 'bfloat16' or 'float32' or 'float64' (activations of Qwen models exceed "
        "65504, the largest float16; devices without bfloat16 can use float32, and export writes float16)",
        "model.path is missing; give --model",
        "output is missing; give --output",
        "sampling.top_k is 1.5; it must be int or None",
        "sampling.temperture is not a field; did you mean sampling.temperature?",
        "sampling.min_p is 'hot'; it must be float or None",
        "sampling.stop is 'END'; it must be a tuple of strings, such as ('a', 'b') or None",
        "overwrite is 'yes'; it must be bool",
        "engine.max_batch_size is True; it must be int",
    }


def test_a_section_is_not_a_value_and_a_value_is_not_a_section(file):
    path = file(config_of("'model': 'some/dir'", "'sampling': None"))
    with pytest.raises(UsageError) as error:
        load_config(GenerateConfig, path, [], {})
    assert "model is 'some/dir'; it must hold fields: path, dtype" in str(error.value)
    assert "sampling is None; it must hold fields: max_new_tokens" in str(error.value)
    with pytest.raises(UsageError, match=r"model.path cannot be set: model is 'some/dir' and has no fields"):
        load_config(GenerateConfig, path, [], {"model.path": "x"})
    with pytest.raises(UsageError, match=r"mesh is {'x': '2'}; it must be str"):
        load_config(GenerateConfig, None, ["--config.mesh.x=2"], {"model.path": "x"})
    with pytest.raises(UsageError, match="sampling is '3'; it must hold fields"):
        load_config(GenerateConfig, None, ["--config.sampling=3"], {"model.path": "x"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"there is no file .*run\.py"),
        ("x = 1", r"must have a function get_config\(arg\) that returns a ConfigDict"),
        ("def get_config(arg): return 3", r"must have a function get_config\(arg\) that returns a ConfigDict"),
        ("def get_config(arg): 1 / 0", r"fails with ZeroDivisionError: division by zero; --debug shows where"),
        ("def get_config(", r"fails with SyntaxError: .* --debug shows where"),
        ("import nothing_of_this_name", r"fails with ModuleNotFoundError"),
    ],
)
def test_invalid_configuration_files(tmp_path, content, message):
    path = tmp_path / "run.py"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match=message):
        load_config(GenerateConfig, str(path), [], {"model.path": "x"})


@pytest.mark.parametrize("size", [0, -3, 10**9])
def test_max_batch_size_has_bounds(size):
    with pytest.raises(UsageError, match=f"engine.max_batch_size is {size}; it must be from 1 to 65536"):
        bind_config(BatchConfig, {"model": {"path": "x"}, "input": "i", "output": "o", "engine": {"max_batch_size": size}})


def test_sampling_options_are_the_sampling_parameters_of_the_engine():
    """The fields are the same, so that none is lost. Others only a record, its template or a checkpoint set."""
    known = {field.name for field in dataclasses.fields(SamplingParams)}
    of_checkpoint = {"sequence_bias", "begin_suppress_tokens", "no_repeat_ngram_size", "min_length", "max_length"}
    options = {field.name for field in dataclasses.fields(SamplingOptions)}
    of_requests = {"prompt_logprobs", "logit_bias", "stop_token_ids", "structured_outputs"}
    assert options | of_requests | of_checkpoint == known


@pytest.mark.parametrize(
    ("text", "number"),
    [("256MB", 256_000_000), ("2GiB", 2**31), ("1.5 kb", 1500), ("7", 7), ("3B", 3), ("1TiB", 2**40), ("1k", 1000)],
)
def test_sizes_in_bytes(text, number):
    assert parse_bytes(text) == number


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1 XB", "1e3MB", "1,5GB"])
def test_invalid_sizes(text):
    with pytest.raises(UsageError, match=r"is not a size; examples are 256MB, 1.5GB and 2GiB"):
        parse_bytes(text)

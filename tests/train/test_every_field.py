"""Every field of the configuration has an effect: another value changes the result, or is refused."""

import dataclasses
import json
import pathlib
import typing

import pytest
from chat_templates import QWEN3
from short_run import short_run

from qwen_dist.config import FinetuneConfig
from qwen_dist.errors import UserError
from qwen_dist.train.batches import training_batches
from qwen_dist.train.run import prepare, set_up_abstract, train

REFUSED = "refused"


@pytest.fixture(scope="module")
def model(tiny_directory):
    return tiny_directory("qwen3", num_hidden_layers=1, num_attention_heads=4, head_dim=8, hidden_size=32)


@pytest.fixture(scope="module")
def files(chats, tiny_directory, tmp_path_factory):
    """Fewer chats, chats with a broken line, prompts with completions; other models."""
    place = tmp_path_factory.mktemp("files")
    few = chats.read_text().splitlines()[:12]
    (place / "few.jsonl").write_text("\n".join(few) + "\n")
    (place / "broken.jsonl").write_text("\n".join([*few, '{"messages": [']) + "\n")
    (place / "pairs.jsonl").write_text(json.dumps({"prompt": "the fox", "completion": "brown dog"}) + "\n")
    (place / "text.jsonl").write_text(json.dumps({"text": "the quick brown fox " * 100}) + "\n")
    (place / "other").symlink_to(tiny_directory("qwen2", num_hidden_layers=1))
    unknown_key = tiny_directory("qwen3", num_hidden_layers=1, hidden_size=32)
    config = json.loads((unknown_key / "config.json").read_text()) | {"attn_scale": 2.0}
    (unknown_key / "config.json").write_text(json.dumps(config))
    (place / "unknown_key").symlink_to(unknown_key)
    thinking = tiny_directory("qwen3", num_hidden_layers=1, hidden_size=32)
    settings = json.loads((thinking / "tokenizer_config.json").read_text()) | {"chat_template": QWEN3}
    (thinking / "tokenizer_config.json").write_text(json.dumps(settings))
    (place / "thinking").symlink_to(thinking)
    return place


@pytest.fixture(scope="module")
def base(model, chats):
    """A function (output, changes) -> configuration; `{files}` in a value is the directory of other data."""
    return lambda output, changes: short_run(model, chats, output, {"model.dtype": "bfloat16", **changes})


def leaves(cls, prefix="") -> list[str]:
    """The names of all fields, with dots."""
    hints = typing.get_type_hints(cls)
    return [
        name
        for field in dataclasses.fields(cls)
        for name in (
            leaves(hints[field.name], f"{prefix}{field.name}.")
            if dataclasses.is_dataclass(hints[field.name])
            else [prefix + field.name]
        )
    ]


# (field, another value, other changes in both runs), by what is compared.
IN_PROGRAM = [  # the program of a step, not compiled
    ("model.dtype", "float32", {}),
    ("model.quantize", "fp8", {}),
    ("model.quantize_group_size", 4, {"model.quantize": "int8", "model.quantize_group_size": 8}),
    ("model.quantize_head", True, {"model.quantize": "fp8"}),
    ("method", "full", {}),
    ("lora.rank", 5, {}),
    ("lora.alpha", 3.0, {}),
    ("lora.use_rslora", True, {}),
    ("lora.target_modules", ("q_proj",), {}),
    ("optimizer.name", "muon", {}),
    ("optimizer.learning_rate", 2e-3, {}),
    ("optimizer.schedule", "linear", {}),
    ("optimizer.warmup_steps", 2, {}),
    ("optimizer.warmup_ratio", 0.5, {}),
    ("optimizer.min_lr_ratio", 0.5, {}),
    ("optimizer.weight_decay", 0.5, {}),
    ("optimizer.clip_norm", 0.125, {}),
    ("optimizer.b1", 0.75, {}),
    ("optimizer.b2", 0.75, {}),
    ("optimizer.eps", 0.125, {}),
    ("mesh", "fsdp=2", {}),
    ("batch_size", 8, {}),
    ("num_microbatches", 2, {}),
    ("remat", "full", {}),
    ("master_weights", False, {}),
]
IN_DATA = [  # the first batch and how long the run is
    ("data.files", ("{files}/few.jsonl",), {}),
    ("data.max_length", 48, {}),
    ("data.packing", False, {}),
    ("data.raw", True, {"data.files": ("{files}/pairs.jsonl",)}),
    ("data.bad_records", "skip", {"data.files": ("{files}/broken.jsonl",)}),
    ("data.max_line_size", "1kB", {"data.files": ("{files}/text.jsonl",)}),
    ("data.seed", 1, {}),
    ("chat.thinking", "off", {"model.path": "{files}/thinking"}),
    ("chat.template_args", ("enable_thinking=false",), {"model.path": "{files}/thinking"}),
    ("steps", 5, {}),
    ("epochs", 2.5, {"steps": 0}),
]
EVALUATED = {"data.eval_files": ("{files}/few.jsonl",)}
IN_RUN = [  # the output of a run of a few steps
    ("model.path", "{files}/other", {}),
    ("model.load_format", "dummy", {}),
    ("model.ignored_config_keys", "attn_scale", {"model.path": "{files}/unknown_key"}),
    ("model.host_memory_budget", "nothing", {}),
    ("model.adapter", "{files}/nowhere", {}),
    ("data.eval_files", ("{files}/few.jsonl",), {}),
    ("save_every", 1, {}),
    ("max_to_keep", 1, {"save_every": 1}),
    ("keep_best", True, {}),  # refused without evaluation data; its effect is tested in test_train_run
    ("eval_every", 1, EVALUATED),
    ("tensorboard", True, {}),
]
SEPARATE = ("output", "overwrite")  # have their own test


def test_every_field_is_here():
    here = [field for field, *_ in (*IN_PROGRAM, *IN_DATA, *IN_RUN)]
    assert sorted([*here, *SEPARATE]) == sorted(leaves(FinetuneConfig))


def filled_in(value, files):
    if isinstance(value, tuple):
        return tuple(filled_in(item, files) for item in value)
    return value.replace("{files}", str(files)) if isinstance(value, str) else value


@pytest.fixture
def differs(base, files, tmp_path):
    """A function (observe, field, value, others): whether the field changes what is observed of a configuration."""

    def differs(observe, field, value, others) -> bool:
        outcomes = []
        for number, changes in enumerate((others, {**others, field: value})):
            filled = {name: filled_in(value, files) for name, value in changes.items()}
            try:
                outcomes.append(observe(base(tmp_path / str(number), filled)))
            except UserError as error:
                outcomes.append((REFUSED, str(error)))
        assert REFUSED not in outcomes[0] or field in ("data.bad_records", "model.ignored_config_keys"), outcomes[0]
        return outcomes[0] != outcomes[1]

    return differs


def program(config) -> str:
    inputs = prepare(config)
    batch = next(training_batches(inputs.training, config.data, config.batch_size))
    microbatch = batch.microbatches(config.num_microbatches)[0]
    return set_up_abstract(inputs).trainer.lower(microbatch, config.num_microbatches).as_text()


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value", "others"), IN_PROGRAM)
def test_the_field_changes_the_program(differs, field, value, others):
    assert differs(program, field, value, others)


def data(config) -> tuple:
    inputs = prepare(config)
    batch = next(training_batches(inputs.training, config.data, config.batch_size))
    return inputs.num_steps, *(None if x is None else x.tolist() for x in batch)


@pytest.mark.parametrize(("field", "value", "others"), IN_DATA)
def test_the_field_changes_the_data(differs, field, value, others):
    assert differs(data, field, value, others)


def outputs(config) -> tuple:
    """The metrics of a run without times, its checkpoints and its files."""
    train(prepare(config))
    output = pathlib.Path(config.output)
    entries = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    numbers = [{name: value for name, value in entry.items() if name != "seconds"} for entry in entries]
    steps = sorted(path.name for path in (output / "checkpoints").iterdir())
    return numbers, steps, sorted(path.name for path in output.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(("field", "value", "others"), IN_RUN)
def test_the_field_changes_the_run(differs, field, value, others):
    assert differs(outputs, field, value, others)


def test_output_and_overwrite(base, tmp_path):
    config = base(tmp_path / "here", {"steps": 1})
    train(prepare(config))
    reported = []
    train(prepare(config), callback=reported.append)
    assert reported == [], "all steps were done"
    train(prepare(dataclasses.replace(config, overwrite=True)), callback=reported.append)
    assert [metrics.step for metrics in reported] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]

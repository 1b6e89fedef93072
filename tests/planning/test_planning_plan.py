"""`qwen-dist plan`: its output, the limits it finds, and its errors."""

import dataclasses
import json
import subprocess
import sys

import pytest
from rich.console import Console
from shapes import QWEN3_8B, QWEN3_32B, QWEN3_NEXT_80B, SMALL

from qwen_dist.errors import UsageError
from qwen_dist.hf_config import parse_model_config
from qwen_dist.models.config import LayerConfig
from qwen_dist.planning.chips import CHIPS, Topology
from qwen_dist.planning.plan import compile_plan, make_capacity_plan, parse_layers, plan_mesh, step_time
from qwen_dist.planning.report import print_plan, to_json, write_chart
from qwen_dist.planning.workload import Workload

V5E = Topology.parse("v5e:8x8")


@pytest.mark.parametrize(
    ("text", "num_devices"), [("v5e:16x16", 256), ("v5p:16x16x16", 4096), ("tpu7x:2x2x1", 8), ("cpu:3", 3)]
)
def test_topologies(text, num_devices):
    assert Topology.parse(text).num_devices == num_devices


@pytest.mark.parametrize("text", ["v5e", "v5e:4", "v5p:4x4", "v9:4x4", "cpu:2x2", "v5e:0x4", "v5e:4x4x", "v6e:-1x4", ""])
def test_unknown_topologies(text):
    with pytest.raises(UsageError, match="Use v4:AxBxC, v5e:AxB"):
        Topology.parse(text)


@pytest.mark.parametrize("command", ["batch", "finetune"])
def test_the_largest_batch_and_context_fit_and_larger_ones_do_not(command):
    config, workload = parse_model_config(QWEN3_8B), Workload(command, 64, 2048)
    mesh = "data=2,fsdp=8,tensor=4"
    plan = make_capacity_plan("8b", config, V5E, workload, mesh)
    step = {"batch": 2, "finetune": 16}[command]

    def fits(**changes):
        return plan_mesh(config, V5E, dataclasses.replace(workload, **changes), mesh).fits

    assert fits(batch=plan.max_batch) and not fits(batch=plan.max_batch + step)
    assert fits(context=plan.max_context)
    assert plan.max_context == config.max_position_embeddings or not fits(context=plan.max_context + 64)


def test_proposals_fit_divide_and_come_best_first():
    config = parse_model_config(QWEN3_32B)
    plan = make_capacity_plan("32b", config, V5E, Workload("batch", 64, 4096), None)
    assert plan.chosen == plan.proposals[0]
    assert all(proposal.fits for proposal in plan.proposals)
    speeds = [proposal.seconds_per_token for proposal in plan.proposals]
    assert speeds == sorted(speeds)
    # A whole copy on each device of 16 GB does not fit.
    assert not plan_mesh(config, V5E, Workload("batch", 64, 4096), "data=64").fits
    assert plan.legal_axis_sizes["tensor"] == (1, 2, 4, 8, 16, 32, 64)


def test_a_batch_is_rounded_up_to_a_multiple_of_the_mesh():
    config = parse_model_config(SMALL)
    assert plan_mesh(config, V5E, Workload("batch", 1, 256), "data=8,tensor=8").workload.batch == 8
    assert plan_mesh(config, V5E, Workload("finetune", 1, 256), "data=2,fsdp=4,tensor=8").workload.batch == 8


def test_step_time():
    step = step_time(CHIPS["v5e"], flops=197e12, nbytes=2 * 819e9, received=50e9)
    assert (step.compute, step.memory, step.collectives, step.total) == (1, 2, 0.5, 2.5)
    assert step_time(Topology.parse("cpu:8").chip, 1, 1, 1) is None


def test_the_floor_of_a_decode_step_is_weights_and_cache_over_the_bandwidth():
    plan = plan_mesh(parse_model_config(QWEN3_32B), V5E, Workload("batch", 64, 4096), "data=8,tensor=8")
    decode = plan.phases[1]
    assert decode.step.memory == (decode.memory["parameters"] + decode.memory["cache"]) / 819e9
    assert decode.step.memory > decode.step.compute


@pytest.mark.parametrize("text", ["3,1", "0,2", "1", "1,2,3", "a,b", "1,5", "2,2"])
def test_invalid_numbers_of_layers_to_compile(text):
    with pytest.raises(UsageError, match="two increasing numbers up to 4"):
        parse_layers(text, 4 * (LayerConfig(),))


def test_layers_to_compile_are_whole_periods_of_the_pattern():
    plain, hybrid = 36 * (LayerConfig(),), parse_model_config(QWEN3_NEXT_80B).layers
    assert [parse_layers("auto", layers) for layers in (plain, hybrid, hybrid[:8], plain[:2])] == [(3, 5), (4, 8), (), ()]
    assert parse_layers("8,16", hybrid) == (8, 16) and parse_layers("all", hybrid) == ()
    with pytest.raises(UsageError, match=r"the kinds of the 48 layers repeat every 4, so 5 .* such as 4,8, or none"):
        parse_layers("4,5", hybrid)
    # An odd end: three linear layers after the last attention.
    assert parse_layers("auto", hybrid[:-1]) == (3, 7)
    with pytest.raises(UsageError, match=r"repeat every 3, .* or none"):
        parse_layers("1,2", (*plain[:2], LayerConfig("delta_net")))


# --- what is printed ---


@pytest.mark.slow
def test_terminal_json_and_chart_of_a_compiled_plan(tmp_path, capsys):
    config, workload = parse_model_config(SMALL | {"num_hidden_layers": 2}), Workload("batch", 8, 64)
    plan = make_capacity_plan("small[8]", config, Topology.parse("cpu:8"), workload, "tensor=8")
    plan = compile_plan(plan, config, (1, 2))
    found = json.loads(to_json(plan))
    for phase in found["chosen"]["phases"]:
        assert phase["compiled"]["device_bytes"] == pytest.approx(phase["device_bytes"], rel=0.1)
        assert phase["step"] is None
    assert found["compiled_layers"] == [1, 2]
    write_chart(plan, str(tmp_path / "plan.html"))
    page = (tmp_path / "plan.html").read_text()
    for words in ("prefill, estimate", "decode, compiled", "cache", "others", "limit: "):
        assert words in page
    print_plan(plan, Console(width=120))
    printed = capsys.readouterr().out
    for words in ("small[8]", "compiler", "from 1 and 2 layers", "all-reduce", "largest batch"):
        assert words in printed


def test_table_of_a_plan_for_training(capsys):
    plan = make_capacity_plan("tpu", parse_model_config(SMALL), V5E, Workload("finetune", 64, 256), None)
    print_plan(plan, Console(width=120))
    printed = capsys.readouterr().out
    for words in ("saved activations", "train, estimate", "µs per token", "fits"):
        assert words in printed


def qwen_dist(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "qwen_dist.cli", *arguments], capture_output=True, text=True)


def test_the_command_line(tmp_path):
    """A process has one backend, so the command runs in other processes: a plan that does not fit, then wrong usage."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_32B))
    done = qwen_dist("plan", "--model", str(path), "--topology", "v5e:2x2", "--mesh", "tensor=4", "--json")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["chosen"]["fits"] is False
    wrong = qwen_dist("plan", "--model", str(path), "--topology", "v5e:3")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("qwen-dist plan: topology 'v5e:3' is not known")
    wrong = qwen_dist("plan", "--model", str(path), "--topology", "cpu:8", "--num-cpu-devices", "4")
    assert (wrong.returncode, "--num-cpu-devices" in wrong.stderr) == (2, True)

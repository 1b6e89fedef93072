"""`qwen-dist parity` on random checkpoints of every family: its checks and its output."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from qwen_dist import DEMO_MODEL
from qwen_dist.errors import CheckpointError, UserError
from qwen_dist.families import FAMILIES
from qwen_dist.parity.candidate import Candidate
from qwen_dist.parity.page import to_html, write_html
from qwen_dist.parity.report import print_report
from qwen_dist.parity.run import ParityOptions, run_parity

pytestmark = pytest.mark.parity

YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
WINDOWS = {"use_sliding_window": True, "max_window_layers": 1, "num_hidden_layers": 2}
BLOCK = "input_layernorm residual post_attention_layernorm output".split()
ATTENTION = [f"self_attn.{name}" for name in "q_proj k_proj v_proj q_rope k_rope weights mixed o_proj".split()]
GATED_ATTENTION = [*ATTENTION, "self_attn.gated"]
DELTA_NET = [f"linear_attn.{name}" for name in "conv beta g core state_40 norm out_proj".split()]
FUSED, SEPARATE = ("in_proj_qkvz", "in_proj_ba"), ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
EXPERTS = ("gate", "scores", "chosen", "expert_outputs", "experts")
MOE = ("qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe")
HYBRID = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
SHARED_EXPERT = ("qwen2_moe", "qwen3_next", "qwen3_5_moe")
# Layers without experts among the first two: mlp_only_layers, decoder_sparse_step.
DENSE = {"qwen2_moe": {1}, "qwen3_moe": {0}, "qwen3_next": {1}, "qwen3_5_moe": set()}


# Without experts, and with experts and both kinds of mixer.
QUICK = ("qwen2", "qwen3_next")


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def report(request, tiny_checkpoint):
    checkpoint = tiny_checkpoint(request.param, num_hidden_layers=2)
    return run_parity(ParityOptions(checkpoint, dtype="float64", tokens=40, decode_steps=4))


def test_float64_is_within_bounds(report):
    assert report.ok, report.verdict()
    assert max(check.measured for check in report.checks) < 1e-11  # the bound is wider for large models only
    assert report.next_token.same_top1.all()


def test_every_component_is_compared(report):
    names = {
        section: {check.name for check in report.checks if check.section == section}
        for section in ("same inputs", "whole model")
    }
    family = report.facts["family"].partition(",")[0]
    is_moe, has_shared, is_hybrid = (family in families for families in (MOE, SHARED_EXPERT, HYBRID))
    projections = [f"linear_attn.{name}" for name in (FUSED if family == "qwen3_next" else SEPARATE)]
    mixers = [[*DELTA_NET, *projections], GATED_ATTENTION] if is_hybrid else [ATTENTION, ATTENTION]
    expected = {f"layers.{layer}.{name}" for layer in range(2) for name in BLOCK + mixers[layer]}
    expected |= {"embed_tokens", "norm", "logits"}
    with_experts = {0, 1} - DENSE[family] if is_moe else set()
    expected |= {f"layers.{layer}.mlp.{name}" for layer in {0, 1} - with_experts for name in PROJECTIONS}
    expected |= {f"layers.{layer}.mlp.{name}" for layer in with_experts for name in EXPERTS}
    shared = [*(f"shared_expert.{name}" for name in PROJECTIONS), "shared_expert_gate"] if has_shared else []
    expected |= {f"layers.{layer}.mlp.{name}" for layer in with_experts for name in shared}
    with_attention = range(1 if is_hybrid else 0, 2) if family.startswith("qwen3") else ()
    expected |= {f"layers.{layer}.self_attn.{name}_norm" for layer in with_attention for name in "qk"}
    assert names["same inputs"] == names["whole model"] == expected
    parameters = {check.name for check in report.checks if check.section == "parameters"}
    losses = {"loss", "aux_loss"} if is_moe else {"loss"}
    assert {check.name for check in report.checks if check.section == "gradient"} == parameters | losses
    assert ("routing" in report.facts) == is_moe
    steps = {check.name for check in report.checks if check.section == "decode"}
    assert {"decode.prefill", "decode.step_3", "decode.step_3.against_full_forward"} <= steps


def test_terminal_json_and_page_agree(report, tmp_path):
    text = io.StringIO()
    print_report(report, Console(file=text, width=160))
    assert report.verdict() in text.getvalue()
    assert "layers.*.self_attn.q_rope" in text.getvalue()
    found = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert found["ok"] and len(found["rows"]) == len(report.checks) and len(found["tokens"]["kl"]) == 72
    write_html(report, tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "Within bounds" in page and page == to_html(report)
    assert not re.search(r"<script|<link|https?://|src=|url\(", page), "the page must need nothing but itself"
    with pytest.raises(UserError, match="No such file"):
        write_html(report, tmp_path / "missing" / "out.html")


@pytest.mark.slow
def test_a_mixture_without_a_layer_of_experts(tiny_checkpoint):
    checkpoint = tiny_checkpoint("qwen2_moe", num_hidden_layers=2, mlp_only_layers=[0, 1])
    report = run_parity(ParityOptions(checkpoint, dtype="float32", tokens=16, decode_steps=2))
    assert report.ok, report.verdict()


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_is_within_bounds(tiny_checkpoint, family):
    report = run_parity(ParityOptions(tiny_checkpoint(family, num_hidden_layers=2), dtype="float32", decode_steps=4))
    assert report.ok, report.verdict()
    # The wider bounds are needed for real checkpoints, and for the gradients that pass through a recurrence.
    judged = [check for check in report.checks if check.section != "gradient" or family not in HYBRID]
    assert max(check.measured for check in judged) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("family", HYBRID)
def test_float32_of_a_model_that_amplifies_rounding(tiny_checkpoint, family):
    """Its layers have random weights. What is beyond the bound for equality is nearer to float64 than PyTorch is."""
    report = run_parity(ParityOptions(tiny_checkpoint(family), dtype="float32", tokens=130))
    assert report.ok, report.verdict()


def test_an_error_larger_than_pytorchs_is_reported(tiny_checkpoint, monkeypatch):
    """In float32 the whole model may be beyond the bound for equality only if its error is at most 1.2 times PyTorch's."""
    forward = Candidate.forward

    def with_an_error(self, inputs, columns, replacing=None):
        values = forward(self, inputs, columns, replacing)
        return values if replacing else values | {"logits": np.asarray(values["logits"]) * np.float32(1 + 3e-5)}

    monkeypatch.setattr(Candidate, "forward", with_an_error)
    report = run_parity(ParityOptions(tiny_checkpoint("qwen3", num_hidden_layers=2), dtype="float32", decode_steps=2))
    failed = [check for check in report.checks if not check.is_within]
    assert [(check.section, check.name, check.metric) for check in failed] == [("whole model", "logits", "ratio")]
    assert failed[0].measured > 10 and failed[0].limit == 1.2 and failed[0].where


@pytest.mark.slow
@pytest.mark.parametrize(("family", "norm_topk_prob"), [("qwen2_moe", True), ("qwen3_moe", False)])
def test_moe_scores_with_and_without_normalization(tiny_checkpoint, family, norm_topk_prob):
    """Each family with the setting of the other; all other tests use the family's own."""
    checkpoint = tiny_checkpoint(family, num_hidden_layers=2, norm_topk_prob=norm_topk_prob)
    for dtype in ("float64", "float32"):
        report = run_parity(ParityOptions(checkpoint, dtype=dtype, tokens=40, decode_steps=4))
        assert report.ok, report.verdict()
        assert report.facts["routing"].startswith("0 of 72 choices of experts differ; in 0 ")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_errors_are_not_larger_than_pytorchs(tiny_checkpoint, family):
    report = run_parity(ParityOptions(tiny_checkpoint(family, num_hidden_layers=2), dtype="bfloat16", decode_steps=4))
    assert report.ok, report.verdict()
    judged = {check.name for check in report.checks if check.limit is not None and check.metric in ("ratio", "kl")}
    assert judged == {"logits", "next token", "decode.all_steps"}


@pytest.mark.slow
def test_programs_of_users_round_as_pytorchs():
    """The demonstration model, compiled with optimisation as a user's programs are: it may leave out a rounding."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "qwen_dist", "parity", "--model", DEMO_MODEL, "--dtype", "bfloat16"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "within bounds: " in done.stdout, done.stdout[-2000:] + done.stderr


VARIANTS = {
    "windows": ("qwen3", WINDOWS | {"sliding_window": 7}, {"tokens": 40}),
    "linear rope, one key head": (
        "qwen2",
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
        {"tokens": 40},
    ),
    "llama3 rope beyond its length, tied": (
        "qwen3",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}},
        {"tokens": 40},
    ),
    "attention bias": ("qwen3", {"attention_bias": True}, {"tokens": 40}),
    "8 devices": (
        "qwen2",
        {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "vocab_size": 320},
        {"tokens": 40, "mesh": "data=2,fsdp=2,tensor=2"},
    ),
    "600 tokens": ("qwen2", {}, {"tokens": 600, "max_columns": 600}),
    "moe, 600 tokens": ("qwen2_moe", {}, {"tokens": 600, "max_columns": 600}),
    "moe, windows": (
        "qwen2_moe",
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 3, "num_hidden_layers": 3},
        {"tokens": 40},
    ),
    "moe, one window for all layers": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 7}, {"tokens": 40}),
    "moe, 8 devices": (
        "qwen2_moe",
        {"num_attention_heads": 8, "hidden_size": 64, "vocab_size": 320, "num_experts": 8},
        {"tokens": 40, "mesh": "fsdp=2,expert=2,tensor=2"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_in_float64(tiny_checkpoint, variant):
    family, values, options = VARIANTS[variant]
    checkpoint = tiny_checkpoint(family, **{"num_hidden_layers": 2} | values)
    report = run_parity(ParityOptions(checkpoint, dtype="float64", decode_steps=3, **options))
    assert report.ok, report.verdict()


@pytest.mark.slow
def test_4000_tokens_with_windows_and_yarn_beyond_its_length(tiny_checkpoint):
    values = WINDOWS | {"sliding_window": 700, "max_position_embeddings": 4096, "rope_parameters": YARN}
    checkpoint = tiny_checkpoint("qwen2", **values)
    report = run_parity(ParityOptions(checkpoint, dtype="float32", tokens=4000, decode_steps=2))
    assert report.ok, report.verdict()
    assert report.next_token.position.max() == 3999
    assert "compared at 256 columns" in report.facts["rows"]


def test_a_directory_without_a_checkpoint_is_a_readable_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        run_parity(ParityOptions(tmp_path))


def test_reports_of_failures_name_the_component(report):
    """The verdict and the page name a failure that was put into the checks."""
    import dataclasses

    checks = [
        dataclasses.replace(check, measured=np.inf, where="row 0, position 3")
        if check.name.endswith("1.self_attn.q_rope")
        else check
        for check in report.checks
    ]
    broken = dataclasses.replace(report, checks=checks)
    assert not broken.ok
    assert broken.verdict().startswith("beyond bounds: layers.1.self_attn.q_rope (same inputs): max |Δ| is inf")
    assert "Beyond bounds" in to_html(broken) and "row 0, position 3" in to_html(broken)

"""Adapters on weights that are kept in fewer bits (QLoRA, arXiv:2305.14314): peft's numbers on the dequantised weights."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
from test_step import TORCH, check_step, one_batch, one_step, relative_error
from torch_step import load_torch, made_examples, torch_steps

from qwen_dist import DEMO_MODEL, LLM
from qwen_dist.checkpoint.adapter_layers import with_adapter
from qwen_dist.checkpoint.adapter_read import read_adapter
from qwen_dist.checkpoint.model import load_model
from qwen_dist.checkpoint.quantized import dequantize_weights
from qwen_dist.cli import main
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import disk_shapes, on_disk
from qwen_dist.ops.grouped_matmul import grouped_matmul
from qwen_dist.ops.grouped_weight import GroupedWeight
from qwen_dist.ops.matmul import batched_matmul, matmul
from qwen_dist.parity.reference import UpcastToFloat64
from qwen_dist.quantization.options import QuantizeOptions
from qwen_dist.sharding import TRAIN, ShardingContext
from qwen_dist.train.step import REMAT_POLICIES

FORMS = {"int4": QuantizeOptions("int4", 8), "int8": QuantizeOptions("int8", 16)}
FORMS["fp8"] = QuantizeOptions("float8_e4m3fn", 0)
# Sizes that groups of 16 divide, and those of two shards.
SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
TARGETS = ["q_proj", "o_proj", "in_proj_qkv"]
QUICK = [("qwen3", "int4", "none"), ("qwen3_5", "int8", "full"), ("qwen3_moe", "int4", "full")]
SLOW = [("qwen3", "fp8", "full"), ("qwen3_moe", "fp8", "none"), ("qwen3_5", "int4", "none")]
CASES = QUICK + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


@pytest.fixture(scope="module")
def examples():
    return made_examples()


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return lambda family, **sizes: tiny_checkpoint(family, **SIZES | {"router_aux_loss_coef": 0.0} | sizes)


def load(directory, form, mesh=""):
    context = ShardingContext(make_mesh(MeshConfig.parse(mesh)), TRAIN)
    return load_model(directory, context, dtype="float64", quantize=FORMS[form])


def dequantized(loaded, directory):
    """The weights that are kept in fewer bits, as arrays in the checkpoint's shapes."""
    plain = load_model(directory, loaded.sharding_ctx, dtype="float64")
    target = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in plain.parameters.items()}
    arrays, shapes = dequantize_weights(loaded.parameters, loaded.kept, target), disk_shapes(plain.module)
    return {one.weight.name: on_disk(np.asarray(arrays[one.weight.name]), shapes[one.weight.name]) for one in loaded.kept}


def peft_steps(directory, weights, examples, adapter):
    """A step of PyTorch with an adapter on these weights; peft writes the adapter."""
    model = load_torch(directory, "float64")
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, array in weights.items():
            parameters[f"model.{name}"].copy_(torch.from_numpy(np.array(array)))
    targets = [name for name in TARGETS if any(f".{name}." in parameter for parameter in parameters)]
    with UpcastToFloat64():
        config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():  # B is initially zero, which would hide errors
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(adapter)
    return torch_steps(model, examples.examples, **TORCH)


@pytest.mark.parametrize(("family", "form", "remat"), CASES)
def test_a_step_equals_peft_on_the_dequantised_weights(checkpoint, examples, tmp_path, family, form, remat):
    directory = checkpoint(family)
    with jax.enable_x64(True):
        loaded = load(directory, form)
        expected = peft_steps(directory, dequantized(loaded, directory), examples, tmp_path)
        adapted, trained = with_adapter(loaded, read_adapter(tmp_path).to_lora(), dtype="float64")
        packed = [name for one in loaded.kept for name in (one.weight.name, one.weight.name + "_scale")]
        assert packed and not set(packed) & set(trained)
        check_step(adapted, trained, expected, one_batch(examples, True).microbatches(1), remat)


MESHES = [("qwen3", "data=2,fsdp=2,tensor=2"), pytest.param("qwen3_moe", "expert=2,fsdp=2", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("family", "mesh"), MESHES)
def test_a_sharded_step_equals_one_device(checkpoint, examples, tmp_path, family, mesh):
    directory = checkpoint(family, vocab_size=344)
    peft_steps(directory, {}, examples, tmp_path)
    results = []
    with jax.enable_x64(True):
        for on in ("", mesh):
            adapted, trained = with_adapter(load(directory, "int4", on), read_adapter(tmp_path).to_lora(), dtype="float64")
            results.append(one_step(adapted, examples, trained))
    (metrics, gradients, _), (found_metrics, found, _) = results
    assert relative_error(found_metrics.loss, metrics.loss) < 1e-12
    assert max(relative_error(found[name], gradients[name]) for name in gradients) < 1e-12


# --- what the backward pass keeps ---


def packed_weight(rng, *shape):
    values = jnp.asarray(rng.integers(0, 256, (*shape[:-1], shape[-1] // 32, 16)), jnp.uint8)
    scale = jnp.asarray(rng.uniform(0.01, 0.02, (*shape[:-1], shape[-1] // 32, 1)), jnp.float32)
    return GroupedWeight(values, scale, None, None, jnp.dtype("float32"))


def test_the_gradient_of_products_by_packed_weights():
    rng = np.random.default_rng(0)
    x, sizes = jnp.asarray(rng.standard_normal((12, 64)), jnp.float32), jnp.asarray([3, 0, 7], jnp.int32)
    one, several = packed_weight(rng, 48, 64), packed_weight(rng, 3, 48, 64)
    by_group = lambda x, weights: grouped_matmul(x, weights, sizes, "float32")[:10]  # noqa: E731
    for product, weight in ((matmul, one), (by_group, several)):
        loss = lambda x, weight, product=product: jnp.sin(product(x, weight)).sum()  # noqa: E731
        gradient, expected = jax.grad(loss)(x, weight), jax.grad(loss)(x, weight.dequantize())
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    assert not np.asarray(gradient)[10:].any(), "rows of no group"


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_weight_is_an_array_for_longer_than_it_is_used(remat):
    """Eight weights that are 4 MB each as arrays; one of them has room."""
    rng, size, number = np.random.default_rng(0), 1024, 8
    x, weights = jnp.ones((4, size), jnp.float32), [packed_weight(rng, size, size) for _ in range(number)]
    array_bytes = 4 * size**2

    def temporary_bytes(multiply, weights):
        layer = multiply if remat == "none" else jax.checkpoint(multiply, policy=REMAT_POLICIES[remat])
        loss = jax.grad(lambda x, weights: functools.reduce(lambda x, w: jnp.tanh(layer(x, w)), weights, x).sum())
        return jax.jit(loss).lower(x, weights).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(matmul, weights) <= array_bytes
    if remat == "none":  # what the test would see otherwise
        plain = temporary_bytes(lambda x, weight: batched_matmul(x, weight.dequantize()), weights)
        assert plain >= number * array_bytes


# --- the commands ---


@pytest.mark.slow
def test_an_adapter_is_trained_and_used_on_quantised_weights(tmp_path, capsys):
    """Unmerged, with the packed weights, it gives what it gives when it is merged into the same weights dequantised."""
    quantised, data, output = (str(tmp_path / name) for name in ("quantised", "data.jsonl", "run"))
    (tmp_path / "data.jsonl").write_text('{"prompt": "What is 2 plus 3?", "completion": "The answer is nine."}\n' * 8)
    forms = ["--quantize", "int4", "--dtype", "float32"]
    assert main(["quantize", "--model", str(DEMO_MODEL), "--output", quantised, *forms]) == 0
    given = ["--data", data, "--output", output, "--steps", "4", "--dtype", "float32"]
    given += ["--config.optimizer.learning_rate=1e-2"]
    assert main(["finetune", "--model", quantised, *given]) == 0
    capsys.readouterr()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] - 0.1
    settings = {"dtype": "float32", "max_batch_size": 2, "adapter": f"{output}/adapter"}
    text = "What is 2 plus 3? The answer is nine."
    (unmerged,), (merged,), (without,) = (
        LLM(quantised, **settings | more).score([text]) for more in ({}, {"quantize": "none"}, {"adapter": ""})
    )
    np.testing.assert_allclose(unmerged.logprobs, merged.logprobs, atol=1e-4)
    assert np.abs(np.array(unmerged.logprobs) - without.logprobs).max() > 0.1


def test_dry_run_counts_the_weights_and_their_packed_bytes(tmp_path, capsys):
    (tmp_path / "data.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 8)
    given = ["finetune", "--model", str(DEMO_MODEL), "--data", f"{tmp_path}/data.jsonl", "--output", f"{tmp_path}/run"]
    shown = {}
    for form in ("none", "int4"):
        assert main([*given, "--quantize", form, "--mesh", "data=8", "--dry-run"]) == 0
        shown[form] = capsys.readouterr().out
    counts, sizes = (
        {form: re.search(pattern, text)[1] for form, text in shown.items()}
        for pattern in (r"of ([\d,]+) parameters are trained", r"parameters (\S+) GB")
    )
    assert counts["none"] == counts["int4"] and float(sizes["int4"]) < 0.7 * float(sizes["none"])


def test_all_parameters_cannot_be_trained_in_few_bits(tmp_path, capsys):
    given = ["--model", str(DEMO_MODEL), "--data", "a.jsonl", "--output", str(tmp_path / "run"), "--method", "full"]
    assert main(["finetune", *given, "--quantize", "int8"]) == 2
    assert "--quantize int8 is for --method lora" in capsys.readouterr().err

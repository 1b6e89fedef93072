"""Fine-tuning a mixture of experts: a step equals that of transformers, with its load-balancing loss."""

import json

import jax
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from test_step import LOSS, NUMBERS, TORCH, assert_same, load, make_trainer, one_batch, relative_error
from torch_step import load_torch, made_examples, torch_steps

from qwen_dist.checkpoint.adapter import write_adapter
from qwen_dist.checkpoint.adapter_layers import with_adapter
from qwen_dist.checkpoint.adapter_merge import merge_updates
from qwen_dist.checkpoint.adapter_read import read_adapter
from qwen_dist.config import LoraOptions
from qwen_dist.models.parameters import disk_shapes, with_parameters
from qwen_dist.parity.reference import UpcastToFloat64
from qwen_dist.train.lora import attach_lora, extract_adapter


def one_step(directory, mesh=""):
    """Loss, loss without load balancing, gradients, parameters after one step, and the batch."""
    with jax.enable_x64(True):
        loaded = load(directory, mesh)
        trainer = make_trainer(loaded, loaded.parameters.keys())
        batch = one_batch(made_examples(), False)
        state = trainer.init_state()
        total, count = trainer.evaluate(state, batch)
        plain = float(total) / int(count)
        state, metrics = trainer.step(state, batch.microbatches(1))
        return float(metrics.loss), plain, state.optimizer[0], state.parameters, batch


@pytest.mark.parametrize("family", ["qwen2_moe", pytest.param("qwen3_moe", marks=pytest.mark.slow)])
def test_a_step_without_load_balancing_equals_transformers(tiny_checkpoint, family):
    directory = tiny_checkpoint(family, num_hidden_layers=2, router_aux_loss_coef=0.0)
    expected = torch_steps(load_torch(directory, "float64"), made_examples().examples, **TORCH)
    loss, plain, gradients, parameters, _ = one_step(directory)
    assert [loss, plain] == pytest.approx([expected.losses[0]] * 2, rel=LOSS)
    loaded = load(directory, dtype="float32")
    assert_same(loaded, gradients, expected.gradients, NUMBERS)
    assert_same(loaded, parameters, expected.parameters, NUMBERS)


def test_the_load_balancing_loss_equals_transformers(tiny_checkpoint):
    directory = tiny_checkpoint("qwen2_moe", num_hidden_layers=2, router_aux_loss_coef=0.5)
    loss, plain, _, _, batch = one_step(directory)
    with torch.no_grad(), UpcastToFloat64():
        mask = torch.from_numpy(np.array(batch.positions) >= 0).long()
        output = load_torch(directory, "float64")(
            input_ids=torch.from_numpy(np.array(batch.tokens)).long(), attention_mask=mask, output_router_logits=True
        )
    assert loss - plain == pytest.approx(0.5 * output.aux_loss.item(), rel=1e-9)


# --- adapters ---

ONE_LAYER = {"num_hidden_layers": 1, "decoder_sparse_step": 1, "router_aux_loss_coef": 0.0}
STACKS = {"both": ["experts.gate_up_proj", "experts.down_proj"], "down": ["experts.down_proj"]}


@pytest.fixture(scope="module", params=["both", pytest.param("down", marks=pytest.mark.slow)])
def adapted(request, tiny_checkpoint, tmp_path_factory):
    """A mixture of experts, an adapter of its attention and experts written by peft, its logits, and a step of PyTorch."""
    directory = tiny_checkpoint("qwen3_moe", **ONE_LAYER)
    adapter = tmp_path_factory.mktemp("adapter")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"], target_parameters=STACKS[request.param])
    with UpcastToFloat64():
        model = peft.get_peft_model(load_torch(directory, "float64"), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():  # B is initially zero, which would hide errors
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(adapter)
    with torch.no_grad(), UpcastToFloat64():
        logits = model(input_ids=torch.from_numpy(made_examples().examples[0].tokens).long()[None], use_cache=False).logits
    return directory, adapter, logits.numpy(), torch_steps(model, made_examples().examples, **TORCH)


def test_a_lora_step_of_attention_and_experts_equals_peft(adapted, tmp_path):
    directory, path, _, expected = adapted
    with jax.enable_x64(True):
        loaded, trained = with_adapter(load(directory), read_adapter(path).to_lora(), dtype="float64")
        trainer = make_trainer(loaded, trained)
        state, metrics = trainer.step(trainer.init_state(), one_batch(made_examples(), True).microbatches(1))
        assert relative_error(metrics.loss, np.array(expected.losses[0])) < LOSS
        found = [
            written(directory, tree, loaded, tmp_path / str(i))
            for i, tree in enumerate((state.optimizer[0], state.parameters))
        ]
    for ours, theirs in zip(found, (expected.gradients, expected.parameters), strict=True):
        theirs = {name.replace(".default.", "."): value for name, value in theirs.items()}
        assert ours.keys() == theirs.keys()
        assert max(relative_error(ours[name], theirs[name]) for name in ours) < NUMBERS


def written(directory, parameters, model, path):
    """The arrays under PEFT's names and in its order."""
    adapter = extract_adapter(parameters, LoraOptions(rank=4, alpha=6), model)
    write_adapter(path, adapter, base=str(directory))
    return safetensors.numpy.load_file(path / "adapter_model.safetensors")


def test_an_adapter_of_experts_is_saved_and_merged(adapted, tmp_path):
    directory, path, logits, _ = adapted
    adapter = read_adapter(path)
    write_adapter(tmp_path / "again", adapter.to_lora(), base=str(directory))
    config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
    assert all(name.startswith("model.layers.0.mlp.experts.") for name in config["target_parameters"])
    with UpcastToFloat64():
        model = peft.PeftModel.from_pretrained(
            load_torch(directory, "float64"), tmp_path / "again", autocast_adapter_dtype=False
        )
    tokens = made_examples().examples[0].tokens[None]
    with torch.no_grad(), UpcastToFloat64():
        again = model(input_ids=torch.from_numpy(tokens).long(), use_cache=False).logits.numpy()
    np.testing.assert_array_equal(again, logits)
    with jax.enable_x64(True):
        loaded = load(directory)
        merged = merge_updates(loaded.parameters, adapter.updates, disk_shapes(loaded.module), loaded.sharding_ctx)
        model = with_parameters(loaded.module, merged)
        hidden, _, _ = model(tokens, np.arange(tokens.shape[1], dtype=np.int32)[None])
        assert relative_error(model.unembed(hidden), logits) < NUMBERS


def test_all_linear_targets(tiny_checkpoint):
    """Those of PEFT in a dense model; in a mixture also the shared expert and dense layers, but no router and no expert."""
    directory = tiny_checkpoint("qwen3_5", num_hidden_layers=2)
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load_torch(directory, "float32"), config)
    expected = {name.split(".lora_A")[0].split(".layers.")[1] for name, _ in model.named_parameters() if "lora_A" in name}
    assert all_linear(directory) == expected
    mixture = all_linear(tiny_checkpoint("qwen3_next", num_hidden_layers=2))
    dense, shared = ({f"{start}.{each}_proj" for each in ("gate", "up", "down")} for start in ("mlp", "mlp.shared_expert"))
    found = {name.removeprefix("0.") for name in mixture if name.startswith("0.mlp")}
    assert found == shared | {"mlp.shared_expert_gate"}
    assert {name.removeprefix("1.") for name in mixture if name.startswith("1.mlp")} == dense


def all_linear(directory):
    """The layers that the target chooses."""
    module = load(directory, dtype="float32").module
    names = attach_lora(module, LoraOptions(target_modules=("all-linear",)), dtype="float32")
    return {name.split(".lora_")[0].removeprefix("layers.") for name in names}


def test_default_targets_are_attention_and_experts(tiny_checkpoint):
    loaded = load(tiny_checkpoint("qwen3_moe", **ONE_LAYER), dtype="float32")
    trained = attach_lora(loaded.module, LoraOptions(rank=2), dtype="float32")
    layers = {name.removeprefix("layers.0.").rpartition(".lora_")[0] for name in trained}
    attention = {f"self_attn.{each}_proj" for each in "qkvo"}
    assert layers == attention | {"mlp.experts.lora.gate_up_proj", "mlp.experts.lora.down_proj"}

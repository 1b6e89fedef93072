"""Fine-tuning a mixture of experts: the step of transformers, with its load-balancing loss."""

import jax
import numpy as np
import pytest
import torch
from test_step import LOSS, NUMBERS, TORCH, assert_same, load, make_trainer, one_batch
from torch_step import load_torch, made_examples, torch_steps

from qwen_dist.parity.reference import LiftedToFloat64


def one_step(directory, mesh=""):
    """Loss, loss without the routers' part, and gradients and parameters after one step."""
    with jax.enable_x64(True):
        loaded = load(directory, mesh)
        trainer = make_trainer(loaded, loaded.parameters.keys())
        batch = one_batch(made_examples(), False)
        state = trainer.start()
        total, count = trainer.evaluate(state, batch)
        plain = float(total) / int(count)
        state, metrics = trainer.step(state, batch.parts(1))
        return float(metrics.loss), plain, state.optimizer[0], state.parameters, batch


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe"])
def test_without_load_balancing_it_is_the_step_of_transformers(tiny_checkpoint, family):
    directory = tiny_checkpoint(family, num_hidden_layers=2, router_aux_loss_coef=0.0)
    wanted = torch_steps(load_torch(directory, "float64"), made_examples().examples, **TORCH)
    loss, plain, gradients, parameters, _ = one_step(directory)
    assert [loss, plain] == pytest.approx([wanted.losses[0]] * 2, rel=LOSS)
    assert_same(gradients, wanted.gradients, NUMBERS)
    assert_same(parameters, wanted.parameters, NUMBERS)


def test_the_load_balancing_loss_is_transformers(tiny_checkpoint):
    directory = tiny_checkpoint("qwen2_moe", num_hidden_layers=2, router_aux_loss_coef=0.5)
    loss, plain, _, _, batch = one_step(directory)
    with torch.no_grad(), LiftedToFloat64():
        mask = torch.from_numpy(np.array(batch.positions) >= 0).long()
        output = load_torch(directory, "float64")(
            input_ids=torch.from_numpy(np.array(batch.tokens)).long(), attention_mask=mask, output_router_logits=True
        )
    assert loss - plain == pytest.approx(0.5 * output.aux_loss.item(), rel=1e-9)

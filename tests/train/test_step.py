"""One training step equals that of transformers and torch.optim.AdamW in float64: every gradient and parameter."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from torch_step import load_torch, made_examples, torch_steps

from qwen_dist.checkpoint.adapter_layers import with_adapter
from qwen_dist.checkpoint.adapter_read import read_adapter
from qwen_dist.checkpoint.model import load_model
from qwen_dist.config import DataOptions, OptimizerOptions
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import disk_shapes, on_disk
from qwen_dist.parity.reference import UpcastToFloat64
from qwen_dist.planning.compile import parse_collectives
from qwen_dist.sharding import TRAIN, ShardingContext
from qwen_dist.train.batches import TrainBatch, evaluation_batches
from qwen_dist.train.optim import make_optimizer, make_schedule
from qwen_dist.train.step import Trainer

OPTIMIZER = OptimizerOptions(learning_rate=1e-2, schedule="constant", weight_decay=0.1, clip_norm=0.5)
TORCH = {"rate": 1e-2, "weight_decay": 0.1, "clip_norm": 0.5}
LOSS, NUMBERS = 1e-12, 1e-10
QUICK = ((False, 1, "none"), (True, 4, "full"))


def one_batch(examples, packing: bool) -> TrainBatch:
    """All examples in one batch: with packing in a few rows, without in one row each."""
    options = DataOptions(files=("made.jsonl",), max_length=48, packing=packing)
    (batch,) = evaluation_batches(examples, options, 8)
    return batch


def record_gradients() -> optax.GradientTransformation:
    """Stores the gradients as its state."""
    zeros = functools.partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda gradients, state, parameters=None: (gradients, gradients))


def make_trainer(loaded, trained, options=OPTIMIZER, **settings) -> Trainer:
    shapes = {name: loaded.parameters[name].shape for name in trained}
    schedule = make_schedule(options, 100)
    optimizer = optax.chain(record_gradients(), make_optimizer(options, schedule, shapes, disk_shapes(loaded.module)))
    settings = {"dtype": loaded.dtype, "clip_norm": options.clip_norm} | settings
    return Trainer(loaded, trained, optimizer, schedule, **settings)


def load(directory, mesh="", dtype="float64"):
    return load_model(directory, ShardingContext(make_mesh(MeshConfig.parse(mesh)), TRAIN), dtype=dtype)


def relative_error(found, expected) -> float:
    """The largest difference, relative to the largest expected value."""
    found, expected = np.asarray(found, np.float64).reshape(expected.shape), expected.astype(np.float64)
    return float(np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30))


def torch_name(name: str) -> str:
    name = name if name == "lm_head.weight" else f"model.{name}"
    return f"base_model.model.{name.replace('.weight', '.default.weight')}" if ".lora_" in name else name


def assert_same(loaded, found, expected, bound):
    assert {torch_name(name) for name in found} == expected.keys()
    shapes = disk_shapes(loaded.module)
    differences = {
        name: relative_error(on_disk(np.asarray(value), shapes[name]), expected[torch_name(name)])
        for name, value in found.items()
    }
    assert max(differences.values()) < bound, max(differences.items(), key=lambda item: item[1])


@pytest.fixture(scope="module")
def examples():
    return made_examples()


@pytest.fixture(scope="module")
def full(tiny_checkpoint, examples):
    """A checkpoint, and a step of PyTorch on it."""
    directory = tiny_checkpoint("qwen2", tie_word_embeddings=True, num_hidden_layers=2)
    return directory, torch_steps(load_torch(directory, "float64"), examples.examples, **TORCH)


@pytest.fixture(scope="module")
def adapted(tiny_checkpoint, examples, tmp_path_factory):
    """A checkpoint, an adapter written by peft, and a step of PyTorch on it."""
    directory, targets = tiny_checkpoint("qwen3", num_hidden_layers=2), ["q_proj", "o_proj", "gate_proj", "down_proj"]
    return directory, *written_adapter(directory, targets, examples, tmp_path_factory.mktemp("adapter"))


def written_adapter(directory, targets, examples, adapter):
    """An adapter that peft writes, and a step of PyTorch on it."""
    config = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=targets)
    with UpcastToFloat64():
        model = peft.get_peft_model(load_torch(directory, "float64"), config, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():  # B is initially zero, which would hide errors
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(adapter)
    return adapter, torch_steps(model, examples.examples, **TORCH)


# Packing, number of microbatches, rematerialization. A few run by default; each compiles a program.
CASES = [
    pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow)
    for case in [*itertools.product([False, True], [1, 4], ["none", "full"]), (True, 1, "selective")]
]


@pytest.mark.parametrize(("packing", "accumulation", "remat"), CASES)
def test_a_full_step_equals_pytorch(full, examples, packing, accumulation, remat):
    directory, expected = full
    with jax.enable_x64(True):
        loaded = load(directory)
        check_step(
            loaded, loaded.parameters.keys(), expected, one_batch(examples, packing).microbatches(accumulation), remat
        )


@pytest.mark.parametrize(("packing", "accumulation", "remat"), CASES)
def test_a_lora_step_equals_peft(adapted, examples, packing, accumulation, remat):
    directory, adapter, expected = adapted
    with jax.enable_x64(True):
        loaded, trained = with_adapter(load(directory), read_adapter(adapter).to_lora(), dtype="float64")
        check_step(loaded, trained, expected, one_batch(examples, packing).microbatches(accumulation), remat)


HYBRID_CASES = [(True, 1, "full"), pytest.param(False, 4, "none", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def hybrid(tiny_checkpoint):
    return tiny_checkpoint("qwen3_5", num_hidden_layers=2)


@pytest.mark.parametrize(("packing", "accumulation", "remat"), HYBRID_CASES)
def test_a_full_step_of_a_hybrid_equals_pytorch(hybrid, examples, packing, accumulation, remat):
    """PyTorch computes each sequence alone, so state and convolution of packed ones must not meet."""
    expected = torch_steps(load_torch(hybrid, "float64"), examples.examples, **TORCH)
    with jax.enable_x64(True):
        loaded, batch = load(hybrid), one_batch(examples, packing)
        assert not packing or batch.segments.max() > 1
        check_step(loaded, loaded.parameters.keys(), expected, batch.microbatches(accumulation), remat)


@pytest.mark.parametrize(("packing", "accumulation", "remat"), HYBRID_CASES)
def test_a_lora_step_of_a_hybrid_equals_peft(hybrid, examples, tmp_path, packing, accumulation, remat):
    targets = ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", "q_proj", "up_proj"]
    adapter, expected = written_adapter(hybrid, targets, examples, tmp_path / "adapter")
    with jax.enable_x64(True):
        loaded, trained = with_adapter(load(hybrid), read_adapter(adapter).to_lora(), dtype="float64")
        check_step(loaded, trained, expected, one_batch(examples, packing).microbatches(accumulation), remat)


def test_a_vocabulary_that_tensor_does_not_divide(full, examples):
    """311 tokens on two devices: each has them all, and the step stays that of PyTorch."""
    directory, expected = full
    with jax.enable_x64(True):
        loaded = load(directory, "tensor=2")
        assert loaded.parameters["embed_tokens.weight"].sharding.shard_shape((311, 32)) == (311, 32)
        check_step(loaded, loaded.parameters.keys(), expected, one_batch(examples, False).microbatches(1), "none")


def test_twenty_float32_steps_have_the_losses_of_pytorch(full, examples):
    directory, _ = full
    settings = {"rate": 1e-3, "weight_decay": 0.1, "clip_norm": 0.5}
    expected = torch_steps(load_torch(directory, "float32"), examples.examples, steps=20, **settings).losses
    loaded = load(directory, dtype="float32")
    options = dataclasses.replace(OPTIMIZER, learning_rate=1e-3)
    trainer = make_trainer(loaded, loaded.parameters.keys(), options)
    state, losses = trainer.init_state(), []
    for _ in range(20):
        state, metrics = trainer.step(state, one_batch(examples, True).microbatches(1))
        losses.append(float(metrics.loss))
    error = relative_error(losses, np.array(expected))
    print(f"20 steps: loss {losses[0]:.4f} to {losses[-1]:.4f}, relative error of the losses {error:.1e}")
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[-1] < losses[0] - 0.1


MESHES = [
    "data=2,fsdp=2,tensor=2",
    *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("data=4", "fsdp=4", "tensor=2", "fsdp=2,tensor=2")),
]


@pytest.fixture(scope="module")
def on_one_device(tiny_checkpoint, examples):
    """A checkpoint whose sizes the meshes divide, and a step on one device: loss, gradient, and parameters after it."""
    directory = tiny_checkpoint("qwen3", vocab_size=344, num_hidden_layers=2)
    with jax.enable_x64(True):
        return directory, one_step(load(directory), examples)


def one_step(loaded, examples, trained=None):
    trainer = make_trainer(loaded, loaded.parameters.keys() if trained is None else trained, remat="full")
    state, metrics = trainer.step(trainer.init_state(), one_batch(examples, True).microbatches(1))
    return jax.device_get((metrics, state.optimizer[0], state.parameters))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_sharded_step_equals_one_device(on_one_device, examples, mesh):
    directory, (metrics, gradients, parameters) = on_one_device
    with jax.enable_x64(True):
        found = one_step(load(directory, mesh), examples)
    assert relative_error(found[0].loss, metrics.loss) < 1e-12
    assert max(relative_error(found[1][name], gradients[name]) for name in gradients) < 1e-12
    assert max(relative_error(found[2][name], parameters[name]) for name in parameters) < 1e-12


def collectives_of(directory, mesh, examples):
    loaded = load(directory, mesh, "float32")
    trainer = make_trainer(loaded, loaded.parameters.keys(), remat="full")
    text = trainer.lower(one_batch(examples, True), 1).compile().as_text()
    return loaded, [(one.kind, max(elements for elements, _ in one.arrays)) for one in parse_collectives(text)]


@pytest.mark.slow
def test_gradients_are_summed_and_only_weights_in_use_are_gathered(on_one_device, examples):
    directory, _ = on_one_device
    loaded, found = collectives_of(directory, "data=4", examples)
    assert {kind for kind, _ in found} == {"all-reduce"}, "replicas only sum"
    loaded, found = collectives_of(directory, "fsdp=4", examples)
    gathered = [elements for kind, elements in found if kind == "all-gather"]
    sizes = {leaf.size for leaf in loaded.parameters.values()}
    # Every device looks up its channels of all tokens, and adds to their gradient: the token ids are gathered twice.
    ids = one_batch(examples, True).tokens.size
    assert ids not in sizes and gathered.count(ids) <= 2
    weights = [size for size in gathered if size != ids]
    assert weights and set(weights) <= sizes, "one weight at a time, and only weights and token ids"
    # A block is computed twice forwards (remat) and once backwards; its weights are gathered at most once for each.
    assert len(weights) <= 3 * len(loaded.parameters)
    assert {kind for kind, _ in found} & {"all-reduce", "reduce-scatter"}


def check_step(loaded, trained, expected, microbatches, remat):
    trainer = make_trainer(loaded, trained, remat=remat)
    state, metrics = trainer.step(trainer.init_state(), microbatches)
    assert relative_error(metrics.loss, np.array(expected.losses[0])) < LOSS
    assert_same(loaded, state.optimizer[0], expected.gradients, NUMBERS)
    assert_same(loaded, state.parameters, expected.parameters, NUMBERS)

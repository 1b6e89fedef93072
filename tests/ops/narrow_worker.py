"""Losses, training steps and answers of small models in bfloat16 at many sizes; prints what fails.

python narrow_worker.py FOLDER '[["loss", 16], ["train", "qwen3", "lora", 16], ["answer", "qwen3", 16]]'
"""

from __future__ import annotations

import json
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np

import qwen_dist.demo
from qwen_dist.checkpoint.model import LoadedModel, load_model
from qwen_dist.config import LoraOptions, OptimizerOptions
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import disk_shapes
from qwen_dist.sharding import INFERENCE, TRAIN, RuleSet, ShardingContext
from qwen_dist.tokenizer import Tokenizer
from qwen_dist.train.batches import TrainBatch
from qwen_dist.train.lora import new_adapter
from qwen_dist.train.loss import next_token_loss
from qwen_dist.train.optim import make_optimizer, make_schedule
from qwen_dist.train.step import Trainer

DEMO = pathlib.Path(qwen_dist.demo.__file__).parent / "model"
SIZES = {"vocab_size": 768, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16}
SIZES |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
FAMILIES = {
    "qwen3": {"model_type": "qwen3", "tie_word_embeddings": True},
    "qwen3_moe": {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
OPTIMIZER = OptimizerOptions(learning_rate=1e-3, schedule="constant")


def load(folder: pathlib.Path, family: str, rules: RuleSet) -> LoadedModel:
    (folder / "config.json").write_text(json.dumps(SIZES | FAMILIES[family]))
    mesh = make_mesh(MeshConfig.parse("data=1"), jax.devices()[:1])
    return load_model(folder, ShardingContext(mesh, rules), dtype="bfloat16", load_format="dummy")


def train(folder: pathlib.Path, family: str, method: str, num_tokens: int) -> float:
    """Return the loss of a step with one row of random tokens."""
    model = load(folder, family, TRAIN)
    trained = list(model.parameters)
    if method == "lora":
        model, trained = new_adapter(model, LoraOptions(rank=8), dtype="float32")
    schedule = make_schedule(OPTIMIZER, 2)
    shapes = {name: model.parameters[name].shape for name in trained}
    optimizer = make_optimizer(OPTIMIZER, schedule, shapes, disk_shapes(model.module))
    trainer = Trainer(model, trained, optimizer, schedule, dtype=model.dtype, clip_norm=1.0)
    tokens = np.random.default_rng(num_tokens).integers(0, 768, (1, num_tokens), np.int32)
    positions = np.arange(num_tokens, dtype=np.int32)[None]
    batch = TrainBatch(tokens, np.roll(tokens, -1), np.ones_like(tokens), positions, np.ones_like(tokens))
    _, result = trainer.step(trainer.init_state(), (batch,))
    return float(result.loss)


def answer(folder: pathlib.Path, family: str, num_requests: int) -> float:
    """Return the mean log-probability of a few tokens, which as many requests as given get at the same time."""
    engine = Engine(load(folder, family, INFERENCE), Tokenizer.open(folder), max_batch_size=num_requests)
    rng, params = np.random.default_rng(num_requests), SamplingParams(max_new_tokens=3, logprobs=0)
    prompts = [tuple(rng.integers(3, 768, 1 + 5 * (number % 9)).tolist()) for number in range(num_requests)]
    outputs = engine.run(Request(number, prompt, params) for number, prompt in enumerate(prompts))
    return float(np.mean([token.logprob for output in outputs for token in output.logprobs]))


def loss(folder: pathlib.Path, num_tokens: int) -> float:
    """Return the sum of the gradients of the loss of random tokens."""
    rng = np.random.default_rng(num_tokens)
    x_BTD, head_VD = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in ((1, num_tokens, 64), (768, 64)))
    targets = jnp.asarray(rng.integers(0, 768, (1, num_tokens)))
    gradient = jax.jit(jax.grad(lambda x, head: next_token_loss(x, head, targets, jnp.ones(targets.shape)), argnums=(0, 1)))
    return float(sum(each.astype(jnp.float32).sum() for each in gradient(x_BTD, head_VD)))


RUNS = {run.__name__: run for run in (loss, train, answer)}


def main() -> None:
    folder, cases = pathlib.Path(sys.argv[1]), json.loads(sys.argv[2])
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    for name, *sizes in cases:
        try:
            value = RUNS[name](folder, *sizes)
            problem = "" if np.isfinite(value) else f"the result is {value}"
        except jax.errors.JaxRuntimeError as error:
            problem = str(error).splitlines()[0]
        print(json.dumps([name, *sizes, problem]), flush=True)


if __name__ == "__main__":
    main()

"""A recurrent mixer that is a plug-in runs through the engine: the tokens of one plain forward pass of everything."""

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toy_mixer
from traced_flops import product_flops

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.engine.engine import CHUNK_SIZE, MAX_CHUNKS, Engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.engine.runner import Runner
from qwen_dist.hf_config import parse_model_config
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.config import LayerConfig
from qwen_dist.models.parameters import random_parameters, with_parameters
from qwen_dist.models.state import page_bytes, slot_bytes
from qwen_dist.models.state_spec import cache_groups
from qwen_dist.models.transformer import Transformer, state_specs
from qwen_dist.ops.paged_cache import PAGE
from qwen_dist.planning.memory import CostModel, abstract_sharding_context
from qwen_dist.planning.workload import Workload
from qwen_dist.sharding import INFERENCE, ShardingContext
from qwen_dist.tokenizer import Tokenizer
from qwen_dist.train.utilization import StepFlops

CONFIG = {
    "model_type": "qwen3", "vocab_size": 344, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_act": "silu", "tie_word_embeddings": False,
    "initializer_range": 0.3,
}  # fmt: skip
LAYERS = {
    "hybrid": (LayerConfig("toy"), LayerConfig("attention"), LayerConfig("toy")),
    "recurrent only": (LayerConfig("toy"), LayerConfig("toy")),
}
NUM_NEW = 12
# One token; a chunk and a token; the end of a chunk; more than a step's chunks, so that prefill takes two steps; a page.
LENGTHS = (1, CHUNK_SIZE + 1, 2 * CHUNK_SIZE, MAX_CHUNKS * CHUNK_SIZE + 70, PAGE - 3, 5, 40)
RNG = np.random.default_rng(2)
PROMPTS = [tuple(RNG.integers(3, 300, length).tolist()) for length in LENGTHS]


def test_the_plug_in_is_small():
    assert len(pathlib.Path(toy_mixer.__file__).read_text().splitlines()) <= 80


@functools.cache
def model(layers: str, mesh: str) -> LoadedModel:
    config = dataclasses.replace(parse_model_config(CONFIG), layers=LAYERS[layers])
    sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(mesh)), INFERENCE)
    module = Transformer(config, dtype=jnp.float32)
    return LoadedModel(config, module, random_parameters(module, sharding_ctx), sharding_ctx)


@functools.cache
def expected(layers: str) -> list[list[int]]:
    """Greedy answers, each token by one forward pass of its whole sequence, without states."""
    loaded = model(layers, "data=1")
    run = jax.jit(lambda parameters, *inputs: forward(with_parameters(loaded.module, parameters), *inputs))

    def answer(prompt: tuple[int, ...]) -> list[int]:
        tokens = np.zeros(len(prompt) + NUM_NEW, np.int32)
        tokens[: len(prompt)] = prompt
        for length in range(len(prompt), len(tokens)):
            positions = np.where(np.arange(len(tokens)) < length, np.arange(len(tokens)), -1)
            tokens[length] = run(loaded.parameters, tokens[None], positions[None], length - 1)
        return tokens[len(prompt) :].tolist()

    return [answer(prompt) for prompt in PROMPTS]


def forward(module: Transformer, tokens_BT, positions_BT, last) -> jax.Array:
    x_BTD, _, _ = module(tokens_BT, positions_BT)
    return jnp.argmax(module.unembed(x_BTD[:, last][:, None])[0, 0])


def answers(engine: Engine) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in PROMPTS]
    for output in engine.run([Request(key, prompt, SamplingParams(NUM_NEW)) for key, prompt in enumerate(PROMPTS)]):
        found[output.request.key] += output.tokens
    return found


@pytest.fixture
def tokenizer(small_tokenizer):
    tokenizer = Tokenizer.open(small_tokenizer)
    tokenizer.stop_ids = frozenset()
    return tokenizer


@pytest.mark.parametrize(
    ("layers", "mesh", "steps"),
    [
        ("recurrent only", "data=1", 1),
        pytest.param("hybrid", "data=1", 1, marks=pytest.mark.slow),
        pytest.param("recurrent only", "data=1", 5, marks=pytest.mark.slow),
        *(pytest.param("hybrid", "data=2,fsdp=2,tensor=2", steps, marks=pytest.mark.slow) for steps in (1, 5)),
        *(pytest.param("recurrent only", mesh, 1, marks=pytest.mark.slow) for mesh in ("data=4,tensor=2",)),
    ],
)
def test_prefill_in_chunks_decode_and_reuse_of_slots(layers, mesh, steps, tokenizer):
    """Seven requests with two slots a shard: each slot has several sequences, one after the other."""
    loaded = model(layers, mesh)
    slots = 2 * loaded.sharding_ctx.batch_multiple()
    engine = Engine(loaded, tokenizer, max_batch_size=slots, steps_per_dispatch=steps)
    assert answers(engine) == expected(layers)
    assert answers(engine) == expected(layers), "and again, in slots and pages that were used before"


@pytest.mark.slow
def test_preempted_sequences_prefill_again_from_the_initial_state(tokenizer):
    """Pages for the longest prompt and little more: sequences lose their slots, states included."""
    loaded = model("hybrid", "data=1")
    specs = state_specs(loaded.config, loaded.dtype)
    [one_page], one_slot = page_bytes(specs, loaded.sharding_ctx), slot_bytes(specs, loaded.sharding_ctx)
    assert (one_page, one_slot) == (2 * 2 * PAGE * 16 * 4, 2 * 32 * 4)
    memory = 4 * one_slot + (-(-(max(LENGTHS) + NUM_NEW) // PAGE)) * one_page
    params = SamplingParams(2 * PAGE)
    prompts = [PROMPTS[4], PROMPTS[4][:-1], PROMPTS[4][:-2], PROMPTS[6], PROMPTS[2]]
    requests = [Request(key, prompt, params) for key, prompt in enumerate(prompts)]

    def tokens(cache_bytes: int) -> tuple[list[list[int]], int]:
        engine = Engine(loaded, tokenizer, max_batch_size=4, cache_bytes=cache_bytes, prefix_cache=False)
        found: list[list[int]] = [[] for _ in requests]
        for output in engine.run(requests):
            found[output.request.key] += output.tokens
        return found, engine.stats.num_preempted

    (crowded, num_preempted), (alone, none) = tokens(memory), tokens(10**9)
    assert num_preempted > 0 and none == 0
    assert crowded == alone


def test_recurrent_layers_need_no_pages():
    hybrid, recurrent = (state_specs(model(layers, "data=1").config, "float32") for layers in LAYERS)
    assert [group.layers for group in cache_groups(hybrid)] == [(1,)]
    assert cache_groups(recurrent) == ()


def plan(layers: str, mesh: str, workload: Workload) -> CostModel:
    sharding_ctx = abstract_sharding_context(MeshConfig.parse(mesh), 8, workload)
    return CostModel.of(model(layers, "data=1").config, sharding_ctx, workload)


def test_a_plan_has_the_weights_and_states_of_the_plug_in():
    mesh = "data=2,fsdp=2,tensor=2"
    loaded, memory = model("hybrid", mesh), plan("hybrid", mesh, Workload("batch", 8, 2 * PAGE, "float32")).memory("decode")
    arrays = loaded.parameters, Runner(loaded, 8).start((8 // 2 * 2,)).states
    local = [sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree)) for tree in arrays]
    assert [memory["parameters"], memory["cache"]] == local


def test_a_plan_has_the_flops_of_the_plug_in():
    """Those of its products, as a traced forward pass has them, and what it says its recurrence takes."""
    loaded, T = model("recurrent only", "data=1"), 64
    positions_BT = np.arange(T, dtype=np.int32)[None]

    def run(parameters):
        module = with_parameters(loaded.module, parameters)
        return module.unembed(module(jnp.zeros((1, T), jnp.int32), positions_BT)[0])

    products = product_flops(jax.make_jaxpr(run)(loaded.parameters).jaxpr)
    recurrence = len(LAYERS["recurrent only"]) * 3 * T * CONFIG["hidden_size"]
    training = plan("recurrent only", "data=8", Workload("finetune", 8, T, "float32", remat="none")).cost("train")
    assert training.flops == StepFlops(loaded, loaded.parameters)(positions_BT) == 3 * (products + recurrence)


def test_a_plan_has_the_arrays_of_the_plug_in(monkeypatch):
    """Of a mixer that says nothing, it counts the outputs of the linear layers."""
    workload = Workload("finetune", 8, 256, "float32", remat="none")
    said = plan("recurrent only", "data=8", workload).memory("train")["saved activations"]
    monkeypatch.delattr(toy_mixer.ToyMixer, "cost")
    default = plan("recurrent only", "data=8", workload).memory("train")["saved activations"]
    channels = len(LAYERS["recurrent only"]) * workload.context * CONFIG["hidden_size"]
    assert said - default == channels * (12 - 2 * 4)

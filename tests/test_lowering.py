"""Every jitted program of inference and training lowers for NVIDIA GPUs and for TPUs, with their kernels, on this CPU.

Nothing is compiled, so the numbers are tested elsewhere: `tests/ops` runs the kernels interpreted. Only the devices can
show that the programs compile there and how fast they are (`benchmarks/gpu.py`).
"""

import functools

import jax
import numpy as np
import pytest
from accelerators import devices_of, kernels_in, lowered_text

from qwen_dist.checkpoint.model import LoadedModel
from qwen_dist.checkpoint.quantized import Quantization
from qwen_dist.config import LoraOptions, OptimizerOptions, Quantize
from qwen_dist.engine.logits_processors import ProcessorArrays, of_rows
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.engine.runner import KNOWN_AT_A_TIME, Runner
from qwen_dist.hf_config import parse_model_config
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import abstract_parameters, disk_shapes
from qwen_dist.models.transformer import Transformer
from qwen_dist.quantization.options import QuantizeOptions
from qwen_dist.sharding import INFERENCE, TRAIN, ShardingContext
from qwen_dist.train.batches import TrainBatch
from qwen_dist.train.lora import attach_lora
from qwen_dist.train.optim import make_optimizer, make_schedule
from qwen_dist.train.step import Trainer

# Sizes that the kernels take, one layer of each kind.
_DENSE = {
    "model_type": "qwen3",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000,
    "tie_word_embeddings": False,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
_HYBRID = _DENSE | {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000, "partial_rotary_factor": 0.25},
}
del _HYBRID["rope_theta"]
FAMILIES = {
    "dense": _DENSE,
    "experts": _DENSE | _EXPERTS | {"model_type": "qwen3_moe", "norm_topk_prob": True},
    "hybrid": _HYBRID,
}
SLOTS, PAGES, ROWS, CHUNK, STEPS = 4, 8, 2, 32, 4


def one_device(rules) -> ShardingContext:
    return ShardingContext(make_mesh(MeshConfig(), jax.devices()[:1]), rules)


def declared(module, sharding_ctx) -> LoadedModel:
    return LoadedModel(module.config, module, abstract_parameters(module, sharding_ctx), sharding_ctx)


class Inference:
    """The jitted programs of a `Runner`, each with abstract arguments."""

    def __init__(self, family: str, quantize: Quantize = "none"):
        module = Transformer(parse_model_config(FAMILIES[family]), dtype="bfloat16")
        if (quantization := Quantization.of(FAMILIES[family], QuantizeOptions.of(quantize))) is not None:
            quantization.declare(module)
        model = declared(module, one_device(INFERENCE))
        self.runner, self.parameters = Runner(model, SLOTS, STEPS), model.parameters
        self.state = self.runner._abstract_state((PAGES,))

    def prefill(self, num_top=None, processors=None, greedy=False):
        step = self.runner._abstract_step(ROWS, CHUNK, 1, (PAGES,), is_prefill=True)
        state, sampling = self.greedy(ROWS) if greedy else self.sampled(ROWS, processors)
        return self.runner._prefill, (self.parameters, state, step, sampling), {"num_top": num_top}

    def score(self, num_scored=5):
        """A prefill step that samples nothing and scores the tokens of the prompts."""
        step = self.runner._abstract_step(ROWS, CHUNK, 1, (PAGES,), is_prefill=True)
        state = self.state
        slots = state.last_tokens_M, state.finished_M
        arguments = self.parameters, state.states, state.token_presence_MV, slots, step
        return self.runner._compute, arguments, {"num_scored": num_scored}

    def decode(self, num_top=None, processors=None, greedy=False):
        step = self.runner._abstract_step(SLOTS, 1, 2, (PAGES,), is_prefill=False)
        state, sampling = self.greedy(SLOTS) if greedy else self.sampled(SLOTS, processors)
        return self.runner._decode, (self.parameters, state, step, sampling), {"num_top": num_top}

    def mixed(self, greedy=False):
        """A step of chunks of prompts and of rows that decode."""
        prefill = self.runner._abstract_step(ROWS, CHUNK, 1, (PAGES,), is_prefill=True)
        decode = self.runner._abstract_step(SLOTS, 1, 2, (PAGES,), is_prefill=False)
        both = [self.greedy(rows) if greedy else self.sampled(rows, None) for rows in (ROWS, SLOTS)]
        samplings = tuple(sampling for _, sampling in both)
        return self.runner._mixed, (self.parameters, both[0][0], (prefill, decode), samplings), {}

    def sampled(self, num_rows, processors):
        """The state, and how rows sample: with processors of logits, or with none."""
        sampling = self.runner._abstract_sampling(num_rows)
        if not processors:
            return self.state, sampling
        params = SamplingParams(frequency_penalty=0.5, no_repeat_ngram_size=2, min_new_tokens=3, logit_bias=((5, 1.0),))
        arrays = of_rows([ProcessorArrays.from_request(Request(0, (1, 2), params))] * num_rows)
        processors = jax.tree.map(lambda x: self.runner._abstract(x.shape, x.dtype), arrays)
        return self.state._replace(history_ML=self.history()), sampling._replace(processors=processors)

    def greedy(self, num_rows):
        """The state, and rows that take the best token."""
        return self.state._replace(token_presence_MV=None), self.sampled(num_rows, None)[1]._replace(sampling=None)

    def history(self):
        return self.runner._abstract((SLOTS, 1024), np.int32)

    def known(self):
        chunk = [self.runner._abstract((1, *more), np.int32) for more in ((), (KNOWN_AT_A_TIME,), (KNOWN_AT_A_TIME,))]
        return self.runner._add_known, (self.state.token_presence_MV, self.history(), *chunk), {}

    def resize(self):
        return self.runner._resize, (self.state.states,), {"num_pages": (2 * PAGES,)}

    def save(self):
        """Copy a slot's recurrent states to a snapshot."""
        states = tuple(self.state.states[layer] for layer in self.runner._recurrent)
        numbers = self.runner._abstract((1,), np.int32)
        return self.runner._copy_slot, (states, states, numbers, numbers), {}


PROGRAMS = {
    "prefill": Inference.prefill,
    "decode": Inference.decode,
    "prefill of greedy requests": functools.partial(Inference.prefill, greedy=True),
    "decode of greedy requests": functools.partial(Inference.decode, greedy=True),
    "prefill and decode": Inference.mixed,
    "prefill and decode of greedy requests": functools.partial(Inference.mixed, greedy=True),
    "prefill with scores": Inference.score,
    "decode with log-probabilities and processors": functools.partial(Inference.decode, num_top=5, processors=True),
    "known tokens": Inference.known,
    "resize": Inference.resize,
}
CASES = [("dense", name) for name in PROGRAMS]
CASES += [(family, name) for family in ("experts", "hybrid") for name in ("prefill", "decode", "prefill and decode")]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("family", "program"), CASES)
def test_inference_lowers(family, program, platform):
    with devices_of(platform):
        function, arguments, options = PROGRAMS[program](Inference(family))
        text = lowered_text(platform, function, *arguments, **options)
    is_model = "prefill" in program or "decode" in program
    expected = {("cuda", True): {"triton"}, ("tpu", True): {"mosaic"} if family == "experts" else set()}
    assert kernels_in(text) == expected.get((platform, is_model), set())


QUANTIZED = [("dense", "prefill", "int4"), ("dense", "decode", "fp8"), ("experts", "decode", "int8")]
QUANTIZED += [("hybrid", "prefill", "int4")]
# Programs that differ in other things than the model, or have no part of it.
OTHERS = [("dense", name, "int4") for name in PROGRAMS if name != "prefill"]
QUANTIZED += [pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(("family", "program", "quantize"), QUANTIZED)
def test_inference_with_quantised_weights_lowers(family, program, quantize, platform):
    """The kernels of attention stay; a product takes its weight widened, so experts have no kernel."""
    with devices_of(platform):
        function, arguments, options = PROGRAMS[program](Inference(family, quantize))
        text = lowered_text(platform, function, *arguments, **options)
    is_model = "prefill" in program or "decode" in program
    assert kernels_in(text) == ({"triton"} if is_model and platform == "cuda" else set())
    stored = {"int4": "xui8>", "int8": "xi8>", "fp8": "xf8E4M3FN>"}[quantize]
    assert (stored in text) == is_model


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_snapshots_of_a_hybrid_lower(platform):
    with devices_of(platform):
        function, arguments, _ = Inference("hybrid").save()
        assert "scatter" in lowered_text(platform, function, *arguments)


def trainer_of(family: str, method: str) -> Trainer:
    sharding_ctx, config = one_device(TRAIN), parse_model_config(FAMILIES[family])
    module = Transformer(config, dtype="float32" if method == "full" else "bfloat16")
    names = None if method == "full" else attach_lora(module, LoraOptions(rank=8), dtype="float32")
    model = declared(module, sharding_ctx)
    options = OptimizerOptions(learning_rate=1e-5)
    schedule = make_schedule(options, 1)
    shapes = {name: model.parameters[name].shape for name in names or model.parameters}
    optimizer = make_optimizer(options, schedule, shapes, disk_shapes(module))
    return Trainer(model, shapes.keys(), optimizer, schedule, dtype="bfloat16", remat="full")


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_step_lowers(family, method, platform):
    """Packed rows for LoRA, rows of one example for a full step: on a GPU each form has a kernel of its own."""
    tokens = jax.ShapeDtypeStruct((2, 128), np.int32)
    batch = TrainBatch(*[tokens] * 4, segments=tokens if method == "lora" else None)
    with devices_of(platform):
        trainer = trainer_of(family, method)
        arguments = trainer.abstract_state(), trainer._frozen, (batch, batch)
        text = lowered_text(platform, trainer._step, *arguments)
    on_gpu = {"cudnn"} if method == "full" else {"triton"}
    on_gpu |= {"triton"} if family == "experts" else set()
    assert kernels_in(text) == (on_gpu if platform == "cuda" else {"mosaic"})


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_an_evaluation_lowers(platform):
    tokens = jax.ShapeDtypeStruct((2, 128), np.int32)
    with devices_of(platform):
        trainer = trainer_of("dense", "lora")
        arguments = trainer.abstract_state().parameters, trainer._frozen, TrainBatch(*[tokens] * 5)
        assert kernels_in(lowered_text(platform, trainer._evaluate, *arguments))

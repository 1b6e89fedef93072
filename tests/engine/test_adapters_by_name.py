"""Requests that choose an adapter by its name: the answers of each merged model, in one batch and one prefix cache."""

import numpy as np
import pytest

from qwen_dist.checkpoint.adapter import Adapter, write_adapter
from qwen_dist.checkpoint.adapter_config import AdapterConfig
from qwen_dist.checkpoint.adapter_layers import stack_adapters, with_adapter
from qwen_dist.checkpoint.adapter_merge import Update
from qwen_dist.checkpoint.adapter_read import PeftAdapter, read_adapter
from qwen_dist.checkpoint.model import load_model
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.engine.sequence import Sequence
from qwen_dist.errors import CheckpointError, UserError
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import disk_shapes
from qwen_dist.sharding import INFERENCE, ShardingContext
from qwen_dist.tokenizer import Tokenizer

# Two pages and a bit, so that the prefix cache would mix the adapters up if it could.
PROMPT = tuple(np.random.default_rng(3).integers(0, 331, 140).tolist())
PROMPTS = [PROMPT, (*PROMPT[:130], 5, 6, 7), PROMPT[:20]]
PARAMS = SamplingParams(max_new_tokens=16)
# Rank, alpha, rsLoRA, and the ends of the layers' names.
KINDS = {
    "small": (2, 3.0, False, ("q_proj", "v_proj", "gate", "in_proj_qkv", "in_proj_qkvz")),
    "large": (7, 4.0, True, ("k_proj", "o_proj", "up_proj", "down_proj", "out_proj", "in_proj_z", "in_proj_ba")),
}


def write_adapters(directory, shapes) -> dict[str, str]:
    paths = {}
    for number, (name, (rank, alpha, rslora, ends)) in enumerate(KINDS.items()):
        rng, arrays = np.random.default_rng(number), {}
        for parameter, shape in shapes.items():
            layer = parameter.removesuffix(".weight")
            if parameter.startswith("layers.") and len(shape) == 2 and layer.endswith(ends) and ".experts." not in layer:
                for side, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
                    arrays[f"{layer}.lora_{side}.weight"] = rng.normal(0, 0.15, size).astype(np.float32)
        assert arrays
        paths[name] = str(directory / name)
        write_adapter(paths[name], Adapter(rank, alpha, rslora, arrays), base="base")
    return paths


def tokens_of(engine: Engine, requests: list[Request]) -> dict:
    tokens = {request.key: [] for request in requests}
    for update in engine.run(requests):
        tokens[update.request.key] += update.tokens
    return tokens


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("qwen3", "data=1"),
        *(
            pytest.param(family, mesh, marks=pytest.mark.slow)
            for family, mesh in [("qwen3", "data=2,tensor=2"), ("qwen3_moe", "data=1"), ("qwen3_5", "data=1")]
        ),
        pytest.param("qwen3_next", "fsdp=2,tensor=2", marks=pytest.mark.slow),
    ],
)
def test_answers_are_those_of_each_merged_model(tiny_directory, tmp_path, family, mesh):
    directory = tiny_directory(family)
    sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(mesh)), INFERENCE)
    tokenizer = Tokenizer.open(directory)
    model = load_model(directory, sharding_ctx, dtype="float32")
    shapes = disk_shapes(model.module)
    paths = write_adapters(tmp_path, shapes)
    adapters = {name: read_adapter(path) for name, path in paths.items()}
    expected = {}
    for name in ("", *KINDS):
        merged = load_model(directory, sharding_ctx, dtype="float32", adapter=adapters.get(name))
        requests = [Request((name, index), prompt, PARAMS) for index, prompt in enumerate(PROMPTS)]
        expected |= tokens_of(Engine(merged, tokenizer, max_batch_size=4), requests)
    for index in range(len(PROMPTS)):
        assert len({tuple(expected[name, index]) for name in ("", *KINDS)}) == 3, "the adapters change the answers"
    stacked, factors = stack_adapters(adapters, shapes)
    engine = Engine(with_adapter(model, stacked, dtype=model.dtype)[0], tokenizer, max_batch_size=4, adapters=factors)
    requests = [
        Request((name, index), prompt, PARAMS, adapter=name)
        for index, prompt in enumerate(PROMPTS)
        for name in ("large", "", "small")
    ]
    assert tokens_of(engine, requests) == expected
    assert tokens_of(engine, requests[::-1]) == expected, "now from the prefix cache"
    with pytest.raises(UserError, match="there is no adapter other; there is small, large"):
        engine.check(Request(0, PROMPT, PARAMS, adapter="other"))


def test_pages_of_other_adapters_have_other_names():
    def names(adapter: str) -> list[bytes]:
        return Sequence(Request(0, PROMPT, PARAMS, adapter=adapter), list(PROMPT), 200).page_names(64)

    assert names("a") == names("a") and len(names("a")) == 2
    assert not set(names("a")) & set(names("")) and not set(names("a")) & set(names("b"))


def test_what_can_only_be_merged_is_refused_by_name():
    shapes = {"layers.0.mlp.up_proj.weight": (6, 4), "embed_tokens.weight": (9, 4), "lm_head.weight": (9, 4)}
    matrices = {"a": np.ones((2, 4)), "b": np.ones((6, 2)), "scale": np.asarray(2.0), "magnitude": np.ones(6)}
    up_proj = ("layers.0.mlp.up_proj", "layers.0.mlp.up_proj.weight")
    config = AdapterConfig(2, 4.0)

    def stack(*updates: Update):
        return stack_adapters({"law": PeftAdapter(config, updates)}, shapes)

    adapter, factors = stack(Update(*up_proj, "lora", matrices, 2))
    assert adapter.rank == 2 and factors["law"].tolist() == [2.0, 2.0]
    of_embedding = matrices | {"b": np.ones((9, 2))}
    wrong = {
        "layers.0.mlp.up_proj: DoRA": Update(*up_proj, "dora", matrices, 2),
        "embed_tokens: LoRA of an embedding": Update("embed_tokens", "embed_tokens.weight", "lora", of_embedding, 2),
    }
    for message, update in wrong.items():
        with pytest.raises(CheckpointError) as error:
            stack(update)
        first, second = str(error.value).splitlines()
        assert first.startswith("the adapter law has more than LoRA of linear layers; merge it with `qwen-dist export")
        assert message in second
    with pytest.raises(CheckpointError, match="the adapter law: the adapter does not fit the model"):
        stack(Update(*up_proj, "lora", matrices | {"a": np.ones((2, 5))}, 2))

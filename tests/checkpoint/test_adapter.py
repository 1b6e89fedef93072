"""Adapters of every kind that peft writes: merged weights and logits are those of peft, or the adapter is refused."""

import errno
import json
import os
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from qwen_dist.checkpoint.adapter import Adapter, write_adapter
from qwen_dist.checkpoint.adapter_layers import with_adapter
from qwen_dist.checkpoint.adapter_read import read_adapter
from qwen_dist.checkpoint.model import export_model, load_model
from qwen_dist.errors import CheckpointError
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import disk_shapes, on_disk, with_parameters
from qwen_dist.sharding import INFERENCE, ShardingContext

ATTENTION = ["q_proj", "o_proj"]
TOKENS = np.arange(24, dtype=np.int32)[None] % 300
# Largest relative difference: float32 rounding of a norm, a factorisation, or a forward pass.
WEIGHTS, LOGITS = 3e-6, 2e-5
LAYER = "base_model.model.model.layers.0."


def load_base(directory, dtype=torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)


def write(base, path, seed=1, **config):
    """An adapter that peft writes, with every trained value drawn at random around what it started with."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tied embeddings, biases
        model = peft.get_peft_model(load_base(base), peft.LoraConfig(**({"r": 4, "lora_alpha": 6} | config)))
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(path)
    return path


def load_theirs(base, path, dtype=torch.float32):
    """The base with the adapter as peft loads it: before merging, its logits; afterwards, its weights by their names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(load_base(base, dtype), path)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(TOKENS).long(), use_cache=False).logits.float().numpy()
        return model, logits


def load_ours(base, path, mesh="", dtype="float32"):
    sharding_ctx = ShardingContext(make_mesh(MeshConfig.parse(mesh)), INFERENCE)
    return load_model(base, sharding_ctx, dtype=dtype, adapter=None if path is None else read_adapter(path))


def relative_error(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)


def check_weights(loaded, theirs, bound=WEIGHTS):
    """Every parameter of ours equals that of peft's merged model."""
    state = theirs.merge_and_unload().state_dict()
    shapes = disk_shapes(loaded.module)
    for name, value in loaded.parameters.items():
        prefix = "" if name == "lm_head.weight" else "model."
        expected = state[prefix + name].float().numpy().reshape(shapes[name])
        assert relative_error(on_disk(np.asarray(value, np.float32), shapes[name]), expected) <= bound, name


def check_logits(loaded, logits):
    model = with_parameters(loaded.module, loaded.parameters)
    hidden, _, _ = model(TOKENS, np.arange(TOKENS.shape[1], dtype=np.int32)[None])
    assert relative_error(model.unembed(hidden), logits) <= LOGITS


def check(base, path, mesh="", *, merge=True):
    theirs, logits = load_theirs(base, path)
    loaded = load_ours(base, path, mesh)
    check_logits(loaded, logits)
    if merge:
        check_weights(loaded, theirs)
    plain = load_ours(base, None).parameters
    changed = {name for name, value in plain.items() if not np.array_equal(value, loaded.parameters[name])}
    assert changed, "the adapter changes nothing"
    return changed


KINDS = {
    "plain": {"target_modules": ATTENTION},
    "rslora": {"target_modules": ATTENTION, "use_rslora": True},
    "fan_in_fan_out": {"target_modules": ATTENTION, "fan_in_fan_out": True},
    "dora": {"target_modules": [*ATTENTION, "down_proj"], "use_dora": True},
    "patterns": {
        "target_modules": [*ATTENTION, "k_proj", "down_proj"],
        "rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 3},
        "alpha_pattern": {r"^model\.layers\.0\.self_attn\.(q|k)_proj": 17, "down_proj": 2.5},
    },
    "pattern that only looks alike": {
        "target_modules": ATTENTION,
        "alpha_pattern": {"q": 3, "attn.q_proj": 5, "o_proj$": 9},
    },
    "bias lora_only": {"target_modules": ["q_proj"], "bias": "lora_only"},
    "bias all": {"target_modules": ["q_proj"], "bias": "all"},
    "lora_bias": {"target_modules": ["q_proj", "k_proj"], "lora_bias": True},
    "modules_to_save": {"target_modules": ATTENTION, "modules_to_save": ["lm_head", "embed_tokens", "norm"]},
    "modules_to_save: blocks": {"target_modules": ATTENTION, "modules_to_save": ["input_layernorm", "mlp"]},
    "head and embedding": {"target_modules": ["q_proj", "lm_head", "embed_tokens"]},
    "dora of head and embedding": {"target_modules": ["lm_head", "embed_tokens"], "use_dora": True},
    "token rows": {"target_modules": ATTENTION, "trainable_token_indices": [5, 2, 300]},
    "token rows of both": {
        "target_modules": ATTENTION,
        "trainable_token_indices": {"embed_tokens": [1, 7], "lm_head": [3]},
    },
    "pissa": {"target_modules": [*ATTENTION, "up_proj"], "init_lora_weights": "pissa"},
    "olora": {"target_modules": [*ATTENTION, "up_proj"], "init_lora_weights": "olora"},
    "dora from pissa": {"target_modules": ATTENTION, "init_lora_weights": "pissa", "use_dora": True},
    "orthogonal": {"target_modules": ATTENTION, "init_lora_weights": "orthogonal"},
    "some layers": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_merged_as_peft_merges_it(tiny_checkpoint, tmp_path, kind):
    base = tiny_checkpoint("qwen2", num_hidden_layers=2)
    check(base, write(base, tmp_path / "adapter", **KINDS[kind]))


@pytest.mark.parametrize("kind", ["dora", "pissa", "head and embedding", "token rows", "modules_to_save"])
def test_a_sharded_merge_gives_the_same_weights(tiny_checkpoint, tmp_path, kind):
    base = tiny_checkpoint("qwen2", num_hidden_layers=2, vocab_size=312)
    path = write(base, tmp_path / "adapter", **KINDS[kind])
    whole, sharded = load_ours(base, path), load_ours(base, path, "fsdp=2,tensor=2")
    for name, value in whole.parameters.items():
        assert relative_error(sharded.parameters[name], value) <= WEIGHTS, name
    assert len(sharded.parameters["layers.0.self_attn.o_proj.weight"].sharding.device_set) == 4


def test_a_bfloat16_merge_is_that_of_peft_bit_for_bit(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("qwen2", num_hidden_layers=2)
    path = write(base, tmp_path / "adapter", **KINDS["plain"])
    theirs, _ = load_theirs(base, path, torch.bfloat16)
    check_weights(load_ours(base, path, dtype="bfloat16"), theirs, bound=0)
    export_model(
        str(base), load_ours(base, None).sharding_ctx, str(tmp_path / "new"), adapter=str(path), max_shard_bytes=2**30
    )
    merged = load_theirs(base, path)[0].merge_and_unload().state_dict()
    for name, value in load_file(tmp_path / "new" / "model.safetensors").items():
        assert relative_error(value, merged[name].numpy()) <= WEIGHTS, name


# --- a head that is the embedding ---

TIED = {
    "token rows": {"target_modules": ATTENTION, "trainable_token_indices": [5, 2]},
    "modules_to_save": {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "lora": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
}


@pytest.mark.parametrize("kind", TIED)
def test_a_tied_head_changes_with_the_embedding(tiny_checkpoint, tmp_path, kind):
    base = tiny_checkpoint("qwen2", num_hidden_layers=2, tie_word_embeddings=True)
    path = write(base, tmp_path / "adapter", **({"target_modules": ATTENTION} | TIED[kind]))
    # peft's merge adds LoRA of tied layers twice; its logits before merging are the truth.
    assert "embed_tokens.weight" in check(base, path, merge=kind != "lora")


@pytest.mark.parametrize("config", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["embed_tokens", "q_proj"]}])
def test_half_of_a_tied_pair_is_refused(tiny_checkpoint, tmp_path, config):
    base = tiny_checkpoint("qwen2", num_hidden_layers=2, tie_word_embeddings=True)
    path = write(base, tmp_path / "adapter", **({"target_modules": ATTENTION} | config))
    with pytest.raises(CheckpointError, match="changes only one of embed_tokens and lm_head"):
        load_ours(base, path)


# --- experts ---

MOE = {"num_hidden_layers": 1, "decoder_sparse_step": 1}


@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["down_proj"], ["gate_up_proj"]])
def test_stacked_experts_are_merged(tiny_checkpoint, tmp_path, targets):
    base = tiny_checkpoint("qwen3_moe", **MOE)
    config = {"target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{name}" for name in targets]}
    patterns = {"rank_pattern": {r".*experts\.down_proj": 2}, "alpha_pattern": {"gate_up_proj": 9}}
    check(base, write(base, tmp_path / "adapter", **config, **patterns))


def test_stacked_experts_of_each_layer_are_told_apart(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("qwen3_moe", **MOE | {"num_hidden_layers": 2}, moe_intermediate_size=20, hidden_size=40)
    targets = ["layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"]  # both [40, in]
    path = write(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=targets)
    assert {"layers.0.mlp.experts.gate_up_proj", "layers.1.mlp.experts.down_proj"} <= check(base, path)


def test_the_router_is_merged(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("qwen3_moe", **MOE)
    path = write(base, tmp_path / "adapter", target_modules=["q_proj"], target_parameters=["mlp.gate.weight"])
    assert "layers.0.mlp.gate.weight" in check(base, path)


def write_named_experts(base, path, *, experts=10, projections=("gate_proj", "up_proj", "down_proj"), **config):
    """An adapter of experts as transformers 4 named them, one by one."""
    write(base, path, target_modules=["q_proj"], **config)
    random, sizes = np.random.default_rng(0), {"gate_proj": (16, 40), "up_proj": (16, 40), "down_proj": (40, 16)}
    arrays = load_file(path / "adapter_model.safetensors")
    for index in range(experts):
        for name in projections:
            outputs, inputs = sizes[name]
            module = f"{LAYER}mlp.experts.{index}.{name}"
            arrays[f"{module}.lora_A.weight"] = random.normal(size=(4, inputs)).astype(np.float32) / 4
            arrays[f"{module}.lora_B.weight"] = random.normal(size=(outputs, 4)).astype(np.float32) / 4
    save_file(arrays, path / "adapter_model.safetensors", {"format": "pt"})
    edit(path, target_modules=["q_proj", *projections])
    return path


def test_experts_named_one_by_one_are_merged(tiny_checkpoint, tmp_path):
    base = tiny_checkpoint("qwen3_moe", **MOE)
    path = write_named_experts(base, tmp_path / "adapter")
    changed = check(base, path)
    assert {"layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"} <= changed


def test_a_few_experts_with_rslora_and_dora(tiny_checkpoint, tmp_path):
    """peft cannot load these under transformers 5, so each matrix is compared with peft's layer of its own."""
    base = tiny_checkpoint("qwen3_moe", **MOE)
    path = write_named_experts(
        base, tmp_path / "adapter", experts=3, projections=("up_proj",), use_dora=True, use_rslora=True
    )
    arrays, random = load_file(path / "adapter_model.safetensors"), np.random.default_rng(1)
    module = LAYER + "mlp.experts.{}.up_proj."
    for index in range(3):
        arrays[module.format(index) + "lora_magnitude_vector"] = random.normal(1, 0.1, 16).astype(np.float32)
    save_file(arrays, path / "adapter_model.safetensors", {"format": "pt"})
    before = load_ours(base, None).parameters["layers.0.mlp.experts.gate_up_proj"]
    after = load_ours(base, path).parameters["layers.0.mlp.experts.gate_up_proj"]
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, use_rslora=True, target_modules=["up_proj"])
    for index in range(3):
        layer = peft.get_peft_model(torch.nn.ModuleDict({"up_proj": torch.nn.Linear(40, 16, bias=False)}), config)
        linear = layer.base_model.model["up_proj"]
        linear.base_layer.weight.data = torch.from_numpy(np.array(before[index, 1]))
        for side, target in (("A", linear.lora_A), ("B", linear.lora_B)):
            target["default"].weight.data = torch.from_numpy(arrays[module.format(index) + f"lora_{side}.weight"])
        magnitude = torch.from_numpy(arrays[module.format(index) + "lora_magnitude_vector"])
        linear.lora_magnitude_vector["default"].weight.data = magnitude
        merged = layer.merge_and_unload()["up_proj"].weight.detach().numpy()
        assert relative_error(after[index, 1], merged) <= WEIGHTS
    np.testing.assert_array_equal(after[:, 0], before[:, 0])
    np.testing.assert_array_equal(after[3:], before[3:])


# --- what is refused ---


def edit(path, **values):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | values))


@pytest.fixture(scope="module")
def plain(tiny_checkpoint, tmp_path_factory):
    """A base and an adapter of its q_proj, o_proj and up_proj."""
    base = tiny_checkpoint("qwen2", num_hidden_layers=2)
    return base, write(base, tmp_path_factory.mktemp("adapter"), target_modules=[*ATTENTION, "up_proj"])


def copied(path, tmp_path):
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes((path / name).read_bytes())
    return tmp_path


CONFIGS = {
    "r: infinity": ("r", "Infinity", "Infinity is not a JSON number"),
    "r: not whole": ("r", "4.9", "r is 4.9, but must be an integer"),
    "r: zero": ("r", "0", "r is 0, but must be an integer from 1"),
    "r: true": ("r", "true", "r is True, but must be an integer"),
    "r: null": ("r", "null", "r is missing"),
    "alpha: 401 digits": ("lora_alpha", "1" + 400 * "0", "a number has 401 digits"),
    "alpha: NaN": ("lora_alpha", "NaN", "NaN is not a JSON number"),
    "alpha: too large": ("lora_alpha", "1e300", "lora_alpha is 1e\\+300, but must be a number"),
    "use_rslora: text": ("use_rslora", '"false"', "use_rslora is 'false', but must be true or false"),
    "use_dora: 1": ("use_dora", "1", "use_dora is 1, but must be true or false"),
    "target_parameters: 5": ("target_parameters", "5", "target_parameters is 5, but must be a list of names"),
    "modules_to_save: text": ("modules_to_save", '"lm_head"', "modules_to_save is 'lm_head', but must be a list of names"),
    "modules_to_save: absent": ("modules_to_save", '["score"]', "modules_to_save names score, but there is no tensor"),
    "bias: unknown": ("bias", '"some"', "bias is 'some', but must be none, all or lora_only"),
    "rank_pattern: list": ("rank_pattern", "[1]", "rank_pattern is .1., but must be an object"),
    "rank_pattern: rank": ("rank_pattern", '{"q_proj": 0}', "rank_pattern .* must be an integer"),
    "alpha_pattern: no expression": ("alpha_pattern", '{"(": 1}', "alpha_pattern .* must be of regular expressions"),
    "alpha_pattern: slow": ("alpha_pattern", '{"(a+)+x": 1}', "alpha_pattern .* must be of patterns of at most"),
    "token indices: negative": (
        "trainable_token_indices",
        "[-1]",
        "trainable_token_indices .* a list of different token ids",
    ),
    "token indices: twice": (
        "trainable_token_indices",
        "[1, 1]",
        "trainable_token_indices .* a list of different token ids",
    ),
    "token indices: absent": ("trainable_token_indices", "[1]", "names embed_tokens, but there is no tensor"),
    "dora without magnitudes": ("use_dora", "true", "q_proj.lora_magnitude_vector is missing"),
    "lora_bias without biases": ("lora_bias", "true", "q_proj.lora_B.bias is missing"),
    "other rank": ("r", "8", "q_proj.lora_A.weight has shape .4, 32., which does not fit rank 8"),
    "alora": (
        "alora_invocation_tokens",
        "[1, 2]",
        "alora_invocation_tokens is .1, 2., which is not supported: the adapter acts",
    ),
    "layer_replication": ("layer_replication", "[[0, 2], [1, 2]]", "layer_replication .* layers of the base are repeated"),
    "megatron": ("megatron_config", '{"a": 1}', "megatron_config .* not supported"),
    "qalora": ("use_qalora", "true", "use_qalora is True, which is not supported"),
    "arrow": ("arrow_config", '{"a": 1}', "arrow_config .* chosen for each token"),
    "loftq": ("init_lora_weights", '"loftq"', "init_lora_weights is 'loftq'.* PEFT quantises the base weights"),
    "corda": ("init_lora_weights", '"corda"', "init_lora_weights is 'corda'.* covariances"),
    "random pissa": (
        "init_lora_weights",
        '"pissa_niter_16"',
        "init_lora_weights is 'pissa_niter_16'.* random approximation",
    ),
    "unknown initialisation": ("init_lora_weights", '"pizza"', "init_lora_weights is 'pizza', but must be true"),
    "not LoRA": ("peft_type", '"LOHA"', "peft_type is 'LOHA', but only LORA"),
    "unknown key": ("use_nora", "true", "use_nora is not a known key .*ignored_config_keys=use_nora"),
    "deep": ("auto_mapping", 100_000 * "[" + 100_000 * "]", "nested deeper"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_wrong_setting_is_named(plain, tmp_path, case):
    key, value, message = CONFIGS[case]
    path = copied(plain[1], tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    config[key] = "@"
    (path / "adapter_config.json").write_text(json.dumps(config).replace('"@"', value))
    with pytest.raises(CheckpointError, match=message) as error:
        read_adapter(path)
    assert len(str(error.value)) < 4000


@pytest.mark.parametrize("key", ["use_nora", "alora_invocation_tokens", "init_lora_weights"])
def test_the_user_can_vouch_for_a_setting(plain, tmp_path, key):
    path = copied(plain[1], tmp_path)
    edit(path, **{"use_nora": 1, "alora_invocation_tokens": [3], "init_lora_weights": "loftq"})
    with pytest.raises(CheckpointError) as error:
        read_adapter(path, {"use_nora", "alora_invocation_tokens", "init_lora_weights"} - {key})
    assert f"ignored_config_keys={key}" in str(error.value)
    expected = read_adapter(plain[1]).updates
    found = read_adapter(path, ["use_nora", "alora_invocation_tokens", "init_lora_weights"]).updates
    assert [update.kind for update in found] == [update.kind for update in expected]


Q = f"{LAYER}self_attn.q_proj."
TENSORS = {
    "of a wider base": (
        {f"{Q}lora_A.weight": (4, 64)},
        "q_proj is not of this model: .* weight .32, 64., the model has .32, 32.",
    ),
    "same product": (
        {f"{Q}lora_A.weight": (4, 16), f"{Q}lora_B.weight": (64, 4)},
        "q_proj is not of this model: .* weight .64, 16., the model has .32, 32.",
    ),
    "transposed": (
        {f"{LAYER}mlp.up_proj.lora_A.weight": (4, 48), f"{LAYER}mlp.up_proj.lora_B.weight": (32, 4)},
        "up_proj is not of this model: .* weight .32, 48., the model has .48, 32.",
    ),
    "of a norm": (
        {f"{LAYER}input_layernorm.lora_A.weight": (4, 1), f"{LAYER}input_layernorm.lora_B.weight": (32, 4)},
        "input_layernorm is not of this model: .* weight .32, 1., the model has .32.",
    ),
    "of a layer that is not there": (
        {
            f"{LAYER.replace('0', '7')}mlp.up_proj.lora_{side}.weight": shape
            for side, shape in (("A", (4, 32)), ("B", (48, 4)))
        },
        "layers.7.mlp.up_proj is not of this model",
    ),
    "of a larger vocabulary": (
        {"base_model.model.lm_head.weight": (320, 32)},
        "lm_head.weight is not of this model: .* weight .320, 32., the model has .311, 32.",
    ),
    "0-D": ({f"{Q}lora_A.weight": ()}, "q_proj.lora_A.weight has shape .., which does not fit rank 4"),
    "3-D": ({f"{Q}lora_B.weight": (32, 4, 1)}, "q_proj.lora_B.weight has shape .32, 4, 1."),
    "empty": ({f"{Q}lora_B.weight": (0, 4)}, "q_proj.lora_B.weight .0, 4. is empty"),
    "ranks differ": ({f"{Q}lora_B.weight": (32, 3)}, "q_proj.lora_B.weight has shape .32, 3., which does not fit rank 4"),
    "B missing": ({f"{Q}lora_B.weight": None}, "q_proj.lora_B.weight is missing"),
    "an unknown part": ({f"{Q}lora_C.weight": (4, 4)}, "q_proj.lora_C.weight is not a known part"),
    "experts without a target": (
        {f"{LAYER}mlp.experts.lora_A.weight": (8, 32), f"{LAYER}mlp.experts.lora_B.weight": (48, 8)},
        "target_parameters does not say",
    ),
    "magnitude without DoRA": ({f"{Q}lora_magnitude_vector": (32,)}, "lora_magnitude_vector is not a part of what"),
    "twice": (
        {f"{Q.replace('model.model.', 'model.')}lora_{side}.weight": (4, 32) if side == "A" else (32, 4) for side in "AB"},
        r"q_proj.weight is changed by several tensors",
    ),
    "integers": (
        {f"{Q}lora_A.weight": np.ones((4, 32), np.int32)},
        "q_proj.lora_A.weight is of type I32; it must be one of F16",
    ),
    "booleans": ({f"{Q}lora_A.weight": np.ones((4, 32), bool)}, "q_proj.lora_A.weight is of type BOOL"),
    "NaN": (
        {f"{Q}lora_A.weight": np.full((4, 32), np.nan, np.float32)},
        "q_proj.lora_A.weight .4, 32. has NaN or infinite",
    ),
    "infinite": (
        {f"{Q}lora_B.weight": np.full((32, 4), np.inf, np.float16)},
        "q_proj.lora_B.weight .32, 4. has NaN or infin",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_a_wrong_tensor_is_named(plain, tmp_path, case):
    base, adapter = plain
    changes, message = TENSORS[case]
    path = copied(adapter, tmp_path)
    arrays = load_file(path / "adapter_model.safetensors")
    for name, value in changes.items():
        if value is None:
            del arrays[name]
        else:
            arrays[name] = np.ones(value, np.float32) if isinstance(value, tuple) else value
    save_file(arrays, path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_ours(base, path)


def test_all_problems_are_listed_and_cut(plain, tmp_path):
    base, adapter = plain
    path = copied(adapter, tmp_path)
    arrays = {
        f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_{side}.weight": np.ones(shape, np.float32)
        for layer in range(2, 22)
        for side, shape in (("A", (4, 32)), ("B", (48, 4)))
    }
    save_file(arrays, path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError) as error:
        load_ours(base, path)
    lines = str(error.value).splitlines()
    assert len({*lines}) == 14 and "mlp.up_proj is not of this model" in lines[1] and lines[-1] == "  - and 8 more"


def test_files_that_are_not_regular_or_pickled_are_refused(plain, tmp_path):
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        read_adapter(tmp_path)
    path = copied(plain[1], tmp_path)
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle, .* save_pretrained"):
        read_adapter(path)
    os.mkfifo(path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is not a regular file"):
        read_adapter(path)
    (path / "adapter_model.safetensors").unlink()
    (path / "adapter_model.safetensors").write_bytes(b"{}" * 20)
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: expected a safetensors file"):
        read_adapter(path)


@pytest.mark.parametrize("kind", ["dora", "patterns", "modules_to_save", "pissa", "head and embedding", "lora_bias"])
def test_only_lora_of_one_rank_is_trained_further(tiny_checkpoint, tmp_path, kind):
    base = tiny_checkpoint("qwen2", num_hidden_layers=2)
    path = write(base, tmp_path / "adapter", **KINDS[kind])
    with pytest.raises(
        CheckpointError,
        match="nor used unmerged, as quantised weights need it; merge it with `qwen-dist export --adapter` first",
    ):
        read_adapter(path).to_lora()


def test_an_adapter_of_another_base_is_not_trained_further(tiny_checkpoint, plain):
    other = tiny_checkpoint("qwen2", num_hidden_layers=2, hidden_size=64)
    with pytest.raises(CheckpointError, match="q_proj is not of this model"):
        with_adapter(load_ours(other, None), read_adapter(plain[1]).to_lora(), dtype="float32")


@pytest.mark.parametrize("family", [pytest.param("qwen3_next", marks=pytest.mark.slow), "qwen3_5"])
def test_adapters_of_the_delta_net_equal_peft(tiny_checkpoint, tmp_path, family):
    projections = ["in_proj_qkvz", "in_proj_ba"] if family == "qwen3_next" else ["in_proj_qkv", "in_proj_z", "in_proj_a"]
    base = tiny_checkpoint(family, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    path = write(base, tmp_path / "adapter", target_modules=[*projections, "out_proj", "q_proj"])
    changed = check(base, path, "tensor=2")
    assert {name.rpartition("layers.0.linear_attn.")[2] for name in changed} >= {f"{name}.weight" for name in projections}


def test_an_adapter_is_replaced_as_a_whole(tmp_path, monkeypatch):
    """The disk is full at each sync of a second write: the first adapter stays until the second one is complete."""
    path = tmp_path / "adapter"

    def adapter(value):
        arrays = {f"layers.0.self_attn.q_proj.lora_{side}.weight": np.full((2, 2), value, "float32") for side in "AB"}
        return Adapter(2, value, False, arrays)

    write_adapter(path, adapter(1.0), base="base")
    whole = os.fsync
    for last in range(2):
        syncs = iter(range(100))

        def full(descriptor):
            if next(syncs) == last:  # noqa: B023
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            whole(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="adapter cannot be written: No space left on device"):
            write_adapter(path, adapter(2.0), base="base")
        assert os.listdir(tmp_path) == ["adapter"] and read_adapter(path).to_lora().alpha == 1
    monkeypatch.undo()
    write_adapter(path, adapter(2.0), base="base")
    found = read_adapter(path).to_lora()
    assert found.alpha == 2 and all((array == 2).all() for array in found.arrays.values())
    assert sorted(os.listdir(path)) == ["adapter_config.json", "adapter_model.safetensors"]

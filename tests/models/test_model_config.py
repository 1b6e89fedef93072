"""`config.json` read strictly: both generations of the file, released shapes, and every problem in one error."""

import copy
import dataclasses
import json
import re

import pytest
import torch
import transformers

from qwen_dist.errors import CheckpointError
from qwen_dist.hf_config import parse_model_config, read_model_config
from qwen_dist.models.config import LayerConfig, ModelConfig, MoEConfig, RopeConfig
from qwen_dist.storage.model_files import ModelFiles

# As published, key for key (the weights' own config.json).
QWEN2_5_7B = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN3_0_6B = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN1_5_MOE = {
    "architectures": ["Qwen2MoeForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5632,
    "max_position_embeddings": 8192,
    "max_window_layers": 21,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 1408,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.39.0.dev0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
RELEASED = {"qwen2": QWEN2_5_7B, "qwen3": QWEN3_0_6B, "qwen2_moe": QWEN1_5_MOE, "qwen3_moe": QWEN3_30B_A3B}
# Layers with a window when it is on and `max_window_layers` is 20.
WINDOWED = {
    "qwen2": lambda i: i >= 20,
    "qwen3": lambda i: i >= 20,
    "qwen2_moe": lambda i: i % 2 == 0 and i < 20,
    "qwen3_moe": lambda i: True,
}

# What a user changes in a v4 file, for each way of computing.
V4_CHANGES = {
    "as released": {},
    "yarn": {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}},
    "rope_type": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "windows": {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20},
    "one kv head": {"num_key_value_heads": 1},
}


def test_released_configurations():
    qwen2, qwen3 = parse_model_config(QWEN2_5_7B), parse_model_config(QWEN3_0_6B)
    assert qwen2 == ModelConfig(
        family="qwen2",
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
        head_dim=128,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        initializer_range=0.02,
        tie_word_embeddings=False,
        qkv_bias=True,
        o_bias=False,
        qk_norm=False,
        rope=RopeConfig("default", 1e6, 131072),
        moe=None,
        layers=(LayerConfig(),) * 28,
        rotary_dim=128,
    )
    assert (qwen3.qkv_bias, qwen3.o_bias, qwen3.qk_norm, qwen3.head_dim) == (False, False, True, 128)
    assert (qwen3.tie_word_embeddings, qwen3.hidden_size, len(qwen3.layers)) == (True, 1024, 28)
    assert qwen3.rope == RopeConfig("default", 1e6, 40960)


@pytest.mark.parametrize("change", V4_CHANGES)
@pytest.mark.parametrize("family", RELEASED)
def test_both_generations_of_the_file_say_the_same(tmp_path, family, change):
    """The v4 file as published, and the v5 file that transformers 5 writes after reading it."""
    old = RELEASED[family] | V4_CHANGES[change]
    (tmp_path / "config.json").write_text(json.dumps(old))
    transformers.AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "new")
    new = json.loads((tmp_path / "new" / "config.json").read_text())
    assert "rope_parameters" in new and "rope_theta" not in new
    assert read_model_config(tmp_path) == read_model_config(tmp_path / "new")
    windows = [layer.sliding_window for layer in parse_model_config(old).layers]
    expected = [4096 if change == "windows" and WINDOWED[family](i) else None for i in range(old["num_hidden_layers"])]
    assert windows == expected


@pytest.mark.parametrize("family", RELEASED)
def test_transformers_own_defaults_are_ours(family):
    """A file that leaves out all it may is read as transformers reads it."""
    given = {key: RELEASED[family][key] for key in ("model_type", "max_position_embeddings")}
    needed = "vocab_size hidden_size intermediate_size num_attention_heads num_hidden_layers rms_norm_eps".split()
    needed += [key for key in RELEASED[family] if key.endswith(("expert_intermediate_size", "moe_intermediate_size"))]
    needed += [key for key in ("num_experts", "num_experts_per_tok") if key in RELEASED[family]]
    minimal = given | {key: RELEASED[family][key] for key in needed} | {"num_key_value_heads": 4}
    written = transformers.AutoConfig.for_model(**minimal).to_dict()
    assert parse_model_config(minimal) == parse_model_config(written)


def test_experts_of_released_configurations():
    old, new = parse_model_config(QWEN1_5_MOE), parse_model_config(QWEN3_30B_A3B)
    assert old.moe == MoEConfig(60, 4, 1408, 5632, normalize_scores=False, aux_loss_coef=0.001)
    assert new.moe == MoEConfig(128, 8, 768, None, normalize_scores=True, aux_loss_coef=0.001)
    assert (old.qkv_bias, old.o_bias, old.qk_norm, old.head_dim) == (True, False, False, 128)
    assert (new.qkv_bias, new.o_bias, new.qk_norm, new.head_dim) == (False, False, True, 128)
    assert (old.layers, new.layers) == ((LayerConfig(ffn="moe"),) * 24, (LayerConfig(ffn="moe"),) * 48)


def test_which_layers_have_experts():
    """As the decoder layers of transformers are built."""
    given = QWEN3_30B_A3B | {"num_hidden_layers": 8, "decoder_sparse_step": 3, "mlp_only_layers": [5]}
    assert [layer.ffn for layer in parse_model_config(given).layers] == ["mlp"] * 2 + ["moe"] + ["mlp"] * 5
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(transformers.AutoConfig.for_model(**given))
    assert [hasattr(layer.mlp, "experts") for layer in model.layers] == [False, False, True, *[False] * 5]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 129}, "num_experts_per_tok 129 is more than the 128 experts"),
        ({"num_local_experts": 128}, "num_experts and num_local_experts are both given"),
        ({"mlp_only_layers": [48, "1"]}, "mlp_only_layers has 48, '1'; layers are 0 to 47"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be at least 1"),
        ({"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size = 8 is not understood"),
    ],
)
def test_experts_that_cannot_be(changes, message):
    with pytest.raises(CheckpointError, match=re.escape(message)):
        parse_model_config(QWEN3_30B_A3B | changes)


def test_every_problem_is_listed_at_once():
    broken = copy.deepcopy(QWEN3_0_6B) | {
        "hidden_size": "1024",
        "num_attention_heads": 15,
        "head_dim": 127,
        "vocab_size": 0,
        "tie_word_embeddings": 1,
        "rms_norm_eps": True,
        "hidden_act": "gelu",
        "rope_scaling": {"rope_type": "yarn", "factor": -1, "low_freq_factor": 2},
        "partial_rotary_factor": 0.25,
        "layer_types": ["full_attention", "chunked_attention"],
        "logit_scale": 0.5,
        "use_sliding_window": "yes",
    }
    del broken["intermediate_size"]
    with pytest.raises(CheckpointError) as error:
        parse_model_config(broken)
    expected = {
        "hidden_size is '1024'; it must be int",
        "num_attention_heads 15 is not a multiple of num_key_value_heads 8",
        "head_dim is 127; rotary embedding needs an even one",
        "vocab_size is 0; it must be at least 1",
        "tie_word_embeddings is 1; it must be bool",
        "rms_norm_eps is True; it must be int or float",
        "hidden_act is 'gelu', which is not supported; supported is 'silu'",
        "rope factor is -1; it must be a positive number",
        "rope type 'yarn' does not know low_freq_factor "
        "(if it does not: --config.model.ignored_config_keys=rope_scaling.low_freq_factor)",
        "partial_rotary_factor is 0.25; this family rotates whole heads",
        "layer_types has 'chunked_attention'; allowed are full_attention, sliding_attention",
        "layer_types has 2 entries for num_hidden_layers 28",
        "logit_scale = 0.5 is not understood and may change the computation "
        "(if it does not: --config.model.ignored_config_keys=logit_scale)",
        "use_sliding_window is 'yes'; it must be bool",
        "intermediate_size is missing",
    }
    lines = str(error.value).splitlines()
    assert lines[0] == "config.json cannot be used:"
    assert {line.removeprefix("  - ") for line in lines[1:]} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "llama"},
            "model_type 'llama' is not supported yet: it is not a Qwen text model; supported are qwen2",
        ),
        ({"model_type": None}, "model_type None is not supported yet: it is not a Qwen text model"),
        ({"model_type": ["qwen3"]}, r"model_type \['qwen3'\] is not supported yet"),
        ({"model_type": "qwen2_5_vl"}, "it reads images or audio; only text models are"),
        ({"model_type": "qwen3_omni_moe"}, "it reads images or audio; only text models are"),
        ({"model_type": "qwen4_exp"}, "this generation of Qwen is not"),
        ({"model_type": "qwen"}, "this generation of Qwen is not"),
        ({"quantization": {"group_size": 64, "bits": 4}}, r"quantization \(of MLX\) is not supported; use the original"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, r"rope type \['yarn'\] is not supported"),
        ({"hidden_size": 10**30}, "it must be at most 2147483647"),
        ({"use_mrope": True}, "use_mrope is True"),
        (
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "rope type 'longrope' is not supported; supported are",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor, high_freq_factor"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
            "rope_theta and rope_parameters.rope_theta differ",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"type": "linear", "factor": 3.0}},
            "rope_scaling and rope_parameters differ",
        ),
        ({"layer_types": ["sliding_attention"] * 28}, "no sliding window is set and in use"),
        ({"num_key_value_heads": 5}, "num_attention_heads 16 is not a multiple of num_key_value_heads 5"),
    ],
)
def test_what_is_not_computed_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        parse_model_config(QWEN3_0_6B | changes)


def test_qwen2_cannot_be_without_its_biases():
    with pytest.raises(CheckpointError, match="a qwen2 model always has q, k and v biases"):
        parse_model_config(QWEN2_5_7B | {"attention_bias": False})


def test_heads_that_do_not_divide_hidden_size_need_a_head_dim():
    odd = QWEN2_5_7B | {"hidden_size": 3580, "num_attention_heads": 24}
    with pytest.raises(CheckpointError, match="hidden_size 3580 is not a multiple of num_attention_heads 24"):
        parse_model_config(odd)
    assert parse_model_config(odd | {"head_dim": 64}).head_dim == 64


def test_keys_the_user_vouches_for():
    given = QWEN3_0_6B | {"logit_scale": 0.5, "my_note": "x"}
    assert parse_model_config(given, ["logit_scale", "my_note"]) == parse_model_config(QWEN3_0_6B)
    with pytest.raises(CheckpointError, match="my_note") as error:
        parse_model_config(given, ["logit_scale"])
    assert "logit_scale" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "value", "key"),
    [
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, "attn_factor"),
        ("quantization_config", {"quant_method": "fp8", "weight_block_size": [128, 128]}, "unheard_of"),
    ],
)
def test_keys_inside_objects_that_the_user_vouches_for(section, value, key):
    given = QWEN3_0_6B | {section: value | {key: "x"}}
    with pytest.raises(CheckpointError, match=rf"\(if it does not: --config.model.ignored_config_keys={section}.{key}\)"):
        parse_model_config(given)
    for ignored in (key, f"{section}.{key}"):
        assert parse_model_config(given, [ignored]) == parse_model_config(QWEN3_0_6B | {section: value})


@pytest.mark.parametrize("changes", [{"mlp_only_layers": [0, 1, 2]}, {"decoder_sparse_step": 5}])
def test_a_mixture_without_a_layer_of_experts_is_a_dense_model(tiny_checkpoint, changes):
    config = read_model_config(tiny_checkpoint("qwen3_moe", **({"mlp_only_layers": []} | changes)))
    assert config.moe is None and {layer.ffn for layer in config.layers} == {"mlp"}


def test_gguf_is_named(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    for location in (tmp_path / "model.gguf", tmp_path, "Qwen/Qwen3-8B-GGUF"):
        with pytest.raises(CheckpointError, match=r"is in the GGUF format, .* the model's repository with safetensors"):
            ModelFiles.open(location)


def test_reading_does_not_change_what_was_given():
    given = copy.deepcopy(QWEN2_5_7B)
    parse_model_config(given)
    assert given == QWEN2_5_7B


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is not a checkpoint: it has no config.json"),
        ("{", "is not JSON: Expecting property name"),
        ("[1]", r"must hold a JSON object; it holds \[1\]"),
        ("[" * 100_000, "nested deeper than"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
        ('{"rms_norm_eps": Infinity}', "Infinity is not a JSON number"),
        ('{"vocab_size": 1' + "0" * 5000 + "}", "a number has 5001 digits"),
        ("\ufeff{}", "byte-order mark"),
    ],
)
def test_directories_without_a_usable_file(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message) as error:
        read_model_config(tmp_path)
    assert len(str(error.value)) < 1000


ODD_VALUES = [0, -1, 10**39, 1e300, True, "x" * 10**6, "\x1b[2J", [], [[]] * 1000, {}, {"a": {}}, 0.5]


@pytest.mark.parametrize("given", [QWEN2_5_7B, QWEN3_30B_A3B], ids=["dense", "moe"])
def test_odd_values_are_refused_in_a_short_message(given):
    """Every key with every kind of value: the file is used, or refused in one message that can be printed."""
    rope = {"rope_type", "rope_theta", "factor", "truncate", "original_max_position_embeddings", "attention_factor"}
    cases = [given | {key: value} for key in (*given, "layer_types", "x\x1b" * 1000) for value in ODD_VALUES]
    cases += [
        given | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0} | {key: value}}
        for key in rope
        for value in ODD_VALUES
    ]
    for case in cases:
        try:
            parse_model_config(case)
        except CheckpointError as error:
            assert len(str(error)) < 3000 and "\x1b" not in str(error)


HYBRID = {"model_type": "qwen3_5", "max_window_layers": None}
# One change of `config.json` for every field of the three classes.
CHANGES = {
    "family": {"model_type": "qwen2", "attention_bias": True},
    "vocab_size": {"vocab_size": 7},
    "hidden_size": {"hidden_size": 512},
    "intermediate_size": {"intermediate_size": 5},
    "num_attention_heads": {"num_attention_heads": 32},
    "num_key_value_heads": {"num_key_value_heads": 2},
    "head_dim": {"head_dim": 64},
    "max_position_embeddings": {"max_position_embeddings": 100},
    "rms_norm_eps": {"rms_norm_eps": 1e-5},
    "initializer_range": {"initializer_range": 0.1},
    "tie_word_embeddings": {"tie_word_embeddings": False},
    "qkv_bias": {"attention_bias": True},
    "o_bias": {"attention_bias": True},
    "qk_norm": {"model_type": "qwen2", "attention_bias": True},
    "rope": {"rope_theta": 10000.0},
    "moe": QWEN3_30B_A3B,
    "layers": {"num_hidden_layers": 3},
    "rotary_dim": HYBRID,
    "norm_offset": HYBRID,
    "attention_gate": HYBRID,
    "delta_net": HYBRID,
    "rope.type": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "rope.theta": {"rope_theta": 10000.0},
    "rope.original_max_positions": {"max_position_embeddings": 100},
    "rope.factor": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "rope.attention_factor": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "rope.beta_fast": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 30}},
    "rope.beta_slow": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 2}},
    "rope.truncate": {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
    "rope.low_freq_factor": {
        "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4}
    },
    "rope.high_freq_factor": {
        "rope_scaling": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1, "high_freq_factor": 4}
    },
}


MOE_CHANGES = {
    "num_experts": {"num_experts": 4},
    "experts_per_token": {"num_experts_per_tok": 2},
    "expert_size": {"moe_intermediate_size": 4},
    "shared_expert_size": {"shared_expert_intermediate_size": 4},
    "normalize_scores": {"norm_topk_prob": True},
    "aux_loss_coef": {"router_aux_loss_coef": 0.5},
}


def test_every_field_of_the_experts_is_read_from_the_file():
    assert sorted(MOE_CHANGES) == sorted(field.name for field in dataclasses.fields(MoEConfig))
    released = parse_model_config(QWEN1_5_MOE).moe
    for field, change in MOE_CHANGES.items():
        assert getattr(released, field) != getattr(parse_model_config(QWEN1_5_MOE | change).moe, field), field


def test_every_field_is_read_from_the_file():
    fields = [field.name for field in dataclasses.fields(ModelConfig)]
    fields += [f"rope.{field.name}" for field in dataclasses.fields(RopeConfig)]
    assert sorted(CHANGES) == sorted(fields)
    released = parse_model_config(QWEN3_0_6B)
    for field, change in CHANGES.items():
        changed = parse_model_config(QWEN3_0_6B | change)
        before, after = (released.rope, changed.rope) if field.startswith("rope.") else (released, changed)
        name = field.removeprefix("rope.")
        assert getattr(before, name) != getattr(after, name), field

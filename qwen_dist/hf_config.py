"""`ModelConfig`, read strictly from a checkpoint's `config.json`.

It reads both generations of the file (transformers 4: `rope_theta` and `rope_scaling`; transformers 5:
`rope_parameters`). Every key either sets something here, is known not to change the computation, or is an error: a model
that ignores a key gives answers that look right and are wrong.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from qwen_dist.errors import CheckpointError, printable, problem_list
from qwen_dist.families import ALIASES, FAMILIES, Family
from qwen_dist.json_reader import keys_within
from qwen_dist.key_reader import KeyReader, how_to_ignore, shown
from qwen_dist.models.config import DeltaNetConfig, LayerConfig, ModelConfig, MoEConfig, RopeConfig, RopeType
from qwen_dist.storage.model_files import ModelFiles, ModelName


def parse_model_config(hf: Mapping[str, Any], ignored_keys: Iterable[str] = ()) -> ModelConfig:
    """Read the contents of a Hugging Face `config.json`: of a text model, or of a multimodal one with its `text_config`.

    Args:
      hf: the parsed file.
      ignored_keys: unknown keys the user vouches for: they may be present and are not read. A key inside rope_scaling,
        quantization_config or text_config is named alone or with its object: `attn_factor` or `rope_scaling.attn_factor`.

    Raises:
      CheckpointError: listing everything that is missing, mistyped, unknown or not supported.
    """
    text = hf.get("text_config")
    if text is None:
        return _Reader(hf, ignored_keys).model()
    if not isinstance(text, dict):
        raise CheckpointError(f"text_config is {shown(text)}; it must be an object")
    ignored = set(ignored_keys)
    inner = _Reader({"model_type": hf.get("model_type"), **text}, ignored | keys_within("text_config", ignored))
    outer = _Reader({key: value for key, value in hf.items() if key != "text_config"}, ignored)
    inner.problems += outer.outer_problems(text)
    if "tie_word_embeddings" in hf:
        inner.left.setdefault("tie_word_embeddings", hf["tie_word_embeddings"])
    return inner.model()


def read_model_config(model: ModelName, ignored_keys: Iterable[str] = ()) -> ModelConfig:
    """Read the `config.json` of a model. Raises CheckpointError as `ModelFiles.open` and `parse_model_config` do."""
    return parse_model_config(ModelFiles.open(model).config, ignored_keys)


# Keys that do not change what inference or fine-tuning computes. (quantization_config says how the weights are stored,
# which concerns the loader.)
_HARMLESS = frozenset(
    """_name_or_path architectures attention_dropout auto_map bos_token_id chunk_size_feed_forward dtype eos_token_id
    id2label label2id model_type output_attentions output_hidden_states output_router_logits pad_token_id problem_type
    quantization_config return_dict sep_token_id task_specific_params tokenizer_class torch_dtype transformers_version
    use_cache _attn_implementation _attn_implementation_autoset unsloth_fixed unsloth_version""".split()
)
# Keys that would change the computation unless they have this value.
_NEUTRAL = {
    "hidden_act": "silu",
    "is_encoder_decoder": False,
    "is_decoder": False,
    "add_cross_attention": False,
    "cross_attention_hidden_size": None,
    "tie_encoder_decoder": False,
    "use_mrope": False,
    "use_bidirectional_attention": False,
    "pruned_heads": {},
}
_ROPE_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset(
        "factor attention_factor beta_fast beta_slow truncate mscale mscale_all_dim "
        "original_max_position_embeddings".split()
    ),
    "llama3": frozenset("factor low_freq_factor high_freq_factor original_max_position_embeddings".split()),
}
_ROPE_REQUIRED: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}
_ROPE_ALWAYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})
# Keys of a hybrid's rope_parameters that concern images: with text, all three position axes are equal.
_ROPE_OF_IMAGES = frozenset({"mrope_section", "mrope_interleaved"})
# Keys outside `text_config` in the configuration of a multimodal model.
_OUTER_HARMLESS = frozenset(
    "vision_config image_token_id video_token_id vision_start_token_id vision_end_token_id language_model_only".split()
)
# By quant_method. `quantization.stored` reads what says how weights are packed; the others change nothing: they concern the
# tool, its search, its kernels, or activations, which are never quantised here.
_QUANTIZATION_KEYS = {
    "fp8": "weight_block_size fmt scale_fmt modules_to_not_convert ignored_layers activation_scheme",
    "gptq": "bits group_size sym desc_act dynamic checkpoint_format meta lm_head pack_dtype format method true_sequential "
    "damp_percent damp_auto_increment static_groups mse act_group_aware model_name_or_path model_file_base_name dataset "
    "tokenizer batch_size block_name_to_quantize module_name_preceding_first_block modules_in_block_to_quantize "
    "exllama_config use_exllama use_cuda_fp16 max_input_length model_seqlen pad_token_id cache_block_outputs backend "
    "disable_exllama is_marlin_format rotation adapter offload_to_disk offload_to_disk_path hessian fallback",
    "awq": "bits w_bit group_size q_group_size zero_point version modules_to_not_convert backend do_fuse modules_to_fuse "
    "fuse_max_seq_len exllama_config",
    "compressed-tensors": "config_groups format ignore quantization_status kv_cache_scheme sparsity_config "
    "transform_config global_compression_ratio version run_compressed",
}
# Why model types are not supported, by a part of their names; the first match counts.
_UNSUPPORTED = {
    **dict.fromkeys(("vl", "omni", "audio", "asr"), "it reads images or audio; only text models are"),
    "qwen": "this generation of Qwen is not",
}
_MAX_LAYERS = _MAX_EXPERTS = 10_000
_MAX_FLOAT = 1e15


class _Reader(KeyReader):
    """Takes keys out of the parsed file one by one; a key that is left at the end was not understood."""

    def outer_problems(self, text: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with the keys of a multimodal model's configuration outside `text_config`."""
        tied = self.left.pop("tie_word_embeddings", None)
        inner = text.get("tie_word_embeddings")
        if tied is not None and inner is not None and tied != inner:
            self.problems.append(f"tie_word_embeddings is {shown(tied)}, but in text_config {shown(inner)}")
        self.quantization()
        self.leftovers(_OUTER_HARMLESS, {})
        return self.problems

    def model(self) -> ModelConfig:
        given = self.left.get("model_type")
        name = ALIASES.get(str(given), str(given))
        if name not in FAMILIES:
            reason = next((why for part, why in _UNSUPPORTED.items() if part in name), "it is not a Qwen text model")
            message = f"model_type {shown(given)} is not supported yet: {reason}"
            raise CheckpointError(f"{message}; supported are {', '.join(FAMILIES)}.")
        family = FAMILIES[name]
        heads = self.take("num_attention_heads", (int,), minimum=1)
        kv_heads = self.take("num_key_value_heads", (int,), default=heads, minimum=1)
        hidden = self.take("hidden_size", (int,), minimum=1)
        head_dim = self.head_dim(family, hidden, heads)
        max_positions = self.take("max_position_embeddings", (int,), minimum=1)
        qkv_bias = self.qkv_bias(family)
        self.quantization()
        moe = self.moe(family) if family.has_experts else None
        rotary_dim = self.rotary_dim(family, head_dim)
        layers = self.layers(family, moe)
        has_mlp = any(layer.ffn == "mlp" for layer in layers)
        config = ModelConfig(
            family=name,
            vocab_size=self.take("vocab_size", (int,), minimum=1),
            hidden_size=hidden,
            intermediate_size=self.take("intermediate_size", (int,), **{"minimum": 1} if has_mlp else {"default": 0}),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=float(self.take("rms_norm_eps", (int, float), minimum=0.0)),
            initializer_range=float(self.take("initializer_range", (int, float), default=0.02, minimum=0.0)),
            tie_word_embeddings=self.take("tie_word_embeddings", (bool,), default=False),
            qkv_bias=qkv_bias,
            o_bias=qkv_bias and family.has_o_bias,
            qk_norm=family.qk_norm,
            rope=self.rope(family, max_positions),
            moe=moe if any(layer.ffn == "moe" for layer in layers) else None,
            layers=layers,
            rotary_dim=rotary_dim,
            norm_offset=family.is_hybrid,
            attention_gate=family.is_hybrid,
            delta_net=self.delta_net(family) if family.is_hybrid else None,
        )
        if heads % kv_heads:
            self.problems.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        self.leftovers(family.harmless, family.neutral)
        if self.problems:
            raise CheckpointError(f"config.json cannot be used:\n{problem_list(self.problems)}")
        return config

    def head_dim(self, family: Family, hidden: int, heads: int) -> int:
        head_dim = self.take("head_dim", (int,), default=family.head_dim, minimum=1)
        if head_dim is None:
            head_dim = hidden // heads
            if hidden % heads:
                self.problems.append(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
        if head_dim % 2:
            self.problems.append(f"head_dim is {head_dim}; rotary embedding needs an even one")
        return head_dim

    def rotary_dim(self, family: Family, head_dim: int) -> int:
        """Return how many channels of a head are rotated: `partial_rotary_factor` of them, in either place of that key."""
        factor = self.left.pop("partial_rotary_factor", None)
        for given in (self.left.get("rope_scaling"), self.left.get("rope_parameters")):
            if isinstance(given, dict) and given.get("partial_rotary_factor") is not None:
                factor = given["partial_rotary_factor"]
        if factor is None:
            factor = 0.25 if family.is_hybrid else 1.0
        if not family.is_hybrid and factor != 1.0:
            self.problems.append(f"partial_rotary_factor is {shown(factor)}; this family rotates whole heads")
        elif isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor <= 1:
            self.problems.append(f"partial_rotary_factor is {shown(factor)}; it must be a number above 0 and at most 1")
        elif int(head_dim * factor) % 2 or int(head_dim * factor) == 0:
            self.problems.append(f"partial_rotary_factor {factor} of head_dim {head_dim} is not a positive even number")
        else:
            return int(head_dim * factor)
        return head_dim

    def delta_net(self, family: Family) -> DeltaNetConfig:
        key_heads = self.take("linear_num_key_heads", (int,), default=16, minimum=1)
        value_heads = self.take("linear_num_value_heads", (int,), default=32, minimum=1)
        if value_heads % key_heads:
            self.problems.append(
                f"linear_num_value_heads {value_heads} is not a multiple of linear_num_key_heads {key_heads}"
            )
        return DeltaNetConfig(
            num_key_heads=key_heads,
            values_per_key=max(value_heads // key_heads, 1),
            key_dim=self.take("linear_key_head_dim", (int,), default=128, minimum=1),
            value_dim=self.take("linear_value_head_dim", (int,), default=128, minimum=1),
            conv_taps=self.take("linear_conv_kernel_dim", (int,), default=4, minimum=2),
            has_fused_projections=family.has_fused_projections,
        )

    def qkv_bias(self, family: Family) -> bool:
        if family.qkv_bias == "qkv_bias":
            return bool(self.take("qkv_bias", (bool,), default=True))
        is_always = family.qkv_bias == "always"
        given = bool(self.take("attention_bias", (bool,), default=is_always))
        if is_always and not given:
            self.problems.append("attention_bias is False; a qwen2 model always has q, k and v biases")
        return given

    def moe(self, family: Family) -> MoEConfig:
        """Read the experts; transformers has two names for their number."""
        sizes = {"num_experts", "num_local_experts"} & self.left.keys()
        if len(sizes) == 2:
            self.problems.append("num_experts and num_local_experts are both given")
        num_experts = self.take(max(sizes, default="num_experts"), (int,), minimum=1, maximum=_MAX_EXPERTS)
        per_token = self.take("num_experts_per_tok", (int,), minimum=1)
        if per_token > num_experts:
            self.problems.append(f"num_experts_per_tok {per_token} is more than the {num_experts} experts")
        has_shared = family.has_shared_expert
        normalizes = family.normalize_scores == "always"
        normalize = self.take("norm_topk_prob", (bool,), default=normalizes or bool(family.normalize_scores))
        if normalizes and not normalize:
            self.problems.append("norm_topk_prob is False; this family always normalises")
        return MoEConfig(
            num_experts=num_experts,
            experts_per_token=per_token,
            expert_size=self.take("moe_intermediate_size", (int,), minimum=1),
            shared_expert_size=self.take("shared_expert_intermediate_size", (int,), minimum=1) if has_shared else None,
            normalize_scores=normalize,
            aux_loss_coef=float(self.take("router_aux_loss_coef", (int, float), default=0.001, minimum=0.0)),
        )

    def layers(self, family: Family, moe: MoEConfig | None) -> tuple[LayerConfig, ...]:
        count = self.take("num_hidden_layers", (int,), minimum=1, maximum=_MAX_LAYERS)
        if family.is_hybrid:
            mixers, experts = self.mixers(count), self.has_experts(count, moe)
            return tuple(
                LayerConfig(mixer, "moe" if has_experts else "mlp")
                for mixer, has_experts in zip(mixers, experts, strict=True)
            )
        windows, experts = self.windows(family, count), self.has_experts(count, moe)
        return tuple(
            LayerConfig(ffn="moe" if has_experts else "mlp", sliding_window=window)
            for window, has_experts in zip(windows, experts, strict=True)
        )

    def has_experts(self, count: int, moe: MoEConfig | None) -> list[bool]:
        """Every `decoder_sparse_step`-th layer is a mixture of experts, unless `mlp_only_layers` lists it."""
        if moe is None:
            return [False] * count
        step = self.take("decoder_sparse_step", (int,), default=1, minimum=1)
        dense = self.take("mlp_only_layers", (list,), default=[])
        if wrong := [index for index in dense if not isinstance(index, int) or not 0 <= index < count]:
            self.problems.append(f"mlp_only_layers has {shown(*wrong)}; layers are 0 to {count - 1}")
            dense = []
        return [(index + 1) % step == 0 and index not in dense for index in range(count)]

    def mixers(self, count: int) -> list[str]:
        """Return each layer's mixer: from `layer_types`, else attention in every `full_attention_interval`-th layer."""
        interval = self.take("full_attention_interval", (int,), default=4, minimum=1)
        kinds = self.take("layer_types", (list,), default=None)
        if kinds is None:
            return ["delta_net" if (index + 1) % interval else "attention" for index in range(count)]
        self.check_layer_types(kinds, count, ("linear_attention", "full_attention"))
        mixers = ["delta_net" if kind == "linear_attention" else "attention" for kind in kinds]
        return (mixers + ["attention"] * count)[:count]

    def windows(self, family: Family, count: int) -> list[int | None]:
        """Return each layer's window: from `layer_types` if it is given, else by the rule of the family."""
        if family.window_rule == "none":
            return [None] * count  # and a key about windows is one that is not understood
        used = self.take("use_sliding_window", (bool,), default=False)
        window = self.take("sliding_window", (int,), default=None, minimum=1 if used else 0)
        if not used:
            window = None
        if family.window_rule == "all":
            self.left.pop("max_window_layers", None)  # released files have it; its class does not
            return [window] * count
        limit = self.take("max_window_layers", (int,), default=28, minimum=0)
        kinds = self.take("layer_types", (list,), default=None)
        if kinds is None:
            rule = (lambda i: i % 2 == 0 and i < limit) if family.window_rule == "even" else (lambda i: i >= limit)
            windowed = [window is not None and rule(index) for index in range(count)]
        else:
            windowed = self.windowed(kinds, count)
            if any(windowed) and window is None:
                self.problems.append("layer_types has sliding_attention, but no sliding window is set and in use")
        return [window if is_windowed else None for is_windowed in windowed]

    def windowed(self, kinds: list[Any], count: int) -> list[bool]:
        """Return which layers have a window according to `layer_types`."""
        self.check_layer_types(kinds, count, ("full_attention", "sliding_attention"))
        return [kind == "sliding_attention" for kind in kinds][:count] + [False] * (count - len(kinds))

    def check_layer_types(self, kinds: list[Any], count: int, allowed: tuple[str, ...]) -> None:
        if unknown := [kind for kind in kinds if kind not in allowed]:
            self.problems.append(f"layer_types has {shown(*unknown)}; allowed are {', '.join(allowed)}")
        if len(kinds) != count:
            self.problems.append(f"layer_types has {len(kinds)} entries for num_hidden_layers {count}")

    def rope(self, family: Family, max_positions: int) -> RopeConfig:
        legacy = self.take("rope_scaling", (dict,), default={})
        given: dict[str, Any] = legacy | self.take("rope_parameters", (dict,), default={})
        if any(given[key] != value for key, value in legacy.items()):
            self.problems.append("rope_scaling and rope_parameters differ")
        theta = given.get("rope_theta", self.left.get("rope_theta"))
        if "rope_theta" in self.left and self.left.pop("rope_theta") != theta:
            self.problems.append("rope_theta and rope_parameters.rope_theta differ")
        if family.is_hybrid:
            given = {key: value for key, value in given.items() if key not in _ROPE_OF_IMAGES}
        kind: Any = given.get("rope_type", given.get("type", "default"))
        if kind not in list(_ROPE_KEYS):  # a list, as a value without a hash may be given
            self.problems.append(f"rope type {shown(kind)} is not supported; supported are {', '.join(_ROPE_KEYS)}")
            return RopeConfig("default", 1.0, max_positions)
        known = _ROPE_KEYS[kind] | _ROPE_ALWAYS
        if unknown := sorted(set(given) - known - keys_within("rope_scaling", self.ignored)):
            names = printable(", ".join(unknown), 80)
            self.problems.append(f"rope type {kind!r} does not know {names} {how_to_ignore(unknown, 'rope_scaling')}")
        given = {key: value for key, value in given.items() if key in known}
        numbers: dict[str, Any] = {
            key: value
            for key, value in given.items()
            if key not in ("rope_type", "type", "truncate", "partial_rotary_factor")
        }
        numbers["rope_theta"] = 10_000.0 if theta is None else theta
        for key, value in numbers.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value <= _MAX_FLOAT):
                self.problems.append(f"rope {printable(key, 80)} is {shown(value)}; it must be a positive number")
                numbers[key] = 1.0
        if missing := [key for key in _ROPE_REQUIRED[kind] if numbers.get(key) is None]:
            self.problems.append(f"rope type {kind!r} needs {', '.join(missing)}")
            numbers |= dict.fromkeys(missing, 1.0)
        truncate = given.get("truncate", True)
        if not isinstance(truncate, bool):
            self.problems.append(f"rope truncate is {shown(truncate)}; it must be bool")
        return _rope_config(kind, numbers, truncate, max_positions)

    def quantization(self) -> None:
        """Refuse what the loader would not see; it checks the method and how the weights are packed."""
        name = "quantization_config"
        given: Any = self.left.get(name)
        if self.left.pop("quantization", None) is not None:
            self.problems.append("quantization (of MLX) is not supported; use the original checkpoint with --quantize int4")
        method = given.get("quant_method") if isinstance(given, dict) else None
        known = _QUANTIZATION_KEYS.get(method) if isinstance(method, str) else None
        if known is not None:
            allowed = {"quant_method", *known.split()} | keys_within(name, self.ignored)
            if unknown := sorted(set(given) - allowed):
                self.problems.append(f"{name} has unknown keys {how_to_ignore(unknown, name)}")

    def leftovers(self, harmless: frozenset[str], neutral: Mapping[str, Any]) -> None:
        neutral = _NEUTRAL | dict(neutral)
        for key, value in self.left.items():
            if key in _HARMLESS or key in harmless or key in self.ignored:
                continue
            if key in neutral:
                if value not in (neutral[key], None):
                    self.problems.append(f"{key} is {shown(value)}, which is not supported; supported is {neutral[key]!r}")
            elif value not in (None, False):
                self.problems.append(
                    f"{printable(key, 80)} = {shown(value)} is not understood and may change the computation "
                    f"{how_to_ignore([key])}"
                )


def _rope_config(kind: RopeType, numbers: Mapping[str, Any], truncate: bool, max_positions: int) -> RopeConfig:
    original = numbers.get("original_max_position_embeddings")
    theta = float(numbers["rope_theta"])
    factor = numbers.get("factor")
    if kind == "yarn":
        original = original or max_positions
        factor = factor or max_positions / original
        return RopeConfig(
            type=kind,
            theta=theta,
            original_max_positions=original,
            factor=factor,
            attention_factor=_yarn_attention_factor(numbers, factor),
            beta_fast=numbers.get("beta_fast") or 32,
            beta_slow=numbers.get("beta_slow") or 1,
            truncate=truncate,
        )
    if kind == "llama3":
        return RopeConfig(
            type=kind,
            theta=theta,
            original_max_positions=original or max_positions,
            factor=numbers["factor"],
            low_freq_factor=numbers["low_freq_factor"],
            high_freq_factor=numbers["high_freq_factor"],
        )
    return RopeConfig(kind, theta, max_positions, factor=factor or 1.0)


def _yarn_attention_factor(numbers: Mapping[str, Any], factor: float) -> float:
    """Return the temperature of YaRN (arXiv:2309.00071, eq. 15), in DeepSeek's two-sided form if both scales are given."""

    def scale(mscale: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if numbers.get("attention_factor") is not None:
        return float(numbers["attention_factor"])
    if numbers.get("mscale") and numbers.get("mscale_all_dim"):
        return scale(numbers["mscale"]) / scale(numbers["mscale_all_dim"])
    return scale()

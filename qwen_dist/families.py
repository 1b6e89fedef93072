"""The families of Qwen text models: what `model_type` decides, as a table. No jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Family:
    """What a family's classes in transformers fix or assume.

    Attributes:
      qkv_bias: biases of the query, key and value projections: always, by `attention_bias` (default False), or by
        `qkv_bias` (default True).
      has_o_bias: `attention_bias` also gives `o_proj` a bias.
      head_dim: the default, whatever `hidden_size` is; None: `hidden_size` / `num_attention_heads`.
      qk_norm: queries and keys are normalised.
      has_experts, has_shared_expert: of its mixtures of experts.
      normalize_scores: the default of `norm_topk_prob`, or "always" without such a key.
      window_rule: which layers have a sliding window if no `layer_types` says so: "from" the layer `max_window_layers` on,
        "even" layers before it, "all", or "none": the family has no windows.
      is_hybrid: most layers are gated delta nets; norms multiply by 1 + weight, attention has an output gate, and a part
        of each head is rotated.
      has_fused_projections: of a hybrid: `in_proj_qkvz` and `in_proj_ba`.
      harmless: keys that do not change what is computed, besides those of all families.
      neutral: keys with the only value that is supported.
    """

    qkv_bias: Literal["always", "attention_bias", "qkv_bias"] = "attention_bias"
    has_o_bias: bool = True
    head_dim: int | None = None
    qk_norm: bool = True
    has_experts: bool = False
    has_shared_expert: bool = False
    normalize_scores: bool | Literal["always"] = False
    window_rule: Literal["from", "even", "all", "none"] = "from"
    is_hybrid: bool = False
    has_fused_projections: bool = False
    harmless: frozenset[str] = frozenset()
    neutral: Mapping[str, Any] = dataclasses.field(default_factory=dict)


_HYBRID = Family(
    head_dim=256,
    window_rule="none",
    is_hybrid=True,
    harmless=frozenset({"mtp_num_hidden_layers", "mamba_ssm_dtype"}),
    neutral={
        "attn_output_gate": True,
        "output_gate_type": "swish",
        "mtp_use_dedicated_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "mlp_only_layers": [],
    },
)
FAMILIES: dict[str, Family] = {
    "qwen2": Family(qkv_bias="always", has_o_bias=False, qk_norm=False),
    "qwen3": Family(head_dim=128),
    "qwen2_moe": Family(
        qkv_bias="qkv_bias", has_o_bias=False, qk_norm=False, has_experts=True, has_shared_expert=True, window_rule="even"
    ),
    "qwen3_moe": Family(has_experts=True, window_rule="all"),
    "qwen3_next": dataclasses.replace(
        _HYBRID, has_experts=True, has_shared_expert=True, normalize_scores=True, has_fused_projections=True
    ),
    "qwen3_5": _HYBRID,
    "qwen3_5_moe": dataclasses.replace(_HYBRID, has_experts=True, has_shared_expert=True, normalize_scores="always"),
}
# `model_type` of a text model that was part of a multimodal one.
ALIASES = {"qwen3_5_text": "qwen3_5", "qwen3_5_moe_text": "qwen3_5_moe"}

"""What a model computes, as data; `hf_config` reads it from a checkpoint's `config.json`. No jax."""

from __future__ import annotations

import dataclasses
from typing import Literal

RopeType = Literal["default", "linear", "dynamic", "yarn", "llama3"]


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, as in `modeling_rope_utils.py` of transformers.

    `original_max_positions` is the length in tokens that the frequencies were trained for. The fields after it belong to
    the types named with them and are None for the others.
    """

    type: RopeType
    theta: float
    original_max_positions: int
    factor: float = 1.0  # linear, dynamic, yarn, llama3
    attention_factor: float = 1.0  # yarn: multiplies cos and sin
    beta_fast: float | None = None  # yarn
    beta_slow: float | None = None  # yarn
    truncate: bool | None = None  # yarn
    low_freq_factor: float | None = None  # llama3
    high_freq_factor: float | None = None  # llama3


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts: each token goes to the `experts_per_token` of `num_experts` that the router scores highest.

    Attributes:
      expert_size: channels of each expert.
      shared_expert_size: channels of the shared expert, which every token also goes to; None: there is none.
      normalize_scores: whether the scores of a token's experts are scaled to sum to 1.
      aux_loss_coef: the factor of the load-balancing loss in fine-tuning.
    """

    num_experts: int
    experts_per_token: int
    expert_size: int
    shared_expert_size: int | None
    normalize_scores: bool
    aux_loss_coef: float


@dataclasses.dataclass(frozen=True)
class DeltaNetConfig:
    """The linear attention of a hybrid model: each key head serves `values_per_key` consecutive value heads.

    Attributes:
      num_key_heads, values_per_key: the heads.
      key_dim, value_dim: channels of a head.
      conv_taps: tokens that the short convolution sees, the newest included.
      has_fused_projections: see `Family`.
    """

    num_key_heads: int
    values_per_key: int
    key_dim: int
    value_dim: int
    conv_taps: int
    has_fused_projections: bool

    @property
    def group_values(self) -> int:
        """The value channels of a key head."""
        return self.values_per_key * self.value_dim

    @property
    def conv_channels(self) -> int:
        """The channels of a key head that the convolution mixes: its query, key and values."""
        return 2 * self.key_dim + self.group_values


@dataclasses.dataclass(frozen=True)
class LayerConfig:
    """One block: its mixer (a key of `transformer.MIXERS`), its MLP, and its attention window in tokens (None: all)."""

    mixer: str = "attention"
    ffn: Literal["mlp", "moe"] = "mlp"
    sliding_window: int | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Qwen text model, complete: nothing that changes the computation is decided anywhere else."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    initializer_range: float
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    rope: RopeConfig
    moe: MoEConfig | None
    layers: tuple[LayerConfig, ...]
    rotary_dim: int
    norm_offset: bool = False
    attention_gate: bool = False
    delta_net: DeltaNetConfig | None = None

    @property
    def channels(self) -> tuple[int, ...]:
        """The sizes of its MLPs, each once."""
        sizes = [self.intermediate_size] if any(layer.ffn == "mlp" for layer in self.layers) else []
        if self.moe is not None:
            sizes += [self.moe.expert_size, self.moe.shared_expert_size or self.moe.expert_size]
        return tuple(dict.fromkeys(sizes))

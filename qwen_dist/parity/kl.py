"""How far a model's next-token distributions are from another's, over a text: the measure of what quantisation costs.

Letters: B rows, T tokens of a window, D embed, V vocab, C tokens compared at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.checkpoint.model import LoadedModel, load_model
from qwen_dist.config import KvCacheDtype, Quantize
from qwen_dist.errors import UserError
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.models.parameters import with_parameters
from qwen_dist.models.state import constrain_states, empty_states
from qwen_dist.models.state_spec import CacheDtype, cache_groups
from qwen_dist.models.transformer import state_specs
from qwen_dist.ops.paged_cache import pages_for
from qwen_dist.ops.step_rows import indices_in_order
from qwen_dist.quantization.options import CACHE_DTYPES, QuantizeOptions
from qwen_dist.sharding import INFERENCE, ShardingContext, use_sharding
from qwen_dist.storage.model_files import ModelFiles
from qwen_dist.text_sample import WINDOW, read_tokens, windows
from qwen_dist.tokenizer import Tokenizer

# Tokens that are compared at a time.
CHUNK = 128


@dataclasses.dataclass(frozen=True)
class KlOptions:
    """What to compare: see `config.ParityConfig`. An empty `reference` is the model itself, dequantised."""

    model: str
    reference: str
    text: str
    dtype: str
    quantize: Quantize
    group_size: int | None = None
    has_head: bool = False
    kv_cache: KvCacheDtype = "auto"
    max_tokens: int = 4096
    mesh: str = ""
    ignored_keys: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class KlReport:
    """The Kullback-Leibler divergences KL(reference ‖ model) of next-token distributions, in nats.

    Attributes:
      num_tokens: positions of the text that were compared.
      mean, median, tail: of the divergences; `tail` is the 99.9th percentile.
      top_1: how often both have the same most probable token.
    """

    num_tokens: int
    mean: float
    median: float
    tail: float
    top_1: float

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        return (
            f"KL over {self.num_tokens} tokens: mean {self.mean:.6f}, median {self.median:.6f}, 99.9 % {self.tail:.6f}; "
            f"the same most probable token at {self.top_1:.2%}"
        )


def compare_distributions(options: KlOptions, progress: Callable[[str], None] = lambda stage: None) -> KlReport:
    """Compare a model with another, or its quantised weights with those of the checkpoint.

    Raises:
      UserError: a model or the text cannot be used.
    """
    quantize = QuantizeOptions.of(options.quantize, options.group_size, has_head=options.has_head)
    context = ShardingContext(make_mesh(MeshConfig.parse(options.mesh)), INFERENCE)
    files = ModelFiles.open(options.model)
    tokenizer = Tokenizer.open(files, options.ignored_keys)
    tokens = read_tokens("--kl", options.text, tokenizer.encode, options.max_tokens)
    sides: list[_Side] = []
    forms: tuple[QuantizeOptions | Literal["stored", "none"], ...] = "none", quantize
    for path, form in zip((options.reference or options.model, options.model), forms, strict=True):
        progress(f"loading {path}")
        loaded = load_model(path, context, dtype=options.dtype, quantize=form, ignored_config_keys=options.ignored_keys)
        sides.append(_Side(loaded, CACHE_DTYPES[options.kv_cache] if sides else None))
    if (sizes := [side.model.config.vocab_size for side in sides])[0] != sizes[1]:
        raise UserError(f"the vocabularies have {sizes[1]} and {sizes[0]} tokens: only distributions of the same compare")
    progress(f"comparing {len(tokens)} tokens")
    divergences, agreements = [], []
    num_rows = context.batch_multiple()
    for rows_BT, positions_BT in windows(tokens, num_rows):
        hidden = [side.hidden(rows_BT, positions_BT) for side in sides]
        for column in range(0, WINDOW, CHUNK):
            is_real = positions_BT[:, column : column + CHUNK] >= 0
            if is_real.any():
                chunks = [x[:, column : column + CHUNK] for x in hidden]
                divergence, same = _divergence(*(side.logits(x) for side, x in zip(sides, chunks, strict=True)))
                divergences.append(np.asarray(divergence)[is_real])
                agreements.append(np.asarray(same)[is_real])
    kl = np.concatenate(divergences).astype(np.float64)
    top_1 = float(np.concatenate(agreements).mean())
    return KlReport(len(kl), float(kl.mean()), float(np.median(kl)), float(np.quantile(kl, 0.999)), top_1)


class _Side:
    """One of the two models; with `cache_dtype` attention reads keys and values from a cache of that type."""

    def __init__(self, model: LoadedModel, cache_dtype: CacheDtype | None):
        self.model, self._cache_dtype = model, cache_dtype
        self._hidden, self._logits = jax.jit(self._run_blocks), jax.jit(self._unembed)

    def hidden(self, tokens_BT: np.ndarray, positions_BT: np.ndarray) -> jax.Array:
        return self._hidden(self.model.parameters, tokens_BT, positions_BT)

    def logits(self, hidden_BCD: jax.Array) -> jax.Array:
        return self._logits(self.model.parameters, hidden_BCD)

    def _run_blocks(self, parameters: Mapping[str, jax.Array], tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        with use_sharding(self.model.sharding_ctx):
            model = with_parameters(self.model.module, parameters)
            if self._cache_dtype is None:
                return model(tokens_BT, positions_BT)[0]
            specs = state_specs(self.model.config, self.model.dtype, self._cache_dtype)
            num_shards, pages = self.model.sharding_ctx.batch_multiple(), pages_for(WINDOW)
            rows = len(tokens_BT) // num_shards
            states = empty_states(specs, num_shards, [rows * pages] * len(cache_groups(specs)), rows)
            indices = indices_in_order(len(cache_groups(specs)), positions_BT, num_shards, pages)
            return model(tokens_BT, positions_BT, constrain_states(specs, states), indices)[0]

    def _unembed(self, parameters: Mapping[str, jax.Array], hidden_BCD: jax.Array) -> jax.Array:
        with use_sharding(self.model.sharding_ctx):
            return with_parameters(self.model.module, parameters).unembed(hidden_BCD)


@jax.jit
def _divergence(reference_BCV: jax.Array, model_BCV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return KL(reference ‖ model) [B, C], and whether both have the same largest logit."""
    log_p_BCV, log_q_BCV = jax.nn.log_softmax(reference_BCV), jax.nn.log_softmax(model_BCV)
    kl_BC = jnp.sum(jnp.exp(log_p_BCV) * (log_p_BCV - log_q_BCV), axis=-1)
    return kl_BC, reference_BCV.argmax(-1) == model_BCV.argmax(-1)

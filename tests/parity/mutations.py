"""Break the model in one place at a time and check which component the comparison with PyTorch names.

    python tests/parity/mutations.py          prints the table: mutation, the component named, by how much it is off

A mutation replaces a part of a function's source, like a developer's mistake. The function object stays the same, so every
module that imported it runs the broken code.
"""

from __future__ import annotations
import __future__

import contextlib
import dataclasses
import functools
import importlib
import inspect
import pathlib
import sys
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import jax

from qwen_dist.hf_config import read_model_config
from qwen_dist.parity.checks import Check
from qwen_dist.parity.comparison import Comparison, ReferenceOutputs
from qwen_dist.parity.inputs import ParityOptions
from qwen_dist.parity.reference import Reference


@dataclasses.dataclass(frozen=True)
class Mutation:
    """`edits` to the source of `function` ("module:qualified.name"), and the component that the comparison must name."""

    what: str
    function: str
    edits: tuple[tuple[str, str], ...]
    named: str
    scenario: str = "qwen2"

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Replace the function's code for the block."""
        module, _, path = self.function.partition(":")
        function = functools.reduce(getattr, path.split("."), importlib.import_module(module))
        original = function.__code__
        function.__code__ = self._mutated(function).__code__
        jax.clear_caches()  # functions that were traced before, and would not be traced again
        try:
            yield
        finally:
            function.__code__ = original
            jax.clear_caches()

    def _mutated(self, function: Any) -> Any:
        assert function.__closure__ is None, f"{self.function} has a closure, which its code cannot be replaced under"
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in self.edits:
            assert source.count(old) == 1, f"{self.what}: {old!r} is {source.count(old)} times in {self.function}"
            source = source.replace(old, new)
        code = compile(source, self.function, "exec", flags=__future__.annotations.compiler_flag)
        namespace: dict[str, Any] = {}
        exec(code, function.__globals__, namespace)
        return namespace[function.__name__]


def _mutation(what: str, function: str, *edits: str, named: str, scenario: str = "qwen2") -> Mutation:
    pairs = tuple(zip(edits[::2], edits[1::2], strict=True))
    return Mutation(what, f"qwen_dist.{function}", pairs, named, scenario)


ROPE, LAYERS, ATTENTION = "models.rope:", "models.layers:", "models.attention:"
MODEL, MOE, ROWS = "models.transformer:", "models.moe:", "ops.step_rows:"
# The plain forms, which run in float64; in float32 and bfloat16 a kernel may run instead.
ROTATE, ATTENTION_OP, CACHE, EXPERTS = "ops.rotary:rotate_plain", "ops.attention:", "ops.paged_cache:", "ops.experts:"
ATTEND, PAGED_ATTEND = ATTENTION_OP + "_attend_block", "ops.paged_attention:_attend_shard"
NATIVE = "ops.native:"
NET, RULE = "models.delta_net:", "ops.delta_rule:"
CONVOLUTION = "ops.short_convolution:short_convolution_plain"
FIRST, LINEAR = "layers.0.self_attn.", "layers.0.linear_attn."
MUTATIONS = [
    _mutation(
        "rope base",
        ROPE + "inverse_frequencies",
        "rope.theta)",
        "rope.theta + 1)",
        named=FIRST + "q_rope",
        scenario="qwen3",
    ),
    _mutation(
        "rope pairs neighbours (2i, 2i+1)",
        ROTATE,
        "jnp.split(x_BTNH.astype(cos.dtype), 2, axis=-1)",
        "(x_BTNH[..., ::2], x_BTNH[..., 1::2])",
        named=FIRST + "q_rope",
    ),
    _mutation(
        "rope turns the other way",
        ROTATE,
        "first * cos - second * sin",
        "first * cos + second * sin",
        named=FIRST + "q_rope",
    ),
    _mutation(
        "rope in float32 whatever the model",
        ROPE + "rope_table",
        "accum_dtype(dtype)",
        "jnp.dtype('float32')",
        named=FIRST + "q_rope",
    ),
    _mutation(
        "rope stops at position 493",
        ROPE + "rope_table",
        "positions_BT[..., None].astype",
        "jnp.minimum(positions_BT, 493)[..., None].astype",
        named=FIRST + "q_rope",
        scenario="long",
    ),
    _mutation(
        "yarn without its attention scale",
        ROPE + "rope_table",
        "jnp.cos(angles) * rope.attention_factor",
        "jnp.cos(angles)",
        named=FIRST + "q_rope",
    ),
    _mutation("yarn ramp reversed", ROPE + "_yarn", "dtype(1) - ramp", "ramp", named=FIRST + "q_rope"),
    _mutation(
        "missing bias",
        LAYERS + "Linear._project",
        "y + all_gather_weight(self.bias[...], *dict(self.out_sizes)).astype(y.dtype)",
        "y",
        named=FIRST + "q_proj",
    ),
    _mutation(
        "q/k norm after rope",
        ATTENTION + "Attention.__call__",
        "self.q_norm(q_BTNH)",
        "self.q_norm(rotate(q_BTNH, *rope))",
        'tap("q_rope", rotate(q_BTNH, *rope))',
        'tap("q_rope", q_BTNH)',
        named=FIRST + "q_norm",
        scenario="qwen3",
    ),
    _mutation(
        "k norm with q norm's weight",
        ATTENTION + "Attention.__call__",
        "self.k_norm(k_BTKH)",
        "self.q_norm(k_BTKH)",
        named=FIRST + "k_norm",
        scenario="qwen3",
    ),
    _mutation(
        "norm in float32 whatever the model",
        LAYERS + "RMSNorm.__call__",
        "accum_dtype(x.dtype)",
        "jnp.float32",
        named="layers.0.input_layernorm",
    ),
    _mutation(
        "norm without upcast",
        LAYERS + "RMSNorm.__call__",
        "x.astype(accum_dtype(x.dtype))",
        "x",
        named="layers.0.input_layernorm",
        scenario="bfloat16",
    ),
    _mutation(
        "norm weight before the cast back",
        LAYERS + "RMSNorm.__call__",
        "return weight.astype(x.dtype) * rounded(normed, x.dtype).astype(x.dtype)",
        "return (weight * normed).astype(x.dtype)",
        named="layers.0.input_layernorm",
        scenario="bfloat16",
    ),
    _mutation("norm eps", LAYERS + "RMSNorm.__call__", "+ self.eps", "+ 10 * self.eps", named="layers.0.input_layernorm"),
    _mutation(
        "norm weight is 1 + w",
        LAYERS + "RMSNorm.__call__",
        "all_gather_weight(self.weight[...], self.axis).astype",
        "(1 + self.weight[...]).astype",
        named="layers.0.input_layernorm",
    ),
    _mutation(
        "transposed o_proj",
        "models.parameters:_assemble",
        "parameters[name + suffix]",
        "(lambda w: w.reshape(w.shape[0], -1).T.reshape(w.shape) if 'o_proj' in name else w)(parameters[name + suffix])",
        named=FIRST + "o_proj",
    ),
    _mutation(
        "query heads of a key head interleaved",
        ATTEND,
        "q_BTNH.reshape(B, T, K, N // K, H)",
        "q_BTNH.reshape(B, T, N // K, K, H).swapaxes(2, 3)",
        named=FIRST + "weights",
    ),
    _mutation("softmax scale", ATTEND, "H**-0.5", "K**-0.5", named=FIRST + "weights"),
    _mutation(
        "softmax in float32 whatever the model",
        ATTEND,
        "_softmax_matmul(scores_BKTGS.",
        "_softmax_matmul(scores_BKTGS.astype(jnp.float32).",
        named=FIRST + "weights",
    ),
    _mutation(
        "mask lets one future key through",
        ATTENTION_OP + "is_visible",
        "distance >= 0 if",
        "distance >= -1 if",
        "(distance >= 0)",
        "(distance >= -1)",
        named=FIRST + "weights",
    ),
    _mutation(
        "mask hides the query's own key",
        ATTENTION_OP + "is_visible",
        "distance >= 0 if",
        "distance > 0 if",
        "(distance >= 0)",
        "(distance > 0)",
        named=FIRST + "weights",
    ),
    _mutation(
        "padding is visible",
        ATTENTION_OP + "visible",
        "is_visible(distance_BTS, sliding_window) & (kv_positions_BS >= 0)[:, None, :]",
        "is_visible(distance_BTS, sliding_window)",
        named=FIRST + "weights",
    ),
    _mutation(
        "sliding window off by one",
        ATTENTION_OP + "is_visible",
        "distance < sliding_window",
        "distance <= sliding_window",
        named="layers.1.self_attn.weights",
    ),
    _mutation(
        "second query block has the first's positions",
        ATTENTION_OP + "attention_in_blocks",
        "merge_length(positions_BCT[:, :, block])",
        "merge_length(positions_BCT[:, :, : block.stop - start])",
        named=FIRST + "weights",
        scenario="long",
    ),
    _mutation(
        "attention without its residual",
        MODEL + "Block.__call__",
        "x_BTD + mixed_BTD",
        "mixed_BTD",
        named="layers.0.residual",
    ),
    _mutation(
        "gate and up swapped",
        "models.mlp:MLP.__call__",
        "swiglu(gate_BTF, up_BTF)",
        "swiglu(up_BTF, gate_BTF)",
        named="layers.0.mlp.down_proj",
    ),
    _mutation(
        "up computed with gate's weight",
        "models.mlp:MLP.__call__",
        "self.up_proj(x_BTD)",
        "self.gate_proj(x_BTD)",
        named="layers.0.mlp.up_proj",
    ),
    _mutation("gelu for silu", "ops.swiglu:silu", "jax.nn.silu", "jax.nn.gelu", named="layers.0.mlp.down_proj"),
    _mutation("no final norm", MODEL + "Transformer.__call__", "self.norm(x_BTD)", "x_BTD", named="norm"),
    _mutation(
        "tied head untied",
        MODEL + "Transformer.unembed",
        "self.head()",
        "self.head()[:, ::-1]",
        named="logits",
    ),
    _mutation(
        "token ids off by one", LAYERS + "Embedding.__call__", "(), tokens_BT)", "(), tokens_BT + 1)", named="embed_tokens"
    ),
    _mutation(
        "a loaded weight is rounded",
        "checkpoint.model:load_model",
        "return LoadedModel(config, module, parameters, sharding_ctx, files, checkpoint, tuple(abstract.kept))",
        "bits = {n: p.astype('bfloat16').astype(dtype) for n, p in parameters.items()}\n"
        "    return LoadedModel(config, module, bits, sharding_ctx, files, checkpoint, tuple(abstract.kept))",
        named="embed_tokens.weight",
    ),
    _mutation(
        "decoding: position off by one",
        MODEL + "Transformer.__call__",
        "self.config.rotary_dim, positions_BT,",
        "self.config.rotary_dim, positions_BT + (positions_BT.shape[1] == 1),",
        named="decode.step_1",
    ),
    _mutation(
        "decoding: written one position too far",
        CACHE + "write",
        "(positions_BT % PAGE)",
        "((positions_BT + (k_BTKH.shape[1] == 1)) % PAGE)",
        named="decode.step_1",
    ),
    _mutation(
        "chunked prefill: each chunk from position 0",
        CACHE + "write",
        "(positions_BT % PAGE)",
        "((positions_BT - positions_BT[:, :1] * (positions_BT.shape[1] > 1)) % PAGE)",
        named="decode.prefill",
    ),
    _mutation(
        "chunked prefill: page from the next column",
        ROWS + "page_of_tokens",
        "positions_BT // PAGE",
        "positions_BT // PAGE + 1",
        named="decode.prefill",
        scenario="long",
    ),
    _mutation(
        "decoding: page from the column before",
        ROWS + "page_of_tokens",
        "positions_BT // PAGE",
        "positions_BT // PAGE - (positions_BT.shape[1] == 1)",
        named="decode.step_1",
        scenario="long",
    ),
    _mutation(
        "padding is written to the first page",
        ROWS + "page_of_tokens",
        "positions_BT < 0, -1,",
        "positions_BT < 0, pages.write_BN[:, :1],",
        named="decode.prefill",
        scenario="long",
    ),
    _mutation(
        "logit indices off by one",
        LAYERS + "take_positions",
        "jnp.maximum(index, 0)",
        "jnp.maximum(index - 1, 0)",
        named="decode.prefill",
    ),
    _mutation(
        "pages start one position too late",
        PAGED_ATTEND,
        "jnp.arange(S))",
        "jnp.arange(S) + 1)",
        named="decode.prefill",
    ),
    _mutation(
        "no sliding window over pages",
        PAGED_ATTEND,
        "is_visible(distance_ETS, sliding_window)",
        "is_visible(distance_ETS, None)",
        named="decode.prefill",
    ),
    _mutation(
        "an entry is added to another row",
        PAGED_ATTEND,
        "row[:, None] == jnp.arange(B)",
        "row[:, None] == jnp.arange(B)[::-1]",
        named="decode.prefill",
    ),
    _mutation(
        "kernel: cos and sin swapped",
        NATIVE + "rotate",
        "(x_BTNH, cos_BTA, sin_BTA)",
        "(x_BTNH, sin_BTA, cos_BTA)",
        named=FIRST + "q_rope",
        scenario="kernels",
    ),
    _mutation(
        "kernel: gate and up swapped",
        NATIVE + "swiglu",
        "(gate, up)",
        "(up, gate)",
        named="layers.0.mlp.down_proj",
        scenario="kernels",
    ),
    _mutation(
        "kernel: no sliding window over pages",
        NATIVE + "paged_attention",
        "sliding_window or 0",
        "0",
        named="decode.prefill",
        scenario="kernels",
    ),
    _mutation(
        "router in float32 whatever the model",
        MOE + "route",
        "accum_dtype(logits_BTE.dtype)",
        "'float32'",
        named="layers.0.mlp.scores",
        scenario="moe",
    ),
    _mutation(
        "scores made to sum to 1 where they are not",
        MOE + "route",
        "if normalize",
        "if not normalize",
        named="layers.0.mlp.scores",
        scenario="moe",
    ),
    _mutation(
        "every token to the next expert",
        MOE + "MoE.__call__",
        "chosen_BTK, self.config.num_experts)",
        "(chosen_BTK + 1) % self.config.num_experts, self.config.num_experts)",
        named="layers.0.mlp.expert_outputs",
        scenario="moe",
    ),
    _mutation(
        "an expert's gate and up swapped",
        EXPERTS + "local_experts",
        "swiglu(gate_RF, up_RF)",
        "swiglu(up_RF, gate_RF)",
        named="layers.0.mlp.expert_outputs",
        scenario="moe",
    ),
    _mutation(
        "experts not weighted by their scores",
        EXPERTS + "experts_plain",
        "scores_BTK[..., None] * each_BTKD",
        "each_BTKD",
        named="layers.0.mlp.experts",
        scenario="moe",
    ),
    _mutation(
        "shared expert without its gate",
        MOE + "MoE.__call__",
        "share_BT1 * shared_BTD",
        "shared_BTD",
        named="layers.0.output",
        scenario="moe",
    ),
    _mutation(
        "load-balancing loss counts padding",
        MOE + "load_balancing_loss",
        "is_real_BT.sum()",
        "is_real_BT.size",
        named="loss",
        scenario="moe",
    ),
    _mutation(
        "no gradient through the gate",
        "models.mlp:MLP.__call__",
        "swiglu(gate_BTF, up_BTF)",
        "swiglu(jax.lax.stop_gradient(gate_BTF), up_BTF)",
        named="layers.1.mlp.gate_proj.weight",
    ),
    _mutation(
        "value heads tiled over key heads",
        NET + "GatedDeltaNet._rule_inputs",
        "v_BTGV.reshape(*v_BTGV.shape[:-1], net.values_per_key, net.value_dim)",
        "v_BTGV.reshape(*v_BTGV.shape[:2], net.values_per_key, net.num_key_heads, net.value_dim).swapaxes(2, 3)",
        named=LINEAR + "core",
        scenario="hybrid",
    ),
    _mutation(
        "b and a in the other order",
        NET + "GatedDeltaNet._project",
        "b_BTGR, a_BTGR = jnp.split",
        "a_BTGR, b_BTGR = jnp.split",
        named=LINEAR + "g",
        scenario="hybrid",
    ),
    _mutation(
        "queries and keys in the other order",
        NET + "GatedDeltaNet._rule_inputs",
        "q_BTGK, k_BTGK, v_BTGV = jnp.split",
        "k_BTGK, q_BTGK, v_BTGV = jnp.split",
        named=LINEAR + "core",
        scenario="hybrid",
    ),
    _mutation(
        "queries not scaled",
        RULE + "prepare_chunk",
        " * inputs.q_BTGK.shape[-1] ** -0.5",
        "",
        named=LINEAR + "core",
        scenario="hybrid",
    ),
    _mutation(
        "keys not normalised",
        RULE + "prepare_chunk",
        "_normalised(inputs.k_BTGK.swapaxes(1, 2))",
        "inputs.k_BTGK.swapaxes(1, 2)",
        named=LINEAR + "core",
        scenario="hybrid",
    ),
    _mutation(
        "epsilon outside the root",
        RULE + "_normalised",
        "x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + _NORM_EPS)",
        "x / (jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)) + _NORM_EPS)",
        named=LINEAR + "core",
        scenario="hybrid",
    ),
    _mutation(
        "decay of the token itself left out",
        RULE + "prepare_chunk",
        "jnp.exp(jnp.cumsum(g_BGRC, axis=-1))",
        "jnp.exp(jnp.cumsum(g_BGRC, axis=-1) - g_BGRC)",
        named=LINEAR + "core",
        scenario="hybrid",
    ),
    _mutation(
        "decay of the earlier of two tokens counted, too",
        RULE + "_sums_between",
        "np.tri(C, k=-1, dtype=bool)",
        "np.tri(C, k=0, dtype=bool)",
        named=LINEAR + "core",
        scenario="hybrid",
    ),
    _mutation(
        "the inverse stops one level early",
        RULE + "_inverse_by_blocks",
        "while size < C:",
        "while 2 * size < C:",
        named=LINEAR + "core",
        scenario="hybrid",
    ),
    _mutation(
        "no step size before the inverse",
        RULE + "prepare_chunk",
        "unit_lower_inverse(system_BGRCC) * beta_BGRC[..., None, :]",
        "unit_lower_inverse(system_BGRCC)",
        named=LINEAR + "core",
        scenario="hybrid",
    ),
    _mutation(
        "the state of a chunk is not kept",
        RULE + "apply_chunk",
        "chunk.kept_BGR[..., None, None] * state_BGRKV + added_BGRKV",
        "added_BGRKV",
        named=LINEAR + "state_70",
        scenario="hybrid",
    ),
    _mutation(
        "relu in place of softplus",
        NET + "GatedDeltaNet._rule_inputs",
        "jax.nn.softplus(",
        "jax.nn.relu(",
        named=LINEAR + "g",
        scenario="hybrid",
    ),
    _mutation(
        "A_log without exp",
        NET + "GatedDeltaNet._rule_inputs",
        "jnp.exp(A_log_GR)",
        "A_log_GR",
        named=LINEAR + "g",
        scenario="hybrid",
    ),
    _mutation(
        "no dt_bias",
        NET + "GatedDeltaNet._rule_inputs",
        " + dt_bias_GR",
        "",
        named=LINEAR + "g",
        scenario="hybrid",
    ),
    _mutation(
        "step size without sigmoid",
        NET + "GatedDeltaNet._rule_inputs",
        "jax.nn.sigmoid(b_BTGR.astype(wide))",
        "b_BTGR.astype(wide)",
        named=LINEAR + "beta",
        scenario="hybrid",
    ),
    _mutation(
        "convolution in the other direction",
        CONVOLUTION,
        "weight_GCW[..., tap_index]",
        "weight_GCW[..., -1 - tap_index]",
        named=LINEAR + "conv",
        scenario="hybrid",
    ),
    _mutation(
        "convolution without silu",
        CONVOLUTION,
        "jax.nn.silu(rounded_BTGC)",
        "rounded_BTGC",
        named=LINEAR + "conv",
        scenario="hybrid",
    ),
    _mutation(
        "convolution reads padding",
        NET + "GatedDeltaNet.__call__",
        "jnp.where(is_real_BT[..., None, None], qkv_BTGC, 0)",
        "qkv_BTGC",
        named=LINEAR + "conv",
        scenario="hybrid",
    ),
    _mutation(
        "gated norm with sigmoid",
        NET + "GatedRMSNorm.__call__",
        "jax.nn.silu(z.astype(wide))",
        "jax.nn.sigmoid(z.astype(wide))",
        named=LINEAR + "norm",
        scenario="hybrid",
    ),
    _mutation(
        "gated norm with 1 + weight",
        NET + "GatedRMSNorm.__call__",
        'all_gather_weight(self.weight[...], "head_dim").astype(wide) * normed',
        '(1 + all_gather_weight(self.weight[...], "head_dim").astype(wide)) * normed',
        named=LINEAR + "norm",
        scenario="hybrid",
    ),
    _mutation(
        "norms without 1 +",
        LAYERS + "RMSNorm.__call__",
        "(normed * (1 + weight))",
        "(normed * weight)",
        named="layers.0.input_layernorm",
        scenario="hybrid",
    ),
    _mutation(
        "attention gate with silu",
        ATTENTION + "Attention.__call__",
        "jax.nn.sigmoid(gate_BTNH",
        "jax.nn.silu(gate_BTNH",
        named="layers.1.self_attn.gated",
        scenario="hybrid",
    ),
    _mutation(
        "gate before the query",
        ATTENTION + "Attention.__call__",
        "q_BTNH[..., 0, :], q_BTNH[..., 1, :]",
        "q_BTNH[..., 1, :], q_BTNH[..., 0, :]",
        named="layers.1.self_attn.q_norm",
        scenario="hybrid",
    ),
    _mutation(
        "whole heads rotated",
        MODEL + "Transformer.__call__",
        "self.config.rotary_dim",
        "self.config.head_dim",
        named="layers.1.self_attn.q_rope",
        scenario="hybrid",
    ),
    _mutation(
        "tokens before a chunk are not convolved",
        NET + "GatedDeltaNet._in_slots",
        "before_BWGC = slots.gather(",
        "before_BWGC = 0 * slots.gather(",
        named="decode.prefill",
        scenario="hybrid",
    ),
    _mutation(
        "columns of the convolution one token late",
        NET + "GatedDeltaNet._in_slots",
        "is_real_BT.sum(1)[:, None] + jnp.arange",
        "is_real_BT.sum(1)[:, None] - 1 + jnp.arange",
        named="decode.prefill",
        scenario="hybrid",
    ),
    _mutation(
        "a step does not decay what it remembers",
        RULE + "one_token",
        "remembered_BGRV = decay_BGR[..., None] * ",
        "remembered_BGRV = ",
        named="decode.step_1",
        scenario="hybrid",
    ),
    _mutation(
        "a step answers from the state before it",
        RULE + "one_token",
        "o_BGRV = answered_BGRV + jnp.sum(q_BGK * k_BGK, axis=-1)[..., None, None] * change_BGRV",
        "o_BGRV = answered_BGRV",
        named="decode.step_1",
        scenario="hybrid",
    ),
]

# Faults that one forward pass cannot show: states of several sequences meet.
STATE_MUTATIONS = [
    _mutation(
        "a sequence starts from what its slot held",
        ROWS + "slot_rows",
        "group.positions_BT[:, 0] == 0",
        "group.positions_BT[:, 0] < 0",
        named="engine",
    ),
    _mutation(
        "a chunk does not continue the one before it",
        ROWS + "slot_rows",
        "== 0, group.continues_B,",
        "== 0, None,",
        named="engine",
    ),
    _mutation(
        "tokens of decoding rows are looked for among the chunks",
        ROWS + "logit_indices",
        "first_B = before + ",
        "first_B = 0 * before + ",
        named="mixed",
    ),
    _mutation(
        "decoding rows read the pages of the chunks",
        ATTENTION + "Attention._attend_in_groups",
        "positions_of_group, group.pages",
        "positions_of_group, groups[0].pages",
        named="mixed",
    ),
    _mutation(
        "a row that decodes next to chunks does not change its state",
        NET + "GatedDeltaNet.__call__",
        "o_of_group, state = ",
        "o_of_group, new = ",
        "outputs.append(o_of_group)",
        "outputs.append(o_of_group); state = state if len(inputs.groups) > 1 and b.shape[1] == 1 else new",
        named="mixed",
    ),
    _mutation(
        "the convolution reads the sequence before it",
        CONVOLUTION,
        "jnp.roll(segments_BT, before - tap_index, axis=1) == segments_BT",
        "segments_BT == segments_BT",
        named="packed",
    ),
    _mutation(
        "the state of the sequence before it is visible",
        RULE + "_visibility",
        "segment_B11C == before_B[:, None, None, None]",
        "segment_B11C == segment_B11C",
        named="packed",
    ),
    _mutation(
        "tokens of the sequence before it are visible",
        RULE + "_visibility",
        "causal_CC & same_BCC",
        "causal_CC | (same_BCC & False)",
        named="packed",
    ),
]

# What the mutations run on: every feature that a family can have, with inputs short enough for about a second each.
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
_TINY = {"num_hidden_layers": 2, "max_position_embeddings": 64}
_WINDOWS = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1, "tie_word_embeddings": True}
SCENARIOS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2": ("qwen2", _TINY | _WINDOWS | {"rope_parameters": YARN}, {"dtype": "float64", "tokens": 40}),
    "qwen3": ("qwen3", _TINY, {"dtype": "float64", "tokens": 24}),
    "moe": ("qwen2_moe", _TINY, {"dtype": "float64", "tokens": 24}),
    "long": ("qwen3", {"num_hidden_layers": 1}, {"dtype": "float64", "tokens": 500, "max_columns": 500}),
    # Three value heads for each key head, a chunk and a part of one.
    "hybrid": ("qwen3_next", _TINY | {"max_position_embeddings": 128}, {"dtype": "float64", "tokens": 70}),
    "bfloat16": ("qwen3", _TINY, {"dtype": "bfloat16", "tokens": 40}),
    "kernels": ("qwen3", _TINY | _WINDOWS, {"dtype": "float32", "tokens": 40}),
}
MakeCheckpoint = Callable[..., pathlib.Path]


class Bench:
    """The reference's outputs for one scenario, computed once for all mutations."""

    def __init__(self, scenario: str, make_checkpoint: MakeCheckpoint):
        family, values, options = SCENARIOS[scenario]
        self.options = ParityOptions(make_checkpoint(family, **values), decode_steps=3, **options)
        self.config = read_model_config(self.options.model)
        reference = Reference(self.options.model, self.options.dtype)
        self.parameters = reference.parameters()
        self.outputs: ReferenceOutputs = self._comparison().run_reference(reference)

    def _comparison(self) -> Comparison:
        return Comparison(self.options, self.config, progress=lambda stage: None, num_rows=2)

    def first_failure(self) -> Check | None:
        """Return the first failed check; later stages are skipped."""
        comparison = self._comparison()
        with jax.enable_x64(self.options.dtype == "float64"):
            candidate = comparison.load()
            comparison.compare_parameters(candidate, self.parameters)
            stages = comparison.stages(candidate, self.outputs)
            while comparison.first_failure is None and next(stages, None) is not None:
                pass
        return comparison.first_failure


if __name__ == "__main__":
    import pytest

    tests = pathlib.Path(__file__).with_name("test_parity_mutations.py")
    sys.exit(pytest.main([str(tests), "-q", "-s", "-m", "slow", "-p", "no:cacheprovider"]))

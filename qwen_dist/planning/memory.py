"""A cost model of memory and time per device. It needs no weights, no devices and no compiler.

Every size is the size of an array of the real model, or of its activations, sharded by the same `ShardingContext` as in a
real run, on an abstract mesh.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import cast

import jax
from jax.sharding import AbstractMesh, Mesh

from qwen_dist.mesh import AXES, MeshConfig
from qwen_dist.models.config import DeltaNetConfig, LayerConfig, ModelConfig
from qwen_dist.models.state import page_bytes, slot_bytes
from qwen_dist.models.state_spec import CacheGroup, LayerStateSpec, cache_groups
from qwen_dist.models.transformer import state_specs
from qwen_dist.ops import splash_attention
from qwen_dist.ops.attention import query_block
from qwen_dist.ops.delta_rule import chunk_size
from qwen_dist.ops.expert_parallel import expert_capacity
from qwen_dist.ops.grouped_matmul import num_tiled_rows
from qwen_dist.ops.paged_cache import PAGE, entries_at_a_time
from qwen_dist.planning.chips import CPU_COMPILER, CompilerProfile
from qwen_dist.planning.flops import MixingFlops, mixing_flops
from qwen_dist.planning.sizes import BlockSizes, ModelSizes
from qwen_dist.planning.workload import Phase, Workload
from qwen_dist.sharding import ShardingContext
from qwen_dist.train.loss import LOSS_CHUNK_TOKENS

F32_BYTES = 4  # attention scores, logits and optimiser state are float32


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of one step per device.

    Attributes:
      flops: floating-point operations.
      bytes: device memory that must be read or written at least once.
      collectives: bytes received from other devices, by kind of collective.
    """

    flops: float
    bytes: float
    collectives: Mapping[str, float]


def abstract_sharding_context(mesh: MeshConfig, num_devices: int, workload: Workload) -> ShardingContext:
    """Return the workload's rules on an abstract mesh. Raises UsageError when the mesh does not fit the devices."""
    sizes = mesh.sizes(num_devices)
    # A ShardingContext reads only the axis sizes of its mesh.
    return ShardingContext(cast(Mesh, AbstractMesh(tuple(sizes.values()), AXES)), workload.rules)


@dataclasses.dataclass(frozen=True)
class CostModel:
    """Memory and cost of a model under a workload on a mesh. Make one with `CostModel.of`."""

    config: ModelConfig
    sharding_ctx: ShardingContext
    workload: Workload
    sizes: ModelSizes
    compiler: CompilerProfile = CPU_COMPILER

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        sharding_ctx: ShardingContext,
        workload: Workload,
        *,
        compiler: CompilerProfile = CPU_COMPILER,
    ) -> CostModel:
        """Make a cost model. Raises UsageError when the mesh does not divide the model or the batch."""
        model = cls(config, sharding_ctx, workload, ModelSizes.of(config, sharding_ctx, workload), compiler)
        model._size("batch")
        return model

    @functools.cached_property
    def num_parameters(self) -> int:
        """The parameters of the whole model, adapters included."""
        return sum(count * one.size for count, one in self.sizes.all())

    @functools.cached_property
    def _local_bytes(self) -> int:
        """The bytes of the parameters on one device."""
        return sum(count * one.local_bytes for count, one in self.sizes.all())

    @functools.cached_property
    def _local_trainable(self) -> int:
        """The number of trained parameters on one device."""
        return sum(count * one.local for count, one in self.sizes.all() if one.is_trained)

    @property
    def _itemsize(self) -> int:
        return jax.numpy.dtype(self.workload.dtype).itemsize

    @functools.cached_property
    def _dim_sizes(self) -> dict[str, int]:
        config, workload, net = self.config, self.workload, self.config.delta_net
        return {
            "batch": workload.batch,
            "length": workload.context,
            "q_heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "scan_heads": net.num_key_heads if net else 0,
            "embed": config.hidden_size,
            "mlp": config.intermediate_size,
            "vocab": config.vocab_size,
        }

    def memory(self, phase: Phase) -> dict[str, int]:
        """Return the bytes on each device while the program of a phase runs, by kind. Their sum is the peak."""
        if phase == "train":
            return {
                "parameters": self._local_bytes,
                "gradients": self._local_trainable * F32_BYTES,
                "optimizer": self._local_trainable * F32_BYTES * (2 if self._itemsize > 2 else 3),
                "saved activations": self._saved_activation_bytes(),
                "working set": self._training_workspace_bytes(),
            }
        # The token-presence table of the repetition penalty, and the copy that some compilers update.
        presence = self._size("batch", "vocab") * self.compiler.presence_copies
        working = self._for_step(phase)._inference_workspace_bytes(self._tokens_of(phase)[1])
        cache = self._slot_bytes() + self._page_bytes()
        return {"parameters": self._local_bytes, "cache": cache, "sampling": presence, "working set": working}

    def cost(self, phase: Phase) -> Cost:
        """Return the cost of one step of a phase. A prefill step is one chunk of the prompts."""
        step, tokens = self._for_step(phase), self._tokens_of(phase)[1]
        if phase == "train":
            weights = (self._num_passes + self._num_remats) * self._used_weight_bytes()
            nbytes = weights + 3 * self._local_trainable * F32_BYTES + 2 * self._saved_activation_bytes()
            return Cost(self._training_flops(), nbytes, _nonzero(self._training_collectives()))
        states = step._page_bytes() + 2 * step._slot_bytes()  # a slot is read and written
        nbytes = self._local_bytes - step._unused_expert_bytes(tokens) + states
        return Cost(step._forward_flops(tokens), nbytes, _nonzero(step._inference_collectives(tokens)))

    def loop_remainder(self, phase: Phase) -> Cost:
        """Return what the compiler's report must get to be comparable with `cost`.

        The report counts the body of a loop once; this is the cost of the other iterations. The loops are attention's over
        groups of pages and the delta rule's over rows in inference, and the loss's over blocks of tokens and the delta
        rule's over chunks in training. The report also leaves out the work inside a custom kernel, so this includes it. Of
        the experts' kernel the report counts all rows of static shapes: those that no token fills are subtracted.
        """
        step, tokens = self._for_step(phase), self._tokens_of(phase)[1]
        if phase == "train":
            return self._training_loop_remainder()
        flops_in_loops = -step._empty_row_flops(tokens)
        rows = step.workload.batch // self.sharding_ctx.batch_multiple()
        # The compiler counts the first of the iterations of each cache group.
        uncounted = [1 - 1 / max(rows * pages / entries_at_a_time(rows, tokens), 1) for pages in self._pages]
        flops_in_loops += sum(share * step._group_attention_flops(g, tokens) for g, share in enumerate(uncounted))
        bytes_in_loops = sum(share * step._group_page_bytes(g) for g, share in enumerate(uncounted))
        if tokens > 1:
            flops_in_loops += (1 - 1 / rows) * step._delta_rule_flops(tokens).in_scan
            bytes_in_loops += (1 - 1 / rows) * 2 * step._slot_bytes()
        return Cost(flops_in_loops, bytes_in_loops, {})

    def _training_loop_remainder(self) -> Cost:
        tokens = self.workload.context
        more_iterations = max(self._num_local_tokens() / LOSS_CHUNK_TOKENS - 1, 0)
        head = self.sizes.head.used
        flops = more_iterations * self._num_passes * 2 * min(self._num_local_tokens(), LOSS_CHUNK_TOKENS) * head
        # The head is read for the logits and for their gradient; its own gradient is accumulated.
        nbytes = more_iterations * head * 2 * (self._itemsize + (0 if self.workload.lora else F32_BYTES))
        times = 3 + self._num_remats
        if self._uses_splash_attention:
            flops += times * self._attention_flops(tokens)
        flops += (1 - chunk_size(tokens) / tokens) * times * self._delta_rule_flops(tokens).in_scan
        flops -= (self._num_passes + self._num_remats) * self._empty_row_flops(tokens)
        return Cost(flops, nbytes, {})

    @property
    def _num_passes(self) -> int:
        """Matmuls with each weight in a step: forward, gradient of the input and, if trained, gradient of the weight."""
        return 3 if self.workload.lora is None else 2

    @property
    def _num_remats(self) -> int:
        """How often a step recomputes each block."""
        return 1 if self.workload.remat == "full" else 0

    def _tokens_of(self, phase: Phase) -> tuple[int, int]:
        return self.workload.tokens_of(phase, self.sharding_ctx.batch_multiple())

    def _for_step(self, phase: Phase) -> CostModel:
        """Return the cost model whose batch is the number of rows in one step of the phase."""
        rows, _ = self._tokens_of(phase)
        return dataclasses.replace(self, workload=dataclasses.replace(self.workload, batch=rows))

    def _size(self, *axes: str, **replaced: int) -> int:
        """Return the number of elements on one device of an activation with these logical axes."""
        shape = tuple(replaced.get(axis, self._dim_sizes.get(axis, 0)) for axis in axes)
        return math.prod(self.sharding_ctx.activation("activation", shape, axes).shard_shape(shape))

    def _num_local_tokens(self) -> int:
        """Return the number of tokens of a training step for which one device computes logits."""
        return self._size("batch", "length")

    # --- states ---

    @functools.cached_property
    def _specs(self) -> tuple[LayerStateSpec, ...]:
        return state_specs(self.config, self.workload.dtype)

    @functools.cached_property
    def _groups(self) -> tuple[CacheGroup, ...]:
        return cache_groups(self._specs)

    @functools.cached_property
    def _pages(self) -> tuple[int, ...]:
        """Pages per sequence, of each cache group."""
        return self.workload.pages(self._specs, self.sharding_ctx)

    def _slot_bytes(self) -> int:
        """Return the bytes of the states of fixed size, of all rows."""
        return self._size("batch") * slot_bytes(self._specs, self.sharding_ctx)

    def _page_bytes(self) -> int:
        return sum(map(self._group_page_bytes, range(len(self._groups))))

    def _group_page_bytes(self, group: int) -> int:
        """Return the bytes of the pages of a cache group."""
        return self._size("batch") * self._pages[group] * page_bytes(self._specs, self.sharding_ctx)[group]

    # --- activations ---

    def _inference_workspace_bytes(self, length: int) -> int:
        stream = self._size("batch", "length", "embed", length=length) * self._itemsize
        largest = max(
            max(self._mixer_workspace_bytes(kind, length), self._ffn_workspace_bytes(kind, length)) for kind in self._kinds
        )
        # The sampler holds the logits raw, penalised, scaled, as probabilities and with Gumbel noise.
        logits = 5 * self._size("batch", "vocab") * F32_BYTES
        return max(2 * stream + largest, logits)

    @property
    def _kinds(self) -> Mapping[LayerConfig, BlockSizes]:
        return self.sizes.blocks

    def _mixer_workspace_bytes(self, kind: LayerConfig, length: int) -> int:
        if kind.mixer == "delta_net":
            return self._delta_workspace_bytes(length)
        queries = self._output_size(kind, "self_attn.q_proj", length)  # with gates
        heads = (queries + self._size("batch", "length", "q_heads", "head_dim", length=length)) * self._itemsize
        # For one group of pages: keys and values, the scores, and the softmax of the scores.
        parts = self.sharding_ctx.batch_multiple()
        entries = parts * entries_at_a_time(self.workload.batch // parts, length)
        sizes = {"batch": entries, "length": length, "kv_length": PAGE}
        keys = 2 * self._size("batch", "kv_heads", "kv_length", "head_dim", **sizes) * self._itemsize
        scores = 2 * self._size("batch", "length", "q_heads", "kv_length", **sizes) * F32_BYTES
        return heads + keys + scores

    def _delta_workspace_bytes(self, length: int) -> int:
        """Return the bytes of the delta rule's operands, prepared chunks and outputs, in float32."""
        net = self._delta_net
        heads = self._scanned_size(length)
        projected = heads * (2 * net.conv_channels + net.group_values) * self._itemsize
        if length == 1:
            # Of each row the state before and after.
            return projected + 2 * heads * net.values_per_key * net.key_dim * net.value_dim * F32_BYTES
        chunk = chunk_size(length)
        prepared = net.values_per_key * (2 * net.value_dim + 3 * net.key_dim + 2 * chunk)
        return projected + heads * (net.conv_channels + prepared) * F32_BYTES

    def _scanned_size(self, length: int) -> int:
        """Return the number of tokens times key heads of which one device computes the delta rule."""
        return self._size("batch", "scan_length", "scan_heads", scan_length=length)

    @property
    def _delta_net(self) -> DeltaNetConfig:
        assert self.config.delta_net is not None
        return self.config.delta_net

    def _ffn_workspace_bytes(self, kind: LayerConfig, length: int) -> int:
        if kind.ffn == "moe":
            return self._expert_workspace_bytes(length)
        # With weights sharded over fsdp, gate and up are all-reduced together in float32.
        width = 4 * F32_BYTES if self.sharding_ctx.mesh.shape["fsdp"] > 1 else 3 * self._itemsize
        return width * self._size("batch", "length", "mlp", length=length)

    def _saved_activation_bytes(self) -> int:
        """Return the bytes that the forward pass saves for the backward pass."""
        stream, num_layers = self._size("batch", "length", "embed") * self._itemsize, len(self.config.layers)
        if self.workload.remat == "full":
            # The input of each block, and the copy that some compilers keep of it.
            return (self.compiler.saved_input_copies * num_layers + 1) * stream
        if self.workload.remat == "selective":
            of_blocks = [count * self._linear_output_size(kind) * F32_BYTES for kind, count in self.sizes.counts.items()]
            return 2 * num_layers * stream + sum(of_blocks) + stream
        gathered = self._used_weight_bytes() if self.sharding_ctx.mesh.shape["fsdp"] > 1 else 0
        of_blocks = [count * self._block_activation_bytes(kind) for kind, count in self.sizes.counts.items()]
        return 2 * num_layers * stream + sum(of_blocks) + stream + gathered

    def _output_size(self, kind: LayerConfig, name: str, length: int) -> int:
        """Return the number of elements on one device of the output of a linear layer."""
        sizes = dict(self._kinds[kind].linears[name].out_sizes)
        return self._size("batch", "length", *sizes, **sizes, length=length)

    def _linear_output_size(self, kind: LayerConfig) -> int:
        """Return the number of elements on one device of the outputs of a block's linear layers."""
        return sum(self._output_size(kind, name, self.workload.context) for name in self._kinds[kind].linears)

    def _block_activation_bytes(self, kind: LayerConfig) -> int:
        """Return the bytes of the activations that the gradient of a block needs without remat."""
        width, normed = self._itemsize, 2 * self._size("batch", "length", "embed") * self._itemsize
        if kind.ffn == "moe":
            channels = self._expert_workspace_bytes(self.workload.context)
        else:
            channels = 3 * self._size("batch", "length", "mlp") * width
        if kind.mixer == "delta_net":
            return normed + channels + self._delta_residual_bytes()
        queries = self._output_size(kind, "self_attn.q_proj", self.workload.context)
        queries += 2 * self._size("batch", "length", "q_heads", "head_dim")
        keys = 3 * self._size("batch", "length", "kv_heads", "head_dim")
        return normed + (queries + keys) * width + channels + self._attention_residual_bytes()

    def _delta_residual_bytes(self) -> int:
        """Return the bytes that the gradient of a delta net needs."""
        net, chunk = self._delta_net, chunk_size(self.workload.context)
        projected = 2 * net.conv_channels + 3 * net.group_values
        # In float32: the operands, before and after they are normalised; for each value head the prepared chunk, the
        # triangular system with its decay and its inverse, the corrections, the outputs and the state before each chunk.
        of_head = 4 * net.key_dim + 4 * net.value_dim + 4 * chunk + net.key_dim * net.value_dim // chunk
        wide = 2 * net.conv_channels + net.values_per_key * of_head
        return self._scanned_size(self.workload.context) * (projected * self._itemsize + wide * F32_BYTES)

    @property
    def _uses_splash_attention(self) -> bool:
        """Whether training uses `splash_attention`, which saves no scores."""
        return self.compiler.platform == "tpu" and splash_attention.is_for(
            self._itemsize, self.sharding_ctx.num_shards("length")
        )

    def _attention_residual_bytes(self) -> int:
        """Return the bytes that attention saves in addition to its operands and its output."""
        if self._uses_splash_attention:
            return (
                self._size("batch", "length", "q_heads") * splash_attention.LANES * F32_BYTES
            )  # log-sum-exp, one copy per lane
        context = self.workload.context
        seen = (context + query_block(context)) / 2 / context  # blocks of queries do not touch the keys after them
        return int(
            seen * self._size("batch", "length", "q_heads", "kv_length", kv_length=context) * (F32_BYTES + self._itemsize)
        )

    def _training_workspace_bytes(self) -> int:
        """Return the bytes of the backward pass of one block or of the loss, whichever is larger.

        Both hold their gathered weights and, if these are trained, their gradients. A block's gradients are held in float32
        and rounded; the head's is the float32 sum over the tokens of one device.
        """
        trained = self.workload.lora is None
        width = self._itemsize + trained * (self._itemsize + F32_BYTES)
        weights = max(sum(one.used for one in block.parameters) for block in self._kinds.values())
        block = max(self._backward_bytes(kind) for kind in self._kinds) + weights * width
        # The logits, their softmax, and their gradient.
        logits = self._size("vocab") * min(self._num_local_tokens(), LOSS_CHUNK_TOKENS) * (2 * F32_BYTES + self._itemsize)
        return max(block, logits + self.sizes.head.used * (self._itemsize + trained * F32_BYTES))

    def _backward_bytes(self, kind: LayerConfig) -> int:
        """Return the bytes of a block's activations and of their gradients."""
        if kind.mixer != "delta_net":
            return 2 * self._block_activation_bytes(kind)
        rule = self._delta_residual_bytes()
        return 2 * (self._block_activation_bytes(kind) - rule) + self.compiler.delta_rule_copies * rule

    def _used_weight_bytes(self) -> int:
        """Return the bytes on one device of all weights of blocks, and of the head, as activations are sharded."""
        in_blocks = [
            self.sizes.counts[kind] * sum(one.used for one in block.parameters) for kind, block in self._kinds.items()
        ]
        return (sum(in_blocks) + self.sizes.head.used) * self._itemsize

    # --- experts ---

    def _expert_rows(self, length: int) -> int:
        """Return the rows that the experts of one device process at once.

        Without expert parallelism these are the choices of the device's own tokens, with it the capacity that the other
        devices can send to.
        """
        moe, parts = self.config.moe, self.sharding_ctx.mesh.shape["expert"]
        if moe is None:
            return 0
        tokens = self._size("batch", "length", length=length)
        if parts == 1:
            return tokens * moe.experts_per_token
        return parts * expert_capacity(tokens, moe.experts_per_token, parts, moe.num_experts // parts)

    def _expert_workspace_bytes(self, length: int) -> int:
        """Return the bytes of these rows: expert inputs, outputs and hidden channels."""
        if self.config.moe is None:
            return 0
        embed, mlp = self._size("embed"), self._size("mlp", mlp=self.config.moe.expert_size)
        summed = F32_BYTES if self.sharding_ctx.mesh.shape["fsdp"] > 1 else self._itemsize
        returned = F32_BYTES if self.sharding_ctx.mesh.shape["tensor"] > 1 else self._itemsize
        bytes_per_row = embed * (self._itemsize + returned) + mlp * (2 * summed + self._itemsize)
        return self._expert_rows(length) * bytes_per_row

    def _empty_row_flops(self, tokens: int) -> float:
        """Return the flops of a forward pass that the experts' kernel on a TPU would take for rows that no token fills."""
        if self.config.moe is None or self.compiler.platform != "tpu":
            return 0.0
        moe, parts = self.config.moe, self.sharding_ctx.num_shards("experts")
        num_logits, flops = self._num_logits(tokens), 0.0
        for kind, count in self.sizes.counts.items():
            matrices = [one.used for one in self._kinds[kind].parameters if one.is_of_experts]
            has_last = kind == self.config.layers[-1]
            rows = (count - has_last) * self._empty_rows(tokens) + has_last * self._empty_rows(num_logits)
            flops += 2 * rows * sum(matrices) * parts / moe.num_experts
        return flops

    def _empty_rows(self, length: int) -> int:
        """Return the rows of the experts' kernel that no token fills."""
        assert self.config.moe is not None
        filled = self._size("batch", "length", length=length) * self.config.moe.experts_per_token
        return num_tiled_rows(self._expert_rows(length)) - filled

    def _unused_expert_bytes(self, tokens: int) -> int:
        """Return the expected bytes of expert weights that no token is routed to, for uniform random routing."""
        if self.config.moe is None:
            return 0
        sharing = self.workload.batch * tokens // self.sharding_ctx.mesh.shape["data"]
        unused = (1 - self.config.moe.experts_per_token / self.config.moe.num_experts) ** sharing
        return int(unused * sum(count * one.local_bytes for count, one in self.sizes.all() if one.is_of_experts))

    # --- flops and bytes ---

    def _forward_flops(self, tokens: int) -> float:
        """Return the flops of a forward pass.

        In prefill only the last token of a row needs logits. Of the last block, the other tokens use only the weights that
        come before the state, such as those of keys and values.
        """
        num_logits = self._num_logits(tokens)
        skipped = sum(one.active for one in self._last_block.parameters if not one.is_of_every_token)
        saved = 2 * self._size("batch") * (tokens - num_logits) * skipped
        products = self._block_flops(tokens) - saved + self._head_flops(num_logits)
        return products + self._attention_flops(tokens) + self._delta_rule_flops(tokens).forward

    def _training_flops(self) -> float:
        tokens = self.workload.context
        blocks, head, rule = self._block_flops(tokens), self._head_flops(tokens), self._delta_rule_flops(tokens)
        trained = self._block_flops(tokens, trained_only=True) + (0 if self.workload.lora else head)
        # The loss is not recomputed.
        products = (2 + self._num_remats) * blocks + 2 * head + trained
        mixing = (3 + self._num_remats) * self._attention_flops(tokens)
        return products + mixing + (1 + self._num_remats) * rule.forward + rule.backward

    @property
    def _last_block(self) -> BlockSizes:
        return self._kinds[self.config.layers[-1]]

    def _block_flops(self, tokens: int, *, trained_only: bool = False) -> float:
        """Return the flops of the products with the weights of all blocks: 2 per weight and token."""
        active = sum(
            self.sizes.counts[kind] * one.active
            for kind, block in self._kinds.items()
            for one in block.parameters
            if one.is_trained or not trained_only
        )
        return 2 * self._size("batch", "length", length=tokens) * active

    def _head_flops(self, tokens: int) -> float:
        return 2 * self._size("batch", "length", length=tokens) * self.sizes.head.used

    def _num_logits(self, tokens: int) -> int:
        """Return how many of a row's tokens need a final hidden state: all in training, one in inference."""
        return tokens if self.workload.command == "finetune" else 1

    def _equivalent_blocks(self, count: int, tokens: int, *, has_last: bool = True) -> float:
        """Return the number of full blocks with the same work as `count` blocks. The last block computes few tokens."""
        return count - has_last * (1 - self._num_logits(tokens) / tokens)

    def _blocks_by_kind(self, tokens: int) -> Iterator[tuple[LayerConfig, float]]:
        """Yield each kind of block and the number of full blocks with the same work."""
        for kind, count in self.sizes.counts.items():
            yield kind, self._equivalent_blocks(count, tokens, has_last=kind == self.config.layers[-1])

    def _attention_flops(self, tokens: int) -> float:
        return sum(self._group_attention_flops(group, tokens) for group in range(len(self._groups)))

    def _group_attention_flops(self, group: int, tokens: int) -> float:
        """Return the attention flops of the layers of a cache group. Training also computes masked-out keys."""
        window, layers_of_group = self._groups[group].window, self._groups[group].layers
        positions = self._pages[group] * PAGE
        keys = min(positions, window or positions) if self.workload.command == "batch" else self.workload.context / 2
        has_last = len(self.config.layers) - 1 in layers_of_group
        layers = self._equivalent_blocks(len(layers_of_group), tokens, has_last=has_last)
        per_key = mixing_flops(self.config, self.config.layers[layers_of_group[0]], tokens).per_key
        share = self._size("batch", "length", "q_heads", length=tokens) / self.config.num_attention_heads
        return share * keys * per_key * layers

    def _delta_rule_flops(self, tokens: int) -> MixingFlops:
        """Return the flops of the delta rule in all layers."""
        counts = [(kind, count) for kind, count in self.sizes.counts.items() if kind.mixer == "delta_net"]
        if not counts:
            return MixingFlops()
        times = sum(count for _, count in counts) * self._scanned_size(tokens) / self._delta_net.num_key_heads
        return MixingFlops(*(times * flops for flops in mixing_flops(self.config, counts[0][0], tokens)))

    # --- collectives ---

    def _inference_collectives(self, tokens: int) -> Iterator[tuple[str, float]]:
        """Yield the bytes received in inference, by collective.

        Tensor parallelism all-reduces the residual stream after each product that ends in it, and once for the embedding.
        With weights sharded over fsdp the products with the stream are all-reduced: the projections of the mixer, gate and
        up, and the logits.
        """
        stream = self._size("batch", "length", "embed", length=tokens) * self._itemsize
        inputs: float = self._size("batch", "vocab") * F32_BYTES
        num_sums = 1.0
        for kind, count in self._blocks_by_kind(tokens):
            num_sums += count * self._num_sums(kind)
            linears = self._kinds[kind].linears
            of_stream = [name for name, linear in linears.items() if dict(linear.in_sizes).keys() == {"embed"}]
            inputs += count * sum(self._output_size(kind, name, tokens) for name in of_stream) * self._itemsize
            if kind.ffn == "moe" and self.config.moe is not None:
                mlp = self._size("mlp", mlp=self.config.moe.expert_size)
                inputs += count * self._expert_rows(tokens) * 2 * mlp * self._itemsize
        yield "all-to-all", self._all_to_all_bytes(tokens)
        yield (
            "all-reduce",
            2 * (self._remote_fraction("tensor") * num_sums * stream + self._remote_fraction("fsdp") * inputs),
        )

    def _num_sums(self, kind: LayerConfig) -> int:
        """Return how often a block sums the stream over tensor: the mixer, and the MLP or the experts and a shared one."""
        linears = self._kinds[kind].linears.values()
        return sum(dict(linear.out_sizes).keys() == {"embed"} for linear in linears) + (kind.ffn == "moe")

    def _training_collectives(self) -> Iterator[tuple[str, float]]:
        """Yield the bytes received in training, by collective.

        Weights are gathered for each pass and gradients are reduce-scattered. The residual stream is all-reduced as in
        inference, in each pass.
        """
        passes = 3 if self.workload.remat == "full" else 2
        gathers = 1 if self.workload.remat == "none" else 2
        # The backward pass of the experts sends both tokens and gradients, in both directions.
        yield "all-to-all", (passes + 1) * self._all_to_all_bytes(self.workload.context)
        stream = self._size("batch", "length", "embed") * self._itemsize
        gradients = self._local_trainable * self._itemsize
        yield "all-gather", self._remote_fraction("fsdp") * gathers * self._used_weight_bytes()
        cut = self._local_trainable * self._itemsize * self.sharding_ctx.mesh.shape["fsdp"]
        yield (
            "reduce-scatter",
            self._remote_fraction("fsdp") * (cut if self.workload.lora else self._used_weight_bytes()),
        )
        num_sums = 1 + sum(count * self._num_sums(kind) for kind, count in self.sizes.counts.items())
        sums = self._remote_fraction("tensor") * passes * num_sums * stream
        yield "all-reduce", 2 * (sums + self._remote_fraction("data") * gradients)

    def _all_to_all_bytes(self, length: int) -> float:
        """Return the bytes of tokens received by a device's experts plus the outputs returned to it, over all layers."""
        returned = F32_BYTES if self.sharding_ctx.mesh.shape["tensor"] > 1 else self._itemsize
        bytes_per_token = self._size("embed") * (self._itemsize + returned)
        layers = sum(count for kind, count in self._blocks_by_kind(length) if kind.ffn == "moe")
        return self._remote_fraction("expert") * layers * self._expert_rows(length) * bytes_per_token

    def _remote_fraction(self, axis: str) -> float:
        """Return the fraction of a result that a device receives from the other devices along a mesh axis."""
        size = self.sharding_ctx.mesh.shape[axis]
        return (size - 1) / size


def _nonzero(collectives: Iterator[tuple[str, float]]) -> dict[str, float]:
    return {kind: size for kind, size in collectives if size}

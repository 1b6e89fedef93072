"""A cost model of memory and time per device. It needs no weights, no devices and no compiler.

Every size is the size of an array of the real model, or of its activations, sharded by the same `ShardingContext` as in a
real run, on an abstract mesh.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from qwen_dist.mesh import AXES, MeshConfig
from qwen_dist.models.config import LayerConfig, ModelConfig
from qwen_dist.models.parameters import abstract_parameters
from qwen_dist.models.state import page_bytes, slot_bytes
from qwen_dist.models.state_spec import CacheGroup, LayerStateSpec, cache_groups
from qwen_dist.models.transformer import Transformer, state_specs
from qwen_dist.ops import splash_attention
from qwen_dist.ops.attention import query_block
from qwen_dist.ops.expert_parallel import expert_capacity
from qwen_dist.ops.paged_cache import PAGE, entries_at_a_time
from qwen_dist.planning.chips import CPU_COMPILER, CompilerProfile
from qwen_dist.planning.workload import Phase, Workload
from qwen_dist.sharding import ShardingContext
from qwen_dist.train.lora import attach_lora
from qwen_dist.train.loss import LOSS_CHUNK_TOKENS

F32_BYTES = 4  # attention scores, logits and optimiser state are float32


@dataclasses.dataclass(frozen=True)
class WeightShape:
    """The logical axes of a weight; `sizes` overrides the model's size of an axis."""

    axes: tuple[str, ...]
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


LM_HEAD = WeightShape(("vocab", "embed"))


def _block_weights(config: ModelConfig, ffn: str) -> list[WeightShape]:
    """Return the matrices of a block with this kind of MLP."""
    q, kv, mlp = ("q_heads", "head_dim", "embed"), ("kv_heads", "head_dim", "embed"), ("mlp", "embed")
    attention = [WeightShape(q), WeightShape(kv), WeightShape(kv), WeightShape(q)]
    if ffn == "mlp":
        return attention + 3 * [WeightShape(mlp)]
    assert config.moe is not None
    size = {"mlp": config.moe.expert_size}
    experts = [WeightShape(("experts", "gate_up", *mlp), size), WeightShape(("experts", *mlp), size)]
    shared = 3 * [WeightShape(mlp, {"mlp": config.moe.shared_expert_size})] if config.moe.shared_expert_size else []
    return [*attention, WeightShape(("router", "embed")), *experts, *shared]


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
    """Memory and cost of a model under a workload on a mesh. Make one with `CostModel.of`.

    Attributes:
      num_parameters: of the whole model, adapters included.
      local_parameters: on one device.
      local_trainable: on one device, those that are trained.
    """

    config: ModelConfig
    sharding_ctx: ShardingContext
    workload: Workload
    num_parameters: int
    local_parameters: int
    local_trainable: int
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
        model = cls(config, sharding_ctx, workload, *_count_parameters(config, sharding_ctx, workload), compiler)
        model._size("batch")
        return model

    @property
    def _itemsize(self) -> int:
        return jax.numpy.dtype(self.workload.dtype).itemsize

    @functools.cached_property
    def _dim_sizes(self) -> dict[str, int]:
        config, workload = self.config, self.workload
        return {
            "batch": workload.batch,
            "length": workload.context,
            "q_heads": config.num_attention_heads,
            "kv_heads": config.num_key_value_heads,
            "head_dim": config.head_dim,
            "embed": config.hidden_size,
            "mlp": config.intermediate_size,
            "vocab": config.vocab_size,
            "experts": config.moe.num_experts if config.moe else 0,
            "router": config.moe.num_experts if config.moe else 0,
            "gate_up": 2,
        }

    @functools.cached_property
    def _num_layers(self) -> collections.Counter[str]:
        """The number of layers with each kind of MLP."""
        return collections.Counter(layer.ffn for layer in self.config.layers)

    def memory(self, phase: Phase) -> dict[str, int]:
        """Return the bytes on each device while the program of a phase runs, by kind. Their sum is the peak."""
        parameters = self.local_parameters * self._itemsize
        if phase == "train":
            saved = self._saved_activation_bytes()
            return {
                "parameters": parameters,
                "gradients": self.local_trainable * F32_BYTES,
                "optimizer": self.local_trainable * F32_BYTES * (2 if self._itemsize > 2 else 3),
                "saved activations": saved,
                "working set": self._training_workspace_bytes(),
            }
        # The token-presence table of the repetition penalty, and the copy that some compilers update.
        presence = self._size("batch", "vocab") * self.compiler.presence_copies
        working = self._for_step(phase)._inference_workspace_bytes(self._tokens_of(phase)[1])
        return {"parameters": parameters, "cache": self._cache_bytes(), "sampling": presence, "working set": working}

    def cost(self, phase: Phase) -> Cost:
        """Return the cost of one step of a phase. A prefill step is one chunk of the prompts."""
        step, tokens = self._for_step(phase), self._tokens_of(phase)[1]
        forward = step._forward_flops(tokens)
        parameters = self.local_parameters * self._itemsize
        if phase == "train":
            weights = (self._num_passes + self._num_remats) * self._gathered_weight_bytes()
            nbytes = weights + 3 * self.local_trainable * F32_BYTES + 2 * self._saved_activation_bytes()
            recomputed = forward - step._head_flops(tokens)  # the loss is not recomputed
            flops = self._num_passes * forward + self._num_remats * recomputed
            return Cost(flops, nbytes, _nonzero(self._training_collectives()))
        nbytes = parameters - step._unused_expert_bytes(tokens) + step._cache_bytes()
        return Cost(forward, nbytes, _nonzero(step._inference_collectives(tokens)))

    def loop_remainder(self, phase: Phase) -> Cost:
        """Return the part of `cost` that the compiler's report leaves out.

        The report counts the body of a loop once; this is the cost of the other iterations. The loops are attention's over
        groups of pages in inference, and the loss's over blocks of tokens in training. The report also leaves out the work
        inside a custom kernel, so this includes it.
        """
        step, tokens = self._for_step(phase), self._tokens_of(phase)[1]
        if phase == "train":
            num_iterations = self._num_local_tokens() / LOSS_CHUNK_TOKENS
            more_iterations = max(num_iterations - 1, 0)
            head = self._gathered_size([LM_HEAD])
            flops = self._num_passes * 2 * min(self._num_local_tokens(), LOSS_CHUNK_TOKENS) * head
            # The head is read for the logits and for their gradient; its own gradient is accumulated.
            nbytes = more_iterations * head * 2 * (self._itemsize + (0 if self.workload.lora else F32_BYTES))
            kernel_flops = 0.0
            if self._uses_splash_attention:
                kernel_flops = (3 + self._num_remats) * self._attention_flops(tokens)
            return Cost(more_iterations * flops + kernel_flops, nbytes, {})
        rows = step.workload.batch // self.sharding_ctx.batch_multiple()
        # The compiler counts the first of the iterations of each cache group.
        uncounted = [1 - 1 / max(rows * pages / entries_at_a_time(rows, tokens), 1) for pages in self._pages]
        flops_in_loops = sum(share * step._group_attention_flops(g, tokens) for g, share in enumerate(uncounted))
        bytes_in_loops = sum(share * step._group_cache_bytes(g) for g, share in enumerate(uncounted))
        return Cost(flops_in_loops, bytes_in_loops, {})

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

    # --- memory ---

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

    def _cache_bytes(self) -> int:
        """Return the bytes of the states of all layers."""
        slots = self._size("batch") * slot_bytes(self._specs, self.sharding_ctx)
        return slots + sum(map(self._group_cache_bytes, range(len(self._groups))))

    def _group_cache_bytes(self, group: int) -> int:
        """Return the bytes of the pages of a cache group."""
        return self._size("batch") * self._pages[group] * page_bytes(self._specs, self.sharding_ctx)[group]

    def _inference_workspace_bytes(self, length: int) -> int:
        stream = self._size("batch", "length", "embed", length=length) * self._itemsize
        heads = self._size("batch", "length", "q_heads", "head_dim", length=length) * self._itemsize
        # For one group of pages: keys and values, the scores, and the softmax of the scores.
        parts = self.sharding_ctx.batch_multiple()
        entries = parts * entries_at_a_time(self.workload.batch // parts, length)
        sizes = {"batch": entries, "length": length, "kv_length": PAGE}
        keys = 2 * self._size("batch", "kv_heads", "kv_length", "head_dim", **sizes) * self._itemsize
        scores = 2 * self._size("batch", "length", "q_heads", "kv_length", **sizes) * F32_BYTES
        # With weights sharded over fsdp, gate and up are all-reduced together in float32.
        width = 4 * F32_BYTES if self.sharding_ctx.mesh.shape["fsdp"] > 1 else 3 * self._itemsize
        channels = width * self._size("batch", "length", "mlp", length=length) if self._num_layers["mlp"] else 0
        channels = max(channels, self._expert_workspace_bytes(length))
        # The sampler holds the logits raw, penalised, scaled, as probabilities and with Gumbel noise.
        logits = 5 * self._size("batch", "vocab") * F32_BYTES
        return max(2 * stream + 2 * heads + keys + scores, 2 * stream + channels, logits)

    def _saved_activation_bytes(self) -> int:
        """Return the bytes that the forward pass saves for the backward pass."""
        stream = self._size("batch", "length", "embed") * self._itemsize
        layers = len(self.config.layers)
        if self.workload.remat == "full":
            # The input of each block, and the copy that some compilers keep of it.
            return (self.compiler.saved_input_copies * layers + 1) * stream
        if self.workload.remat == "selective":
            return layers * (2 * stream + self._matmul_output_size() * F32_BYTES) + stream
        gathered = self._gathered_weight_bytes() if self.sharding_ctx.mesh.shape["fsdp"] > 1 else 0
        return layers * (2 * stream + self._block_activation_bytes()) + stream + gathered

    def _matmul_output_size(self) -> int:
        """Return the number of elements of the matmul outputs of a block."""
        queries = self._size("batch", "length", "q_heads", "head_dim")
        keys = 2 * self._size("batch", "length", "kv_heads", "head_dim")
        return queries + keys + 2 * self._size("batch", "length", "embed") + 2 * self._size("batch", "length", "mlp")

    def _block_activation_bytes(self) -> int:
        """Return the bytes of the activations that the gradient of a block needs without remat."""
        width = self._itemsize
        normed = 2 * self._size("batch", "length", "embed")
        queries = 3 * self._size("batch", "length", "q_heads", "head_dim")
        keys = 3 * self._size("batch", "length", "kv_heads", "head_dim")
        channels = 3 * self._size("batch", "length", "mlp") if self._num_layers["mlp"] else 0
        channels = max(channels, self._expert_workspace_bytes(self.workload.context) // width)
        return (normed + queries + keys + channels) * width + self._attention_residual_bytes()

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
        block_weights = max(self._gathered_size(_block_weights(self.config, ffn)) for ffn in self._num_layers)
        block = 2 * self._block_activation_bytes() + block_weights * (
            self._itemsize + trained * (self._itemsize + F32_BYTES)
        )
        # The logits, their softmax, and their gradient.
        logits = self._size("vocab") * min(self._num_local_tokens(), LOSS_CHUNK_TOKENS) * (2 * F32_BYTES + self._itemsize)
        return max(block, logits + self._gathered_size([LM_HEAD]) * (self._itemsize + trained * F32_BYTES))

    def _gathered_size(self, weights: Iterable[WeightShape]) -> int:
        """Return the number of elements of weights on one device after the all-gather: sharded as the activations are."""
        return sum(self._size(*weight.axes, **weight.sizes) for weight in weights)

    def _gathered_weight_bytes(self) -> int:
        blocks = sum(
            count * self._gathered_size(_block_weights(self.config, ffn)) for ffn, count in self._num_layers.items()
        )
        return (blocks + self._gathered_size([LM_HEAD])) * self._itemsize

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

    def _unused_expert_bytes(self, tokens: int) -> int:
        """Return the expected bytes of expert weights that no token is routed to, for uniform random routing."""
        if self.config.moe is None:
            return 0
        sharing = self.workload.batch * tokens // self.sharding_ctx.mesh.shape["data"]
        unused = (1 - self.config.moe.experts_per_token / self.config.moe.num_experts) ** sharing
        experts = self._gathered_size(w for w in _block_weights(self.config, "moe") if "experts" in w.axes)
        return int(unused * self._num_layers["moe"] * experts * self._itemsize)

    # --- flops and bytes ---

    def _forward_flops(self, tokens: int) -> float:
        """Return the flops of a forward pass: 2 per weight and token, 4 per query element and key.

        In prefill only the last token of a row needs logits. Of the last block, the other tokens use only the key and value
        weights.
        """
        config, num_logits = self.config, self._num_logits(tokens)
        in_blocks = sum(count * self._active_size(_block_weights(config, ffn)) for ffn, count in self._num_layers.items())
        last = _block_weights(config, config.layers[-1].ffn)
        skipped = self._active_size(last) - self._active_size(w for w in last if "kv_heads" in w.axes)
        products = 2 * self.workload.batch * (tokens * in_blocks - (tokens - num_logits) * skipped)
        return products / self._num_devices + self._head_flops(num_logits) + self._attention_flops(tokens)

    def _num_logits(self, tokens: int) -> int:
        """Return how many of a row's tokens need a final hidden state: all in training, one in inference."""
        return tokens if self.workload.command == "finetune" else 1

    def _equivalent_blocks(self, count: int, tokens: int, *, has_last: bool = True) -> float:
        """Return the number of full blocks with the same work as `count` blocks. The last block computes few tokens."""
        return count - has_last * (1 - self._num_logits(tokens) / tokens)

    def _equivalent_blocks_with(self, ffn: str, tokens: int) -> float:
        return self._equivalent_blocks(self._num_layers[ffn], tokens, has_last=self.config.layers[-1].ffn == ffn)

    @property
    def _num_devices(self) -> int:
        return math.prod(self.sharding_ctx.mesh.shape.values())

    def _head_flops(self, tokens: int) -> float:
        weights = self.config.vocab_size * self.config.hidden_size
        return self.workload.batch * 2 * tokens * weights / self._num_devices

    def _attention_flops(self, tokens: int) -> float:
        return sum(self._group_attention_flops(group, tokens) for group in range(len(self._groups)))

    def _group_attention_flops(self, group: int, tokens: int) -> float:
        """Return the attention flops of the layers of a cache group. Training also computes masked-out keys."""
        config, workload = self.config, self.workload
        window, layers_of_group = self._groups[group].window, self._groups[group].layers
        positions = self._pages[group] * PAGE
        keys = min(positions, window or positions) if workload.command == "batch" else workload.context / 2
        has_last = len(config.layers) - 1 in layers_of_group
        layers = self._equivalent_blocks(len(layers_of_group), tokens, has_last=has_last)
        heads = config.num_attention_heads * config.head_dim * layers
        return workload.batch * 4 * tokens * keys * heads / self._num_devices

    def _active_size(self, weights: Iterable[WeightShape]) -> int:
        """Return the number of weights that are active for one token. Only the experts it is routed to count."""
        chosen = self.config.moe.experts_per_token if self.config.moe else 0
        sizes = self._dim_sizes | {"experts": chosen}
        return sum(math.prod((sizes | weight.sizes)[axis] for axis in weight.axes) for weight in weights)

    def _inference_collectives(self, tokens: int) -> Iterator[tuple[str, float]]:
        """Yield the bytes received in inference, by collective.

        Tensor parallelism all-reduces the residual stream twice per layer and once for the embedding. With weights sharded
        over fsdp the products are all-reduced: queries, keys, values, gate and up, and the logits.
        """
        layers = self._equivalent_blocks(len(self.config.layers), tokens)
        stream = self._size("batch", "length", "embed", length=tokens) * self._itemsize
        heads = self._size("batch", "length", "q_heads", "head_dim", length=tokens)
        keys = 2 * self._size("batch", "length", "kv_heads", "head_dim", length=tokens)
        channels = 2 * self._size("batch", "length", "mlp", length=tokens) * self._equivalent_blocks_with("mlp", tokens)
        inputs = (layers * (heads + keys) + channels) * self._itemsize + self._size("batch", "vocab") * F32_BYTES
        if self.config.moe is not None:
            mlp = self._size("mlp", mlp=self.config.moe.expert_size)
            inputs += self._equivalent_blocks_with("moe", tokens) * self._expert_rows(tokens) * 2 * mlp * F32_BYTES
        yield "all-to-all", self._all_to_all_bytes(tokens)
        yield (
            "all-reduce",
            2 * (self._remote_fraction("tensor") * (2 * layers + 1) * stream + self._remote_fraction("fsdp") * inputs),
        )

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
        gradients = self.local_trainable * self._itemsize
        yield "all-gather", self._remote_fraction("fsdp") * gathers * self._gathered_weight_bytes()
        cut = self.local_trainable * self._itemsize * self.sharding_ctx.mesh.shape["fsdp"]
        yield (
            "reduce-scatter",
            self._remote_fraction("fsdp") * (cut if self.workload.lora else self._gathered_weight_bytes()),
        )
        sums = self._remote_fraction("tensor") * passes * (2 * len(self.config.layers) + 1) * stream
        yield "all-reduce", 2 * (sums + self._remote_fraction("data") * gradients)

    def _all_to_all_bytes(self, length: int) -> float:
        """Return the bytes of tokens received by a device's experts plus the outputs returned to it, over all layers."""
        returned = F32_BYTES if self.sharding_ctx.mesh.shape["tensor"] > 1 else self._itemsize
        bytes_per_token = self._size("embed") * (self._itemsize + returned)
        return (
            self._remote_fraction("expert")
            * self._equivalent_blocks_with("moe", length)
            * self._expert_rows(length)
            * bytes_per_token
        )

    def _remote_fraction(self, axis: str) -> float:
        """Return the fraction of a result that a device receives from the other devices along a mesh axis."""
        size = self.sharding_ctx.mesh.shape[axis]
        return (size - 1) / size


def _count_parameters(config: ModelConfig, sharding_ctx: ShardingContext, workload: Workload) -> tuple[int, int, int]:
    """Return the number of parameters in total, on each device, and trained on each device.

    Layers with the same configuration have the same shapes, so one of each is counted.
    """

    def count(layers: tuple[LayerConfig, ...]) -> np.ndarray:
        module = Transformer(dataclasses.replace(config, layers=layers), dtype=workload.dtype)
        adapters = attach_lora(module, workload.lora, dtype=workload.dtype) if workload.lora and layers else []
        leaves = abstract_parameters(module, sharding_ctx)
        local = {name: math.prod(leaf.sharding.shard_shape(leaf.shape)) for name, leaf in leaves.items()}
        trained = sum(local[name] for name in (adapters if workload.lora else local))
        return np.array([sum(math.prod(leaf.shape) for leaf in leaves.values()), sum(local.values()), trained])

    outside = count(())
    kinds = collections.Counter(config.layers)
    total, local, trained = outside + sum(number * (count((kind,)) - outside) for kind, number in kinds.items())
    return int(total), int(local), int(trained)


def _nonzero(collectives: Iterator[tuple[str, float]]) -> dict[str, float]:
    return {kind: size for kind, size in collectives if size}

"""What each device must hold, and what each step costs, by arithmetic: no weights, no devices and no compiler.

Every size is that of an array of the real model, or of its activations, cut as the real rules cut it: the same
`ShardingContext` places them here, on a mesh of numbers.
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
from qwen_dist.models.attention import query_block
from qwen_dist.models.cache import PAGE, group_size
from qwen_dist.models.config import LayerConfig, ModelConfig
from qwen_dist.models.moe import room_for
from qwen_dist.models.parameters import abstract_parameters
from qwen_dist.models.splash_attention import LANES
from qwen_dist.models.transformer import Transformer
from qwen_dist.planning.workload import Phase, Workload
from qwen_dist.sharding import ShardingContext
from qwen_dist.train.lora import attach
from qwen_dist.train.loss import BLOCK_TOKENS

WIDE = 4  # bytes of a float32: scores, logits, the optimiser's numbers


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight by the names of its dimensions; `sizes` are those that are not the model's."""

    axes: tuple[str, ...]
    sizes: dict[str, int] = dataclasses.field(default_factory=dict)


HEAD = Weight(("vocab", "embed"))


def _block_weights(config: ModelConfig, ffn: str) -> list[Weight]:
    """The matrices of a block with this kind of MLP."""
    q, kv, mlp = ("q_heads", "head_dim", "embed"), ("kv_heads", "head_dim", "embed"), ("mlp", "embed")
    attention = [Weight(q), Weight(kv), Weight(kv), Weight(q)]
    if ffn == "mlp":
        return attention + 3 * [Weight(mlp)]
    assert config.moe is not None
    size = {"mlp": config.moe.expert_size}
    experts = [Weight(("experts", "gate_up", *mlp), size), Weight(("experts", *mlp), size)]
    shared = 3 * [Weight(mlp, {"mlp": config.moe.shared_expert_size})] if config.moe.shared_expert_size else []
    return [*attention, Weight(("router", "embed")), *experts, *shared]


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one step of a program takes of each device: flops, bytes of its memory that must be read or written at least
    once, and bytes that it receives from the others, by kind of collective."""

    flops: float
    bytes: float
    collectives: Mapping[str, float]


def abstract_sharding_context(mesh: MeshConfig, num_devices: int, workload: Workload) -> ShardingContext:
    """The workload's rules on a mesh of numbers. Raises UsageError when the mesh does not fit the devices."""
    sizes = mesh.sizes(num_devices)
    # A sharding_ctx asks a mesh for the sizes of its axes only.
    return ShardingContext(cast(Mesh, AbstractMesh(tuple(sizes.values()), AXES)), workload.rules)


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """A model under a workload on a mesh; `Arithmetic.of` makes one."""

    config: ModelConfig
    sharding_ctx: ShardingContext
    workload: Workload
    num_parameters: int
    local_parameters: int
    local_trained: int
    is_tpu: bool = False

    @classmethod
    def of(
        cls, config: ModelConfig, sharding_ctx: ShardingContext, workload: Workload, *, is_tpu: bool = False
    ) -> Arithmetic:
        """Raises UsageError when the model or the batch does not fit the mesh."""
        arithmetic = cls(config, sharding_ctx, workload, *_count_parameters(config, sharding_ctx, workload), is_tpu)
        arithmetic._local("batch")
        return arithmetic

    @property
    def _width(self) -> int:
        return jax.numpy.dtype(self.workload.dtype).itemsize

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
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
    def _layers(self) -> collections.Counter[str]:
        """How many layers there are of each kind of MLP."""
        return collections.Counter(layer.ffn for layer in self.config.layers)

    def memory(self, phase: Phase) -> dict[str, int]:
        """Bytes on each device while the program of a phase runs, by kind; their sum is the peak."""
        parameters = self.local_parameters * self._width
        if phase == "train":
            saved = self._saved()
            return {
                "parameters": parameters,
                "gradients": self.local_trained * WIDE,
                "optimizer": self.local_trained * WIDE * (2 if self._width > 2 else 3),
                "saved activations": saved,
                "working set": self._training_set(),
            }
        # Which tokens each row has seen; a TPU changes a copy of it.
        seen = self._local("batch", "vocab") * (2 if self.is_tpu else 1)
        working = self._of_step(phase)._inference_set(self._tokens_of(phase)[1])
        return {"parameters": parameters, "cache": self._cache(), "sampling": seen, "working set": working}

    def cost(self, phase: Phase) -> Cost:
        """What one step of a phase takes: all of prefill is as many steps as pieces of prompts."""
        step, tokens = self._of_step(phase), self._tokens_of(phase)[1]
        forward = step._forward_flops(tokens)
        parameters = self.local_parameters * self._width
        if phase == "train":
            weights = (self._passes + self._again) * self._gathered_layers()
            moved = weights + 3 * self.local_trained * WIDE + 2 * self._saved()
            flops = self._passes * forward + self._again * (forward - step._head_flops(tokens))  # the loss is computed once
            return Cost(flops, moved, _nonzero(self._training_collectives()))
        moved = parameters - step._experts_without_tokens(tokens) + step._cache()
        return Cost(forward, moved, _nonzero(step._inference_collectives(tokens)))

    def repeated(self, phase: Phase) -> Cost:
        """The part of `cost` that loops take after their first turn, which is all that a compiler's report counts of them.

        In inference they are attention's over groups of pages, in training the loss's over blocks of tokens. What a kernel
        does it does not count either.
        """
        step, tokens = self._of_step(phase), self._tokens_of(phase)[1]
        if phase == "train":
            turns = self._tokens_here() / BLOCK_TOKENS
            once_more = max(turns - 1, 0)
            head = self._gathered([HEAD])
            flops = self._passes * 2 * min(self._tokens_here(), BLOCK_TOKENS) * head
            # Read for the logits and for their gradient; its own gradient is added to.
            moved = once_more * head * 2 * (self._width + (0 if self.workload.lora else WIDE))
            in_kernel = (3 + self._again) * self._attention_flops(tokens) if self._has_kernel else 0
            return Cost(once_more * flops + in_kernel, moved, {})
        rows = step.workload.batch // self.sharding_ctx.batch_multiple()
        parts = {w: 1 - 1 / max(rows * pages / group_size(rows, tokens), 1) for w, pages in self._pages.items()}
        in_loops = sum(part * step._attention_of(window, tokens) for window, part in parts.items())
        read_there = sum(part * step._cache_of(window) for window, part in parts.items())
        return Cost(in_loops, read_there, {})

    @property
    def _passes(self) -> int:
        """How many products a step makes of each weight: forward, for what goes in, and for its own gradient."""
        return 3 if self.workload.lora is None else 2

    @property
    def _again(self) -> int:
        """How often a step computes the blocks once more."""
        return 1 if self.workload.remat == "blocks" else 0

    def _tokens_of(self, phase: Phase) -> tuple[int, int]:
        return self.workload.tokens_of(phase, self.sharding_ctx.batch_multiple())

    def _of_step(self, phase: Phase) -> Arithmetic:
        """The arithmetic of as many rows, of as many tokens, as one step of the phase has."""
        rows, _ = self._tokens_of(phase)
        return dataclasses.replace(self, workload=dataclasses.replace(self.workload, batch=rows))

    def _local(self, *axes: str, **replaced: int) -> int:
        """Elements that one device has of an activation with these dimensions."""
        shape = tuple(replaced.get(axis, self._sizes.get(axis, 0)) for axis in axes)
        return math.prod(self.sharding_ctx.activation("activation", shape, axes).shard_shape(shape))

    def _tokens_here(self) -> int:
        """Tokens of a training step whose logits one device has a part of."""
        return self._local("batch", "length")

    # --- memory ---

    @functools.cached_property
    def _pages(self) -> dict[int | None, int]:
        """Pages of a row by how far back a layer sees."""
        return self.workload.pages(self.config.windows)

    def _cache(self) -> int:
        """Bytes of the keys and values of the workload's rows."""
        return sum(map(self._cache_of, self._pages))

    def _cache_of(self, window: int | None) -> int:
        """The same, in the layers that see so far back."""
        slots = self._pages[window] * PAGE
        in_layer = 2 * self._local("batch", "kv_heads", "kv_length", "head_dim", kv_length=slots) * self._width
        return in_layer * self.config.windows[window]

    def _inference_set(self, length: int) -> int:
        stream = self._local("batch", "length", "embed", length=length) * self._width
        heads = self._local("batch", "length", "q_heads", "head_dim", length=length) * self._width
        # Of one group of visits: keys and values, the scores, and what becomes of them under the softmax.
        parts = self.sharding_ctx.batch_multiple()
        visits = {"batch": parts * group_size(self.workload.batch // parts, length), "length": length, "kv_length": PAGE}
        keys = 2 * self._local("batch", "kv_heads", "kv_length", "head_dim", **visits) * self._width
        scores = 2 * self._local("batch", "length", "q_heads", "kv_length", **visits) * WIDE
        # With the weights spread over fsdp, gate and up are summed between devices, together and in float32.
        kept = 4 * WIDE if self.sharding_ctx.mesh.shape["fsdp"] > 1 else 3 * self._width
        channels = kept * self._local("batch", "length", "mlp", length=length) if self._layers["mlp"] else 0
        channels = max(channels, self._expert_set(length))
        # The sampler's: logits as they are, with the penalty, scaled, as masses, and with noise.
        logits = 5 * self._local("batch", "vocab") * WIDE
        return max(2 * stream + 2 * heads + keys + scores, 2 * stream + channels, logits)

    def _saved(self) -> int:
        """What the forward pass leaves for the backward pass."""
        stream = self._local("batch", "length", "embed") * self._width
        layers = len(self.config.layers)
        if self.workload.remat == "blocks":
            # What goes into each block. On a CPU also a copy of it, for the barrier before the block is computed again.
            return ((1 if self.is_tpu else 2) * layers + 1) * stream
        if self.workload.remat == "products":
            return layers * (2 * stream + self._products() * WIDE) + stream
        gathered = self._gathered_layers() if self.sharding_ctx.mesh.shape["fsdp"] > 1 else 0
        return layers * (2 * stream + self._of_one_block()) + stream + gathered

    def _products(self) -> int:
        """Elements of what a block's weights give."""
        queries = self._local("batch", "length", "q_heads", "head_dim")
        keys = 2 * self._local("batch", "length", "kv_heads", "head_dim")
        return queries + keys + 2 * self._local("batch", "length", "embed") + 2 * self._local("batch", "length", "mlp")

    def _of_one_block(self) -> int:
        """What a block computes and its gradient needs, of which nothing is kept with remat."""
        width = self._width
        normed = 2 * self._local("batch", "length", "embed")
        queries = 3 * self._local("batch", "length", "q_heads", "head_dim")
        keys = 3 * self._local("batch", "length", "kv_heads", "head_dim")
        channels = 3 * self._local("batch", "length", "mlp") if self._layers["mlp"] else 0
        channels = max(channels, self._expert_set(self.workload.context) // width)
        return (normed + queries + keys + channels) * width + self._scores()

    @property
    def _has_kernel(self) -> bool:
        """Whether attention of training is `splash_attention`, which keeps no scores."""
        return self.is_tpu and self._width < 4 and self.sharding_ctx.num_parts("length") == 1

    def _scores(self) -> int:
        """Bytes of what attention keeps beside its operands and result."""
        if self._has_kernel:
            return self._local("batch", "length", "q_heads") * LANES * WIDE  # a logarithm, in as many copies
        context = self.workload.context
        seen = (context + query_block(context)) / 2 / context  # blocks of queries do not touch the keys after them
        return int(seen * self._local("batch", "length", "q_heads", "kv_length", kv_length=context) * (WIDE + self._width))

    def _training_set(self) -> int:
        """The larger of one block's backward pass and the loss's.

        Each has its weights whole, and if they are trained their gradients: a block's summed in float32 and rounded, the
        head's as the sum of one device's tokens in float32.
        """
        trained = self.workload.lora is None
        block_weights = max(self._gathered(_block_weights(self.config, ffn)) for ffn in self._layers)
        block = 2 * self._of_one_block() + block_weights * (self._width + trained * (self._width + WIDE))
        # The logits, what becomes of them under the softmax, and their gradient.
        logits = self._local("vocab") * min(self._tokens_here(), BLOCK_TOKENS) * (2 * WIDE + self._width)
        return max(block, logits + self._gathered([HEAD]) * (self._width + trained * WIDE))

    def _gathered(self, weights: Iterable[Weight]) -> int:
        """Elements of weights as they are multiplied: cut as the activations are, whole otherwise."""
        return sum(self._local(*weight.axes, **weight.sizes) for weight in weights)

    def _gathered_layers(self) -> int:
        blocks = sum(count * self._gathered(_block_weights(self.config, ffn)) for ffn, count in self._layers.items())
        return (blocks + self._gathered([HEAD])) * self._width

    # --- experts ---

    def _expert_rows(self, length: int) -> int:
        """Rows that go through a device's experts at a time: its tokens' choices, or what others have room to send."""
        moe, parts = self.config.moe, self.sharding_ctx.mesh.shape["expert"]
        if moe is None:
            return 0
        tokens = self._local("batch", "length", length=length)
        if parts == 1:
            return tokens * moe.experts_per_token
        return parts * room_for(tokens, moe.experts_per_token, parts, moe.num_experts // parts)

    def _expert_set(self, length: int) -> int:
        """Bytes of those rows: as they come and go, and their channels."""
        if self.config.moe is None:
            return 0
        embed, mlp = self._local("embed"), self._local("mlp", mlp=self.config.moe.expert_size)
        summed = WIDE if self.sharding_ctx.mesh.shape["fsdp"] > 1 else self._width
        returned = WIDE if self.sharding_ctx.mesh.shape["tensor"] > 1 else self._width
        each = embed * (self._width + returned) + mlp * (2 * summed + self._width)
        return self._expert_rows(length) * each

    def _experts_without_tokens(self, tokens: int) -> int:
        """Bytes of the weights that no token chooses, if each chooses at random."""
        if self.config.moe is None:
            return 0
        sharing = self.workload.batch * tokens // self.sharding_ctx.mesh.shape["data"]
        unused = (1 - self.config.moe.experts_per_token / self.config.moe.num_experts) ** sharing
        experts = self._gathered(w for w in _block_weights(self.config, "moe") if "experts" in w.axes)
        return int(unused * self._layers["moe"] * experts * self._width)

    # --- flops and bytes ---

    def _forward_flops(self, tokens: int) -> float:
        """2 a weight and token, 4 an element of queries and key; of prefill only the last token meets the vocabulary.

        In the last block the others meet the weights of keys and values only.
        """
        config, asking = self.config, self._asking(tokens)
        in_blocks = sum(count * self._used(_block_weights(config, ffn)) for ffn, count in self._layers.items())
        last = _block_weights(config, config.layers[-1].ffn)
        of_asking = self._used(last) - self._used(w for w in last if "kv_heads" in w.axes)
        products = 2 * self.workload.batch * (tokens * in_blocks - (tokens - asking) * of_asking)
        return products / self._num_devices + self._head_flops(asking) + self._attention_flops(tokens)

    def _asking(self, tokens: int) -> int:
        """Of so many tokens of a row those whose hidden states are wanted: all in training, one in inference."""
        return tokens if self.workload.verb == "finetune" else 1

    def _whole_blocks(self, count: int, tokens: int, *, has_last: bool = True) -> float:
        """So many blocks as what they compute for a row's tokens, of which the last leaves most out."""
        return count - has_last * (1 - self._asking(tokens) / tokens)

    def _blocks_with(self, ffn: str, tokens: int) -> float:
        return self._whole_blocks(self._layers[ffn], tokens, has_last=self.config.layers[-1].ffn == ffn)

    @property
    def _num_devices(self) -> int:
        return math.prod(self.sharding_ctx.mesh.shape.values())

    def _head_flops(self, tokens: int) -> float:
        weights = self.config.vocab_size * self.config.hidden_size
        return self.workload.batch * 2 * tokens * weights / self._num_devices

    def _attention_flops(self, tokens: int) -> float:
        return sum(self._attention_of(window, tokens) for window in self.config.windows)

    def _attention_of(self, window: int | None, tokens: int) -> float:
        """Of the layers that see so far back; training computes what is behind a window too."""
        config, workload = self.config, self.workload
        slots = self._pages[window] * PAGE
        keys = min(slots, window or slots) if workload.verb == "batch" else workload.context / 2
        has_last = window == config.layers[-1].sliding_window
        layers = self._whole_blocks(config.windows[window], tokens, has_last=has_last)
        heads = config.num_attention_heads * config.head_dim * layers
        return workload.batch * 4 * tokens * keys * heads / self._num_devices

    def _used(self, weights: Iterable[Weight]) -> int:
        """Elements of weights that a token is multiplied by: of experts only those that it chooses."""
        chosen = self.config.moe.experts_per_token if self.config.moe else 0
        sizes = self._sizes | {"experts": chosen}
        return sum(math.prod((sizes | weight.sizes)[axis] for axis in weight.axes) for weight in weights)

    def _inference_collectives(self, tokens: int) -> Iterator[tuple[str, float]]:
        """Two sums a layer over the shards of heads and channels, and one for the embedding; five over those of embed."""
        layers = self._whole_blocks(len(self.config.layers), tokens)
        stream = self._local("batch", "length", "embed", length=tokens) * self._width
        heads = self._local("batch", "length", "q_heads", "head_dim", length=tokens)
        keys = 2 * self._local("batch", "length", "kv_heads", "head_dim", length=tokens)
        channels = 2 * self._local("batch", "length", "mlp", length=tokens) * self._blocks_with("mlp", tokens)
        inputs = (layers * (heads + keys) + channels) * self._width + self._local("batch", "vocab") * WIDE
        if self.config.moe is not None:
            mlp = self._local("mlp", mlp=self.config.moe.expert_size)
            inputs += self._blocks_with("moe", tokens) * self._expert_rows(tokens) * 2 * mlp * WIDE
        yield "all-to-all", self._exchanged(tokens)
        yield "all-reduce", 2 * (self._others("tensor") * (2 * layers + 1) * stream + self._others("fsdp") * inputs)

    def _training_collectives(self) -> Iterator[tuple[str, float]]:
        """Weights gathered for each pass, gradients summed and cut again; sums of the stream as in inference, each pass."""
        passes = 3 if self.workload.remat == "blocks" else 2
        gathers = 1 if self.workload.remat == "none" else 2
        # The backward pass of the experts sends tokens and gradients, each there and back.
        yield "all-to-all", (passes + 1) * self._exchanged(self.workload.context)
        stream = self._local("batch", "length", "embed") * self._width
        gradients = self.local_trained * self._width
        yield "all-gather", self._others("fsdp") * gathers * self._gathered_layers()
        cut = self.local_trained * self._width * self.sharding_ctx.mesh.shape["fsdp"]
        yield "reduce-scatter", self._others("fsdp") * (cut if self.workload.lora else self._gathered_layers())
        sums = self._others("tensor") * passes * (2 * len(self.config.layers) + 1) * stream
        yield "all-reduce", 2 * (sums + self._others("data") * gradients)

    def _exchanged(self, length: int) -> float:
        """Bytes of tokens that come to a device's experts, and of its own that come back, in all layers."""
        returned = WIDE if self.sharding_ctx.mesh.shape["tensor"] > 1 else self._width
        both_ways = self._local("embed") * (self._width + returned)
        return self._others("expert") * self._blocks_with("moe", length) * self._expert_rows(length) * both_ways

    def _others(self, axis: str) -> float:
        """The part of a result that a device gets from the others along a mesh axis."""
        size = self.sharding_ctx.mesh.shape[axis]
        return (size - 1) / size


def _count_parameters(config: ModelConfig, sharding_ctx: ShardingContext, workload: Workload) -> tuple[int, int, int]:
    """In all, on each device, and of these the trained ones. Layers of one kind are alike, so one of each is placed."""

    def count(layers: tuple[LayerConfig, ...]) -> np.ndarray:
        module = Transformer(dataclasses.replace(config, layers=layers), dtype=workload.dtype)
        adapters = attach(module, workload.lora, dtype=workload.dtype) if workload.lora and layers else []
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

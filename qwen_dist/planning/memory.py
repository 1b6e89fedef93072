"""A cost model of memory and time per device. It needs no weights, no devices and no compiler.

Every size is the size of an array of the real model, or of its activations, sharded by the same `ShardingContext` as in a
real run, on an abstract mesh. What a layer does is not known here: each says what it costs (`ops.cost`).
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, cast

import jax
from jax.sharding import AbstractMesh, Mesh

from qwen_dist.mesh import AXES, MeshConfig
from qwen_dist.models.config import LayerConfig, ModelConfig
from qwen_dist.models.state import page_bytes, slot_bytes
from qwen_dist.models.state_spec import LayerStateSpec, RecurrentSpec, cache_groups
from qwen_dist.models.transformer import state_specs
from qwen_dist.ops.cost import F32_BYTES, NOTHING, LayerCost, Passes, Step
from qwen_dist.ops.paged_cache import PAGE
from qwen_dist.planning.chips import CPU_COMPILER, CompilerProfile
from qwen_dist.planning.sizes import BlockSizes, LinearSizes, ModelSizes
from qwen_dist.planning.workload import Phase, Workload
from qwen_dist.sharding import ShardingContext
from qwen_dist.train.loss import LOSS_CHUNK_TOKENS


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


Gradient = Literal["none", "part", "all"]


class RowState(NamedTuple):
    """What a layer keeps of one row of a step.

    Attributes:
      num_bytes: on one device.
      traffic: bytes that a step reads and writes.
      num_pages, num_keys: its pages, and the keys that attention reads in them.
    """

    num_bytes: int
    traffic: int
    num_pages: int = 0
    num_keys: float = 0


@dataclasses.dataclass(frozen=True)
class Layers:
    """Layers that are alike in a program: how many, one of them, and the step that each computes.

    Attributes:
      gradient: in training, what of a layer has one: with adapters nothing before the first layer that has some, and in
        that layer only what comes after its first adapter.
    """

    count: int
    kind: LayerConfig
    block: BlockSizes
    step: Step
    gradient: Gradient = "all"

    @functools.cached_property
    def costs(self) -> tuple[LayerCost, LayerCost]:
        """What the mixer and the MLP of a layer say."""
        return self.block.costs(self.step)

    def declared(self, passes: Callable[[LayerCost], Passes]) -> Passes:
        """Return the sum of what mixer and MLP say of each pass."""
        mixer, mlp = map(passes, self.costs)
        return self._of_stage(BlockSizes.MIXER, mixer) + self._of_stage(BlockSizes.MLP, mlp)

    @functools.cached_property
    def linear_flops(self) -> Passes:
        """The flops of the products with linear weights: 2 per weight and token, and as many for each gradient."""
        total = Passes()
        for name, one in self.block.linears.items():
            flops = 2 * one.used * (self.step.outputs() if one.is_of_outputs else self.step.tokens())
            # The input of an adapter's second matrix always has a gradient: the first one is trained.
            has_gradient = self._has_gradient(one.stage) or (one.is_adapter and not name.endswith(".lora_A"))
            total += self._passes(name, flops, flops * (has_gradient + one.is_trained))
        return total

    @functools.cached_property
    def summed_bytes(self) -> Passes:
        """The bytes of what is summed over the shards of channels: outputs into the stream, and gradients of the stream.

        An output with an adapter is summed in float32, before the adapter's is added. Each linear layer that reads the
        stream has a gradient of its own: the compiler adds them up after it has summed each.
        """
        total = Passes()
        for name, one in self.block.linears.items():
            if one.sums_into_stream:
                has_adapter = f"{name}.lora_A" in self.block.linears
                total += self._passes(name, self._outputs(one) * (F32_BYTES if has_adapter else self.step.itemsize), 0)
            elif one.reads_stream and not one.is_adapter and self._is_cut(one) and self._has_gradient(one.stage):
                total += Passes(0, self.step.tokens(**dict(one.layer.in_sizes)) * self.step.itemsize)
        return total

    def _is_cut(self, linear: LinearSizes) -> bool:
        """Return whether each device has only some of a linear layer's outputs."""
        return self.step.size(**dict(linear.layer.out_sizes)) < math.prod(size for _, size in linear.layer.out_sizes)

    @property
    def multiplied_with_stream(self) -> int:
        """The elements on one device of the outputs of linear layers that multiply the residual stream."""
        return sum(self._outputs(one) for one in self.block.linears.values() if one.reads_stream)

    @property
    def linear_outputs(self) -> int:
        """The elements on one device of the outputs of all linear layers."""
        return sum(self._outputs(one) for one in self.block.linears.values() if not one.is_adapter)

    def _passes(self, linear: str, forward: float, backward: float) -> Passes:
        """Return what a linear layer has in each pass."""
        final = [f"mlp.{name}{matrix}" for name in self.costs[1].final_linears for matrix in ("", ".lora_B")]
        return Passes(forward, backward, forward if self.gradient == "none" or linear in final else 0)

    def _of_stage(self, stage: int, passes: Passes) -> Passes:
        """Return what of these is computed in a stage of the block."""
        if self.gradient == "none":
            return Passes(passes.forward, 0, passes.forward)
        return passes if self._has_gradient(stage) else dataclasses.replace(passes, backward=0)

    def _has_gradient(self, stage: int) -> bool:
        """Return whether the input of a stage has a gradient."""
        first = self.block.first_trained
        return self.gradient == "all" or (self.gradient == "part" and first is not None and stage > first)

    def _outputs(self, linear: LinearSizes) -> int:
        tokens = self.step.outputs if linear.is_of_outputs else self.step.tokens
        return tokens(**dict(linear.layer.out_sizes))


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
        model._size(batch=workload.batch)
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
        presence = self._logit_size(self.workload.batch) * self.compiler.presence_copies
        states = sum(self._states[kind].num_bytes for kind in self.config.layers)
        cache = self._size(batch=self.workload.batch) * states
        working = self._inference_workspace_bytes(phase)
        return {"parameters": self._local_bytes, "cache": cache, "sampling": presence, "working set": working}

    def cost(self, phase: Phase) -> Cost:
        """Return the cost of one step of a phase. A prefill step is one chunk of the prompts."""
        layers = self._layers(phase)
        if phase == "train":
            weights = (self._num_passes + self._num_remats) * self._used_weight_bytes()
            nbytes = weights + 3 * self._local_trainable * F32_BYTES + 2 * self._saved_activation_bytes()
            return Cost(self._training_flops(layers), nbytes, self._training_collectives(layers))
        rows = self._size(batch=self._tokens_of(phase)[0])
        flops: float = 2 * rows * self.sizes.head.used
        for same in layers:
            flops += same.count * (same.linear_flops.forward + sum(cost.flops.forward for cost in same.costs))
        unread = sum(same.count * cost.unread_bytes for same in layers for cost in same.costs)
        states = rows * sum(self._states[kind].traffic for kind in self.config.layers)
        return Cost(flops, self._local_bytes - unread + states, self._inference_collectives(layers))

    def loop_remainder(self, phase: Phase) -> Cost:
        """Return what the compiler's report must get to be comparable with `cost`.

        The report counts the body of a loop once and leaves out the work inside some kernels: see `LayerCost`. In training
        the loss is a loop, too, over chunks of tokens.
        """
        layers = self._layers(phase)
        if phase == "train":
            return self._training_loop_remainder(layers)
        rows = self._size(batch=self._tokens_of(phase)[0])
        flops = sum(same.count * cost.uncounted_flops.forward for same in layers for cost in same.costs)
        nbytes = sum(
            same.count * cost.uncounted_state * rows * self._states[same.kind].traffic
            for same in layers
            for cost in same.costs
        )
        return Cost(flops, nbytes, {})

    def _training_loop_remainder(self, layers: Iterable[Layers]) -> Cost:
        num_tokens, head = self._num_local_tokens(), self.sizes.head.used
        more_iterations = max(num_tokens / LOSS_CHUNK_TOKENS - 1, 0)
        flops = more_iterations * self._num_passes * 2 * min(num_tokens, LOSS_CHUNK_TOKENS) * head
        # The head is read for the logits and for their gradient; its own gradient is accumulated.
        nbytes = more_iterations * head * 2 * (self._itemsize + (0 if self.workload.lora else F32_BYTES))
        flops += sum(same.count * self._of_ops(same.declared(lambda cost: cost.uncounted_flops)) for same in layers)
        return Cost(flops, nbytes, {})

    @property
    def _num_passes(self) -> int:
        """Matmuls with each weight in a step: forward, gradient of the input and, if trained, gradient of the weight."""
        return 3 if self.workload.lora is None else 2

    @property
    def _num_remats(self) -> int:
        """How often a step recomputes each block."""
        return 1 if self.workload.remat == "full" else 0

    def _of_linears(self, passes: Passes) -> float:
        """Return the sum over all passes of a step, for linear layers and what is done with their outputs."""
        return passes.forward + self._num_remats * (passes.forward - passes.not_recomputed) + passes.backward

    def _of_ops(self, passes: Passes) -> float:
        """As `_of_linears`, for the ops between linear layers, which selective recomputation computes again, too."""
        num_remats = 0 if self.workload.remat == "none" else 1
        return passes.forward + num_remats * (passes.forward - passes.not_recomputed) + passes.backward

    def _tokens_of(self, phase: Phase) -> tuple[int, int]:
        return self.workload.tokens_of(phase, self.sharding_ctx.batch_multiple())

    def _size(self, **dims: int) -> int:
        """Return the number of elements on one device of an activation, by the logical names of its dimensions."""
        shape = tuple(dims.values())
        return math.prod(self.sharding_ctx.activation("activation", shape, tuple(dims)).shard_shape(shape))

    def _logit_size(self, num_rows: int) -> int:
        return self._size(batch=num_rows, vocab=self.config.vocab_size)

    def _num_local_tokens(self) -> int:
        """Return the number of tokens of a training step for which one device computes logits."""
        return self._size(batch=self.workload.batch, length=self.workload.context)

    def _layers(self, phase: Phase) -> list[Layers]:
        """Return the layers of a program by what they compute. In inference the last layer has one output for each row."""
        if phase == "train":
            return self._training_layers()
        layers = []
        for kind, count in self.sizes.counts.items():
            block, step = self.sizes.blocks[kind], self._step(phase, kind)
            is_last = kind == self.config.layers[-1]
            layers.append(Layers(count - is_last, kind, block, step))
            if is_last:
                layers.append(Layers(1, kind, block, dataclasses.replace(step, num_outputs=1)))
        return layers

    def _training_layers(self) -> list[Layers]:
        kinds, blocks = self.config.layers, self.sizes.blocks
        if self.workload.lora is None:
            first = -1
        else:
            first = next(index for index, kind in enumerate(kinds) if blocks[kind].first_trained is not None)
        of_layers: list[Gradient] = ["none" if n < first else "part" if n == first else "all" for n in range(len(kinds))]
        alike = collections.Counter(zip(kinds, of_layers, strict=True))
        steps = {kind: self._step("train", kind) for kind in blocks}
        return [Layers(count, kind, blocks[kind], steps[kind], gradient) for (kind, gradient), count in alike.items()]

    def _step(self, phase: Phase, kind: LayerConfig) -> Step:
        num_rows, num_tokens = self._tokens_of(phase)
        is_training = phase == "train"
        return Step(
            phase="train" if is_training else "inference",
            num_rows=num_rows,
            num_tokens=num_tokens,
            num_outputs=num_tokens,
            num_keys=self.workload.context / 2 if is_training else self._states[kind].num_keys,
            num_pages=0 if is_training else self._states[kind].num_pages,
            dtype=self.workload.dtype,
            trains_weights=is_training and self.workload.lora is None,
            platform=self.compiler.platform,
            sharding_ctx=self.sharding_ctx,
        )

    # --- states ---

    @functools.cached_property
    def _states(self) -> Mapping[LayerConfig, RowState]:
        """What a layer of each kind keeps of one row."""
        specs = state_specs(self.config, self.workload.dtype, self.workload.cache_dtype)
        windows = [group.window for group in cache_groups(specs)]
        pages = dict(zip(windows, self.workload.pages(specs, self.sharding_ctx), strict=True))

        def state(spec: LayerStateSpec) -> RowState:
            if isinstance(spec, RecurrentSpec):
                num_bytes = slot_bytes((spec,), self.sharding_ctx)
                return RowState(num_bytes, 2 * num_bytes)  # a slot is read and written
            num_pages = pages[spec.window]
            num_bytes = num_pages * page_bytes((spec,), self.sharding_ctx)[0]
            return RowState(num_bytes, num_bytes, num_pages, min(num_pages * PAGE, spec.window or math.inf))

        return {kind: state(spec) for kind, spec in zip(self.config.layers, specs, strict=True)}

    # --- activations ---

    def _stream_bytes(self, phase: Phase) -> int:
        num_rows, num_tokens = self._tokens_of(phase)
        return self._size(batch=num_rows, length=num_tokens, embed=self.config.hidden_size) * self._itemsize

    def _inference_workspace_bytes(self, phase: Phase) -> int:
        largest = max(cost.workspace_bytes for same in self._layers(phase) for cost in same.costs)
        # A quantised weight is an array while it is used.
        largest += max(one.dequantized for _, one in self.sizes.all()) * self._itemsize
        # The sampler holds the logits raw, penalised, scaled, as probabilities and with Gumbel noise.
        logits = 5 * self._logit_size(self._tokens_of(phase)[0]) * F32_BYTES
        return max(2 * self._stream_bytes(phase) + largest, logits)

    def _saved_activation_bytes(self) -> int:
        """Return the bytes that the forward pass saves for the backward pass."""
        stream, layers = self._stream_bytes("train"), [same for same in self._layers("train") if same.gradient != "none"]
        num_layers = sum(same.count for same in layers)
        if self.workload.remat == "full":
            # The input of each block, and the copy that some compilers keep of it.
            return (self.compiler.saved_input_copies * num_layers + 1) * stream
        if self.workload.remat == "selective":
            of_blocks = [same.count * same.linear_outputs * F32_BYTES for same in layers]
            return 2 * num_layers * stream + sum(of_blocks) + stream
        gathered = self._used_weight_bytes() if self.sharding_ctx.mesh.shape["fsdp"] > 1 else 0
        of_blocks = [same.count * (2 * stream + sum(cost.saved_bytes for cost in same.costs)) for same in layers]
        return 2 * num_layers * stream + sum(of_blocks) + stream + gathered

    def _training_workspace_bytes(self) -> int:
        """Return the bytes of the backward pass of one block or of the loss, whichever is larger.

        Both hold their gathered weights and, if these are trained, their gradients. A block's gradients are held in float32
        and rounded; the head's is the float32 sum over the tokens of one device.
        """
        trained = self.workload.lora is None
        width = self._itemsize + trained * (self._itemsize + F32_BYTES)
        weights = max(block.used for block in self.sizes.blocks.values())
        # The two normalised inputs and their gradients, and what mixer and MLP need.
        norms = 2 * 2 * self._stream_bytes("train")
        of_layers = [sum(cost.gradient_copies * cost.saved_bytes for cost in same.costs) for same in self._layers("train")]
        block = norms + max(of_layers) + weights * width
        # The logits, their softmax, and their gradient.
        tokens = min(self._num_local_tokens(), LOSS_CHUNK_TOKENS)
        logits = self._size(vocab=self.config.vocab_size) * tokens * (2 * F32_BYTES + self._itemsize)
        head = self.sizes.head.used * (self._itemsize + trained * F32_BYTES)
        return max(block, logits + head)

    def _used_weight_bytes(self) -> int:
        """Return the bytes on one device of all weights of blocks, and of the head, as activations are sharded."""
        in_blocks = sum(self.sizes.counts[kind] * block.used for kind, block in self.sizes.blocks.items())
        return (in_blocks + self.sizes.head.used) * self._itemsize

    def _training_flops(self, layers: Iterable[Layers]) -> float:
        # The loss is not recomputed.
        total: float = self._num_passes * 2 * self._num_local_tokens() * self.sizes.head.used
        for same in layers:
            total += same.count * (
                self._of_linears(same.linear_flops) + self._of_ops(same.declared(lambda cost: cost.flops))
            )
        return total

    # --- collectives ---

    def _inference_collectives(self, layers: Sequence[Layers]) -> dict[str, float]:
        """Return the bytes received in inference, by collective.

        Tensor parallelism all-reduces the residual stream after each product that ends in it, and once for the embedding.
        With weights sharded over fsdp the products with the stream are all-reduced: those of mixers and MLPs, and the
        logits.
        """
        step = layers[0].step
        sums: float = step.tokens(embed=self.config.hidden_size) * self._itemsize
        sums += sum(same.count * same.summed_bytes.forward for same in layers)
        inputs = sum(same.count * same.multiplied_with_stream for same in layers) * self._itemsize
        inputs += self._logit_size(step.num_rows) * F32_BYTES
        remote = self._remote_fraction("tensor") * sums + self._remote_fraction("fsdp") * inputs
        return _added({"all-reduce": 2 * remote}, _declared(layers, lambda passes: passes.forward))

    def _training_collectives(self, layers: Sequence[Layers]) -> dict[str, float]:
        """Return the bytes received in training, by collective.

        Weights are gathered for each pass and gradients are reduce-scattered. The residual stream is all-reduced as in
        inference, and its gradient where products have read it.
        """
        gathers = 1 if self.workload.remat == "none" else 2
        in_blocks = sum(same.count * same.block.used * (1 if same.gradient == "none" else gathers) for same in layers)
        gathered = (in_blocks + self.sizes.head.used) * self._itemsize  # the loss is computed together with its gradient
        gradients = self._local_trainable * self._itemsize
        scattered = gradients * self.sharding_ctx.mesh.shape["fsdp"] if self.workload.lora else self._used_weight_bytes()
        sums: float = 2 * self._stream_bytes("train")  # the embedding, and the gradient of the loss
        sums += sum(same.count * self._of_linears(same.summed_bytes) for same in layers)
        found = {
            "all-gather": self._remote_fraction("fsdp") * gathered,
            "reduce-scatter": self._remote_fraction("fsdp") * scattered,
            "all-reduce": 2 * (self._remote_fraction("tensor") * sums + self._remote_fraction("data") * gradients),
        }
        return _added(found, _declared(layers, self._of_ops))

    def _remote_fraction(self, axis: str) -> float:
        """Return the fraction of a result that a device receives from the other devices along a mesh axis."""
        size = self.sharding_ctx.mesh.shape[axis]
        return (size - 1) / size


def _declared(layers: Iterable[Layers], number: Callable[[Passes], float]) -> Iterator[tuple[str, float]]:
    """Yield the bytes of the collectives that layers say they have."""
    for same in layers:
        for kind in {kind for cost in same.costs for kind in cost.collectives}:
            yield kind, same.count * number(same.declared(lambda cost: cost.collectives.get(kind, NOTHING)))  # noqa: B023


def _added(sums: dict[str, float], more: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Add numbers by key, and leave out zeros."""
    for key, number in more:
        sums[key] = sums.get(key, 0.0) + number
    return {key: number for key, number in sums.items() if number}

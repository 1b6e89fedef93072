"""What a plan asks the model: a block of each kind, with its parameters, its linear layers and what it says it costs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax

from qwen_dist.checkpoint.adapter_layers import linear_layers
from qwen_dist.models.config import LayerConfig, ModelConfig
from qwen_dist.models.layers import Linear
from qwen_dist.models.parameters import abstract_parameters
from qwen_dist.models.transformer import Block, Transformer, layer_cost
from qwen_dist.ops.cost import LayerCost, Step
from qwen_dist.ops.grouped_weight import GROUP_INDEX, SCALE, ZERO_POINT
from qwen_dist.planning.workload import Workload
from qwen_dist.sharding import ShardingContext
from qwen_dist.train.lora import attach_lora


@dataclasses.dataclass(frozen=True)
class ParameterSizes:
    """A parameter of a block, or above the blocks.

    Attributes:
      name: within the block.
      size: elements of the whole.
      local, local_bytes: on one device.
      used: elements on one device while it is used: sharded as activations are.
      is_trained: whether it changes in training.
      dequantized: elements that are an array while it is used; 0 if it is not quantised.
    """

    name: str
    size: int
    local: int
    local_bytes: int
    used: int
    is_trained: bool
    dequantized: int = 0


@dataclasses.dataclass(frozen=True)
class LinearSizes:
    """A linear layer of a block, or of an adapter.

    Attributes:
      layer: its dimensions.
      used: weights on one device while it is used.
      is_trained: whether it changes in training.
      is_of_outputs: whether the last block computes it only for tokens whose outputs are wanted.
      stage: where it is in a block: see `BlockSizes`.
    """

    layer: Linear
    used: int
    is_trained: bool
    is_of_outputs: bool
    stage: int

    @property
    def is_adapter(self) -> bool:
        return any(axis == "lora_rank" for axis, _ in self.layer.in_sizes + self.layer.out_sizes)

    @property
    def sums_into_stream(self) -> bool:
        return {axis for axis, _ in self.layer.out_sizes} == {"embed"} and not self.is_adapter

    @property
    def reads_stream(self) -> bool:
        return {axis for axis, _ in self.layer.in_sizes} == {"embed"}


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """A block of one kind: its parameters, and its linear layers by name, those of adapters included.

    A block has six stages: the linear layers of the mixer that read the residual stream (0), what the mixer computes
    without linear layers (1), its other linear layers (2), and the same of the MLP (3 to 5).
    """

    MIXER, MLP = 1, 4

    module: Block
    parameters: tuple[ParameterSizes, ...]
    linears: Mapping[str, LinearSizes]

    @classmethod
    def of(cls, module: Block, parameters: tuple[ParameterSizes, ...], linears: Mapping[str, Linear]) -> BlockSizes:
        by_name = {one.name: one for one in parameters}
        of_outputs = tuple(f"{module.mixer_name}.{name}" for name in getattr(module.mixer, "of_outputs", ()))

        def sizes(name: str, layer: Linear) -> LinearSizes:
            weight = by_name[f"{name}.weight"]
            is_in_mlp, reads_stream = name.startswith("mlp."), dict(layer.in_sizes).keys() == {"embed"}
            is_of_outputs = is_in_mlp or name.startswith(of_outputs)
            stage = (cls.MLP if is_in_mlp else cls.MIXER) + (-1 if reads_stream else 1)
            return LinearSizes(layer, weight.used, weight.is_trained, is_of_outputs, stage)

        return cls(module, parameters, {name: sizes(name, layer) for name, layer in linears.items()})

    @property
    def first_trained(self) -> int | None:
        """The first stage with a trained weight; None: there is none."""
        stages = [one.stage for one in self.linears.values() if one.is_trained]
        stages += [self.MLP for one in self.parameters if one.is_trained and ".experts." in one.name]
        return min(stages, default=None)

    @property
    def used(self) -> int:
        """The elements of all parameters on one device while they are used."""
        return sum(one.used for one in self.parameters)

    def costs(self, step: Step) -> tuple[LayerCost, LayerCost]:
        """Return what its mixer and its MLP say."""
        return layer_cost(self.module.mixer, step), layer_cost(self.module.mlp, step)


@dataclasses.dataclass(frozen=True)
class ModelSizes:
    """A model as a plan sees it: a block of each kind, how many there are, and the parameters outside of blocks."""

    blocks: Mapping[LayerConfig, BlockSizes]
    counts: Mapping[LayerConfig, int]
    outside: tuple[ParameterSizes, ...]

    @classmethod
    def of(cls, config: ModelConfig, sharding_ctx: ShardingContext, workload: Workload) -> ModelSizes:
        """Read them from a model with one layer of each kind. Raises UsageError when the mesh does not divide it."""
        kinds = tuple(dict.fromkeys(config.layers))
        module = Transformer(dataclasses.replace(config, layers=kinds), dtype=workload.dtype)
        adapters = set(attach_lora(module, workload.lora, dtype=workload.dtype) if workload.lora else ())
        rules = dataclasses.replace(sharding_ctx.rules, parameters=sharding_ctx.rules.activations)
        kept = abstract_parameters(module, sharding_ctx)
        used = abstract_parameters(module, dataclasses.replace(sharding_ctx, rules=rules))
        local_bytes = _local_bytes(module, kept, sharding_ctx, workload)

        def parameters(prefix: str, names: Iterable[str]) -> tuple[ParameterSizes, ...]:
            found = []
            for name in names:
                leaf, local_used = kept[name], used[name].sharding.shard_shape(kept[name].shape)
                # Of experts, one at a time is an array.
                at_a_time = math.prod(local_used[1:] if ".experts." in name else local_used)
                found.append(
                    ParameterSizes(
                        name=name.removeprefix(prefix),
                        size=math.prod(leaf.shape),
                        local=math.prod(leaf.sharding.shard_shape(leaf.shape)),
                        local_bytes=local_bytes[name],
                        used=math.prod(local_used),
                        is_trained=name in adapters or workload.lora is None,
                        dequantized=at_a_time if name + SCALE in local_bytes else 0,
                    )
                )
            return tuple(found)

        linears, blocks = dict(linear_layers(module)), {}
        for index, kind in enumerate(kinds):
            prefix = f"layers.{index}."
            of_block = {name.removeprefix(prefix): layer for name, layer in linears.items() if name.startswith(prefix)}
            in_block = parameters(prefix, (name for name in kept if name.startswith(prefix)))
            blocks[kind] = BlockSizes.of(module.layers[index], in_block, of_block)
        outside = parameters("", (name for name in kept if not name.startswith("layers.")))
        return cls(blocks, {kind: config.layers.count(kind) for kind in kinds}, outside)

    @property
    def head(self) -> ParameterSizes:
        """The output weights; a tied model's are its embedding's."""
        by_name = {parameter.name: parameter for parameter in self.outside}
        return by_name.get("lm_head.weight", by_name["embed_tokens.weight"])

    def all(self) -> Iterable[tuple[int, ParameterSizes]]:
        """Yield how many there are of each parameter, and the parameter."""
        yield from ((1, parameter) for parameter in self.outside)
        for kind, block in self.blocks.items():
            yield from ((self.counts[kind], parameter) for parameter in block.parameters)


def _local_bytes(
    module: Transformer, kept: Mapping[str, jax.ShapeDtypeStruct], sharding_ctx: ShardingContext, workload: Workload
) -> dict[str, int]:
    """Return the bytes of each parameter on one device. That of a quantised weight has all its arrays, which follow."""
    if workload.quantization is None:
        return {name: _bytes_of(leaf) for name, leaf in kept.items()}
    workload.quantization.declare(module)
    arrays, suffixes = abstract_parameters(module, sharding_ctx), ("", SCALE, ZERO_POINT, GROUP_INDEX)
    sums = {name: sum(_bytes_of(arrays[name + one]) for one in suffixes if name + one in arrays) for name in kept}
    return sums | {name: _bytes_of(leaf) for name, leaf in arrays.items() if name not in kept}


def _bytes_of(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

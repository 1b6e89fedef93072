"""What a plan asks the model: the parameters and the linear layers of a block of each kind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from qwen_dist.models.config import LayerConfig, ModelConfig
from qwen_dist.models.layers import Linear
from qwen_dist.models.parameters import abstract_parameters, disk_shapes
from qwen_dist.models.transformer import Transformer
from qwen_dist.planning.flops import active_weights
from qwen_dist.planning.workload import Workload
from qwen_dist.sharding import ShardingContext
from qwen_dist.train.lora import attach_lora, linear_layers

# The parts of a mixer that the last block computes for every token, also where the outputs of only a few are wanted.
_OF_EVERY_TOKEN = ("self_attn.k_proj.", "self_attn.v_proj.", "linear_attn.in_proj_", "linear_attn.conv1d.")


@dataclasses.dataclass(frozen=True)
class ParameterSizes:
    """A parameter of a block, or above the blocks.

    Attributes:
      name: within the block.
      size: elements of the whole.
      active: weights on one device that multiply one of its tokens, see `active_weights`. Where experts are sharded, tokens
        come from the other devices, too.
      local, local_bytes: on one device.
      used: elements on one device while it is used: sharded as activations are.
      is_trained: whether it changes in training.
    """

    name: str
    size: int
    active: float
    local: int
    local_bytes: int
    used: int
    is_trained: bool

    @property
    def is_of_every_token(self) -> bool:
        return self.name.startswith(_OF_EVERY_TOKEN)

    @property
    def is_of_experts(self) -> bool:
        """Whether it is a matrix of every expert, not of their adapters."""
        return ".experts." in self.name and ".lora." not in self.name


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """A block of one kind: its parameters, and its linear layers by name, without those of adapters."""

    parameters: tuple[ParameterSizes, ...]
    linears: Mapping[str, Linear]


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
        active = active_weights(config, disk_shapes(module))

        def parameter(name: str, prefix: str) -> ParameterSizes:
            leaf = kept[name]
            size, local = math.prod(leaf.shape), math.prod(leaf.sharding.shard_shape(leaf.shape))
            in_use = math.prod(used[name].sharding.shard_shape(leaf.shape))
            parts = sharding_ctx.num_shards("experts") if ".experts." in name else 1
            return ParameterSizes(
                name=name.removeprefix(prefix),
                size=size,
                active=active.get(name, 0.0) * in_use * parts / size,
                local=local,
                local_bytes=local * leaf.dtype.itemsize,
                used=in_use,
                is_trained=name in adapters or workload.lora is None,
            )

        linears = {name: linear for name, linear in linear_layers(module) if ".lora_" not in name}
        blocks = {}
        for index, kind in enumerate(kinds):
            prefix = f"layers.{index}."
            blocks[kind] = BlockSizes(
                tuple(parameter(name, prefix) for name in kept if name.startswith(prefix)),
                {name.removeprefix(prefix): linear for name, linear in linears.items() if name.startswith(prefix)},
            )
        outside = tuple(parameter(name, "") for name in kept if not name.startswith("layers."))
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

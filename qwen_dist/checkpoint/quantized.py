"""Which weights of a model are kept in fewer bits, and the declaration of their arrays.

A checkpoint's own packing decides, or `--quantize`. Everything after that reads the model's declaration: sharding, loading,
planning and saving treat the arrays of a quantised weight as parameters.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from qwen_dist.checkpoint.names import Layout, find_layout, name_tensors
from qwen_dist.checkpoint.packed import PackedWeight, Source, WeightInfo, packed_sources, quantizing_source, unread_leaves
from qwen_dist.checkpoint.safetensors import TensorInfo
from qwen_dist.errors import CheckpointError, UsageError, problem_list
from qwen_dist.models.config import ModelConfig
from qwen_dist.models.layers import Embedding, Linear
from qwen_dist.models.moe import EXPERT_MATRICES, Experts
from qwen_dist.models.parameters import abstract_parameters, disk_shapes
from qwen_dist.models.transformer import Transformer
from qwen_dist.ops.grouped_weight import SCALE, ZERO_POINT, Encoding, GroupedFormat, grouped_format
from qwen_dist.ops.weight import WeightFormat
from qwen_dist.quantization.options import QuantizeOptions, is_not_converted
from qwen_dist.quantization.stored import Scheme, StoredQuantization, is_packed_by_rule, read_stored
from qwen_dist.sharding import ShardingContext

# The last part of the name of a tensor by which the weights of each packing are recognised.
_MARKS: dict[str, str] = {
    "fp8": "weight_scale_inv",
    "gptq": "qweight",
    "awq": "qweight",
    "pack-quantized": "weight_packed",
    "int-quantized": "weight_scale",
    "float-quantized": "weight_scale",
}
_SCALE_LEAVES = {"gptq": "scales", "awq": "scales", "fp8": "weight_scale_inv"}


@dataclasses.dataclass(frozen=True)
class KeptWeight:
    """A weight that is kept in fewer bits: its form in memory, and where it comes from."""

    weight: WeightInfo
    form: GroupedFormat
    sources: tuple[Source, ...]
    unread: tuple[str, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Quantization:
    """Which weights of a model are kept in fewer bits, by its `config.json` and the options alone."""

    config: Mapping[str, Any]
    options: QuantizeOptions | None

    def declare(self, module: Transformer) -> None:
        """Give the parameters of a module the formats in which they are kept. Raises as `choose_weights` does."""
        declare_weights(module, choose_weights(module, self.config, self.options))

    def check(self, config: ModelConfig, dtype: DTypeLike) -> None:
        """Raise what `declare` raises for this model, from one layer of each kind."""
        self.num_units(config, dtype)

    def num_units(self, config: ModelConfig, dtype: DTypeLike) -> dict[str, int]:
        """Return the parts that the in-features of all weights have in common, by their logical axis.

        A mesh whose shards divide these numbers cuts no group. Raises what `declare` raises.
        """
        kinds, units = tuple(dict.fromkeys(config.layers)), dict[str, int]()
        module = Transformer(dataclasses.replace(config, layers=kinds), dtype=dtype)
        for one in choose_weights(module, self.config, self.options):
            axis = one.weight.axes[one.form.out_dims(one.weight.shape)]
            units[axis] = math.gcd(units.get(axis, 0), one.form.num_units)
        return units

    @classmethod
    def of(cls, config: Mapping[str, Any], quantize: QuantizeOptions | Literal["stored", "none"]) -> Quantization | None:
        """Return the quantisation; None if there is none. Raises as `read_stored` does."""
        if isinstance(quantize, QuantizeOptions):
            return cls(dict(config), quantize)
        return None if quantize == "none" or read_stored(config) is None else cls(dict(config), None)

    def __str__(self) -> str:
        if self.options is None:
            stored = read_stored(self.config)
            return "" if stored is None else f"weights as stored ({stored.method})"
        group = f"groups of {self.options.group_size}" if self.options.group_size else "one scale of each row"
        return f"weights in {self.options.encoding}, {group}"


def choose_weights(
    module: Transformer,
    config: Mapping[str, Any],
    options: QuantizeOptions | None,
    tensors: Mapping[str, TensorInfo] | None = None,
) -> list[KeptWeight]:
    """Return the weights that are kept in fewer bits: those that `options` quantise, or that the checkpoint has packed.

    Args:
      module: the model, as declared without quantisation.
      config: the content of `config.json`.
      options: how to quantise; None keeps what is packed.
      tensors: of the checkpoint; None goes by the configuration alone.

    Raises:
      CheckpointError: tensors contradict the configuration.
      UsageError: the group size does not divide a weight, or the checkpoint is already quantised in another form.
    """
    stored = read_stored(config)
    if options is not None:
        if stored is not None and stored.method != "fp8":
            raise UsageError(
                f"--quantize: the weights are already quantised ({stored.method}); leave the flag out to keep them so, or "
                "use the original checkpoint"
            )
        return _quantized(module, options)
    return [] if stored is None else _Packed(module, stored, tensors).choose()


def _quantized(module: Transformer, options: QuantizeOptions) -> list[KeptWeight]:
    kept, problems = [], []
    head = "embed_tokens.weight" if module.config.tie_word_embeddings else "lm_head.weight"
    for weight in weights_of(module):
        if weight.name == head and options.has_head:
            form = options.head_form(weight.in_features, weight.dtype)
            kept.append(KeptWeight(weight, form, quantizing_source(weight, form, "float32"), ()))
        if is_not_converted(weight.name.removesuffix(".weight")):
            continue
        group = options.group_size or weight.in_features
        if weight.in_features % group or group % 2:
            problems.append(f"{weight.name}: {weight.in_features} in-features")
            continue
        form = options.form(weight.in_features, weight.dtype)
        kept.append(KeptWeight(weight, form, quantizing_source(weight, form, "float32"), ()))
    if problems:
        raise UsageError(
            f"groups of {options.group_size} (--quantize-group-size) do not divide these weights; choose a size that does, "
            f"or 0 for one scale of each row:\n{problem_list(problems)}"
        )
    return kept


class _Packed:
    """Chooses the weights that a checkpoint has packed; notes every contradiction."""

    def __init__(self, module: Transformer, stored: StoredQuantization, tensors: Mapping[str, TensorInfo] | None):
        self.module, self.stored, self.tensors = module, stored, tensors
        self.layout = Layout() if tensors is None else find_layout(disk_shapes(module), tensors)

    def choose(self) -> list[KeptWeight]:
        kept, problems = [], []
        for weight in weights_of(self.module):
            try:
                if (one := self._kept(weight)) is not None:
                    kept.append(one)
            except CheckpointError as error:
                problems.append(str(error))
        if problems:
            raise CheckpointError("Weights that contradict config.json:\n" + problem_list(problems))
        return kept

    def _kept(self, weight: WeightInfo) -> KeptWeight | None:
        segments = name_tensors({weight.name: weight.disk_shape}, layout=self.layout).segments[weight.name]
        layers = list(dict.fromkeys(segment.tensor.removesuffix(".weight") for segment in segments))
        scheme = self._scheme(layers)
        if scheme is None:
            return None
        group = self._group_size(weight, scheme)
        if weight.in_features % group:
            raise CheckpointError(f"{weight.name}: groups of {group} do not divide its {weight.in_features} in-features")
        if scheme.has_group_index and weight.is_experts:
            raise CheckpointError(
                f"{weight.name}: experts with groups that are not consecutive (desc_act) are not supported"
            )
        scale_dtype = "float32" if scheme.packing == "fp8" else self._dtype(layers[0], _scale_leaf(scheme), weight.dtype)
        form = GroupedFormat(
            self._encoding(layers[0], scheme),
            weight.in_features,
            group,
            scale_dtype,
            weight.dtype,
            has_zero_point=not scheme.is_symmetric,
            has_group_index=scheme.has_group_index,
        )
        unread = tuple(f"{layer}.{leaf}" for layer in layers for leaf in unread_leaves(scheme))
        return KeptWeight(weight, form, packed_sources(weight, form, scheme), unread)

    def _scheme(self, layers: Sequence[str]) -> Scheme | None:
        """Return how the weight of these layers on disk is packed; None: it is not."""
        schemes = [self.stored.scheme_of(layer) for layer in layers]
        if self.tensors is None:
            return schemes[0] if is_packed_by_rule(self.stored, layers[0]) else None
        found = [self._mark(layer) for layer in layers]
        if not any(found):
            return None
        if len(set(found)) > 1 or len(set(schemes)) > 1:
            raise CheckpointError(f"{layers[0]} to {layers[-1]}: some are packed and others are not, or otherwise")
        if schemes[0] is None:
            raise CheckpointError(f"config.json leaves out {layers[0]}, but there is a {found[0]}")
        # What is found may be of another packing, such as scales without packed values: then tensors will be missing.
        return schemes[0]

    def _mark(self, layer: str) -> str:
        assert self.tensors is not None
        names = (f"{layer}.{mark}" for mark in dict.fromkeys(_MARKS.values()))
        return next((name for name in (*names, f"{layer}_scale_inv") if name in self.tensors), "").removeprefix(layer)

    def _encoding(self, layer: str, scheme: Scheme) -> Encoding:
        if scheme.packing in ("fp8", "float-quantized"):
            leaf = "weight" if f"{layer}.weight" in (self.tensors or ()) else ""
            return cast(Encoding, self._dtype(layer, leaf, "float8_e4m3fn"))
        return "int4" if scheme.bits == 4 and scheme.packing != "int-quantized" else "int8"

    def _group_size(self, weight: WeightInfo, scheme: Scheme) -> int:
        if scheme.block is not None:
            # The last block may be partial.
            return math.gcd(scheme.block[1], weight.in_features)
        return scheme.group_size or weight.in_features

    def _dtype(self, layer: str, leaf: str, default: str) -> str:
        """Return the dtype of a tensor of a layer; the default if it is unknown or none of floats."""
        tensor = (self.tensors or {}).get(f"{layer}.{leaf}" if leaf else layer)
        if tensor is None or tensor.dtype.numpy is None or not jnp.issubdtype(tensor.dtype.numpy, jnp.floating):
            return default
        return tensor.dtype.numpy.name


def _scale_leaf(scheme: Scheme) -> str:
    return _SCALE_LEAVES.get(scheme.packing, "weight_scale")


def weights_of(module: Transformer) -> Iterator[WeightInfo]:
    """Yield the weights that may be kept in fewer bits: those of linear layers, of experts, and the embedding."""
    for name, parameter in _weight_parameters(module):
        value, metadata = parameter.get_value(), parameter.get_metadata()
        dtype = jnp.dtype(value.dtype).name
        yield WeightInfo(name, tuple(value.shape), metadata["out_sharding"], metadata["disk_shape"], dtype)


def _weight_parameters(module: Transformer) -> Iterator[tuple[str, nnx.Param]]:
    for path, layer in nnx.iter_modules(module):
        name = ".".join(map(str, path))
        if ".lora_" in name:
            continue  # an adapter is never quantised
        if isinstance(layer, Linear | Embedding):
            yield f"{name}.weight", layer.weight
        elif isinstance(layer, Experts):
            yield from ((f"{name}.{matrix}", getattr(layer, matrix)) for matrix in EXPERT_MATRICES)


def declare_weights(module: Transformer, kept: Iterable[KeptWeight]) -> None:
    """Give the parameters of a module the formats in which they are kept."""
    formats: dict[str, WeightFormat] = {one.weight.name: grouped_format(one.form) for one in kept}
    for name, parameter in _weight_parameters(module):
        if name in formats:
            parameter.set_metadata(weight_format=formats[name])


def packed_weights(kept: Iterable[KeptWeight], sharding_ctx: ShardingContext) -> list[PackedWeight]:
    """Return what the loader needs of the weights that are kept in fewer bits.

    Raises UsageError where the mesh cuts a word or a group on disk.
    """
    packed = []
    for one in kept:
        arrays = {suffix: one.weight.name + suffix for suffix in _tensors(one)}
        sources = []
        for source in one.sources:
            sharding = sharding_ctx.parameter(source.name, source.spec.shape, source.spec.axes)
            struct = jax.ShapeDtypeStruct(source.spec.shape, np.dtype(source.spec.dtype), sharding=sharding)
            sources.append((source, struct))
        packed.append(PackedWeight(one.weight.name, arrays, tuple(sources), one.unread))
    return packed


def _tensors(kept: KeptWeight) -> Collection[str]:
    return grouped_format(kept.form).tensors(kept.weight.shape, kept.weight.dtype, kept.weight.axes)


def dequantize_weights(
    parameters: dict[str, jax.Array], kept: Sequence[KeptWeight], target: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Return the parameters with each quantised weight as an array, as `target` has it, one at a time."""
    parameters = dict(parameters)
    for one in kept:
        arrays = {suffix: parameters.pop(one.weight.name + suffix) for suffix in _tensors(one)}
        name, struct = one.weight.name, target[one.weight.name]
        parameters[name] = jax.block_until_ready(_dequantize(one.form, struct)(arrays))
    return parameters


def _dequantize(form: GroupedFormat, struct: jax.ShapeDtypeStruct) -> Callable[..., jax.Array]:
    def run(arrays: Mapping[str, jax.Array]) -> jax.Array:
        return form.assemble(arrays).dequantize().reshape(struct.shape).astype(struct.dtype)

    return jax.jit(run, out_shardings=struct.sharding)


def random_weights(
    module: Transformer, kept: Sequence[KeptWeight], sharding_ctx: ShardingContext, seed: int = 0
) -> dict[str, jax.Array]:
    """Return random arrays for quantised weights, whose values are about as large as those of random weights."""
    target, arrays = abstract_parameters(module, sharding_ctx), {}
    std = module.config.initializer_range
    for number, one in enumerate(kept):
        key = jax.random.fold_in(jax.random.key(seed), number)
        # The standard deviation of evenly distributed values.
        spread = {"int4": 4.6, "int8": 74.0}.get(one.form.encoding, 100.0)
        for suffix in _tensors(one):
            leaf = target[one.weight.name + suffix]

            def draw(key: jax.Array, suffix: str = suffix, leaf: Any = leaf, spread: float = spread) -> jax.Array:
                if suffix == SCALE:
                    return jnp.full(leaf.shape, std / spread, leaf.dtype)
                if suffix == ZERO_POINT:
                    return jnp.zeros(leaf.shape, leaf.dtype)
                if suffix == "" and jnp.issubdtype(leaf.dtype, jnp.integer):
                    return jax.random.bits(key, leaf.shape, jnp.uint8).view(leaf.dtype)
                return (spread * jax.random.normal(key, leaf.shape)).clip(-448, 448).astype(leaf.dtype)

            arrays[one.weight.name + suffix] = jax.jit(draw, out_shardings=leaf.sharding)(key)
    return arrays

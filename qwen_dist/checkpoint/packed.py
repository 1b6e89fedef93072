"""Weights that are kept in fewer bits: from which tensors on disk their arrays are made, and how.

A `Source` is one tensor on disk of each matrix of a weight, as a parameter in the order of the disk. The loader plans and
reads it as any other; a chunk of it is then encoded into boxes of the weight's arrays (see `ops.grouped_weight`). There is
a kind of source for each packing, and one that quantises.

*Canonical* order is that of the arrays: out-features, then units of in-features (runs or groups), then what is in a unit.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import numpy as np

from qwen_dist.checkpoint.boxes import Box
from qwen_dist.checkpoint.fp8 import BlockScales, dequantize
from qwen_dist.errors import CheckpointError
from qwen_dist.models.parameters import DiskShape
from qwen_dist.ops.grouped_weight import GROUP_INDEX, SCALE, ZERO_POINT, GroupedFormat
from qwen_dist.ops.weight import TensorSpec
from qwen_dist.quantization.packing import in_awq_order, in_runs, pack_runs, unpack_words
from qwen_dist.quantization.rounding import quantize
from qwen_dist.quantization.stored import Scheme

WORD_BITS = 32


# (values in canonical order, scales of FP8 blocks, the first unit) → by suffix of the weight's name, a box of an array.
Encode = Callable[[np.ndarray, BlockScales | None, int], Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class WeightInfo:
    """A weight that may be kept in fewer bits: its name, shape, logical axes, and shape on disk, as its model declares."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    disk_shape: DiskShape
    dtype: str

    @property
    def in_features(self) -> int:
        return self.disk_shape[-1]

    @property
    def is_experts(self) -> bool:
        """Whether it has a matrix for each expert."""
        return len(self.disk_shape) == 3

    def leaf(self, name: str) -> str:
        """Return the name of another tensor of the same layer, such as `qweight`."""
        base = self.name.removesuffix(".weight")
        return self.name if name == "weight" else f"{base}.{name}"


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One tensor on disk of each matrix of a weight, in the order of the disk.

    Attributes:
      weight: whose arrays are made of it.
      name: of the parameter that it would be, such as `layers.0.mlp.up_proj.qweight`.
      spec: its shape, dtype and logical axes, in the order of the disk.
      disk_shape: its shape on disk.
      order: for each canonical dimension, which dimension of `spec` it is.
      whole: dimensions of `spec` that a chunk is never cut along.
      encode: see `Encode`. It raises CheckpointError for values that contradict the configuration.
    """

    weight: str
    name: str
    spec: TensorSpec
    disk_shape: DiskShape
    order: tuple[int, ...]
    whole: tuple[int, ...]
    encode: Encode

    def encode_box(self, box: Box, values: np.ndarray, blocks: BlockScales | None) -> list[tuple[str, Box, np.ndarray]]:
        """Return (suffix, box, values) of what the values of a box of this source become."""
        canonical, ranges = values.transpose(self.order), [box[dim] for dim in self.order]
        encoded = self.encode(canonical, blocks, ranges[-2][0])
        result = []
        for suffix, array in encoded.items():
            factors = [many // one for many, one in zip(array.shape[:-1], canonical.shape[:-1], strict=True)]
            outer = [(start * n, stop * n) for (start, stop), n in zip(ranges[:-1], factors, strict=True)]
            result.append((suffix, (*outer, (0, array.shape[-1])), array))
        return result


@dataclasses.dataclass(frozen=True, eq=False)
class PackedWeight:
    """A weight that is kept quantised.

    Attributes:
      name: of the weight.
      arrays: the names of its arrays, by suffix.
      sources: what they are made of, each with its shape, dtype and sharding in the order of the disk.
      unread: tensors on disk that may be there and are not needed.
    """

    name: str
    arrays: Mapping[str, str]
    sources: tuple[tuple[Source, jax.ShapeDtypeStruct], ...]
    unread: tuple[str, ...] = ()


class _SourceMaker:
    """Makes the sources of one weight; notes what does not fit."""

    def __init__(self, weight: WeightInfo, form: GroupedFormat):
        self.weight, self.form, self.dims = weight, form, form.out_dims(weight.shape)

    def make(
        self,
        leaf: str,
        dtype: str,
        units: int,
        width: int,
        encode: Encode,
        *,
        is_in_first: bool = False,
        out_pack: int = 1,
        has_out: bool = True,
    ) -> Source:
        """Return a source of `units` times `width` elements along the in-features.

        Args:
          leaf: the last part of the tensor's name.
          dtype: on disk.
          units: into how many parts the in-features may be cut; `width`: elements on disk of each.
          encode: see `Encode`.
          is_in_first: the in-features are the rows on disk, as GPTQ and AWQ have them.
          out_pack: out-features in one element.
          has_out: whether there is one for each out-feature; otherwise it is a vector.
        """
        weight, dims = self.weight, self.dims
        out, out_axes = (weight.shape[:dims], weight.axes[:dims]) if has_out else ((), ())
        if out and out[-1] % out_pack:
            raise CheckpointError(f"{weight.name}: {out_pack} of its {out[-1]} {out_axes[-1]} do not fit a word of {leaf}")
        out = (*out[:-1], out[-1] // out_pack) if out else ()
        in_axes = (weight.axes[dims] if units > 1 else "group", "group")
        num_stack = len(out) - 1 if weight.is_experts and has_out else 0
        rows, sections = math.prod(out[num_stack:]), tuple(size // out_pack for size in weight.disk_shape.sections)
        if is_in_first and sections:
            raise CheckpointError(
                f"{weight.name} has queries, keys and values in one tensor, which is not supported with in-features first"
            )
        of_matrix = (units * width, rows) if is_in_first else (rows, units * width)
        matrices = math.prod(out[:num_stack]) // weight.disk_shape[0] if weight.is_experts and has_out else 1
        lead = (weight.disk_shape[0],) if weight.is_experts and has_out else ()
        disk_shape = DiskShape((*lead, matrices * of_matrix[0], of_matrix[1]) if has_out else (units * width,), sections)
        canonical = range(len(out) + 2)
        disk = [*canonical[:num_stack], *canonical[-2:], *canonical[num_stack:-2]] if is_in_first else [*canonical]
        shape, axes = (*out, units, width), (*out_axes, *in_axes)
        spec = TensorSpec(tuple(shape[dim] for dim in disk), dtype, tuple(axes[dim] for dim in disk))
        order = tuple(disk.index(dim) for dim in canonical)
        return Source(weight.name, weight.leaf(leaf), spec, disk_shape, order, (order[-1],), encode)


def quantizing_source(weight: WeightInfo, form: GroupedFormat, dtype: str) -> tuple[Source, ...]:
    """Return the source of a weight of floats, or of FP8 blocks, that is quantised as it is read."""

    def encode(values: np.ndarray, blocks: BlockScales | None, _: int) -> Mapping[str, np.ndarray]:
        wide = values if blocks is None else dequantize(values, *blocks, np.dtype("float32"))
        try:
            rounded, scale = quantize(wide, form.encoding, np.dtype(form.scale_dtype))
        except ValueError as error:
            raise CheckpointError(f"{weight.name} cannot be quantised: {error}") from None
        return {"": in_runs(rounded.reshape(*rounded.shape[:-2], -1, form.run), form), SCALE: scale}

    return (_SourceMaker(weight, form).make("weight", dtype, form.num_groups, form.group_size, encode),)


def packed_sources(weight: WeightInfo, form: GroupedFormat, scheme: Scheme) -> tuple[Source, ...]:
    """Return the sources of a weight that is packed on disk.

    Raises:
      CheckpointError: this weight cannot be packed so.
    """
    make = {
        "fp8": _fp8_sources,
        "gptq": _gptq_sources,
        "awq": _awq_sources,
        "pack-quantized": _word_sources,
        "int-quantized": _plain_sources,
        "float-quantized": _plain_sources,
    }[scheme.packing]
    return make(_SourceMaker(weight, form), scheme)


def unread_leaves(scheme: Scheme) -> tuple[str, ...]:
    """Return the tensors of a packed weight that a checkpoint may have and that are not needed."""
    return {
        "gptq": ("g_idx",),
        "pack-quantized": ("weight_shape", "input_scale"),
        "int-quantized": ("input_scale",),
        "float-quantized": ("input_scale",),
        "fp8": ("input_scale",),
    }.get(scheme.packing, ())


def _fp8_sources(maker: _SourceMaker, scheme: Scheme) -> tuple[Source, ...]:
    form = maker.form

    def encode(values: np.ndarray, blocks: BlockScales | None, _: int) -> Mapping[str, np.ndarray]:
        assert blocks is not None
        scale = blocks.scale.astype(form.scale_dtype)[blocks.row_blocks][:, blocks.column_blocks[:: form.group_size]]
        return {"": values.reshape(*values.shape[:-2], -1, form.run), SCALE: scale.reshape(*values.shape[:-1], 1)}

    return (maker.make("weight", form.values_dtype, form.num_groups, form.group_size, encode),)


def _values_source(maker: _SourceMaker, leaf: str, bits: int, *, is_in_first: bool = False) -> Source:
    """Return the source of values that are packed in words along the in-features."""
    form, per_word = maker.form, WORD_BITS // bits

    def encode(words: np.ndarray, _: object, __: int) -> Mapping[str, np.ndarray]:
        return {"": _stored_runs(unpack_words(words, bits), form)}

    if form.run % per_word:
        raise CheckpointError(f"{maker.weight.name}: groups of {form.group_size} do not fill words of {per_word} values")
    num_runs = form.in_features // form.run
    return maker.make(leaf, "int32", num_runs, form.run // per_word, encode, is_in_first=is_in_first)


def _gptq_sources(maker: _SourceMaker, scheme: Scheme) -> tuple[Source, ...]:
    sources = [
        _values_source(maker, "qweight", scheme.bits, is_in_first=True),
        _scale_source(maker, "scales", is_in_first=True),
        _zero_point_source(maker, "qzeros", scheme, is_in_first=True),
    ]
    if not maker.weight.is_experts:
        sources.append(_group_index_source(maker, "g_idx"))
    return tuple(sources)


def _awq_sources(maker: _SourceMaker, scheme: Scheme) -> tuple[Source, ...]:
    form, per_word = maker.form, WORD_BITS // scheme.bits

    def encode_values(words: np.ndarray, _: object, __: int) -> Mapping[str, np.ndarray]:
        return {"": _stored_runs(_unpack_out(words, scheme.bits, is_awq=True), form)}

    num_runs = form.in_features // form.run
    return (
        maker.make("qweight", "int32", num_runs, form.run, encode_values, is_in_first=True, out_pack=per_word),
        _scale_source(maker, "scales", is_in_first=True),
        _zero_point_source(maker, "qzeros", scheme, is_in_first=True),
    )


def _word_sources(maker: _SourceMaker, scheme: Scheme) -> tuple[Source, ...]:
    """Return the sources of pack-quantized weights."""
    sources = [
        _values_source(maker, "weight_packed", scheme.bits),
        _scale_source(maker, "weight_scale"),
    ]
    if not scheme.is_symmetric:
        sources.append(_zero_point_source(maker, "weight_zero_point", scheme))
    if scheme.has_group_index:
        sources.append(_group_index_source(maker, "weight_g_idx"))
    return tuple(sources)


def _plain_sources(maker: _SourceMaker, scheme: Scheme) -> tuple[Source, ...]:
    """Return the sources of weights with one byte for each value, in its own dtype."""
    form = maker.form

    def copy(values: np.ndarray, _: object, __: int) -> Mapping[str, np.ndarray]:
        return {"": values}

    def copy_zero_point(values: np.ndarray, _: object, __: int) -> Mapping[str, np.ndarray]:
        return {ZERO_POINT: values}

    num_runs = form.in_features // form.run
    sources = [
        maker.make("weight", form.values_dtype, num_runs, form.run, copy),
        _scale_source(maker, "weight_scale"),
    ]
    if not scheme.is_symmetric:
        sources.append(maker.make("weight_zero_point", "int8", form.num_groups, 1, copy_zero_point))
    if scheme.has_group_index:
        sources.append(_group_index_source(maker, "weight_g_idx"))
    return tuple(sources)


def _scale_source(maker: _SourceMaker, leaf: str, *, is_in_first: bool = False) -> Source:
    def encode(values: np.ndarray, _: object, __: int) -> Mapping[str, np.ndarray]:
        return {SCALE: values}

    form = maker.form
    return maker.make(leaf, form.scale_dtype, form.num_groups, 1, encode, is_in_first=is_in_first)


def _zero_point_source(maker: _SourceMaker, leaf: str, scheme: Scheme, *, is_in_first: bool = False) -> Source:
    """Return the source of zero points that are packed along the out-features."""
    bits = scheme.bits

    def encode(words: np.ndarray, _: object, __: int) -> Mapping[str, np.ndarray]:
        stored = _unpack_out(words, bits, is_awq=scheme.packing == "awq")
        # Unsigned: a field of a word wraps around.
        zero_point = (stored + np.uint8(scheme.zero_offset)) & np.uint8(2**bits - 1)
        if maker.form.has_zero_point:
            return {ZERO_POINT: (zero_point.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8)}
        if (wrong := zero_point[zero_point != 2 ** (bits - 1)]).size:
            name = maker.weight.leaf(leaf)
            middle = 2 ** (bits - 1) - scheme.zero_offset
            found = (int(wrong[0]) - scheme.zero_offset) % 2**bits
            raise CheckpointError(f"{name} has {found} where a symmetric quantisation of {bits} bits has {middle}")
        return {}

    per_word, groups = WORD_BITS // bits, maker.form.num_groups
    return maker.make(leaf, "int32", groups, 1, encode, is_in_first=is_in_first, out_pack=per_word)


def _group_index_source(maker: _SourceMaker, leaf: str) -> Source:
    form, name = maker.form, maker.weight.leaf(leaf)

    def encode(values: np.ndarray, _: object, first_run: int) -> Mapping[str, np.ndarray]:
        if form.has_group_index:
            if values.min() < 0 or values.max() >= form.num_groups:
                raise CheckpointError(f"{name} has the group {int(values.max())} of {form.num_groups}")
            return {GROUP_INDEX: values}
        expected = (np.arange(values.size) + first_run * form.run) // form.group_size
        if not np.array_equal(values.reshape(-1), expected):
            raise CheckpointError(f"{name} is not in order, but config.json says desc_act false")
        return {}

    return maker.make(leaf, "int32", form.in_features // form.run, form.run, encode, has_out=False)


def _unpack_out(words: np.ndarray, bits: int, *, is_awq: bool) -> np.ndarray:
    """Return the values of canonical words [*O / n, units, width] with n out-features in each: [*O, units, width]."""
    values = unpack_words(np.moveaxis(words, -3, -1), bits)
    return np.moveaxis(in_awq_order(values) if is_awq else values, -1, -3)


def _stored_runs(values: np.ndarray, form: GroupedFormat) -> np.ndarray:
    """Return unsigned values [*O, runs, run] as the array `values` has them."""
    if form.encoding == "int4":
        return pack_runs(values)
    return (np.ascontiguousarray(values) ^ np.uint8(128)).view(np.int8)

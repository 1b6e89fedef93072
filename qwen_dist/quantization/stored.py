"""How the weights of a checkpoint are packed, from the `quantization_config` of its `config.json`.

The tensors on disk decide which weights are packed; the configuration says how, and which must not be.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from qwen_dist.errors import CheckpointError, printable, problem_list
from qwen_dist.quantization.options import is_not_converted

Packing = Literal["fp8", "gptq", "awq", "pack-quantized", "int-quantized", "float-quantized"]
SUPPORTED = (
    "fp8 (with weight_block_size), gptq (4 and 8 bits), awq (gemm) and compressed-tensors (pack-quantized, int-quantized, "
    "float-quantized)"
)
_INSTEAD = f"supported are {SUPPORTED}; or use the original checkpoint with --quantize int8, int4 or fp8"
_MAX_PATTERNS = 10_000


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How one weight is packed.

    Attributes:
      packing: the layout of its tensors.
      bits: of a value.
      group_size: in-features with one scale; 0: all of a row.
      is_symmetric: every zero point is the middle of the range.
      has_group_index: groups are not of consecutive in-features.
      zero_offset: what is added to a stored zero point.
      block: rows and columns with one scale, of FP8.
    """

    packing: Packing
    bits: int
    group_size: int = 0
    is_symmetric: bool = True
    has_group_index: bool = False
    zero_offset: int = 0
    block: tuple[int, int] | None = None


# From the name of a layer on disk, with its prefix, to how its weight is packed. None: it must not be packed.
SchemeOf = Callable[[str], Scheme | None]


@dataclasses.dataclass(frozen=True)
class StoredQuantization:
    """The quantisation of a checkpoint: the name of its method, and the scheme of each layer."""

    method: str
    scheme_of: SchemeOf


def read_stored(config: Mapping[str, Any]) -> StoredQuantization | None:
    """Read the `quantization_config` of a `config.json`; None if there is none.

    Raises:
      CheckpointError: listing everything that is not supported, and what to use instead.
    """
    given = config.get("quantization_config")
    if given is None and isinstance(text := config.get("text_config"), dict):
        given = text.get("quantization_config")
    if given is None:
        return None
    method = given.get("quant_method") if isinstance(given, dict) else given
    readers = {"fp8": _fp8, "gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}
    if not isinstance(given, dict) or not isinstance(method, str) or method not in readers:
        shown = printable(repr(method), 80)
        raise CheckpointError(f"config.json: quantization {shown} is not supported: {_INSTEAD}.")
    reader = _Problems(given)
    scheme_of = readers[method](reader)
    if reader.problems:
        raise CheckpointError(
            f"config.json: this form of quantization {method!r} is not supported:\n{problem_list(reader.problems)}\n"
            f"{_INSTEAD}."
        )
    return StoredQuantization(method, scheme_of)


class _Problems:
    """A quantization_config and what is wrong with it."""

    def __init__(self, given: Mapping[str, Any]):
        self.given, self.problems = given, list[str]()

    def value(self, key: str, default: Any, allowed: Iterable[Any]) -> Any:
        """Return the value of a key, one of those allowed."""
        value = self.given.get(key)
        value = default if value is None else value
        choices = list(allowed)
        if not any(type(value) is type(one) and value == one for one in choices):
            shown = ", ".join(map(str, choices))
            self.problems.append(f"{key} is {printable(repr(value), 80)}; supported: {shown}")
            return choices[0]
        return value

    def group_size(self, key: str = "group_size", given: Mapping[str, Any] | None = None) -> int:
        """Return the group size; 0 for one scale of each row, which GPTQ writes as -1."""
        size = (self.given if given is None else given).get(key)
        if type(size) is not int or not (size == -1 or (0 < size < 2**31 and size % 2 == 0)):
            self.problems.append(f"{key} is {printable(repr(size), 80)}; supported: -1, or an even number")
            return 0
        return max(size, 0)

    def names(self, key: str) -> list[str]:
        """Return a list of names or patterns."""
        names = self.given.get(key)
        names = [] if names is None else names
        if not isinstance(names, list) or len(names) > _MAX_PATTERNS or not all(isinstance(name, str) for name in names):
            self.problems.append(f"{key} is {printable(repr(names), 80)}; it must be a list of names")
            return []
        return names

    def pattern(self, text: str) -> re.Pattern[str]:
        try:
            return re.compile(text)
        except re.error as error:
            self.problems.append(f"{printable(repr(text), 80)} is not a regular expression: {error}")
            return re.compile(r"$.^")


def _fp8(reader: _Problems) -> SchemeOf:
    block = reader.given.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(type(size) is int and size > 0 for size in block)):
        shown = printable(repr(block), 80)
        reader.problems.append(f"FP8 needs weight_block_size as two positive integers, found {shown}")
        block = [128, 128]
    scheme = Scheme("fp8", 8, block=(block[0], block[1]))
    return lambda name: scheme  # the scales on disk decide; the lists of names differ in their prefixes


def _gptq(reader: _Problems) -> SchemeOf:
    bits, symmetric = reader.value("bits", None, (4, 8)), reader.value("sym", True, (True, False))
    desc_act = reader.value("desc_act", False, (False, True))
    group = reader.group_size()
    version = reader.value("checkpoint_format", "gptq", ("gptq", "gptq_v2"))
    quantizer = str((reader.given.get("meta") or {}).get("quantizer"))
    if version == "gptq" and not symmetric and "gptqmodel" not in quantizer:
        reader.problems.append(
            "sym is false with checkpoint_format gptq: in such files of older tools zero points overflow; convert it to "
            "gptq_v2 with GPTQModel"
        )
    scheme = Scheme("gptq", bits, group, symmetric, desc_act, zero_offset=1 if version == "gptq" else 0)
    rules: list[tuple[re.Pattern[str], Scheme | None]] = []
    dynamic = reader.given.get("dynamic") or {}
    if not isinstance(dynamic, dict) or len(dynamic) > _MAX_PATTERNS:
        reader.problems.append(f"dynamic is {printable(repr(dynamic), 80)}; it must be an object")
        dynamic = {}
    for text, given in dynamic.items():
        pattern = reader.pattern(text.removeprefix("-:").removeprefix("+:"))
        overrides = None if text.startswith("-:") else _gptq_override(reader, text, given, scheme)
        rules.append((pattern, overrides))

    def scheme_of(name: str) -> Scheme | None:
        return next((one for pattern, one in rules if pattern.match(name)), scheme)

    return scheme_of


def _gptq_override(reader: _Problems, text: str, given: Any, scheme: Scheme) -> Scheme:
    """Return the scheme of the layers that a rule of `dynamic` matches."""
    known = {"bits", "group_size", "sym", "desc_act"}
    if not isinstance(given, dict):
        reader.problems.append(f"dynamic has {printable(repr(given), 80)} for {printable(text, 80)}; it must be an object")
        return scheme
    inner = _Problems(given)
    changes: dict[str, Any] = {}
    if "bits" in given:
        changes["bits"] = inner.value("bits", None, (4, 8))
    if "group_size" in given:
        changes["group_size"] = inner.group_size()
    if "sym" in given:
        changes["is_symmetric"] = inner.value("sym", True, (True, False))
    if "desc_act" in given:
        changes["has_group_index"] = inner.value("desc_act", False, (True, False))
    harmless = {"mse", "damp_percent", "static_groups", "act_group_aware"}
    if unknown := sorted(set(given) - known - harmless):
        inner.problems.append(f"keys {printable(', '.join(unknown), 80)} are not known")
    reader.problems += [f"dynamic, {printable(text, 80)}: {problem}" for problem in inner.problems]
    return dataclasses.replace(scheme, **changes)


def _awq(reader: _Problems) -> SchemeOf:
    bits = reader.value("bits", reader.given.get("w_bit"), (4,))
    reader.value("version", "gemm", ("gemm", "GEMM"))
    reader.value("zero_point", True, (True,))
    key = "group_size" if "group_size" in reader.given else "q_group_size"
    scheme = Scheme("awq", bits, reader.group_size(key), is_symmetric=False)
    kept = reader.names("modules_to_not_convert")

    def scheme_of(name: str) -> Scheme | None:
        # transformers and AutoAWQ leave out what has one of these in its name.
        return None if any(one in name for one in kept) else scheme

    return scheme_of


_CT_FORMATS = ("pack-quantized", "int-quantized", "float-quantized")


def _compressed_tensors(reader: _Problems) -> SchemeOf:
    given = reader.given
    reader.value("quantization_status", "compressed", ("compressed",))
    for key, why in {
        "transform_config": "the weights are rotated",
        "kv_cache_scheme": "scales of the KV cache are not supported; use a checkpoint without them",
    }.items():
        if given.get(key):
            reader.problems.append(f"{key} is set: {why}")
    sparsity = given.get("sparsity_config") or {}
    if isinstance(sparsity, dict) and sparsity.get("format") not in (None, "dense"):
        reader.problems.append(f"sparsity_config has format {printable(repr(sparsity.get('format')), 80)}")
    groups = given.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        reader.problems.append(f"config_groups is {printable(repr(groups), 80)}; it must be an object")
        groups = {}
    rules: list[tuple[list[str], Scheme]] = []
    for name, group in groups.items():
        inner = _Problems(group if isinstance(group, dict) else {})
        scheme, targets = _ct_scheme(inner, given.get("format")), inner.names("targets")
        reader.problems += [f"{printable(name, 80)}: {problem}" for problem in inner.problems]
        rules.append((targets, scheme))
    texts = [text for targets, _ in rules for text in targets] + reader.names("ignore")
    patterns = {text: reader.pattern(text.removeprefix("re:")) for text in texts if text.startswith("re:")}

    def is_named(name: str, texts: Iterable[str]) -> bool:
        return any(patterns[one].match(name) if one in patterns else one == name for one in texts)

    def scheme_of(name: str) -> Scheme | None:
        if is_named(name, reader.names("ignore")):
            return None
        named = [scheme for targets, scheme in rules if is_named(name, targets)]
        return next(iter(named + [scheme for targets, scheme in rules if "Linear" in targets]), None)

    return scheme_of


def _ct_scheme(reader: _Problems, default_format: Any) -> Scheme:
    """Read how the weights of one of the config_groups are packed."""
    weights = reader.given.get("weights")
    inner = _Problems(weights if isinstance(weights, dict) else {})
    form = reader.given.get("format") or default_format
    if form not in _CT_FORMATS:
        inner.problems.append(f"format is {printable(repr(form), 80)}; supported: {', '.join(_CT_FORMATS)}")
        form = _CT_FORMATS[0]
    is_float = form == "float-quantized"
    inner.value("type", "int", ("float",) if is_float else ("int",))
    bits = inner.value("num_bits", 8, (8,) if is_float else (4, 8))
    symmetric = inner.value("symmetric", True, (True,) if is_float else (True, False))
    inner.value("dynamic", False, (False,))
    group_given = weights.get("group_size") if isinstance(weights, dict) else None
    strategy = inner.value("strategy", "tensor" if group_given is None else "group", ("channel", "group"))
    group = inner.group_size() if strategy == "group" else 0
    act_order = inner.value("actorder", "none", ("none", "weight", "static", "group", "dynamic", True, False))
    reader.problems += [f"weights: {problem}" for problem in inner.problems]
    has_index = act_order in ("group", "dynamic", True)
    return Scheme(form, bits, group, symmetric, has_index)


def is_packed_by_rule(stored: StoredQuantization, layer: str) -> bool:
    """Return whether a checkpoint with this configuration has the weight of a layer packed, without looking at it."""
    return not is_not_converted(layer) and stored.scheme_of(layer) is not None


# Tensors of packed weights that are not parameters.
_BESIDE = re.compile(
    r"(^|\.)(scales|qzeros|g_idx|input_scale|weight_(scale|scale_inv|zero_point|shape|g_idx))$|_scale_inv$"
)


def count_values(stored: StoredQuantization | None, name: str, num_elements: int) -> int:
    """Return how many parameters a tensor with this name on disk holds."""
    if _BESIDE.search(name):
        return 0
    layer, _, leaf = name.rpartition(".")
    if stored is None or leaf not in ("qweight", "weight_packed"):
        return num_elements
    scheme = stored.scheme_of(layer)
    return num_elements * (1 if scheme is None else 32 // scheme.bits)

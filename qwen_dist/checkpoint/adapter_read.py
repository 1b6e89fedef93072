"""Read an adapter in PEFT's layout, of any kind that is a change of the weights, into a list of updates.

PEFT's tensor names are those of the checkpoint with a prefix. The module `….q_proj` has `lora_A.weight` [R, in] and
`lora_B.weight` [out, R], and with DoRA `lora_magnitude_vector`; an embedding has `lora_embedding_A` [R, vocabulary] and
`lora_embedding_B` [out, R]. A name without such an ending is that of a parameter that was trained whole. Experts are either
named one by one (`experts.3.up_proj`, of transformers 4) or stacked (see `checkpoint.adapter`).
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qwen_dist.checkpoint.adapter import EXPERT_PARAMETERS, PEFT_PREFIX, WEIGHTS_NAME, Adapter, base_weight_name
from qwen_dist.checkpoint.adapter_config import (
    CONFIG_NAME,
    AdapterConfig,
    names_module,
    raise_problems,
    read_adapter_config,
    scale,
)
from qwen_dist.checkpoint.adapter_merge import Update
from qwen_dist.checkpoint.names import PREFIXES
from qwen_dist.checkpoint.source import read_header
from qwen_dist.errors import printable
from qwen_dist.storage.files import LocalFile
from qwen_dist.storage.hub import HUB_ID
from qwen_dist.storage.model_files import ModelFiles

_PICKLE_NAME = "adapter_model.bin"
_DTYPES = ("F16", "BF16", "F32", "F64")
_ROLE = re.compile(
    r"(?P<module>.+)\.(?P<role>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_magnitude_vector|lora_embedding_A|"
    r"lora_embedding_B|token_adapter\.trainable_tokens_delta)(?:(?<=_vector)\.weight)?"
)
_STACK = re.compile(r".*\.experts(\.base_layer)?")
_ONE_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d{1,5})\.(?P<projection>gate_proj|up_proj|down_proj)")
_MAX_EXPERTS = 4096
_A, _B, _B_BIAS, _MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector"
_EMBEDDING_A, _EMBEDDING_B, _ROWS = "lora_embedding_A", "lora_embedding_B", "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class PeftAdapter:
    """An adapter that was read: its changes of the weights, in the order in which they apply."""

    config: AdapterConfig
    updates: tuple[Update, ...]

    def to_lora(self) -> Adapter:
        """Return the matrices, to train them further or to use them unmerged.

        Raises:
          CheckpointError: it is more than LoRA of one rank and scale on layers of the blocks.
        """
        config, problems = self.config, []
        for update in self.updates:
            is_plain = update.kind == "lora" and update.layer.startswith("layers.") and not update.names_experts
            if not is_plain:
                problems.append(f"{update.layer}: {describe(update)} can only be merged")
            elif update.rank != config.rank or update.tensors["scale"] != scale(config.rank, config.alpha, config.rslora):
                problems.append(f"{update.layer}: its rank or alpha differs from the others, so it can only be merged")
        if problems:
            what = (
                "the adapter can neither be trained further nor used unmerged, as quantised weights need it; merge it with "
                "`qwen-dist export --adapter` first"
            )
            raise_problems(what, problems)
        arrays = {
            f"{update.layer}.lora_{side}.weight": update.tensors[side.lower()] for update in self.updates for side in "AB"
        }
        return Adapter(config.rank, config.alpha, config.rslora, arrays)


def describe(update: Update) -> str:
    """Return what an update is that can only be merged, for messages."""
    kinds = {
        "weight": "a parameter that was trained whole",
        "rows": "trained token embeddings",
        "bias": "a bias of the adapter",
        "lora": "LoRA of an embedding, a head, or experts named one by one",
        "pissa": "PiSSA",
        "olora": "OLoRA",
    }
    return kinds.get(update.kind, "DoRA")


def read_adapter(directory: str | os.PathLike[str], ignored_keys: Iterable[str] = ()) -> PeftAdapter:
    """Read an adapter from a directory in PEFT's layout.

    Args:
      directory: a local directory, or a hub id, which is downloaded to the hub's cache.
      ignored_keys: keys of its configuration that the user vouches for.

    Raises:
      CheckpointError: files are missing or damaged, or it is not a change of the weights that is known; one message lists
        every problem.
    """
    path = _local_directory(directory)
    _check_files(path)
    config = read_adapter_config(path, ignored_keys)
    reader = _Reader(config, _read_arrays(path / WEIGHTS_NAME))
    updates = reader.updates()
    problems = reader.problems
    if not updates and not problems:
        problems.append(f"{WEIGHTS_NAME} has no tensors")
    if problems:
        raise_problems(f"the adapter {printable(path)} cannot be used", problems)
    return PeftAdapter(config, tuple(updates))


def _local_directory(adapter: str | os.PathLike[str]) -> Path:
    path = Path(adapter)
    is_on_hub = HUB_ID.fullmatch(os.fspath(adapter)) and not os.path.lexists(path)
    return ModelFiles.open(adapter).directory() if is_on_hub else path


def _check_files(path: Path) -> None:
    problems = []
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        try:
            if not stat.S_ISREG(os.stat(path / name).st_mode):
                problems.append(f"{name} is not a regular file")
        except (OSError, ValueError):  # ValueError: a NUL in the name
            problems.append(f"it has no {name}")
    if WEIGHTS_NAME in " ".join(problems) and (path / _PICKLE_NAME).is_file():
        problems.append(
            f"{_PICKLE_NAME} is a pickle, which can run code when it is opened, so it is not read; where you trust it, "
            f"load it with peft and write it again with save_pretrained, which makes {WEIGHTS_NAME}"
        )
    if problems:
        raise_problems(f"{printable(path)} is not the directory of an adapter in PEFT's layout", problems)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    file = LocalFile(path)
    header, arrays, problems = read_header(file), {}, []
    for name, info in header.tensors.items():
        if info.dtype.name not in _DTYPES:
            problems.append(f"{name} is of type {info.dtype.name}; it must be one of {', '.join(_DTYPES)}")
            continue
        assert info.dtype.numpy is not None
        array = np.empty(info.shape, info.dtype.numpy)
        if array.size:
            file.read_into(info.begin, memoryview(array.reshape(-1).view(np.uint8).data))
        if not array.size or not np.isfinite(array).all():
            problems.append(f"{name} {list(info.shape)} {'has NaN or infinite values' if array.size else 'is empty'}")
        arrays[name] = array
    if problems:
        raise_problems(f"{printable(path)} cannot be used", problems)
    return arrays


class _Reader:
    """Groups the tensors by module; collects problems instead of raising at the first."""

    def __init__(self, config: AdapterConfig, arrays: Mapping[str, np.ndarray]):
        self.config = config
        self.problems: list[str] = []
        self.modules: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
        self.whole: dict[str, np.ndarray] = {}
        for stored, array in arrays.items():
            name = stored.removeprefix(PEFT_PREFIX)
            if match := _ROLE.fullmatch(name):
                self.modules[match["module"]][match["role"]] = array
            else:
                self.whole[name] = array

    def updates(self) -> list[Update]:
        """Return all updates, those of whole parameters first."""
        updates = [self._whole_parameter(name, value) for name, value in self.whole.items()]
        experts: dict[str, dict[tuple[int, str], _Matrices]] = defaultdict(dict)
        for module, tensors in self.modules.items():
            match = _ONE_EXPERT.fullmatch(module)
            if match is None:
                updates += self._module(module, tensors)
            elif matrices := self._matrices(module, module, tensors):
                stack = EXPERT_PARAMETERS[match["projection"] == "down_proj"]
                experts[f"{match['experts']}.lora.{stack}"][int(match["index"]), match["projection"]] = matrices
        for layer, by_expert in experts.items():
            updates += self._named_experts(_without_prefix(layer), by_expert)
        self._check_expected()
        counts = Counter((update.parameter, update.kind) for update in updates)
        self.problems += [f"{name} is changed by several tensors" for (name, _), count in counts.items() if count > 1]
        return updates

    def _whole_parameter(self, name: str, value: np.ndarray) -> Update:
        if "lora_" in name or "token_adapter" in name:
            self.problems.append(f"{name} is not a known part of an adapter")
        is_base = ".base_layer.weight" in name
        parameter = _without_prefix(name.replace(".base_layer.", ".").replace(".modules_to_save.", "."))
        return Update(parameter, parameter, "weight", {"value": value}, is_base=is_base)

    def _module(self, module: str, tensors: Mapping[str, np.ndarray]) -> Iterator[Update]:
        layer = _without_prefix(module)
        if _ROWS in tensors:
            yield from self._token_rows(module, layer, tensors[_ROWS])
            if len(tensors) == 1:
                return
        stack = self._stack(module) if _STACK.fullmatch(module) else ""
        if stack:
            module = module.removesuffix(".base_layer")
            layer = f"{_without_prefix(module)}.lora.{stack}"
        matrices = self._matrices(module, f"{module}.{stack}" if stack else module, tensors)
        if matrices is None:
            return
        if stack and (self.config.base_change or self.config.dora or matrices.bias is not None):
            self.problems.append(f"{module}: PEFT has only plain LoRA for stacked experts")
        elif stack:
            yield Update(layer, base_weight_name(layer), "lora", _split_experts(matrices), matrices.rank)
        else:
            yield from self._linear(layer, matrices)

    def _linear(self, layer: str, matrices: _Matrices) -> Iterator[Update]:
        name, scale = base_weight_name(layer), np.asarray(matrices.scale)
        tensors = {"a": matrices.a, "b": matrices.b, "scale": scale}
        if self.config.base_change:
            if matrices.is_embedding:
                self.problems.append(f"{layer}: PEFT has no {self.config.base_change} for embeddings")
            yield Update(layer, name, self.config.base_change, tensors, matrices.rank)
        if matrices.magnitude is None:
            yield Update(layer, name, "lora", tensors, matrices.rank)
        else:
            kind = "dora_embedding" if matrices.is_embedding else "dora"
            yield Update(layer, name, kind, tensors | {"magnitude": matrices.magnitude}, matrices.rank)
        if matrices.bias is not None:
            yield Update(f"{layer}.lora_B.bias", f"{layer}.bias", "bias", {"value": matrices.bias, "scale": scale})

    def _stack(self, module: str) -> str:
        """Return which matrices of the experts these tensors are for: the inner ones are the first that have an adapter."""
        experts, targets = module.removesuffix(".base_layer"), self.config.target_parameters
        stacks = [stack for stack in EXPERT_PARAMETERS if any(names_module(name, f"{experts}.{stack}") for name in targets)]
        if not stacks:
            self.problems.append(f"{module}: target_parameters does not say which matrices of the experts these are for")
            return EXPERT_PARAMETERS[0]
        return stacks[0 if module.endswith(".base_layer") else -1]

    def _matrices(self, module: str, key: str, tensors: Mapping[str, np.ndarray]) -> _Matrices | None:
        """Return the matrices of a module, or None after a problem. `key` is the name that patterns match."""
        is_embedding = _EMBEDDING_A in tensors or _EMBEDDING_B in tensors
        sides = (_EMBEDDING_A, _EMBEDDING_B) if is_embedding else (_A, _B)
        optional = {_MAGNITUDE: self.config.dora, _B_BIAS: self.config.lora_bias and not is_embedding}
        wanted = {*sides, *(name for name, is_wanted in optional.items() if is_wanted)}
        found = tensors.keys() - {_ROWS}
        problems = [f"{module}.{name} is missing" for name in sorted(wanted - found)]
        problems += [f"{module}.{name} is not a part of what {CONFIG_NAME} describes" for name in sorted(found - wanted)]
        rank = self.config.rank_of(key)
        stacked = _STACK.fullmatch(module) is not None
        for name, rank_dim in zip(sides, (0, -1), strict=True):
            shape = tensors[name].shape if name in tensors else (rank, rank)
            if len(shape) != 2 or (shape[rank_dim] % rank if stacked else shape[rank_dim] != rank):
                problems.append(f"{module}.{name} has shape {list(shape)}, which does not fit rank {rank}")
        if not problems:
            a, b = tensors[sides[0]], tensors[sides[1]]
            if a.shape[0] != b.shape[1]:
                problems.append(f"{module} has matrices {list(a.shape)} and {list(b.shape)} of different rank")
            for name in wanted - {*sides}:
                if (shape := tensors[name].shape) != b.shape[:1]:
                    problems.append(f"{module}.{name} has shape {list(shape)}, but must have {list(b.shape[:1])}")
        self.problems += problems
        if problems:
            return None
        a, b = (b.T, a.T) if is_embedding else (a, b)
        return _Matrices(a, b, rank, self.config.scale_of(key), tensors.get(_MAGNITUDE), tensors.get(_B_BIAS), is_embedding)

    def _token_rows(self, module: str, layer: str, values: np.ndarray) -> Iterator[Update]:
        rows = self.config.tokens_of(module)
        if values.ndim != 2 or len(values) != len(rows):
            found = f"{module}.{_ROWS} has shape {list(values.shape)}"
            self.problems.append(f"{found}, but trainable_token_indices names {len(rows)} tokens")
        else:
            yield Update(layer, base_weight_name(layer), "rows", {"value": values, "rows": np.array(rows, np.int32)})

    def _named_experts(self, layer: str, by_expert: Mapping[tuple[int, str], _Matrices]) -> Iterator[Update]:
        if self.config.base_change or any(matrices.bias is not None for matrices in by_expert.values()):
            self.problems.append(f"{layer}: only LoRA and DoRA of experts are supported")
            return
        sizes = {(len(matrices.b), matrices.a.shape[1]) for matrices in by_expert.values()}
        if len(sizes) > 1 or max(index for index, _ in by_expert) >= _MAX_EXPERTS:
            self.problems.append(f"{layer}: its experts' matrices differ in size, or are more than {_MAX_EXPERTS}")
            return
        tensors = _stack_experts(by_expert, layer.endswith("down_proj"))
        kind = "dora" if "magnitude" in tensors else "lora"
        yield Update(layer, base_weight_name(layer), kind, tensors, names_experts=True)

    def _check_expected(self) -> None:
        """Add a problem for each module that the configuration names but that has no tensors."""
        for name in self.config.modules_to_save:
            if not any(f".{name}." in f".{stored}" for stored in self.whole):
                self.problems.append(f"modules_to_save names {name}, but there is no tensor of it")
        for name in self.config.token_indices:
            if not any(names_module(name, module) and _ROWS in tensors for module, tensors in self.modules.items()):
                self.problems.append(f"trainable_token_indices names {name}, but there is no tensor of it")


@dataclass(frozen=True)
class _Matrices:
    """A [R, in] and B [out, R] of one module, as they are added to a weight [out, in]."""

    a: np.ndarray
    b: np.ndarray
    rank: int
    scale: float
    magnitude: np.ndarray | None = None
    bias: np.ndarray | None = None
    is_embedding: bool = False


def _without_prefix(name: str) -> str:
    for prefix in sorted({prefix for pair in PREFIXES for prefix in pair}, key=len, reverse=True):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _split_experts(matrices: _Matrices) -> dict[str, np.ndarray]:
    """Return A [E, R, in] and B [E, out, R] of matrices [E*R, in] and [out, R*E]."""
    a = matrices.a.reshape(-1, matrices.rank, matrices.a.shape[1])
    b = matrices.b.reshape(len(matrices.b), matrices.rank, -1).transpose(2, 0, 1)
    return {"a": a, "b": b, "scale": np.asarray(matrices.scale)}


def _stack_experts(by_expert: Mapping[tuple[int, str], _Matrices], is_down: bool) -> dict[str, np.ndarray]:
    """Return the tensors of an update of stacked experts; gate and up share a stack, each with its own ranks.

    B is block-diagonal, as the rows of gate_proj and up_proj have different A. What an expert lacks is zero.
    """
    projections = ("down_proj",) if is_down else ("gate_proj", "up_proj")
    first = next(iter(by_expert.values()))
    outputs, inputs = len(first.b), first.a.shape[1]
    num_experts, rank = 1 + max(index for index, _ in by_expert), max(matrices.rank for matrices in by_expert.values())
    dtype = np.result_type(*(side.dtype for matrices in by_expert.values() for side in (matrices.a, matrices.b)))
    a = np.zeros((num_experts, len(projections) * rank, inputs), dtype)
    b = np.zeros((num_experts, len(projections) * outputs, len(projections) * rank), dtype)
    scale = np.zeros((num_experts, b.shape[1], 1))
    magnitude = np.full(b.shape[:2], np.nan, np.float32)
    for (index, projection), matrices in by_expert.items():
        place = projections.index(projection)
        rows, start = slice(place * outputs, (place + 1) * outputs), place * rank
        a[index, start : start + matrices.rank] = matrices.a
        b[index, rows, start : start + matrices.rank] = matrices.b
        scale[index, rows] = matrices.scale
        if matrices.magnitude is not None:
            magnitude[index, rows] = matrices.magnitude
    tensors = {"a": a, "b": b, "scale": scale}
    if first.magnitude is not None:
        tensors["magnitude"] = magnitude
    return tensors

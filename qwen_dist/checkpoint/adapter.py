"""LoRA adapters in PEFT's layout: a directory with `adapter_config.json` and `adapter_model.safetensors`.

PEFT's tensor names are this project's names with a prefix: `base_model.model.` and the checkpoint's prefix, usually
`model.`. PEFT's `target_parameters` are the stacked expert matrices of a mixture of experts. PEFT stores the adapters of
all experts of a layer in two matrices: A [E*R, in], one expert after the other, and B [out, R*E], expert index last. If
both `gate_up_proj` and `down_proj` of a layer have an adapter, that of `gate_up_proj` is stored under `base_layer`:
`experts.base_layer.lora_A.weight`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwen_dist.checkpoint.names import PREFIXES
from qwen_dist.checkpoint.save import keep_other_files
from qwen_dist.checkpoint.sync import sync_processes
from qwen_dist.errors import CheckpointError
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.sharding import ShardingContext

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PEFT = "base_model.model."
# Settings that change the computation; any other value is refused.
_REQUIRED_CONFIG = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False}
_UNSUPPORTED_KEYS = (
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
)
_NAME = re.compile(r"(layers\.\d+\.[\w.]+)\.(lora_[AB])\.weight")
_EXPERT_NAME = re.compile(r"(.*\.experts)\.(base_layer\.)?(lora_[AB]\.weight)")
_EXPERT_PARAMETERS = "gate_up_proj", "down_proj"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The matrices of an adapter: `layers.0.self_attn.q_proj.lora_A.weight` [R, in] and `….lora_B.weight` [out, R].

    Matrices of experts have three dimensions: `layers.0.mlp.experts.lora.down_proj.lora_A.weight` [E, R, in] and
    `….lora_B.weight` [E, out, R].
    """

    rank: int
    alpha: float
    rslora: bool
    arrays: Mapping[str, np.ndarray]

    @property
    def scale(self) -> float:
        """The factor of B A: alpha / R, or alpha / sqrt(R) for rsLoRA (arXiv:2312.03732)."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def layers(self) -> list[str]:
        """Names of the linear layers and expert stacks that have an adapter."""
        return [name.removesuffix(".lora_A.weight") for name in self.arrays if name.endswith(".lora_A.weight")]


def base_weight_name(layer: str) -> str:
    """Return the name of the parameter that this layer's adapter is added to."""
    return layer.replace(".experts.lora.", ".experts.") if ".experts.lora." in layer else f"{layer}.weight"


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """Read an adapter from a directory in PEFT's layout.

    Raises:
      CheckpointError: files or matrices are missing, or the adapter is not plain LoRA; one message lists every problem.
    """
    path = Path(directory)
    missing = [name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (path / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{path} has no {' and no '.join(missing)}; give the directory of an adapter in PEFT's layout."
        )
    try:
        config = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        rank, alpha, rslora = int(config["r"]), float(config["lora_alpha"]), bool(config.get("use_rslora", False))
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / CONFIG_NAME} cannot be used: {type(error).__name__}: {error}") from None
    problems = [
        f"{key} is {config[key]!r}, but only {value!r} is supported"
        for key, value in _REQUIRED_CONFIG.items()
        if config.get(key, value) != value
    ]
    problems += [f"{key} is {config[key]!r}, but must be empty" for key in _UNSUPPORTED_KEYS if config.get(key)]
    targets = config.get("target_parameters") or ()
    stacks = [stack for stack in _EXPERT_PARAMETERS if any(name.endswith(stack) for name in targets)]
    arrays = {}
    for stored, array in _read_arrays(path / WEIGHTS_NAME).items():
        name = _parameter_name(stored, stacks)
        rank_dim = array.shape[0 if "lora_A" in stored else -1]
        if name is None:
            problems.append(f"{stored} is not an adapter of a linear layer of a block")
        elif array.ndim != 2 or (rank_dim % rank if ".experts." in name else rank_dim != rank):
            problems.append(f"{stored} has shape {list(array.shape)}, which does not fit rank {rank}")
        else:
            arrays[name] = _split_experts(name, array, rank) if ".experts.lora." in name else array
    others = {name.replace("lora_A", "lora_B") if "lora_A" in name else name.replace("lora_B", "lora_A") for name in arrays}
    problems += [f"{name} is missing" for name in sorted(others - arrays.keys())]
    if problems or not arrays:
        raise CheckpointError(f"the adapter {path} cannot be used:\n  - " + "\n  - ".join(problems or ["it is empty"]))
    return Adapter(rank, alpha, rslora, arrays)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    import safetensors.numpy

    try:
        return safetensors.numpy.load_file(path)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def _parameter_name(stored: str, stacks: Sequence[str]) -> str | None:
    name = stored.removeprefix(_PEFT)
    prefix = max((prefix for prefix, _ in PREFIXES if name.startswith(prefix)), key=len)
    name = name.removeprefix(prefix)
    if stacks and (match := _EXPERT_NAME.fullmatch(name)):
        name = f"{match[1]}.lora.{stacks[0 if match[2] else -1]}.{match[3]}"
    return name if _NAME.fullmatch(name) else None


def _peft_name(name: str, adapter: Adapter) -> str:
    experts, is_of_experts, rest = name.partition(".experts.lora.")
    if not is_of_experts:
        return name
    stack, _, side = rest.partition(".")
    is_inner = stack == _EXPERT_PARAMETERS[0] and f"{experts}.experts.lora.{_EXPERT_PARAMETERS[1]}" in adapter.layers
    return f"{experts}.experts.{'base_layer.' if is_inner else ''}{side}"


def _split_experts(name: str, matrix: np.ndarray, rank: int) -> np.ndarray:
    """Return the matrices as one per expert: [E, R, in] or [E, out, R]."""
    if ".lora_A." in name:
        return matrix.reshape(-1, rank, matrix.shape[1])
    return matrix.reshape(len(matrix), rank, -1).transpose(2, 0, 1)


def _merge_experts(name: str, stack: np.ndarray) -> np.ndarray:
    """Undo `_split_experts`; return a two-dimensional matrix unchanged."""
    if stack.ndim == 2:
        return stack
    stack = stack if ".lora_A." in name else stack.transpose(1, 2, 0)
    return stack.reshape(-1, stack.shape[-1]) if ".lora_A." in name else stack.reshape(len(stack), -1)


def write_adapter(directory: str | os.PathLike[str], adapter: Adapter, *, base: str, prefix: str = PREFIXES[0][0]) -> None:
    """Write an adapter in PEFT's layout, first to a temporary directory that then takes the name `directory`.

    Args:
      directory: the output; with several processes, only the first writes.
      adapter: the adapter to write.
      base: the location of the checkpoint it belongs to, for `base_model_name_or_path`.
      prefix: prefix of that checkpoint's tensor names.

    Raises:
      CheckpointError: the directory cannot be written.
    """
    import safetensors.numpy

    target = Path(os.path.abspath(directory))
    staging = target.with_name(f".{target.name}.saving")
    with sync_processes("saving the adapter"):
        if jax.process_index() > 0:
            return
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            arrays = {
                f"{_PEFT}{prefix}{_peft_name(name, adapter)}": np.ascontiguousarray(_merge_experts(name, array))
                for name, array in adapter.arrays.items()
            }
            safetensors.numpy.save_file(arrays, staging / WEIGHTS_NAME, metadata={"format": "pt"})
            (staging / CONFIG_NAME).write_text(json.dumps(_peft_config(adapter, base, prefix), indent=2) + "\n")
            if target.exists():
                keep_other_files(target, staging)  # such as a model card
                shutil.rmtree(target)
            staging.rename(target)
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error.strerror or error}.") from error


def _peft_config(adapter: Adapter, base: str, prefix: str) -> dict[str, Any]:
    rank_and_alpha = {"r": adapter.rank, "lora_alpha": adapter.alpha, "use_rslora": adapter.rslora, "lora_dropout": 0.0}
    return {
        **_REQUIRED_CONFIG,
        **rank_and_alpha,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "target_modules": sorted(prefix + name for name in adapter.layers if ".experts.lora." not in name),
        "target_parameters": sorted(prefix + base_weight_name(name) for name in adapter.layers if ".experts.lora." in name),
    }


def merge_adapter(
    parameters: Mapping[str, jax.Array], adapter: Adapter, sharding_ctx: ShardingContext
) -> dict[str, jax.Array]:
    """Return the parameters with the adapter added to the weights: W + scale · B A, rounded once to the weights' dtype.

    The arrays of layers that have an adapter are donated. Raises CheckpointError when the adapter does not fit.
    """
    check_fits(adapter, {name: array.shape for name, array in parameters.items()})
    merged = dict(parameters)
    for layer in adapter.layers:
        name = base_weight_name(layer)
        b, a = sharding_ctx.replicate([adapter.arrays[f"{layer}.lora_{side}.weight"] for side in "BA"])
        merged[name] = _merge_fn(merged[name].sharding)(merged[name], b, a, adapter.scale)
    return merged


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointError listing the adapter's layers that the model lacks or has in another shape."""
    problems = []
    for layer in adapter.layers:
        shape = shapes.get(base_weight_name(layer))
        b, a = (adapter.arrays[f"{layer}.lora_{side}.weight"].shape for side in "BA")
        if shape is None:
            problems.append(f"the model has no linear layer {layer}")
        elif math.prod(shape) != math.prod(b[:-1]) * a[-1] or a[:-2] != b[:-2]:
            problems.append(f"{layer} has shape {list(shape)}, but the adapter's product has {[*b[:-1], a[-1]]}")
    if problems:
        raise CheckpointError("the adapter does not fit the model:\n  - " + "\n  - ".join(problems))


@functools.lru_cache
def _merge_fn(sharding: jax.sharding.Sharding) -> Any:
    def add(weight: jax.Array, b: jax.Array, a: jax.Array, scale: jax.Array) -> jax.Array:
        wide = accum_dtype(weight.dtype)
        product = jnp.asarray(scale, wide) * (b.astype(wide) @ a.astype(wide))
        return (weight.astype(wide) + product.reshape(weight.shape)).astype(weight.dtype)

    return jax.jit(add, donate_argnums=0, out_shardings=sharding)

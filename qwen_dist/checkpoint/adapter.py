"""Low-rank adapters in PEFT's layout: a directory with `adapter_config.json` and `adapter_model.safetensors`.

PEFT's names are this project's behind a prefix: `base_model.model.` and that of the checkpoint, mostly `model.`. Its
`target_parameters` are the matrices of a mixture's experts, whose adapters it puts together: A [E*R, in] expert by expert,
and B [out, R*E] with the experts side by side. Where both stacks of a layer have one, that of `gate_up_proj` is the inner
one: `experts.base_layer.lora_A.weight`.
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

from qwen_dist.checkpoint.agree import together
from qwen_dist.checkpoint.mapping import PREFIXES
from qwen_dist.errors import CheckpointError
from qwen_dist.ops.matmul import accum_dtype
from qwen_dist.sharding import ShardingContext

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PEFT = "base_model.model."
# What would change the computation if it were anything else.
_ONLY = {"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False}
_EMPTY = (
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "trainable_token_indices",
)
_NAME = re.compile(r"(layers\.\d+\.[\w.]+)\.(lora_[AB])\.weight")
_OF_EXPERTS = re.compile(r"(.*\.experts)\.(base_layer\.)?(lora_[AB]\.weight)")
_STACKS = "gate_up_proj", "down_proj"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The matrices of an adapter: `layers.0.self_attn.q_proj.lora_A.weight` [R, in] and `….lora_B.weight` [out, R].

    Those of experts have three dimensions: `layers.0.mlp.experts.lora.down_proj.lora_A.weight` [E, R, in] and
    `….lora_B.weight` [E, out, R].
    """

    rank: int
    alpha: float
    rslora: bool
    arrays: Mapping[str, np.ndarray]

    @property
    def scale(self) -> float:
        """By what the contribution is multiplied; rsLoRA (arXiv:2312.03732) divides by the root of the rank."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)

    @property
    def layers(self) -> list[str]:
        """The linear layers and stacks of experts that have an adapter."""
        return [name.removesuffix(".lora_A.weight") for name in self.arrays if name.endswith(".lora_A.weight")]


def weight_of(layer: str) -> str:
    """The parameter that an adapter of this layer belongs to."""
    return layer.replace(".experts.lora.", ".experts.") if ".experts.lora." in layer else f"{layer}.weight"


def read_adapter(directory: str | os.PathLike[str]) -> Adapter:
    """Raises CheckpointError listing everything that is missing or is no plain LoRA."""
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
        f"{key} is {config[key]!r}, and only {value!r} is supported"
        for key, value in _ONLY.items()
        if config.get(key, value) != value
    ]
    problems += [f"{key} is {config[key]!r}, and only none is supported" for key in _EMPTY if config.get(key)]
    stacks = [stack for stack in _STACKS if any(name.endswith(stack) for name in config.get("target_parameters") or ())]
    arrays = {}
    for stored, array in _read_arrays(path / WEIGHTS_NAME).items():
        name = _own_name(stored, stacks)
        of_rank = array.shape[0 if "lora_A" in stored else -1]
        if name is None:
            problems.append(f"{stored} is no adapter of a linear layer of a block")
        elif array.ndim != 2 or (of_rank % rank if ".experts." in name else of_rank != rank):
            problems.append(f"{stored} is {list(array.shape)}, which is not of rank {rank}")
        else:
            arrays[name] = _apart(name, array, rank) if ".experts.lora." in name else array
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


def _own_name(stored: str, stacks: Sequence[str]) -> str | None:
    name = stored.removeprefix(_PEFT)
    prefix = max((prefix for prefix, _ in PREFIXES if name.startswith(prefix)), key=len)
    name = name.removeprefix(prefix)
    if stacks and (match := _OF_EXPERTS.fullmatch(name)):
        name = f"{match[1]}.lora.{stacks[0 if match[2] else -1]}.{match[3]}"
    return name if _NAME.fullmatch(name) else None


def _peft_name(name: str, adapter: Adapter) -> str:
    experts, is_of_experts, rest = name.partition(".experts.lora.")
    if not is_of_experts:
        return name
    stack, _, side = rest.partition(".")
    is_inner = stack == _STACKS[0] and f"{experts}.experts.lora.{_STACKS[1]}" in adapter.layers
    return f"{experts}.experts.{'base_layer.' if is_inner else ''}{side}"


def _apart(name: str, matrix: np.ndarray, rank: int) -> np.ndarray:
    """The matrices of each expert: [E, R, in] or [E, out, R]."""
    if ".lora_A." in name:
        return matrix.reshape(-1, rank, matrix.shape[1])
    return matrix.reshape(len(matrix), rank, -1).transpose(2, 0, 1)


def _together(name: str, stack: np.ndarray) -> np.ndarray:
    """The inverse of `_apart`; what is no stack stays as it is."""
    if stack.ndim == 2:
        return stack
    stack = stack if ".lora_A." in name else stack.transpose(1, 2, 0)
    return stack.reshape(-1, stack.shape[-1]) if ".lora_A." in name else stack.reshape(len(stack), -1)


def write_adapter(directory: str | os.PathLike[str], adapter: Adapter, *, base: str, prefix: str = PREFIXES[0][0]) -> None:
    """Write an adapter as PEFT does; the directory appears, or is replaced, as a whole.

    Args:
      directory: with several processes, only the first writes.
      adapter: what is written.
      base: the checkpoint that it belongs to. prefix: of that checkpoint's names.

    Raises:
      CheckpointError: it cannot be written.
    """
    import safetensors.numpy

    target = Path(os.path.abspath(directory))
    staging = target.with_name(f".{target.name}.saving")
    with together("saving the adapter"):
        if jax.process_index() > 0:
            return
        try:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
            arrays = {
                f"{_PEFT}{prefix}{_peft_name(name, adapter)}": np.ascontiguousarray(_together(name, array))
                for name, array in adapter.arrays.items()
            }
            safetensors.numpy.save_file(arrays, staging / WEIGHTS_NAME, metadata={"format": "pt"})
            (staging / CONFIG_NAME).write_text(json.dumps(_peft_config(adapter, base, prefix), indent=2) + "\n")
            if target.exists():
                shutil.rmtree(target)
            staging.rename(target)
        except OSError as error:
            raise CheckpointError(f"{target} cannot be written: {error.strerror or error}.") from error


def _peft_config(adapter: Adapter, base: str, prefix: str) -> dict[str, Any]:
    rank_and_alpha = {"r": adapter.rank, "lora_alpha": adapter.alpha, "use_rslora": adapter.rslora, "lora_dropout": 0.0}
    return {
        **_ONLY,
        **rank_and_alpha,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "target_modules": sorted(prefix + name for name in adapter.layers if ".experts.lora." not in name),
        "target_parameters": sorted(prefix + weight_of(name) for name in adapter.layers if ".experts.lora." in name),
    }


def merge_adapter(
    parameters: Mapping[str, jax.Array], adapter: Adapter, sharding_ctx: ShardingContext
) -> dict[str, jax.Array]:
    """The parameters with the adapter added to the weights, W + scale · B A, rounded once to the weights' type.

    The arrays of the layers that have an adapter are used up. Raises CheckpointError when the adapter does not fit.
    """
    check_fits(adapter, {name: array.shape for name, array in parameters.items()})
    merged = dict(parameters)
    for layer in adapter.layers:
        name = weight_of(layer)
        b, a = sharding_ctx.replicate([adapter.arrays[f"{layer}.lora_{side}.weight"] for side in "BA"])
        merged[name] = _adder(merged[name].sharding)(merged[name], b, a, adapter.scale)
    return merged


def check_fits(adapter: Adapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError listing the layers that the model does not have, or has in another size."""
    problems = []
    for layer in adapter.layers:
        shape = shapes.get(weight_of(layer))
        b, a = (adapter.arrays[f"{layer}.lora_{side}.weight"].shape for side in "BA")
        if shape is None:
            problems.append(f"the model has no linear layer {layer}")
        elif math.prod(shape) != math.prod(b[:-1]) * a[-1] or a[:-2] != b[:-2]:
            problems.append(f"{layer} is {list(shape)}, and the adapter's product {[*b[:-1], a[-1]]}")
    if problems:
        raise CheckpointError("the adapter is not of this model:\n  - " + "\n  - ".join(problems))


@functools.lru_cache
def _adder(sharding: jax.sharding.Sharding) -> Any:
    def add(weight: jax.Array, b: jax.Array, a: jax.Array, scale: jax.Array) -> jax.Array:
        wide = accum_dtype(weight.dtype)
        product = jnp.asarray(scale, wide) * (b.astype(wide) @ a.astype(wide))
        return (weight.astype(wide) + product.reshape(weight.shape)).astype(weight.dtype)

    return jax.jit(add, donate_argnums=0, out_shardings=sharding)

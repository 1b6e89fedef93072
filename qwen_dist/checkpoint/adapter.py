"""Write LoRA adapters in PEFT's layout: a directory with `adapter_config.json` and `adapter_model.safetensors`.

PEFT's tensor names are this project's names with a prefix: `base_model.model.` and the checkpoint's prefix, usually
`model.`. PEFT's `target_parameters` are the stacked expert matrices of a mixture of experts. PEFT stores the adapters of
all experts of a layer in two matrices: A [E*R, in], one expert after the other, and B [out, R*E], expert index last. If
both `gate_up_proj` and `down_proj` of a layer have an adapter, that of `gate_up_proj` is stored under `base_layer`:
`experts.base_layer.lora_A.weight`.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from qwen_dist.checkpoint.adapter_config import CONFIG_NAME, scale
from qwen_dist.checkpoint.names import PREFIXES
from qwen_dist.checkpoint.sync import sync_processes
from qwen_dist.storage.staging import StagingDirectory, write_errors

WEIGHTS_NAME = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
EXPERT_PARAMETERS = "gate_up_proj", "down_proj"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The matrices of a LoRA adapter that is trained: `layers.0.self_attn.q_proj.lora_A.weight` [R, in] and
    `….lora_B.weight` [out, R].

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
        return scale(self.rank, self.alpha, self.rslora)

    @property
    def layers(self) -> list[str]:
        """Names of the linear layers and expert stacks that have an adapter."""
        return [name.removesuffix(".lora_A.weight") for name in self.arrays if name.endswith(".lora_A.weight")]


def base_weight_name(layer: str) -> str:
    """Return the name of the parameter that this layer's adapter is added to."""
    return layer.replace(".experts.lora.", ".experts.") if ".experts.lora." in layer else f"{layer}.weight"


def _peft_name(name: str, adapter: Adapter) -> str:
    experts, is_of_experts, rest = name.partition(".experts.lora.")
    if not is_of_experts:
        return name
    stack, _, side = rest.partition(".")
    is_inner = stack == EXPERT_PARAMETERS[0] and f"{experts}.experts.lora.{EXPERT_PARAMETERS[1]}" in adapter.layers
    return f"{experts}.experts.{'base_layer.' if is_inner else ''}{side}"


def _merge_experts(name: str, stack: np.ndarray) -> np.ndarray:
    """Return the matrices of all experts as PEFT's one; return a two-dimensional matrix unchanged."""
    if stack.ndim == 2:
        return stack
    stack = stack if ".lora_A." in name else stack.transpose(1, 2, 0)
    return stack.reshape(-1, stack.shape[-1]) if ".lora_A." in name else stack.reshape(len(stack), -1)


def write_adapter(directory: str | os.PathLike[str], adapter: Adapter, *, base: str, prefix: str = PREFIXES[0][0]) -> None:
    """Write an adapter in PEFT's layout; an adapter that is there is replaced as a whole.

    Args:
      directory: the output; with several processes, only the first writes.
      adapter: the adapter to write.
      base: the location of the checkpoint it belongs to, for `base_model_name_or_path`.
      prefix: prefix of that checkpoint's tensor names.

    Raises:
      CheckpointError: the directory cannot be written.
    """
    import safetensors.numpy

    staging = StagingDirectory(directory)
    with sync_processes("saving the adapter"):
        if jax.process_index() > 0:
            return
        with write_errors(staging.target), staging.created():
            arrays = {
                f"{PEFT_PREFIX}{prefix}{_peft_name(name, adapter)}": np.ascontiguousarray(_merge_experts(name, array))
                for name, array in adapter.arrays.items()
            }
            staging.write(WEIGHTS_NAME, safetensors.numpy.save(arrays, metadata={"format": "pt"}))
            staging.write(CONFIG_NAME, (json.dumps(_peft_config(adapter, base, prefix), indent=2) + "\n").encode())
            staging.commit()


def _peft_config(adapter: Adapter, base: str, prefix: str) -> dict[str, Any]:
    rank_and_alpha = {"r": adapter.rank, "lora_alpha": adapter.alpha, "use_rslora": adapter.rslora, "lora_dropout": 0.0}
    return {
        **{"peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "use_dora": False},
        **rank_and_alpha,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
        "target_modules": sorted(prefix + name for name in adapter.layers if ".experts.lora." not in name),
        "target_parameters": sorted(prefix + base_weight_name(name) for name in adapter.layers if ".experts.lora." in name),
    }

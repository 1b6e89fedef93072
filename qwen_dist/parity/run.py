"""The comparison as a tool: load a checkpoint on both sides, ask both the same questions, judge the answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import jax

from qwen_dist.errors import UserError
from qwen_dist.models.config import ModelConfig
from qwen_dist.parity.compare import ParityReport
from qwen_dist.parity.inputs import ParityOptions

__all__ = ["ParityOptions", "run_parity"]


def run_parity(options: ParityOptions, progress: Callable[[str], None] = lambda stage: None) -> ParityReport:
    """Compare this project's model with the `transformers` one; `progress` is told each stage as it begins.

    Raises:
      UserError: torch and transformers are not installed.
      CheckpointError: the checkpoint cannot be used.
      UsageError: the model does not fit the mesh.
    """
    if missing_packages := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"parity compares with PyTorch: {' and '.join(missing_packages)} missing; pip install 'qwen-dist[parity]'"
        )
    from qwen_dist.parity.comparison import Comparison, compare_in_one_dtype
    from qwen_dist.parity.truth import compare_with_truth

    config = ModelConfig.from_directory(options.model)
    # On accelerators a float32 product is rounded to fewer bits unless one asks.
    with jax.enable_x64(options.dtype == "float64"), jax.default_matmul_precision("highest"):
        comparison = Comparison(options, config, progress)
        return (compare_with_truth if options.dtype == "bfloat16" else compare_in_one_dtype)(comparison)

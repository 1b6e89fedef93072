"""The entry point of the comparison: load a checkpoint on both sides, compute the same on both, check the results."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import jax

from qwen_dist.errors import UserError
from qwen_dist.hf_config import read_model_config
from qwen_dist.parity.checks import ParityReport
from qwen_dist.parity.inputs import ParityOptions

__all__ = ["ParityOptions", "run_parity"]


def run_parity(options: ParityOptions, progress: Callable[[str], None] = lambda stage: None) -> ParityReport:
    """Compare this project's model with that of `transformers`.

    Args:
      options: what to compare.
      progress: called with the name of each stage as it starts.

    Raises:
      UserError: torch and transformers are not installed.
      CheckpointError: the checkpoint cannot be used.
      UsageError: the model does not fit the mesh.
    """
    if missing_packages := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"parity compares with PyTorch: {' and '.join(missing_packages)} are missing; pip install 'qwen-dist[parity]'"
        )
    from qwen_dist.parity.comparison import Comparison
    from qwen_dist.parity.oracle import MIN_ROWS, compare_bfloat16
    from qwen_dist.parity.same_dtype import compare_in_same_dtype

    config = read_model_config(options.model, options.ignored_keys)
    # By default, accelerators round the operands of float32 products to fewer bits.
    with jax.enable_x64(options.dtype == "float64"), jax.default_matmul_precision("highest"):
        if options.dtype == "bfloat16":  # judged by statistics over the rows
            return compare_bfloat16(Comparison(options, config, progress, num_rows=MIN_ROWS))
        return compare_in_same_dtype(Comparison(options, config, progress, num_rows=2))

"""The same run twice, and in a new process, gives the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from qwen_dist.checkpoint.model import load_model
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.parity.candidate import Candidate
from qwen_dist.parity.inputs import random_tokens
from qwen_dist.sharding import INFERENCE, ShardingContext

pytestmark = pytest.mark.parity


def digests(checkpoint: str, dtype: str) -> dict[str, str]:
    """Digests of everything the model computes: intermediates, logits, decoding, loss and gradients."""
    candidate = Candidate(load_model(checkpoint, ShardingContext(make_mesh(MeshConfig.parse("")), INFERENCE), dtype=dtype))
    inputs = random_tokens(311, 30, 2)
    values = dict(candidate.forward(inputs, np.arange(30)))
    values["cached"], values["whole"] = candidate.decode(inputs, inputs.tokens[:, :3], chunk=13)
    losses, gradients = candidate.gradient(inputs)
    values |= {name: np.array(loss) for name, loss in losses.items()}
    values |= {f"gradient of {name}": value for name, value in gradients.items()}
    return {name: hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest() for name, value in values.items()}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_bits_again_and_in_a_new_process(tiny_checkpoint, dtype):
    checkpoint = str(tiny_checkpoint("qwen3", num_hidden_layers=1))
    first = digests(checkpoint, dtype)
    jax.clear_caches()
    assert digests(checkpoint, dtype) == first
    command = [sys.executable, __file__, checkpoint, dtype]
    path = os.pathsep.join([str(pathlib.Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path})
    assert json.loads(found.stdout) == first


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(json.dumps(digests(*sys.argv[1:])))

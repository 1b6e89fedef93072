"""bfloat16 without AVX512, as XLA has it with --xla_cpu_max_isa: every product has a form that exists there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).parent / "narrow_worker.py"
# Up to 64 rows the weight is the first operand of a product in some sizes: fewer than 16, and 16, 32, 64.
QUICK = [["loss", 8], ["loss", 16], ["loss", 64], ["loss", 65], ["train", "qwen3", "lora", 16], ["answer", "qwen3", 16]]
TOKENS = (2, 3, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 128, 130)
LONG = [
    *(["loss", size] for size in range(1, 131)),
    *(["train", family, how, size] for family in ("qwen3", "qwen3_moe") for how in ("lora", "full") for size in TOKENS),
    *(["answer", family, size] for family in ("qwen3", "qwen3_moe") for size in (1, 2, 8, 15, 16, 17, 32, 33, 64, 96)),
]


@pytest.mark.slow
@pytest.mark.parametrize("cases", [QUICK, LONG], ids=["quick", "long"])
def test_bfloat16_trains_and_answers_at_every_size(cases, tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    environ |= {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2", "QWEN_DIST_CPU": "plain", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(WORKER), str(tmp_path / "model"), json.dumps(cases)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result[:-1] for result in results] == cases
    assert not [result for result in results if result[-1]]

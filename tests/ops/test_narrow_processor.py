"""bfloat16 without AVX512, as XLA has it with --xla_cpu_max_isa: every product has a form that exists there."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

WORKER = pathlib.Path(__file__).parent / "narrow_worker.py"
# The weight is the first operand of a product of fewer than 16 rows, and of 16, 32 and 64. These sizes and those beside
# them stand for all.
LOSSES = (*range(1, 19), 31, 32, 33, 47, 48, 49, 63, 64, 65, 66, 127, 128, 129, 130)
TRAINED = (2, 3, 8, 15, 16, 17, 31, 32, 33, 48, 64, 65, 128, 130)
ANSWERED = (1, 2, 8, 15, 16, 17, 32, 33, 64, 96)
CASES = {
    "quick": [["loss", 8], ["loss", 16], ["loss", 64], ["train", "qwen3", "lora", 16], ["answer", "qwen3", 16]],
    "losses": [["loss", size] for size in LOSSES],
    **{
        f"{family} {how}": [["train", family, how, size] for size in TRAINED]
        for family in ("qwen3", "qwen3_moe")
        for how in ("lora", "full")
    },
    "answers": [["answer", family, size] for family in ("qwen3", "qwen3_moe") for size in ANSWERED],
}


@pytest.mark.slow
@pytest.mark.parametrize("cases", CASES.values(), ids=CASES)
def test_bfloat16_trains_and_answers_at_every_size(cases, tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    environ |= {"XLA_FLAGS": "--xla_cpu_max_isa=AVX2", "QWEN_DIST_CPU": "plain", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(WORKER), str(tmp_path / "model"), json.dumps(cases)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result[:-1] for result in results] == cases
    assert not [result for result in results if result[-1]]

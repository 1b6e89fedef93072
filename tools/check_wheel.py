"""Run in an environment where only a built wheel is installed: the kernels are inside, load, and the command answers.

    python tools/check_wheel.py

The library is loaded with ctypes, so a wheel without it would install and import like any other.
"""

from __future__ import annotations

import pathlib
import subprocess
import sys
import tempfile

import qwen_dist
from qwen_dist.ops import native_library


def main() -> None:
    root = pathlib.Path(qwen_dist.__file__).parent
    assert (root / "demo" / "model" / "model.safetensors").is_file(), "the wheel lacks the demonstration model"
    assert native_library.load() is not None, f"the wheel lacks the kernels: {sorted(path.name for path in root.iterdir())}"
    command = [sys.executable, "-m", "qwen_dist"]
    with tempfile.TemporaryDirectory() as elsewhere:
        print(subprocess.run([*command, "--version"], cwd=elsewhere, check=True, capture_output=True, text=True).stdout)
        ask = [*command, "generate", "--prompt", "What is the capital of France?", "--temperature", "0"]
        answer = subprocess.run(ask, cwd=elsewhere, check=True, capture_output=True, text=True).stdout
    assert "Paris" in answer, answer
    print(answer.strip())


if __name__ == "__main__":
    main()

"""A large mixture of experts in two processes: each reads the bytes of its own experts within the memory budget."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwen_dist.checkpoint.safetensors import build_header

MB = 10**6
# Memory that a load may use in addition to its budget: code, threads, the plan.
CONSTANT = 100 * MB
EMBED, CHANNELS, EXPERTS, VOCAB = 2048, 768, 128, 4096
CONFIG = {
    "model_type": "qwen3_moe",
    "hidden_size": EMBED,
    "intermediate_size": 4 * EMBED,
    "moe_intermediate_size": CHANNELS,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def write(folder, num_layers):
    """Write a checkpoint of random bytes; return its size."""
    tensors = {"model.embed_tokens.weight": (VOCAB, EMBED), "model.norm.weight": (EMBED,)}
    for layer in range(num_layers):
        start = f"model.layers.{layer}."
        rows = {"q_proj": 16 * 128, "k_proj": 4 * 128, "v_proj": 4 * 128}
        tensors |= {f"{start}self_attn.{name}.weight": (size, EMBED) for name, size in rows.items()}
        tensors |= {f"{start}self_attn.o_proj.weight": (EMBED, 16 * 128), f"{start}mlp.gate.weight": (EXPERTS, EMBED)}
        tensors |= {f"{start}self_attn.{name}_norm.weight": (128,) for name in "qk"}
        tensors |= {f"{start}{name}_layernorm.weight": (EMBED,) for name in ("input", "post_attention")}
        for expert in range(EXPERTS):
            for name, shape in (("gate", (CHANNELS, EMBED)), ("up", (CHANNELS, EMBED)), ("down", (EMBED, CHANNELS))):
                tensors[f"{start}mlp.experts.{expert}.{name}_proj.weight"] = shape
    size = sum(2 * int(np.prod(shape)) for shape in tensors.values())
    random = np.random.default_rng(0).bytes(64 * MB)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(build_header({name: ("BF16", shape) for name, shape in tensors.items()}, {}))
        for start in range(0, size, len(random)):
            file.write(random[: size - start])
    (folder / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": num_layers}))
    return size


def load_in_two_processes(folder, budget):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    worker = Path(__file__).with_name("moe_memory_worker.py")
    environment = os.environ | {"PYTHONPATH": str(worker.parents[2])}
    processes = [
        subprocess.Popen(
            [sys.executable, worker, folder, str(budget), address, str(index)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


@pytest.mark.slow
def test_6_gigabytes_of_experts_within_256_megabytes(tmp_path):
    try:
        size = write(tmp_path, num_layers=5)
        assert size > 6000 * MB
        for found in load_in_two_processes(tmp_path, 256 * MB):
            print(found)
            experts = 5 * EXPERTS * 3 * CHANNELS * EMBED * 2
            assert found["experts"] == experts // 2
            assert abs(found["read"] - found["planned"]) < 1 * MB
            assert found["read"] < experts // 2 + (size - experts) + 1 * MB
            assert found["growth"] - found["held"] <= 256 * MB + CONSTANT
    finally:
        shutil.rmtree(tmp_path)

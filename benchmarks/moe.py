"""Compare a mixture of experts with transformers (PyTorch): prefill and decode; one table, one run.

    python benchmarks/moe.py [--dtypes bfloat16,float32] [--rounds 2] [--folder DIR]

The checkpoint is random: three blocks of Qwen3-30B-A3B with 64 experts instead of 128, eight per token (1.9 GB in
bfloat16). transformers has two implementations of experts, "grouped_mm" (its default) and "eager"; the table has both,
and the ratio is to the faster one. As in inference.py, every measurement runs in a fresh process, the systems in turn,
a first round is discarded, and a ratio above 1 means that this project is better.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import inference

SYSTEMS = {
    "qwen_dist": {},
    "grouped_mm": {"experts_implementation": "grouped_mm"},
    "eager": {"experts_implementation": "eager"},
}
VOCAB = 4096
# The results of each round, by dtype and system.
Measured = dict[str, dict[str, list[dict[str, float]]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prefill", default="512", help="prompt lengths, separated by commas")
    parser.add_argument("--decode", default="1,8,32", help="batch sizes, separated by commas")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--folder", help="where the checkpoint is, or is written; default: a temporary directory")
    parser.add_argument("--worker", nargs=2, metavar=("SYSTEM", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options, SYSTEMS)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = options.folder or scratch
        if not (Path(options.folder) / "config.json").exists():
            make_checkpoint(Path(options.folder))
        print_table(measure(options, __file__, SYSTEMS))


def make_checkpoint(folder: Path) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    sizes = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_key_value_heads": 4}
    sizes |= {"head_dim": 128, "num_experts": 64, "num_experts_per_tok": 8, "num_hidden_layers": 3, "vocab_size": VOCAB}
    config = transformers.AutoConfig.for_model("qwen3_moe", norm_topk_prob=True, eos_token_id=0, **sizes)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


def measure(options: argparse.Namespace, script: str, systems: dict[str, dict[str, str]]) -> Measured:
    """Run the workers of `script`, the systems in turn, and discard the first round."""
    measured: Measured = {dtype: {system: [] for system in systems} for dtype in options.dtypes.split(",")}
    for dtype, by_system in measured.items():
        for number in range(options.rounds + 1):
            for system, rounds in by_system.items():
                command = [sys.executable, script, "--folder", options.folder, "--worker", system, dtype]
                command += ["--prefill", options.prefill, "--decode", options.decode, "--steps", str(options.steps)]
                done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, check=True)
                rounds += [json.loads(done.stdout.splitlines()[-1])] if number > 0 else []
                print(f"{dtype} round {number} {system}: {done.stdout.splitlines()[-1].decode()}", file=sys.stderr)
    return measured


def work(options: argparse.Namespace, systems: dict[str, dict[str, str]]) -> dict[str, float]:
    """Return the measurements of one system in this process, in tokens per second."""
    system, dtype = options.worker
    if system == "qwen_dist":
        generate, _ = inference.open_qwen_dist(options.folder, dtype)
    else:
        generate, _ = inference.open_transformers(options.folder, dtype, **systems[system])
    result = {}
    for length in map(int, options.prefill.split(",")):
        generate([prompt(0, length)], 1)
        begin = time.perf_counter()
        generate([prompt(1, length)], 1)
        result[f"prefill {length}"] = length / (time.perf_counter() - begin)
    for batch in map(int, options.decode.split(",")):
        prompts = [prompt(2 + row, 32) for row in range(batch)]
        generate(prompts, 3)
        (start, before), *_, (end, after) = generate(prompts, options.steps + 1)
        result[f"decode B={batch}"] = (after - before) / (end - start)
    return result


def prompt(number: int, length: int) -> list[int]:
    """Return distinct token ids, so that they are routed to different experts."""
    return [(number * 7919 + position * 613) % VOCAB for position in range(length)]


def print_table(measured: Measured) -> None:
    packages = ("jax", "torch", "transformers")
    print(f"{platform.machine()}, {os.cpu_count()} cores; {', '.join(f'{name} {version(name)}' for name in packages)}")
    print(f"{'tokens/s':24}" + "".join(f"{system:>14}" for system in next(iter(measured.values()))) + f"{'ratio':>8}")
    for dtype, systems in measured.items():
        for name in systems["qwen_dist"][0]:
            ours, *theirs = (statistics.median(one[name] for one in rounds) for rounds in systems.values())
            columns = "".join(f"{value:14.2f}" for value in (ours, *theirs))
            print(f"{dtype:10}{name:14}{columns}{ours / max(theirs):7.2f}×")


if __name__ == "__main__":
    main()

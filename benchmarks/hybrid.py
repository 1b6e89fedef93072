"""Compare a hybrid of gated delta nets and attention with transformers (PyTorch); one table for each part, one run.

    python benchmarks/hybrid.py [--parts speed,file,context] [--dtypes bfloat16,float32] [--rounds 2] [--folder DIR]

The checkpoint is random and has the shape of Qwen3.5-0.8B, 1.5 GB in bfloat16. Its tokenizer is that of the demo, whose
tokens are short; with `--tokenizer DIR` the file of prompts has as many tokens as for a real checkpoint. "speed" measures
prefill and decode as moe.py does: every measurement in a fresh process, the systems in turn, and a first round discarded.
"file" answers prompts of mixed lengths as batch.py does, in the first of the dtypes. "context" measures decode of one
sequence after 1,000 to 64,000 tokens, in two models of the same widths: three delta nets, whose cost does not depend on the
context, and the same with one attention layer, whose cost does. A ratio above 1 means that this project is better; in
"context" it is the time of a step to that after the shortest context.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import batch
import inference
import moe

import qwen_dist.demo

SYSTEMS: dict[str, dict[str, str]] = {"qwen_dist": {}, "transformers": {}}
DEMO = Path(qwen_dist.demo.__file__).parent / "model"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
LINEAR = "linear_attention"
MODELS = {"3 delta nets": [LINEAR] * 3, "and 1 attention": [LINEAR] * 3 + ["full_attention"]}
STEPS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="speed,file,context", help="what to measure, separated by commas")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--prefill", default="512,4096", help="prompt lengths, separated by commas")
    parser.add_argument("--decode", default="1,8,32", help="batch sizes, separated by commas")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--prompts", type=int, default=200, help="in the file")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="for each prompt of the file")
    parser.add_argument("--max-batch-size", type=int, default=96, help="of this project, for the file")
    parser.add_argument("--contexts", default="1000,4000,16000,64000", help="tokens before a step, separated by commas")
    parser.add_argument("--tokenizer", default=str(DEMO), help="directory of the tokenizer of the file")
    parser.add_argument("--folder", help="where the checkpoints are, or are written; default: a temporary directory")
    parser.add_argument("--worker", nargs=2, metavar=("SYSTEM", "DTYPE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(moe.work(options, SYSTEMS)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.folder or scratch)
        for part in options.parts.split(","):
            PARTS[part](options, folder)


def checkpoint(folder: Path, **values: Any) -> Path:
    """Return the folder, with a random checkpoint of Qwen3.5-0.8B's shape but for `values`, written if it is not there."""
    import torch
    import transformers

    if (folder / "model.safetensors").exists():
        return folder
    sizes = {"hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24, "vocab_size": 248320}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "max_position_embeddings": 131072}
    sizes |= {"linear_num_key_heads": 16, "linear_num_value_heads": 16}
    text = {"eos_token_id": [0], "pad_token_id": 0, "tie_word_embeddings": True}
    config = transformers.AutoConfig.for_model("qwen3_5_text", **sizes | text | values)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / name, folder)
    return folder


def measure_speed(options: argparse.Namespace, folder: Path) -> None:
    options.folder = str(checkpoint(folder / "hybrid"))
    moe.print_table(moe.measure(options, __file__, SYSTEMS))


def measure_file(options: argparse.Namespace, folder: Path) -> None:
    options.model, options.dtype = str(checkpoint(folder / "hybrid")), options.dtypes.split(",")[0]
    for name in TOKENIZER_FILES:
        shutil.copy(Path(options.tokenizer) / name, options.model)
    batch.print_table(options, {system: batch.run_worker(options, system) for system in SYSTEMS})


def measure_contexts(options: argparse.Namespace, folder: Path) -> None:
    """Print the time of a decode step after contexts of several lengths, in this process."""
    dtype, contexts = options.dtypes.split(",")[0], [int(length) for length in options.contexts.split(",")]
    print(f"{f'ms a step, {dtype}':24}" + "".join(f"{length:>17}" for length in contexts))
    for name, layers in MODELS.items():
        sizes = {"num_hidden_layers": len(layers), "layer_types": layers, "vocab_size": moe.VOCAB}
        path = checkpoint(folder / f"{len(layers)} layers", **sizes)
        generate, _ = inference.open_qwen_dist(str(path), dtype)
        times = []
        for length in contexts:
            ends = [end for end, _ in generate([moe.prompt(0, length)], STEPS)][-STEPS // 2 :]
            times.append(1e3 * statistics.median(end - begin for begin, end in itertools.pairwise(ends)))
        print(f"{name:24}" + "".join(f"{ms:9.2f} {ms / times[0]:6.2f}×" for ms in times), flush=True)


PARTS = {"speed": measure_speed, "file": measure_file, "context": measure_contexts}

if __name__ == "__main__":
    main()

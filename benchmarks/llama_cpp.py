"""llama.cpp as a peer of the benchmarks: a checkpoint as GGUF, and llama.cpp's server in this process.

`benchmarks/inference.py --peer llama.cpp` and `batch.py` and `serve.py` with `--systems qwen_dist,llama.cpp` use it:
`pip install xllamacpp gguf`.
Dense Qwen models only (the tensor names of GGUF's qwen2 and qwen3).

    python benchmarks/llama_cpp.py serve DIR [--form BF16] [--port 8080] [--slots 32] [--context 2048]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

TENSORS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
OUTSIDE |= {"lm_head.weight": "output.weight"}


def gguf_file(model: str, form: str, directory: str = "~/.cache/qwen_dist/gguf") -> pathlib.Path:
    """Return the GGUF file of a checkpoint, written if it is not there; `form` is BF16, F16, F32, Q8_0 or Q4_0."""
    # Other weights at the same place get another file.
    weights = [(str(one.resolve()), one.stat().st_mtime_ns) for one in sorted(pathlib.Path(model).expanduser().iterdir())]
    name = hashlib.sha256(repr(weights).encode()).hexdigest()[:12]
    path = pathlib.Path(directory).expanduser() / f"{name}-{form}.gguf"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        write_gguf(pathlib.Path(model).expanduser(), unfinished, form)
        unfinished.rename(path)
    return path


def write_gguf(model: pathlib.Path, path: pathlib.Path, form: str) -> None:
    """Write a checkpoint as GGUF: matrices in `form`, vectors in float32."""
    import gguf
    import torch
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(path, config["model_type"])
    _write_config(writer, config)
    _write_tokenizer(writer, model, config)
    wanted = gguf.GGMLQuantizationType[form]
    for file in sorted(model.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118  # not a mapping
                array = opened.get_tensor(name).to(torch.float32).numpy()
                kind = wanted if array.ndim > 1 else gguf.GGMLQuantizationType.F32
                writer.add_tensor(_tensor_name(name), gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensor_name(name: str) -> str:
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, layer, *module, kind = name.split(".")
    return f"blk.{layer}.{TENSORS['.'.join(module)]}.{kind}"


def _write_config(writer: Any, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _write_tokenizer(writer: Any, model: pathlib.Path, config: dict[str, Any]) -> None:
    import gguf

    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokens = [f"[PAD{index}]" for index in range(config["vocab_size"])]
    types = [gguf.TokenType.UNUSED] * len(tokens)
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = token, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    merges = [one if isinstance(one, str) else " ".join(one) for one in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    end = config["eos_token_id"]
    writer.add_eos_token_id(end[0] if isinstance(end, list) else end)
    writer.add_add_bos_token(False)
    template = json.loads((model / "tokenizer_config.json").read_text()).get("chat_template")
    if template:
        writer.add_chat_template(template)


class LlamaCpp:
    """llama.cpp's server in this process, greedy, without its prefix cache.

    Args:
      path: a GGUF file.
      slots: how many sequences it decodes at a time.
      context: tokens of one sequence.
      port: of 127.0.0.1, where it answers HTTP requests too. With a port it keeps its prefix cache.
    """

    def __init__(self, path: pathlib.Path, slots: int, context: int, port: int | None = None):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_parallel, params.n_ctx, params.n_batch, params.n_ubatch = slots, slots * context, 2048, 512
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = len(os.sched_getaffinity(0))
        params.warmup, params.verbosity = True, 0
        if port is None:
            params.cache_prompt, params.cache_ram_mib = False, 0
        else:
            params.hostnames, params.port = ["127.0.0.1"], port
        params.n_gpu_layers, params.kv_unified, params.fit_params = 0, False, False
        self._server = xllamacpp.Server(params)
        self.address = self._server.listening_address

    def complete(self, prompt: list[int], num_tokens: int, on_text: Callable[[], None], *, ends: bool = False) -> int:
        """Answer one prompt and return the number of tokens; `ends` if there may be fewer than `num_tokens`."""
        request = {"prompt": prompt, "n_predict": num_tokens, "max_tokens": num_tokens, "stream": True, "temperature": 0}
        request |= {"ignore_eos": not ends, "cache_prompt": False, "repeat_penalty": 1.0, "samplers": ["temperature"]}
        num_answered = 0

        def on_chunk(chunk: dict[str, Any] | list[dict[str, Any]]) -> bool:
            nonlocal num_answered
            for one in chunk if isinstance(chunk, list) else [chunk]:
                if "error" in one:
                    raise RuntimeError(one["error"])
                if one.get("choices") and one["choices"][0]["finish_reason"] is None:
                    on_text()
                num_answered = one.get("usage", {}).get("completion_tokens", num_answered)
            return False

        self._server.handle_completions(request, on_chunk)
        return num_answered

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[tuple[float, int]]:
        """Answer prompts at the same time; return as `inference.Generate` does."""
        times: list[tuple[float, int]] = []
        begun: set[int] = set()
        count, lock = 0, threading.Lock()

        def answer(row: int) -> None:
            def on_text() -> None:
                nonlocal count
                with lock:
                    count += 1
                    begun.add(row)
                    if len(begun) == len(prompts):
                        times.append((time.perf_counter(), count))

            self.complete(prompts[row], num_tokens, on_text)

        threads = [threading.Thread(target=answer, args=(row,)) for row in range(len(prompts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        # A piece of text can hold several tokens, those of one character, or end before the last.
        last = times[-1][0] if times else time.perf_counter()
        return [*times[:-1], (last, len(prompts) * num_tokens)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    serve = parser.add_subparsers(required=True).add_parser("serve", help="answer HTTP requests until a signal comes")
    serve.add_argument("model", metavar="DIR")
    serve.add_argument("--form", default="BF16", choices=["BF16", "F16", "F32", "Q8_0", "Q4_0"])
    serve.add_argument("--port", type=int, default=8080)
    serve.add_argument("--slots", type=int, default=32, help="sequences at a time")
    serve.add_argument("--context", type=int, default=2048, help="tokens of one sequence")
    options = parser.parse_args()
    server = LlamaCpp(gguf_file(options.model, options.form), options.slots, options.context, options.port)
    print(server.address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()

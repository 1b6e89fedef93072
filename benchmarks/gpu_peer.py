"""The same shapes in transformers (PyTorch) with its fused attention, for `gpu.py`: rows of the same names."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

from gpu_pieces import CONTEXT, SHAPES, TINY, Row, failed, row


def peer(dry_run: bool) -> Iterator[Row]:
    """Decode with a cache of 1,024 tokens, and prefill."""
    try:
        import torch
        import transformers
    except ImportError as error:
        yield failed("torch and transformers", error)
        return
    if not dry_run and not torch.cuda.is_available():
        yield {"what": "torch and transformers", "note": f"torch {torch.__version__} sees no GPU"}
        return
    yield {"what": "versions", "note": f"torch {torch.__version__}, transformers {transformers.__version__}"}
    device = "cpu" if dry_run else "cuda"
    for name in ("8b", "0.6b"):
        try:
            model = open_model(name, device, dry_run)
            yield from measure(name, model, device, dry_run)
            del model
        except Exception as error:
            yield failed(name, error)


def open_model(name: str, device: str, dry_run: bool) -> Any:
    import torch
    import transformers

    values = SHAPES[name] | (TINY if dry_run else {})
    config = transformers.AutoConfig.for_model(**values)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()


def measure(name: str, model: Any, device: str, dry_run: bool) -> Iterator[Row]:
    import torch
    import transformers

    vocab, context = model.config.vocab_size, 32 if dry_run else CONTEXT
    with torch.inference_mode():
        for B in (1, 2) if dry_run else (1, 32, 8, 64):
            try:
                cache = transformers.DynamicCache()
                prompt = torch.randint(0, vocab, (B, context), device=device)
                model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token = prompt[:, :1]

                def step(token: Any = token, cache: Any = cache) -> None:
                    model(token, past_key_values=cache, use_cache=True).logits[:, -1].argmax(-1)

                yield row(f"decode {name}, B={B}", clock(step, device, 2 if dry_run else 16), tokens=B)
            except Exception as error:
                yield failed(f"decode {name}, B={B}", error)
        for length in (64, 128) if dry_run else (1024, 8192):
            prompt = torch.randint(0, vocab, (1, length), device=device)
            ms = clock(lambda prompt=prompt: model(prompt, logits_to_keep=1), device, 1 if dry_run else 3)
            yield row(f"prefill {name}, {length}", ms, tokens=length)


def clock(run: Callable[[], Any], device: str, count: int) -> float:
    """Return the milliseconds of one call."""
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    run()
    wait()
    begin = time.perf_counter()
    for _ in range(count):
        run()
    wait()
    return 1e3 * (time.perf_counter() - begin) / count


PIECES = {"peer": peer}

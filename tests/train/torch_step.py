"""One training step of transformers and torch.optim, example by example, without padding or packing."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from qwen_dist.parity.reference import Reference, UpcastToFloat64
from qwen_dist.train.examples import Example, Examples
from qwen_dist.train.records import RecordLocation


class Steps(NamedTuple):
    """The mean loss before each step, and the gradients (clipped) and the parameters after the last."""

    losses: list[float]
    gradients: dict[str, np.ndarray]
    parameters: dict[str, np.ndarray]


def torch_steps(
    model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    steps: int = 1,
    rate: float,
    weight_decay: float,
    clip_norm: float = 0.0,
    betas=(0.9, 0.999),
) -> Steps:
    """Steps of AdamW on the mean loss of all target tokens; matrices decay, norms and biases do not."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": [p for p in trained.values() if (p.ndim > 1) == decays], "weight_decay": weight_decay * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate, betas=betas, eps=1e-8)
    count = sum(int(example.loss_mask[1:].sum()) for example in examples)
    losses = []
    is_double = next(model.parameters()).dtype == torch.float64
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(0.0)
        for example in examples:
            tokens = torch.from_numpy(example.tokens).long()[None]
            with UpcastToFloat64() if is_double else contextlib.nullcontext():
                logits = model(input_ids=tokens, use_cache=False).logits[0, :-1]
            is_target = torch.from_numpy(example.loss_mask[1:])
            loss = torch.nn.functional.cross_entropy(logits[is_target], tokens[0, 1:][is_target], reduction="sum") / count
            loss.backward()
            losses[-1] += loss.item()
        if clip_norm:
            torch.nn.utils.clip_grad_norm_(trained.values(), clip_norm)
        gradients = {name: p.grad.numpy().copy() for name, p in trained.items()}
        optimizer.step()
    return Steps(losses, gradients, {name: p.detach().numpy().copy() for name, p in trained.items()})


def load_torch(directory: pathlib.Path, dtype: str) -> torch.nn.Module:
    """The checkpoint in transformers; in float64 norms and rotary tables are float64 too."""
    return Reference(directory, dtype).model


def made_examples(vocab_size: int = 311) -> Examples:
    """Random tokens of several lengths; some are targets, never the first."""
    rng = np.random.default_rng(0)
    made = []
    for number, length in enumerate((33, 9, 17, 25, 8, 12, 30, 21)):
        loss_mask = np.arange(length) > rng.integers(0, length // 2)
        tokens = rng.integers(0, vocab_size, length).astype(np.int32)
        made.append(Example(RecordLocation("made.jsonl", number + 1), tokens, loss_mask))
    return Examples(made, [])

"""Embeddings of texts: their last hidden state, as the Qwen3-Embedding models are used. No jax.

The last token of a text stands for it; the tokenizer of these models adds `<|endoftext|>` to every text. A vector has the
length 1, also after it has been cut to its first dimensions (Matryoshka embeddings, arXiv:2205.13147).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.tokenizer import Tokenizer


def embedding_request(key: Any, text: str | Sequence[int], tokenizer: Tokenizer, max_context: int) -> Request:
    """Return the request to the engine for the embedding of a text, or of token ids."""
    if isinstance(text, str):
        tokenizer.check_length(text, max_context)
        text = tokenizer.encode(text)
    return Request(key, tuple(text), SamplingParams(max_new_tokens=1), is_embedding=True)


def unit_vector(embedding: Sequence[float], dimensions: int | None = None) -> np.ndarray:
    """Return the first dimensions of an embedding, float32, scaled to the length 1."""
    vector = np.array(embedding, np.float64)[:dimensions]
    return (vector / max(float(np.linalg.norm(vector)), 1e-12)).astype(np.float32)

"""Bodies and answers of `/v1/embeddings`. No jax."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from qwen_dist.engine.embeddings import unit_vector
from qwen_dist.errors import UserError, printable
from qwen_dist.openai_api import are_tokens, is_integer, shortened

EMBEDDINGS_URL = "/v1/embeddings"
MAX_INPUTS = 2048
_KNOWN = {"input", "model", "dimensions", "encoding_format", "user"}


@dataclasses.dataclass(frozen=True)
class EmbeddingsRequest:
    """What a body asks for: an embedding of each of `inputs`, texts or token ids. `dimensions` None keeps all."""

    inputs: tuple[str | tuple[int, ...], ...]
    model: str
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] = "float"


def parse_embeddings_body(body: Mapping[str, Any], model: str) -> EmbeddingsRequest:
    """Return the request of a body; `model` is its model. Raises UserError, which lists all problems."""
    given, dimensions, format = body.get("input"), body.get("dimensions"), body.get("encoding_format")
    is_one = isinstance(given, str) or are_tokens(given)
    inputs: list[Any] = [given] if is_one else given if isinstance(given, list) else []
    problems = []
    if not inputs or not all((isinstance(text, str) and text) or are_tokens(text) for text in inputs):
        problems.append(f"input must be a non-empty text, token ids, or a list of these; got {shortened(given)}")
    if len(inputs) > MAX_INPUTS:
        problems.append(f"input has {len(inputs)} texts; at most {MAX_INPUTS} can be in one body")
    if dimensions is not None and not (is_integer(dimensions) and dimensions >= 1):
        problems.append(f"dimensions must be a whole number, 1 or more; got {shortened(dimensions)}")
    if format not in (None, "float", "base64"):
        problems.append(f'encoding_format must be "float" or "base64"; got {shortened(format)}')
    if not isinstance(body.get("model"), str | None):
        problems.append(f"model must be a string; got {shortened(body['model'])}")
    if unknown := sorted(name for name in body.keys() - _KNOWN if body[name] is not None):
        problems.append(f"cannot be honoured, so leave out: {printable(', '.join(unknown), 100)}")
    if problems:
        raise UserError("; ".join(problems))
    texts = tuple(text if isinstance(text, str) else tuple(text) for text in inputs)
    return EmbeddingsRequest(texts, model, dimensions, format or "float")


def embeddings_body(
    request: EmbeddingsRequest, embeddings: Sequence[Sequence[float]], prompt_tokens: int
) -> dict[str, Any]:
    """Return the body that answers a request, with the hidden states of its inputs in order.

    Raises UserError if it asks for more dimensions than there are.
    """
    if request.dimensions is not None and request.dimensions > len(embeddings[0]):
        raise UserError(f"dimensions is {request.dimensions}; the model has {len(embeddings[0])}")
    vectors = [unit_vector(embedding, request.dimensions) for embedding in embeddings]
    as_text = request.encoding_format == "base64"
    values = [
        base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector.tolist() for vector in vectors
    ]
    data = [{"object": "embedding", "index": index, "embedding": value} for index, value in enumerate(values)]
    usage = {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens}
    return {"object": "list", "data": data, "model": request.model, "usage": usage}

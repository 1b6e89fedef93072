"""Embeddings against transformers, together with answers, in any batch and from the prefix cache."""

import jax
import numpy as np
import pytest
import torch
import transformers

from qwen_dist import DEMO_MODEL, LLM
from qwen_dist.checkpoint.model import load_model
from qwen_dist.engine.embeddings import unit_vector
from qwen_dist.engine.engine import Engine
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.mesh import MeshConfig, make_mesh
from qwen_dist.sharding import INFERENCE, ShardingContext
from qwen_dist.tokenizer import Tokenizer

COMMON = np.random.default_rng(7).integers(0, 331, 600).tolist()
TEXTS = [tuple(COMMON[:length]) for length in (1, 5, 64, 130, 131, 600)] + [tuple(COMMON[40:75])]
PARAMS = SamplingParams(max_new_tokens=8)


def expected(directory) -> np.ndarray:
    model = transformers.AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = [model(torch.tensor([text])).last_hidden_state[0, -1] for text in TEXTS]
    return torch.nn.functional.normalize(torch.stack(hidden), dim=-1).numpy()


@pytest.mark.parametrize(
    ("family", "mesh"),
    [
        ("qwen3", "data=1"),
        pytest.param("qwen3", "data=2,tensor=2", marks=pytest.mark.slow),
        pytest.param("qwen3_5", "data=1", marks=pytest.mark.slow),
    ],
)
def test_embeddings_are_those_of_transformers(tiny_directory, family, mesh):
    directory = tiny_directory(family)
    model = load_model(directory, ShardingContext(make_mesh(MeshConfig.parse(mesh)), INFERENCE), dtype="float32")
    engine = Engine(model, Tokenizer.open(directory), max_batch_size=4)
    embeddings = [Request(("embed", n), text, PARAMS, is_embedding=True) for n, text in enumerate(TEXTS)]
    answers = [Request(("answer", n), text, PARAMS) for n, text in enumerate(TEXTS)]

    def run(requests) -> tuple[np.ndarray, dict]:
        found, tokens = {}, {}
        for output in engine.run(requests):
            if output.embedding:
                assert output.finish_reason == "stop" and output.request.key not in found
                found[output.request.key] = unit_vector(output.embedding)
            else:
                tokens.setdefault(output.request.key, []).extend(output.tokens)
        return np.stack([found["embed", n] for n in range(len(TEXTS))]), tokens

    wanted, (_, alone) = expected(directory), run([*embeddings, *answers])
    for requests in (embeddings, [*answers, *embeddings], embeddings[::-1]):
        found, tokens = run(requests)
        np.testing.assert_allclose(found, wanted, atol=2e-5)
        assert not tokens or tokens == alone
    assert engine.is_idle and engine.stats.held_positions == 0


def test_the_library_embeds_texts():
    llm = LLM(DEMO_MODEL, dtype="float32", max_batch_size=4, devices=jax.devices()[:1])
    vectors = llm.embed(["What is 2 plus 3?", llm.encode("The sky is blue."), "What is 2 plus 3?"])
    assert vectors.dtype == np.float32 and np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(3))
    np.testing.assert_array_equal(vectors[0], vectors[2])
    short = llm.embed("What is 2 plus 3?", dimensions=8)
    assert short.shape == (1, 8) and np.linalg.norm(short) == pytest.approx(1)
    np.testing.assert_allclose(short[0], vectors[0, :8] / np.linalg.norm(vectors[0, :8]), atol=1e-6)

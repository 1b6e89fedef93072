"""The options of a comparison and its inputs: rows of token ids, left-padded to one length."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from qwen_dist.errors import UsageError
from qwen_dist.models.config import ModelConfig
from qwen_dist.parity.tolerances import DTYPES

# Code, prose, dialogue and arithmetic in several scripts; eight prompts, enough for statistics.
PROMPTS = (
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot = items[len(items) // 2]\n"
    "    left = [x for x in items if x < pivot]\n    middle = [x for x in items if x == pivot]\n",
    "The harbour was quiet in the early morning. A single boat moved slowly between the piers, and the man at the oars "
    "looked neither left nor right, for he had made the same journey every day for thirty years, and",
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nWrite a SQL query that lists the five "
    "customers with the highest total order value in 2023.<|im_end|>\n<|im_start|>assistant\n",
    "import jax\nimport jax.numpy as jnp\n\n\ndef softmax(x):\n    x = x - jnp.max(x, axis=-1, keepdims=True)\n"
    "    return jnp.exp(x) / jnp.sum(jnp.exp(x), axis=-1, keepdims=True)\n\n\ndef layer_norm(x, weight, bias, eps=1e-5):\n",
    "质数是只能被一和它本身整除的自然数。请用简单的语言解释为什么质数有无穷多个。首先假设质数只有有限个，",
    "| year | births | deaths |\n|------|--------|--------|\n| 1990 | 41,231 | 30,118 |\n| 1991 | 40,904 | 30,562 |\n"
    "| 1992 | 39,877 | 31,004 |\n",
    "Question: A train leaves at 9:40 and travels 210 km at 84 km/h. When does it arrive?\nAnswer: The journey takes "
    "210 / 84 = 2.5 hours, so",
    "#include <stdio.h>\n\nint main(void) {\n    int counts[256] = {0};\n    int c;\n    while ((c = getchar()) != EOF) {\n"
    "        counts[(unsigned char)c]++;\n    }\n    for (int i = 0; i < 256; i++) {\n",
)


@dataclasses.dataclass(frozen=True)
class ParityOptions:
    """What to compare.

    Without `prompts` and `tokens`, built-in texts are run, or 64 random ids if the checkpoint has no tokenizer.

    Attributes:
      model: directory of a checkpoint.
      dtype: of parameters and computation on both sides.
      prompts: texts to run.
      tokens: the number of random token ids in the first row.
      mesh: this side's mesh, such as `fsdp=2,tensor=4`.
      decode_steps: the number of tokens decoded greedily after the prompt.
      max_columns: longer inputs are compared at this many tokens, evenly spaced; the gradient is that of the last
        `max_columns` tokens.
      ignored_keys: see `hf_config.parse_model_config`.
    """

    model: str | pathlib.Path
    dtype: str = "float32"
    prompts: tuple[str, ...] = ()
    tokens: int | None = None
    mesh: str = ""
    decode_steps: int = 16
    max_columns: int = 256
    ignored_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = []
        if self.dtype not in DTYPES:
            problems.append(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        if self.prompts and self.tokens is not None:
            problems.append("prompts and tokens are both given; give only one of them")
        if self.tokens is not None and self.tokens < 2:
            problems.append(f"tokens is {self.tokens}; at least 2 are needed, so that one predicts the other")
        if problems:
            raise UsageError("parity: " + "; ".join(problems))


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Left-padded rows of tokens.

    Attributes:
      tokens: int32 [B, T].
      lengths: the number of tokens of each row, [B]; row b's tokens are its last `lengths[b]`.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]]) -> Inputs:
        """Left-pad rows of token ids with 0."""
        longest = max(map(len, rows))
        tokens = np.array([[0] * (longest - len(row)) + list(row) for row in rows], np.int32)
        return cls(tokens, np.array([len(row) for row in rows]))

    @property
    def positions(self) -> np.ndarray:
        """Each token's position in its row, int32 [B, T]; negative for padding."""
        length = self.tokens.shape[1]
        return (np.arange(length)[None] - (length - self.lengths)[:, None]).astype(np.int32)

    @property
    def is_real(self) -> np.ndarray:
        """False for padding, bool [B, T]."""
        return self.positions >= 0

    def rows(self) -> list[list[int]]:
        """Return the token ids without padding."""
        return [row[len(row) - length :].tolist() for row, length in zip(self.tokens, self.lengths, strict=True)]

    def first_rows(self, count: int) -> Inputs:
        """Return the first `count` rows."""
        return Inputs.from_rows(self.rows()[:count])

    def last_tokens(self, count: int) -> Inputs:
        """Return the last `count` tokens of each row."""
        return Inputs.from_rows([row[-count:] for row in self.rows()])


def make_inputs(options: ParityOptions, config: ModelConfig, num_rows: int) -> Inputs:
    """Return the rows of tokens for these options. Raises CheckpointError if texts need a missing tokenizer.

    Args:
      options: prompts in them are all taken.
      config: of the model.
      num_rows: the number of rows without prompts in the options.
    """
    if options.prompts:
        return _from_text(options, options.prompts)
    if options.tokens is None and (pathlib.Path(options.model) / "tokenizer.json").exists():
        return _from_text(options, PROMPTS[:num_rows])
    return random_tokens(config.vocab_size, options.tokens or 64, num_rows)


def _from_text(options: ParityOptions, prompts: Sequence[str]) -> Inputs:
    """Tokenize the prompts with the checkpoint's tokenizer."""
    from qwen_dist.tokenizer import Tokenizer

    tokenizer = Tokenizer.open(options.model, options.ignored_keys)
    return Inputs.from_rows([tokenizer.encode(prompt) for prompt in prompts])


def random_tokens(vocab_size: int, length: int, num_rows: int, seed: int = 0) -> Inputs:
    """Return rows of uniformly random ids; the first has `length` tokens, each further row about a fifth less."""
    rng = np.random.default_rng(seed)
    lengths = [max(1, round(length * 0.8**row)) for row in range(num_rows)]
    return Inputs.from_rows([rng.integers(0, vocab_size, size).tolist() for size in lengths])

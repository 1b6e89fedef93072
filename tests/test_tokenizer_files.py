"""The files of a tokenizer besides tokenizer.json: each is used as transformers uses it, or refused by name."""

import json
import shutil

import pytest
from transformers import AutoTokenizer, Qwen2Tokenizer

from qwen_dist.checkpoint.save import read_extra_files
from qwen_dist.errors import CheckpointError
from qwen_dist.storage.files import LocalFolder
from qwen_dist.tokenizer import Tokenizer

TEXTS = [
    "",
    "Hello, world!  Two spaces .  a\t\tb \n\n  c\r\n",
    "Größe, naïve, e\u0301 (combining), ﬁ, Ａ １２３ ٣٤",
    "日本語のテキスト 中文 한국어 עברית \u0958 \u212b",
    "😀 👩‍👩‍👧‍👦 🇩🇪 a\u200db don't DON'T we'Ll",
    "1234567890 3.14\u00a0€\ufffd\x00\x7f",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <think>x</think> <tool_x>b<tool_y>",
    "a<tool_x>b",
]
TOOL = {
    "content": "<tool_x>",
    "lstrip": False,
    "normalized": False,
    "rstrip": False,
    "single_word": False,
    "special": False,
}
MESSAGES = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "f"}}]


@pytest.fixture
def directory(small_tokenizer, tmp_path):
    return shutil.copytree(small_tokenizer, tmp_path / "copy")


def change(directory, name, **values):
    path = directory / name
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | values))


def assert_same_ids(directory, reference=None):
    reference = reference or AutoTokenizer.from_pretrained(directory)
    tokenizer = Tokenizer.open(directory)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text), text
        assert tokenizer.decode(ids, False) == reference.decode(ids)
        assert tokenizer.decode(ids, True) == reference.decode(ids, skip_special_tokens=True)
    return tokenizer


# --- tokens that only tokenizer_config.json has ---


@pytest.mark.parametrize("special", [False, True])
def test_added_tokens_decoder_adds_tokens(directory, special):
    size = Tokenizer.open(directory).vocab_size
    added = json.loads((directory / "tokenizer.json").read_text())["added_tokens"]
    tokens = {str(token.pop("id")): token for token in added}
    tokens |= {str(size + 1): TOOL | {"content": "<tool_y>"}, str(size): TOOL | {"special": special}}
    change(directory, "tokenizer_config.json", added_tokens_decoder=tokens)
    tokenizer = assert_same_ids(directory)
    assert tokenizer.encode("a<tool_x>b")[1] == size and len(tokenizer.encode("a<tool_x>b")) == 3
    assert tokenizer.is_special(size) == special


def test_special_tokens_that_are_unknown_are_added(directory):
    change(directory, "tokenizer_config.json", pad_token="<pad>", additional_special_tokens=["<tool_x>", "<|im_end|>"])
    tokenizer = assert_same_ids(directory)
    assert len(tokenizer.encode("<tool_x>")) == len(tokenizer.encode("<pad>")) == 1


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ({"900": TOOL}, "gives the token '<tool_x>' the id 900, but in this vocabulary it has"),
        ({"5": TOOL | {"content": "<|im_end|>"}}, "gives the token '<|im_end|>' the id 5"),
        ({"-1": TOOL}, "must hold entries such as"),
        ({str(10**30): TOOL}, "must hold entries such as"),
        ({"400": "x"}, "must hold entries such as"),
        ({"400": {"special": True}}, "must hold entries such as"),
        ({"400": TOOL | {"lstrip": "yes"}}, "must hold entries such as"),
        ({"400": TOOL | {"colour": True}}, "must hold entries such as"),
        ([TOOL], "must hold entries such as"),
    ],
)
def test_added_tokens_that_do_not_fit_are_refused(directory, tokens, message):
    change(directory, "tokenizer_config.json", added_tokens_decoder=tokens)
    with pytest.raises(CheckpointError) as error:
        Tokenizer.open(directory)
    assert message in str(error.value) and len(str(error.value)) < 400 + len(str(directory))


def test_special_tokens_map_replaces_tokens_if_there_is_no_decoder(directory):
    change(directory, "special_tokens_map.json", eos_token="<|endoftext|>", pad_token={"content": "<|im_start|>"})
    tokenizer, reference = assert_same_ids(directory), AutoTokenizer.from_pretrained(directory)
    assert tokenizer.eos_token_id == reference.eos_token_id
    assert tokenizer.render_chat(MESSAGES) == reference.apply_chat_template(
        MESSAGES, tokenize=False, add_generation_prompt=True
    )


# --- vocab.json and merges.txt ---


@pytest.fixture
def slow(directory):
    """The same tokenizer as vocab.json and merges.txt, with its added tokens in tokenizer_config.json."""
    content = json.loads((directory / "tokenizer.json").read_text())
    (directory / "tokenizer.json").unlink()
    (directory / "vocab.json").write_text(json.dumps(content["model"]["vocab"], ensure_ascii=False))
    merges = [" ".join(merge) for merge in content["model"]["merges"]]
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    tokens = {str(token.pop("id")): token for token in content["added_tokens"]}
    change(directory, "tokenizer_config.json", added_tokens_decoder=tokens, tokenizer_class="Qwen2Tokenizer")
    return directory


def test_vocab_and_merges_are_a_tokenizer(slow, small_tokenizer):
    tokenizer = assert_same_ids(slow, Qwen2Tokenizer.from_pretrained(slow))
    whole = Tokenizer.open(small_tokenizer)
    assert [tokenizer.encode(text) for text in TEXTS] == [whole.encode(text) for text in TEXTS]


def test_added_tokens_json_gives_the_added_tokens(slow):
    config = json.loads((slow / "tokenizer_config.json").read_text())
    tokens = {token["content"]: int(id) for id, token in config.pop("added_tokens_decoder").items()}
    (slow / "added_tokens.json").write_text(json.dumps(tokens))
    (slow / "tokenizer_config.json").write_text(json.dumps(config))
    assert_same_ids(slow, Qwen2Tokenizer.from_pretrained(slow))


def test_vocab_and_merges_alone(slow):
    (slow / "tokenizer_config.json").unlink()
    assert_same_ids(slow, Qwen2Tokenizer.from_pretrained(slow))


@pytest.mark.real
def test_real_vocab_and_merges(real_checkpoint, tmp_path):
    content = json.loads((real_checkpoint / "tokenizer.json").read_text())
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"])
    (tmp_path / "merges.txt").write_text("\n".join(merges))
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        shutil.copy(real_checkpoint / name, tmp_path)
    tokens = {str(token.pop("id")): token for token in content["added_tokens"]}
    change(tmp_path, "tokenizer_config.json", added_tokens_decoder=tokens)
    whole, built = Tokenizer.open(real_checkpoint), Tokenizer.open(tmp_path)
    assert [built.encode(text) for text in TEXTS] == [whole.encode(text) for text in TEXTS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("merges.txt", "a b c\n", "is not a pair of tokens"),
        ("merges.txt", "zz zzz\n", "merges.txt cannot be used"),
        ("vocab.json", '{"a": "5"}', "a different id"),
        ("vocab.json", '{"a": 1, "b": 1}', "a different id"),
        ("vocab.json", "[" * 100_000, "is not JSON"),
        ("added_tokens.json", '{"<x>": -1}', "a different id"),
        ("added_tokens.json", '{"<x>": 12345}', "the files are not of the same tokenizer"),
    ],
)
def test_damaged_vocabularies_are_one_line(slow, name, content, message):
    if name == "added_tokens.json":
        config = json.loads((slow / "tokenizer_config.json").read_text())
        del config["added_tokens_decoder"], config["eos_token"]
        (slow / "tokenizer_config.json").write_text(json.dumps(config))
    (slow / name).write_text(content)
    with pytest.raises(CheckpointError) as error:
        Tokenizer.open(slow)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_pattern_that_takes_too_long_is_one_line(small_tokenizer, tmp_path):
    directory = shutil.copytree(small_tokenizer, tmp_path / "model")
    content = json.loads((directory / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    (directory / "tokenizer.json").write_text(json.dumps(content | {"pre_tokenizer": split}))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be used with this text: .*retry-limit"):
        Tokenizer.open(directory).encode("x" * 60)


# --- settings ---


@pytest.mark.parametrize(
    ("key", "value"),
    [("add_prefix_space", True), ("clean_up_tokenization_spaces", True), ("split_special_tokens", True), ("unheard_of", 3)],
)
def test_settings_that_are_not_understood_are_refused(directory, key, value):
    change(directory, "tokenizer_config.json", **{key: value})
    with pytest.raises(CheckpointError, match=rf"{key} = .*ignored_config_keys"):
        Tokenizer.open(directory)
    for ignored in (key, f"tokenizer_config.{key}"):
        Tokenizer.open(directory, [ignored])


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_files_that_cannot_be_read_are_one_line(directory, name):
    (directory / name).unlink(missing_ok=True)
    (directory / name).mkdir()
    with pytest.raises(CheckpointError, match=rf"{name} is not a regular file$"):
        Tokenizer.open(directory)
    (directory / name).rmdir()
    (directory / name).write_text('{"a": ' * 100_000)
    with pytest.raises(CheckpointError, match=rf"{name} is not JSON: .{{0,200}}$"):
        Tokenizer.open(directory)


@pytest.mark.parametrize("eos", [10**30, -1, "5", 2.5, True, [1, None], {}])
def test_stop_ids_of_another_type_are_one_line(directory, eos):
    change(directory, "generation_config.json", eos_token_id=eos)
    with pytest.raises(CheckpointError, match=r"eos_token_id must be a token id or a list of them; got .{1,80}$"):
        Tokenizer.open(directory)


# --- chat templates as files ---


def test_named_templates_in_files(directory, tmp_path):
    folder = directory / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("tools {{ tools[0] | tojson }} {{ messages[0].content }}")
    (folder / "rag.jinja").write_text("rag")
    (directory / "chat_template.jinja").write_text("default {{ messages[0].content }}")
    tokenizer, reference = Tokenizer.open(directory), AutoTokenizer.from_pretrained(directory)
    for variables in ({}, {"tools": TOOLS}):
        expected = reference.apply_chat_template(MESSAGES, tokenize=False, **variables)
        assert tokenizer.render_chat(MESSAGES, **variables) == expected
    assert tokenizer.render_chat(MESSAGES, tools=TOOLS).startswith("tools {")


def test_a_copy_renders_as_the_original(directory, tmp_path):
    folder = directory / "additional_chat_templates"
    folder.mkdir()
    (folder / "tool_use.jinja").write_text("tools {{ tools[0] | tojson }} {{ messages[0].content }}")
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "old {{ messages[0].content }}"}))
    files = read_extra_files(LocalFolder(directory))
    copy = tmp_path / "written"
    for name, content in (files | {"config.json": (directory / "config.json").read_bytes()}).items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(content)
    for variables in ({}, {"tools": TOOLS}):
        assert Tokenizer.open(copy).render_chat(MESSAGES, **variables) == Tokenizer.open(directory).render_chat(
            MESSAGES, **variables
        )


def test_an_adapters_own_tokenizer_is_noticed(directory, tmp_path):
    tokenizer = Tokenizer.open(directory)
    (tmp_path / "nothing").mkdir()
    assert tokenizer.differences(tmp_path / "nothing") == tokenizer.differences(directory) == []
    adapter = shutil.copytree(directory, tmp_path / "adapter")
    (adapter / "chat_template.jinja").write_text("another")
    content = json.loads((adapter / "tokenizer.json").read_text())
    content["added_tokens"].pop()
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    assert tokenizer.differences(adapter) == ["chat template", "vocabulary"]

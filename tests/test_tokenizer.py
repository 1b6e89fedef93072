"""The tokenizer against transformers, with a small tokenizer trained here and with the real one."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from qwen_dist.errors import CheckpointError, UserError
from qwen_dist.tokenizer import StopStrings, StreamDecoder, Tokenizer

TEXTS = [
    "",
    "Hello, world!  Two spaces .",
    "Größe, naïve, e\u0301 (combining), ﬁ",
    "日本語のテキスト 中文 한국어 עברית",
    "😀 👩‍👩‍👧‍👦 🇩🇪 a\u200db",
    "def f(x):\n\t\treturn {'a': x ** 2}  # 'tis\r\n\r\n\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <think>x</think>",
    "1234567890 3.14\u00a0€\ufffd\x00\x7f",
]
TOOLS = [{"type": "function", "function": {"name": "größe", "parameters": {"a": "<int> & 'x'", "b": [1, 2.5, None]}}}]
CALL = {"type": "function", "function": {"name": "größe", "arguments": {"a": "<1>"}}}
CHATS = [
    [{"role": "user", "content": "Hi 😀"}],
    [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "  spaces  "}],
    [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": '{"t": "21°"}'},
        {"role": "assistant", "content": "21 degrees"},
        {"role": "user", "content": "<|im_end|>thanks"},
    ],
]


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer: Path) -> Tokenizer:
    return Tokenizer.open(small_tokenizer)


@pytest.fixture(scope="module")
def reference(small_tokenizer: Path):
    return AutoTokenizer.from_pretrained(small_tokenizer)


def copy_of(small_tokenizer: Path, tmp_path: Path, **changes: object) -> Path:
    """A copy of the checkpoint directory: `name__json=content` writes a file, None removes it."""
    directory = tmp_path / "copy"
    shutil.copytree(small_tokenizer, directory)
    for name, content in changes.items():
        file = directory / name.replace("__", ".")
        if content is None:
            file.unlink()
        else:
            file.write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def tokenizer_config(small_tokenizer: Path, **changes: object) -> dict:
    return json.loads((small_tokenizer / "tokenizer_config.json").read_text()) | changes


def assert_same_as(reference, tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)
    for chat in CHATS:
        for variables in ({}, {"tools": TOOLS}, {"enable_thinking": False}, {"add_generation_prompt": False}):
            if "enable_thinking" in variables and "enable_thinking" not in reference.chat_template:
                continue  # refused here, ignored there
            given = {"add_generation_prompt": True, **variables}
            assert tokenizer.render_chat(chat, **given) == reference.apply_chat_template(chat, tokenize=False, **given)
            expected = reference.apply_chat_template(chat, return_dict=False, **given)
            assert tokenizer.apply_chat_template(chat, **given) == expected


def stream(tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip_special_tokens)
    return [*(decoder.push(id) for id in ids), decoder.flush()]


def test_small_tokenizer_is_transformers(tokenizer, reference):
    assert_same_as(reference, tokenizer)
    assert tokenizer.vocab_size == len(reference)


@pytest.mark.real
def test_real_tokenizer_is_transformers(real_checkpoint: Path):
    tokenizer = Tokenizer.open(real_checkpoint)
    assert_same_as(AutoTokenizer.from_pretrained(real_checkpoint), tokenizer)
    assert tokenizer.stop_ids == {151643, 151645}
    assert tokenizer.vocab_size == 151665
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert "".join(stream(tokenizer, ids, False)) == tokenizer.decode(ids, False)


@pytest.mark.real
def test_real_tokens_have_the_bytes_that_decode_gives(real_checkpoint: Path):
    tokenizer = Tokenizer.open(real_checkpoint)
    ids = range(tokenizer.vocab_size + 5)
    assert [tokenizer.token_bytes(id).decode(errors="replace") for id in ids] == [
        tokenizer.decode([id], False) for id in ids
    ]


@settings(deadline=None)
@given(data=st.data())
def test_stream_is_the_full_decode(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    skip = data.draw(st.booleans())
    assert "".join(stream(tokenizer, ids, skip)) == tokenizer.decode(ids, skip)


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_stream_of_text_never_shows_half_a_character(tokenizer, text):
    ids = tokenizer.encode(text)
    full = tokenizer.decode(ids, False)
    pieces = stream(tokenizer, ids, False)
    assert "".join(pieces) == full
    assert sum(piece.count("\ufffd") for piece in pieces) == full.count("\ufffd")


def test_stream_shows_a_character_with_the_token_that_completes_it(tokenizer):
    smile = [tokenizer._backend.token_to_id(char) for char in "ðŁĺĥ"]  # U+1F603, a token for each byte
    assert stream(tokenizer, [*smile, *smile[:2]]) == ["", "", "", "😃", "", "", "\ufffd"]


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "stopped"),
    [
        ([], ["a", "b"], ["a", "b", ""], None),
        (["END"], ["an E", "N", "D of"], ["an ", "", "", ""], "END"),
        (["END"], ["an E", "N", "d."], ["an ", "", "ENd.", ""], None),
        (["END"], ["an E", "N"], ["an ", "", "EN"], None),
        (["aab"], ["aa", "a", "b!"], ["", "a", "", ""], "aab"),
        (["\n\n", "```"], ["x\n", "``", "`"], ["x", "\n", "", ""], "```"),
        (["abc", "b"], ["abc"], ["a", ""], "b"),
        (["c", "abc"], ["abc"], ["", ""], "abc"),
        (["日本"], ["今日", "本だ"], ["今", "", ""], "日本"),
        (["x"], ["ax", "bx"], ["a", "", ""], "x"),
    ],
)
def test_stop_strings(stops, pieces, shown, stopped):
    watch = StopStrings(stops)
    assert [*(watch.push(piece) for piece in pieces), watch.flush()] == shown
    assert watch.stopped == stopped


@given(
    text=st.text("ab", max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.sets(st.integers(0, 12)),
)
def test_stop_strings_do_not_depend_on_how_the_text_is_divided(text, stops, cuts):
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    watch = StopStrings(stops)
    shown = "".join(watch.push(text[a:b]) for a, b in itertools.pairwise(edges)) + watch.flush()
    ends = [end for end in range(len(text) + 1) if text[:end].endswith(tuple(stops))] if stops else []
    if not ends:
        assert (shown, watch.stopped) == (text, None)
    else:
        longest = max((stop for stop in stops if text[: ends[0]].endswith(stop)), key=len)
        assert (shown, watch.stopped) == (text[: ends[0]].removesuffix(longest), longest)


@pytest.mark.parametrize("stops", [[""], ["ok", 3]])
def test_stop_strings_must_be_strings(stops):
    with pytest.raises(UserError, match="non-empty strings"):
        StopStrings(stops)


def test_stop_ids(small_tokenizer, tmp_path, tokenizer):
    end, im_end = (tokenizer.encode(token)[0] for token in ("<|endoftext|>", "<|im_end|>"))
    assert tokenizer.stop_ids == {end, im_end}
    one = copy_of(small_tokenizer, tmp_path / "one", generation_config__json={"eos_token_id": end})
    assert Tokenizer.open(one).stop_ids == {end}
    none = copy_of(small_tokenizer, tmp_path / "none", generation_config__json=None)
    assert Tokenizer.open(none).stop_ids == {end, im_end}
    nested = {"text_config": {"eos_token_id": 7}}
    nested_dir = copy_of(small_tokenizer, tmp_path / "nested", generation_config__json={"top_k": 1}, config__json=nested)
    assert Tokenizer.open(nested_dir).stop_ids == {7, im_end}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer__json": None, "config__json": None}, "has no tokenizer.json, config.json: give"),
        ({"tokenizer__json": None, "vocab__json": {"a": "x"}, "merges__txt": ""}, "a different id"),
        ({"tokenizer__json": '{"version"'}, "tokenizer.json cannot be read"),
        ({"tokenizer_config__json": "{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config__json": []}, "must hold a JSON object"),
        ({"tokenizer_config__json": {"eos_token": 5}}, "eos_token must be a token; got 5"),
        ({"tokenizer_config__json": {"chat_template": [1]}}, "chat_template must be a string or a list"),
        ({"generation_config__json": {"eos_token_id": ["x"]}}, r"must be a token id or a list of them; got \['x'\]"),
        (
            {"generation_config__json": None, "tokenizer_config__json": {"eos_token": "<nope>"}},
            "names the eos_token '<nope>', unknown to",
        ),
        (
            {"generation_config__json": None, "tokenizer_config__json": {}, "config__json": {}},
            "no end-of-text id",
        ),
    ],
)
def test_invalid_directories_are_reported_by_file(small_tokenizer, tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.open(copy_of(small_tokenizer, tmp_path, **changes))


def test_decoder_that_is_not_byte_level_is_refused(small_tokenizer, tmp_path):
    backend = json.loads((small_tokenizer / "tokenizer.json").read_text()) | {"decoder": {"type": "Fuse"}}
    with pytest.raises(CheckpointError, match="byte-level"):
        Tokenizer.open(copy_of(small_tokenizer, tmp_path, tokenizer__json=backend))


def test_truncation_in_tokenizer_json_does_not_cut_prompts(small_tokenizer, tmp_path, tokenizer):
    backend = Backend.from_file(str(small_tokenizer / "tokenizer.json"))
    backend.enable_truncation(2)
    directory = copy_of(small_tokenizer, tmp_path, tokenizer__json=backend.to_str())
    assert Tokenizer.open(directory).encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])


def test_half_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"U\+D83D\) at character 2"):
        tokenizer.encode("ab\ud83d")


def test_files_of_the_chat_template(small_tokenizer, tmp_path):
    both = "{{ messages[0].content ~ tools }}"
    named = [{"name": "default", "template": "D{{ messages[0].content }}"}, {"name": "tool_use", "template": "T" + both}]
    directory = copy_of(
        small_tokenizer, tmp_path, tokenizer_config__json=tokenizer_config(small_tokenizer, chat_template=named)
    )
    chat = CHATS[0]
    assert Tokenizer.open(directory).render_chat(chat) == "DHi 😀"
    assert Tokenizer.open(directory).render_chat(chat, tools=TOOLS).startswith("THi 😀[{'type': 'function'")
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "J{{ messages[0].content }}"}))
    assert Tokenizer.open(directory).render_chat(chat) == "JHi 😀"
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    assert Tokenizer.open(directory).render_chat(chat) == "Hi 😀!"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{% if %}", "chat template is broken: line 1"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "is not safely callable|unsafe"),
        ("{{ messages[0].content + 1 }}", "cannot be rendered"),
    ],
)
def test_bad_chat_templates(small_tokenizer, tmp_path, template, message):
    directory = copy_of(
        small_tokenizer, tmp_path, tokenizer_config__json=tokenizer_config(small_tokenizer, chat_template=template)
    )
    with pytest.raises(UserError, match=message):
        Tokenizer.open(directory).render_chat(CHATS[0])


def test_text_parts_are_joined(tokenizer):
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    chat = [{"role": "user", "content": parts}]
    assert tokenizer.render_chat(chat, add_generation_prompt=False) == "<|im_start|>user\na b<|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "non-empty list"),
        ("hello", "non-empty list"),
        ([{"role": "user", "content": "x"}, "y"], r"messages\[1\]: must be an object"),
        ([{"content": 3}], 'messages.0.: "role" must be .*; messages.0.: "content" must be'),
        ([{"role": "user"}], '"content" is missing'),
        ([{"role": "user", "content": [{"type": "image"}]}], r"content\[0\] must be .*reads text only"),
        ([{"role": "poet", "content": "x"}], r"messages\[0\]: .role. must be one of system, user, .*; got 'poet'"),
    ],
)
def test_invalid_messages_are_refused(tokenizer, messages, message):
    with pytest.raises(UserError, match=message):
        tokenizer.apply_chat_template(messages)

"""From files to batches: loss masks, bad records and their locations, packing, and a reproducible order."""

import itertools
import json
import shutil

import numpy as np
import pyarrow.parquet
import pytest
import transformers
from chat_templates import CHATML, QWEN3, QWEN3_THINKING, QWQ, R1

from qwen_dist.batch.jsonl import read_records
from qwen_dist.config import DataOptions
from qwen_dist.errors import UsageError, UserError
from qwen_dist.tokenizer import Tokenizer
from qwen_dist.train.batches import evaluation_batches, rows_per_epoch, training_batches
from qwen_dist.train.examples import Examples, make_examples, tokenize
from qwen_dist.train.records import BadTrainRecord, RecordLocation, TrainRecord, find_data_files, read_train_records

USER, ASSISTANT = {"role": "user", "content": "the fox"}, {"role": "assistant", "content": "brown dog"}
CHAT = [{"role": "system", "content": "lazy"}, USER, ASSISTANT, USER, {"role": "assistant", "content": "the quick\n"}]


@pytest.fixture(scope="module")
def tokenizer(small_tokenizer):
    return Tokenizer.open(small_tokenizer)


@pytest.fixture
def write_file(tmp_path):
    """A function (name, *records) -> path; a record is JSON, or bytes as they are."""

    def write_file(name, *records):
        lines = [record if isinstance(record, bytes) else json.dumps(record).encode() for record in records]
        (tmp_path / name).write_bytes(b"\n".join(lines) + b"\n")
        return str(tmp_path / name)

    return write_file


def target_texts(record, tokenizer):
    """The text of each span that the loss counts."""
    tokens, loss_mask = tokenize(record, tokenizer)
    spans, before = [], False
    for token, is_target in zip(tokens, loss_mask, strict=True):
        if is_target:
            spans += [[]] if not before else []
            spans[-1].append(token)
        before = is_target
    return [tokenizer.decode(span, skip_special_tokens=False) for span in spans]


def record_of(fields, write_file, raw=False):
    (record,) = read_train_records([write_file("one.jsonl", fields)], raw=raw)
    return record


def test_every_assistant_turn_with_its_end_is_a_target(tokenizer, write_file):
    record = record_of({"messages": CHAT}, write_file)
    assert target_texts(record, tokenizer) == ["brown dog<|im_end|>", "the quick\n<|im_end|>"]
    tokens, _ = tokenize(record, tokenizer)
    # All but the newline after the last turn: no target follows it.
    assert tokens == tokenizer.apply_chat_template(CHAT, add_generation_prompt=False)[: len(tokens)]


def test_the_loss_mask_covers_the_assistant_mask_of_transformers(tokenizer, small_tokenizer, write_file):
    """The template marks the contents only; the loss also counts the token after each, without which no answer ends."""
    theirs = transformers.AutoTokenizer.from_pretrained(small_tokenizer).apply_chat_template(
        CHAT, return_dict=True, return_assistant_tokens_mask=True
    )
    tokens, loss_mask = tokenize(record_of({"messages": CHAT}, write_file), tokenizer)
    assert theirs["input_ids"][: len(tokens)] == tokens
    marked = np.array(theirs["assistant_masks"][: len(tokens)], bool)
    more = np.flatnonzero(np.array(loss_mask) & ~marked)
    assert not (marked & ~np.array(loss_mask)).any()
    assert [tokens[index] for index in more] == [tokenizer.eos_token_id] * 2


def test_an_answer_equal_to_the_question_or_the_generation_prompt_is_found(tokenizer, write_file):
    same = [USER, {"role": "assistant", "content": USER["content"]}]
    assert target_texts(record_of({"messages": same}, write_file), tokenizer) == ["the fox<|im_end|>"]
    tricky = [{"role": "user", "content": "<|im_start|>assistant\nbrown"}, {"role": "assistant", "content": "brown"}]
    assert target_texts(record_of({"messages": tricky}, write_file), tokenizer) == ["brown<|im_end|>"]


def test_tool_calls_are_targets(tokenizer, write_file):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
    chat = [USER, call, {"role": "tool", "content": "3"}, ASSISTANT]
    called, said = target_texts(record_of({"messages": chat, "tools": [{"name": "f"}]}, write_file), tokenizer)
    assert called.startswith("<tool_call>") and called.endswith("</tool_call><|im_end|>") and '"f"' in called
    assert said == "brown dog<|im_end|>"


def test_answers_of_weight_0_are_not_targets(tokenizer, write_file):
    chat = [USER, ASSISTANT | {"weight": 0}, USER, {"role": "assistant", "content": "the quick", "weight": 1}]
    assert target_texts(record_of({"messages": chat}, write_file), tokenizer) == ["the quick<|im_end|>"]
    none = record_of({"messages": [USER, ASSISTANT | {"weight": 0}]}, write_file)
    assert isinstance(none, BadTrainRecord) and none.reason == "no assistant turn"


def test_tools_and_arguments_may_be_texts(tokenizer, write_file):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    chats = [
        [USER, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}]
        for given in ({"a": 2}, '{"a": 2}')
    ]
    one = record_of({"messages": chats[0], "tools": tools}, write_file)
    other = record_of({"messages": chats[1], "tools": json.dumps(tools)}, write_file)
    assert tokenize(one, tokenizer) == tokenize(other, tokenizer)


@pytest.fixture
def with_template(small_tokenizer, tmp_path):
    """A function template -> the small tokenizer with it, whose texts end with <|endoftext|> as those of a base model."""

    def with_template(template):
        directory = tmp_path / "base"
        shutil.copytree(small_tokenizer, directory)
        (directory / "generation_config.json").unlink()
        settings = json.loads((directory / "tokenizer_config.json").read_text())
        settings |= {"chat_template": template, "eos_token": "<|endoftext|>"}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        return Tokenizer.open(directory)

    return with_template


THOUGHT = ASSISTANT | {"reasoning_content": "lazy"}
INLINE = {"role": "assistant", "content": "<think>\nlazy\n</think>\n\nbrown dog"}
TABLE = {"role": "assistant", "content": "<table> over"}


@pytest.mark.parametrize(
    ("template", "chat", "expected"),
    [
        (CHATML, [USER, ASSISTANT, USER, ASSISTANT], ["brown dog<|im_end|>"] * 2),
        (CHATML, [USER, INLINE], ["<think>\nlazy\n</think>\n\nbrown dog<|im_end|>"]),
        (CHATML, [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}], ["<|im_end|>"]),
        # The opening of an answer in a question, and the end of one in an answer.
        (CHATML, [{"role": "user", "content": "<|im_start|>assistant\nfox"}, TABLE], ["<table> over<|im_end|>"]),
        (CHATML, [USER, {"role": "assistant", "content": "a<|im_end|>b"}], ["a<|im_end|>b<|im_end|>"]),
        (QWEN3, [USER, ASSISTANT], ["<think>\n\n</think>\n\nbrown dog<|im_end|>"]),
        (QWEN3, [USER, THOUGHT, USER, THOUGHT], ["brown dog<|im_end|>", "<think>\nlazy\n</think>\n\nbrown dog<|im_end|>"]),
        (QWEN3_THINKING, [USER, THOUGHT], ["lazy\n</think>\n\nbrown dog<|im_end|>"]),
        (QWEN3_THINKING, [USER, INLINE], ["lazy\n</think>\n\nbrown dog<|im_end|>"]),
        (QWEN3_THINKING, [USER, TABLE, USER, THOUGHT], ["<table> over<|im_end|>", "lazy\n</think>\n\nbrown dog<|im_end|>"]),
        (QWQ, [USER, ASSISTANT, USER, TABLE], ["brown dog<|im_end|>", "<table> over<|im_end|>"]),
        (R1, [USER, ASSISTANT, {"role": "system", "content": "over"}, USER, INLINE],
         ["brown dog<|im_end|>", "\n\nbrown dog<|im_end|>"]),
        (QWEN3_THINKING, [{"role": "user", "content": "<|im_start|>assistant\n<think>\n"}, ASSISTANT, USER, THOUGHT],
         ["brown dog<|im_end|>", "lazy\n</think>\n\nbrown dog<|im_end|>"]),
        # With the mark at its end, the message is a question, which changes how answers before it are written.
        (QWEN3, [USER, THOUGHT, {"role": "user", "content": "<tool_response>3</tool_response>"}, ASSISTANT],
         ["<think>\nlazy\n</think>\n\nbrown dog<|im_end|>", "<think>\n\n</think>\n\nbrown dog<|im_end|>"]),
    ],
)  # fmt: skip
def test_targets_are_what_the_model_writes(with_template, write_file, template, chat, expected):
    tokenizer = with_template(template)
    assert target_texts(record_of({"messages": chat}, write_file), tokenizer) == expected


def test_thinking_can_be_switched_off(with_template, write_file):
    tokenizer = with_template(QWEN3)
    off = record_of({"messages": [USER, ASSISTANT], "chat_template_kwargs": {"enable_thinking": False}}, write_file)
    assert target_texts(off, tokenizer) == ["brown dog<|im_end|>"]
    (same,) = read_train_records(
        [write_file("one.jsonl", {"messages": [USER, ASSISTANT]})], raw=False, variables={"enable_thinking": False}
    )
    assert tokenize(same, tokenizer) == tokenize(off, tokenizer)


def test_templates_whose_answers_have_no_end(with_template, write_file):
    tokenizer = with_template(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    )
    with pytest.raises(UserError, match="writes no special token after an answer"):
        tokenize(record_of({"messages": [USER, ASSISTANT]}, write_file), tokenizer)


def test_sharegpt(tokenizer, write_file):
    turns = [{"from": "human", "value": "the fox"}, {"from": "gpt", "value": "brown dog", "weight": None}]
    same = record_of({"messages": [{"role": "system", "content": "lazy"}, USER, ASSISTANT]}, write_file)
    assert record_of({"conversations": turns, "system": "lazy"}, write_file).chat == same.chat
    assert record_of({"conversations": [{"from": "system", "value": "lazy"}, *turns]}, write_file).chat == same.chat
    assert record_of({"conversations": [USER, ASSISTANT], "id": 3}, write_file).chat.messages == (USER, ASSISTANT)
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'}
    called = record_of({"conversations": [turns[0], call, {"from": "observation", "value": "3"}, turns[1]]}, write_file)
    assert called.chat.messages[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert [message["role"] for message in called.chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert record_of({"conversations": [{"from": "robot", "value": "x"}, *turns]}, write_file).reason == "unknown role"
    assert record_of({"conversations": [turns[0] | {"markdown": "x"}, turns[1]]}, write_file).reason == "invalid chat"
    assert record_of({"conversations": [{"from": "function_call", "value": "find"}]}, write_file).reason == "invalid chat"


def test_alpaca(tokenizer, write_file):
    fields = {"instruction": "the fox", "input": "over", "output": "brown dog"}
    question = {"role": "user", "content": "the fox\nover"}
    assert record_of(fields, write_file).chat.messages == (question, ASSISTANT)
    assert record_of(fields | {"input": ""}, write_file).chat.messages == (USER, ASSISTANT)
    history = record_of(fields | {"system": "lazy", "history": [["the", "quick"]]}, write_file)
    assert [message["content"] for message in history.chat.messages] == [
        "lazy",
        "the",
        "quick",
        "the fox\nover",
        "brown dog",
    ]
    assert target_texts(history, tokenizer) == ["quick<|im_end|>", "brown dog<|im_end|>"]
    assert record_of(fields | {"output": ""}, write_file).reason == "empty text"
    assert record_of(fields | {"history": ["x"]}, write_file).reason == "unknown format"
    raw = record_of(fields, write_file, raw=True)
    assert (raw.prompt, raw.text) == ("the fox\nover", "brown dog")
    assert record_of(fields | {"system": "lazy"}, write_file, raw=True).reason == "unknown format"


def test_arrays_in_json_files(write_file):
    records = [{"messages": [USER, ASSISTANT]}, 3, {"messages": [USER, ASSISTANT]}]
    path = write_file("array.json", json.dumps(records, indent=2).encode())
    one, bad, other = read_train_records([path], raw=False)
    assert one.chat == other.chat and str(other.location) == f"{path}:3"
    assert bad.reason == "broken line" and "the item must be a JSON object; it is 3" in bad.detail
    assert len(list(read_train_records([write_file("lines.json", *records[::2])], raw=False))) == 2
    with pytest.raises(UserError, match=r"array\.json is not JSON"):
        list(read_train_records([write_file("array.json", b"[{},")], raw=False))


def test_a_text_that_is_far_too_long_is_not_tokenized(tokenizer, write_file):
    long = {"role": "user", "content": "fox " * 2**20}
    path = write_file("long.jsonl", {"messages": [USER, ASSISTANT]}, {"messages": [long, ASSISTANT]})
    skipped = make_examples(read_train_records([path], raw=False), tokenizer, max_length=32, bad_records="skip")
    (bad,) = skipped.bad
    assert bad.reason == "too long" and "has 4194304 bytes and so at least" in bad.detail


def test_prompts_with_completions(tokenizer, write_file):
    fields = {"prompt": "the fox", "completion": "brown dog"}
    as_chat = record_of({"messages": [USER, ASSISTANT]}, write_file)
    assert tokenize(record_of(fields, write_file), tokenizer) == tokenize(as_chat, tokenizer)
    raw = record_of(fields, write_file, raw=True)
    assert target_texts(raw, tokenizer) == ["brown dog<|im_end|>"]
    assert tokenizer.decode(tokenize(raw, tokenizer)[0], skip_special_tokens=False) == "the foxbrown dog<|im_end|>"
    turns = record_of({"prompt": CHAT[:4], "completion": CHAT[4:]}, write_file)
    assert target_texts(turns, tokenizer) == ["the quick\n<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", '{"text": "fox"}\n'), ("a.json", '[{"text": "fox"}]'), ("a.txt", "fox")]
)
def test_a_byte_order_mark_is_not_learnt(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    (record,) = read_train_records([str(tmp_path / name)], raw=True)
    assert record.text == "fox"


def test_long_texts_are_split_and_all_of_their_tokens_are_targets(tokenizer, tmp_path):
    (tmp_path / "book.txt").write_text("the quick brown fox " * 40)
    examples = make_examples(
        read_train_records([str(tmp_path / "book.txt")], raw=False), tokenizer, max_length=16, bad_records="refuse"
    )
    whole = [*tokenizer.encode("the quick brown fox " * 40), tokenizer.eos_token_id]
    assert all(len(example) <= 16 for example in examples.examples)
    spans = [example.tokens[1:].tolist() for example in examples.examples]
    assert [whole[0], *itertools.chain(*spans)] == whole
    assert examples.num_target_tokens == examples.num_positions == len(whole) - 1


BAD = {
    "broken line": b'{"messages": [',
    "broken line 2": b"[1, 2]",
    "broken line 3": b'{"text": "\xff"}',
    "empty conversation": {"messages": []},
    "no assistant turn": {"messages": [USER]},
    "unknown role": {"messages": [USER, {"role": "robot", "content": "x"}]},
    "mixed file": {"text": "the fox"},
    "too long": {"messages": [USER, {"role": "assistant", "content": "fox " * 99}]},
    "unknown format": {"question": "why"},
    "invalid chat": {"messages": [{"role": "user"}, ASSISTANT]},
}


def test_bad_records_are_counted_and_named(tokenizer, write_file):
    good = {"messages": [USER, ASSISTANT]}
    path = write_file("mixed.jsonl", good, *BAD.values(), b"", good)
    with pytest.raises(UserError) as error:
        make_examples(read_train_records([path], raw=False), tokenizer, max_length=32, bad_records="refuse")
    first, *lines = str(error.value).split("\n")
    assert first.startswith("10 records cannot be used: 3 broken line, 1 empty conversation, 1 no assistant turn")
    for number, kind in enumerate(BAD, 2):
        assert lines[number - 2].startswith(f"  - {path}:{number}: {kind.rstrip(' 23')}: "), lines[number - 2]
    skipped = make_examples(read_train_records([path], raw=False), tokenizer, max_length=32, bad_records="skip")
    assert len(skipped) == 2 and [bad.location.line for bad in skipped.bad] == list(range(2, 12))
    assert skipped.examples[1].location == RecordLocation(path, 13)


def test_nothing_to_train_on(tokenizer, write_file):
    path = write_file("bad.jsonl", BAD["unknown role"])
    with pytest.raises(UserError, match=r"nothing to train on: 1 records cannot be used: 1 unknown role"):
        make_examples(read_train_records([path], raw=False), tokenizer, max_length=32, bad_records="skip")


def test_missing_files(write_file, tmp_path):
    one, two = write_file("b.jsonl", {}), write_file("a.jsonl", {})
    assert find_data_files([f"{tmp_path}/*.jsonl"]) == [two, one]
    with pytest.raises(UsageError) as error:
        find_data_files([f"{tmp_path}/*.txt", f"{tmp_path}/none.jsonl", write_file("x.csv")])
    assert all(text in str(error.value) for text in ("no file matches", "there is no file", "x.csv: a data file ends in"))


def test_parquet_tables(tokenizer, write_file, tmp_path):
    rows = [{"messages": [USER, ASSISTANT]}, {"messages": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = list(read_train_records([str(tmp_path / "t.parquet")], raw=False))
    assert isinstance(found[0], TrainRecord) and list(found[0].chat.messages) == rows[0]["messages"]
    assert isinstance(found[1], BadTrainRecord) and str(found[1].location) == f"{tmp_path}/t.parquet:2"


def test_the_nulls_that_arrow_adds_are_not_given(write_file, tmp_path):
    """A column of objects has the keys of all rows, and null where a row has none."""
    tools = [{"function": {"name": "f", "parameters": {"a": {"type": "number"}}}}, {"function": {"name": "g"}}]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    rows = [{"messages": [USER, call], "tools": tools[:1]}, {"messages": [USER, ASSISTANT], "tools": tools[1:]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    found = [record.chat for record in read_train_records([str(tmp_path / "t.parquet")], raw=False)]
    assert found == [record.chat for record in read_train_records([write_file("t.jsonl", *rows)], raw=False)]
    inputs = [line.request.messages for line in read_records(tmp_path / "t.parquet")]
    assert inputs == [[USER, call], [USER, ASSISTANT]]


@pytest.fixture(scope="module")
def examples(tokenizer):
    """Thirty examples of 3 to 20 tokens."""
    rng = np.random.default_rng(0)
    texts = [f"{'fox ' * int(rng.integers(1, 18))}" for _ in range(30)]
    records = [TrainRecord(RecordLocation("made", n), "prompt", prompt="the", text=text) for n, text in enumerate(texts)]
    return make_examples(records, tokenizer, max_length=64, bad_records="refuse")


def take(batches, count):
    return [next(batches) for _ in range(count)]


@pytest.mark.parametrize("packing", [True, False])
def test_an_iteration_resumes_at_its_position(examples, packing):
    options = DataOptions(files=("made",), max_length=64, packing=packing, seed=3)
    batches = training_batches(examples, options, 4)
    take(batches, 5)
    position = json.loads(json.dumps(batches.get_state()))
    next_batches = take(batches, 30)  # over the ends of several epochs
    again = training_batches(examples, options, 4)
    again.set_state(position)
    for one, other in zip(next_batches, take(again, 30), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_an_epoch_has_every_example_once_and_the_next_a_different_order(examples):
    options = DataOptions(files=("made",), max_length=64, packing=False, seed=3)
    batches = training_batches(examples, options, 5)
    epochs = [[row[: len(row)].tobytes() for batch in take(batches, 6) for row in batch.tokens] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]
    assert rows_per_epoch(examples, options) == 30


def test_rows_hold_whole_examples_whose_positions_begin_at_0(examples):
    options = DataOptions(files=("made",), max_length=64, packing=True)
    found = []
    for batch in evaluation_batches(examples, options, 4):
        assert batch.tokens.shape == (4, 64)
        for tokens, targets, loss_mask, positions, segments in zip(*batch, strict=True):
            assert ((positions < 0) == (segments == 0)).all() and not loss_mask[positions < 0].any()
            for segment in range(1, segments.max() + 1):
                here = np.flatnonzero(segments == segment)
                assert (np.diff(here) == 1).all() and positions[here].tolist() == list(range(len(here)))
                found.append((*tokens[here], targets[here[-1]]))
    assert sorted(found) == sorted(tuple(example.tokens) for example in examples.examples)


def test_microbatches_are_the_rows_of_a_batch(examples):
    options = DataOptions(files=("made",), max_length=64)
    batch = next(training_batches(examples, options, 6))
    microbatches = batch.microbatches(3)
    assert [each.tokens.shape for each in microbatches] == [(2, 64)] * 3
    assert np.array_equal(np.concatenate([each.segments for each in microbatches]), batch.segments)
    unpacked = next(training_batches(examples, DataOptions(files=("made",), max_length=64, packing=False), 6))
    assert all(each.segments is None for each in unpacked.microbatches(2))


def test_examples_are_a_grain_data_source(examples):
    assert isinstance(examples, Examples) and len(examples) == 30
    fields = examples[0]
    assert {name: values.dtype.name for name, values in fields.items()} == dict.fromkeys(fields, "int32")

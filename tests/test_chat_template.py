"""Chat templates: what they leave out, how they open and end turns, and what a hostile one can cost."""

import datetime
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from chat_templates import CHATML, QWEN3, QWEN3_THINKING, QWQ, R1
from transformers import AutoTokenizer

from qwen_dist import template_process
from qwen_dist.chat import make_chat
from qwen_dist.chat_template import ChatTemplate, TurnFormat
from qwen_dist.errors import CheckpointError, UserError
from qwen_dist.tokenizer import Tokenizer

USER = {"role": "user", "content": "the fox"}
ANSWER = {"role": "assistant", "content": "brown dog"}
THOUGHT = ANSWER | {"reasoning_content": "lazy"}
CALL = {"type": "function", "function": {"name": "find", "arguments": {"what": "dog", "n": None}}}
CALLING = {"role": "assistant", "content": "quick", "tool_calls": [CALL]}
TOOLS = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
CHATS = [
    [USER],
    [{"role": "system", "content": " brief\n"}, USER, ANSWER, USER],
    [USER, THOUGHT, USER, THOUGHT],
    [USER, {"role": "assistant", "content": "<think>\nlazy\n</think>\n\nbrown dog"}],
    [USER, CALLING, {"role": "tool", "content": "3"}, {"role": "tool", "content": "4"}, THOUGHT],
    [{"role": "user", "content": "<tool_response>3</tool_response>"}, ANSWER, USER, ANSWER],
]


def rendered(source, messages, *, add_generation_prompt=True, **variables):
    tools = variables.pop("tools", None)
    template = ChatTemplate(source, {"eos_token": "<|im_end|>"})
    return template.render(make_chat(messages, tools, variables), add_generation_prompt)


@pytest.mark.parametrize("source", [QWEN3, QWEN3_THINKING, QWQ], ids=["qwen3", "thinking", "qwq"])
def test_templates_are_rendered_as_in_transformers(source, small_tokenizer):
    reference = AutoTokenizer.from_pretrained(small_tokenizer)
    for chat in CHATS:
        if source == QWQ and any("tool_calls" in m or "reasoning_content" in m for m in chat):
            continue
        for prompt in (True, False):
            expected = reference.apply_chat_template(
                chat, chat_template=source, tokenize=False, add_generation_prompt=prompt
            )
            assert rendered(source, chat, add_generation_prompt=prompt) == expected


def test_tags_of_transformers(small_tokenizer):
    source = (
        "{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% if loop.index0 == 1 %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y') }}"
    )
    reference = AutoTokenizer.from_pretrained(small_tokenizer)
    assert rendered(source, [USER, ANSWER]) == reference.apply_chat_template(
        [USER, ANSWER], chat_template=source, tokenize=False
    )


@pytest.mark.parametrize(
    ("source", "messages", "tools", "lost"),
    [
        (QWEN3, [{"role": "tool", "content": "x"}, USER], None, None),
        (QWQ, [USER, {"role": "tool", "content": "x"}], None, r"messages\[1\] \(role 'tool'\)"),
        (QWQ, [USER, THOUGHT, USER], None, r"messages\[1\]\.reasoning_content"),
        (QWQ, [USER, CALLING, USER], None, r"messages\[1\]\.tool_calls\[0\], the arguments of messages\[1\]"),
        (QWQ, [USER], TOOLS, r"tools\[0\]"),
        (QWEN3, [USER], TOOLS, None),
        (QWEN3, [USER, THOUGHT, USER], None, None),  # reasoning of an earlier turn
        ("{{ messages[-1].content }}", [USER, ANSWER, USER], None, r"messages\[0\] .*, messages\[1\] \(role 'assistant'\)"),
        ("{{ messages[0].content[:3] }}", [USER], None, r"messages\[0\] \(role 'user'\)"),
        (
            "{% for m in messages %}{{ m.content | upper | trim }}{% endfor %}",
            [{"role": "user", "content": " é\n"}],
            None,
            None,
        ),
        (CHATML, [USER | {"content": ""}, ANSWER | {"content": "  "}], None, None),  # nothing that can be lost
    ],
)
def test_what_a_template_leaves_out_is_refused(source, messages, tools, lost):
    if lost is None:
        assert rendered(source, messages, tools=tools)
        return
    with pytest.raises(UserError, match=f"the chat template does not write {lost}"):
        rendered(source, messages, tools=tools)


def test_many_lost_messages_are_one_short_message():
    with pytest.raises(UserError) as error:
        rendered("nothing", [USER] * 5000)
    assert len(str(error.value)) < 400 and "and 4995 more" in str(error.value)


def test_developer_is_written_as_system_where_the_template_does_not_know_it(caplog):
    developer = {"role": "developer", "content": "brief"}
    assert rendered(QWEN3, [developer, USER]) == rendered(QWEN3, [developer | {"role": "system"}, USER])
    assert "does not write the role developer" in caplog.text
    raising = "{% if messages[0].role == 'developer' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    assert rendered(raising, [developer, USER]).startswith("<|im_start|>system\nbrief")
    assert rendered(CHATML, [developer, USER]).startswith("<|im_start|>developer\nbrief")


def test_templates_that_want_texts_as_arguments_get_them():
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    text = rendered(R1, [USER, calling, {"role": "tool", "content": "3"}, ANSWER, USER | {"content": "why"}])
    assert '<call>find\n{"what": "dog", "n": null}<|im_end|><output>3</output><Assistant>brown dog' in text


def test_variables_that_the_template_does_not_use_are_refused():
    on, off = (rendered(QWEN3, [USER], enable_thinking=value) for value in (True, False))
    assert off == on + "<think>\n\n</think>\n\n"
    with pytest.raises(UserError, match="the chat template does not use enable_thinking"):
        rendered(QWEN3_THINKING, [USER], enable_thinking=False)


@pytest.mark.parametrize(
    ("source", "prompt", "opening", "ending"),
    [
        (CHATML, "<|im_start|>assistant\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
        (QWEN3, "<|im_start|>assistant\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
        (QWEN3_THINKING, "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
        (QWQ, "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n", "<|im_end|>\n"),
        (R1, "<Assistant><think>\n", "<Assistant>", "<|im_end|>"),
    ],
    ids=["chatml", "qwen3", "thinking", "qwq", "r1"],
)
def test_turn_formats(source, prompt, opening, ending):
    assert ChatTemplate(source, {}).turn_format({}) == TurnFormat(prompt, opening, ending)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "has no generation prompt"),
        (
            "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}{{ 'Bot' if add_generation_prompt }}",
            "begin the",
        ),
    ],
)
def test_templates_without_turns(source, message):
    with pytest.raises(UserError, match=message):
        ChatTemplate(source, {}).turn_format({})


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'A' * 4000000000 }}",
        "{{ '%4000000000s' % 'x' }}",
        "{{ '{:>4000000000}'.format(1) }}",
        "{{ 'x'.center(4000000000) }}",
        "{{ 'x'.zfill(4000000000) }}",
        "{{ 'x\n' * 9 | indent(2000000000) }}",
        "{{ [0] * 4000000000 }}",
        "{{ range(9) | batch(4000000000, 'x') | list }}",
        "{{ 'a' | replace('', 'x' * 10000) | replace('', 'x' * 1000000) }}",
        "{{ range(1000000000) }}",
        "{% for a in range(99999) %}{{ 'x' * 10000 }}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('\x1b[31mred\n' * 1000000) }}",
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{% if 1 %}" * 300 + "{% endif %}" * 300,
        "{% for x in [1] %}" * 21 + "{% endfor %}" * 21,
        "{% if %}",
    ],
)
def test_hostile_templates_end_with_one_short_line(source):
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        rendered(source, [USER])
    assert len(str(error.value)) < 500 and "\x1b" not in str(error.value) and "\n" not in str(error.value)
    assert time.monotonic() - start < 10
    assert rendered(CHATML, [USER])  # the process goes on, or a new one is started


def test_a_template_that_does_not_end_is_ended():
    source = "{{ 10 ** (10 ** 9 + messages | length) }}"  # one operation, which nothing in the process can interrupt
    start = time.monotonic()
    with pytest.raises(CheckpointError, match="takes more than 5 s of processor time"):
        rendered(source, [USER])
    assert time.monotonic() - start < 20
    assert rendered(CHATML, [USER])


def test_a_template_that_ends_its_process_is_tried_twice(monkeypatch):
    process = template_process._Process()
    monkeypatch.setattr(template_process, "_process", process)
    process._kills["{{ 1 }}"] = ["it crashed"] * 2
    with pytest.raises(CheckpointError, match="it crashed"):
        template_process.render("{{ 1 }}", [{}])
    assert process._popen is None


def test_a_chat_that_is_too_large_is_refused():
    with pytest.raises(UserError, match="writes more than"):
        rendered(CHATML, [USER | {"content": "x" * 2**24}])
    with pytest.raises(UserError, match=r"the chat has [0-9]+ bytes"):
        rendered(CHATML, [USER | {"content": "x" * 2**26}])


def test_values_that_are_not_of_json_are_refused():
    with pytest.raises(UserError, match="the chat has a value that is not of JSON: Object of type date"):
        rendered(QWEN3, [USER], enable_thinking=datetime.date(2024, 1, 1))


def test_threads_get_their_own_texts():
    results = {}

    def render(number):
        results[number] = [rendered(CHATML, [USER | {"content": f"{number}.{i}"}]) for i in range(20)]

    threads = [threading.Thread(target=render, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, texts in results.items():
        assert [f"{number}.{i}<|im_end|>" in text for i, text in enumerate(texts)] == [True] * 20


def test_after_ctrl_c_a_request_gets_its_own_reply():
    rendered(CHATML, [USER])
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        rendered(LOOP + "{{ 'interrupted' }}", [USER])
    assert rendered(CHATML, [USER]).startswith("<|im_start|>user\nthe fox")


PROGRAM = f"""
from qwen_dist import template_process
print(template_process.render({CHATML!r}, [dict(messages=[dict(role="user", content="a")])]))
print(template_process._process._popen.pid, flush=True)
import os
if os.fork() == 0:
    print(template_process.render("child", [{{}}])[0], template_process._process._popen.pid, flush=True)
    os._exit(0)
os.wait()
print(template_process.render("parent", [{{}}])[0], flush=True)
import sys, time
sys.stdin.read()
"""


def test_the_process_ends_with_its_parent_and_is_not_shared_after_a_fork():
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(template_process.__file__).parent.parent)}
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    lines = [program.stdout.readline().strip() for _ in range(4)]
    first, (child, other) = int(lines[1]), lines[2].split()
    assert (child, lines[3]) == ("child", "parent") and int(other) != first
    program.kill()
    program.communicate()
    deadline = time.monotonic() + 10
    while pathlib.Path(f"/proc/{first}").exists() and "Z" not in pathlib.Path(f"/proc/{first}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_base_model_ends_answers_with_the_token_of_its_template(tmp_path, small_tokenizer, base_files):
    base = Tokenizer.open(base_files(tmp_path / "base", CHATML))
    end, im_end = (base.special_id(token) for token in ("<|endoftext|>", "<|im_end|>"))
    assert base.stop_ids == {end} and base.chat_stop_ids == (im_end,)
    assert Tokenizer.open(base_files(tmp_path / "r1", R1)).chat_stop_ids == (im_end,)
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{{ 'assistant: ' if add_generation_prompt }}"
    assert Tokenizer.open(base_files(tmp_path / "plain", plain)).chat_stop_ids == ()
    assert Tokenizer.open(base_files(tmp_path / "none", None)).chat_stop_ids == ()


@pytest.mark.parametrize("template", [5, [5], [{"name": "default", "template": 5}], [{"name": 5, "template": "x"}], {}])
def test_templates_that_are_no_texts(tmp_path, base_files, template):
    with pytest.raises(CheckpointError, match=r"chat_template must be a string or a list"):
        Tokenizer.open(base_files(tmp_path / "base", template))


@pytest.fixture
def base_files(small_tokenizer):
    """A function (directory, chat template) -> the directory, with a tokenizer whose texts end with <|endoftext|>."""

    def write(directory, template):
        directory.mkdir()
        (directory / "tokenizer.json").write_bytes((small_tokenizer / "tokenizer.json").read_bytes())
        (directory / "config.json").write_bytes((small_tokenizer / "config.json").read_bytes())
        settings = json.loads((small_tokenizer / "tokenizer_config.json").read_text())
        settings |= {"eos_token": "<|endoftext|>", "chat_template": template}
        (directory / "tokenizer_config.json").write_text(json.dumps(settings))
        return directory

    return write

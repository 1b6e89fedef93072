"""Bodies of requests that the server must refuse: JSON with something wrong in it, and bytes that are no JSON."""

import json

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


def chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


# Bodies, and the parameter that the error names.
OK = {"messages": chat("hi")}
WRONG_CHATS = [
    ([1], None), ("text", None), (None, None), (3, None), ({}, None), ({"messages": None}, "messages"),
    ({"messages": []}, "messages"), ({"messages": {}}, "messages"), ({"messages": "hi"}, "messages"),
    ({"messages": [1]}, "messages"), ({"messages": [{}]}, "messages"), ({"messages": [{"role": "user"}]}, "messages"),
    ({"messages": [{"role": "king", "content": "a"}]}, "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a", "colour": 1}]}, "messages"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [3]}]}, "messages"), (OK | {"model": 3}, "model"),
    (OK | {"n": 0}, "n"), (OK | {"n": 129}, "n"), (OK | {"n": 1.5}, "n"), (OK | {"n": "2"}, "n"),
    (OK | {"stream": 1}, "stream"), (OK | {"stream": "true"}, "stream"),
    (OK | {"stream_options": {"include_usage": True}}, "stream_options"),
    (OK | {"stream": True, "stream_options": []}, "stream_options"),
    (OK | {"stream": True, "stream_options": {"a": 1}}, "stream_options"),
    (OK | {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
    (OK | {"temperature": -1}, "temperature"), (OK | {"temperature": "hot"}, "temperature"),
    (OK | {"temperature": True}, "temperature"), (OK | {"top_p": 0}, "top_p"), (OK | {"top_p": 2}, "top_p"),
    (OK | {"top_k": -2}, "top_k"), (OK | {"top_k": 1.5}, "top_k"), (OK | {"min_p": 2}, "min_p"),
    (OK | {"max_tokens": 0}, None), (OK | {"max_tokens": "9"}, "max_tokens"),
    (OK | {"max_tokens": 10**30}, "max_tokens"),
    (OK | {"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens"), (OK | {"stop": ""}, "stop"),
    (OK | {"stop": [1]}, "stop"), (OK | {"stop": {}}, "stop"), (OK | {"seed": 1.5}, "seed"),
    (OK | {"seed": 2**64}, "seed"), (OK | {"presence_penalty": 3}, "presence_penalty"),
    (OK | {"frequency_penalty": "a"}, "frequency_penalty"), (OK | {"logit_bias": [1]}, "logit_bias"),
    (OK | {"logit_bias": {"a": 1}}, "logit_bias"), (OK | {"logit_bias": {"5": 101}}, "logit_bias"),
    (OK | {"logit_bias": {"100000": 1}}, "logit_bias"), (OK | {"logprobs": 3}, "logprobs"),
    (OK | {"top_logprobs": 2}, "top_logprobs"), (OK | {"logprobs": True, "top_logprobs": 21}, "logprobs"),
    (OK | {"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
    (OK | {"response_format": {"type": "json"}}, "response_format"),
    (OK | {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}}, None),
    (OK | {"structured_outputs": {"regex": 3}}, "structured_outputs"), (OK | {"guided_regex": "("}, None),
    (OK | {"response_format": 3}, "response_format"), (OK | {"tools": 3}, "tools"), (OK | {"tools": [3]}, "tools"),
    (OK | {"tools": [{}]}, "tools"), (OK | {"tool_choice": "required"}, "tool_choice"),
    (OK | {"tool_choice": 3, "tools": [{"function": {"name": "a"}}]}, "tool_choice"),
    (OK | {"tool_choice": {"type": "function", "function": {"name": "b"}}, "tools": [{"name": "a"}]}, "tool_choice"),
    (OK | {"parallel_tool_calls": 1}, "parallel_tool_calls"),
    (OK | {"chat_template_kwargs": 3}, "chat_template_kwargs"),
    (OK | {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    (OK | {"chat_template_kwargs": {"x": 1}}, None), (OK | {"audio": {}}, None), (OK | {"functions": [{}]}, None),
    (OK | {"modalities": ["text"]}, None), (OK | {"prompt": "a"}, None),
]  # fmt: skip
WRONG_TEXTS = [
    ({}, None), ({"prompt": None}, "prompt"), ({"prompt": 3}, "prompt"), ({"prompt": []}, "prompt"),
    ({"prompt": [1.5]}, "prompt"), ({"prompt": [-1]}, "prompt"), ({"prompt": [99999]}, None),
    ({"prompt": ["a", 3]}, "prompt"), ({"prompt": [[]]}, "prompt"), ({"prompt": ""}, None),
    ({"prompt": ["a"] * 1025}, "prompt"), ({"prompt": ["a"] * 20, "n": 100}, "n"), ({"prompt": "a", "echo": 1}, "echo"),
    ({"prompt": "a", "logprobs": True}, "logprobs"), ({"prompt": "a", "logprobs": 21}, "logprobs"),
    ({"prompt": "a", "best_of": 2}, None), ({"prompt": "a", "suffix": "b"}, None),
    ({"prompt": "a", "messages": []}, None), ({"prompt": "a", "echo": True, "logprobs": 1, "stream": True}, "echo"),
]  # fmt: skip
WRONG_BYTES = [
    b"", b"{", b"nothing", b"\xff\xfe", b'{"prompt": "\xff"}', b'\xef\xbb\xbf{"prompt": "a"}',
    b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "a", "temperature": NaN}', b'{"prompt": "a", "temperature": 1e999}',
    b'{"prompt": "\\ud800"}', b"[" * 5000, b'{"prompt": ' + b"[" * 500 + b"]" * 500 + b"}",
    b'{"prompt": "a", "seed": ' + b"1" * 5000 + b"}", b'{"prompt": "a"} x', b"null",
]  # fmt: skip


def all_wrong() -> list[tuple[str, bytes]]:
    """Return addresses and bodies that are refused there: those above, and bodies that end too early."""
    wrong = [(CHAT, json.dumps(body).encode()) for body, _ in WRONG_CHATS]
    wrong += [(TEXT, json.dumps(body).encode()) for body, _ in WRONG_TEXTS]
    wrong += [(path, content) for path in (CHAT, TEXT) for content in WRONG_BYTES]
    whole = json.dumps(OK | {"temperature": 0.5, "stop": ["a", "b"], "stream": True, "logit_bias": {"5": -1.5}}).encode()
    return wrong + [(CHAT, whole[:length]) for length in range(1, len(whole))]

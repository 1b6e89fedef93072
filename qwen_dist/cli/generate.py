"""`qwen-dist generate`: answer a prompt, or chat."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from qwen_dist.chat import make_chat
from qwen_dist.cli.chat_session import ChatSession, system_messages
from qwen_dist.cli.console import announcer, loading, print_answer_json, print_answer_speed
from qwen_dist.cli.flags import ProcessFlags, Verb
from qwen_dist.cli.session import DEMO_MODEL, joined
from qwen_dist.config import GenerateConfig
from qwen_dist.errors import UsageError, UserError
from qwen_dist.runtime.backend import start_jax

if TYPE_CHECKING:
    from qwen_dist.engine.engine import Engine
    from qwen_dist.engine.request import RequestOutput, SamplingParams
    from qwen_dist.tokenizer import Tokenizer

_MAX_PROMPT_BYTES = 2**26

EXAMPLES = """\
examples:
  qwen-dist generate --prompt "Why is the sky blue?"      with the small demonstration model
  qwen-dist generate --model ~/qwen3-0.6b                 a chat; Ctrl-D ends it
  echo "Say hi" | qwen-dist generate --model Qwen/Qwen3-0.6B --temperature 0 --json
  qwen-dist generate --model ~/qwen3-8b --mesh tensor=4 --config.sampling.top_k=20
defaults of the sampling flags come from the checkpoint's generation_config.json"""


def run(config: GenerateConfig, flags: ProcessFlags) -> int:
    """Answer the prompt of the flag or of standard input; without one, chat."""
    prompt = _find_prompt(config, flags)
    with joined("generate", config, flags, prompt=prompt) as processes:
        if prompt is None and processes.count > 1:
            raise UsageError("a chat needs a single process; with several, give --prompt to all of them")
        start_jax(flags.num_cpu_devices, config.model.dtype)
        processes.check_devices()
        from qwen_dist.engine.open import open_engine

        quiet = flags.json or not processes.is_main
        with loading(quiet=quiet) as progress:
            engine, tokenizer, sampling = open_engine(
                config.model,
                config.mesh,
                config.sampling,
                max_batch_size=2,  # one to answer, one for the states that a hybrid saves within a prompt
                prefix_cache=config.prefix_cache,
                template_variables=config.chat.variables,
                progress=progress,
                announce=announcer(processes, quiet=quiet),
            )
        if prompt is None:
            return _chat(config, engine, tokenizer, sampling)
        if config.raw:
            tokenizer.check_length(prompt, engine.max_context)
            ids = tokenizer.encode(prompt)
        else:
            messages = [*system_messages(config.system), {"role": "user", "content": prompt}]
            ids = tokenizer.encode_prompt(make_chat(messages, None, config.chat.variables), engine.max_context)
            sampling = sampling.override({"stop_token_ids": tokenizer.chat_stop_ids})
        _respond(engine, tokenizer, sampling, ids, as_json=flags.json)
    return 0


def _chat(config: GenerateConfig, engine: Engine, tokenizer: Tokenizer, sampling: SamplingParams) -> int:
    variables, sampling = config.chat.variables, sampling.override({"stop_token_ids": tokenizer.chat_stop_ids})
    session = ChatSession(
        lambda messages: tokenizer.encode_prompt(make_chat(messages, None, variables), engine.max_context),
        lambda ids: _respond(engine, tokenizer, sampling, ids, as_json=False),
        engine.max_context,
        config.system,
    )
    return session.run(config.model.path)


def _find_prompt(config: GenerateConfig, flags: ProcessFlags) -> str | None:
    """Return the prompt; None for a chat."""
    if config.prompt is not None:
        return config.prompt
    if sys.stdin is None:
        raise UsageError("standard input is closed; give --prompt")
    if not sys.stdin.isatty():
        return _read_prompt()
    if flags.json:
        raise UsageError("--json needs --prompt, or the prompt on standard input")
    return None


def _read_prompt() -> str:
    """Return standard input without the newline at its end, which `echo` adds."""
    try:
        content = sys.stdin.buffer.read(_MAX_PROMPT_BYTES + 1)
    except OSError as error:  # such as one that is open for writing only
        raise UsageError(f"standard input cannot be read: {error.strerror}; give --prompt") from None
    if len(content) > _MAX_PROMPT_BYTES:
        raise UserError(f"standard input has more than {_MAX_PROMPT_BYTES} bytes")
    try:
        prompt = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 (byte {error.start + 1}); give the prompt in UTF-8") from None
    return prompt.removesuffix("\n").removesuffix("\r") if prompt.endswith("\n") else prompt


def _respond(engine: Engine, tokenizer: Tokenizer, sampling: SamplingParams, ids: Sequence[int], *, as_json: bool) -> str:
    """Stream one answer to standard output, or print it as one JSON object. Return its text."""
    from qwen_dist.engine.request import Request

    updates: list[RequestOutput] = []
    start, first = time.monotonic(), 0.0
    for update in engine.run([Request(None, tuple(ids), sampling)]):
        first = first or time.monotonic()
        updates.append(update)
        if not as_json:
            print(update.text, end="", flush=True)
    end = time.monotonic()
    text = "".join(update.text for update in updates)
    if as_json:
        print_answer_json(text, updates, tokenizer)
        return text
    print()
    print_answer_speed(updates[-1], first - start, end - first)
    return text


VERB = Verb("generate", GenerateConfig, ProcessFlags, run, EXAMPLES, defaults=DEMO_MODEL)

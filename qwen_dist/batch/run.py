"""Offline inference: every line of a file is answered once, and a line that cannot be is answered with its error."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from qwen_dist.batch.jsonl import BadRecord, Record, error_line, result_line
from qwen_dist.engine.engine import Engine, EngineStats
from qwen_dist.engine.request import Request, RequestOutput, SamplingParams, TokenLogprob
from qwen_dist.errors import UsageError, UserError
from qwen_dist.tokenizer import Tokenizer

# How often a person, or a chart, wants to know.
REPORT_EVERY_S = 0.1


@dataclasses.dataclass
class Summary:
    """What has been done so far; seconds are of the whole run after loading. `num_before` results were there before it."""

    num_answered: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    seconds: float = 0.0
    num_before: int = 0


class Writer(Protocol):
    """Takes results, one at a time, each with the fingerprint of its record."""

    def write(self, line: Mapping[str, Any], fingerprint: int) -> None: ...


@dataclasses.dataclass
class _Answer:
    """The text and log-probabilities of one record, as they come."""

    record: Record
    text: str = ""
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)


def check_paths(input: str, output: str) -> None:
    """Raises UsageError if writing the output would destroy the input."""
    if os.path.exists(output) and os.path.exists(input) and os.path.samefile(input, output):
        raise UsageError(f"input and output are the same file, {input}; name another output")


def run_batch(
    engine: Engine,
    tokenizer: Tokenizer,
    defaults: SamplingParams,
    records: Iterable[Record | BadRecord],
    writer: Writer,
    *,
    raw: bool = False,
    report: Callable[[Summary, EngineStats], None] = lambda summary, stats: None,
    stopped: Callable[[], bool] = lambda: False,
) -> Summary:
    """Answer every record, writing each as it is finished.

    Args:
      engine, tokenizer, defaults: from `open_engine`; a record's own parameters come before the defaults.
      records: from `read_records`; they are read as there is room for them.
      writer: takes the results.
      raw: give prompts to the model as they are, without the chat template.
      report: called now and then, and at the end, with the counts so far and how full the engine is.
      stopped: once it says so, answers that have begun are finished, and nothing else is begun.

    Raises:
      UserError: the output cannot be written; what was written before is whole.
    """
    summary, start, last_report = Summary(), time.monotonic(), -math.inf

    def requests() -> Iterator[Request]:
        for record in records:
            if stopped():
                return
            try:
                yield _request(record, engine, tokenizer, defaults, raw)
            except UserError as error:
                writer.write(error_line(record, str(error)), record.fingerprint)
                summary.num_errors += 1

    for update in engine.run(requests()):
        answer: _Answer = update.request.key
        answer.text += update.text
        answer.logprobs += update.logprobs
        summary.num_generated_tokens += len(update.tokens)
        summary.seconds = time.monotonic() - start
        if update.finish_reason is not None:
            writer.write(_result(answer, update, tokenizer), answer.record.fingerprint)
            summary.num_answered += 1
            summary.num_prompt_tokens += len(update.request.prompt)
        if summary.seconds - last_report >= REPORT_EVERY_S:
            report(summary, engine.stats)
            last_report = summary.seconds
        if stopped():
            engine.abort_waiting()
    summary.seconds = time.monotonic() - start
    report(summary, engine.stats)
    return summary


def _request(
    record: Record | BadRecord, engine: Engine, tokenizer: Tokenizer, defaults: SamplingParams, raw: bool
) -> Request:
    if isinstance(record, BadRecord):
        raise UserError(record.message)
    if record.messages is not None:
        prompt = tokenizer.apply_chat_template(record.messages)
    elif raw or record.form == "openai":
        prompt = tokenizer.encode(record.prompt or "")
    else:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": record.prompt}])
    request = Request(_Answer(record), tuple(prompt), defaults.override(record.params))
    engine.check(request)
    return request


def _result(answer: _Answer, update: RequestOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    assert update.finish_reason is not None
    prompt, record, logprobs = update.request.prompt, answer.record, None
    if update.request.params.logprobs is not None:
        logprobs = [logprob_json(token, tokenizer) for token in answer.logprobs]
        if record.echo:
            first = logprob_json(TokenLogprob(prompt[0], 0.0, ()), tokenizer) | {"logprob": None}
            logprobs = [first, *(logprob_json(token, tokenizer) for token in update.prompt_logprobs), *logprobs]
    text = (record.prompt or "") + answer.text if record.echo else answer.text
    return result_line(record, text, update.finish_reason, len(prompt), update.num_generated, logprobs)


def logprob_json(logprob: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """A token's log-probability in the form of the OpenAI API."""

    def entry(token: int, value: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": value, "bytes": list(raw)}

    top = [entry(token, value) for token, value in logprob.top]
    return entry(logprob.token, logprob.logprob) | {"top_logprobs": top}

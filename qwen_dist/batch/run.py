"""Offline inference: every line of a file gets one result, or an error if it cannot be answered."""

from __future__ import annotations

import dataclasses
import math
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from qwen_dist.batch.jsonl import BatchRecord, Choice, InvalidRecord, error_line, result_line
from qwen_dist.chat import make_chat
from qwen_dist.engine.engine import Engine, EngineStats
from qwen_dist.engine.request import Request, RequestOutput, SamplingParams, TokenLogprob
from qwen_dist.errors import UserError
from qwen_dist.tokenizer import Tokenizer

# How often `report` is called.
REPORT_EVERY_S = 0.1


@dataclasses.dataclass
class BatchSummary:
    """Counts of a run so far.

    Attributes:
      seconds: since loading ended.
      num_before: results that earlier runs have written.
    """

    num_answered: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    seconds: float = 0.0
    num_before: int = 0


class ResultWriter(Protocol):
    """Takes results one at a time, each with the `line_hash` of its record."""

    def write(self, line: Mapping[str, Any], line_hash: int) -> None: ...


@dataclasses.dataclass
class _PendingResult:
    """The choices of one record that are finished, by index."""

    record: BatchRecord
    choices: dict[int, Choice] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class _PendingChoice:
    """The text and log-probabilities of one choice so far."""

    result: _PendingResult
    index: int
    text: str = ""
    logprobs: list[TokenLogprob] = dataclasses.field(default_factory=list)


def run_batch(
    engine: Engine,
    tokenizer: Tokenizer,
    defaults: SamplingParams,
    records: Iterable[BatchRecord | InvalidRecord],
    writer: ResultWriter,
    *,
    raw: bool = False,
    variables: Mapping[str, Any] = types.MappingProxyType({}),
    report: Callable[[BatchSummary, EngineStats], None] = lambda summary, stats: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> BatchSummary:
    """Answer every record and write each result when it is finished.

    Args:
      engine: from `open_engine`, as are `tokenizer` and `defaults`.
      tokenizer: of the same checkpoint.
      defaults: sampling parameters, overridden by a record's own.
      records, writer: `records` come from `read_records`, only as fast as the engine takes requests.
      raw: give prompts to the model unchanged, without the chat template.
      variables: of the chat template, for records that do not set them.
      report: called every `REPORT_EVERY_S` seconds and at the end, with the counts so far and the engine's load.
      should_stop: when it returns true, running requests are finished and no others are started.

    Returns:
      The counts of this run; `num_before` is 0.

    Raises:
      UserError: the output cannot be written; all results before are complete.
    """
    summary, start, last_report = BatchSummary(), time.monotonic(), -math.inf

    def requests() -> Iterator[Request]:
        for record in records:
            if should_stop():
                return
            try:
                yield from _make_requests(record, engine, tokenizer, defaults, raw=raw, variables=variables)
            except UserError as error:
                writer.write(error_line(record, str(error)), record.line_hash)
                summary.num_errors += 1

    for update in engine.run(requests()):
        pending: _PendingChoice = update.request.key
        pending.text += update.text
        pending.logprobs += update.logprobs
        summary.num_generated_tokens += len(update.tokens)
        summary.seconds = time.monotonic() - start
        if update.finish_reason is not None:
            summary.num_prompt_tokens += len(update.request.prompt)
            summary.num_answered += _finish_choice(pending, update, tokenizer, writer)
        if summary.seconds - last_report >= REPORT_EVERY_S:
            report(summary, engine.stats)
            last_report = summary.seconds
        if should_stop():
            engine.abort_waiting()
    summary.seconds = time.monotonic() - start
    report(summary, engine.stats)
    return summary


def _make_requests(
    record: BatchRecord | InvalidRecord,
    engine: Engine,
    tokenizer: Tokenizer,
    defaults: SamplingParams,
    *,
    raw: bool,
    variables: Mapping[str, Any],
) -> list[Request]:
    """Return a request for each choice; they differ in their seeds."""
    if isinstance(record, InvalidRecord):
        raise UserError(record.message)
    params = defaults.override(record.params)
    if record.messages is None and (raw or record.format == "openai"):
        text = record.prompt or ""
        tokenizer.check_length(text, engine.max_context)
        prompt = tokenizer.encode(text)
    else:
        messages = record.messages or [{"role": "user", "content": record.prompt}]
        chat = make_chat(messages, record.tools, record.chat_template_kwargs, variables)
        prompt = tokenizer.encode_prompt(chat, engine.max_context)
        params = params.override({"stop_token_ids": tokenizer.chat_stop_ids})
    result = _PendingResult(record)
    requests = [
        Request(_PendingChoice(result, index), tuple(prompt), params.with_seed_of_choice(index))
        for index in range(record.num_choices)
    ]
    engine.check(requests[0])
    return requests


def _finish_choice(pending: _PendingChoice, update: RequestOutput, tokenizer: Tokenizer, writer: ResultWriter) -> bool:
    """Add a finished choice to its record; write the result when it is the last one. Return whether it was."""
    record, choices = pending.result.record, pending.result.choices
    choices[pending.index] = _make_choice(pending, update, tokenizer)
    if len(choices) < record.num_choices:
        return False
    line = result_line(record, [choices[index] for index in sorted(choices)], len(update.request.prompt))
    writer.write(line, record.line_hash)
    return True


def _make_choice(pending: _PendingChoice, update: RequestOutput, tokenizer: Tokenizer) -> Choice:
    assert update.finish_reason is not None
    prompt, record, logprobs = update.request.prompt, pending.result.record, None
    if update.request.params.logprobs is not None:
        logprobs = [logprob_json(token, tokenizer) for token in pending.logprobs]
        if record.echo:
            first = logprob_json(TokenLogprob(prompt[0], 0.0, ()), tokenizer) | {"logprob": None}
            logprobs = [first, *(logprob_json(token, tokenizer) for token in update.prompt_logprobs), *logprobs]
    text = (record.prompt or "") + pending.text if record.echo else pending.text
    return Choice(text, update.finish_reason, update.num_generated, logprobs)


def logprob_json(logprob: TokenLogprob, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return a token's log-probability in the format of the OpenAI API."""

    def entry(token: int, value: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": value, "bytes": list(raw)}

    top = [entry(token, value) for token, value in logprob.top]
    return entry(logprob.token, logprob.logprob) | {"top_logprobs": top}

"""Offline inference: every line of a file gets one result, or an error if it cannot be answered."""

from __future__ import annotations

import dataclasses
import math
import time
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

from qwen_dist.batch.jsonl import BatchRecord, InvalidRecord, error_line, result_line
from qwen_dist.engine.engine import Engine, EngineStats
from qwen_dist.engine.request import Request, SamplingParams
from qwen_dist.errors import UserError
from qwen_dist.openai_api import PendingAnswer, make_requests
from qwen_dist.tokenizer import Tokenizer

# How often `report` is called.
REPORT_EVERY_S = 0.1


@dataclasses.dataclass
class BatchSummary:
    """Counts of a run so far.

    Attributes:
      seconds: since loading ended.
      num_cached_tokens: of the prompt tokens, those that were read from the prefix cache.
      num_before: results that earlier runs have written.
    """

    num_answered: int = 0
    num_errors: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    seconds: float = 0.0
    num_before: int = 0


class ResultWriter(Protocol):
    """Takes results one at a time, each with the `line_hash` of its record."""

    def write(self, line: Mapping[str, Any], line_hash: int) -> None: ...


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
      engine, tokenizer, defaults: from `open_engine`; a record's own parameters override the defaults.
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
        record, answer, index = update.request.key
        is_answered = answer.add(index, update)
        summary.num_generated_tokens += len(update.tokens)
        summary.seconds = time.monotonic() - start
        if update.finish_reason is not None:
            summary.num_prompt_tokens += len(update.request.prompt)
            summary.num_cached_tokens += update.num_cached_tokens
        if is_answered:
            writer.write(result_line(record, answer.in_order(), answer.num_prompt_tokens), record.line_hash)
            summary.num_answered += 1
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
    """Return a request for each choice of a record; its key is the record, the answer that collects it, and its index."""
    if isinstance(record, InvalidRecord):
        raise UserError(record.message)
    request = record.request
    if record.format == "plain" and request.prompt is not None and not raw:
        request = dataclasses.replace(request, prompt=None, messages=[{"role": "user", "content": request.prompt}])
    answer = PendingAnswer(request, tokenizer)
    requests = make_requests(
        request,
        tokenizer,
        defaults,
        lambda index: (record, answer, index),
        max_context=engine.max_context,
        variables=variables,
    )
    engine.check(requests[0])
    return requests

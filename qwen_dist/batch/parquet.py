"""Rows of a parquet file: records to read and results to write. No jax."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from typing import IO, Any

_ROWS_PER_BATCH = 1024


def without_nulls(value: Any) -> Any:
    """Return a value of a row without the nulls in its objects: Arrow gives each object the keys of all in the column."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def write_parquet(file: IO[bytes], lines: Iterable[bytes], pyarrow: Any, parquet: Any) -> None:
    """Write result lines as rows. Ids become text; log-probabilities and the responses of OpenAI lines stay JSON."""
    text, number = pyarrow.string(), pyarrow.int64()
    schema = pyarrow.schema(
        {
            "id": text,
            "custom_id": text,
            "text": text,
            "finish_reason": text,
            "usage": pyarrow.struct({"prompt_tokens": number, "completion_tokens": number}),
            "logprobs": text,
            "response": text,
            "error": pyarrow.struct({"code": text, "message": text, "line": number}),
        }
    )
    with parquet.ParquetWriter(file, schema) as writer:
        remaining = iter(lines)
        while batch := list(itertools.islice(remaining, _ROWS_PER_BATCH)):
            writer.write_table(pyarrow.Table.from_pylist([_row(json.loads(line)) for line in batch], schema))


def _row(result: dict[str, Any]) -> dict[str, Any]:
    as_json = {name: json.dumps(result[name], ensure_ascii=False) for name in ("logprobs", "response") if name in result}
    return result | as_json | {"id": str(result["id"])}

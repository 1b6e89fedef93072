"""Rows of parquet files: inputs are read within a bound of memory, results are written. No jax."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import IO, Any

from qwen_dist.errors import printable
from qwen_dist.storage.files import require_package
from qwen_dist.storage.line_reader import UnreadableLine, too_long

_ROWS_PER_BATCH = 1024


def without_nulls(value: Any) -> Any:
    """Return a value of a row without the nulls in its objects: Arrow gives each object the keys of all in the column."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def write_parquet(file: IO[bytes], lines: Iterable[bytes], path: str) -> None:
    """Write result lines as rows. Ids become text; log-probabilities and the responses of OpenAI lines stay JSON."""
    parquet, pyarrow = _import_parquet(path), require_package("pyarrow", "qwen-dist[parquet]", path)
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


def parquet_rows(file: IO[bytes], path: str, max_bytes: int) -> Iterator[dict[str, Any] | UnreadableLine]:
    """Return an iterator over the rows of an open parquet file, without the empty fields.

    Strings are read as indices into the values that differ, as they are in the file: a small file can hold a long string
    in each of many rows.
    """
    parquet = _import_parquet(path)
    metadata = parquet.ParquetFile(file).metadata
    columns = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    strings = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    opened = parquet.ParquetFile(file, read_dictionary=strings)

    def rows() -> Iterator[dict[str, Any] | UnreadableLine]:
        with file, contextlib.closing(opened):
            for batch in opened.iter_batches(_ROWS_PER_BATCH):
                yield from _python_rows(batch, max_bytes)

    return rows()


def _import_parquet(path: str) -> Any:
    return require_package("pyarrow.parquet", "qwen-dist[parquet]", path)


def _python_rows(batch: Any, max_bytes: int) -> Iterator[dict[str, Any] | UnreadableLine]:
    """Yield the rows of a batch; halve a batch of more than `max_bytes`, or with a value that Python cannot hold."""
    reason = ""
    if sum(map(_num_bytes, batch.columns)) > max_bytes:
        reason = too_long("row", max_bytes)
    else:
        try:
            rows = batch.to_pylist()
        except (ValueError, ArithmeticError, TypeError) as error:  # such as a date after the year 9999
            reason = f"the row cannot be read: {printable(error, 200)}"
        else:
            yield from map(without_nulls, rows)
            return
    if batch.num_rows == 1:
        yield UnreadableLine(reason)
        return
    middle = batch.num_rows // 2
    for half in (batch.slice(0, middle), batch.slice(middle)):
        yield from _python_rows(half, max_bytes)


def _num_bytes(array: Any) -> int:
    """Return the number of bytes of an array, with every string in each place where it occurs."""
    import pyarrow.compute as compute
    from pyarrow import types

    if types.is_dictionary(array.type):
        lengths = compute.binary_length(array.dictionary)
        return compute.sum(lengths.cast("int64").take(array.indices)).as_py() or 0
    if types.is_struct(array.type):
        return sum(map(_num_bytes, array.flatten()))
    if types.is_nested(array.type):
        return _num_bytes(array.flatten())
    return int(array.nbytes)

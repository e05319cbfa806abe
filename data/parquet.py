"""Rows of a parquet file, without the nulls that its common schema adds."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Features, Json, LargeList, List
from pyarrow import ArrowException
from pyarrow.parquet import ParquetFile

from data.json_stream import MOST_ROW_BYTES
from monitoring.json_file import open_regular

ROWS_AT_ONCE = 1024


def parquet_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The rows of one file with JSON columns decoded; a row above `MOST_ROW_BYTES` is returned as None.

    Raises:
        ValueError: not a parquet file, or a column type without a counterpart in Python.
    """
    open_regular(path).close()
    try:
        with ParquetFile(path) as file:
            features = Features.from_arrow_schema(file.schema_arrow)
            for group in range(file.num_row_groups):
                described = file.metadata.row_group(group)
                if described.num_rows == 1 and described.total_byte_size > MOST_ROW_BYTES:
                    yield None  # a page is read as a whole, and needs three times its size
                    continue
                for batch in file.iter_batches(_rows_at_once(file, group), row_groups=[group]):
                    whole = batch.nbytes <= MOST_ROW_BYTES
                    for part in [batch] if whole else [batch.slice(row, 1) for row in range(len(batch))]:
                        if part.nbytes > MOST_ROW_BYTES:
                            yield None
                            continue
                        for row in part.to_pylist():
                            yield _as_written(row, features)
    except (ArrowException, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _rows_at_once(file: ParquetFile, group: int) -> int:
    """The number of rows that fit into `MOST_ROW_BYTES` if all rows of the group have the mean size."""
    described = file.metadata.row_group(group)
    row_bytes = max(1, described.total_byte_size // max(1, described.num_rows))
    return max(1, min(ROWS_AT_ONCE, MOST_ROW_BYTES // row_bytes))


def _as_written(value: Any, feature: Any) -> Any:
    """`value` without additions by its column type.

    A struct has the fields of all rows, null where a row had none: these nulls are dropped. A JSON column stores values
    as text, and its nulls were in the source: they are kept.
    """
    if isinstance(feature, Json):
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _as_written(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(value, list) and isinstance(feature, List | LargeList):
        return [_as_written(item, feature.feature) for item in value]
    return value

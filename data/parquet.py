"""The rows of a parquet file as they were before parquet gave all of them one schema."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import Features, Json, LargeList, List
from pyarrow.parquet import ParquetFile

ROWS_AT_ONCE = 1024


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of one file, JSON columns decoded.

    Raises:
        ValueError: not a parquet file, or a column of a type that has no counterpart in Python.
    """
    with ParquetFile(path) as file:
        features = Features.from_arrow_schema(file.schema_arrow)
        for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
            for row in batch.to_pylist():
                yield _as_written(row, features)


def _as_written(value: Any, feature: Any) -> Any:
    """`value` without what its column type added to it.

    A struct has the fields of all rows, null where a row had none; a JSON column has its values written as text, and
    nulls in there are the author's own.
    """
    if isinstance(feature, Json):
        return json.loads(value) if isinstance(value, str) else value
    if isinstance(value, dict) and isinstance(feature, dict):
        return {key: _as_written(item, feature[key]) for key, item in value.items() if item is not None}
    if isinstance(value, list) and isinstance(feature, List | LargeList):
        return [_as_written(item, feature.feature) for item in value]
    return value

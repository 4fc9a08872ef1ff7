"""Read the Parquet files of a corpus, `train-00000.parquet` ..., one row group at a time."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("train", "validation", "test")


def row_groups(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """The row groups of a Parquet file, in order, with these columns."""
    file = pq.ParquetFile(path)
    return (file.read_row_group(index, columns=columns) for index in range(file.num_row_groups))


def split_files(corpus: Path, manifest: dict[str, Any], split: str) -> list[Path]:
    """The Parquet files of one split, in order. A split without rows has none."""
    return [corpus / name for name in sorted(manifest["files"]) if name.startswith(f"{split}-")]

"""The corpus's Parquet files, as all stages read them: `train-00000.parquet` ..., row group by row group."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

SPLITS = ("train", "validation", "test")


def row_groups(path: Path, columns: list[str]) -> Iterator[pa.Table]:
    """The row groups of a Parquet file, one after another."""
    file = pq.ParquetFile(path)
    return (file.read_row_group(index, columns=columns) for index in range(file.num_row_groups))


def split_files(corpus: Path, manifest: dict[str, Any], split: str) -> list[Path]:
    """The Parquet files of one split, in order; none where the split has no row."""
    return [corpus / name for name in sorted(manifest["files"]) if name.startswith(f"{split}-")]

"""Shards as megatron-core's own reader and writer see them. tests/run.sh installs megatron-core."""

import warnings
from pathlib import Path
from typing import Any

with warnings.catch_warnings():  # it warns that its optional GPU kernels are absent
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

__all__ = ["IndexedDatasetBuilder", "megatron_documents", "open_by_megatron"]


def open_by_megatron(prefix: Path) -> Any:
    """Megatron's dataset of `prefix`.bin and `prefix`.idx."""
    return IndexedDataset(str(prefix))


def megatron_documents(prefix: Path) -> list[list[int]]:
    """The tokens of each document."""
    return [document.tolist() for document in open_by_megatron(prefix)]

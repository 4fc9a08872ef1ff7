"""What tests and benchmarks compare with: real texts, BioGPT's published tokenizer, the hash in plain integers."""

import gzip
import json
from pathlib import Path

from data.archive.medline import Citation, read_medline
from data.text.train import tokenizer_from_biogpt
from tests.paths import SHARED


def splitmix64(number: int) -> int:
    """splitmix64's finalizer on a number, as data/common/hashing.py promises it for salt 0."""
    z = (number + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def texts_of(file: Path) -> list[str]:
    """Title and abstract of each entry of a file of ../shared/data, XML or JSON lines."""
    if file.name.endswith(".jsonl.gz"):
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            entries = [json.loads(line) for line in stream]
        return [f"{entry.get('title') or ''} {entry.get('abstract') or entry.get('text') or ''}" for entry in entries]
    return [f"{record.title} {record.abstract}" for record in read_medline(file) if isinstance(record, Citation)]


def published_biogpt(folder: Path) -> Path:
    """The empty folder, with BioGPT's published merges and dictionary as transformers' files."""
    tokenizer_from_biogpt(SHARED / "tokenizers" / "biogpt", folder)
    return folder

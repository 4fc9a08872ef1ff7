"""A tokenizer folder learned on real citations, and the real words of the tests of BPE."""

from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from sacremoses import MosesTokenizer
from transformers import BioGptTokenizer

from data.archive.sample import write_sample
from data.corpus.build import make_corpus
from data.text.tokenizer import Tokenizer
from data.text.train import train_tokenizer
from tests.data.text.subword import real_lines
from tests.shared import NLM


@pytest.fixture(scope="package")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus/ and tokenizer/: 2,000 merges learned on 1,000 real citations, or on the sample without real data."""
    folder = tmp_path_factory.mktemp("tokenizer")
    names = ("medline16n0902.xml.gz", "pubmedsample18n0001.xml.gz")
    raw = [*sorted(NLM.glob("pubmed21n*.xml.gz")), *(NLM / name for name in names)]
    if not NLM.is_dir():
        greek = "".join(f"The role of {chr(945 + number % 24)}-{number} in rats.\n" for number in range(200))
        (folder / "greek.txt").write_text(greek)  # the sample is ASCII
        raw = [*write_sample(folder / "raw", citations=600), folder / "greek.txt"]
    make_corpus(raw, folder / "corpus", 0.05, 0.05, workers=1)
    train_tokenizer(folder / "corpus", folder / "tokenizer", merges=2_000, min_count=1, workers=1)
    return folder


@pytest.fixture(scope="package")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer(folder / "tokenizer")


@pytest.fixture(scope="package")
def hf(folder: Path) -> BioGptTokenizer:
    return BioGptTokenizer.from_pretrained(folder / "tokenizer")


@pytest.fixture(scope="package")
def training_words(folder: Path) -> Counter[str]:
    """The Moses tokens of the training texts, counted with plain sacremoses."""
    moses = MosesTokenizer(lang="en")
    counts: Counter[str] = Counter()
    for text in pq.read_table(folder / "corpus" / "train-00000.parquet")["text"].to_pylist():
        counts.update(moses.tokenize(text, aggressive_dash_splits=True, escape=True))
    return counts


@pytest.fixture(scope="package")
def lines() -> list[str]:
    return real_lines()

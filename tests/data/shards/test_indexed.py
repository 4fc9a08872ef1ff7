"""data/shards/indexed.py against megatron-core's own reader and writer."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from data.common.files import UserError
from data.shards.indexed import IndexedTokens, write_index
from data.text.ids import token_dtype
from tests.data.megatron import IndexedDatasetBuilder, megatron_documents, open_by_megatron

Documents = list[list[int]]


def random_documents(seed: int, highest: int) -> Documents:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, highest, rng.integers(1, 40), endpoint=True).tolist() for _ in range(50)]


def write_ours(prefix: Path, documents: Documents, dtype: np.dtype) -> None:
    tokens = np.concatenate([np.array(document, dtype) for document in documents])
    prefix.with_name(prefix.name + ".bin").write_bytes(tokens.tobytes())
    lengths = np.array([len(document) for document in documents])
    write_index(prefix, dtype, lengths, text_bytes=5 * lengths)


def write_theirs(prefix: Path, documents: Documents, dtype: np.dtype) -> None:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype.type)
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize(("name", "highest"), [("uint16", 65_535), ("int32", 1_000_000)])
def test_files_equal_megatrons(name: str, highest: int, tmp_path: Path) -> None:
    """The same bytes as megatron-core's writer; its reader gives back tokens, lengths and documents."""
    documents = random_documents(1, highest)
    write_ours(tmp_path / "ours", documents, np.dtype(name))
    write_theirs(tmp_path / "theirs", documents, np.dtype(name))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()
    assert megatron_documents(tmp_path / "ours") == documents
    read = open_by_megatron(tmp_path / "ours")
    assert read.sequence_lengths.tolist() == [len(document) for document in documents]
    assert read.document_indices.tolist() == list(range(len(documents) + 1))


@pytest.mark.parametrize("name", ["uint16", "int32"])
def test_our_reader_reads_ours(name: str, tmp_path: Path) -> None:
    documents = random_documents(2, 60_000)
    write_ours(tmp_path / "ours", documents, np.dtype(name))
    read = IndexedTokens(tmp_path / "ours")
    assert read.tokens.dtype == np.dtype(name) and read.tokens.tolist() == [*chain(*documents)]
    assert read.lengths.tolist() == [len(document) for document in documents]
    assert read.text_bytes.tolist() == [5 * len(document) for document in documents]


@pytest.mark.parametrize(
    ("vocabulary", "name"), [(8, "uint16"), (65_535, "uint16"), (65_536, "int32"), (100_000, "int32")]
)
def test_every_id_fits(vocabulary: int, name: str) -> None:
    dtype = token_dtype(vocabulary)
    assert dtype == np.dtype(name) and np.array(vocabulary - 1).astype(dtype) == vocabulary - 1


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    documents = random_documents(3, 100)
    write_ours(tmp_path / "ours", documents, np.dtype("uint16"))
    index, tokens = tmp_path / "ours.idx", tmp_path / "ours.bin"
    whole = index.read_bytes()
    for damage in (
        b"",
        b"PK\x03\x04" + whole[4:],
        whole[:20],
        whole[:-1],
        whole + b"\0",
        whole[:17] + b"\x63" + whole[18:],
    ):
        index.write_bytes(damage)
        with pytest.raises(UserError, match=r"ours\.idx: .*Megatron index"):
            IndexedTokens(tmp_path / "ours")
    index.write_bytes(whole)
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"ours\.bin: \d+ bytes, but ours\.idx"):
        IndexedTokens(tmp_path / "ours")

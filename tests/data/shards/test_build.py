"""data/shards/build.py: read by megatron-core, recounted from the corpus, checked byte by byte."""

import gzip
import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import BioGptTokenizer

from data.archive.sample import write_sample
from data.common.files import UserError, read_manifest, verify_files
from data.common.parquet import SPLITS
from data.corpus.build import make_corpus
from data.shards.build import make_shards
from data.shards.indexed import IndexedTokens
from data.text.ids import EOS_ID, SPECIAL_TOKENS
from data.text.train import write_tokenizer_files
from tests.data.citations import citation, write_file
from tests.data.corpora import content
from tests.data.killed import kill_after, kill_at_call, start
from tests.data.megatron import megatron_documents
from tests.data.reference import splitmix64


def shard_key(pmid: int) -> int:
    """The order of documents: splitmix64's second output for this seed."""
    return splitmix64(pmid + 0x9E3779B97F4A7C15)


def expected_documents(corpus: Path, tokenizer: Path, split: str) -> tuple[list[list[int]], list[int]]:
    """The documents of a split by transformers, each ending in `</s>`, and the UTF-8 bytes of their texts."""
    hf = BioGptTokenizer.from_pretrained(tokenizer)
    rows = [row for path in sorted(corpus.glob(f"{split}-*")) for row in pq.read_table(path).to_pylist()]
    rows.sort(key=lambda row: shard_key(row["pmid"]))
    ids: list[Any] = [hf(row["text"])["input_ids"] for row in rows]
    return [[*document[1:], EOS_ID] for document in ids], [len(row["text"].encode("utf-8")) for row in rows]


def read_by_megatron(shards: Path, split: str) -> list[list[int]]:
    prefixes = sorted(path.with_suffix("") for path in shards.glob(f"{split}-*.idx"))
    return [document for prefix in prefixes for document in megatron_documents(prefix)]


def read_bytes(shards: Path, split: str) -> list[int]:
    return [int(count) for path in sorted(shards.glob(f"{split}-*.bytes.npy")) for count in np.load(path)]


@pytest.mark.parametrize("split", SPLITS)
def test_megatron_reads_the_documents(split: str, sample_folder: Path) -> None:
    """Tokens, order and bytes of every document are those of transformers on the corpus; counts are recounted."""
    documents, text_bytes = expected_documents(sample_folder / "corpus", sample_folder / "tokenizer", split)
    read = read_by_megatron(sample_folder / "shards", split)
    print(f"{split}: {len(read)} documents, {sum(map(len, read))} tokens read by megatron-core")
    assert read == documents and len(read) > 5
    assert read_bytes(sample_folder / "shards", split) == text_bytes
    assert all(document.index(EOS_ID) == len(document) - 1 for document in read)
    assert read_manifest(sample_folder / "shards", "shards")["counts"][split] == {
        "documents": len(documents),
        "tokens": sum(map(len, documents)),
        "unknown_tokens": sum(document.count(3) for document in documents),
        "text_bytes": sum(text_bytes),
        "shards": 1,
    }


def test_order_is_not_that_of_pubmed(sample_folder: Path) -> None:
    pmids = pq.read_table(sample_folder / "corpus" / "train-00000.parquet")["pmid"].to_pylist()
    ranks = np.argsort(np.argsort([shard_key(pmid) for pmid in pmids]))
    assert abs(np.corrcoef(np.argsort(np.argsort(pmids)), ranks)[0, 1]) < 0.2


def test_the_folder_holds_what_it_lists(sample_folder: Path) -> None:
    shards = sample_folder / "shards"
    manifest = read_manifest(shards, "shards")
    verify_files(shards, manifest)
    assert set(content(shards)) == {*manifest["files"], "manifest.json", "corpus/manifest.json"} == {
        "manifest.json",
        "corpus/manifest.json",
        *(f"tokenizer/{name}" for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "tokenizer.json")),
        *(f"{split}-00000.{suffix}" for split in SPLITS for suffix in ("bin", "idx", "bytes.npy")),
    }  # fmt: skip
    assert read_manifest(shards / "corpus", "corpus") == read_manifest(sample_folder / "corpus", "corpus")
    vocabulary = json.loads((sample_folder / "tokenizer" / "vocab.json").read_text())
    assert manifest["counts"]["vocabulary"] == len(vocabulary)


def test_one_flipped_bit_anywhere_is_found(sample_folder: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(sample_folder / "shards", tmp_path / "shards")
    manifest = read_manifest(shards, "shards")
    rng = random.Random(1)
    for name in manifest["files"]:
        whole = (shards / name).read_bytes()
        for place in {0, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(6))}:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << rng.randrange(8)
            (shards / name).write_bytes(flipped)
            with pytest.raises(UserError, match=f"{name}: changed"):
                verify_files(shards, manifest)
        (shards / name).write_bytes(whole)
    verify_files(shards, manifest)


@pytest.fixture(scope="module")
def many_files(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus/ of the same citations in many files: NLM's first file comes as four."""
    folder = tmp_path_factory.mktemp("many_files")
    (folder / "raw").mkdir()
    baseline, update = sorted((sample_folder / "raw").iterdir())
    shutil.copyfile(update, folder / "raw" / "pubmed26n0009.xml.gz")
    head, *records = gzip.decompress(baseline.read_bytes()).decode().split("<PubmedArticle>")
    quarter = -(-len(records) // 4)
    for number in range(4):
        some = "".join(f"<PubmedArticle>{record}" for record in records[number * quarter :][:quarter])
        xml = head + some.removesuffix("</PubmedArticleSet>\n") + "</PubmedArticleSet>"
        (folder / "raw" / f"pubmed26n000{number + 1}.xml").write_text(xml)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.corpus.schema.ROWS_PER_FILE", 100)
        make_corpus([folder / "raw"], folder / "corpus", 0.05, 0.05, workers=1)
    assert len(list((folder / "corpus").glob("train-*"))) >= 3
    return folder


def test_the_same_bytes_with_two_workers_whatever_the_corpuss_files(sample_folder: Path, many_files: Path) -> None:
    for workers in (1, 2):
        make_shards(many_files / "corpus", sample_folder / "tokenizer", many_files / f"workers{workers}", workers)
    assert content(many_files / "workers1") == content(many_files / "workers2")
    one_file, several = (
        {name: data for name, data in content(folder).items() if not name.endswith("manifest.json")}
        for folder in (sample_folder / "shards", many_files / "workers1")
    )
    assert one_file == several


@pytest.mark.parametrize(
    ("step", "call"),
    [
        ("data.shards.build.tokenize_rows", 3),
        ("data.shards.build.write_index", 2),
        ("data.shards.build._gather", 2),
    ],
)
def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(
    step: str, call: int, sample_folder: Path, many_files: Path, tmp_path: Path
) -> None:
    arguments = (many_files / "corpus", sample_folder / "tokenizer", tmp_path / "shards")
    paths = ", ".join(f"Path({str(path)!r})" for path in arguments)
    kill_at_call(tmp_path, step, call, f"from data.shards.build import make_shards; make_shards({paths}, 1)")
    assert not (tmp_path / "shards").exists() and list(tmp_path.glob("shards.parts/*"))
    make_shards(*arguments, workers=1)
    make_shards(*arguments[:2], tmp_path / "whole", workers=1)
    assert content(tmp_path / "shards") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards", "whole"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["tokenizer", "shards"])
def test_kill_9_at_ten_moments_ends_in_the_same_bytes(
    command: str, many_files: Path, sample_folder: Path, tmp_path: Path
) -> None:
    """Moments drawn over all the time that the command takes."""
    more = [] if command == "tokenizer" else ["--tokenizer", str(sample_folder / "tokenizer")]
    arguments = [command, str(many_files / "corpus"), "--out", command, "--workers", "2", *more]
    (tmp_path / "whole").mkdir()
    before = time.monotonic()
    assert start(tmp_path / "whole", *arguments).wait() == 0
    lasted, rng, unfinished = time.monotonic() - before, random.Random(1), 0
    for trial in range(10):
        place = tmp_path / str(trial)
        place.mkdir()
        kill_after(rng.uniform(0.2, 0.98) * lasted, start(place, *arguments))
        unfinished += not (place / command / "manifest.json").exists()
        assert start(place, *arguments).wait() == 0
        assert content(place) == content(tmp_path / "whole")
    print(f"{command}: 10 kills over {lasted:.1f} s, {unfinished} before it had finished, the same bytes")
    assert unfinished > 5


def test_many_shards_hold_what_one_holds(
    sample_folder: Path, many_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.shards.build.DOCUMENTS_PER_SHARD", 70)
    manifest = make_shards(many_files / "corpus", sample_folder / "tokenizer", many_files / "many", workers=1)
    prefixes = sorted(path.with_suffix("") for path in (many_files / "many").glob("train-*.idx"))
    sizes = [len(IndexedTokens(prefix).lengths) for prefix in prefixes]
    assert set(sizes[:-1]) == {70} and 0 < sizes[-1] <= 70 and manifest["counts"]["train"]["shards"] == len(sizes) > 3
    assert read_by_megatron(many_files / "many", "train") == read_by_megatron(sample_folder / "shards", "train")
    assert read_bytes(many_files / "many", "train") == read_bytes(sample_folder / "shards", "train")


def test_one_split_alone_is_another_request(sample_folder: Path, tmp_path: Path) -> None:
    arguments = (sample_folder / "corpus", sample_folder / "tokenizer", tmp_path / "shards", 1)
    make_shards(*arguments, splits=("validation",))
    assert {path.name.split("-")[0] for path in (tmp_path / "shards").glob("*.idx")} == {"validation"}
    with pytest.raises(UserError, match="other inputs or settings"):
        make_shards(*arguments)


def test_a_split_without_documents_has_no_shard(sample_folder: Path, tmp_path: Path) -> None:
    write_sample(tmp_path / "raw", citations=30)
    make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0, 0, workers=1)
    counts = make_shards(tmp_path / "corpus", sample_folder / "tokenizer", tmp_path / "shards", workers=1)["counts"]
    assert counts["test"] == {"documents": 0, "tokens": 0, "unknown_tokens": 0, "text_bytes": 0, "shards": 0}
    assert [path.name for path in (tmp_path / "shards").glob("*.idx")] == ["train-00000.idx"]


def test_unknown_characters_are_counted(sample_folder: Path, tmp_path: Path) -> None:
    write_file(tmp_path / "a.xml", [citation(1, "中文", "and 한국어"), citation(2, "The", "patients")])
    make_corpus([tmp_path / "a.xml"], tmp_path / "corpus", 0, 0, workers=1)
    counts = make_shards(tmp_path / "corpus", sample_folder / "tokenizer", tmp_path / "shards", workers=1)["counts"]
    assert counts["train"]["unknown_tokens"] == 5  # of Korean and Chinese, a character each
    assert counts["train"]["text_bytes"] == len("中文 and 한국어The patients".encode())


def test_a_vocabulary_beyond_uint16_is_written_as_int32(tmp_path: Path) -> None:
    """The last of 70,000 ids comes back from Megatron's reader, not its remainder."""
    names = [f"madeupword{index:05d}" for index in range(69_994)]
    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *names, "a</w>", "b</w>"])}
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer_files(tmp_path / "tokenizer", vocabulary, [])
    write_file(tmp_path / "raw.xml", [citation(1, "a b", "b")])
    make_corpus([tmp_path / "raw.xml"], tmp_path / "corpus", 0, 0, workers=1)
    make_shards(tmp_path / "corpus", tmp_path / "tokenizer", tmp_path / "shards", workers=1)
    assert IndexedTokens(tmp_path / "shards" / "train-00000").tokens.dtype == np.int32
    assert read_by_megatron(tmp_path / "shards", "train") == [[69_998, 69_999, 69_999, 2]]


def test_damaged_inputs_are_refused(sample_folder: Path, tmp_path: Path) -> None:
    def refused(reason: str, corpus: Path, tokenizer: Path) -> None:
        with pytest.raises(UserError, match=reason) as caught:
            make_shards(corpus, tokenizer, tmp_path / "out", workers=1)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    corpus = shutil.copytree(sample_folder / "corpus", tmp_path / "corpus")
    tokenizer = shutil.copytree(sample_folder / "tokenizer", tmp_path / "tokenizer")
    refused(r"nowhere: no such folder", tmp_path / "nowhere", tokenizer)
    refused(r"nowhere/vocab\.json: no such file", corpus, tmp_path / "nowhere")
    (tokenizer / "merges.txt").write_text("a b\n")
    refused(r"merges\.txt: changed", corpus, tokenizer)
    (corpus / "test-00000.parquet").unlink()
    refused(r"test-00000\.parquet: missing", corpus, sample_folder / "tokenizer")

"""data/text/train.py: the vocabulary, recounted with subword-nmt, and the folders."""

import json
import random
import string
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from data.archive.sample import write_sample
from data.common.files import VERSIONS, UserError
from data.corpus.build import make_corpus
from data.text.ids import UNK_ID
from data.text.learn_bpe import learn_merges
from data.text.tokenizer import Tokenizer
from data.text.train import make_vocabulary, train_tokenizer, write_tokenizer_files
from tests.data.citations import citation, write_file
from tests.data.killed import kill_at_call
from tests.data.text.subword import subword_nmt, subwords_of


def expected_tokens(words: Counter[str], merges: list[tuple[str, str]], min_count: int) -> list[str]:
    """The types by subword-nmt's own segmentation, then the merges' parts and products, in the promised order."""
    bpe, counts = subword_nmt(merges), Counter[str]()
    for word, count in words.items():
        for token in subwords_of(bpe, word):
            counts[token] += count
    tokens = {token for token, count in counts.items() if count >= min_count}
    tokens |= {character + end for character in string.printable[:94] for end in ("", "</w>")}
    tokens |= {token for first, second in merges for token in (first, second, first + second)}
    return sorted(sorted(tokens), key=lambda token: counts[token], reverse=True)


def read_merges(folder: Path) -> list[tuple[str, str]]:
    lines = (folder / "merges.txt").read_bytes().decode().split("\n")
    assert lines.pop() == ""
    return [(line.split(" ")[0], line.split(" ")[1]) for line in lines]


def assert_vocabulary(folder: Path, words: Counter[str], min_count: int) -> list[str]:
    """The vocabulary of a tokenizer folder, token by token. Returns it in the order of the ids."""
    vocabulary = json.loads((folder / "vocab.json").read_text())
    tokens = list(vocabulary)
    assert list(vocabulary.values()) == list(range(len(tokens)))
    expected = expected_tokens(words, read_merges(folder), min_count)
    assert tokens[:4] == ["<s>", "<pad>", "</s>", "<unk>"]
    assert tokens[4 : 4 + len(expected)] == expected
    padding = tokens[4 + len(expected) :]
    assert padding == [f"madeupword{index:04d}" for index in range(len(padding))]
    assert len(tokens) % 8 == 0 and len(padding) < 8
    return tokens


def test_vocabulary_is_that_of_a_recount(folder: Path, training_words: Counter[str]) -> None:
    tokens = assert_vocabulary(folder / "tokenizer", training_words, 1)
    merges = read_merges(folder / "tokenizer")
    print(f"{len(tokens)} tokens, {len(merges)} merges recounted from {training_words.total()} words")
    assert {token for merge in merges for token in (*merge, "".join(merge))} <= set(tokens)
    manifest = json.loads((folder / "tokenizer" / "manifest.json").read_text())
    assert manifest["counts"]["words"] == training_words.total()
    assert manifest["counts"]["distinct_words"] == len(training_words)
    assert manifest["counts"]["vocabulary"] == len(tokens)
    assert manifest["counts"]["merges"] == len(merges)


def test_training_texts_hold_no_unknown_token(folder: Path, ours: Tokenizer) -> None:
    """All types of the training split are in the vocabulary; other texts may hold others."""
    for text in pq.read_table(folder / "corpus" / "train-00000.parquet")["text"].to_pylist():
        assert UNK_ID not in ours.encode(text)
    assert UNK_ID in ours.encode("\ud7a3 \U0001f9ec")


def test_min_word_count_leaves_rare_words_out_of_the_merges_alone(
    folder: Path, training_words: Counter[str], tmp_path: Path
) -> None:
    manifest = train_tokenizer(
        folder / "corpus", tmp_path / "some", merges=300, min_count=1, workers=1, min_word_count=20
    )
    frequent = Counter({word: count for word, count in training_words.items() if count >= 20})
    assert 0 < len(frequent) < len(training_words)
    assert read_merges(tmp_path / "some") == learn_merges(frequent, 300) != learn_merges(training_words, 300)
    assert_vocabulary(tmp_path / "some", training_words, 1)  # every word has its tokens all the same
    assert manifest["request"]["min_word_count"] == 20


def test_min_count_leaves_rare_types_out(folder: Path, training_words: Counter[str], tmp_path: Path) -> None:
    """Of 20 merges no part is rare, so that min_count bites."""
    counts = train_tokenizer(folder / "corpus", tmp_path / "all", merges=20, min_count=1, workers=1)["counts"]
    fewer = train_tokenizer(folder / "corpus", tmp_path / "some", merges=20, min_count=200, workers=1)["counts"]
    assert_vocabulary(tmp_path / "all", training_words, 1)
    assert_vocabulary(tmp_path / "some", training_words, 200)
    assert fewer["vocabulary"] < counts["vocabulary"] and fewer["merges"] == counts["merges"]


def test_a_merge_part_is_kept_however_rare() -> None:
    """`bc</w>` occurs only within `abc</w>`; transformers issue 21838 is about such products that were left out."""
    words = Counter({"abc": 10, "xyz": 1})
    merges = learn_merges(words, 2)
    vocabulary, counts = make_vocabulary(words, merges, min_count=5)
    assert counts == {"abc</w>": 10, "x": 1, "y": 1, "z</w>": 1}
    parts = {token for first, second in merges for token in (first, second, first + second)}
    assert list(vocabulary)[4:5] == ["abc</w>"] and parts <= set(vocabulary)
    assert "xyz</w>" not in vocabulary and "yz</w>" not in vocabulary


@pytest.mark.parametrize("min_count", [1, 1_000_000])
def test_no_ascii_text_gives_an_unknown_token(min_count: int, tmp_path: Path) -> None:
    """Not with the smallest vocabulary, nor by transformers' tokenizers, and it is decoded whole."""
    words = Counter({"abc": 3, "é": 2})
    merges = learn_merges(words, 1)
    vocabulary, counts = make_vocabulary(words, merges, min_count)
    write_tokenizer_files(tmp_path, vocabulary, merges)
    assert len(vocabulary) % 8 == 0 and sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert ("é</w>" in vocabulary) == (min_count == 1) and counts["q"] == 0
    fast, ours = AutoTokenizer.from_pretrained(tmp_path), Tokenizer(tmp_path)
    rng = random.Random(1)
    texts = ["quick & 'quoted' <q> [q] \"q\" | P<0.001 a-b #1", string.printable[:94], *string.printable[:94]]
    texts += ["".join(rng.choices(string.printable[:95], k=60)) for _ in range(300)]
    for text in texts:
        assert UNK_ID not in ours.encode(text) and UNK_ID not in fast(text)["input_ids"], text
    assert "&uot;" not in fast.decode(fast('so "quoted" it is')["input_ids"])
    assert UNK_ID in ours.encode("\ud7a3")


def test_an_old_folder_is_finished_work_and_another_request_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of format 2, which may lack ASCII types: its shards and runs hold its ids."""
    monkeypatch.setitem(VERSIONS, "tokenizer", 2)
    monkeypatch.setattr("data.text.train.ASCII_TYPES", ())
    old = train_tokenizer(folder / "corpus", tmp_path / "old", merges=20, min_count=200, workers=1)
    monkeypatch.undo()
    before = {path: path.read_bytes() for path in (tmp_path / "old").iterdir()}
    assert train_tokenizer(folder / "corpus", tmp_path / "old", merges=20, min_count=200, workers=1) == old
    assert {path: path.read_bytes() for path in (tmp_path / "old").iterdir()} == before
    with pytest.raises(UserError, match="was made from other inputs or settings"):
        train_tokenizer(folder / "corpus", tmp_path / "old", merges=21, min_count=200, workers=1)
    new = train_tokenizer(folder / "corpus", tmp_path / "new", merges=20, min_count=200, workers=1)
    assert (old["version"], new["version"]) == (2, 3) and old["counts"]["vocabulary"] < new["counts"]["vocabulary"]


def test_ties_are_ordered_by_code_point() -> None:
    words = Counter({"z": 3, "é": 3, "Z": 3, "中": 3, "\U0001f600": 3, "\uffee": 3, "a": 9})
    vocabulary, _ = make_vocabulary(words, [], min_count=1)
    assert [token.removesuffix("</w>") for token in list(vocabulary)[4:11]] == [
        "a", "Z", "z", "é", "中", "\uffee", "\U0001f600"]  # fmt: skip


def test_padding_never_collides_with_a_type_of_the_text(tmp_path: Path) -> None:
    """A text may name fairseq's padding; each id still has a token of its own, and each token one id."""
    words = Counter({"madeupword0000x": 50, "madeupword0001": 50})
    merges = learn_merges(words, 400)
    vocabulary, counts = make_vocabulary(words, merges, min_count=1)
    assert "madeupword0000" in counts or "madeupword0000" in {"".join(merge) for merge in merges}
    assert sorted(vocabulary.values()) == list(range(len(vocabulary))) and len(vocabulary) % 8 == 0
    write_tokenizer_files(tmp_path, vocabulary, merges)
    assert Tokenizer(tmp_path).vocabulary == vocabulary


def test_only_the_training_split_is_learned_from(tmp_path: Path) -> None:
    """Every text has a character of its own: those of training are in the vocabulary, the others are not."""
    letters = {pmid: chr(0x4E00 + pmid) for pmid in range(1, 61)}
    write_file(tmp_path / "raw.xml", [citation(pmid, letter, letter * 4) for pmid, letter in letters.items()])
    make_corpus([tmp_path / "raw.xml"], tmp_path / "corpus", 0.3, 0.3, workers=1)
    train_tokenizer(tmp_path / "corpus", tmp_path / "tokenizer", merges=50, min_count=1, workers=1)
    learned = "".join(json.loads((tmp_path / "tokenizer" / "vocab.json").read_text()))
    for split in ("train", "validation", "test"):
        pmids = pq.read_table(tmp_path / "corpus" / f"{split}-00000.parquet")["pmid"].to_pylist()
        assert len(pmids) > 5
        assert {letters[pmid] in learned for pmid in pmids} == {split == "train"}


# Folders


def test_the_same_bytes_with_two_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.corpus.schema.ROWS_PER_FILE", 40)
    write_sample(tmp_path / "raw", citations=100)
    make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0.05, 0.05, workers=1)
    for workers in (1, 2):
        train_tokenizer(tmp_path / "corpus", tmp_path / str(workers), merges=100, min_count=1, workers=workers)
    names = sorted(path.name for path in (tmp_path / "1").iterdir())
    assert names == ["manifest.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "vocab.json"]
    assert all((tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes() for name in names)


@pytest.mark.parametrize(("step", "call"), [("data.text.train.count_words", 2), ("data.text.train.learn_merges", 1)])
def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(
    step: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.corpus.schema.ROWS_PER_FILE", 40)
    write_sample(tmp_path / "raw", citations=100)
    make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0.05, 0.05, workers=1)
    arguments = "merges=50, min_count=1, workers=1, reserve=8"
    code = f"from data.text.train import train_tokenizer; train_tokenizer(Path('corpus'), Path('killed'), {arguments})"
    kill_at_call(tmp_path, step, call, code)
    assert not (tmp_path / "killed").exists() and list(tmp_path.glob("killed.parts/*/manifest.json"))
    for name in ("killed", "whole"):
        train_tokenizer(tmp_path / "corpus", tmp_path / name, merges=50, min_count=1, workers=1, reserve=8)
    files = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "killed").iterdir()) and len(files) >= 4
    assert all((tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() for name in files)


def test_wrong_requests_and_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    def refused(reason: str, corpus: Path, merges: int = 10, min_count: int = 1) -> None:
        with pytest.raises(UserError, match=reason) as caught:
            train_tokenizer(corpus, tmp_path / "out", merges, min_count, workers=1)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    refused("--merges -1", folder / "corpus", merges=-1)
    refused("--min-count 0", folder / "corpus", min_count=0)
    refused("no such folder", tmp_path / "nowhere")
    refused("is a tokenizer folder; expected a corpus folder", folder / "tokenizer")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in (folder / "corpus").iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (damaged / "train-00000.parquet").write_bytes(b"PAR1")
    refused(r"train-00000\.parquet: changed", damaged)

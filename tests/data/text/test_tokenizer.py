"""data/text/tokenizer.py against transformers' BioGptTokenizer and subword-nmt: ids and vocabulary."""

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sacremoses import MosesPunctNormalizer, MosesTokenizer
from subword_nmt.apply_bpe import BPE
from transformers import AutoTokenizer, BioGptTokenizer

from data.archive.sample import write_sample
from data.common.files import UserError
from data.corpus.build import make_corpus
from data.text.bpe import END_OF_WORD, learn_merges
from data.text.ids import SPECIAL_TOKENS, UNK_ID
from data.text.tokenizer import Tokenizer, make_vocabulary, normalize, train_tokenizer, write_tokenizer_files
from tests.data.citations import citation, write_file
from tests.data.killed import kill_at_call
from tests.data.nasty import nasty
from tests.data.reference import published_biogpt, texts_of
from tests.shared import NLM, SHARED, needs_shared

ABSTRACTS = SHARED / "data" / "abstracts"
FILES = sorted(path.name for path in ABSTRACTS.glob("*.jsonl.gz"))
SEPARATOR = "\ue000"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus/ and tokenizer/: 2,000 merges learned on 1,000 real citations, or on the sample without real data."""
    folder = tmp_path_factory.mktemp("tokenizer")
    names = ("medline16n0902.xml.gz", "pubmedsample18n0001.xml.gz")
    raw = [*sorted(NLM.glob("pubmed21n*.xml.gz")), *(NLM / name for name in names)]
    if not NLM.is_dir():
        raw = write_sample(folder / "raw", citations=600)
    make_corpus(raw, folder / "corpus", 0.05, 0.05, workers=1)
    train_tokenizer(folder / "corpus", folder / "tokenizer", merges=2_000, min_count=1, workers=1)
    return folder


@pytest.fixture(scope="module")
def ours(folder: Path) -> Tokenizer:
    return Tokenizer(folder / "tokenizer")


@pytest.fixture(scope="module")
def hf(folder: Path) -> BioGptTokenizer:
    return BioGptTokenizer.from_pretrained(folder / "tokenizer")


@pytest.fixture(scope="module")
def training_words(folder: Path) -> Counter[str]:
    """The Moses tokens of the training texts, counted with plain sacremoses."""
    moses = MosesTokenizer(lang="en")
    counts: Counter[str] = Counter()
    for text in pq.read_table(folder / "corpus" / "train-00000.parquet")["text"].to_pylist():
        counts.update(moses.tokenize(text, aggressive_dash_splits=True, escape=True))
    return counts


def hf_ids(hf: Any, text: str, **options: Any) -> list[int]:
    """HF's ids without the `</s>` that it puts in front."""
    first, *ids = hf(text, **options)["input_ids"]
    assert first == 2
    return ids


# The same ids as transformers


@needs_shared
@pytest.mark.parametrize("name", FILES)
def test_ids_equal_transformers_on_real_texts(name: str, ours: Tokenizer, hf: BioGptTokenizer) -> None:
    """1,000 natural texts of each file."""
    texts = texts_of(ABSTRACTS / name)[:1_000]
    compared = [(ours.encode(text), hf_ids(hf, text)) for text in texts]
    differences = sum(mine != theirs for mine, theirs in compared)
    tokens, unknown = (sum(len(mine) for mine, _ in compared), sum(mine.count(UNK_ID) for mine, _ in compared))
    print(f"{name}: {len(texts)} texts, {tokens} ids, {unknown} of them <unk>: {differences} texts differ")
    assert differences == 0 and len(texts) == 1_000 and tokens > 5_000


@needs_shared
def test_real_texts_of_seven_files_are_tested() -> None:
    assert len(FILES) == 7


def test_auto_tokenizer_gives_the_same_ids(folder: Path, ours: Tokenizer) -> None:
    auto = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert auto.is_fast and len(auto) == len(ours.vocabulary)
    assert [auto.bos_token_id, auto.pad_token_id, auto.eos_token_id, auto.unk_token_id] == [0, 1, 2, 3]
    for text in pq.read_table(folder / "corpus" / "test-00000.parquet")["text"].to_pylist():
        assert hf_ids(auto, text) == ours.encode(text) != []


def holds_special(text: str) -> bool:
    return any(token in text for token in SPECIAL_TOKENS)


@settings(max_examples=1_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=nasty.filter(lambda text: not holds_special(text)))
def test_ids_equal_transformers_on_nasty_texts(text: str, ours: Tokenizer, hf: BioGptTokenizer) -> None:
    assert ours.encode(text) == hf_ids(hf, text)


# In bulk


def in_bulk(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    ids, lengths = tokenizer.encode_batch(pa.array(texts, pa.string()))
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths))[:-1]]


@pytest.mark.parametrize("remembered", [0, 1_000, 1_000_000])
def test_bulk_gives_the_same_ids_whatever_is_remembered(
    remembered: int, folder: Path, hf: BioGptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In many batches, with a memory that is too small, just right, and already full of the same texts."""
    monkeypatch.setattr("data.text.tokenizer.PIECES_REMEMBERED", remembered)
    monkeypatch.setattr("data.text.moses.BATCH_BYTES", 20_000)
    texts = pq.read_table(folder / "corpus" / "train-00000.parquet")["text"].to_pylist()[:150]
    tokenizer, expected = Tokenizer(folder / "tokenizer"), [hf_ids(hf, text) for text in texts]
    assert in_bulk(tokenizer, texts) == expected
    assert in_bulk(tokenizer, texts[::-1]) == expected[::-1]
    assert in_bulk(tokenizer, []) == [] and in_bulk(tokenizer, ["", " ", "\x00"]) == [[], [], []]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(nasty, max_size=8))
def test_bulk_gives_the_same_ids_of_nasty_texts(texts: list[str], ours: Tokenizer, hf: BioGptTokenizer) -> None:
    assert in_bulk(ours, texts) == [hf_ids(hf, text, split_special_tokens=True) for text in texts]


def test_the_memory_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By number, but for the batch at hand, and by the length of what it holds."""
    monkeypatch.setattr("data.text.tokenizer.PIECES_REMEMBERED", 1_000)
    tokenizer = Tokenizer(folder / "tokenizer")
    for start in range(0, 20_000, 300):
        tokenizer.encode_batch(pa.array([f"word{number} {number}" for number in range(start, start + 300)]))
        assert 0 < len(tokenizer._memory) <= 1_000
    tokenizer.encode_batch(pa.array(["ACGT" * 1_000, "'a' 'b' " * 100, "short"]))
    assert "short" in tokenizer._memory and max(map(len, tokenizer._memory)) < 100


@needs_shared
@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_bulk_ids_equal_transformers_on_all_abstracts(name: str, ours: Tokenizer, hf: BioGptTokenizer) -> None:
    texts = texts_of(ABSTRACTS / name)
    expected = [hf_ids(hf, text, split_special_tokens=True) for text in texts]
    differences = sum(mine != theirs for mine, theirs in zip(in_bulk(ours, texts), expected, strict=True))
    print(f"{name}: {len(texts)} texts, {sum(map(len, expected))} ids: {differences} texts differ")
    assert differences == 0 and len(texts) > 1_000


quoted = st.lists(
    st.one_of(nasty, st.sampled_from("()[]%:;,.!?`'\"„“”–—´‘’‚…«»\xa0º \r")), min_size=1, max_size=30
).map("".join)  # fmt: skip


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(quoted, min_size=1, max_size=5))
def test_punctuation_is_normalised_as_sacremoses_does(texts: list[str]) -> None:
    assert normalize(pa.array(texts)).to_pylist() == [MosesPunctNormalizer("en").normalize(text) for text in texts]


@needs_shared
def test_punctuation_of_real_texts_is_normalised_as_sacremoses_does() -> None:
    normalizer, texts = (
        MosesPunctNormalizer("en"),
        [text for name in FILES for text in texts_of(ABSTRACTS / name)[:400]],
    )
    expected = [normalizer.normalize(text) for text in texts]
    differences = sum(
        ours != theirs for ours, theirs in zip(normalize(pa.array(texts)).to_pylist(), expected, strict=True)
    )
    changed = sum(text != other for text, other in zip(texts, expected, strict=True))
    print(f"{len(texts)} texts, {changed} of them changed, {differences} differences")
    assert differences == 0 and changed > 500


# Special tokens in a text


@pytest.mark.parametrize("special", SPECIAL_TOKENS)
@pytest.mark.parametrize("text", ["{}", "a {} b", "a{}b", "{}{}", "The end.{}", "{} Start"])
def test_special_tokens_in_a_text_stay_text(text: str, special: str, ours: Tokenizer, hf: BioGptTokenizer) -> None:
    """HF reads them as the tokens that end or pad a document; it agrees with us where it is told to split them."""
    text = text.format(special, special)
    ids = ours.encode(text)
    assert not {0, 1, 2} & set(ids)
    assert "&lt;" in "".join(ours.tokens(ids))
    assert SPECIAL_TOKENS.index(special) in hf_ids(hf, text)
    assert ids != hf_ids(hf, text)
    assert ids == hf_ids(hf, text, split_special_tokens=True)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=nasty, special=st.sampled_from(SPECIAL_TOKENS), more=nasty)
def test_no_text_can_end_a_document(text: str, special: str, more: str, ours: Tokenizer, hf: BioGptTokenizer) -> None:
    ids = ours.encode(text + special + more)
    assert not {0, 1, 2} & set(ids)
    assert ids == hf_ids(hf, text + special + more, split_special_tokens=True)


# The vocabulary


def expected_tokens(words: Counter[str], merges: list[tuple[str, str]], min_count: int) -> list[str]:
    """The types by subword-nmt's own segmentation, then the merges' parts and products, in the promised order."""
    rules = "".join(f"{first} {second}\n" for first, second in merges)
    bpe = BPE(io.StringIO("#version: 0.2\n" + rules), separator=SEPARATOR)
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for piece in bpe.segment_tokens([word]):
            counts[piece[:-1] if piece.endswith(SEPARATOR) else piece + END_OF_WORD] += count
    tokens = {token for token, count in counts.items() if count >= min_count}
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
    assert list(vocabulary)[4:5] == ["abc</w>"] and set(list(vocabulary)[4:9]) == parts
    assert "x" not in vocabulary


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


@pytest.mark.parametrize(
    ("step", "call"), [("data.text.tokenizer.count_words", 2), ("data.text.tokenizer.learn_merges", 1)]
)
def test_killed_in_the_middle_and_run_again_gives_the_same_bytes(
    step: str, call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.corpus.schema.ROWS_PER_FILE", 40)
    write_sample(tmp_path / "raw", citations=100)
    make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0.05, 0.05, workers=1)
    arguments = "merges=50, min_count=1, workers=1"
    code = (
        f"from data.text.tokenizer import train_tokenizer; train_tokenizer(Path('corpus'), Path('killed'), {arguments})"
    )
    kill_at_call(tmp_path, step, call, code)
    assert not (tmp_path / "killed").exists() and list(tmp_path.glob("killed.parts/*/manifest.json"))
    for name in ("killed", "whole"):
        train_tokenizer(tmp_path / "corpus", tmp_path / name, merges=50, min_count=1, workers=1)
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


def test_damaged_tokenizer_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    def refused(reason: str) -> None:
        with pytest.raises(UserError, match=reason) as caught:
            Tokenizer(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)

    refused(r"vocab\.json: no such file")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / "tokenizer" / name).read_bytes())
    assert Tokenizer(tmp_path).encode("The patients") != []  # a folder from elsewhere has no manifest
    (tmp_path / "merges.txt").write_text("a b\nab\n")
    refused(r"merges\.txt: line 2 is not a pair")
    (tmp_path / "merges.txt").unlink()
    refused(r"merges\.txt: no such file")
    (tmp_path / "manifest.json").write_bytes((folder / "tokenizer" / "manifest.json").read_bytes())
    refused(r"merges\.txt: missing")
    (tmp_path / "manifest.json").write_text("{}")
    refused(r"manifest\.json: not a manifest")
    (tmp_path / "manifest.json").unlink()
    for content in ('{"!": 0, "a": 1}', "[1, 2]", '{"<s>": 0, "</s>": 1, "<pad>": 2, "<unk>": 3}'):  # GPT-2's has these
        (tmp_path / "vocab.json").write_text(content)
        refused(r"vocab\.json: ids 0 to 3 are not <s>, <pad>, </s>, <unk>")


@needs_shared
def test_published_biogpt_is_read_as_transformers_reads_it(tmp_path: Path) -> None:
    """BioGPT's own files: merges with a count in the third column, the vocabulary of its fairseq dictionary."""
    ours, hf = Tokenizer(published_biogpt(tmp_path)), BioGptTokenizer.from_pretrained(tmp_path)
    assert ours.encode("COVID-19 is") == [4805, 9, 656, 21]  # facts, section 2
    texts = texts_of(ABSTRACTS / FILES[0])[:200]
    assert all(ours.encode(text) == hf_ids(hf, text) for text in texts)

"""data/text/tokenizer.py against transformers' BioGptTokenizer: ids, one text at a time and in bulk."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BioGptTokenizer

from data.common.files import UserError
from data.text.ids import SPECIAL_TOKENS, UNK_ID
from data.text.tokenizer import Tokenizer
from tests.data.nasty import nasty
from tests.data.reference import published_biogpt, texts_of
from tests.shared import SHARED, needs_shared

ABSTRACTS = SHARED / "data" / "abstracts"
FILES = sorted(path.name for path in ABSTRACTS.glob("*.jsonl.gz"))


def hf_ids(hf: Any, text: str, **options: Any) -> list[int]:
    """HF's ids without the `</s>` that it puts in front."""
    first, *ids = hf(text, **options)["input_ids"]
    assert first == 2
    return ids


@needs_shared
@pytest.mark.parametrize("name", [*FILES[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in FILES[2:])])
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


def in_bulk(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    ids, lengths = tokenizer.encode_batch(pa.array(texts, pa.string()))
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths))[:-1]]


@pytest.mark.parametrize("remembered", [0, 1_000, 1_000_000])
def test_bulk_gives_the_same_ids_whatever_is_remembered(
    remembered: int, folder: Path, hf: BioGptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In many batches, with a memory that is too small, just right, and already full of the same texts."""
    monkeypatch.setattr("data.text.tokenizer.FRAGMENTS_REMEMBERED", remembered)
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
    monkeypatch.setattr("data.text.tokenizer.FRAGMENTS_REMEMBERED", 1_000)
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

"""Reserved ids: last in the vocabulary, and no text becomes one, in our text path and in both of transformers'."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, BioGptTokenizer

from data.common.files import UserError
from data.text.ids import reserved_ids
from data.text.tokenizer import Tokenizer, read_merges
from data.text.train import tokenizer_from_biogpt, train_tokenizer, with_reserved, write_tokenizer_files
from tests.data.nasty import nasty
from tests.shared import SHARED, needs_shared

RESERVE = 24
LITERALS = ["<reserved_0>", " <reserved_0> ", "<reserved_23>", "<reserved_0></s>", "</s>", "&lt;reserved_0"]


@pytest.fixture(scope="module")
def reserved(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer of `folder` with reserved ids."""
    made, plain = tmp_path_factory.mktemp("reserved"), Tokenizer(folder / "tokenizer")
    merges = read_merges(folder / "tokenizer" / "merges.txt")
    write_tokenizer_files(made, with_reserved(plain.vocabulary, RESERVE), merges)
    return made


@pytest.fixture(scope="module")
def with_them(reserved: Path) -> tuple[Tokenizer, Any, Any]:
    """Ours, the fast and the slow tokenizer of a folder with reserved ids."""
    return Tokenizer(reserved), AutoTokenizer.from_pretrained(reserved), BioGptTokenizer.from_pretrained(reserved)


@needs_shared
def test_real_texts_keep_their_ids(
    folder: Path, ours: Tokenizer, hf: BioGptTokenizer, with_them: tuple[Tokenizer, Any, Any]
) -> None:
    """2,100 titles and abstracts, some with a literal name of a reserved id."""
    texts = []
    for file in sorted((SHARED / "data" / "abstracts").glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            entries = [json.loads(next(stream)) for _ in range(300)]
        texts += [f"{entry.get('title') or ''} {entry.get('abstract') or entry.get('text') or ''}" for entry in entries]
    assert len(texts) == 2_100
    texts[::7] = [f"{text[:40]}<reserved_0>{text[40:]}" for text in texts[::7]]
    plain: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    expected = plain(texts, split_special_tokens=True)["input_ids"]
    mine, fast, slow = with_them
    ids, lengths = mine.encode_batch(pa.array(texts))
    assert [[2, *part.tolist()] for part in np.split(ids, np.cumsum(lengths))[:-1]] == expected
    assert fast(texts, split_special_tokens=True)["input_ids"] == expected
    few = range(0, len(texts), 14)  # the slow one is slow
    assert slow([texts[place] for place in few], split_special_tokens=True)["input_ids"] == [expected[p] for p in few]
    assert max(map(max, expected)) < len(ours.vocabulary)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=st.lists(st.one_of(nasty, st.sampled_from(LITERALS)), min_size=1, max_size=6))
def test_no_text_becomes_a_reserved_id(
    texts: list[str], ours: Tokenizer, hf: BioGptTokenizer, with_them: tuple[Tokenizer, Any, Any]
) -> None:
    text, (mine, fast, slow) = "".join(texts), with_them
    expected = ours.encode(text)
    assert mine.encode(text) == expected and max([0, *expected]) < len(ours.vocabulary)
    assert slow(text, split_special_tokens=True)["input_ids"] == [2, *expected]
    if "</s>" not in text:  # which transformers reads as the end of a document
        assert slow(text)["input_ids"] == fast(text)["input_ids"] == [2, *expected]


def test_names_and_ids_are_found_both_ways(
    reserved: Path, ours: Tokenizer, with_them: tuple[Tokenizer, Any, Any]
) -> None:
    ids, (mine, *of_hf) = reserved_ids(reserved), with_them
    assert ids == range(len(ours.vocabulary), len(ours.vocabulary) + RESERVE) and len(mine.vocabulary) == ids.stop
    names = [f"<reserved_{number}>" for number in range(RESERVE)]
    word = ours.encode("role")
    for hf in of_hf:
        assert len(hf) == ids.stop
        assert hf.convert_tokens_to_ids(names) == list(ids) and hf.convert_ids_to_tokens(list(ids)) == names
        assert [hf.decode([index]) for index in ids] == names
        assert hf.decode([ids[0], *word, ids[1]], skip_special_tokens=True) == "<reserved_0>role <reserved_1>"


def test_the_command_appends_them_and_refuses_another_number(folder: Path, tmp_path: Path) -> None:
    """Without them the folder is byte for byte that of earlier versions, whose request has no such entry."""
    corpus, made = folder / "corpus", {}
    for reserve in (0, 8):
        made[reserve] = train_tokenizer(corpus, tmp_path / str(reserve), 20, 1, workers=1, reserve=reserve)
    plain, reserved = (json.loads((tmp_path / name / "vocab.json").read_text()) for name in "08")
    assert list(reserved.items()) == [*plain.items(), *((f"<reserved_{n}>", len(plain) + n) for n in range(8))]
    assert (tmp_path / "0" / "merges.txt").read_bytes() == (tmp_path / "8" / "merges.txt").read_bytes()
    assert reserved_ids(tmp_path / "0") == range(len(plain), len(plain))
    counts, before = made[8]["counts"], made[0]["counts"]
    assert counts == before | {"vocabulary": len(plain) + 8, "reserve": 8} and made[8]["request"]["reserve"] == 8
    assert "reserve" not in made[0]["request"]
    assert train_tokenizer(corpus, tmp_path / "8", 20, 1, workers=1, reserve=8) == made[8]
    for name, reserve in (("8", 0), ("8", 16), ("0", 8)):
        with pytest.raises(UserError, match="was made from other inputs or settings"):
            train_tokenizer(corpus, tmp_path / name, 20, 1, workers=1, reserve=reserve)


@needs_shared
def test_biogpts_own_tokenizer_gets_them_before_the_pieces_that_its_dictionary_lacks(tmp_path: Path) -> None:
    counts = tokenizer_from_biogpt(SHARED / "tokenizers" / "biogpt", tmp_path / "made", reserve=8)["counts"]
    assert (counts["vocabulary"], counts["reserve"]) == (42_392, 8) and reserved_ids(tmp_path / "made")[0] == 42_384
    fast: Any = AutoTokenizer.from_pretrained(tmp_path / "made")
    assert len(fast) == 42_392 + 17 and fast.convert_tokens_to_ids("<reserved_7>") == 42_391
    assert fast("COVID-19 is <reserved_0>")["input_ids"][:5] == [2, 4805, 9, 656, 21]
    text = "Nevertheless, <reserved_0> evertheless"
    assert fast(text)["input_ids"] == BioGptTokenizer.from_pretrained(tmp_path / "made")(text)["input_ids"]


@pytest.mark.parametrize(("reserve", "bytes_a_token"), [(65_535 - 194, 2), (65_536 - 194, 4)])
def test_they_count_for_the_bytes_of_a_token(reserve: int, bytes_a_token: int, tmp_path: Path) -> None:
    names = ["<s>", "<pad>", "</s>", "<unk>", *(f"{chr(33 + n // 2)}{'</w>' * (n % 2)}" for n in range(190))]
    write_tokenizer_files(tmp_path, with_reserved({name: index for index, name in enumerate(names)}, reserve), [])
    assert Tokenizer(tmp_path).dtype.itemsize == bytes_a_token and len(reserved_ids(tmp_path)) == reserve

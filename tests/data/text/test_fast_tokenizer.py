"""data/text/fast_tokenizer.py against transformers' slow tokenizer and sacremoses: ids, offsets, padding, text."""

import gzip
import html
import json
import os
import random
import re
import subprocess
import sys
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sacremoses import MosesPunctNormalizer
from transformers import AutoTokenizer, BioGptTokenizer

from data.common.files import UserError
from data.text.tokenizer import Tokenizer
from data.text.train import tokenizer_from_biogpt
from tests.shared import ROOT, SHARED, needs_shared

pytestmark = needs_shared
BIOGPT = SHARED / "tokenizers" / "biogpt"
CURLY = str.maketrans("“”„", '"""')
PIECES = [
    "'", "''", "'s", "`", ".", "..", "...", "e.g.", "U.S.", "No.", "No. 3", "no. x", "Fig. 3", "1,000", ",", ",,", "-",
    "--", "@-@", "@@", "&amp;", "&", "<", ">", "|", "[", "]", "α", "É.", "ß.", "中文", "\u0301", "\u200b", "\x00",
    "\x07", "\x1f", "\x85", "\u00a0", "\u2009", "\u2028", " ", "  ", "\n", "\t", "the", "The", "p53", "a", "B", "5",
    "²", "৴", "Ⅳ", "DOTMULTI", "DOT", "MULTI", "“", "”", "„", "‘", "’", "–", "—", "´", "…", "«", "»", '"', '",', '".',
    "(", ")", " :", ";", " %", "º", "nº", "\r", "?", "!", "𝛼", "😀", "s",
]  # fmt: skip
JOINED = [
    "&apos;", "&quot;", ".", ",", "(", ")", "&#91;", "&#93;", "%", "$", "£", "€", "¿", "s", "cells", "the", "@-@",
    "&lt;", "&amp;", "-", ":", "?", "@",
]  # fmt: skip
nasty = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=4)), max_size=14).map("".join)
nasty = nasty.filter(lambda text: not any(token in text for token in ("<s>", "</s>", "<pad>", "<unk>")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """plain/ and normalized/: BioGPT's published tokenizer."""
    folder = tmp_path_factory.mktemp("fast")
    tokenizer_from_biogpt(BIOGPT, folder / "plain")
    tokenizer_from_biogpt(BIOGPT, folder / "normalized", normalize_punctuation=True)
    return folder


@pytest.fixture(scope="module")
def fast(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "plain")


@pytest.fixture(scope="module")
def normalizing(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "normalized")


@pytest.fixture(scope="module")
def slow(folder: Path) -> Any:
    return BioGptTokenizer.from_pretrained(folder / "plain")


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """1,000 raw titles and abstracts, of every file some."""
    found = []
    for file in sorted((SHARED / "data" / "abstracts").glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            entries = [json.loads(next(stream)) for _ in range(150)]
        found += [f"{entry.get('title') or ''} {entry.get('abstract') or entry.get('text') or ''}" for entry in entries]
    assert len(found) >= 1_000
    return found[:1_000]


def test_ids_of_the_dictionary_are_transformers(slow: Any) -> None:
    """Known ids of `microsoft/biogpt`, and its size."""
    assert len(slow) == 42_384
    assert slow("COVID-19 is")["input_ids"] == [2, 4805, 9, 656, 21]


def test_ids_equal_the_slow_ones_on_real_texts(texts: list[str], fast: Any, slow: Any) -> None:
    assert fast.is_fast
    pairs = zip(fast(texts)["input_ids"], slow(texts)["input_ids"], strict=True)
    differing = sum(ours != theirs for ours, theirs in pairs)
    print(f"{len(texts)} texts, {differing} differ")
    assert differing == 0


@settings(max_examples=1_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=nasty)
def test_ids_equal_the_slow_ones_on_nasty_texts(text: str, fast: Any, slow: Any) -> None:
    ids = fast(text)["input_ids"]
    assert ids == slow(text)["input_ids"]
    assert max(ids) < 42_384


@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(text=nasty)
def test_normalized_ids_are_those_of_sacremoses_normalizer(text: str, normalizing: Any, slow: Any) -> None:
    normalized = MosesPunctNormalizer(lang="en").normalize(text)
    if "<s>" not in normalized and "</s>" not in normalized:
        assert normalizing(text)["input_ids"] == slow(normalized)["input_ids"]


@pytest.mark.parametrize("name", ["plain", "normalized"])
def test_ids_equal_those_of_the_shards(name: str, folder: Path, texts: list[str]) -> None:
    """Our own text path, which makes the shards, with and without normalisation."""
    ids, lengths = Tokenizer(folder / name).encode_batch(pa.array(texts))
    fast = AutoTokenizer.from_pretrained(folder / name)
    encoded = fast(texts, add_special_tokens=False)["input_ids"]
    assert [len(each) for each in encoded] == lengths.tolist()
    assert [token for each in encoded for token in each] == ids.tolist()


def test_normalisation_changes_ids(folder: Path) -> None:
    text = "“Curly” quotes – and dashes…"
    plain, normalized = Tokenizer(folder / "plain"), Tokenizer(folder / "normalized")
    assert 3 in plain.encode(text) and 3 not in normalized.encode(text)


def test_an_ending_that_the_dictionary_lacks_is_unknown(fast: Any, slow: Any) -> None:
    known = ["Nevertheless", "results.Nevertheless", "(nevertheless)", "-nevertheless"]
    for text in ["evertheless", "an evertheless.", "evertheless evertheless", "xevertheless", *known]:
        assert fast(text)["input_ids"] == slow(text)["input_ids"]
    assert fast("evertheless")["input_ids"] == [2, 3]
    words = [
        token.removesuffix("</w>") + "evertheless" for token in slow.get_vocab() if token not in slow.all_special_tokens
    ]
    assert all(max(ids) < 42_384 for ids in fast(words)["input_ids"])


@pytest.mark.slow  # loads 57,717 tokens twice
def test_biogpt_large_has_its_own_pieces_that_its_dictionary_lacks(texts: list[str], tmp_path: Path) -> None:
    tokenizer_from_biogpt(BIOGPT.with_name("biogpt-large"), tmp_path / "large")
    fast: Any = AutoTokenizer.from_pretrained(tmp_path / "large")
    slow: Any = BioGptTokenizer.from_pretrained(tmp_path / "large")
    words = [
        "rigorously",
        "vigorously",
        "Rigorously",
        "noteworthy",
        "Noteworthy",
        "(noteworthy)",
        "teworthy",
        "gorously",
    ]
    words += [
        "transistor",
        "transistors",
        "transist",
        "transistx",
        "non-transistx",
        "transistors.",
        "results.Noteworthy",
    ]
    for text in [*words, *texts[:300]]:
        assert fast(text)["input_ids"] == slow(text)["input_ids"], text
    pieces = [token.removesuffix("</w>") for token in slow.get_vocab() if token not in slow.all_special_tokens]
    made = [f"transist{piece}" for piece in pieces] + [
        f"{piece}{end}" for end in ("gorously", "teworthy") for piece in pieces
    ]
    assert all(max(ids) < len(slow) == 57_717 for ids in fast(made)["input_ids"])


def test_decoding_is_that_of_moses_detokenizer(texts: list[str], fast: Any, slow: Any) -> None:
    """Real texts, and tokens drawn at random, most of them those that Moses joins: quotes, brackets, points, money."""
    encoded = slow(texts)["input_ids"]
    rng, vocabulary = random.Random(1), slow.get_vocab()
    often = [vocabulary[f"{token}</w>"] for token in JOINED]
    for _ in range(5_000):
        ids = [
            rng.choice(often) if rng.random() < 0.75 else rng.randrange(4, 42_384) for _ in range(rng.randint(1, 14))
        ]
        encoded.append(ids)
    different = 0
    for ids in encoded:
        different += fast.decode(ids, skip_special_tokens=True) != slow.decode(ids, skip_special_tokens=True)
    print(f"{len(encoded)} decoded, {different} differ")
    assert different == 0


def test_offsets_are_the_places_of_the_tokens(texts: list[str], fast: Any) -> None:
    """What a word's tokens span is the word, with Moses' escapes undone; words stand one after another."""
    words = 0
    for text in texts:
        encoded = fast(text, return_offsets_mapping=True, add_special_tokens=False)
        place = 0
        pieces = zip(encoded.word_ids(), encoded.tokens(), encoded["offset_mapping"], strict=True)
        for _, group in groupby(pieces, key=lambda piece: piece[0]):
            _, tokens, spans = zip(*group, strict=True)
            start, end = spans[0][0], spans[-1][1]
            assert start >= place and all(one[1] == other[0] for one, other in pairwise(spans))
            word = "".join(tokens).removesuffix("</w>")
            if "<unk>" not in tokens:
                assert text[start:end] == {"@-@": "-"}.get(word, html.unescape(word)), (text, word)
                words += 1
            place = end
    print(f"{words} words compared")
    assert words > 200_000


def test_offsets_after_normalisation_leave_no_character_out(texts: list[str], normalizing: Any) -> None:
    """But where it makes one character of two, or lets a stop and a quote change places."""
    changed = re.compile(r"''|´´|\"[,.]")
    more = ["a ( n = 5 )", "11.4\u00a0cm at 37\u00a0ºC, nº\u00a05,\u00a0or 1\u00a0000", "“Quoted” – and… so ‘on’ 5 %"]
    for text in [*more, *(text for text in texts if not changed.search(text.translate(CURLY)))]:
        spans = normalizing(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        covered = {place for start, end in spans for place in range(start, end)}
        left = [place for place, character in enumerate(text) if character.isprintable() and not character.isspace()]
        assert not set(left) - covered, (text, sorted(set(left) - covered))


def test_pairs_padding_truncation_and_masks(texts: list[str], fast: Any, slow: Any) -> None:
    options: list[dict[str, Any]] = [
        {"padding": True},
        {"padding": "max_length", "truncation": True, "max_length": 60},
        {"truncation": True, "max_length": 10},
        {"add_special_tokens": False},
    ]
    for more in options:
        for arguments in ((texts[:20],), (texts[:20], texts[20:40])):
            ours, theirs = fast(*arguments, **more), slow(*arguments, **more)
            assert ours["input_ids"] == theirs["input_ids"]
            assert ours["attention_mask"] == theirs["attention_mask"]


def test_save_and_reload(texts: list[str], fast: Any, tmp_path: Path) -> None:
    fast.save_pretrained(tmp_path)
    again: Any = AutoTokenizer.from_pretrained(tmp_path)
    assert again(texts[:200])["input_ids"] == fast(texts[:200])["input_ids"]


def test_the_file_does_not_depend_on_the_seed_of_hashes() -> None:
    """Python draws the order of sets anew in each process."""
    code = (
        "import sys; from data.text.fast_tokenizer import make_fast_tokenizer;"
        "print(make_fast_tokenizer({'<s>': 0, '<pad>': 1, '</s>': 2, '<unk>': 3}, [('a', 'b</w>')], True).to_str())"
    )
    written = set()
    for seed in "123":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        written.add(subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True).stdout)
    assert len(written) == 1 and len(written.pop()) > 10_000


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "bpecodes: no such file; --from-biogpt takes"),
        ({"bpecodes": b""}, "bpecodes: holds no merge"),
        ({"bpecodes": b"a \xff 3\n"}, "bpecodes: not UTF-8"),
        ({"dict.txt": b"\xff 3\n"}, "dict.txt: not UTF-8"),
        ({"dict.txt": b"a@@ 3\nab 2\na@@ 1\n"}, "dict.txt: holds 'a' more than once"),
    ],
)
def test_damaged_files_of_biogpt_are_refused(files: dict[str, bytes], reason: str, tmp_path: Path) -> None:
    source = tmp_path / "biogpt"
    source.mkdir()
    for name, content in (({"bpecodes": b"a b</w> 7\n", "dict.txt": b"ab 7"} | files) if files else files).items():
        (source / name).write_bytes(content)
    with pytest.raises(UserError, match=reason):
        tokenizer_from_biogpt(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_last_entry_of_a_dictionary_needs_no_line_feed(tmp_path: Path) -> None:
    source = tmp_path / "biogpt"
    source.mkdir()
    (source / "bpecodes").write_bytes(b"a b</w> 7\n")
    (source / "dict.txt").write_bytes(b"a@@ 7\nab 7")
    tokenizer_from_biogpt(source, tmp_path / "out")
    assert Tokenizer(tmp_path / "out").encode("ab") == [5]

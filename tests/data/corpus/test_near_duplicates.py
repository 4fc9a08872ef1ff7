"""data/corpus/near_duplicates.py against all-pairs Jaccard on real abstracts with copies, and a join with dicts."""

import gzip
import json
import random
import shutil
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from data.corpus.build import make_corpus
from data.corpus.near_duplicates import BANDS, HASHES_OF_BAND, band_hashes, near_duplicates, write_bands
from data.corpus.selection import funnel
from data.corpus.settings import load_corpus_settings
from tests.data.citations import citation, write_file
from tests.data.corpora import content, texts
from tests.shared import SHARED, needs_shared

WORDS = [f"word{number}" for number in range(2_000)]
NEAR = load_corpus_settings(None, ["corpus.drop_near_duplicates=true"])


def real_abstracts(number: int) -> list[str]:
    """Distinct ones of different collections, in lower case."""
    found: dict[str, None] = {}
    for path in sorted((SHARED / "data" / "abstracts").glob("*.jsonl.gz")):
        lines = gzip.decompress(path.read_bytes()).decode().splitlines()
        for line in lines[:: len(lines) // 100 + 1]:
            record = json.loads(line)
            found[f"{record.get('title') or ''} {record.get('abstract') or record.get('text') or ''}".casefold()] = None
    return random.Random(1).sample(sorted(found), number)


def near_copy(text: str, changes: int, rng: random.Random) -> str:
    """Words replaced, left out or put in at random places."""
    words = text.split()
    for _ in range(changes):
        at = rng.randrange(len(words))
        words[at : at + rng.randint(0, 1)] = [rng.choice(WORDS)] * rng.randint(0, 1)
    return " ".join(words)


def runs_of_five(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + 5]) for start in range(len(words))}


def probability(jaccard: float) -> float:
    return 1 - (1 - jaccard**8) ** 14


@needs_shared
def test_bands_meet_as_often_as_all_pairs_jaccard_says() -> None:
    """Pairs of 300 real abstracts and three copies of each: by similarity, as many as in theory, within 5 sigma."""
    rng = random.Random(1)
    collection = real_abstracts(300)
    collection += [near_copy(text, rng.choice((1, 3, 6, 10, 15, 25)), rng) for text in collection for _ in range(3)]
    sets, bands = [runs_of_five(text) for text in collection], band_hashes(collection).T
    assert bands.shape == (1_200, BANDS) == (1_200, 14) and HASHES_OF_BAND == 8
    by_similarity: dict[int, list[tuple[float, bool]]] = {tenth: [] for tenth in range(11)}
    for one, other in combinations(range(len(collection)), 2):
        common = len(sets[one] & sets[other])
        jaccard = common / (len(sets[one]) + len(sets[other]) - common)
        by_similarity[int(10 * jaccard)].append((jaccard, bool((bands[one] == bands[other]).any())))
    for tenth, pairs in by_similarity.items():
        met, expected = sum(met for _, met in pairs), sum(probability(jaccard) for jaccard, _ in pairs)
        sigma = sum(probability(jaccard) * (1 - probability(jaccard)) for jaccard, _ in pairs) ** 0.5
        print(f"similarity {tenth / 10:.1f}: {len(pairs)} pairs, {met} met, {expected:.1f} expected")
        assert abs(met - expected) <= 5 * sigma + 1
    assert all(met for tenth in (9, 10) for _, met in by_similarity[tenth]) and len(by_similarity[9]) > 50
    assert not any(met for tenth in (0, 1) for _, met in by_similarity[tenth]) and len(by_similarity[0]) > 700_000


@pytest.mark.parametrize("seed", range(60))
def test_the_join_equals_one_with_dicts(seed: int, tmp_path: Path) -> None:
    """Few hashes, those at the borders of slices among them, so that they meet in parts and across parts."""
    rng = random.Random(seed)
    borders = [0, 2**64 - 1, *(number * 2**60 + more for number in range(1, 16) for more in (-1, 0, 1))]
    few = rng.sample(borders, 6) + [rng.getrandbits(64) for _ in range(rng.choice((2, 200)))]
    sizes = [rng.choice((0, 1, 7, 30)) for _ in range(4)]
    hashes = [[[rng.choice(few) for _ in range(BANDS)] for _ in range(size)] for size in sizes]
    for number, of_part in enumerate(hashes):
        (tmp_path / str(number)).mkdir()
        write_bands(tmp_path / str(number), np.array(of_part, np.uint64).reshape(-1, BANDS).T)
    pmid = rng.sample(range(1_000), sum(sizes))
    stays = [rng.random() < 0.7 for _ in pmid]
    lowest: dict[tuple[int, int], int] = {}
    rows = [row for of_part in hashes for row in of_part]
    for row, number, here in zip(rows, pmid, stays, strict=True):
        for key in enumerate(row):
            if here:
                lowest[key] = min(number, lowest.get(key, number))
    expected = [here and any(lowest[key] < number for key in enumerate(row))
                for row, number, here in zip(rows, pmid, stays, strict=True)]  # fmt: skip
    parts, starts = [tmp_path / str(number) for number in range(4)], np.cumsum([0, *sizes])
    assert near_duplicates(parts, starts, np.array(pmid, np.int64), np.array(stays, bool)).tolist() == expected


def test_of_near_copies_the_lowest_pmid_stays(tmp_path: Path) -> None:
    """Each of 40 texts has a copy of one word more in another file; off by default; short texts are no copies."""
    rng = random.Random(1)
    originals = [" ".join(rng.choices(WORDS, k=150)) for _ in range(40)]
    first = [citation(100 + number, "Title", text) for number, text in enumerate(originals)]
    second = [citation(number or 999, "Title", f"{text} more") for number, text in enumerate(originals)]
    short = [citation(2_000 + number, "The", f"{word} was.") for number, word in enumerate(WORDS[:20])]
    write_file(tmp_path / "raw" / "pubmed26n0001.xml", [*first, *short])
    write_file(tmp_path / "raw" / "pubmed26n0002.xml", second)
    raw = [tmp_path / "raw"]
    assert make_corpus(raw, tmp_path / "off", 0, 0, 1)["counts"]["near_duplicates"] == 0
    counts = make_corpus(raw, tmp_path / "near", 0, 0, 1, NEAR)["counts"]
    assert counts["near_duplicates"] == 40 == dict(funnel(counts))["- near duplicates"] and counts["train"] == 60
    kept = set(texts(tmp_path / "near"))
    assert kept == {*range(1, 40), 100, *range(2_000, 2_020)} and len(texts(tmp_path / "off")) == 100
    make_corpus(raw, tmp_path / "parallel", 0, 0, 2, NEAR)
    assert content(tmp_path / "near") == content(tmp_path / "parallel")


def test_an_update_is_compared_with_what_was_there(tmp_path: Path) -> None:
    """The old file is not read again, and the whole is that of both at once."""
    text = " ".join(random.Random(1).choices(WORDS, k=150))
    old = write_file(tmp_path / "raw" / "pubmed26n0001.xml", [citation(2, "A", text), citation(3, "B", "Another.")])
    make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0, 0, 1, NEAR)
    receipt = tmp_path / "corpus.parts" / old.name / "manifest.json"
    before = receipt.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "corpus")
    write_file(tmp_path / "raw" / "pubmed26n0002.xml", [citation(1, "A", f"{text} more")])
    make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0, 0, 1, NEAR)
    assert set(texts(tmp_path / "corpus")) == {1, 3} and receipt.stat().st_mtime_ns == before

"""data/corpus/passages.py: the rule against a plain one; disguises; the real abstracts, whose PMIDs say the truth."""

import gzip
import json
import random
import unicodedata

import pytest

from data.corpus import passages
from data.corpus.passages import Passages, is_long_enough
from tests.data.pins import check_pin
from tests.shared import SHARED, needs_shared

ARTICLE = (
    "Does Dravonin relieve itch? A double-blind study in 24 volunteers. Itch is common in patients with kidney disease,"
    " and its cause isn't known. We gave them 5 mg of Dravonin or placebo (n = 12 each) for 3 weeks. Scores fell from"
    " 7.5 to 3.1 with Dravonin, but not with placebo; the difference was β = -2.4 (95 % CI: -3.6 to -1.2). One"
    " volunteer had a naïve T-cell count below 400 cells/µl. Dravonin relieved itch in this small study of volunteers."
)
SENTENCE = "Scores fell from 7.5 to 3.1 with Dravonin , but not with placebo ; the difference was β = -2.4 ."
PINS = {1: "88d1bfda9e10cab7"}


def plain(text: str) -> str:
    return "".join(each for each in unicodedata.normalize("NFKD", text).casefold() if each.isalnum())


def slow_find(given: list[str], texts: list[str]) -> set[tuple[int, int, float]]:
    """The rule as it is written down."""
    found = set()
    for number, passage in enumerate(given):
        content = plain(passage).encode()
        runs = [content[start : start + 50] for start in range(0, len(content) - 49, 10)]
        for index, text in enumerate(texts):
            share = sum(run in plain(text).encode() for run in runs) / max(len(runs), 1)
            if share > 0.5:
                found.add((index, number, share))
    return found


def holds(text: str, passage: str) -> bool:
    return bool(list(Passages([passage]).find([text])))


@pytest.mark.parametrize("seed", range(20))
def test_the_rule_equals_a_plain_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On texts made of few sentences, so that they share much, in groups of several sizes."""
    rng = random.Random(seed)
    monkeypatch.setattr(passages, "LETTERS_AT_ONCE", rng.choice((1, 500, 1 << 18)))
    monkeypatch.setattr(passages, "KNOWN_BITS", rng.choice((4, 24)))
    words = ["itch", "Dravonin", "é", "β-cell", "ﬁbrosis", "of", "5 mg", "(ABC)", "x" * 30, "體", "—"]
    sentences = ["", *(" ".join(rng.choices(words, k=rng.randint(1, 25))) for _ in range(8))]
    texts = [" ".join(rng.choices(sentences, k=rng.randint(0, 6))) for _ in range(40)]
    given = [*texts[:5], *(text[rng.randint(0, 20) : rng.randint(30, 300)] for text in texts), *sentences]
    expected = slow_find(given, texts)
    assert set(Passages(given).find(texts)) == expected
    print(f"{len(expected)} of {len(given) * len(texts)} pairs, {sum(share < 1 for *_, share in expected)} in part")
    assert len(expected) > 40 and any(share < 1 for *_, share in expected)


@pytest.mark.parametrize(
    "disguised",
    [
        ARTICLE.upper(),
        ARTICLE.replace(" ", " \n\u2003"),
        ARTICLE.replace("-", "–").replace("'", "’").replace(".", ""),
        ARTICLE.replace("(", "( ").replace(",", " ,").replace("/", " / ").replace("-", " - "),
        unicodedata.normalize("NFD", ARTICLE).replace("fi", "ﬁ").replace("µ", "μ"),
        "".join(chr(ord(each) + 0xFEE0) if each.isalnum() and each.isascii() else each for each in ARTICLE),
        ARTICLE.replace("Itch is", "BACKGROUND: Itch is").replace("Scores", "RESULTS: Scores").replace("β", "beta"),
        ARTICLE.replace("volunteers", "patients"),
        f"Another title. {ARTICLE[60:]} Copyright of somebody.",
    ],
)
def test_a_text_is_found_in_disguise(disguised: str) -> None:
    assert disguised != ARTICLE and holds(disguised, ARTICLE)


def test_parts_of_an_abstract_are_found_in_it() -> None:
    """A sentence as HoC writes it; question and contexts of PubMedQA, which leave out labels and the conclusion."""
    abstract = ARTICLE.replace("Itch is", "BACKGROUND: Itch is").replace("Scores", "RESULTS: Scores")
    assert holds(abstract, SENTENCE)
    question_and_contexts, _, _ = ARTICLE.partition(" Dravonin relieved itch")
    assert holds(abstract, question_and_contexts)


def test_other_texts_are_not_found() -> None:
    first, second = ARTICLE[: len(ARTICLE) // 3], ARTICLE[len(ARTICLE) // 3 :]
    assert not holds(first, ARTICLE)  # a third of it
    assert not list(Passages([SENTENCE]).find([SENTENCE[:48], SENTENCE[48:]]))  # in two texts together
    assert holds(second, ARTICLE)
    assert not holds("", ARTICLE) and not holds(ARTICLE, "") and not list(Passages([]).find([ARTICLE]))
    assert not list(Passages([ARTICLE]).find([]))
    short = "Further studies are needed to confirm our results."
    assert not is_long_enough(short) and is_long_enough(SENTENCE)
    assert not holds(f"{ARTICLE} {short}", short)


def test_what_is_found_changes_with_the_version_of_the_rule_only() -> None:
    texts = [ARTICLE[start : start + length] for start in range(0, 400, 40) for length in (70, 150, 300)]
    outputs = [*Passages([ARTICLE, SENTENCE, *texts]).find([*texts, SENTENCE, ARTICLE])]
    pins = {("passages", version): pin for version, pin in PINS.items()}
    check_pin(pins, "rule", "data/corpus/passages.py", "passages", passages.VERSION, outputs)


@needs_shared
def test_the_abstracts_of_bc5cdr_are_found_by_text_under_their_own_pmids() -> None:
    """Its benchmark files and its shared abstracts say the PMIDs, and no two articles are the same."""
    articles = {}
    for split in ("train", "valid", "test"):
        path = SHARED / "data" / "benchmarks" / "bc5cdr" / f"{split}.json.gz"
        articles |= json.loads(gzip.decompress(path.read_bytes()))
    lines = gzip.decompress((SHARED / "data/abstracts/bc5cdr.jsonl.gz").read_bytes()).decode().strip().split("\n")
    records = [json.loads(line) for line in lines]
    index = Passages(f"{each['title']} {each['abstract']}" for each in articles.values())
    pmids = list(articles)
    found = {
        (str(records[text]["id"]), pmids[passage]) for text, passage, _ in index.find(r["abstract"] for r in records)
    }
    print(f"{len(found)} of {len(pmids)} articles found without their titles")
    assert found == {(pmid, pmid) for pmid in pmids}

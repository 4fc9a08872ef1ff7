"""data/corpus/selection.py: filters against a slow reading of the same XML, on real records and on generated ones."""

import gzip
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.corpus.build import make_corpus
from data.corpus.cleaning import CLEAN, CorpusSection, cleaning_switches, load_corpus_settings
from data.corpus.selection import FILTERS
from tests.data.citations import Record, article_set, citation, citation_xml, read_with_elementtree
from tests.data.corpus.test_build import texts
from tests.shared import NLM, needs_shared

ALL_LANGUAGES = ("eng", "fre", "ger")


def slow_filter(record: Record, settings: CorpusSection, excluded: set[int]) -> str | None:
    """The first filter that drops a record, whatever its text."""
    fields = [field for field in (record.title, record.abstract) if field]
    if len(fields) < 1 + settings.title_and_abstract:
        return "without_title_or_abstract"
    if record.pmid in excluded:
        return "excluded"
    if settings.languages and not set(settings.languages) & set(record.languages.split()):
        return "other_language"
    if settings.first_year and (record.year is None or record.year < settings.first_year):
        return "other_year"
    if settings.last_year and (record.year is None or record.year > settings.last_year):
        return "other_year"
    if len(" ".join(fields).split(" ")) < settings.minimum_words:
        return "short"
    if settings.drop_retracted and record.retracted:
        return "retracted"
    return None


def letters_of(record: Record) -> str:
    """What equal texts have in common."""
    folded = unicodedata.normalize("NFKC", f"{record.title}{record.abstract}").casefold()
    return re.sub(r"[\x00-/:-@\[-`{-\x7f]", "", folded)


def random_settings(rng: random.Random, pmids: list[int], folder: Path) -> tuple[CorpusSection, set[int]]:
    """Each filter on or off, without cleaning rules and duplicates; and the PMIDs excluded, never the last."""
    excluded = set(rng.sample(pmids[:-1], rng.choice((0, len(pmids) // 3))))
    (folder / "pmids").write_text("".join(f"{pmid}\n" for pmid in excluded))
    chosen: dict[str, Any] = dict.fromkeys((*cleaning_switches(CLEAN), "drop_duplicates"), False)
    chosen |= {name: rng.random() < 0.5 for name in ("title_and_abstract", "drop_retracted")}
    chosen |= {"first_year": rng.randint(1960, 2000)} if rng.random() < 0.5 else {}
    chosen |= {"last_year": rng.randint(2000, 2020)} if rng.random() < 0.5 else {}
    chosen |= {"minimum_words": rng.choice((0, 12, 100, 250)), "exclude_pmids": str(folder / "pmids")}
    chosen |= {"languages": rng.sample(ALL_LANGUAGES, rng.randint(0, 2))}
    return load_corpus_settings(None, [f"corpus.{key}={toml(value)}" for key, value in chosen.items()]), excluded


def toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def assert_equals_slow(path: Path, records: list[Record], rng: random.Random, folder: Path) -> Counter[str]:
    """A corpus of the file under random settings keeps and counts what the slow reading does; what dropped how many."""
    folder.mkdir()
    settings, excluded = random_settings(rng, [record.pmid for record in records], folder)
    dropped = {record.pmid: slow_filter(record, settings, excluded) for record in records}
    texts_excluded = {letters_of(record) for record in records if dropped[record.pmid] == "excluded"}
    equal = [record.pmid for record in records if not dropped[record.pmid] and letters_of(record) in texts_excluded]
    dropped |= dict.fromkeys(equal, "excluded")
    counts = make_corpus([path], folder / "corpus", 0, 0, 1, settings)["counts"]
    assert set(texts(folder / "corpus")) == {pmid for pmid, name in dropped.items() if not name}
    by_filter = Counter(name for name in dropped.values() if name)
    assert {name: counts[name] for name in FILTERS} == {name: by_filter[name] for name in FILTERS}
    assert counts["superseded"] == counts["deleted"] == counts["duplicates"] == 0
    return by_filter


@needs_shared
def test_filters_on_real_records_equal_the_slow_reading(tmp_path: Path) -> None:
    """The 3,693 records of many years, and NLM's sample, which has more retracted ones."""
    rng, total, decisions = random.Random(1), Counter[str](), 0
    for name, trials in (("assembled_3693", 5), ("pubmedsample18n0001", 20)):
        path = NLM / f"{name}.xml.gz"
        records = [record for record, _ in read_with_elementtree(gzip.decompress(path.read_bytes()))]
        for trial in range(trials):
            total += assert_equals_slow(path, records, rng, tmp_path / f"{name}-{trial}")
            decisions += len(records)
    print(f"{decisions} decisions compared: {dict(total)}")
    assert set(total) == set(FILTERS) and min(total.values()) >= 3


def generated(rng: random.Random) -> Iterator[str]:
    """MedlineCitations of every kind; the last passes every filter that `random_settings` may set."""
    for pmid in range(1, 40):
        title, abstract = rng.choice(("", "Short title", "t " * 99)), rng.choice(("", "Few words here.", "a " * 200))
        xml = citation_xml(citation(pmid, title, abstract))
        year = rng.choice((None, 1950, *range(1998, 2022)))
        xml = xml.replace("<Year>2001</Year>", f"<Year>{year}</Year>" if year else "<MedlineDate>Spring</MedlineDate>")
        more = "".join(
            f"<Language>{each}</Language>" for each in rng.sample((*ALL_LANGUAGES, "jpn"), rng.randint(0, 2))
        )
        kinds = rng.sample(("Journal Article", "Retracted Publication", "Retraction of Publication"), rng.randint(0, 3))
        types = "".join(f"<PublicationType>{kind}</PublicationType>" for kind in kinds)
        yield xml.replace("</Article>", f"{more}<PublicationTypeList>{types}</PublicationTypeList></Article>")
    always = citation_xml(citation(99, "t " * 99, "a " * 300)).replace("2001", "2000")
    yield always.replace("</Article>", "".join(f"<Language>{each}</Language>" for each in ALL_LANGUAGES) + "</Article>")


@pytest.mark.parametrize("seed", range(60))
def test_filters_on_generated_records_equal_the_slow_reading(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = tmp_path / "a.xml"
    path.write_text(article_set("".join(f"<PubmedArticle>{xml}</PubmedArticle>" for xml in generated(rng))))
    records = [record for record, _ in read_with_elementtree(path.read_bytes())]
    assert_equals_slow(path, records, rng, tmp_path / "out")

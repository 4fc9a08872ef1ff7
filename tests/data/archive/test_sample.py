"""data/archive/sample.py: the same bytes always, valid NLM XML, and everything in it that its description promises."""

import gzip
import hashlib
import re
from collections import Counter
from pathlib import Path

import pytest
from lxml import etree  # pyright: ignore[reportAttributeAccessIssue]

from data.archive.sample import write_sample
from data.corpus.build import make_corpus
from tests.data.citations import Record, read_with_elementtree
from tests.shared import SHARED, needs_shared


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_sample(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="module")
def baseline(sample: list[Path]) -> list[Record]:
    return [record for record, _ in read_with_elementtree(gzip.decompress(sample[0].read_bytes()))]


@pytest.fixture(scope="module")
def update(sample: list[Path]) -> list[Record]:
    return [record for record, _ in read_with_elementtree(gzip.decompress(sample[1].read_bytes()))]


def xml_of(paths: list[Path]) -> str:
    return "".join(gzip.decompress(path.read_bytes()).decode() for path in paths)


def digests(paths: list[Path]) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def test_the_same_bytes_every_time(sample: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1e9)  # gzip would write the time into its header
    assert digests(write_sample(tmp_path / "again")) == digests(sample)
    assert set(digests(write_sample(tmp_path / "other", seed=2))).isdisjoint(digests(sample))


@needs_shared
def test_it_is_valid_by_nlms_dtd(sample: list[Path]) -> None:
    dtd = etree.DTD(str(SHARED / "data" / "dtd" / "pubmed_250101.dtd"))
    for path in sample:
        dtd.validate(etree.fromstring(gzip.decompress(path.read_bytes())))
        assert [entry.message for entry in dtd.error_log] == []


def test_about_2000_citations_of_several_languages(sample: list[Path], baseline: list[Record]) -> None:
    assert len(baseline) == 2_000 and len({record.pmid for record in baseline}) == 2_000
    languages = Counter(re.findall("<Language>(.*?)</Language>", xml_of(sample)))
    assert languages["eng"] > 1_700 and len([language for language in languages if languages[language] > 10]) >= 5
    assert xml_of(sample).count("<VernacularTitle>") == languages.total() - languages["eng"]
    assert any(not character.isascii() for character in "".join(re.findall("<VernacularTitle>.*<", xml_of(sample))))


def test_structured_labels_inline_markup_and_missing_abstracts(sample: list[Path], baseline: list[Record]) -> None:
    labels = Counter(re.findall('Label="(.*?)"', xml_of(sample)))
    assert set(labels) == {"BACKGROUND", "METHODS", "RESULTS", "CONCLUSIONS"} and min(labels.values()) > 500
    assert xml_of(sample).count("<i>") > 2_000 and xml_of(sample).count("<sup>") > 500
    assert 20 < sum(not record.abstract for record in baseline) < 200


def test_revisions_second_versions_and_deletions(baseline: list[Record], update: list[Record]) -> None:
    known = {record.pmid: record for record in baseline}
    revised = [record for record in update if not record.deleted and record.version == 1]
    assert len(revised) == 10 and all(known[record.pmid].title != record.title for record in revised)
    second = [record for record in update if record.version == 2]
    assert len(second) == 5 and all(record.pmid in known for record in second)
    deleted = [record.pmid for record in update if record.deleted]
    assert len(deleted) == 10 and set(deleted) <= set(known)


def test_one_exact_duplicate(baseline: list[Record]) -> None:
    texts = Counter((record.title, record.abstract) for record in baseline if record.abstract)
    assert sorted(texts.values())[-2:] == [1, 2]


def test_agreement_and_terms_that_come_back(baseline: list[Record]) -> None:
    """The grammar to be learned: the gene of an abstract is named again and again; patients were, a patient was."""
    abstracts = [record.abstract for record in baseline if record.abstract]
    for abstract in abstracts:
        gene = re.search(r"The role of (\S+) in", abstract)
        assert gene and abstract.count(gene[1]) >= 4
    assert not any(re.search(r"\b(patients|mice|volunteers|infants) was\b", abstract) for abstract in abstracts)


def test_the_corpus_shows_all_of_it(sample: list[Path], tmp_path: Path) -> None:
    counts = make_corpus([sample[0].parent], tmp_path / "corpus", 0.05, 0.05, workers=1)["counts"]
    assert counts["records"] == 2_015 and counts["deletions"] == 10 and counts["duplicates"] == 1
    assert 60 < counts["validation"] < 140 and 60 < counts["test"] < 140

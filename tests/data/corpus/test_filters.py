"""data/corpus/filters.py: each filter against a simple reference, on real records and on generated ones."""

import gzip
import random
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from data.common.files import UserError
from data.corpus import filters
from data.corpus.build import make_corpus
from data.corpus.cleaning import RULES
from data.corpus.filters import FILTERS, Filter, FilterSettings, filter_versions, first_filter, read_pmids
from data.corpus.schema import PartRow, part_schema
from data.corpus.selection import funnel
from data.corpus.settings import CorpusSection, load_corpus_settings
from tests.data.citations import Record, article_set, citation, citation_xml, read_with_elementtree
from tests.data.corpora import PLAIN, build, texts
from tests.data.pins import check_pin
from tests.shared import NLM, needs_shared

NAMES = [each.name for each in FILTERS]
ALL_LANGUAGES = ("eng", "fre", "ger")
TYPES = ("Retracted Publication", "Published Erratum", "LETTER", "Research Support, U.S. Gov't, P.H.S.", "Leter")


def slow_filter(record: Record, settings: CorpusSection, excluded: set[int]) -> str | None:
    """The first filter that drops a record, whatever its text, or the publication type for which it is dropped."""
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
    if settings.drop_withdrawn and record.title is not None and record.title.lower().startswith("withdrawn:"):
        return "withdrawn"
    types = {name.strip().lower() for name in record.publication_types.split("|")}
    return next((name for name in settings.drop_publication_types if name.lower() in types), None)


def letters_of(record: Record) -> str:
    """What equal texts have in common."""
    folded = unicodedata.normalize("NFKC", f"{record.title}{record.abstract}").casefold()
    return re.sub(r"[\x00-/:-@\[-`{-\x7f]", "", folded)


def random_settings(rng: random.Random, pmids: list[int], folder: Path) -> tuple[CorpusSection, set[int]]:
    """Each filter on or off, without cleaning rules and duplicates; and the PMIDs excluded, never the last."""
    excluded = set(rng.sample(pmids[:-1], rng.choice((0, len(pmids) // 3))))
    (folder / "pmids").write_text("".join(f"{pmid}\n" for pmid in excluded))
    chosen: dict[str, Any] = dict.fromkeys((*(rule.name for rule in RULES), "drop_duplicates"), False)
    chosen |= {name: rng.random() < 0.5 for name in ("title_and_abstract", "drop_withdrawn")}
    chosen |= {"drop_publication_types": "|".join(rng.sample(TYPES, rng.randint(0, 3)))}
    chosen |= {"first_year": rng.randint(1960, 2000)} if rng.random() < 0.5 else {}
    chosen |= {"last_year": rng.randint(2000, 2020)} if rng.random() < 0.5 else {}
    chosen |= {"minimum_words": rng.choice((0, 12, 100, 250)), "exclude_pmids": str(folder / "pmids")}
    chosen |= {"languages": rng.sample(ALL_LANGUAGES, rng.randint(0, 2))}
    return load_corpus_settings(None, [f"corpus.{key}={toml(value)}" for key, value in chosen.items()]), excluded


def toml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def assert_equals_slow(path: Path, records: list[Record], rng: random.Random, folder: Path) -> Counter[str]:
    """A corpus under random settings keeps and counts what the reference does. Returns how many each filter dropped."""
    folder.mkdir()
    settings, excluded = random_settings(rng, [record.pmid for record in records], folder)
    dropped = {record.pmid: slow_filter(record, settings, excluded) for record in records}
    texts_excluded = {letters_of(record) for record in records if dropped[record.pmid] == "excluded"}
    equal = [record.pmid for record in records if not dropped[record.pmid] and letters_of(record) in texts_excluded]
    dropped |= dict.fromkeys(equal, "excluded")
    counts = make_corpus([path], folder / "corpus", 0, 0, 1, settings)["counts"]
    assert set(texts(folder / "corpus")) == {pmid for pmid, name in dropped.items() if not name}
    by_filter = Counter(name for name in dropped.values() if name)
    assert {name: counts[name] for name in NAMES[:-1]} == {name: by_filter[name] for name in NAMES[:-1]}
    assert counts.get("publication_types", {}) == {name: by_filter[name] for name in settings.drop_publication_types}
    assert counts["superseded"] == counts["deleted"] == counts["duplicates"] == 0
    return by_filter


@needs_shared
def test_filters_on_real_records_equal_the_reference(tmp_path: Path) -> None:
    """The 3,693 records of many years, and NLM's sample, which has more retracted ones."""
    rng, total, decisions = random.Random(1), Counter[str](), 0
    for name, trials in (("assembled_3693", 5), ("pubmedsample18n0001", 20)):
        path = NLM / f"{name}.xml.gz"
        records = [record for record, _ in read_with_elementtree(gzip.decompress(path.read_bytes()))]
        for trial in range(trials):
            total += assert_equals_slow(path, records, rng, tmp_path / f"{name}-{trial}")
            decisions += len(records)
    print(f"{decisions} decisions compared: {dict(total)}")
    none = {"placeholder_title", "withdrawn", "Published Erratum", "Leter"}  # with an abstract in these files
    assert set(total) == {*NAMES[:-1], *TYPES} - none and min(total.values()) >= 2


def generated(rng: random.Random) -> Iterator[str]:
    """MedlineCitations of every kind; the last passes every filter that `random_settings` may set."""
    for pmid in range(1, 40):
        title, abstract = (
            rng.choice(("", "Short title", "WITHDRAWN: Title", "t " * 99)),
            rng.choice(("", "Few words here.", "a " * 200)),
        )
        xml = citation_xml(citation(pmid, title, abstract))
        year = rng.choice((None, 1950, *range(1998, 2022)))
        xml = xml.replace("<Year>2001</Year>", f"<Year>{year}</Year>" if year else "<MedlineDate>Spring</MedlineDate>")
        more = "".join(
            f"<Language>{each}</Language>" for each in rng.sample((*ALL_LANGUAGES, "jpn"), rng.randint(0, 2))
        )
        kinds = rng.sample(("Journal Article", "Retraction of Publication", "\nletter ", *TYPES[:4]), rng.randint(0, 3))
        types = "".join(f"<PublicationType>{kind}</PublicationType>" for kind in kinds)
        yield xml.replace("</Article>", f"{more}<PublicationTypeList>{types}</PublicationTypeList></Article>")
    always = citation_xml(citation(99, "t " * 99, "a " * 300)).replace("2001", "2000")
    yield always.replace("</Article>", "".join(f"<Language>{each}</Language>" for each in ALL_LANGUAGES) + "</Article>")


@pytest.mark.parametrize("seed", range(60))
def test_filters_on_generated_records_equal_the_reference(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    path = tmp_path / "a.xml"
    path.write_text(article_set("".join(f"<PubmedArticle>{xml}</PubmedArticle>" for xml in generated(rng))))
    records = [record for record, _ in read_with_elementtree(path.read_bytes())]
    assert_equals_slow(path, records, rng, tmp_path / "out")


# By hand


def made(folder: Path, xml: str, *settings: str) -> tuple[set[int], dict[str, Any]]:
    """The PMIDs kept of a file with these MedlineCitations, and the counts; PMID 1000 is added and always stays."""
    (folder / "raw").mkdir(exist_ok=True)
    always = citation_xml(citation(1000, "T" * 9, "word " * 200)).replace("2001", "1990")
    always = always.replace("</Article>", "<Language>eng</Language></Article>")
    (folder / "raw" / "a.xml").write_text(f"<MedlineCitationSet>{xml}{always}</MedlineCitationSet>")
    shutil.rmtree(folder / "corpus", ignore_errors=True)
    counts = make_corpus([folder / "raw"], folder / "corpus", 0, 0, 1, load_corpus_settings(None, settings))["counts"]
    return set(texts(folder / "corpus")) - {1000}, counts


def test_each_filter_drops_and_counts_its_own(tmp_path: Path) -> None:
    def record(pmid: int, year: str = "1990", more: str = "<Language>eng</Language>", abstract: str = "A b c.") -> str:
        xml = citation_xml(citation(pmid, f"Title {pmid}", abstract)).replace("<Year>2001</Year>", year and
                                                                            f"<Year>{year}</Year>")  # fmt: skip
        return xml.replace("</Article>", f"{more}</Article>")

    retracted = "<PublicationTypeList><PublicationType>Retracted Publication</PublicationType></PublicationTypeList>"
    two = "<Language>fre</Language><Language>eng</Language>"
    xml = (
        record(1) + record(2, "2001") + record(3, "") + record(4, more="<Language>fre</Language>") + record(5, more=two)
    )
    xml += (
        record(6, more=f"<Language>eng</Language>{retracted}") + record(7, abstract="") + record(8, abstract="B " * 20)
    )
    everything = {1, 2, 3, 4, 5, 6, 7, 8}

    def dropped(*settings: str) -> tuple[set[int], dict[str, Any]]:
        kept, counts = made(tmp_path, xml, *settings)
        return everything - kept, {name: counts[name] for name in NAMES if counts.get(name)}

    both, off = "without_title_or_abstract", "corpus.drop_publication_types="
    assert dropped() == ({6, 7}, {both: 1, "publication_types": {"Retracted Publication": 1, "Published Erratum": 0}})
    assert dropped(off) == ({7}, {both: 1})
    assert dropped(off, "corpus.title_and_abstract=false") == (set(), {})
    assert dropped(off, 'corpus.languages=["eng"]') == ({4, 7}, {both: 1, "other_language": 1})
    assert dropped(off, 'corpus.languages=["eng", "fre"]') == ({7}, {both: 1})
    assert dropped(off, "corpus.last_year=2000") == ({2, 3, 7}, {both: 1, "other_year": 2})
    assert dropped(off, "corpus.first_year=1990") == ({3, 7}, {both: 1, "other_year": 1})
    assert dropped(off, "corpus.minimum_words=10") == (everything - {8}, {both: 1, "short": 6})
    (tmp_path / "pmids").write_text("2\n8\n77\n")
    assert dropped(off, f"corpus.exclude_pmids={tmp_path / 'pmids'}") == ({2, 7, 8}, {both: 1, "excluded": 2})


@pytest.mark.parametrize(
    ("settings", "kept", "placeholder", "without"),
    [
        ((), {1}, 2, 4),
        (("corpus.title_and_abstract=false",), {1, 2, 4, 5, 6}, 1, 1),
        (("corpus.drop_placeholders=false",), {1, 2}, 0, 5),
    ],
)
def test_placeholders_and_unicodes_spaces_are_no_texts(
    settings: tuple[str, ...], kept: set[int], placeholder: int, without: int, tmp_path: Path
) -> None:
    """A title that is NLM's placeholder has a count of its own, also where one field is enough."""
    records = [citation(1), citation(2, "[Not Available]."), citation(3, "[Not Available].", "")]
    records += [
        citation(4, "\u2003\u00a0"),
        citation(5, "Title alone.", "\u00a0"),
        citation(6, "\u2003", "Text alone."),
    ]
    records += [citation(7, "\u2003", "\u00a0 \u2003")]
    counts = build(tmp_path, [records], 0, 0, *settings, "corpus.drop_duplicates=false")["counts"]
    assert set(texts(tmp_path / "corpus")) == kept
    assert (counts["placeholder_title"], counts["without_title_or_abstract"]) == (placeholder, without)
    assert all(text == text.strip() for text in texts(tmp_path / "corpus").values())
    if "corpus.title_and_abstract=false" in settings:
        assert counts["drop_placeholders"] == 1 and texts(tmp_path / "corpus")[2] == "An abstract."


def test_publication_types_are_counted_one_by_one(tmp_path: Path) -> None:
    """NLM's names in capitals or not and with commas; a misspelt one shows as 0; a record counts once."""

    def record(pmid: int, *types: str) -> str:
        inner = "".join(f"<PublicationType UI='D1'>{each}</PublicationType>" for each in types)
        xml = citation_xml(citation(pmid, f"Title {pmid}"))
        return xml.replace("</Article>", f"<PublicationTypeList>{inner}</PublicationTypeList></Article>")

    support, retracted, erratum = "Research Support, U.S. Gov't, P.H.S.", "Retracted Publication", "Published Erratum"
    xml = (
        record(1, "Journal Article", f"{support}\n\t\t\t")
        + record(2, "LETTER")
        + record(3, "Retraction of Publication")
    )
    xml += record(4, erratum, retracted) + record(5, "Journal Article", erratum) + record(6) + record(7, "Letter to N")

    kept, counts = made(tmp_path, xml)
    assert (kept, counts["publication_types"]) == ({1, 2, 3, 6, 7}, {retracted: 1, erratum: 1})
    assert dict(funnel(counts)).items() >= {f"- type: {retracted}": 1, f"- type: {erratum}": 1}.items()
    kept, counts = made(tmp_path, xml, f"corpus.drop_publication_types=letter|{support}|Leter|{erratum}|{retracted}")
    assert kept == {3, 6, 7}
    assert counts["publication_types"] == {"letter": 1, support: 1, "Leter": 0, erratum: 2, retracted: 0}


def test_the_funnel_of_a_manifest_of_an_earlier_version_counts_retracted_articles(tmp_path: Path) -> None:
    _, counts = made(tmp_path, citation_xml(citation(1)), "corpus.drop_publication_types=")
    then = counts | {"retracted": 3}
    assert [line for line in funnel(then) if line not in funnel(counts)] == [("- type: Retracted Publication", 3)]


@pytest.mark.parametrize(
    ("title", "is_withdrawn"),
    [("WITHDRAWN: Zinc for colds.", True), ("[Withdrawn: Zinc.]", True), ("Withdrawn patients: a survey", False),
     ("Drugs WITHDRAWN: a survey", False)],
)  # fmt: skip
def test_titles_that_say_so_are_withdrawn(title: str, is_withdrawn: bool, tmp_path: Path) -> None:
    for switch in (True, False):
        kept, counts = made(tmp_path, citation_xml(citation(1, title)), f"corpus.drop_withdrawn={toml(switch)}")
        assert (1 not in kept) == counts["withdrawn"] == (is_withdrawn and switch)


@pytest.mark.parametrize("duplicates", ["true", "false"])
def test_the_text_of_an_excluded_pmid_stays_out_under_another(duplicates: str, tmp_path: Path) -> None:
    (tmp_path / "pmids").write_text("10\n30\n")
    records = [citation(5, "Of the benchmark"), citation(10, "Of the benchmark"), citation(20, "OF THE BENCHMARK.")]
    records += [citation(30, "Without abstract", ""), citation(40, "Without abstract"), citation(50)]
    given = (f"corpus.exclude_pmids={tmp_path / 'pmids'}", f"corpus.drop_duplicates={duplicates}")
    counts = build(tmp_path, [records], 0, 0, *given)["counts"]
    assert set(texts(tmp_path / "corpus")) == {40, 50}
    assert (counts["excluded"], counts["without_title_or_abstract"], counts["duplicates"]) == (3, 1, 0)


@needs_shared
def test_filters_on_nlms_sample(tmp_path: Path) -> None:
    """The data sheet counts 177 records, 109 abstracts, 3 retracted, 7 empty titles, 26 not English."""
    path = NLM / "pubmedsample18n0001.xml.gz"
    raw = gzip.decompress(path.read_bytes()).decode().split("<MedlineCitation ")[1:]
    other = {record for record in raw if "<Language>eng<" not in record}
    empty = {record for record in raw if "<AbstractText" not in record and not re.search(r"<ArticleTitle>\S", record)}
    retracted = {record for record in raw if ">Retracted Publication<" in record}
    notices = {record for record in raw if ">Retraction of Publication<" in record}
    assert (len(raw), len(empty), len(retracted), len(notices)) == (177, 7, 3, 2)
    assert len(other | {record for record in raw if record.count("<Language>") > 1}) == 26
    one_suffices = ["corpus.title_and_abstract=false", "corpus.drop_duplicates=false"]
    types = "corpus.drop_publication_types=Retracted Publication|Retraction of Publication"
    settings = load_corpus_settings(None, [*one_suffices, types, 'corpus.languages=["eng"]'])
    counts = make_corpus([path], tmp_path / "a", 0, 0, 1, settings)["counts"]
    assert (counts["records"], counts["without_title_or_abstract"]) == (177, 7)
    assert counts["other_language"] == len(other - empty)
    by_type = {"Retracted Publication": retracted - empty - other, "Retraction of Publication": notices - empty - other}
    assert counts["publication_types"] == {name: len(found) for name, found in by_type.items()}
    assert counts["train"] == len(set(raw) - empty - other - retracted - notices)
    counts = make_corpus([path], tmp_path / "b", 0, 0, 1, PLAIN)["counts"]
    assert counts["without_title_or_abstract"] == 177 - 109


def test_files_of_pmids_are_checked(tmp_path: Path) -> None:
    (tmp_path / "pmids").write_text("12\n\n34\n")
    assert read_pmids(tmp_path / "pmids") == [12, 34]
    (tmp_path / "pmids").write_text("12\nPMC34\n")
    with pytest.raises(UserError, match="'PMC34' is not a PMID"):
        read_pmids(tmp_path / "pmids")
    with pytest.raises(UserError, match="exclude_pmids"):
        read_pmids(tmp_path / "absent")


# Names, keys, versions

every_filter = pytest.mark.parametrize("filter_", FILTERS, ids=lambda each: each.name)
PROBES = [
    PartRow(
        pmid,
        1,
        year=year,
        languages=languages,
        publication_types=types,
        title=title,
        fields=pmid % 3,
        words=words,
        cleaned=abs(pmid) * 3,
    )
    for pmid, year, languages, words, types, title in zip(
        [*range(40), *range(-8, 0)],
        [None, 1899, 1990, 1999, 2000, 2001, 2010, 2020] * 6,
        ["eng", "fre", "", "eng fre", "ger jpn", "english"] * 8,
        [0, 1, 9, 10, 11, 250] * 8,
        ["", "Journal Article", "Retracted Publication", "Letter|PUBLISHED ERRATUM|Retracted Publication"] * 12,
        ["", "WITHDRAWN: A", "Withdrawn: B", "Withdrawn C"] * 12,
        strict=True,
    )
]
PROBE_SETTINGS = [
    FilterSettings(),
    FilterSettings(
        title_and_abstract=False,
        drop_withdrawn=False,
        drop_publication_types=(),
        languages=("eng",),
        first_year=1999,
        minimum_words=1,
    ),
    FilterSettings(languages=("fre", "ger"), last_year=2000, minimum_words=10),
    FilterSettings(first_year=2000, last_year=2010, minimum_words=250),
]
# Filter name -> settings for it alone: more of PROBE_SETTINGS would change every pin.
MORE_SETTINGS: dict[str, list[FilterSettings]] = {}
PROBE_EXCLUDED = np.array([3, 7, 38, 39, 1_000], np.int64)
PINS = {
    ("excluded", 1): "6a4f08916622884f",
    ("other_language", 1): "d8bd5df046ceb3c8",
    ("other_year", 1): "086b992b43d2c28e",
    ("placeholder_title", 1): "4066320e4ef906b3",
    ("publication_types", 1): "40247e42e1e2de6b",
    ("short", 1): "23cc638543eb8747",
    ("withdrawn", 1): "f0a6c0b9e52d7e51",
    ("without_title_or_abstract", 1): "14c5f2b18207296c",
}


def probes() -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([row._asdict() for row in PROBES], part_schema())


@every_filter
def test_what_a_filter_does_changes_with_its_version_only(filter_: Filter) -> None:
    records = probes().select(list(filter_.columns))
    chosen = PROBE_SETTINGS + MORE_SETTINGS.get(filter_.name, [])
    masks = [filter_.drops(records, settings, PROBE_EXCLUDED) for settings in chosen]
    counted = [(len(getattr(settings, filter_.counted_by)),) if filter_.counted_by else () for settings in chosen]
    assert all(mask.dtype == bool for mask in masks)
    assert [mask.shape for mask in masks] == [(*rows, len(PROBES)) for rows in counted]
    decides = any(mask.any() for mask in masks) and not all(mask.all() for mask in masks)
    assert decides, f"{filter_.name} drops all probes or none; give it other settings in MORE_SETTINGS"
    outputs = [mask.tolist() for mask in masks]
    check_pin(PINS, "filter", "data/corpus/filters.py", filter_.name, filter_.version, outputs)


def test_the_first_filter_that_drops_a_record_counts() -> None:
    for settings in PROBE_SETTINGS:
        masks = [mask for each in FILTERS for mask in np.atleast_2d(each.drops(probes(), settings, PROBE_EXCLUDED))]
        by_hand = [next((code for code, mask in enumerate(masks, 1) if mask[row]), 0) for row in range(len(PROBES))]
        assert first_filter(probes(), settings, PROBE_EXCLUDED).tolist() == by_hand


def test_every_key_belongs_to_a_filter() -> None:
    assert {key for each in FILTERS for key in each.keys} == set(FilterSettings.model_fields)


def test_versions_above_1_are_recorded_of_filters_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    assert filter_versions(FilterSettings()) == {}
    monkeypatch.setattr(filters, "FILTERS", [each._replace(version=2) for each in FILTERS])
    on = {"placeholder_title": 2, "without_title_or_abstract": 2, "withdrawn": 2, "publication_types": 2}
    assert filter_versions(FilterSettings()) == on
    off = FilterSettings(title_and_abstract=False, drop_withdrawn=False, drop_publication_types=(), languages=("eng",))
    assert filter_versions(off) == {"without_title_or_abstract": 2, "other_language": 2}


def test_a_filter_without_keys_is_recorded_from_version_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else in the manifest says that it was there. It may read any column of a part."""
    records = [citation(1), citation(2, "Erratum: Two"), citation(3, "Three")]
    kept_before = build(tmp_path, [records])["counts"]["train"]

    def erratum(records: pa.RecordBatch, *_: Any) -> np.ndarray:
        return np.array([title.startswith("Erratum") for title in records["title"].to_pylist()], bool)

    added = Filter("erratum", version=1, keys=(), columns=("title",), drops=erratum, always_on=True)
    monkeypatch.setattr(filters, "FILTERS", [*FILTERS, added])
    with pytest.raises(UserError, match="made from other inputs or settings"):
        build(tmp_path, [])
    shutil.rmtree(tmp_path / "corpus")
    manifest = build(tmp_path, [])
    assert (kept_before, manifest["counts"]["train"], manifest["counts"]["erratum"]) == (3, 2, 1)
    assert manifest["request"]["corpus"]["filter_versions"] == {"erratum": 1}

"""data/corpus/parts.py: which settings make parts again, and the memory of a worker."""

import gzip
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import create_model

from data.common.files import UserError
from data.corpus import cleaning, filters
from data.corpus.build import make_corpus
from data.corpus.cleaning import RULES, Rule
from data.corpus.schema import PartRow, part_schema
from data.corpus.selection import funnel
from data.corpus.settings import CorpusSection, load_corpus_settings
from tests.bench.corpus import peak
from tests.data.citations import citation, deletion, write_file
from tests.data.corpora import build, content, texts


def test_filters_change_without_parsing_again_and_cleaning_parses_again(tmp_path: Path) -> None:
    build(tmp_path, [[citation(1, "One"), citation(2, "Two &amp;lt; three")]])
    part = tmp_path / "corpus.parts" / "pubmed26n0001.xml" / "manifest.json"
    before = part.stat().st_mtime_ns
    shutil.rmtree(tmp_path / "corpus")
    build(tmp_path, [], 0, 0, "corpus.minimum_words=5")
    assert part.stat().st_mtime_ns == before and texts(tmp_path / "corpus") == {2: "Two < three An abstract."}
    shutil.rmtree(tmp_path / "corpus")
    counts = build(tmp_path, [], 0, 0, "corpus.unescape_entities=false")["counts"]
    assert part.stat().st_mtime_ns > before and counts["unescape_entities"] == 0
    assert texts(tmp_path / "corpus")[2] == "Two &lt; three An abstract."


def test_an_update_file_is_added_without_parsing_the_old_ones(tmp_path: Path) -> None:
    files = [[citation(pmid, f"Title {pmid}.") for pmid in range(start, start + 50)] for start in (1, 40)]
    update = [citation(3, "New"), deletion(5)]
    build(tmp_path / "grown", files, 0.1, 0.1)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "grown" / "corpus.parts").glob("*/manifest.json")}
    shutil.rmtree(tmp_path / "grown" / "corpus")
    write_file(tmp_path / "grown" / "raw" / "pubmed26n0003.xml", update)
    make_corpus([tmp_path / "grown" / "raw"], tmp_path / "grown" / "corpus", 0.1, 0.1, workers=1)
    assert len(before) == 2 and all(path.stat().st_mtime_ns == when for path, when in before.items())
    build(tmp_path / "whole", [*files, update], 0.1, 0.1)
    assert content(tmp_path / "grown" / "corpus") == content(tmp_path / "whole" / "corpus")


@pytest.mark.slow  # makes 300 MB of text
def test_a_workers_memory_is_bounded_by_characters_not_rows(tmp_path: Path) -> None:
    """300 texts of 1 MB, a gzip file of 1 MB: held together they would take 2 GB."""
    text = " ".join(f"word{number}" for number in range(110_000))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt", compresslevel=1) as stream:
        for number in range(300):
            stream.write(json.dumps({"text": f"{number} {text}"}) + "\n")
    code = "import sys; from pathlib import Path; from data.corpus.build import make_corpus\n"
    code += "make_corpus([Path(sys.argv[1])], Path(sys.argv[2]), 0, 0, 1)"
    assert peak(code, str(tmp_path / "a.jsonl.gz"), str(tmp_path / "corpus")) < 1e9


# Versions of rules and filters


def raised(entries: Sequence[Any], name: str) -> list[Any]:
    """The rules or filters, one of them with the next version."""
    return [each._replace(version=each.version + 1) if each.name == name else each for each in entries]


def when_parts_were_written(folder: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("corpus.parts/*/manifest.json")}


def test_parts_are_made_again_when_a_rule_in_use_gets_a_new_version_and_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished corpus of the older version is refused, not taken for done."""
    files, off = [[citation(1, "One")], [citation(2, "Two")]], "corpus.drop_filler_labels=false"
    build(tmp_path, files, 0, 0, off)
    first = when_parts_were_written(tmp_path)
    monkeypatch.setattr(cleaning, "RULES", raised(RULES, "drop_filler_labels"))  # it is off
    build(tmp_path, [], 0, 0, off)
    shutil.rmtree(tmp_path / "corpus")
    build(tmp_path, [], 0, 0, off)
    assert when_parts_were_written(tmp_path) == first and len(first) == 2

    monkeypatch.setattr(cleaning, "RULES", raised(RULES, "unescape_entities"))
    with pytest.raises(UserError, match="made from other inputs or settings"):
        build(tmp_path, [], 0, 0, off)
    shutil.rmtree(tmp_path / "corpus")
    manifest = build(tmp_path, [], 0, 0, off)
    second = when_parts_were_written(tmp_path)
    assert manifest["request"]["corpus"]["unescape_entities"] == 3
    assert all(second[name] > first[name] for name in first)
    shutil.rmtree(tmp_path / "corpus")
    assert build(tmp_path, [], 0, 0, off) == manifest and when_parts_were_written(tmp_path) == second


def test_a_filters_new_version_refuses_a_finished_corpus_and_keeps_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(tmp_path, [[citation(1, "One"), citation(2, "Two")]])
    first = when_parts_were_written(tmp_path)
    monkeypatch.setattr(filters, "FILTERS", raised(filters.FILTERS, "short"))  # not in use
    build(tmp_path, [])
    monkeypatch.setattr(filters, "FILTERS", raised(filters.FILTERS, "publication_types"))
    with pytest.raises(UserError, match="made from other inputs or settings"):
        build(tmp_path, [])
    shutil.rmtree(tmp_path / "corpus")
    manifest = build(tmp_path, [])
    assert manifest["request"]["corpus"]["filter_versions"] == {"publication_types": 2}
    assert when_parts_were_written(tmp_path) == first


def with_more_rules(monkeypatch: pytest.MonkeyPatch, number: int) -> type[CorpusSection]:
    """Put more rules after RULES, each of which appends its mark to a text that asks for it. Returns their settings."""
    more = [Rule(f"mark_{index}", 1, lambda text, n=index: f"{text} m{n}" if f"#{n}." in text else text)
            for index in range(number)]  # fmt: skip
    monkeypatch.setattr(cleaning, "RULES", [*RULES, *more])
    fields: Any = {rule.name: (bool, False) for rule in more}
    return create_model("More", __base__=CorpusSection, **fields)


def test_more_than_eight_rules_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = with_more_rules(monkeypatch, 15)
    records = [citation(1, "A #0. #14."), citation(2, "B #14."), citation(3, "C &amp;lt; D")]
    write_file(tmp_path / "raw" / "pubmed26n0001.xml", records)
    on = settings.model_validate({f"mark_{index}": True for index in range(15)})
    counts = make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0, 0, 1, on)["counts"]
    assert (counts["unescape_entities"], counts["mark_0"], counts["mark_1"], counts["mark_14"]) == (1, 1, 0, 2)
    (part,) = tmp_path.glob("corpus.parts/*/part.parquet")
    assert pq.read_schema(part).field("cleaned").type == pa.uint32()
    assert texts(tmp_path / "corpus")[2] == "B #14. m14 An abstract."


def test_a_new_rule_that_is_off_leaves_finished_work_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old parts have a smaller type for the bits of the rules."""
    manifest = build(tmp_path, [[citation(1), citation(2, "Two &amp;lt; three")]])
    first = when_parts_were_written(tmp_path)
    settings = with_more_rules(monkeypatch, 5)
    assert make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0, 0, 1, settings()) == manifest
    shutil.rmtree(tmp_path / "corpus")
    write_file(tmp_path / "raw" / "pubmed26n0002.xml", [citation(3, "Three &amp;lt; four")])
    counts = make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0, 0, 1, settings())["counts"]
    assert (counts["unescape_entities"], counts["mark_0"]) == (2, 0)
    when = when_parts_were_written(tmp_path)
    assert len(when) == 2 and first.items() <= when.items()


def test_other_records_are_counted_by_name(tmp_path: Path) -> None:
    """In the receipt of each file, the manifest and the report. A corpus without any says nothing of them."""
    for number, books in enumerate((2, 0, 1), start=1):
        path = write_file(tmp_path / "raw" / f"pubmed26n{number:04d}.xml", [citation(number)])
        xml, book = (
            path.read_text(),
            "<PubmedBookArticle><BookDocument><PMID>9</PMID></BookDocument></PubmedBookArticle>",
        )
        path.write_text(xml.replace("</PubmedArticleSet>", book * books + "</PubmedArticleSet>"))
    counts = make_corpus([tmp_path / "raw"], tmp_path / "corpus", 0, 0, 1)["counts"]
    assert counts["not_read"] == {"PubmedBookArticle": 3} and counts["records"] == 3
    assert funnel(counts)[0] == ("not read: PubmedBookArticle", 3)
    assert "not_read" not in build(tmp_path / "none", [[citation(1)]])["counts"]


def test_unicode_scripts_is_a_setting_of_the_part_where_it_is_on(tmp_path: Path) -> None:
    records = [citation(1, "10<sup>-3</sup> M of CO<sub>2</sub>")]
    plain = build(tmp_path / "a", [records])
    written = build(tmp_path / "b", [records], 0, 0, "corpus.unicode_scripts=true")
    assert "unicode_scripts" not in plain["request"]["corpus"] and written["request"]["corpus"]["unicode_scripts"]
    assert texts(tmp_path / "a" / "corpus")[1] == "10-3 M of CO2 An abstract."
    assert texts(tmp_path / "b" / "corpus")[1] == "10⁻³ M of CO₂ An abstract."
    biogpt = load_corpus_settings(None, ["corpus.profile=biogpt"])
    assert not biogpt.unicode_scripts and not CorpusSection().unicode_scripts


def test_the_columns_of_a_part_are_those_of_its_rows() -> None:
    assert part_schema().names == list(PartRow._fields) and part_schema().field("cleaned").type == pa.uint8()

"""Records of a corpus: the rules on written and on real abstracts, and the folder that holds them."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from data.archive import medline
from data.common.files import UserError, read_manifest, verify_files
from data.common.parquet import SPLITS
from data.shards.corpus_records import Citation, Pair, conclusion, find_conclusion, make_records, mask_words
from launch.cli import app
from tests.data.citations import citation
from tests.data.corpora import build, content, rows
from tests.paths import NLM, ROOT, SHARED
from tests.shared import needs_shared

# The conclusion


@pytest.mark.parametrize(
    ("abstract", "before", "found"),
    [
        ("METHODS: We did. RESULTS: It fell. CONCLUSION: It helps.", "METHODS: We did. RESULTS: It fell.", "It helps."),
        ("AIM: To see. CONCLUSIONS: It helps. A lot.", "AIM: To see.", "It helps. A lot."),
        ("AIM: To see. CONCLUSION(S): It helps.", "AIM: To see.", "It helps."),
        ("AIM: To see. CONCLUSION (S): It helps.", "AIM: To see.", "It helps."),
        ("AIM: To see. CONCLUSIONS AND RELEVANCE: It helps.", "AIM: To see.", "It helps."),
        ("AIM: To see. CONCLUSIONS/SIGNIFICANCE: It helps.", "AIM: To see.", "It helps."),
        ("AIM: To see. CONCLUSIONS & CLINICAL RELEVANCE: It helps.", "AIM: To see.", "It helps."),
        ("AIM: To see. DISCUSSION AND CONCLUSION: It helps.", "AIM: To see.", "It helps."),
        ("AIM: To see. AUTHORS' CONCLUSIONS: It helps.", "AIM: To see.", "It helps."),
        ("AIM: To see. REVIEWER’S CONCLUSIONS: It helps.", "AIM: To see.", "It helps."),
        ("AIM: To see. CONCLUSIONS - WHAT TO DO: It helps.", "AIM: To see.", "It helps."),
        ("We looked. Conclusion: It helps.", "We looked.", "It helps."),
        ("We looked (twice) Conclusions and relevance: It helps.", "We looked (twice)", "It helps."),
        ("We looked. Authors' conclusions: It helps.", "We looked.", "It helps."),
        # what comes after it
        ("A. CONCLUSION: It helps. TRIAL REGISTRATION: NCT01.", "A.", "It helps."),
        ("A. CONCLUSION: It helps. Trial registration: NCT01.", "A.", "It helps."),
        ("A. CONCLUSIONS: It helps; FUNDING: None. SIGNIFICANCE: High.", "A.", "It helps;"),
        ("A. CONCLUSIONS: It helps. LEVEL OF EVIDENCE: I. CONCLUSION: It did.", "A.", "It helps."),
        ("A. CONCLUSIONS: IMPLICATIONS: It helps. IMPLICATIONS: Buy it.", "A.", "IMPLICATIONS: It helps."),
        # colons that are no labels
        ("A. CONCLUSIONS: It helps at a ratio of 2:1 (DOI: 5) and in COPD: never.", "A.",
         "It helps at a ratio of 2:1 (DOI: 5) and in COPD: never."),
        ("A. CONCLUSION: One thing that all of us saw: it helps.", "A.", "One thing that all of us saw: it helps."),
        # a sentence without an end before the label
        ("It fell in patients with COPD CONCLUSIONS: It helps.", "It fell in patients with COPD", "It helps."),
        ("It fell CONCLUSION: It helps.", "It fell", "It helps."),
    ],
)  # fmt: skip
def test_a_conclusion_is_found(abstract: str, before: str, found: str) -> None:
    assert conclusion(Citation(1, "A trial.", abstract)) == Pair(f"A trial. {before}", found)
    assert conclusion(Citation(1, "", abstract)) == Pair(before, found)


@pytest.mark.parametrize(
    ("abstract", "said"),
    [
        ("We looked. It helps.", "without conclusion"),
        ("", "without conclusion"),
        ("AIM: To see. RESULTS AND CONCLUSIONS: It fell, so it helps.", "without conclusion"),
        ("AIM: To see. METHODS, RESULTS, CONCLUSION: It fell.", "without conclusion"),
        ("AIM: To see. DISCUSSION: It may help.", "without conclusion"),
        ("We came to three conclusions: It helps.", "without conclusion"),
        ("Our main conclusions are: It helps.", "without conclusion"),
        ("We looked and in Conclusion: It helps.", "without conclusion"),
        ("CONCLUSION. It helps.", "without conclusion"),
        ("THE CONCLUSION OF THE WAR. It was long.", "without conclusion"),
        ("CONCLUSION: It helps. BACKGROUND: It was not known.", "conclusion comes first"),
    ],
)
def test_none_is_found(abstract: str, said: str) -> None:
    assert conclusion(Citation(1, "A trial.", abstract)) == said


def labelled_sections(path: Path) -> list[tuple[str, list[tuple[str, str]]]]:
    """PMID, and label and text of each section, of the abstracts in one of NLM's files that are only plain text."""
    found = []
    for element in ElementTree.fromstring(gzip.decompress(path.read_bytes())).iter("MedlineCitation"):
        sections = element.findall("Article/Abstract/AbstractText")
        if len(sections) > 1 and not any(len(section) for section in sections):
            texts = [(section.get("Label", ""), " ".join((section.text or "").split())) for section in sections]
            found.append((element.findtext("PMID") or "", texts))
    return found


@needs_shared
def test_in_nlms_files_the_section_that_nlm_labels_is_found() -> None:
    """The files have the sections as XML, so what the rule finds in the flattened text can be compared.

    Three sections hold a note with a label of its own, which is left out: "Cite this article: ...". Two abstracts are
    read wrongly, because what follows has a label that is none by the rule: "(CLINICAL TRIAL REGISTRATION NUMBER: ...)"
    and "Clinical trial registration ID: ...".
    """
    outcomes: Counter[str] = Counter()
    for name in ("medline16n0902.xml.gz", "assembled_3693.xml.gz"):
        flat = {
            str(each.pmid): each.abstract
            for each in medline.read_medline(NLM / name)
            if isinstance(each, medline.Citation)
        }
        for pmid, sections in labelled_sections(NLM / name):
            named = [text for label, text in sections if re.search("conclusion", label, re.I) and "RESULT" not in label]
            place = find_conclusion(flat[pmid])
            found = " ".join(flat[pmid][place.begin : place.end].split()) if place else None
            if not any(named) or found is None:
                outcomes["none" if not any(named) and found is None else f"missed or invented: {pmid}"] += 1
            elif found == named[0]:
                outcomes["all"] += 1
            else:
                outcomes["beginning" if named[0].startswith(found) else f"other: {pmid}"] += 1
    print(outcomes)
    assert outcomes["all"] > 1_000 and outcomes["none"] > 90 and outcomes["beginning"] == 3
    assert outcomes.keys() == {"all", "none", "beginning", "other: 26253018", "other: 29514256"}


@needs_shared
def test_counts_on_real_abstracts() -> None:
    """Close to a plain count of the usual labels, wherever they stand."""
    outcomes: Counter[str] = Counter()
    labels = ("CONCLUSION: ", "CONCLUSIONS: ", "Conclusion: ", "Conclusions: ")
    for path in sorted((SHARED / "data" / "abstracts").glob("*.jsonl.gz")):
        for line in gzip.decompress(path.read_bytes()).splitlines():
            abstract = json.loads(line).get("abstract") or ""
            pair = conclusion(Citation(1, "", abstract))
            outcomes[pair if isinstance(pair, str) else "found"] += 1
            outcomes["labels"] += any(label in abstract for label in labels)
    print(outcomes)
    assert outcomes["found"] + outcomes["conclusion comes first"] == 5_095 and outcomes["labels"] == 5_089


# Infilling


def test_masked_text_is_the_text_without_its_masked_words() -> None:
    """The text comes back if words stand in the places of the masks. tests/data/shards/test_noise.py has the spans."""
    text = " ".join(f"w{number}" for number in range(50))
    for pmid in range(200):
        pieces = mask_words(text, pmid)
        assert pieces == mask_words(text, pmid) and "" not in pieces
        assert {type(piece) for piece in pieces} == {str, int} and {each for each in pieces if each == 0} == {0}
        found = re.fullmatch("".join(re.escape(each) if isinstance(each, str) else "(.*?)" for each in pieces), text)
        assert found and sum(len(hidden.split()) for hidden in found.groups()) == 15


def test_the_draw_is_pinned() -> None:
    """Another draw would give other records from the same corpus under the same version."""
    text = "In this study we measured the effect of one drug on twenty patients and found none at all."
    assert mask_words(text, 12345) == [
        "In ",
        0,
        " measured the ",
        0,
        " one drug on twenty patients and found none at all.",
    ]


# The folder


def abstract(number: int) -> str:
    return (
        f"AIM: To see what number {number} does. METHODS: {'We gave it to all. ' * 5}CONCLUSION: It helps all {number}."
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 citations with a conclusion, and some without a title, without a conclusion or too short."""
    folder = tmp_path_factory.mktemp("records")
    whole = [citation(number, f"The study number {number}.", abstract(number)) for number in range(1, 201)]
    others = [
        citation(301, "", abstract(301)),
        citation(302, "A study of nothing.", "It was not possible to do it. " * 5),
        citation(303, "A short study.", "AIM: To see. CONCLUSION: It helps all of them."),
        citation(304, "Short.", abstract(304)),
    ]
    build(folder, [whole, others], 0.1, 0.1)
    return folder / "corpus"


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("task", ["title", "conclusion", "infilling"])
def test_records_are_the_corpus_in_its_order(task: str, corpus: Path, tmp_path: Path) -> None:
    manifest = make_records(corpus, task, tmp_path / "out")
    left_out: Counter[str] = Counter()
    for split, of_split in rows(corpus).items():
        expected = []
        for row in of_split:
            name, head, text = row["title"], *row["abstract"].partition(" CONCLUSION: ")[::2]
            pair = {
                "title": (row["abstract"], name),
                "conclusion": (f"{name} {head}".strip(), text),
                "infilling": (mask_words(row["text"], row["pmid"]), row["text"]),
            }[task]
            long = len((row["text"] if task == "infilling" else pair[0]).split()) >= 20 and len(pair[1].split()) >= 3
            if task == "title" and not name:
                left_out["without title"] += 1
            elif task == "conclusion" and not text:
                left_out["without conclusion"] += 1
            elif not long:
                left_out["too short"] += 1
            else:
                expected.append({"id": str(row["pmid"]), "source": pair[0], "target": pair[1]})
        assert lines(tmp_path / "out" / f"{split}.jsonl") == expected
        assert manifest["counts"][split] == len(expected) > 5
    assert manifest["counts"]["left_out"] == left_out and left_out
    verify_files(tmp_path / "out", read_manifest(tmp_path / "out", "records"))
    assert read_manifest(tmp_path / "out" / "corpus", "corpus") == read_manifest(corpus, "corpus")


@pytest.mark.parametrize("task", ["title", "infilling"])
def test_an_instruction_is_what_every_source_begins_with(task: str, corpus: Path, tmp_path: Path) -> None:
    make_records(corpus, task, tmp_path / "plain")
    said = ["records", str(corpus), task, "--instruction", " What is it? ", "--out", str(tmp_path / "out")]
    for _ in range(2):  # the same folder with the same instruction
        result = CliRunner().invoke(app, said)
        assert result.exit_code == 0, result.output
    for split in SPLITS:
        expected = lines(tmp_path / "plain" / f"{split}.jsonl")
        for record in expected:
            source: Any = record["source"]
            text = isinstance(source, str)
            record["source"] = f"What is it? {source}" if text else ["What is it? ", *source]
        assert lines(tmp_path / "out" / f"{split}.jsonl") == expected
    with pytest.raises(UserError, match="was made from other inputs or settings"):
        make_records(corpus, task, tmp_path / "out")


def test_a_command_that_is_killed_and_run_again_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    make_records(corpus, "infilling", tmp_path / "whole")
    script = (
        "import os, signal, data.shards.corpus_records as records\n"
        "from pathlib import Path\n"
        "mask, calls = records.mask_words, []\n"
        "def killed(*arguments):\n"
        "    calls.append(1)\n"
        "    if len(calls) == 100: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return mask(*arguments)\n"
        "records.mask_words = killed\n"
        f"records.make_records(Path({str(corpus)!r}), 'infilling', Path({str(tmp_path / 'out')!r}))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out.*.partial/.train.jsonl.partial"))
    make_records(corpus, "infilling", tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    make_records(corpus, "infilling", tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_mistakes_are_one_line(corpus: Path, tmp_path: Path) -> None:
    def said(corpus: Path, task: str, out: str = "out") -> str:
        with pytest.raises(UserError) as caught:
            make_records(corpus, task, tmp_path / out)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
        return str(caught.value)

    assert said(tmp_path / "absent", "title") == f"{tmp_path / 'absent'}: no such folder; expected a corpus folder"
    assert said(corpus, "abstract") == "abstract: no such task; choose from title, conclusion, infilling"
    make_records(corpus, "title", tmp_path / "title")
    assert "was made from other inputs or settings" in said(corpus, "conclusion", "title")
    build(tmp_path / "small", [[citation(1, "The study of one.", abstract(1))]])
    assert said(tmp_path / "small" / "corpus", "title") == (
        f"{tmp_path / 'small' / 'corpus'}: its validation split gives no record for title; build the corpus from more"
        " text, or with other fractions for validation and test"
    )
    with (tmp_path / "small" / "corpus" / "train-00000.parquet").open("r+b") as stream:
        stream.write(b"PAR2")
    assert "train-00000.parquet: changed since it was written" in said(tmp_path / "small" / "corpus", "title")


def test_the_command_says_what_it_left_out(corpus: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["records", str(corpus), "title", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    train, validation, test = (len(lines(tmp_path / "out" / f"{split}.jsonl")) for split in SPLITS)
    assert train + validation + test == 201  # of 204, and whether one has a title is up to the corpus's filters
    said = f"{tmp_path / 'out'}: {train} train, {validation} validation, {test} test records; left out: 2 too short"
    assert said in result.output

"""The readers of the benchmarks: known counts of the real files, what invented ones hold, one line for each mistake."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import pytest

from data.common.errors import UserError
from pretrain.tasks import TASKS
from pretrain.tasks.pubmedqa import divide
from tests.pretrain.tasks.invented import REAL, WRITE
from tests.shared import needs_shared


@needs_shared
@pytest.mark.parametrize(
    ("name", "items"),
    [
        ("pubmedqa", (450, 50, 500)),
        ("hoc", (9972, 4947, 4947)),
        ("bc5cdr-relations", (500, 500, 500)),
        ("bc5cdr-entities", (500, 500, 500)),
    ],
)
def test_the_published_files_hold_as_many_items_as_published(name: str, items: tuple[int, ...]) -> None:
    splits = [TASKS[name](REAL[name], split).items for split in ("train", "validation", "test")]
    assert tuple(map(len, splits)) == items
    assert all(len({item.id for item in split}) == len(split) for split in splits)
    if name != "hoc":  # whose validation split is its test split
        assert len({item.pmid for split in splits for item in split}) == sum(items)


@needs_shared
def test_pubmedqa_is_divided_as_published() -> None:
    """Half of the questions are a random draw of PubMedQA's script. It is repeated here, and must give the test set."""
    folder = REAL["pubmedqa"]
    records = json.loads(gzip.decompress((folder / "ori_pqal.json.gz").read_bytes()))
    published = json.loads(gzip.decompress((folder / "test_ground_truth.json.gz").read_bytes()))
    decisions = {pmid: record["final_decision"] for pmid, record in records.items()}
    assert divide(decisions, 2, Random(0))[1] == list(published)
    test = TASKS["pubmedqa"](folder, "test").items
    assert Counter(item.answers[0] for item in test) == {"yes": 276, "no": 169, "maybe": 55}
    for item in test:
        conclusion = records[item.pmid]["LONG_ANSWER"]
        assert conclusion not in item.prompt and conclusion not in item.text  # reasoning is required
        assert records[item.pmid]["QUESTION"].split()[-1] in item.prompt


@needs_shared
def test_every_span_of_bc5cdr_is_its_mention() -> None:
    """As the PubTator file says it, read here a second time and without our reader."""
    text = gzip.decompress((REAL["bc5cdr-entities"] / "CDR_TestSet.PubTator.txt.gz").read_bytes()).decode()
    mentions = Counter(
        (line.split("\t")[0], line.split("\t")[3], line.split("\t")[4])
        for line in text.split("\n")
        if line.count("\t") > 3
    )
    items = TASKS["bc5cdr-entities"](REAL["bc5cdr-entities"], "test").items
    assert mentions == Counter(
        (item.pmid, item.text[start:end], label) for item in items for start, end, label in item.answers
    )


def test_invented_files_are_read(tmp_path: Path) -> None:
    for write in WRITE.values():
        write(tmp_path)
    question = TASKS["pubmedqa"](tmp_path, "test").items[0]
    assert (question.id, question.pmid, question.answers, question.target) == ("100", "100", ("yes",), "yes.")
    assert question.prompt == (
        "context: We gave Dravonin100 to rats. They were watched. question: Does Dravonin100 cause itch?"
        " the answer to the question given the context is"
    )
    both = TASKS["hoc"](tmp_path, "train").items[2]
    assert both.answers == ("inducing angiogenesis", "resisting cell death") and both.pmid == ""
    assert both.prompt == "Both. the type of this document is"
    assert both.target == "inducing angiogenesis|resisting cell death."
    relations = TASKS["bc5cdr-relations"](tmp_path, "test").items
    assert relations[0].answers == (("D1", "D2"), ("D1", "D3"))
    assert relations[0].prompt == "dravonin causes itch. rats had an itch."
    assert relations[0].target == (
        "the relation between dravonin hydrate and itch exists; the relation between dravonin hydrate and rash exists."
    )
    first, second = TASKS["bc5cdr-entities"](tmp_path, "test").items
    assert first.text == "Dravonin causes itch. Rats had an itch." and second.answers == ()
    assert first.answers == ((0, 8, "Chemical"), (16, 20, "Disease"), (34, 38, "Disease"))


@pytest.mark.parametrize("name", TASKS)
def test_splits_of_invented_files_do_not_overlap(name: str, tmp_path: Path) -> None:
    WRITE[name](tmp_path)
    splits = [{item.id for item in TASKS[name](tmp_path, split).items} for split in ("train", "validation", "test")]
    assert all(splits)
    if name == "pubmedqa":
        assert sum(map(len, splits)) == 60 == len(set().union(*splits))


@pytest.mark.parametrize("name", TASKS)
def test_a_missing_or_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: holds neither"):
        TASKS[name](tmp_path, "test")
    with pytest.raises(UserError, match="holds neither"):
        TASKS[name](tmp_path / "absent", "test")
    WRITE[name](tmp_path)
    for path in tmp_path.iterdir():
        path.unlink()
        path.with_name(f"{path.name.removesuffix('.gz')}.gz").write_bytes(b"\x1f\x8bcut")
    with pytest.raises(UserError, match=r"\.gz: cannot be read"):
        TASKS[name](tmp_path, "test")


RELATIONS = {"title": "", "abstract": "", "chemical2id": {}, "disease2id": {}}


@pytest.mark.parametrize(
    ("name", "file", "content", "culprit"),
    [
        ("pubmedqa", "ori_pqal.json", "{", "ori_pqal.json: not JSON"),
        ("pubmedqa", "ori_pqal.json", "[]", "ori_pqal.json: expected a JSON object"),
        ("pubmedqa", "ori_pqal.json", '{"7": {"QUESTION": 1}}', "ori_pqal.json: 7: expected an object with QUESTION"),
        ("pubmedqa", "test_ground_truth.json", '{"7": "yes"}', "7: 'yes', but ori_pqal.json says None"),
        ("hoc", "test.tsv", "A sentence.\n", "test.tsv: line 1: expected a sentence, a tab"),
        ("hoc", "test.tsv", "\nA sentence.\tmusic\n", "test.tsv: line 2: unknown label 'music'"),
        ("bc5cdr-relations", "test.json", '{"7": {}}', "test.json: 7: expected an object with title"),
        (
            "bc5cdr-relations",
            "test.json",
            json.dumps({"7": RELATIONS | {"relations": [{"chemical": "D1", "disease": "D2"}]}}),
            "test.json: 7: expected relations",
        ),
        ("bc5cdr-entities", "CDR_TestSet.PubTator.txt", "7|t|Title\n", "expected PMID|t|TITLE"),
        (
            "bc5cdr-entities",
            "CDR_TestSet.PubTator.txt",
            "7|t|Title\n7|a|Text.\n7\t1\t3\tTi\tDisease\tD1\n",
            "is not PMID, start, end",
        ),
    ],
)
def test_a_malformed_file_is_named_with_the_place(
    name: str, file: str, content: str, culprit: str, tmp_path: Path
) -> None:
    WRITE[name](tmp_path)
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError) as error:
        TASKS[name](tmp_path, "test")
    assert culprit in str(error.value) and str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_readers_import_no_torch() -> None:
    code = "import sys, pretrain.tasks; assert not {'torch', 'transformers', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

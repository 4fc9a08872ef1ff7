"""A benchmark's items as folders of records."""

import json
from pathlib import Path

import pytest

from data.common.files import UserError
from pretrain.tasks import TASKS
from pretrain.tasks.records import SPLITS, write_records
from tests.pretrain.tasks.invented import WRITE, write_pubmedqa


@pytest.mark.parametrize("given", ["prompt", "source"])
def test_relations_become_prompts_or_sources_and_targets(given: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    WRITE["bc5cdr-relations"](tmp_path / "data")
    counts = write_records("bc5cdr-relations", f"{given}_target", tmp_path / "data", tmp_path / "records")["counts"]
    assert counts == {"train": 2, "validation": 2, "test": 2}
    lines = [json.loads(line) for line in (tmp_path / "records" / "validation.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "id": "12",
        given: "kalitinib. it helps.",
        "target": "the relation between kalitinib and itching exists.",
    }


def test_records_are_written_once_and_never_of_other_files(tmp_path: Path) -> None:
    data, out = tmp_path / "data", tmp_path / "records"
    data.mkdir()
    write_pubmedqa(data, 60)
    write_records("pubmedqa", "prompt_target", data, out)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    write_records("pubmedqa", "prompt_target", data, out)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert {path.name for path in before} == {"manifest.json", *(f"{split}.jsonl" for split in SPLITS)}
    write_pubmedqa(data, 61)
    with pytest.raises(UserError, match="was made from other inputs"):
        write_records("pubmedqa", "prompt_target", data, out)


def test_spans_and_labels_become_records_to_classify(tmp_path: Path) -> None:
    for task, kind in (("bc5cdr-entities", "token_classification"), ("hoc", "sequence_classification")):
        data, out = tmp_path / task, tmp_path / f"{task}-records"
        data.mkdir()
        WRITE[task](data)
        write_records(task, kind, data, out)
        items = TASKS[task](data, "train").items
        lines = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
        assert [line["text"] for line in lines] == [item.text for item in items]
        if task == "hoc":
            assert [tuple(line["labels"]) for line in lines] == [item.answers for item in items]
            continue
        found = [tuple((span["start"], span["end"], span["label"]) for span in line["spans"]) for line in lines]
        assert found == [item.answers for item in items] and any(found)
    with pytest.raises(UserError, match=r'objective\.kind = "token_classification": learns nothing from'):
        write_records("hoc", "token_classification", tmp_path / "hoc", tmp_path / "none")


def test_a_task_that_is_unknown_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="sorting: no such benchmark; choose from pubmedqa, hoc, bc5cdr-relations"):
        write_records("sorting", "prompt_target", tmp_path, tmp_path / "records")

"""pretrain/tasks/find.py: benchmarks in a folder and below it."""

import shutil
from pathlib import Path

import pytest

from data.common.errors import UserError
from pretrain.tasks import TASKS
from pretrain.tasks.find import find_benchmarks
from tests.pretrain.tasks.invented import WRITE, write_hoc, write_pubmedqa


def test_benchmarks_are_found_in_subfolders_of_any_name_and_in_the_folder_itself(tmp_path: Path) -> None:
    for number, (name, write) in enumerate(WRITE.items()):
        folder = tmp_path / ("." if name == "hoc" else f"{number}/of any name")
        folder.mkdir(parents=True, exist_ok=True)
        write(folder)
    found = find_benchmarks(tmp_path)
    assert found.keys() == {(name, split) for name in TASKS for split in ("train", "validation", "test")}
    assert found["hoc", "test"] == TASKS["hoc"](tmp_path, "test").items
    assert len(found["pubmedqa", "test"]) == 30 and [item.pmid for item in found["bc5cdr-entities", "test"]] == [
        "11",
        "12",
    ]


def test_some_splits_are_enough(tmp_path: Path) -> None:
    write_hoc(tmp_path)
    (tmp_path / "train.tsv").unlink()
    assert find_benchmarks(tmp_path).keys() == {("hoc", "validation"), ("hoc", "test")}


def test_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        find_benchmarks(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds the files of none of pubmedqa, hoc"):
        find_benchmarks(tmp_path)
    (tmp_path / "first").mkdir()
    write_pubmedqa(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    with pytest.raises(UserError, match=r"second: a second copy of pubmedqa; the first is in .*first; keep one"):
        find_benchmarks(tmp_path)
    (tmp_path / "first" / "ori_pqal.json").write_text("[]")
    with pytest.raises(UserError, match=r"first/ori_pqal.json: expected"):
        find_benchmarks(tmp_path)

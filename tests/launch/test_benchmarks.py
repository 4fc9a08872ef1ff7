"""`biogpt corpus --benchmarks`, from the files of a benchmark to what the model card says."""

import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from data.common.files import read_manifest, write_json
from data.shards.build import make_shards
from data.text.train import train_tokenizer
from launch.cli import app, main
from pretrain.export.card import benchmarks_section
from pretrain.objectives.kinds import make_objective
from pretrain.recipe import load_recipe
from pretrain.training_data import FILE, benchmark_in_words, stage
from tests.data.citations import citation, write_file
from tests.data.corpora import texts
from tests.pretrain.runs import settings
from tests.pretrain.tasks.invented import write_hoc, write_pubmedqa


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """The arguments for citations 90 to 139 and two benchmarks; PubMedQA's PMIDs are 100 to 159, 30 of them tests."""
    write_file(tmp_path / "raw" / "a.xml", [citation(pmid, f"Title {pmid}.") for pmid in range(90, 140)])
    for name, write in (("first", write_pubmedqa), ("second", write_hoc)):
        (tmp_path / "benchmarks" / name).mkdir(parents=True)
        write(tmp_path / "benchmarks" / name)
    fractions = ["--validation-fraction", "0", "--test-fraction", "0"]
    return [str(tmp_path / "raw"), "--benchmarks", str(tmp_path / "benchmarks"), *fractions]


def test_items_are_left_out_or_only_reported_and_the_card_says_so(inputs: list[str], tmp_path: Path) -> None:
    train = len(range(100, 140)) // 2
    for name, more, in_training in (("corpus", [], 0), ("kept", ["--keep-benchmarks"], train)):
        corpus, shards = tmp_path / name, tmp_path / f"{name}-shards"
        result = CliRunner().invoke(app, ["corpus", *inputs, *more, "--out", str(corpus)])
        assert result.exit_code == 0, result.output
        said = f"pubmedqa test: of 30 items 20 are in the input, {in_training} in the training split; 0 are too short"
        assert said in result.output and "hoc train: of 3 items 0 are in the input" in result.output
        assert texts(corpus).keys() == set(range(90, 140 if more else 100))
        train_tokenizer(corpus, tmp_path / f"{name}-tokenizer", merges=10, min_count=1, workers=1)
        make_shards(corpus, tmp_path / f"{name}-tokenizer", shards, workers=1)
        assert (
            read_manifest(shards, "shards")["counts"]["benchmarks"]
            == read_manifest(corpus, "corpus")["counts"]["benchmarks"]
        )
        own = stage(make_objective(load_recipe("tiny", settings(shards, tmp_path / "run"))))
        write_json(tmp_path / FILE, [own, {"benchmarks": {}}])
        items = f"{in_training} items were in its training text; 30 of 30 items were looked for"
        assert benchmark_in_words(tmp_path, "pubmedqa", "test") == f"{tmp_path}: {items}"
        assert f"| pubmedqa test | 30 | 20 | {in_training} |" in benchmarks_section([own]).splitlines()
    assert "does not say whether" in benchmark_in_words(tmp_path, "bc5cdr-entities", "test")


def test_mistakes_are_one_line(
    inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = inputs[0], str(tmp_path / "corpus")
    for more, said in (
        (["--keep-benchmarks"], "--keep-benchmarks: name the folder of the benchmarks with --benchmarks"),
        (["--benchmarks", str(tmp_path / "nowhere")], "nowhere: no such folder of benchmarks"),
        (["--benchmarks", raw], "raw: holds the files of none of pubmedqa, hoc, bc5cdr"),
    ):
        monkeypatch.setattr(sys, "argv", ["biogpt", "corpus", raw, *more, "--out", out])
        with pytest.raises(SystemExit) as ended:
            main()
        (line,) = capsys.readouterr().err.splitlines()
        assert ended.value.code == 2 and re.search(said, line)
    assert not Path(out).exists() and not Path(f"{out}.parts").exists()

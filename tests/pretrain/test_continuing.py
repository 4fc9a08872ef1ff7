"""A finished run goes on with next year's PubMed, as docs/continuing.md says."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.archive.sample import write_sample
from data.corpus.build import make_corpus
from data.shards.build import make_shards
from pretrain.checkpoint import newest_checkpoint, read_state
from pretrain.inference import different_tokenizer_file, evaluate_folder
from pretrain.recipe import load_recipe
from pretrain.schedule import learning_rate
from tests.pretrain.runs import metrics, refused_case, run_case, settings
from tests.ranks import Ranks


def pmids(corpus: Path, *splits: str) -> set[int]:
    """The PMIDs of splits of a corpus."""
    files = [file for split in splits for file in sorted(corpus.glob(f"{split}-*.parquet"))]
    return {pmid for file in files for pmid in pq.read_table(file)["pmid"].to_pylist()}


@pytest.fixture(scope="module")
def next_year(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """corpus/ and shards/ of a baseline that has grown by half, with the finished run's own tokenizer."""
    folder = tmp_path_factory.mktemp("next_year")
    write_sample(folder / "raw", citations=600)
    make_corpus([folder / "raw"], folder / "corpus", 0.05, 0.05, workers=1)
    make_shards(folder / "corpus", run / "tokenizer", folder / "shards", workers=1)
    return folder


def test_held_out_citations_stay_held_out(sample_folder: Path, next_year: Path) -> None:
    old, new = sample_folder / "corpus", next_year / "corpus"
    held_out = pmids(old, "validation") | pmids(old, "test")
    assert len(held_out) > 20 and not held_out & pmids(new, "train")
    for split in ("train", "validation", "test"):  # and none moves to another split
        assert pmids(old, split) & pmids(new, "train", "validation", "test") <= pmids(new, split)
    assert len(pmids(new, "train") - pmids(old, "train")) > 150


def test_a_new_run_starts_from_the_export_with_a_fresh_schedule(
    one_rank: Ranks, hf: Path, run: Path, next_year: Path, tmp_path: Path
) -> None:
    shards = next_year / "shards"
    assert different_tokenizer_file(shards / "tokenizer", run / "tokenizer") == ""
    chosen = [*settings(shards, tmp_path / "run", f"model.weights={hf}"), "train.steps=4", "schedule.kind=linear"]
    one_rank.run(run_case, chosen)
    before = evaluate_folder(hf, shards, "validation")["loss"]
    losses, rates = (metrics(tmp_path / "run", name) for name in ("validation/loss", "train/learning_rate"))
    assert losses[0] == pytest.approx(before, abs=1e-5) and losses[4] < losses[0]
    recipe = load_recipe("tiny", chosen)
    assert rates == {step: pytest.approx(learning_rate(recipe, step - 1)) for step in range(1, 5)}


def test_the_same_run_goes_on_with_the_new_shards(one_rank: Ranks, run: Path, next_year: Path, tmp_path: Path) -> None:
    """The optimizer's state comes along; without the key, other shards are refused."""
    copy = shutil.copytree(run, tmp_path / "run")
    chosen = settings(next_year / "shards", copy, "train.steps=8", "train.precision=fp32")
    said = one_rank.run(refused_case, chosen)[0]
    assert "has data shards = " in said and "data.allow_other=true resumes all the same" in said
    assert one_rank.run(run_case, [*chosen, "data.allow_other=true"]) == [8]
    assert list(metrics(copy, "train/loss")) == list(range(1, 9))
    old, new = (read_state(newest_checkpoint(each)[0] or each)["data"] for each in (run, copy))
    assert old["shards"] != new["shards"]

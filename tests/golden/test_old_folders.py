"""Folders made by earlier versions of the program open ever after, and work goes on in them."""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest

from data.common.files import VERSIONS, UserError, read_manifest, verify_files
from data.corpus import cleaning, filters
from data.corpus.build import make_corpus
from data.corpus.cleaning import RECORDED_WHEN_OFF, RULES
from data.corpus.filters import FILTERS, Filter
from data.corpus.selection import funnel
from data.corpus.settings import CorpusSection
from data.shards.build import make_shards
from data.text.train import train_tokenizer
from pretrain.bits_per_byte import evaluate_corpora
from pretrain.export.folder import export
from pretrain.inference import evaluate_folder
from tests.data.corpora import rows
from tests.golden import observe
from tests.golden.make import FOLDERS, OLD_STEPS, old_run_settings
from tests.pretrain.runs import metrics, run_case
from tests.ranks import Ranks

OLD_FILTERS = ("without_title_or_abstract", "excluded", "other_language", "other_year", "short")
RETRACTED_THEN = Filter(  # its column was a bool
    "retracted",
    1,
    ("drop_publication_types",),
    ("retracted",),
    lambda records, *_: records["retracted"].to_numpy(False),
)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(FOLDERS) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def losses(old: Path) -> dict[str, list[float]]:
    recorded: dict[str, dict[str, float]] = json.loads((old / "losses.json").read_text())
    return {name: list(values.values()) for name, values in recorded.items()}


def made_again(old: Path) -> dict[str, dict[str, Any]]:
    """Every data folder, asked for once more as it was made; the corpus by rules, filters and format of its time."""
    with pytest.MonkeyPatch.context() as patch:
        then = [rule._replace(version=1) for rule in RULES]
        patch.setattr(cleaning, "RULES", then)
        patch.setitem(VERSIONS, "corpus part", 2)
        patch.setattr(filters, "FILTERS", [each for each in FILTERS if each.name in OLD_FILTERS] + [RETRACTED_THEN])
        later = dict.fromkeys((rule.name for rule in RULES if rule.name not in RECORDED_WHEN_OFF), False)
        later |= {"drop_withdrawn": False, "drop_publication_types": ["Retracted Publication"]}
        off = CorpusSection.model_validate(later)
        corpus = make_corpus([old / "raw"], old / "corpus", 0.1, 0.1, workers=1, settings=off)
    return {
        "corpus": corpus,
        "tokenizer": train_tokenizer(old / "corpus", old / "tokenizer", merges=100, min_count=1, workers=1),
        "shards": make_shards(old / "corpus", old / "tokenizer", old / "shards", workers=1),
    }


def test_old_data_folders_are_finished_work(old: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in old.glob("*/*") if path.is_file()}
    for name, manifest in made_again(old).items():
        assert manifest == read_manifest(old / name, name)
        verify_files(old / name, manifest)
    assert before == {path: path.stat().st_mtime_ns for path in old.glob("*/*") if path.is_file()}


def test_parts_of_an_old_corpus_are_parsed_again_only_for_what_was_raised_since(old: Path) -> None:
    """Three cleaning rules have version 2, and parts have format 4. By the versions of then nothing is parsed again."""
    receipts = {path: path.stat().st_mtime_ns for path in old.glob("corpus.parts/*/manifest.json")}
    before = observe.describe(old / "corpus.parts")
    assert receipts
    shutil.copytree(old / "corpus", old / "kept")
    shutil.rmtree(old / "corpus")
    made_again(old)
    assert {path: path.stat().st_mtime_ns for path in receipts} == receipts
    assert observe.describe(old / "corpus.parts") == before
    assert rows(old / "corpus") == rows(old / "kept")


def test_an_old_corpus_is_not_taken_for_one_by_the_rules_of_today(old: Path) -> None:
    """It is refused as it is. Made anew, its files are parsed again, and the sample's texts are the same."""
    raised = {rule.name: rule.version for rule in RULES if rule.version > 1}
    assert raised == {"unescape_entities": 2, "drop_control_characters": 2, "drop_copyright_tails": 2}
    receipts = {path: path.stat().st_mtime_ns for path in old.glob("corpus.parts/*/manifest.json")}
    with pytest.raises(UserError, match="was made from other inputs or settings"):
        make_corpus([old / "raw"], old / "corpus", 0.1, 0.1, workers=1)
    shutil.move(old / "corpus", old / "kept")
    manifest = make_corpus([old / "raw"], old / "corpus", 0.1, 0.1, workers=1)
    assert all(path.stat().st_mtime_ns > when for path, when in receipts.items())
    assert raised.items() <= manifest["request"]["corpus"].items()
    counts = read_manifest(old / "kept", "corpus")["counts"]
    assert set(funnel(counts)) <= set(funnel(manifest["counts"]))  # a rule or filter that came since may add a count
    assert rows(old / "corpus") == rows(old / "kept")


def test_an_old_run_goes_on_from_its_checkpoint(old: Path, losses: dict[str, list[float]], one_rank: Ranks) -> None:
    run = old / "run"
    shutil.rmtree(run / "checkpoints" / f"step-{OLD_STEPS:07d}")
    (run / "latest").write_text(f"step-{OLD_STEPS - 2:07d}")
    assert one_rank.run(run_case, old_run_settings(old / "shards", run)) == [OLD_STEPS]
    for name, expected in losses.items():
        assert list(metrics(run, name).values()) == pytest.approx(expected, abs=1e-5)


def test_an_old_run_is_exported_and_an_old_export_loads(old: Path, losses: dict[str, list[float]]) -> None:
    counts = export(old / "run", old / "again", old / "shards")["counts"]
    assert counts["recorded_loss"] == losses["validation/loss"][-1]
    for folder in (old / "hf", old / "again", old / "run"):
        result = evaluate_folder(folder, old / "shards", "test")
        assert result["loss"] == pytest.approx(evaluate_folder(old / "hf", old / "shards", "test")["loss"])
    scores = evaluate_corpora([old / "run", old / "hf", old / "again"], [old / "corpus"], "test").values()
    (losses_alone,) = zip(*([score.loss for score in sources.values()] for sources in scores), strict=True)
    assert losses_alone == pytest.approx([losses_alone[0]] * 3, abs=1e-5)
    weights = [observe.describe(folder)["model.safetensors"] for folder in (old / "hf", old / "again")]
    assert weights[0] == weights[1]

"""Runs on several folders of records: batches, a resume, held-out losses, refusals."""

import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from data.common.files import UserError, read_manifest, sha256, write_manifest
from data.shards.mixture import MixedOrder
from model.loss import IGNORE_INDEX
from pretrain.checkpoint import check_state, newest_checkpoint, read_state
from pretrain.inference import evaluate_folder
from pretrain.objectives.kinds import make_objective
from pretrain.recipe import load_recipe, write_recipe
from tests.pretrain.runs import back_to_step_4, metrics
from tests.pretrain.tuning import prompts_and_targets, tuning, tuning_case, write_records
from tests.ranks import Ranks

WEIGHTS = {"first": 0.7, "second": 0.2, "third": 0.1}
SIZES = {"first": (40, 11), "second": (9, 5), "third": (4, 3)}
"""Training and validation records of each folder."""


def write_folders(parent: Path) -> dict[str, Path]:
    """A folder of records for each name."""
    for number, (name, sizes) in enumerate(SIZES.items()):
        (parent / name).mkdir()
        for seed, (split, count) in enumerate(zip(("train", "validation"), sizes, strict=True)):
            write_records(parent / name / f"{split}.jsonl", prompts_and_targets(10 * number + seed, count))
    return {name: parent / name for name in SIZES}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_folders(tmp_path_factory.mktemp("records"))


def mixture(folders: dict[str, Path], hf: Path, run: Path, *more: str) -> tuple[str, list[str]]:
    """The recipe and the settings of a run on a table of folders: 8 steps of 8 records, a checkpoint at the fourth."""
    recipe, chosen = tuning(Path("none"), hf, run)
    chosen = [setting for setting in chosen if not setting.startswith("data.records")]
    chosen += [f"data.records.{name}={folder}" for name, folder in folders.items()]
    chosen += [f"data.weights.{name}={WEIGHTS[name]}" for name in folders]
    return recipe, [*chosen, *more]


def objective_of(folders: dict[str, Path], hf: Path, folder: Path, *more: str) -> Any:
    return make_objective(load_recipe(*mixture(folders, hf, folder / "run", *more)))


@pytest.fixture(scope="module")
def mixed(one_rank: Ranks, folders: dict[str, Path], hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "run"
    one_rank.run(tuning_case, *mixture(folders, hf, folder))
    return folder


def test_a_resume_in_the_middle_is_exact_and_elastic(
    one_rank: Ranks, two_ranks: Ranks, folders: dict[str, Path], hf: Path, mixed: Path, tmp_path: Path
) -> None:
    """On one rank the same bits; on two the same losses to rounding. The order of the table does not matter."""
    expected, backwards = metrics(mixed, "train/loss"), dict(reversed(folders.items()))
    assert list(expected) == list(range(1, 9)) and expected[8] < expected[1] - 1
    one = back_to_step_4(mixed, tmp_path / "one")
    one_rank.run(tuning_case, *mixture(backwards, hf, one))
    assert metrics(one, "train/loss") == expected
    assert metrics(one, "validation/third/loss") == metrics(mixed, "validation/third/loss")
    two = back_to_step_4(mixed, tmp_path / "two")
    two_ranks.run(tuning_case, *mixture(backwards, hf, two))
    assert list(metrics(two, "train/loss").values()) == pytest.approx(list(expected.values()), abs=2e-5)


def test_the_held_out_loss_is_that_of_each_folder_and_their_mean_by_weight(
    folders: dict[str, Path], hf: Path, mixed: Path, tmp_path: Path
) -> None:
    """Against evaluations of copies of the run that know one folder alone."""
    alone = {}
    for name, folder in folders.items():
        copy = tmp_path / name
        shutil.copytree(mixed, copy)
        single = load_recipe(str(mixed / "recipe.toml")).with_shards(folder)
        write_recipe(single, copy / "recipe.toml")
        alone[name] = evaluate_folder(copy, None, "validation")
        assert metrics(mixed, f"validation/{name}/loss")[8] == pytest.approx(alone[name]["loss"], rel=1e-5)
        assert metrics(mixed, f"validation/{name}/tokens")[8] == alone[name]["tokens"]
    expected = sum(WEIGHTS[name] * found["loss"] for name, found in alone.items())
    assert len({round(found["loss"], 3) for found in alone.values()}) == 3
    assert metrics(mixed, "validation/loss")[8] == pytest.approx(expected, rel=1e-5)
    assert evaluate_folder(mixed, None, "validation")["loss"] == pytest.approx(expected, rel=1e-5)


def test_targets_and_tokens_are_counted_exactly(folders: dict[str, Path], hf: Path, tmp_path: Path) -> None:
    objective = objective_of(folders, hf, tmp_path)
    for numbers in (range(3), range(36, 44), range(75, 230)):
        ids, labels = objective.batch(numbers)
        assert objective.counted_targets(numbers) == (labels != IGNORE_INDEX).sum()
        assert objective.tokens(numbers) == (ids != 1).sum()
    assert objective.epochs(100) == {"first": 70 / 40, "second": 20 / 9, "third": 10 / 4}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_micro_batches_hold_the_records_of_the_mixture_on_any_ranks(
    ranks: int, folders: dict[str, Path], hf: Path, tmp_path: Path
) -> None:
    """25 steps of 8 records in micro-batches of 2, without their padding; tests/data has the order itself."""
    objective = objective_of(folders, hf, tmp_path)
    records = [record for name in folders for record in objective.records("train", name)]
    weights = [Fraction(str(weight)) for weight in WEIGHTS.values()]
    places = MixedOrder([train for train, _ in SIZES.values()], weights, objective._recipe.train.seed).places(
        range(200)
    )
    for rank in range(ranks):
        for first in range(2 * rank, 200, 2 * ranks):
            ids, labels = objective.batch(range(first, first + 2))
            for row, place in enumerate(places[first : first + 2]):
                length = len(records[place].ids)
                assert ids[row, :length].tolist() == records[place].ids.tolist() and (ids[row, length:] == 1).all()
                assert labels[row, :length].tolist() == records[place].labels.tolist()


def test_a_table_of_one_is_the_same_run_as_the_folder(folders: dict[str, Path], hf: Path, tmp_path: Path) -> None:
    """The record in the checkpoints is pinned: a single folder's is as it has always been."""
    plain = make_objective(load_recipe(*tuning(folders["first"], hf, tmp_path / "run")))
    table = objective_of({"first": folders["first"]}, hf, tmp_path)
    hashes = {split: sha256(folders["first"] / f"{split}.jsonl") for split in ("train", "validation")}
    assert list(plain.identity()) == ["records", "tokenizer", "context_length", "global_batch_examples", "seed"]
    assert plain.identity()["records"] == hashes and list(plain.held_out()) == ["records"]
    assert table.identity() == plain.identity()
    one, other = (objective.batch(range(100)) for objective in (plain, table))
    assert one[0].equal(other[0]) and one[1].equal(other[1])


def test_the_identity_and_the_card_name_each_folder(folders: dict[str, Path], hf: Path, tmp_path: Path) -> None:
    objective = objective_of(folders, hf, tmp_path)
    found = objective.identity()
    assert found["weights"] == {"first": "7/10", "second": "1/5", "third": "1/10"}
    assert found["records"]["third"]["train"] == sha256(folders["third"] / "train.jsonl")
    assert {name: source.weight for name, source in objective.held_out().items()} == WEIGHTS
    tokens = sum(len(record.ids) for record in objective.records("train", "second"))
    figures = objective.describe()[1]
    assert figures["training records, tokens of second, 20.0% of the mixture"] == f"9, {tokens}"
    cut = objective_of(folders, hf, tmp_path, "train.context_length=40")
    cut.check()
    assert any(" first train records are longer than train.context_length = 40" in line for line in cut.warnings())


def test_damage_in_any_folder_is_found_and_its_corpus_is_known(
    folders: dict[str, Path], sample_folder: Path, hf: Path, tmp_path: Path
) -> None:
    """Of a folder with a manifest and a copy of its corpus's, as `biogpt records` makes them."""
    third = tmp_path / "third"
    shutil.copytree(folders["third"], third)
    (third / "corpus").mkdir()
    shutil.copy(sample_folder / "corpus" / "manifest.json", third / "corpus")
    write_manifest(third, "records", {}, {})
    objective = objective_of({**folders, "third": third}, hf, tmp_path)
    objective.verify()
    assert objective.corpora() == {"third": read_manifest(sample_folder / "corpus", "corpus")}
    with (third / "train.jsonl").open("a") as stream:
        stream.write("{}")
    with pytest.raises(UserError, match=r"third/train\.jsonl: changed since it was written"):
        objective.verify()


def test_other_folders_or_weights_are_refused_in_one_line(
    folders: dict[str, Path], hf: Path, mixed: Path, tmp_path: Path
) -> None:
    checkpoint, _ = newest_checkpoint(mixed)
    assert checkpoint

    def resume(folders: dict[str, Path], *more: str) -> None:
        recipe = load_recipe(*mixture(folders, hf, tmp_path / "run", *more))
        check_state(checkpoint, read_state(checkpoint), recipe, make_objective(recipe))

    two = {name: folders[name] for name in ("first", "second")}
    resume(folders)
    for chosen, *more in ((folders, "data.weights.first=0.6"), (two,), (two | {"third": folders["first"]},)):
        with pytest.raises(UserError) as caught:
            resume(chosen, *more)
        said = str(caught.value)
        assert "has data " in said and "data.allow_other=true resumes all the same" in said and "\n" not in said
    resume(two, "data.allow_other=true")


TABLE = ["data.records.a=x", "data.records.b=y"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (TABLE, "data.weights.a: is missing; every folder of data.records needs its share"),
        ([*TABLE, "data.weights.a=1"], "data.weights.b: is missing"),
        ([*TABLE, "data.weights.a=1", "data.weights.c=1"], "data.weights.c: data.records has no folder of that name"),
        ([*TABLE, "data.weights.a=0.1234567", "data.weights.b=1"], "data.weights: give the shares with fewer digits"),
        (["data.records=x", "data.weights.a=1"], "data.weights.a: data.records has no folder of that name"),
        (["data.records={}"], "data.records = {}: must be a folder, or a table of folders"),
        (["data.records.a=5"], "data.records = {'a': 5}: must be a folder"),
        (["data.records="], "data.records = '': must be a folder"),
    ],
)
def test_a_mistake_in_the_table_is_named_in_one_line(
    overrides: list[str], message: str, hf: Path, tmp_path: Path
) -> None:
    recipe, chosen = tuning(Path("none"), hf, tmp_path / "run")
    rest = [setting for setting in chosen if not setting.startswith("data.records")]
    with pytest.raises(UserError) as caught:
        load_recipe(recipe, [*rest, *overrides])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_classifiers_refuse_several_folders(folders: dict[str, Path], hf: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        objective_of(folders, hf, tmp_path, 'objective.kind="token_classification"')
    assert str(caught.value) == (
        'data.records: objective.kind = "token_classification" learns from one folder; name one, not a table'
    )


def test_a_missing_folder_is_named(folders: dict[str, Path], hf: Path, tmp_path: Path) -> None:
    objective = objective_of({**folders, "third": tmp_path / "absent"}, hf, tmp_path)
    with pytest.raises(UserError, match=r"absent/train\.jsonl: cannot be read"):
        objective.check()

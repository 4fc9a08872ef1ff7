"""Runs on several folders of shards: batches, resumes, held-out losses, refusals, exports."""

import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest

from data.archive.sample import write_sample
from data.common.files import UserError, read_manifest
from data.corpus.build import make_corpus
from data.shards.build import make_shards
from data.text.train import train_tokenizer
from pretrain.checkpoint import newest_checkpoint, read_state
from pretrain.export.folder import export
from pretrain.inference import evaluate_folder
from pretrain.objectives.kinds import make_objective
from pretrain.objectives.next_token import VERIFIED
from pretrain.recipe import load_recipe, write_recipe
from tests.pretrain.runs import back_to_step_4, metrics, refused_case, run_case, settings
from tests.ranks import Ranks

WEIGHTS = {"first": 0.7, "second": 0.2, "third": 0.1}


@pytest.fixture(scope="module")
def folders(sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three folders of shards by one tokenizer: the sample, and two smaller ones of other citations."""
    made = {"first": sample_folder / "shards"}
    for seed, name in ((5, "second"), (6, "third")):
        folder = tmp_path_factory.mktemp(name)
        write_sample(folder / "raw", citations=100, seed=seed)
        make_corpus([folder / "raw"], folder / "corpus", 0.1, 0.1, workers=1)
        make_shards(folder / "corpus", sample_folder / "tokenizer", folder / "shards", workers=1)
        made[name] = folder / "shards"
    return made


def mixture(folders: dict[str, Path], run: Path, *more: str) -> list[str]:
    """The settings of a run on a table of folders: 8 steps, a checkpoint and an evaluation at the fourth."""
    chosen = [setting for setting in settings(run, run) if not setting.startswith("data.shards")]
    chosen += [f"data.shards.{name}={folder}" for name, folder in folders.items()]
    chosen += [f"data.weights.{name}={WEIGHTS[name]}" for name in folders]
    return [*chosen, "train.steps=8", "checkpoint.every_steps=4", "evaluate.every_steps=4", *more]


@pytest.fixture(scope="module")
def run(one_rank: Ranks, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixed") / "run"
    one_rank.run(run_case, mixture(folders, folder))
    return folder


def test_a_resume_in_the_middle_is_exact_and_elastic(
    one_rank: Ranks, two_ranks: Ranks, folders: dict[str, Path], run: Path, tmp_path: Path
) -> None:
    """On one rank the same bits; on two the same losses to rounding. The order of the table does not matter."""
    expected = metrics(run, "train/loss")
    assert list(expected) == list(range(1, 9))
    backwards = dict(reversed(folders.items()))
    one = back_to_step_4(run, tmp_path / "one")
    one_rank.run(run_case, mixture(backwards, one))
    assert metrics(one, "train/loss") == expected
    assert metrics(one, "validation/third/loss") == metrics(run, "validation/third/loss")
    two = back_to_step_4(run, tmp_path / "two")
    two_ranks.run(run_case, mixture(backwards, two))
    assert list(metrics(two, "train/loss").values()) == pytest.approx(list(expected.values()), abs=2e-5)


def test_the_held_out_loss_is_that_of_each_folder_and_their_mean_by_weight(folders: dict[str, Path], run: Path) -> None:
    """Against evaluations of each folder alone."""
    alone = {name: evaluate_folder(run, folder, "validation") for name, folder in folders.items()}
    for name, found in alone.items():
        for figure in ("loss", "perplexity", "bits_per_byte", "tokens"):
            assert metrics(run, f"validation/{name}/{figure}")[8] == pytest.approx(found[figure], rel=1e-4)
    expected = sum(WEIGHTS[name] * found["loss"] for name, found in alone.items())
    assert len({round(found["loss"], 3) for found in alone.values()}) == 3
    assert metrics(run, "validation/loss")[8] == pytest.approx(expected, rel=1e-5)
    together = evaluate_folder(run, None, "validation")
    assert together["loss"] == pytest.approx(expected, rel=1e-5)
    assert together["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    shares, text = 0.0, 0.0  # nats and bytes of a token of the mixture, counted from the corpora of the folders
    for name, folder in folders.items():
        counts = read_manifest(folder, "shards")["counts"]["validation"]
        shares += float(WEIGHTS[name]) * alone[name]["loss"]
        text += float(WEIGHTS[name]) * counts["text_bytes"] / counts["tokens"]
    assert together["bits_per_byte"] == pytest.approx(shares / math.log(2) / text, rel=1e-5)
    assert together["tokens"] == sum(found["tokens"] for found in alone.values())
    state = read_state(newest_checkpoint(run)[0] or run)
    assert state["best"]["loss"] == min(metrics(run, "validation/loss").values())


def test_an_export_of_a_mixture_is_proven_and_its_card_lists_the_folders(
    folders: dict[str, Path], run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = export(run, tmp_path / "hf")["counts"]
    assert counts["recorded_loss"] == metrics(run, "validation/loss")[8]
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "| training documents, tokens of first, 70.0% of the mixture |" in card
    assert "of third, 10.0%" in card and "held-out second/loss" in card
    assert not any(str(folder) in card for folder in folders.values())
    with pytest.raises(UserError, match=r"not the shards that .* was trained on; name the right ones with --shards"):
        export(run, tmp_path / "other", folders["first"])

    state = read_state(newest_checkpoint(run)[0] or run)  # stopped between two evaluations: the probe alone
    state["held_out"]["step"] = 3
    monkeypatch.setattr("pretrain.load.read_state", lambda _: state)
    counts = export(run, tmp_path / "probed")["counts"]
    assert counts["recorded_loss"] == state["probe"]["loss"] and counts["held_out"]["tokens"] <= 3 * 8 * 64


def test_a_table_of_one_is_the_same_run_as_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same record in the checkpoints as a single folder has always had, so either resumes the other."""
    plain = make_objective(load_recipe("tiny", settings(folders["first"], tmp_path)))
    table = make_objective(load_recipe("tiny", mixture({"first": folders["first"]}, tmp_path)))
    assert set(plain.identity()) == {"shards", "context_length", "global_batch_tokens", "seed"}
    manifest = (folders["first"] / "manifest.json").read_bytes()
    assert plain.identity()["shards"] == hashlib.sha256(manifest).hexdigest()
    assert table.identity() == plain.identity()
    one, other = (objective.batch(range(40)) for objective in (plain, table))
    assert one[0].equal(other[0]) and one[1].equal(other[1])


def test_epochs_of_each_folder_are_counted(folders: dict[str, Path], tmp_path: Path) -> None:
    """After 1,000 blocks: the blocks by share, over those of an epoch at context length 64."""
    found = make_objective(load_recipe("tiny", mixture(folders, tmp_path))).epochs(1_000)
    for name, folder in folders.items():
        tokens = json.loads((folder / "manifest.json").read_text())["counts"]["train"]["tokens"]
        assert found[name] == pytest.approx(1_000 * WEIGHTS[name] / ((tokens - 63) // 64))


def test_other_folders_or_weights_are_refused_in_one_line(
    one_rank: Ranks, folders: dict[str, Path], run: Path, tmp_path: Path
) -> None:
    copy = back_to_step_4(run, tmp_path / "copy")
    two = {name: folders[name] for name in ("first", "second")}
    others = [
        mixture(folders, copy, "data.weights.first=0.6"),
        mixture(two | {"third": folders["second"]}, copy),
        mixture(two, copy),
        settings(folders["first"], copy),
    ]
    for chosen in others:
        said = one_rank.run(refused_case, chosen)[0]
        assert "has data" in said and "data.allow_other=true resumes all the same" in said and "\n" not in said
    assert one_rank.run(run_case, [*others[2], "data.allow_other=true"]) == [8]


def test_tokenizers_that_differ_are_refused(sample_folder: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    train_tokenizer(sample_folder / "corpus", tmp_path / "tokenizer", merges=280, min_count=1, workers=1)
    make_shards(sample_folder / "corpus", tmp_path / "tokenizer", tmp_path / "shards", workers=1)
    with pytest.raises(UserError, match="was made with another tokenizer than") as caught:
        make_objective(load_recipe("tiny", mixture({**folders, "third": tmp_path / "shards"}, tmp_path)))
    said = str(caught.value)
    assert str(tmp_path / "shards") in said and str(folders["first"]) in said and "\n" not in said
    with pytest.raises(UserError, match="absent: no such folder; expected a shards folder"):
        make_objective(load_recipe("tiny", mixture({**folders, "third": tmp_path / "absent"}, tmp_path)))


def test_damage_in_any_folder_is_found_unless_it_was_verified(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folders["third"], tmp_path / "third")
    with (tmp_path / "third" / "train-00000.bin").open("r+b") as stream:
        stream.write(b"\xff\xff")
    objective = make_objective(load_recipe("tiny", mixture({**folders, "third": tmp_path / "third"}, tmp_path)))
    with pytest.raises(UserError, match=r"third/train-00000\.bin"):
        objective.verify()
    monkeypatch.setenv(VERIFIED, str(objective.identity()["shards"]))
    objective.verify()


def test_the_table_is_read_back_with_absolute_paths(tmp_path: Path) -> None:
    """From TOML, with a share changed and a folder added on the command line."""
    path = tmp_path / "mine.toml"
    path.write_text('[model]\npreset = "tiny"\n[data]\nshards = {a = "x/a", b = "x/b"}\nweights = {a = 1, b = 2}\n')
    recipe = load_recipe(str(path), ["data.weights.b=0.5", "data.shards.c=x/c", "data.weights.c=0.25"])
    write_recipe(recipe, tmp_path / "recipe.toml")
    back = load_recipe(str(tmp_path / "recipe.toml"))
    assert back.data_folders() == {name: Path(f"x/{name}").resolve() for name in "abc"}
    assert {name: str(share) for name, share in back.data_weights().items()} == {"a": "4/7", "b": "2/7", "c": "1/7"}


TABLE = ["data.shards.a=x", "data.shards.b=y"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (TABLE, "data.weights.a: is missing; every folder of data.shards needs its share"),
        ([*TABLE, "data.weights.a=1"], "data.weights.b: is missing"),
        ([*TABLE, "data.weights.a=1", "data.weights.b=0"], "data.weights.b = 0: input should be greater than 0"),
        ([*TABLE, "data.weights.a=-1", "data.weights.b=1"], "data.weights.a = -1: input should be greater than 0"),
        ([*TABLE, "data.weights.a=nan", "data.weights.b=1"], "data.weights.a = nan"),
        ([*TABLE, "data.weights.a=much", "data.weights.b=1"], "data.weights.a = 'much'"),
        ([*TABLE, "data.weights.a=1", "data.weights.c=1"], "data.weights.c: data.shards has no folder of that name"),
        ([*TABLE, "data.weights.a=0.1234567", "data.weights.b=1"], "data.weights: give the shares with fewer digits"),
        ([*TABLE, "data.weight.a=1"], "unknown key data.weight; did you mean data.weights?"),
        (["data.weights.a=1"], "data.weights.a: data.shards has no folder of that name; it has no table"),
        (["data.weights=0.5"], "data.weights = 0.5: "),
        (["data.shards=x", "data.shards.a=x"], "data.shards must be a section"),
        (["data.shards={}"], "data.shards = {}: must be a folder, or a table of folders"),
        (["data.shards.a="], "data.shards = {'a': ''}: must be a folder"),
        (["data.shards.a=5"], "data.shards = {'a': 5}: must be a folder"),
        (['data.shards={"a/b" = "x"}'], "must be a folder, or a table of folders"),
        (["data.shards.a.b=x"], "must be a folder, or a table of folders"),
        (["data..a=x"], "not of the form section.key=value"),
        (["train.steps.a=1"], "train.steps"),
    ],
)
def test_a_mistake_in_the_table_is_named_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)

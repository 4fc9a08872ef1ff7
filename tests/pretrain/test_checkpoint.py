"""Checkpoints: exact resume in the same layout, resume in any other, whole files only."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import BioGptConfig, BioGptForCausalLM

from data.common.files import UserError, read_manifest
from model.config import DecoderConfig
from model.hf import hf_config
from pretrain.checkpoint import (
    CheckpointWriter,
    check_state,
    newest_checkpoint,
    prune,
    read_state,
    verify_checkpoint,
)
from pretrain.objectives.kinds import make_objective
from pretrain.recipe import load_recipe
from tests.pretrain.runs import (
    back_to_step_4,
    metrics,
    run_case,
    settings,
    stage_settings,
    whole,
    write_checkpoint,
    zero_3_settings,
)
from tests.ranks import Ranks

MORE = ["train.steps=8", "checkpoint.every_steps=4", "evaluate.max_blocks=4", "model.layerdrop=0.3"]
DROPOUT = ["model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1"]


LAYOUTS = [
    ("fp32", 1),
    ("bf16", 3),
    *(pytest.param("fp32", stage, marks=pytest.mark.slow) for stage in (0, 2, 3)),
    *(pytest.param("bf16", stage, marks=pytest.mark.slow) for stage in (1, 2)),
]


@pytest.mark.parametrize(("precision", "stage"), LAYOUTS)
def test_a_resumed_run_gives_the_same_bits(
    precision: str, stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """Two ranks, dropout and layerdrop on: every loss and every byte of the last checkpoint."""
    shards, run = sample_folder / "shards", tmp_path / "run"
    chosen = [*MORE, *DROPOUT, f"train.precision={precision}"]
    chosen += stage_settings(tmp_path, stage)
    two_ranks.run(run_case, settings(shards, run, *chosen))
    resumed = back_to_step_4(run, tmp_path / "resumed")
    two_ranks.run(run_case, settings(shards, resumed, *chosen))
    for name in ("train/loss", "validation/loss", "train/learning_rate"):
        assert metrics(run, name) == metrics(resumed, name) != {}
    ends = [folder / "checkpoints" / "step-0000008" for folder in (run, resumed)]
    assert read_manifest(ends[0], "checkpoint")["files"] == read_manifest(ends[1], "checkpoint")["files"]


@pytest.mark.slow  # compiles
@pytest.mark.parametrize("stage", [1, 3])
def test_an_offloaded_run_learns_as_the_other_and_resumes(
    stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """To float rounding only: CPU Adam multiplies its powers of beta up step by step and cannot be set back exactly."""
    shards, run = sample_folder / "shards", tmp_path / "run"
    layout = zero_3_settings(tmp_path) if stage == 3 else ["deepspeed.stage=1", "model.layerdrop=0"]
    offload = [*layout, "deepspeed.offload_optimizer=true", f"deepspeed.offload_parameters={str(stage == 3).lower()}"]
    two_ranks.run(run_case, settings(shards, tmp_path / "plain", *MORE, *layout))
    two_ranks.run(run_case, settings(shards, run, *MORE, *offload), timeout=400)
    plain, losses = metrics(tmp_path / "plain", "train/loss"), metrics(run, "train/loss")
    assert max(abs(plain[step] - losses[step]) for step in plain) < 1e-5
    resumed = back_to_step_4(run, tmp_path / "resumed")
    two_ranks.run(run_case, settings(shards, resumed, *MORE, *offload))
    again = metrics(resumed, "train/loss")
    assert max(abs(again[step] - losses[step]) for step in losses) < 1e-5
    with pytest.raises(
        AssertionError, match=r"optimizer kind = deepspeed\.ops\.adam\.DeepSpeedCPUAdam, this run torch"
    ):
        two_ranks.run(run_case, settings(shards, resumed, *MORE, *layout))


def test_another_stage_and_number_of_ranks_go_on_with_the_same_losses(
    two_ranks: Ranks, one_rank: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    shards, run = sample_folder / "shards", tmp_path / "run"
    two_ranks.run(run_case, settings(shards, run, *MORE, "deepspeed.stage=2"))
    expected = metrics(run, "train/loss")
    layouts: list[tuple[Ranks, list[str]]] = [
        (two_ranks, zero_3_settings(tmp_path)),
        (two_ranks, ["deepspeed.stage=0"]),
        (one_rank, ["deepspeed.stage=1", "train.micro_batch_size=8"]),
        (one_rank, [*zero_3_settings(tmp_path), "train.micro_batch_size=8"]),
    ]
    for number, (ranks, layout) in enumerate(layouts):
        resumed = back_to_step_4(run, tmp_path / f"resumed-{number}")
        ranks.run(run_case, settings(shards, resumed, *MORE, *layout))
        losses = metrics(resumed, "train/loss")
        assert losses.keys() == expected.keys()
        assert max(abs(losses[step] - expected[step]) for step in expected) < 2e-5


@pytest.fixture(scope="module")
def finished_run(one_rank: Ranks, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "run"
    one_rank.run(run_case, settings(sample_folder / "shards", run, *MORE, "checkpoint.keep_last=1"))
    return run


def test_saved_state_has_transformers_names_in_fp32(finished_run: Path) -> None:
    checkpoint, _ = newest_checkpoint(finished_run)
    assert checkpoint is not None
    config = DecoderConfig(**read_state(checkpoint)["model"])
    expected = BioGptForCausalLM(BioGptConfig(**hf_config(config))).state_dict()
    for kind in ("model", "exp_avg", "exp_avg_sq"):
        tensors = load_file(checkpoint / f"{kind}.safetensors")
        assert {name: tensor.shape for name, tensor in tensors.items()} == {
            name: tensor.shape for name, tensor in expected.items() if name != "output_projection.weight"
        }
        assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float32"}
        assert any(tensor.any() for tensor in tensors.values())


def test_old_checkpoints_are_removed_by_keep_last(finished_run: Path) -> None:
    assert [path.name for path in (finished_run / "checkpoints").iterdir()] == ["step-0000008"]
    assert (finished_run / "latest").read_text() == "step-0000008"


def test_a_changed_byte_is_found_and_the_file_named(finished_run: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "exp_avg_sq.safetensors", "state.json"):
        copy = tmp_path / name
        shutil.copytree(finished_run / "checkpoints" / "step-0000008", copy)
        verify_checkpoint(copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            verify_checkpoint(copy)


def test_a_checkpoint_cut_short_is_never_pointed_at(finished_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished_run, run)
    writer = CheckpointWriter(run, 12)
    writer.begin()
    writer.add("model", *whole(load_file(run / "checkpoints" / "step-0000008" / "model.safetensors")))
    # Killed here: what is there has no manifest and is not the newest checkpoint.
    assert newest_checkpoint(run) == (run / "checkpoints" / "step-0000008", [])
    kinds = ("model", "exp_avg", "exp_avg_sq")
    tensors = {kind: load_file(run / "checkpoints" / "step-0000008" / f"{kind}.safetensors") for kind in kinds}
    write_checkpoint(run, 12, tensors, {"step": 12})
    prune(run, keep_last=1, keep_every_steps=0, keep_best=False)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-0000012"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model.hidden_size=64", "model hidden_size = 32, this run 64"),
        ("model.num_hidden_layers=3", "model num_hidden_layers = 2, this run 3"),
        ("train.seed=5", "seed = 1, this run 5"),
        ("train.global_batch_tokens=2048", "data global_batch_tokens = 1024, this run 2048"),
        ("model.weights=/some/hf", "given weights = None, this run /some/hf; choose"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(
    finished_run: Path, sample_folder: Path, change: str, message: str
) -> None:
    state = read_state(finished_run / "checkpoints" / "step-0000008")
    said = refusal(finished_run, state, sample_folder / "shards", change)
    assert message in said and str(finished_run) in said and "\n" not in said


def test_a_checkpoint_from_before_given_weights_were_recorded_goes_on(finished_run: Path, sample_folder: Path) -> None:
    state = read_state(finished_run / "checkpoints" / "step-0000008")
    del state["given"]
    for changes in ((), ("model.weights=/hf",)):
        assert not refusal(finished_run, state, sample_folder / "shards", *changes)


def test_a_key_that_a_record_lacks_means_its_default(finished_run: Path, sample_folder: Path) -> None:
    """A checkpoint from before the objective and the special ids were recorded is resumed, unless they differ now."""
    state = read_state(finished_run / "checkpoints" / "step-0000008")
    del state["objective"], state["model"]["eos_token_id"], state["model"]["initialization"]
    assert not refusal(finished_run, state, sample_folder / "shards")
    said = refusal(finished_run, state, sample_folder / "shards", "model.initialization=hf")
    assert "has model initialization = fairseq, this run hf" in said


def refusal(run: Path, state: dict[str, Any], shards: Path, *changes: str) -> str:
    """What a run with the changes is told when it would go on from this state, "" where it may."""
    recipe = load_recipe("tiny", settings(shards, run, *MORE, *changes))
    try:
        check_state(run, state, recipe, make_objective(recipe))
    except UserError as error:
        return str(error)
    return ""


def test_a_finished_run_stays_as_it_is(one_rank: Ranks, sample_folder: Path, finished_run: Path) -> None:
    before: dict[str, Any] = {str(path): path.stat().st_mtime_ns for path in finished_run.rglob("*.safetensors")}
    losses = metrics(finished_run, "train/loss")
    one_rank.run(run_case, settings(sample_folder / "shards", finished_run, *MORE, "checkpoint.keep_last=1"))
    assert {str(path): path.stat().st_mtime_ns for path in finished_run.rglob("*.safetensors")} == before
    assert metrics(finished_run, "train/loss") == losses

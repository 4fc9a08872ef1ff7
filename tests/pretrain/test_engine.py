"""DeepSpeed: ZeRO 0 to 3 against plain torch, and when layers are compiled."""

import json
import shutil
import sysconfig
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from data.common.files import UserError
from pretrain import ROOT
from pretrain.engine import compiles
from pretrain.given import SHAPE
from pretrain.recipe import load_recipe
from tests.pretrain.runs import end_of_run, metrics, plain_losses, run_case, settings, stage_settings
from tests.ranks import Ranks


@pytest.mark.parametrize("layerdrop", [pytest.param(0.0, marks=pytest.mark.slow), 0.5])
def test_zero_0_to_3_give_the_losses_of_plain_torch(
    layerdrop: float, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """20 steps in fp32 on 2 ranks with accumulation; ZeRO-3 partitions everything."""
    common = ["train.steps=20", f"model.layerdrop={layerdrop}", "evaluate.max_blocks=4"]
    expected = plain_losses(settings(sample_folder / "shards", tmp_path, *common), ranks=2)
    worst = {}
    for stage in range(4):
        run = tmp_path / f"stage-{stage}"
        chosen = stage_settings(tmp_path, stage)
        two_ranks.run(run_case, settings(sample_folder / "shards", run, *common, *chosen))
        losses = list(metrics(run, "train/loss").values())
        assert len(losses) == 20
        worst[stage] = max(abs(one - other) for one, other in zip(losses, expected, strict=True))
    print(f"layerdrop {layerdrop}: largest difference from plain torch by stage {worst}")
    assert max(worst.values()) < 1e-4  # the issue asks for 1e-3
    assert expected[-1] < expected[0] - 0.5  # it learned: the comparison is not of standing still


def test_bf16_trains_at_stages_1_to_3(two_ranks: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    last = {}
    for stage in (1, 2, 3):
        run = tmp_path / f"stage-{stage}"
        chosen = stage_settings(tmp_path, stage)
        more = ["train.precision=bf16", "train.steps=10", "evaluate.max_blocks=4"]
        two_ranks.run(run_case, settings(sample_folder / "shards", run, *more, *chosen))
        last[stage] = metrics(run, "train/loss")[10]
    assert max(last.values()) - min(last.values()) < 1e-2  # what bf16's sums in another order may differ by


def test_compiling_without_a_compiler_is_refused_and_by_default_left_out_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match=r"train\.compile = true: g\+\+ is missing"):
        compiles(load_recipe("tiny", ["train.compile=true"]))
    assert not compiles(load_recipe("tiny"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not compiles(load_recipe("tiny"))  # a GPU, but no C compiler
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    headers = tmp_path / "include"
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(headers))
    assert not compiles(load_recipe("tiny"))  # a compiler, but no Python.h
    with pytest.raises(UserError, match=r"Python\.h is missing, which torch\.compile needs on a GPU"):
        compiles(load_recipe("tiny", ["train.compile=true"]))
    headers.mkdir()
    (headers / "Python.h").touch()
    assert compiles(load_recipe("tiny")) and not compiles(load_recipe("tiny", ["train.compile=false"]))
    (tmp_path / "config.json").write_text(json.dumps(dict.fromkeys(SHAPE, 64)))
    tuned = load_recipe("finetune-pubmedqa", [f"model.weights={tmp_path}", "data.records=records"])
    assert not compiles(tuned)  # padded records have many lengths


@pytest.mark.slow
def test_bf16_gradients_that_are_added_up_at_once_give_the_same_bits(
    one_rank: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """Stage 1, where alone DeepSpeed reads `immediate_grad_update`; with micro-batches whose layers are left out."""
    default = json.loads((ROOT / "launch/deepspeed/zero1.json").read_text())
    assert default["bf16"].pop("immediate_grad_update") is True
    (tmp_path / "later.json").write_text(json.dumps(default))
    more = ["train.precision=bf16", "train.steps=5", "model.layerdrop=0.5", "evaluate.max_blocks=2"]
    ends = []
    for name, config in (("at-once", []), ("later", [f"deepspeed.config={tmp_path / 'later.json'}"])):
        chosen = settings(sample_folder / "shards", tmp_path / name, *more, "deepspeed.stage=1", *config)
        one_rank.run(run_case, chosen)
        ends.append(end_of_run(tmp_path / name))
    assert ends[0] == ends[1] and len(ends[0][0]) == 5 and len(ends[0][1]) == 3


def synchronisations_case(chosen: list[str]) -> int:
    """How often DeepSpeed waits for the device in a run."""
    with patch.object(type(get_accelerator()), "synchronize") as synchronize:
        run_case(chosen)
    return synchronize.call_count


@pytest.mark.parametrize("stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow)])
def test_no_micro_batch_waits_for_the_device(stage: int, one_rank: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    """DeepSpeed's throughput timer does by default, twice a micro-batch."""
    counts = []
    for micro_batch_size in (8, 2):  # 2 and 8 micro-batches a step
        run = tmp_path / str(micro_batch_size)
        more = ["train.steps=3", f"deepspeed.stage={stage}", f"train.micro_batch_size={micro_batch_size}"]
        counts += one_rank.run(synchronisations_case, settings(sample_folder / "shards", run, *more))
    assert counts[0] == counts[1]

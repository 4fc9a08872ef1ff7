"""DeepSpeed: ZeRO 0 to 3 against plain torch, and when layers are compiled."""

import shutil
import sysconfig
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from data.common.files import UserError, read_manifest
from data.shards.blocks import TokenStream, TrainingBlocks
from model.decoder import Decoder
from pretrain.engine import compiles
from pretrain.recipe import load_recipe
from pretrain.schedule import learning_rate
from tests.pretrain.runs import metrics, run_case, settings, zero_3_settings
from tests.ranks import Ranks


def plain_losses(chosen: list[str], ranks: int) -> list[float]:
    """The run by plain torch: one process, the whole global batch at once."""
    recipe = load_recipe("tiny", chosen)
    shards = Path(recipe.data.shards)
    manifest = read_manifest(shards, "shards")
    stream = TokenStream(shards, manifest, "train")
    blocks = TrainingBlocks(stream, recipe.context_length(), recipe.train.seed)
    torch.manual_seed(recipe.train.seed)
    decoder = Decoder(recipe.decoder_config(manifest["counts"]["vocabulary"]))
    optimizer = torch.optim.AdamW(decoder.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    losses = []
    for step in range(recipe.train.steps):
        optimizer.zero_grad()
        total = torch.zeros(())
        size, at_once = recipe.global_batch_size(), recipe.train.micro_batch_size * ranks
        for micro_step in range(size // at_once):
            first = step * size + micro_step * at_once
            inputs, targets = blocks.batch(range(first, first + at_once))
            loss = decoder(inputs, targets, step=step, micro_step=micro_step) / recipe.train.global_batch_tokens
            loss.backward()
            total += loss.detach()
        for parameter in decoder.parameters():  # a dropped layer has a gradient of zero under DeepSpeed
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), recipe.optimizer.gradient_clipping)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        optimizer.step()
        losses.append(total.item())
    return losses


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
        chosen = zero_3_settings(tmp_path) if stage == 3 else [f"deepspeed.stage={stage}"]
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
        chosen = zero_3_settings(tmp_path) if stage == 3 else [f"deepspeed.stage={stage}"]
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

"""DeepSpeed: the configuration, and ZeRO 0 to 3 against plain torch."""

import json
from pathlib import Path

import pytest
import torch

from data.common.files import UserError, read_manifest
from data.shards.blocks import TokenStream, TrainingBlocks
from model.decoder import Decoder
from pretrain.deepspeed_config import deepspeed_config
from pretrain.recipe import load_recipe
from pretrain.schedule import learning_rate
from tests.pretrain.runs import metrics, run_case, settings, zero_3_settings
from tests.ranks import Ranks


def test_auto_is_filled_in_from_the_recipe() -> None:
    config = deepspeed_config(load_recipe("biogpt", ["deepspeed.stage=2", "optimizer.gradient_clipping=0.5"]), ranks=8)
    assert "auto" not in json.dumps(config)
    assert config["train_batch_size"] == 512 == config["train_micro_batch_size_per_gpu"] * 8 * 4
    assert config["gradient_accumulation_steps"] == 4
    assert config["gradient_clipping"] == 0.5 and config["bf16"]["enabled"] is True
    assert config["zero_optimization"]["stage"] == 2
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2, but the recipe says 1"),
        ({"gradient_clipping": 3.0}, "gradient_clipping = 3.0, but the recipe says 1.0"),
        ({"optimizer": {"type": "AdamW"}}, "remove `optimizer`: the recipe decides it"),
        ({"activation_checkpointing": {}}, r"use the recipe's model\.gradient_checkpointing"),
    ],
)
def test_a_deepspeed_file_that_contradicts_the_recipe_is_refused(
    tmp_path: Path, content: dict[str, object], message: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    recipe = load_recipe("tiny", [f"deepspeed.config={path}", "deepspeed.stage=1"])
    with pytest.raises(UserError, match=message) as caught:
        deepspeed_config(recipe, 1)
    assert str(path) in str(caught.value)


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

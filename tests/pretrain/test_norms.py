"""Norms by group at ZeRO 0 to 3, against a plain model."""

import math
import re
from pathlib import Path

import pytest
import torch

from model.decoder import Decoder
from pretrain.norms import group
from pretrain.recipe import load_recipe
from pretrain.schedule import learning_rate
from tests.pretrain.runs import metrics, plain_start, run_case, settings, stage_settings
from tests.pretrain.test_train import fp16_case
from tests.ranks import Ranks

GROUPS = {
    "embed_tokens", "embed_positions", "layer_norm", "layers.self_attn_layer_norm", "layers.qkv_proj",
    "layers.out_proj", "layers.final_layer_norm", "layers.fc1", "layers.fc2",
}  # fmt: skip


def test_a_group_is_the_kind_of_module() -> None:
    recipe = load_recipe("tiny")
    decoder = Decoder(recipe.decoder_config(100))
    assert {group(name) for name, _ in decoder.named_parameters()} == GROUPS


def plain_norms(chosen: list[str], ranks: int, first_update: int = 0) -> list[dict[str, float]]:
    """For each step the norms of the groups' gradients and updated weights, by plain torch in fp32."""
    recipe, blocks, decoder = plain_start(chosen)
    optimizer = torch.optim.AdamW(decoder.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    steps = []
    size, at_once = recipe.global_batch_size(), recipe.train.micro_batch_size * ranks
    for step in range(recipe.train.steps):
        optimizer.zero_grad(set_to_none=False)
        for micro_step in range(size // at_once):
            first = step * size + micro_step * at_once
            batch = blocks.batch(range(first, first + at_once))
            (decoder(*batch, step=step, micro_step=micro_step) / recipe.train.global_batch_tokens).backward()
        squares: dict[str, float] = {}

        def add(what: str, tensors: list[tuple[str, torch.Tensor | None]], squares: dict[str, float] = squares) -> None:
            for name, tensor in tensors:
                key = f"{what}/" + re.sub(r"\.\d+|\.weight$|\.bias$", "", name)
                squares[key] = squares.get(key, 0.0) + (
                    0.0 if tensor is None else float(tensor.double().square().sum())
                )

        add("gradient_norm", [(name, each.grad) for name, each in decoder.named_parameters()])
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), recipe.optimizer.gradient_clipping)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        if step >= first_update:
            optimizer.step()
        add("weight_norm", [(name, each.detach()) for name, each in decoder.named_parameters()])
        steps.append({name: math.sqrt(square) for name, square in squares.items()})
    return steps


def check(run: Path, expected: list[dict[str, float]], tolerance: float) -> None:
    assert {name.split("/")[1] for name in expected[0]} == GROUPS
    for name in expected[0]:
        found = metrics(run, name)
        assert list(found) == list(range(1, len(expected) + 1))
        assert list(found.values()) == pytest.approx([step[name] for step in expected], rel=tolerance), name
    for step, total in metrics(run, "train/gradient_norm").items():
        squares = (metrics(run, name)[step] ** 2 for name in expected[0] if name.startswith("gradient"))
        assert math.sqrt(sum(squares)) == pytest.approx(total, rel=tolerance)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_norms_are_those_of_a_plain_model(stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    """Clipped to a tenth of the norm, with accumulation and dropped layers."""
    more = ["train.steps=3", "model.layerdrop=0.3", "optimizer.gradient_clipping=0.3", "evaluate.max_blocks=4"]
    chosen = stage_settings(tmp_path, stage)
    given = settings(sample_folder / "shards", tmp_path / "run", *more, *chosen)
    two_ranks.run(run_case, given)
    check(tmp_path / "run", plain_norms(given, ranks=2), 1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_norms_in_bf16_are_those_of_a_plain_model(
    stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """DeepSpeed keeps its gradients in another way at each of these stages."""
    more = ["train.steps=2", "train.precision=bf16", "optimizer.gradient_clipping=0.3", "evaluate.max_blocks=4"]
    chosen = stage_settings(tmp_path, stage)
    given = settings(sample_folder / "shards", tmp_path / "run", *more, *chosen)
    two_ranks.run(run_case, given)
    check(tmp_path / "run", plain_norms(given, ranks=2), 5e-2)


def test_norms_in_fp16_are_of_unscaled_gradients(two_ranks: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    """The first steps are skipped, until the scale fits."""
    run = tmp_path / "run"
    given = settings(sample_folder / "shards", run, "train.precision=fp16", "train.steps=8", "evaluate.max_blocks=2")
    two_ranks.run(fp16_case, given)
    totals = metrics(run, "train/gradient_norm")
    applied = min(totals)
    expected = plain_norms(given, ranks=2, first_update=applied - 1)[applied - 1]
    for name, norm in expected.items():
        assert metrics(run, name)[applied] == pytest.approx(norm, rel=5e-2), name
    for step, total in totals.items():
        squares = (metrics(run, name)[step] ** 2 for name in expected if name.startswith("gradient"))
        assert math.sqrt(sum(squares)) == pytest.approx(total, rel=1e-3)

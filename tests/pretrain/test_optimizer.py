"""The optimizer's room, proven by a second kind: matrices with one state and a rate of their own, the rest as Adam."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from data.common.files import read_manifest
from model.architecture import Architecture
from pretrain.checkpoint import newest_checkpoint
from pretrain.engine import build_engine, init_distributed
from pretrain.objectives.kinds import make_objective
from pretrain.optimizer import KINDS, AdamW, Groups, Optimizer, OptimizerKind
from pretrain.recipe import OptimizerSection, load_recipe
from pretrain.schedule import learning_rate
from tests.pretrain.runs import back_to_step_4, metrics, run_case, settings, stage_settings
from tests.ranks import Ranks

MORE = ["train.steps=8", "checkpoint.every_steps=4", "evaluate.max_blocks=4"]


class Mixed(torch.optim.Optimizer):
    """Momentum for groups with that state, Adam for the others. Element by element, as ZeRO's flat partitions need."""

    def __init__(self, groups: Groups) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in (each for each in group["params"] if each.grad is not None):
                state, gradient = self.state[parameter], parameter.grad
                for name in group["states"]:
                    state.setdefault(name, torch.zeros_like(parameter))
                state["step"] = state.get("step", 0) + 1
                if "momentum" in state:
                    update = state["momentum"].mul_(0.9).add_(gradient)
                else:
                    first = state["exp_avg"].lerp_(gradient, 0.1) / (1 - 0.9 ** state["step"])
                    second = state["exp_avg_sq"].lerp_(gradient.square(), 0.02) / (1 - 0.98 ** state["step"])
                    update = first / (second.sqrt() + 1e-8)
                parameter.sub_(group["lr"] * update)


class MixedKind(OptimizerKind):
    record, offloaded_record = "tests.Mixed", "none"

    def groups(self, model: Architecture, settings: OptimizerSection) -> Groups:
        parameters = dict(model.named_parameters())
        matrices = [parameter for name, parameter in parameters.items() if parameter.dim() > 1 and "layers" in name]
        rest = [parameter for parameter in parameters.values() if not any(parameter is each for each in matrices)]
        return [
            {"params": matrices, "rule": "first", "states": ("momentum",), "rate_multiplier": 2.5},
            {"params": rest, "rule": "second", "states": ("exp_avg", "exp_avg_sq"), "rate_multiplier": 1.0},
        ]

    def build(self, groups: Groups, settings: OptimizerSection) -> torch.optim.Optimizer:
        return Mixed(groups)

    def build_offloaded(self, groups: Groups, settings: OptimizerSection) -> torch.optim.Optimizer:
        raise NotImplementedError


def mixed_case(chosen: list[str]) -> int:
    """`run_case` with the mixed kind in the place of AdamW."""
    KINDS["adamw"] = MixedKind()
    try:
        return run_case(chosen)
    finally:
        KINDS["adamw"] = AdamW()


def plain_losses(chosen: list[str]) -> list[float]:
    """The same training by plain torch in one process, each group at its own rate."""
    recipe = load_recipe("tiny", chosen)
    objective = make_objective(recipe)
    model = objective.build_model()
    optimizer = Mixed(MixedKind().groups(model, recipe.optimizer))
    losses = []
    for step in range(recipe.train.steps):
        model.zero_grad()
        loss = model(*objective.batch(range(step * 16, (step + 1) * 16))) / (16 * 64)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.gradient_clipping)
        for group, multiplier in zip(optimizer.param_groups, (2.5, 1.0), strict=True):
            group["lr"] = learning_rate(recipe, step) * multiplier
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.slow) for stage in range(3)), 3])
def test_a_second_kind_trains_saves_and_resumes(
    stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    shards, run = sample_folder / "shards", tmp_path / "run"
    chosen = stage_settings(tmp_path, stage)
    two_ranks.run(mixed_case, settings(shards, run, *MORE, *chosen))
    losses = metrics(run, "train/loss")
    assert list(losses.values()) == pytest.approx(plain_losses(settings(shards, run, *MORE)), rel=2e-5)

    newest, _ = newest_checkpoint(run)
    assert newest is not None
    names = {}
    for path in newest.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            names[path.stem] = set(tensors.keys())
    assert names.keys() == {"model", "momentum", "exp_avg", "exp_avg_sq"}
    assert names["momentum"] | names["exp_avg"] == names["model"] and not names["momentum"] & names["exp_avg"]
    assert "biogpt.layers.1.self_attn.k_proj.weight" in names["momentum"] and names["exp_avg"] == names["exp_avg_sq"]

    resumed = back_to_step_4(run, tmp_path / "resumed")
    two_ranks.run(mixed_case, settings(shards, resumed, *MORE, *chosen))
    assert metrics(resumed, "train/loss") == losses
    same_end(run, resumed)


def same_end(*runs: Path) -> None:
    """The last checkpoints of two runs hold the same bytes."""
    one, other = (read_manifest(run / "checkpoints" / "step-0000008", "checkpoint") for run in runs)
    assert one["files"] == other["files"]


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 1, 2, pytest.param(3, marks=pytest.mark.slow)]
)
def test_two_groups_of_adamw_save_and_resume(stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    """Biases and norms without decay: DeepSpeed alone finds the states of the first group only."""
    chosen = stage_settings(tmp_path, stage)
    chosen += ["optimizer.decay_biases_and_norms=false", "optimizer.weight_decay=0.5"]
    run = tmp_path / "run"
    two_ranks.run(run_case, settings(sample_folder / "shards", run, *MORE, *chosen))
    resumed = back_to_step_4(run, tmp_path / "resumed")
    two_ranks.run(run_case, settings(sample_folder / "shards", resumed, *MORE, *chosen))
    assert metrics(resumed, "train/loss") == metrics(run, "train/loss")
    same_end(run, resumed)


def test_a_checkpoint_of_another_kind_is_refused(two_ranks: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    chosen = settings(sample_folder / "shards", tmp_path / "run", *MORE, "train.steps=4")
    two_ranks.run(mixed_case, chosen)
    with pytest.raises(AssertionError, match=r"has optimizer kind = tests\.Mixed, this run torch\.optim\.AdamW"):
        two_ranks.run(run_case, chosen)


def test_the_schedules_rate_is_set_to_the_last_bit(sample_folder: Path, tmp_path: Path) -> None:
    recipe = load_recipe("biogpt", [f"data.shards={sample_folder / 'shards'}", "model.preset=tiny"])
    optimizer = Optimizer(recipe, make_objective(recipe).build_model())
    for step in range(0, 200_000, 101):
        optimizer.set_learning_rate(learning_rate(recipe, step))
        assert optimizer.torch.param_groups[0]["lr"] == learning_rate(recipe, step)
    assert optimizer.state_names == ("exp_avg", "exp_avg_sq")


def decay_case(chosen: list[str]) -> list[str]:
    """Names of the parameters that AdamW decays."""
    init_distributed()
    recipe = load_recipe("tiny", chosen)
    decoder = make_objective(recipe).build_model()
    names = {id(parameter): name for name, parameter in decoder.named_parameters()}
    _, optimizer = build_engine(recipe, decoder, 1)
    return [
        names[id(parameter)]
        for group in optimizer.torch.param_groups
        for parameter in group["params"]
        if group["weight_decay"] > 0
    ]


def test_all_parameters_decay_or_all_but_biases_and_norms(one_rank: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    chosen = settings(sample_folder / "shards", tmp_path, "deepspeed.stage=0", "train.micro_batch_size=8")
    everything = one_rank.run(decay_case, chosen)[0]
    some = one_rank.run(decay_case, [*chosen, "optimizer.decay_biases_and_norms=false"])[0]
    assert any("bias" in name for name in everything) and any("norm" in name for name in everything)
    assert set(some) == {name for name in everything if "bias" not in name and "norm" not in name}

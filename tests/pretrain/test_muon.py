"""Muon under ZeRO: against its definition by singular values, and against torch's own."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from model.decoder import is_dropped
from pretrain import engine as engines
from pretrain.engine import build_engine, init_distributed
from pretrain.muon import Holding, Muon, Part, orthogonalize, work
from pretrain.objectives.kinds import make_objective
from pretrain.recipe import load_recipe
from pretrain.schedule import learning_rate
from tests.pretrain.runs import back_to_step_4, metrics, run_case, settings, stage_settings, zero_3_settings
from tests.pretrain.test_optimizer import same_end
from tests.ranks import Ranks

MORE = [
    "train.steps=8", "checkpoint.every_steps=4", "evaluate.max_blocks=4", "optimizer.kind=muon",
    "optimizer.learning_rate=0.01", "optimizer.weight_decay=0.1",
]  # fmt: skip
SLOW = pytest.mark.slow
STAGES = [pytest.param(0, marks=SLOW), 1, pytest.param(2, marks=SLOW), 3]


def by_singular_values(matrix: Tensor) -> Tensor:
    """What the iteration does: an odd polynomial of the singular values, five times, in fp64."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (left * values) @ right


@pytest.mark.parametrize("shape", [(8, 8), (64, 64), (3, 40), (40, 3), (64, 256), (256, 64), (1, 5)])
def test_orthogonal_by_singular_values(shape: tuple[int, int]) -> None:
    for size in (1e-12, 1.0, 1e6):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * size
        assert torch.allclose(orthogonalize(matrix, torch.float32).double(), by_singular_values(matrix), atol=2e-4)
    assert torch.equal(orthogonalize(torch.zeros(shape), torch.float32), torch.zeros(shape))


def test_the_same_updates_as_torchs_muon() -> None:
    """On whole matrices, in torch's precision."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs = (
        [torch.randn(shape, generator=torch.Generator().manual_seed(2)).requires_grad_() for shape in SHAPES]
        for _ in range(2)
    )
    names = [str(number) for number in range(len(SHAPES))]
    group = {"params": ours, "matrices": {name: [shape] for name, shape in zip(names, SHAPES, strict=True)}}
    one = Muon([group], momentum=0.9, precision="bf16", lr=0.01, weight_decay=0.1)
    one.locate((name, 0, parameter.detach().view(-1)) for name, parameter in zip(names, ours, strict=True))
    other = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for _ in range(5):
        for pair in zip(ours, theirs, strict=True):
            gradient = torch.randn(pair[0].shape, generator=generator)
            for parameter in pair:
                parameter.grad = gradient.clone()
        one.step()
        other.step()
    for mine, its in zip(ours, theirs, strict=True):
        assert (mine - its).abs().max() < 2e-3  # of five updates of 0.002 a number, and bf16 has 3 digits
        assert (mine - its).norm() < 0.03 * 5 * 0.002 * mine.numel() ** 0.5


SHAPES = [(16, 16), (16, 64), (64, 16)]


def plain_losses(chosen: list[str]) -> list[float]:
    """The same training by plain torch in one process: the rule as its paper has it, q, k and v each by itself."""
    recipe = load_recipe("tiny", chosen)
    objective, settings = make_objective(recipe), recipe.optimizer
    model = objective.build_model()
    hidden = {
        name: parameter for name, parameter in model.named_parameters() if "layers" in name and parameter.dim() == 2
    }
    momenta = {name: torch.zeros_like(parameter) for name, parameter in hidden.items()}
    rest = [parameter for name, parameter in model.named_parameters() if name not in hidden]
    adamw = torch.optim.AdamW(rest, betas=settings.betas, eps=settings.epsilon, weight_decay=settings.weight_decay)
    losses = []
    for step in range(recipe.train.steps):
        model.zero_grad()
        loss = model(*objective.batch(range(step * 16, (step + 1) * 16))) / (16 * 64)
        loss.backward()
        rate = learning_rate(recipe, step)
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        with torch.no_grad():
            for name, parameter in hidden.items():
                gradient, momentum = parameter.grad, momenta[name]
                assert gradient is not None
                momentum.mul_(0.95).add_(gradient, alpha=0.05)
                parameter.mul_(1 - rate * settings.weight_decay)
                count = 3 if "qkv" in name else 1
                for matrix, update in zip(
                    parameter.chunk(count), (0.05 * gradient + 0.95 * momentum).chunk(count), strict=True
                ):
                    matrix -= rate * 0.2 * max(matrix.shape) ** 0.5 * by_singular_values(update).float()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_train_as_defined_and_resume_exactly(
    stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    shards, run = sample_folder / "shards", tmp_path / "run"
    chosen = stage_settings(tmp_path, stage)
    two_ranks.run(run_case, settings(shards, run, *MORE, *chosen))
    losses = metrics(run, "train/loss")
    assert list(losses.values()) == pytest.approx(plain_losses(settings(shards, run, *MORE)), rel=2e-5)

    resumed = back_to_step_4(run, tmp_path / "resumed")
    two_ranks.run(run_case, settings(shards, resumed, *MORE, *chosen))
    assert metrics(resumed, "train/loss") == losses
    same_end(run, resumed)


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_bf16_resumes_exactly(stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    """DeepSpeed has other optimizer classes there. The losses are near those in fp32."""
    shards, run = sample_folder / "shards", tmp_path / "run"
    chosen = [*MORE, *stage_settings(tmp_path, stage), "train.precision=bf16"]
    two_ranks.run(run_case, settings(shards, run, *chosen))
    losses = metrics(run, "train/loss")
    assert list(losses.values()) == pytest.approx(plain_losses(settings(shards, run, *MORE)), rel=0.01)
    assert min(losses.values()) < 0.95 * losses[1]
    resumed = back_to_step_4(run, tmp_path / "resumed")
    two_ranks.run(run_case, settings(shards, resumed, *chosen))
    assert metrics(resumed, "train/loss") == losses
    same_end(run, resumed)


def test_it_resumes_on_one_rank_at_another_stage(
    one_rank: Ranks, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    shards, run = sample_folder / "shards", tmp_path / "run"
    two_ranks.run(run_case, settings(shards, run, *MORE, *zero_3_settings(tmp_path)))
    resumed = back_to_step_4(run, tmp_path / "resumed")
    one_rank.run(run_case, settings(shards, resumed, *MORE, "deepspeed.stage=1"))
    assert metrics(resumed, "train/loss") == pytest.approx(metrics(run, "train/loss"), abs=1e-5)


def layerdrop_case(chosen: list[str]) -> list[dict[str, Any]]:
    """For each of some steps: which matrices and momenta of this rank have changed, and what the rules updated."""
    init_distributed()
    recipe = load_recipe("tiny", chosen)
    objective = make_objective(recipe)
    engine, optimizer = build_engine(recipe, objective.build_model(), torch.distributed.get_world_size())
    rank, found = torch.distributed.get_rank(), []

    def state(kind: str) -> dict[str, Tensor]:
        return {name: values.clone() for name, _, values in engines.held_fragments(engine, optimizer, kind)}

    for step in range(6):
        before = {kind: state(kind) for kind in ("model", "momentum")}
        optimizer.set_learning_rate(0.01)
        engine.train()
        for micro_step in range(engine.gradient_accumulation_steps()):
            first = step * 16 + (micro_step * torch.distributed.get_world_size() + rank) * 8
            loss = engine(*objective.batch(range(first, first + 8)), step=step, micro_step=micro_step)
            engine.backward(loss / 1024)
            if micro_step < engine.gradient_accumulation_steps() - 1:
                engine.step()
        engines.finish_step(engine)
        after = {kind: state(kind) for kind in ("model", "momentum")}
        found.append(
            {
                kind: {name: not torch.equal(before[kind][name], after[kind][name]) for name in after[kind]}
                for kind in after
            }
        )
    found.append(engines.updated_numbers(engine, optimizer))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_a_dropped_layer_keeps_its_matrices_and_everything_else_moves(
    stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    chosen = settings(
        sample_folder / "shards", tmp_path / "run", *MORE, *stage_settings(tmp_path, stage), "train.micro_batch_size=8",
        "model.layerdrop=0.5",
    )  # fmt: skip
    dropped_ones = complete = 0
    per_rank = two_ranks.run(layerdrop_case, chosen)
    for *steps, updated in per_rank:
        for step, changed in enumerate(steps):
            if not any(is_dropped(0.5, 1, step, 0, layer) for layer in (0, 1)):
                assert all(changed["model"].values()), changed
                complete += 1
            for layer in (0, 1):
                dropped = is_dropped(0.5, 1, step, 0, layer)
                dropped_ones += dropped
                for kind in ("model", "momentum"):
                    for name, moved in changed[kind].items():
                        if f"layers.{layer}." in name and name.endswith(("proj.weight", "fc1.weight", "fc2.weight")):
                            assert moved != dropped, (step, kind, name)
        recipe = load_recipe("tiny", chosen)
        model = make_objective(recipe).build_model()
        hidden = sum(dict(model.named_parameters())[name].numel() for name in model.hidden_matrices())
        assert updated == {"Muon": hidden, "AdamW": model.config.parameter_count() - hidden}
    assert dropped_ones and complete


def test_the_work_is_shared() -> None:
    """No rank makes more matrices orthogonal than its share and one more, however the numbers lie."""
    shapes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
    shapes = shapes * 12
    total, largest = sum(map(work, shapes)), max(map(work, shapes))
    for ranks in (1, 2, 3, 7, 16, 64):
        for layout in ("whole", "flat", "each"):
            held = [parts_of(shapes, rank, ranks, layout) for rank in range(ranks)]
            holding = holding_of(shapes, held, 0)
            loads = [0] * ranks
            for matrix, owner in holding.owners.items():
                loads[owner] += work(shapes[matrix])
            assert max(loads) <= total / ranks + largest, (ranks, layout)
            assert sorted(holding.owners) == list(range(len(shapes)))


def parts_of(shapes: list[tuple[int, int]], rank: int, ranks: int, layout: str) -> list[Part]:
    """What a rank holds: everything, its piece of all numbers in a row, or its piece of each matrix."""
    sizes = [rows * columns for rows, columns in shapes]
    if layout == "whole":
        return [Part(matrix, 0, size) for matrix, size in enumerate(sizes)]
    parts, reached, total = [], 0, sum(sizes)
    for matrix, size in enumerate(sizes):
        edges = (size * rank // ranks, size * (rank + 1) // ranks)
        if layout == "flat":
            edges = tuple(min(max(total * each // ranks - reached, 0), size) for each in (rank, rank + 1))
        if edges[0] < edges[1]:
            parts.append(Part(matrix, edges[0], edges[1] - edges[0]))
        reached += size
    return parts


def holding_of(shapes: list[tuple[int, int]], held: list[list[Part]], rank: int) -> Holding:
    """A rank's view, without a process group."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributed.is_initialized", lambda: True)
        patch.setattr("torch.distributed.get_rank", lambda: rank)
        patch.setattr("torch.distributed.get_world_size", lambda: len(held))
        patch.setattr("torch.distributed.all_gather_object", lambda into, _: into.__setitem__(slice(None), held))
        return Holding(shapes, held[rank])


def test_checkpoints_hold_one_state_for_a_matrix(one_rank: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    one_rank.run(run_case, settings(sample_folder / "shards", run, *MORE, "train.steps=2"))
    checkpoint = run / "checkpoints" / "step-0000002"
    files = {path.stem: load_file(path) for path in checkpoint.glob("*.safetensors")}
    assert files.keys() == {"model", "momentum", "exp_avg", "exp_avg_sq"}
    assert "biogpt.layers.1.self_attn.k_proj.weight" in files["momentum"]
    assert files["momentum"].keys() | files["exp_avg"].keys() == files["model"].keys()
    assert not files["momentum"].keys() & files["exp_avg"].keys()

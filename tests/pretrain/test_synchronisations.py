"""A step after warm-up: how often it waits for the device, and that it compiles nothing."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import _disable_current_modes

from model import loss
from model.loss import compiled_chunk_loss
from pretrain import engine as engines
from pretrain import train as loop
from pretrain.evaluate import probe_loss
from pretrain.held_out import Batch
from pretrain.interrupt import StopRequest
from pretrain.recipe import load_recipe
from pretrain.run import Run
from tests.pretrain.runs import run_case, settings, stage_settings
from tests.pretrain.waits import waits
from tests.ranks import Ranks


def take_steps(run: Run, steps: int) -> None:
    """Steps of the loop, without observers."""
    request = StopRequest(run.folder, 0, run.rank)
    for _ in range(steps):
        loop.update(run, request.code, lambda: 0)
    request.close()


def waits_case(chosen: list[str]) -> dict[str, int]:
    """What waits for the device in the third step of a run, with the optimizer and the loss that a GPU gets."""
    plain = torch.optim.AdamW

    def fused(*arguments: Any, **more: Any) -> torch.optim.Optimizer:
        return plain(*arguments, **more | {"fused": True})

    def all_rows(*rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rows

    with patch.object(torch.optim, "AdamW", fused):
        run = loop.build(load_recipe("tiny", chosen), engines.init_distributed())
    read = run.objective.batch

    def on_the_host(numbers: range) -> Batch:
        with _disable_current_modes():
            return read(numbers)

    run.objective.batch = on_the_host  # type: ignore[method-assign]
    with patch.object(loss, "rows_with_a_target", all_rows):
        take_steps(run, 2)
        with waits() as counts:
            take_steps(run, 1)
    run.engine.destroy()
    return {name: count for name, count in counts.items() if count}


def test_what_waits_is_counted() -> None:
    tensor = torch.tensor([1.0, 0.0])
    for wait in (
        lambda: float(tensor[0]), lambda: bool(tensor.any()), lambda: tensor[0].item(), lambda: tensor.tolist(),
        lambda: tensor.nonzero(), lambda: tensor[tensor > 0], lambda: tensor.cpu(), lambda: torch.equal(tensor, tensor),
    ):  # fmt: skip
        with waits() as counts:
            wait()
        assert sum(counts.values()) >= 1, counts
    with waits() as counts:
        (tensor * 2).sum().sqrt()
    assert not sum(counts.values())


@pytest.mark.parametrize(
    ("stage", "clipping", "most"),
    [
        (1, 0, 2),  # DeepSpeed's look at the norm, and ours at all figures
        pytest.param(1, 1, 3, marks=pytest.mark.slow),  # DeepSpeed looks at the norm once more, at once
        pytest.param(2, 0, 3, marks=pytest.mark.slow),  # DeepSpeed looks at all gradients and at the norm
        pytest.param(3, 1, 2, marks=pytest.mark.slow),
    ],
)
def test_a_step_waits_for_the_device_at_its_end_alone(
    stage: int, clipping: int, most: int, one_rank: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """As often for 2 micro-batches as for 8."""
    layout = stage_settings(tmp_path, stage)
    more = [*layout, "train.precision=bf16", f"optimizer.gradient_clipping={clipping}", "model.boundaries=document"]
    counts = []
    for micro_batch_size in (8, 2):
        chosen = [*more, f"train.micro_batch_size={micro_batch_size}"]
        counts += one_rank.run(waits_case, settings(sample_folder / "shards", tmp_path / "run", *chosen))
    assert counts[0] == counts[1] and sum(counts[0].values()) <= most, counts


def graphs_case(chosen: list[str]) -> tuple[int, int, int]:
    """Graphs after the first step of a run with its evaluation, after three more with one, and graph breaks."""
    real = torch.compile
    torch._dynamo.reset()
    compiled_chunk_loss.cache_clear()
    counters.clear()
    try:
        with (
            patch.object(torch, "compile", lambda function, **more: real(function, backend="aot_eager", **more)),
            patch.object(engines, "require_compiler"),
        ):
            run = loop.build(load_recipe("tiny", [*chosen, "train.compile=true"]), engines.init_distributed())
            graphs = []
            for steps in (1, 3):
                take_steps(run, steps)
                probe_loss(run)
                graphs.append(counters["stats"]["unique_graphs"])
            run.engine.destroy()
        return graphs[0], graphs[1], sum(counters["graph_break"].values())
    finally:
        compiled_chunk_loss.cache_clear()
        torch._dynamo.reset()


@pytest.mark.parametrize(
    "more",
    [
        ["model.layerdrop=0.5"],
        pytest.param(["model.boundaries=document"], marks=pytest.mark.slow),
        pytest.param(["model.gradient_checkpointing=full"], marks=pytest.mark.slow),
        pytest.param(["model.gradient_checkpointing=selective"], marks=pytest.mark.slow),
    ],
)
def test_nothing_is_compiled_after_the_first_step(
    more: list[str], one_rank: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """A layer and the loss, each with gradients and without. A resume, which takes a step of its own, adds none."""
    chosen = settings(sample_folder / "shards", tmp_path / "run", *more)
    one_rank.run(run_case, [*chosen, "train.steps=2", "evaluate.max_blocks=2"])
    for run in ("new", "run"):  # the second one is resumed
        found = one_rank.run(graphs_case, [*chosen, f"train.run={tmp_path / run}", "train.steps=10"])[0]
        assert found == (4, 4, 0), run

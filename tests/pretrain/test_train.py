"""The loop: gradients that are not finite, fp16, compiled layers, boundaries of documents."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator

from model.decoder import Decoder
from model.loss import compiled_chunk_loss
from pretrain.engine import loss_scale
from pretrain.export.folder import export
from pretrain.inference import evaluate_folder
from pretrain.recipe import load_recipe
from pretrain.train import train
from tests.pretrain.runs import metrics, run_case, settings, stage_settings, zero_3_settings
from tests.ranks import Ranks


def poisoned_case(chosen: list[str], bad_steps: tuple[int, ...]) -> tuple[int, int, str]:
    """A run in which one rank's gradients are not finite at some steps. Steps done, steps skipped, what was printed."""
    forward = Decoder.forward

    def poisoned(
        self: Decoder, inputs: torch.Tensor, targets: Any = None, *, step: int = 0, micro_step: int = 0
    ) -> Any:
        loss = forward(self, inputs, targets, step=step, micro_step=micro_step)
        bad = self.training and step in bad_steps and micro_step == 1 and torch.distributed.get_rank() == 1
        # The loss stays finite: only the gradients tell.
        return _with_bad_gradient(loss) if bad else loss

    Decoder.forward = poisoned  # type: ignore[method-assign]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            run = train(load_recipe("tiny", chosen))
    finally:
        Decoder.forward = forward  # type: ignore[method-assign]
    return run.step, run.skipped, said.getvalue()


class _BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * float("nan")


def _with_bad_gradient(loss: torch.Tensor) -> torch.Tensor:
    return _BadGradient.apply(loss)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("precision", "stage"),
    [
        ("fp32", 0),
        ("bf16", 2),
        *(pytest.param("fp32", stage, marks=pytest.mark.slow) for stage in (1, 2, 3)),
    ],
)
def test_a_step_with_a_bad_gradient_is_skipped_counted_and_reported(
    precision: str,
    stage: int,
    two_ranks: Ranks,
    sample_folder: Path,
    tmp_path: Path,
) -> None:
    """Step 3's update is left out on both ranks; data and schedule go on as if it had been taken."""
    layout = stage_settings(tmp_path, stage)
    more = [*layout, "train.steps=6", f"train.precision={precision}", "evaluate.max_blocks=2"]
    chosen = settings(sample_folder / "shards", tmp_path / "run", *more)
    results = two_ranks.run(poisoned_case, chosen, (2,))
    assert [result[:2] for result in results] == [(6, 1)] * 2
    assert "step 3/6  warning: skipped, a gradient is not finite (blocks 32 to 47" in results[0][2]
    assert metrics(tmp_path / "run", "train/skipped_steps")[6] == 1
    # The rates are those of our own step, whatever was skipped.
    plain = settings(sample_folder / "shards", tmp_path / "plain", *more)
    two_ranks.run(run_case, plain)
    assert metrics(tmp_path / "run", "train/learning_rate") == metrics(tmp_path / "plain", "train/learning_rate")
    losses, expected = metrics(tmp_path / "run", "train/loss"), metrics(tmp_path / "plain", "train/loss")
    assert [losses[step] for step in (1, 2, 3)] == [expected[step] for step in (1, 2, 3)]
    assert losses[4] != expected[4]


def test_bad_gradients_in_a_row_end_the_run_with_an_explanation(
    two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    chosen = settings(sample_folder / "shards", tmp_path / "run", "train.steps=9", "train.max_skipped_steps=3")
    with pytest.raises(AssertionError, match=r"diverged: at step 4 3 steps in a row .* not finite.*learning_rate"):
        two_ranks.run(poisoned_case, chosen, (1, 2, 3, 4))


def fp16_case(chosen: list[str]) -> tuple[int, float]:
    """A run in fp16, which torch computes on this CPU, slowly, though DeepSpeed says that it is not supported."""
    accelerator: Any = get_accelerator()
    supported, accelerator.is_fp16_supported = accelerator.is_fp16_supported, lambda: True
    try:
        run = train(load_recipe("tiny", chosen))
        return run.skipped, loss_scale(run.engine)["cur_scale"]
    finally:
        accelerator.is_fp16_supported = supported


@pytest.mark.slow
def test_fp16_scales_its_loss_and_resumes_with_the_same_bits(
    two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="this device does not support it; use bf16"):
        two_ranks.run(run_case, settings(sample_folder / "shards", tmp_path / "none", "train.precision=fp16"))
    more = ["train.precision=fp16", "train.steps=30", "checkpoint.every_steps=15", "evaluate.max_blocks=2"]
    run = tmp_path / "run"
    results = two_ranks.run(fp16_case, settings(sample_folder / "shards", run, *more))
    losses = metrics(run, "train/loss")
    assert losses[30] < losses[1] - 0.3
    shutil.copytree(run, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-0000030")
    (tmp_path / "again" / "latest").write_text("step-0000015")
    assert two_ranks.run(fp16_case, settings(sample_folder / "shards", tmp_path / "again", *more)) == results
    assert metrics(tmp_path / "again", "train/loss") == losses


def said_case(chosen: list[str], backend: str = "") -> str:
    """What a run prints. backend: compile with this one of torch's instead of inductor, as if g++ were there."""
    compiler, which, said = torch.compile, shutil.which, io.StringIO()
    if backend:
        torch.compile = lambda function, **more: compiler(function, backend=backend, **more)  # type: ignore[assignment]
        shutil.which = lambda name: name  # type: ignore[assignment]
        compiled_chunk_loss.cache_clear()
        torch._dynamo.reset()
    try:
        with contextlib.redirect_stdout(said):
            run_case(chosen)
    finally:
        torch.compile, shutil.which = compiler, which
        compiled_chunk_loss.cache_clear()
    return said.getvalue()


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_compiled_run_trains_evaluates_and_resumes_as_an_eager_one(
    stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    chosen = zero_3_settings(tmp_path) if stage == 3 else ["deepspeed.stage=1"]
    more = [*chosen, "model.layerdrop=0.3", "evaluate.max_blocks=4", "checkpoint.every_steps=3"]
    losses = {}
    for name, backend in (("eager", ""), ("compiled", "aot_eager")):
        shards, run = sample_folder / "shards", tmp_path / name
        for steps in (3, 6):
            compiled = [f"train.compile={str(bool(backend)).lower()}", f"train.steps={steps}"]
            said = two_ranks.run(said_case, settings(shards, run, *more, *compiled), backend)[0]
            assert f"; {name}, attention flash, recomputation none" in said.splitlines()[0]
        losses[name] = [*metrics(run, "train/loss").values(), *metrics(run, "validation/loss").values()]
    assert len(losses["eager"]) == 6 + 3
    assert losses["compiled"] == pytest.approx(losses["eager"], rel=1e-6)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_inside_documents_is_another_and_its_export_agrees(
    stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """transformers gives the recorded loss and the decoder's logits where it gets the documents' mask and positions."""
    chosen = zero_3_settings(tmp_path) if stage == 3 else ["deepspeed.stage=1"]
    shards, losses = sample_folder / "shards", {}
    for boundaries in ("none", "document"):
        run = tmp_path / boundaries
        more = [*chosen, f"model.boundaries={boundaries}", "train.steps=4", "evaluate.max_blocks=6"]
        said = two_ranks.run(said_case, settings(shards, run, *more))[0]
        assert ("attention flash, document mask" in said) == (boundaries == "document")
        losses[boundaries] = metrics(run, "train/loss")[1]
    assert abs(losses["none"] - losses["document"]) > 1e-3
    counts = export(tmp_path / "document", tmp_path / "hf")["counts"]
    assert counts["held_out"]["loss"] == pytest.approx(metrics(tmp_path / "document", "validation/loss")[4], abs=1e-5)
    folders = [tmp_path / "document", tmp_path / "hf"]
    ours, theirs = (evaluate_folder(folder, shards, "test")["loss"] for folder in folders)
    assert ours == pytest.approx(theirs, abs=1e-5)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"boundaries": "none"}))
    (tmp_path / "hf" / "manifest.json").unlink()
    assert evaluate_folder(tmp_path / "hf", shards, "test")["loss"] != pytest.approx(theirs, abs=1e-3)

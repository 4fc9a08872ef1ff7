"""Whole runs as cases for the distributed harness."""

import contextlib
import io
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.archive.sample import write_sample
from data.common.files import UserError, read_manifest
from data.corpus.build import make_corpus
from data.shards.blocks import TokenStream, TrainingBlocks
from data.shards.build import make_shards
from data.text.train import train_tokenizer
from model.decoder import Decoder
from pretrain import saver
from pretrain import train as loop
from pretrain.checkpoint import CheckpointWriter
from pretrain.metrics import Appended
from pretrain.objectives.kinds import OBJECTIVES
from pretrain.objectives.objective import Objective
from pretrain.recipe import Recipe, load_recipe
from pretrain.run import Run
from pretrain.saver import Saver
from pretrain.schedule import learning_rate
from pretrain.tensor_file import Piece
from pretrain.train import train
from tests.data.common.small_disk import room
from tests.ranks import Ranks

ZERO_3_WITHOUT_THRESHOLDS = {
    "zero_optimization": {
        "stage": 3,
        # Tiny models stay whole below ZeRO-3's thresholds: nothing would be partitioned.
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
        "stage3_prefetch_bucket_size": 0,
    },
    "data_types": {"grad_accum_dtype": "fp32"},
}


def make_sample(folder: Path) -> None:
    """raw/, corpus/, tokenizer/ and shards/ of a small embedded sample: 400 citations, 300 merges."""
    write_sample(folder / "raw", citations=400)
    make_corpus([folder / "raw"], folder / "corpus", 0.05, 0.05, workers=1)
    train_tokenizer(folder / "corpus", folder / "tokenizer", merges=300, min_count=1, workers=1)
    make_shards(folder / "corpus", folder / "tokenizer", folder / "shards", workers=1)


def settings(shards: Path, run: Path, *more: str) -> list[str]:
    """A very small run: 2 layers x 32, blocks of 64 tokens, 16 blocks a step in accumulation, report at each step."""
    small = [
        "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2",
        "model.intermediate_size=64", "model.max_position_embeddings=64", "train.global_batch_tokens=1024",
        "train.micro_batch_size=4", "schedule.warmup_steps=5", "log.every_steps=1",
        f"data.shards={shards}", f"train.run={run}",
    ]  # fmt: skip
    return [*small, *more]


def zero_3_settings(folder: Path) -> list[str]:
    """ZeRO-3 that partitions even a tiny model."""
    path = folder / "zero3.json"
    path.write_text(json.dumps(ZERO_3_WITHOUT_THRESHOLDS))
    return ["deepspeed.stage=3", f"deepspeed.config={path}"]


def stage_settings(folder: Path, stage: int) -> list[str]:
    """A ZeRO stage; the third partitions even a tiny model."""
    return zero_3_settings(folder) if stage == 3 else [f"deepspeed.stage={stage}"]


def plain_start(chosen: list[str]) -> tuple[Recipe, TrainingBlocks, Decoder]:
    """The tiny recipe with these settings, its blocks and its new model, without objective and engine."""
    recipe = load_recipe("tiny", chosen)
    shards = recipe.data_folders()["train"]
    manifest = read_manifest(shards, "shards")
    stream = TokenStream(shards, manifest, "train")
    blocks = TrainingBlocks(stream, recipe.context_length(), recipe.train.seed)
    torch.manual_seed(recipe.train.seed)
    decoder = Decoder(recipe.decoder_config(manifest["counts"]["vocabulary"]))
    return recipe, blocks, decoder


def plain_losses(chosen: list[str], ranks: int) -> list[float]:
    """The run by plain torch: one process, the whole global batch at once."""
    recipe, blocks, decoder = plain_start(chosen)
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


def run_case(chosen: list[str]) -> int:
    """Train the tiny recipe with these settings; the step it ended at."""
    return train(load_recipe("tiny", chosen)).step


def objective_case(recipe: str, chosen: list[str], objective: type[Objective], killed_before: int = 0) -> int:
    """`run_case` of a recipe with another objective in the place of its own; SIGKILL of rank 0 before a step."""
    found, update = load_recipe(recipe, chosen), loop.update
    usual, OBJECTIVES[found.objective.kind] = OBJECTIVES[found.objective.kind], objective

    def killed(run: Run, *arguments: Any) -> dict[str, Any]:
        if run.step + 1 == killed_before and run.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(run, *arguments)

    loop.update = killed  # type: ignore[assignment]
    try:
        return train(found).step
    finally:
        OBJECTIVES[found.objective.kind], loop.update = usual, update


def refused_case(chosen: list[str]) -> str:
    """The mistake that `run_case` names, "" where it runs."""
    try:
        run_case(chosen)
    except UserError as error:
        return str(error)
    return ""


def filled_case(chosen: list[str], disk: Path, step: int, pages: int) -> tuple[str, str]:
    """A run whose disk has room for so many pages while it saves this step: what it printed, and its mistake or ""."""
    save, look, printed = Saver._save, saver.space_fault, io.StringIO()

    def filled(self: Saver, run: Run, probe: float, background: bool) -> None:
        if run.step != step:
            return save(self, run, probe, background)
        saver.space_fault = lambda *_: ""  # there was room when it looked
        with room(disk, pages) if run.rank == 0 else contextlib.nullcontext():
            save(self, run, probe, background)
            self._wait(run)

    Saver._save = filled  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(printed):
            mistake = refused_case(chosen)
        return printed.getvalue(), mistake
    finally:
        Saver._save, saver.space_fault = save, look  # type: ignore[method-assign]


def reported_case(chosen: list[str], disk: Path, name: str, writes: int) -> str:
    """What a run prints whose disk is full at the first writes of one of the files that report it."""
    write, left, printed = Appended.write, [writes], io.StringIO()

    def filled(self: Appended, content: bytes) -> bool:
        left[0] -= name in self.path.name
        with room(disk, 0) if name in self.path.name and left[0] >= 0 else contextlib.nullcontext():
            return write(self, content)

    Appended.write = filled  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stdout(printed):
            run_case(chosen)
    finally:
        Appended.write = write  # type: ignore[method-assign]
    return printed.getvalue()


def started_on_a_full_disk_case(chosen: list[str], disk: Path, pages: int) -> str:
    """The mistake that a run names whose disk has room for so many pages, though it seems to have more."""
    find, loop.space_fault = loop.space_fault, lambda *_: ""
    try:
        with room(disk, pages):
            return refused_case(chosen)
    finally:
        loop.space_fault = find


def metrics(run: Path, name: str) -> dict[int, Any]:
    """step -> value of one name in metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}


def end_of_run(run: Path) -> tuple[dict[int, float], dict[str, str]]:
    """The losses of a run, and the hashes of its last checkpoint's tensors."""
    files = read_manifest(run / "checkpoints" / (run / "latest").read_text(), "checkpoint")["files"]
    tensors = {name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")}
    return metrics(run, "train/loss"), tensors


def write_checkpoint(run: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """A checkpoint of whole tensors, kind by kind, by transformers' names."""
    writer = CheckpointWriter(run, step)
    writer.begin()
    for kind, values in tensors.items():
        writer.add(kind, *whole(values))
    return writer.finish(state)


def whole(tensors: dict[str, Tensor]) -> tuple[dict[str, tuple[int, ...]], list[Piece]]:
    """The shapes and pieces of a file that one rank holds."""
    shapes = {name: tuple(tensor.shape) for name, tensor in sorted(tensors.items())}
    pieces = [
        Piece(name, 0, tensors[name].numel(), lambda name=name: iter([tensors[name].numpy().data])) for name in shapes
    ]
    return shapes, pieces


def back_to_step_4(run: Path, copy: Path) -> Path:
    """The run as a kill after its checkpoint of step 4 would have left it."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step-0000008")
    (copy / "latest").write_text("step-0000004")
    return copy


def trained_run(ranks: Ranks, shards: Path, folder: Path, precision: str, stage: int) -> Path:
    """A run of six steps."""
    run = folder / "run"
    chosen = stage_settings(folder, stage)
    ranks.run(run_case, settings(shards, run, "train.steps=6", f"train.precision={precision}", *chosen))
    return run

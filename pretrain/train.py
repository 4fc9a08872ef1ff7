"""Train a run: `torchrun -m pretrain.train RECIPE [section.key=value ...]`, or `biogpt train`, which calls that.

parse, build, train, close. The loop knows the update; metrics, evaluation and checkpoints are observers beside it.
"""

import argparse
import hashlib
import math
import os
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and __package__ is None:  # `deepspeed pretrain/train.py` puts pretrain/ on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.distributed as dist

from data.blocks import TokenStream, TrainingBlocks
from data.files import UserError, verify_files, write_json
from model.config import DecoderConfig
from model.decoder import Decoder
from pretrain import checkpoint as checkpoints
from pretrain import engine as engines
from pretrain.evaluate import held_out_loss
from pretrain.metrics import Metrics, flops_per_token, peak_flops
from pretrain.recipe import Recipe, check_inputs, data_identity, load_recipe, write_recipe
from pretrain.schedule import learning_rate


@dataclass
class Run:
    """A run in progress: what the loop and its observers share."""

    recipe: Recipe
    folder: Path
    config: DecoderConfig
    data: dict[str, Any]
    """What the data order depends on: recorded in every checkpoint, compared at resume."""
    engine: Any
    optimizer: torch.optim.Optimizer
    device: torch.device
    train: TrainingBlocks
    validation: TokenStream
    step: int = 0
    """Optimizer steps done."""
    held_out: dict[str, Any] = field(default_factory=dict)
    """The last evaluation, with its step."""
    metrics: Metrics | None = None
    """On rank 0."""


def main(arguments: list[str] | None = None) -> None:
    """The program of one rank."""
    parser = argparse.ArgumentParser(prog="pretrain.train", description=__doc__)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    parser.add_argument("recipe", help="a TOML file, or the name of a bundled recipe")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    given = parser.parse_args(arguments)
    try:
        train(load_recipe(given.recipe, given.settings))
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank finds the same mistake
            print(f"biogpt: error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(recipe: Recipe) -> Run:
    """Build or resume the run of the recipe and train it to its last step. Every rank calls it."""
    device = engines.init_distributed()
    run = build(recipe, device)
    try:
        evaluate(run)
        while run.step < recipe.train.steps:
            report = update(run)
            observe(run, report)
        if run.metrics:
            run.metrics.line(run.step, f"done: {run.folder}")
    finally:
        if run.metrics:
            run.metrics.close()
    return run


def build(recipe: Recipe, device: torch.device) -> Run:
    """Everything of a run, from its newest checkpoint where it has one. Raises UserError before anything is written."""
    ranks = dist.get_world_size()
    manifest = check_inputs(recipe, ranks)
    shards, folder = Path(recipe.data.shards), Path(recipe.train.run)
    config = recipe.decoder_config(manifest["counts"]["vocabulary"])
    data = data_identity(recipe)
    resumed = checkpoints.check_resume(folder, config, data)
    if dist.get_rank() == 0:
        verify_files(shards, manifest)
        if resumed:
            checkpoints.verify_checkpoint(resumed)
    training = TrainingBlocks(TokenStream(shards, manifest, "train"), recipe.context_length(), recipe.train.seed)

    torch.manual_seed(recipe.train.seed)
    decoder = Decoder(config)
    state: dict[str, Any] = {"step": 0, "held_out": {}}
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    if resumed:
        state = checkpoints.read_state(resumed)
        tensors = {kind: checkpoints.read_tensors(resumed, kind) for kind in checkpoints.KINDS}
        decoder.load_state_dict(tensors["model"])
    engine, optimizer = engines.build_engine(recipe, decoder, ranks)
    if resumed:
        engines.restore_state(engine, optimizer, tensors, state["step"], device)
    run = Run(
        recipe=recipe,
        folder=folder,
        config=config,
        data=data,
        engine=engine,
        optimizer=optimizer,
        device=device,
        train=training,
        validation=TokenStream(shards, manifest, "validation"),
        step=state["step"],
        held_out=state["held_out"],
    )
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_recipe(recipe, folder / "recipe.toml")
        shutil.copytree(shards / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)
        run.metrics = Metrics(folder, run.step, recipe.train.steps)
        begun = f"resumed from {resumed.name}" if resumed else "new run"
        run.metrics.line(
            run.step, f"{begun}: {config.parameter_count():,} parameters, ZeRO {recipe.deepspeed.stage}, {ranks} ranks"
        )
    return run


def update(run: Run) -> dict[str, float]:
    """One optimizer step on the global batch of `run.step`. Returns its loss in nats a token and what it took."""
    started = time.monotonic()
    recipe, engine = run.recipe, run.engine
    rank, ranks = dist.get_rank(), dist.get_world_size()
    micro_batch_size = recipe.train.micro_batch_size
    rate = learning_rate(recipe, run.step)
    engines.set_learning_rate(engine, rate)
    seed_draws(recipe.train.seed, run.step, rank)
    engine.train()
    total = torch.zeros((), device=run.device)
    for micro_step in range(engine.gradient_accumulation_steps()):
        first = run.step * recipe.global_batch_size() + (micro_step * ranks + rank) * micro_batch_size
        inputs, targets = run.train.batch(range(first, first + micro_batch_size))
        loss = engine(inputs.to(run.device), targets.to(run.device), step=run.step, micro_step=micro_step)
        total += loss.detach()
        # DeepSpeed averages over ranks and accumulation, so this is the sum over the global batch by its tokens.
        engine.backward(loss / targets.numel())
        engine.step()
    dist.all_reduce(total)
    run.step += 1
    return {
        "loss": total.item() / recipe.train.global_batch_tokens,
        "learning_rate": rate,
        "gradient_norm": engines.gradient_norm(engine),
        "tokens_per_second": recipe.train.global_batch_tokens / (time.monotonic() - started),
    }


def seed_draws(seed: int, step: int, rank: int) -> None:
    """Make dropout's draws a function of (seed, step, rank), so that a resumed run repeats them."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def observe(run: Run, report: dict[str, float]) -> None:
    """What stands beside the loop, after a step: report, evaluation, checkpoint."""
    recipe, last = run.recipe, run.step == run.recipe.train.steps
    if not math.isfinite(report["loss"]):
        raise FloatingPointError(f"the loss of step {run.step} is {report['loss']}; the last checkpoint is whole")
    if run.metrics and (last or run.step % recipe.log.every_steps == 0):
        speed = report["tokens_per_second"]
        text = f"loss {report['loss']:.4f}  lr {report['learning_rate']:.2e}  {speed:,.0f} tokens/s"
        peak = peak_flops()
        if peak:
            flops = flops_per_token(run.config, recipe.context_length())
            report["mfu"] = speed * flops / (peak * dist.get_world_size())
            text += f"  MFU {report['mfu']:.1%}"
        finite = {f"train/{name}": value for name, value in report.items() if math.isfinite(value)}
        run.metrics.write(run.step, finite)
        run.metrics.line(run.step, text, passing=True)
    save = last or run.step % recipe.checkpoint.every_steps == 0
    if save or run.step % recipe.evaluate.every_steps == 0:
        evaluate(run)
    if save:
        save_checkpoint(run)


def evaluate(run: Run) -> None:
    """The held-out loss of the weights as they are; nothing where this step has it already."""
    if run.held_out.get("step") == run.step:
        return
    run.engine.eval()
    recipe = run.recipe
    result = held_out_loss(
        run.engine,
        run.validation,
        recipe.context_length(),
        recipe.train.micro_batch_size,
        run.device,
        recipe.evaluate.max_blocks,
    )
    run.held_out = {"step": run.step, **result}
    if run.metrics:
        run.metrics.write(run.step, {f"validation/{name}": value for name, value in result.items()})
        run.metrics.line(
            run.step,
            f"held-out loss {result['loss']:.4f}  perplexity {result['perplexity']:.2f}"
            f"  bits per byte {result['bits_per_byte']:.4f}",
        )


def save_checkpoint(run: Run) -> None:
    """Write a checkpoint. Every rank takes part in gathering the state, rank 0 writes."""
    writer = checkpoints.CheckpointWriter(run.folder, run.step) if dist.get_rank() == 0 else None
    for kind in checkpoints.KINDS:
        tensors = engines.gather_state(run.engine, run.optimizer, kind)
        if writer:
            writer.add(kind, tensors)
    if writer and run.metrics:
        state = {
            "step": run.step,
            "held_out": run.held_out,
            "model": vars(run.config),
            "data": run.data,
            "precision": run.recipe.train.precision,
        }
        path = writer.finish(state, run.recipe.checkpoint.keep_last)
        write_json(run.folder / "manifest.json", {"kind": "run", "version": 1, **state})
        run.metrics.line(run.step, f"checkpoint {path}")
    dist.barrier()


if __name__ == "__main__":
    main()

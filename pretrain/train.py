"""Train a run: `torchrun -m pretrain.train RECIPE [section.key=value ...]`, or `biogpt train`, which calls that.

The file reads in the order of a run: parse, build, train, close. The loop computes updates; observers do the rest.
"""

import argparse
import hashlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

if __name__ == "__main__" and __package__ is None:  # `deepspeed pretrain/train.py` puts pretrain/ on the path
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.distributed as dist

from data.common.disk import disk_full_named
from data.common.files import UserError, write_json
from data.common.lease import Lease, hold
from pretrain import ERROR_FILE, training_data
from pretrain import engine as engines
from pretrain.checkpoint import Diverged, check_state, identity, read_model, space_fault
from pretrain.evaluate import Evaluator
from pretrain.held_out import to_device
from pretrain.interrupt import REASONS, StopRequest
from pretrain.metrics import Reporter
from pretrain.objectives.kinds import make_objective
from pretrain.objectives.objective import Objective
from pretrain.recipe import Recipe, load_recipe, write_recipe
from pretrain.run import Observer, Run
from pretrain.run_folder import begin_run_folder, check_run_folder
from pretrain.saver import Saver, load_newest, on_rank_0
from pretrain.schedule import learning_rate
from pretrain.tensor_file import Fragment, Layout, read_fragments
from pretrain.trace import Tracer
from pretrain.watchdog import Watchdog

OWN_WORK = ("data", "forward")
"""The parts of a step in which a rank does not wait for the others, as it does in backward passes.

At ZeRO 3 the forward passes gather weights from all ranks, so a slow rank slows all of them, and only slow data tells
the ranks apart.
"""


def main(arguments: list[str] | None = None, program: Callable[[Recipe], Any] | None = None) -> None:
    """The program of one rank: `train`, or another one of a recipe."""
    parser = argparse.ArgumentParser(
        prog="pretrain.train", description="One rank of a run; torchrun or deepspeed starts it for each GPU."
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    parser.add_argument("recipe", help="a TOML file, or the name of a bundled recipe")
    parser.add_argument("settings", nargs="*", metavar="section.key=value")
    given = parser.parse_args(arguments)
    try:
        (program or train)(load_recipe(given.recipe, given.settings))
        dist.destroy_process_group()  # not after an error: other ranks may wait for this one inside a collective
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # every rank finds the same mistake
            print(f"biogpt: error: {error}", file=sys.stderr, flush=True)
            if ERROR_FILE in os.environ:
                Path(os.environ[ERROR_FILE]).write_text(str(error), encoding="utf-8")
        raise SystemExit(2) from None
    except Exception as error:
        rank = os.environ.get("RANK", "0")
        print(f"biogpt: rank {rank} crashed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        raise


def train(recipe: Recipe) -> Run:
    """Start or resume the run of the recipe, and train it to its last step or until it should stop. On every rank.

    Rank 0 holds the lease of the run's folder meanwhile. Raises UserError on every rank if another process holds it.
    """
    device = engines.init_distributed()
    with ExitStack() as stack:
        lease = on_rank_0(held, Path(recipe.train.run), stack)
        run = build(recipe, device, lease)
        if run.ending:  # nothing is left to do, so nothing is written
            if run.rank == 0:
                past = f", past train.steps = {recipe.train.steps}" if run.step > recipe.train.steps else ""
                print(f"done: {run.folder} is at step {run.step}{past}", flush=True)
            return run
        on_rank_0(begin, recipe, run.objective, run.step)
        return loop(run)


def held(folder: Path, stack: ExitStack) -> Lease:
    """The lease of a run's folder, held until the stack ends. DiskFull if the disk has no room for it."""
    with disk_full_named(folder, str(folder)):
        return stack.enter_context(hold(folder))


def loop(run: Run) -> Run:
    """Take the steps that are left, and let the observers watch each of them."""
    request = StopRequest(run.folder, run.recipe.train.stop_after_minutes, run.rank)
    reporter = Reporter(run)
    evaluator = Evaluator(reporter)
    saver = Saver(run, reporter, evaluator)
    observers: list[Observer] = [Watchdog(run), reporter, evaluator, saver, Tracer(reporter)]
    try:
        for observer in observers:
            observer.begin(run)
        while not run.ending:
            report = update(run, request.code, saver.code, observers)
            with run.stopwatch.part("observers"):
                for observer in observers:
                    observer.after_step(run, report)
        reporter.say(run, f"stopped by {run.stop_reason}: {run.folder}" if run.stop_reason else f"done: {run.folder}")
    finally:
        request.close()
        for observer in observers:
            observer.close()
    return run


def build(recipe: Recipe, device: torch.device, lease: Lease | None = None) -> Run:
    """Build a run, from its newest whole checkpoint if it has one. Writes nothing. Raises UserError."""
    rank, ranks, folder = dist.get_rank(), dist.get_world_size(), Path(recipe.train.run)
    on_rank_0(check_run_folder, folder)
    objective = make_objective(recipe)
    objective.check()
    on_rank_0(objective.verify)
    resumed, state = load_newest(folder)
    check_state(resumed, state, recipe, objective)

    model = objective.build_model()
    if resumed:
        read_model(resumed, model)
    else:
        objective.load_encoder(model)
        if recipe.model.weights:
            objective.load_weights(model, Path(recipe.model.weights))
    engine, optimizer = engines.build_engine(recipe, model, ranks)
    fault = on_rank_0(space_fault, folder, optimizer.numbers, ranks)
    if fault:
        raise UserError(fault)
    if resumed:
        batch = objective.batch(range(recipe.train.micro_batch_size))
        updates = state["step"] - state["skipped"]
        layout = Layout(model)

        def read(kind: str, fragments: Iterable[Fragment]) -> None:
            read_fragments(resumed / f"{kind}.safetensors", layout, fragments)

        engines.restore_state(engine, optimizer, read, batch, updates, device)
        engines.restore_loss_scale(engine, state["loss_scale"])
    same_data = resumed and state["data"] == objective.identity()
    return Run(
        recipe=recipe,
        objective=objective,
        folder=folder,
        lease=lease,
        engine=engine,
        optimizer=optimizer,
        device=device,
        rank=rank,
        ranks=ranks,
        resumed_from=resumed.name if resumed else "",
        step=state.get("step", 0),
        skipped=state.get("skipped", 0),
        held_out=state.get("held_out", {}),
        best=state.get("best", {}),
        recorded_probe=state["probe"] if same_data else {},
    )


def begin(recipe: Recipe, objective: Objective, step: int) -> None:
    """Write what a run's folder holds from the start. Raises DiskFull."""
    folder = Path(recipe.train.run)
    warn_of_rate_change(recipe, folder, step)
    with disk_full_named(folder, str(folder)):
        begin_run_folder(folder, identity(recipe, objective), objective.tokenizer, objective.encoder)
        write_json(folder / training_data.FILE, training_data.stages_of_run(folder, recipe, objective))
        write_recipe(recipe, folder / "recipe.toml")


def warn_of_rate_change(recipe: Recipe, folder: Path, step: int) -> None:
    """Say so if the learning rate of a resumed run jumps, because its schedule was changed."""
    if not step:
        return
    try:
        before = learning_rate(load_recipe(str(folder / "recipe.toml")), step)
    except UserError:  # a recipe of another version
        return
    now = learning_rate(recipe, step)
    if not 0.9 * before <= now <= 1.1 * before:
        print(
            f"biogpt: warning: with these settings the learning rate jumps from {before:.2e} to {now:.2e} at step"
            f" {step}",
            flush=True,
        )


def update(
    run: Run, stop_code: Callable[[], int], saver_code: Callable[[], int], observers: Iterable[Observer] = ()
) -> dict[str, Any]:
    """One optimizer step on the global batch of `run.step`. Returns its loss in nats a target and other figures.

    stop_code, saver_code: what this rank tells the others (`StopRequest.code`, `Saver.code`).
    observers: they may look at the gradients before the update.
    """
    started = time.monotonic()
    recipe, engine, objective = run.recipe, run.engine, run.objective
    micro_batch_size, size = recipe.train.micro_batch_size, recipe.global_batch_size()
    rate = learning_rate(recipe, run.step)
    run.optimizer.set_learning_rate(rate)
    seed_draws(recipe.train.seed, run.step, run.rank)
    engine.train()
    total = torch.zeros((), device=run.device)
    norm, applied, part = torch.tensor(math.nan), False, run.stopwatch.part
    accumulation = engine.gradient_accumulation_steps()
    counted = objective.counted_targets(range(run.step * size, (run.step + 1) * size))
    blocks = f"{run.step * size} to {(run.step + 1) * size - 1}"
    if not counted:
        raise UserError(f"step {run.step + 1}: none of its examples ({blocks}) has a target; check the data")
    for micro_step in range(accumulation):
        run.stamp(f"step {run.step + 1}, micro-batch {micro_step + 1} of {accumulation}")
        first = run.step * size + (micro_step * run.ranks + run.rank) * micro_batch_size
        with part("data"):
            batch = to_device(objective.batch(range(first, first + micro_batch_size)), run.device)
        with part("forward"):
            loss = engine(*batch, step=run.step, micro_step=micro_step)
            total += loss.detach()
        with part("backward"):
            # DeepSpeed averages over ranks and accumulation, so this is the sum over the global batch by its targets.
            engine.backward(loss / (counted / (run.ranks * accumulation)))
        if micro_step < accumulation - 1:
            engine.step()
        else:
            run.stamp(f"step {run.step + 1}, the update of the weights")
            with part("observers"):
                for observer in observers:
                    observer.before_update(run)
            with part("optimizer"):
                norm, applied = engines.finish_step(engine)
    loss, norm, told = share(total, norm, [stop_code(), saver_code(), run.stopwatch.since_read(*OWN_WORK)])
    run.stopwatch.read()  # a GPU has passed everything: the loss is known
    stop_codes, saver_codes, rank_seconds = told
    run.step += 1
    run.stop_reason = REASONS[int(next((code for code in stop_codes if code), 0))]
    run.skipped += not applied
    run.skipped_in_a_row = 0 if applied else run.skipped_in_a_row + 1
    if run.skipped_in_a_row == recipe.train.max_skipped_steps:
        skipped = f"{run.skipped_in_a_row} steps in a row had gradients that are not finite"
        hint = " (train.precision=bf16 may help)" if recipe.train.precision == "fp16" else ""
        raise Diverged(run.folder, run.step, f"{skipped}{hint}, the last on blocks {blocks}")
    return {
        "loss": loss / counted,
        "learning_rate": rate,
        "gradient_norm": norm,
        "applied": applied,
        "blocks": blocks,
        "seconds": time.monotonic() - started,
        "saver_codes": saver_codes,
        "rank_seconds": rank_seconds,
    }


def share(total: torch.Tensor, norm: torch.Tensor, own: list[float]) -> tuple[float, float, list[list[float]]]:
    """The sum of all ranks' losses, the norm of the gradients, and for each of our own numbers those of all ranks.

    norm: the same on all ranks. This is our only all-reduce in a step, and our only wait for the device.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    numbers = torch.zeros(2 + ranks * len(own), dtype=torch.float64)
    numbers[2 + rank :: ranks] = torch.tensor(own, dtype=torch.float64)
    (shared,) = to_device((numbers,), total.device)
    shared[0] = total
    if rank == 0:
        shared[1].copy_(norm, non_blocking=True)
    dist.all_reduce(shared)
    loss, shared_norm, *told = shared.tolist()
    return loss, shared_norm, [told[first : first + ranks] for first in range(0, len(told), ranks)]


def seed_draws(seed: int, step: int, rank: int) -> None:
    """Make dropout's draws a function of (seed, step, rank), so that a resumed run repeats them."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


if __name__ == "__main__":
    main()

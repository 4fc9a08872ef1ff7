"""`biogpt train --dry-run`: what a start checks, two short steps on data of full size, and nothing left behind.

The steps have at most two micro-batches, so that they take seconds where a whole step takes an hour. A second
micro-batch is added to kept gradients, which takes the most memory. The steps begin with new weights: a checkpoint of
the run is verified and compared with the recipe by `biogpt train`, but not loaded.
"""

from pathlib import Path
from typing import Any

import torch.distributed as dist

from data.common.disk import room
from pretrain import engine as engines
from pretrain.checkpoint import checkpoint_bytes
from pretrain.evaluate import probe_loss
from pretrain.metrics import memory_figures
from pretrain.recipe import Recipe
from pretrain.run import Run
from pretrain.start import in_words
from pretrain.train import build, main, update

NOWHERE = ".dry-run"
"""A folder inside that of the run, so on the same disk. It is never made."""


def dry_run(recipe: Recipe) -> None:
    """Build the run of the recipe, take two short steps and evaluate a batch; rank 0 prints what came of it.

    On every rank. Raises what `build` and `update` raise. Writes nothing.
    """
    device = engines.init_distributed()
    ranks = dist.get_world_size()
    whole = recipe.gradient_accumulation_steps(ranks)
    micro_batches = min(whole, 2)
    run = build(shortened(recipe, micro_batches, ranks), device)
    reports = [update(run, lambda: 0, lambda: 0) for _ in range(2)]
    held_out = probe_loss(run)
    peaks = [0.0] * ranks
    dist.all_gather_object(peaks, max(memory_figures(device).values()))
    if run.rank == 0:
        for line in lines(recipe, run, reports[-1], micro_batches, whole):
            print(line)
        print(f"held-out loss of the first examples: {held_out:.4f}")
        kind = "of the GPU" if device.type == "cuda" else "of the process"
        print(f"memory {kind}, the rank with most: {max(peaks):.2f} GiB", flush=True)


def shortened(recipe: Recipe, micro_batches: int, ranks: int) -> Recipe:
    """The recipe with so many micro-batches in a step, as a new run."""
    examples = micro_batches * ranks * recipe.train.micro_batch_size
    records = {"global_batch_examples": examples}
    blocks = {"global_batch_tokens": examples * recipe.context_length()}
    changed = (records if recipe.on_records() else blocks) | {"run": str(Path(recipe.train.run) / NOWHERE)}
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changed)})


def lines(recipe: Recipe, run: Run, report: dict[str, Any], micro_batches: int, whole: int) -> list[str]:
    """What was found, a line each."""
    train, keep = recipe.train, recipe.checkpoint
    disk, free = room(Path(train.run))
    checkpoint = checkpoint_bytes(run.optimizer.numbers, run.ranks)
    most = keep.keep_last + keep.keep_best + 1  # one is written before another is removed
    size = run.recipe.global_batch_size()
    speed = run.objective.tokens(range((run.step - 1) * size, run.step * size)) / report["seconds"]
    return [
        in_words(run),
        f"a step: {whole} micro-batches of {train.micro_batch_size} x {recipe.context_length()} tokens on each of"
        f" {run.ranks} ranks, {recipe.global_batch()} in all",
        f"disk {disk}: {free / 1e9:.1f} GB free; a checkpoint takes {checkpoint / 1e9:.2f} GB, and up to {most} are"
        f" there at once{' and those of keep_every_steps' if keep.keep_every_steps else ''}",
        f"two steps of {micro_batches} of these micro-batches: loss {report['loss']:.4f}, gradient norm"
        f" {report['gradient_norm']:.4f}; the second took {report['seconds']:.2f} s, {speed:,.0f} tokens/s",
    ]


if __name__ == "__main__":
    main(program=dry_run)

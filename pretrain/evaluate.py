"""Held-out loss, perplexity and bits per byte."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from data.shards.blocks import IGNORED, TokenStream, held_out_batch
from pretrain.metrics import Reporter
from pretrain.run import Observer, Run

PROBE_BLOCKS = 8
"""The first blocks of the held-out stream, whose loss every checkpoint records and every resume and export compares."""
NegativeLogLikelihood = Callable[[Tensor, Tensor], Tensor]
"""(inputs (B, T), targets (B, T)) -> summed negative log-likelihood in nats."""


@torch.no_grad()
def held_out_loss(
    model: NegativeLogLikelihood,
    stream: TokenStream,
    context_length: int,
    batch_size: int,
    device: torch.device,
    max_blocks: int = 0,
) -> dict[str, Any]:
    """Loss in nats a token over a stream cut into blocks, with its perplexity and bits per byte of text.

    All ranks take part with equal numbers of batches, as ZeRO-3 needs. max_blocks: the first so many; 0: all.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    blocks = math.ceil(len(stream) / context_length)
    blocks = min(blocks, max_blocks) if max_blocks else blocks
    totals = torch.zeros(2, dtype=torch.float64)
    for start in range(0, blocks, batch_size * ranks):
        first = start + rank * batch_size
        inputs, targets = held_out_batch(stream, context_length, range(first, first + batch_size))
        targets[max(blocks - first, 0) :] = IGNORED
        totals[0] += model(inputs.to(device), targets.to(device)).double().cpu()
        totals[1] += (targets != IGNORED).sum()
    if ranks > 1:
        totals = totals.to(device)
        dist.all_reduce(totals)
    loss, tokens = float(totals[0] / totals[1]), int(totals[1])
    bits_per_token, tokens_per_byte = loss / math.log(2), len(stream) / max(stream.text_bytes, 1)
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": bits_per_token * tokens_per_byte,
        "tokens": tokens,
    }


def evaluate_run(run: Run, max_blocks: int) -> dict[str, Any]:
    """The held-out loss of a run's weights as they are. Moves no state of the run."""
    run.engine.eval()
    return held_out_loss(
        run.engine,
        run.validation,
        run.recipe.context_length(),
        run.recipe.train.micro_batch_size,
        run.device,
        max_blocks,
    )


class Evaluator(Observer):
    """Evaluates at step 0, every n-th step, before each checkpoint and after the last step.

    Not where the run is stopped before: a launcher may kill soon, and the checkpoint comes first.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter

    def begin(self, run: Run) -> None:
        """The point of the curve at step 0; a resumed run has its own."""
        self._evaluate(run)

    def after_step(self, run: Run, report: dict[str, Any]) -> None:
        """Where it is due."""
        recipe = run.recipe
        due = run.step % recipe.evaluate.every_steps == 0 or run.step % recipe.checkpoint.every_steps == 0
        if (due and not run.stop_reason) or run.step == recipe.train.steps:
            self._evaluate(run)

    def _evaluate(self, run: Run) -> None:
        if run.held_out.get("step") == run.step:
            return
        result = evaluate_run(run, run.recipe.evaluate.max_blocks)
        run.held_out = {"step": run.step, **result}
        if not run.best or result["loss"] < run.best["loss"]:
            run.best = run.held_out
        self._reporter.say(
            run,
            f"held-out loss {result['loss']:.4f}  perplexity {result['perplexity']:.2f}"
            f"  bits per byte {result['bits_per_byte']:.4f}",
            **{f"validation__{name}": value for name, value in result.items()},
        )

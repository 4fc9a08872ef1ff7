"""Held-out examples, and the loss of a model over them."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PROBE_EXAMPLES = 8
"""Every checkpoint records the loss of the first held-out examples of each source. Every resume and export compares
with it."""
Batch = tuple[Tensor, ...]
SummedLoss = Callable[..., Tensor]
"""The tensors of a batch -> the summed loss of its counted targets in nats, a scalar."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The tensors of a batch on our device. On a GPU the copy is queued and the host does not wait for it.

    Only a copy from pinned memory is. Each tensor gets memory of its own, which torch's allocator gives out again when
    the GPU has read it.
    """
    if device.type != "cuda":
        return tuple(tensor.to(device) for tensor in batch)
    return tuple(tensor.pin_memory().to(device, non_blocking=True) for tensor in batch)


class HeldOut(ABC):
    """The held-out examples of one source of data, in a fixed order."""

    examples: int
    """How many there are."""
    weight: float = 1.0
    """Its share in the held-out loss of a run."""
    tokens_per_byte: float = 0.0
    """Counted targets for each byte of text, in UTF-8; 0 if the targets are not the tokens of a text."""

    @abstractmethod
    def batch(self, numbers: range, batch_size: int) -> Batch:
        """A batch of `batch_size` rows: these examples, then rows without a counted target."""

    @abstractmethod
    def counted_targets(self, numbers: range) -> int:
        """How many targets of these examples count in the loss."""

    @abstractmethod
    def figures(self, loss: float) -> dict[str, float]:
        """Other figures that follow from the mean loss of a counted target, such as perplexity, by name."""


def held_out_loss(
    model: SummedLoss, sources: dict[str, HeldOut], batch_size: int, device: torch.device, max_examples: int = 0
) -> dict[str, Any]:
    """The figures of `held_out_figures`, of one source or of several (`combined_figures`).

    All ranks must call it. max_examples: use at most this many of each; 0 means all.
    """
    figures = {}
    for name, held_out in sources.items():
        examples = range(min(held_out.examples, max_examples or held_out.examples))
        summed = summed_loss(model, held_out, batch_size, device, examples)
        figures[name] = held_out_figures(held_out, summed, examples)
    return combined_figures(sources, figures)


def combined_figures(sources: dict[str, HeldOut], figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The figures of the only source; or the loss by the sources' weights, all tokens, and "NAME/loss" and so on.

    If all sources are text, also the perplexity and the bits per byte of their mixture. A weight is a share of its
    tokens, so the mixture has bytes for each token by the same weights.
    """
    if len(figures) == 1:
        return next(iter(figures.values()))
    loss = sum(sources[name].weight * found["loss"] for name, found in figures.items())
    tokens = sum(found["tokens"] for found in figures.values())
    each = {f"{name}/{figure}": value for name, found in figures.items() for figure, value in found.items()}
    mixture = {}
    if all(source.tokens_per_byte for source in sources.values()):
        bytes_per_token = sum(source.weight / source.tokens_per_byte for source in sources.values())
        mixture = text_figures(loss, 1 / bytes_per_token)
    return {"loss": loss, **mixture, "tokens": tokens, **each}


def text_figures(loss: float, tokens_per_byte: float) -> dict[str, float]:
    """Perplexity, and bits per byte of text, of a loss in nats a token."""
    return {"perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": loss / math.log(2) * tokens_per_byte}


def held_out_figures(held_out: HeldOut, summed: float, examples: range) -> dict[str, Any]:
    """The mean loss of the counted targets in nats, their number ("tokens") and the source's other figures.

    summed: the summed loss of the examples.
    """
    counted = held_out.counted_targets(examples)
    loss = summed / counted
    return {"loss": loss, **held_out.figures(loss), "tokens": counted}


@torch.no_grad()
def summed_loss(model: SummedLoss, held_out: HeldOut, batch_size: int, device: torch.device, examples: range) -> float:
    """The summed loss of these examples over all ranks, in nats.

    All ranks must call it, and all run the same number of batches, as ZeRO-3 needs.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total = torch.zeros(1, dtype=torch.float64, device=device)  # there, so that no batch waits for its loss
    for start in range(examples.start, examples.stop, batch_size * ranks):
        first = min(start + rank * batch_size, examples.stop)
        batch = held_out.batch(range(first, min(first + batch_size, examples.stop)), batch_size)
        total += model(*to_device(batch, device)).double()
    if ranks > 1:
        dist.all_reduce(total)
    return float(total)

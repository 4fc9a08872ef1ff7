"""Held-out examples, the loss of a model over them, and the scores of its predictions."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

PROBE_EXAMPLES = 8
"""Every checkpoint records the loss of the first held-out examples of each source. Every resume and export compares
with it."""
Batch = tuple[Tensor, ...]
SummedLoss = Callable[..., Any]
"""The tensors of a batch -> the summed loss of its counted targets in nats, a scalar; or that and the model's outputs,
if they are scored (`HeldOut.score`)."""


@dataclass(frozen=True)
class Outcome:
    """What a model made of some held-out examples."""

    loss: float
    """Summed, in nats."""
    predictions: list[np.ndarray]
    """What `HeldOut.predict` found for each example; empty if the model gives no more than its loss."""

    def __add__(self, other: "Outcome") -> "Outcome":
        return Outcome(self.loss + other.loss, self.predictions + other.predictions)


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

    score: str = ""
    """Name of the figure that chooses the best checkpoint, the highest. "" means that the lowest loss does."""
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

    def predict(self, outputs: Tensor) -> Tensor:
        """The model's decisions for each row of a batch, integers, from its outputs."""
        raise NotImplementedError

    def scores(self, examples: range, predictions: list[np.ndarray]) -> dict[str, float]:
        """Figures of what was predicted for these examples, by name; `score` is one of them."""
        raise NotImplementedError


class OtherSources(HeldOut):
    """Held-out sources and targets, each target with the source of another example of its batch.

    If the loss of the targets is no higher than with their own sources, the model does not use them.
    """

    def __init__(self, held_out: HeldOut) -> None:
        self._held_out, self.examples, self.weight = held_out, held_out.examples, held_out.weight

    def batch(self, numbers: range, batch_size: int) -> Batch:
        """As of the examples, with each source one row further. An example alone in its batch keeps its source."""
        source_ids_BS, labels_BT = self._held_out.batch(numbers, batch_size)
        rows = torch.arange(batch_size)
        rows[: len(numbers)] = rows[: len(numbers)].roll(1)
        return source_ids_BS[rows], labels_BT

    def counted_targets(self, numbers: range) -> int:
        """As of the examples."""
        return self._held_out.counted_targets(numbers)

    def figures(self, loss: float) -> dict[str, float]:
        """None."""
        return {}


def held_out_loss(
    model: SummedLoss, sources: dict[str, HeldOut], batch_size: int, device: torch.device, max_examples: int = 0
) -> dict[str, Any]:
    """The figures of `held_out_figures`, of one source or of several (`combined_figures`).

    All ranks must call it. max_examples: use at most this many of each; 0 means all.
    """
    figures = {}
    for name, held_out in sources.items():
        examples = range(min(held_out.examples, max_examples or held_out.examples))
        outcome = run_held_out(model, held_out, batch_size, device, examples)
        figures[name] = held_out_figures(held_out, outcome, examples)
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


def held_out_figures(held_out: HeldOut, outcome: Outcome, examples: range) -> dict[str, Any]:
    """The mean loss of the counted targets in nats, their number ("tokens") and the source's other figures."""
    counted = held_out.counted_targets(examples)
    loss = outcome.loss / counted
    scores = held_out.scores(examples, outcome.predictions) if held_out.score else {}
    return {"loss": loss, **held_out.figures(loss), **scores, "tokens": counted}


def rank(held_out: dict[str, Any]) -> tuple[float, float]:
    """Orders recorded evaluations, the best first: by `HeldOut.score`, then by loss. One without a loss is last."""
    loss = held_out.get("loss", math.inf)
    if not math.isfinite(loss):  # an old record's may be NaN
        return math.inf, math.inf
    return (-held_out[held_out["score"]] if "score" in held_out else 0.0), loss


@torch.no_grad()
def run_held_out(
    model: SummedLoss, held_out: HeldOut, batch_size: int, device: torch.device, examples: range
) -> Outcome:
    """The summed loss of these examples over all ranks, and their predictions if they are scored.

    All ranks must call it, and all run the same number of batches, as ZeRO-3 needs.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    total = torch.zeros(1, dtype=torch.float64, device=device)  # there, so that no batch waits for its loss
    predicted = []
    for start in range(examples.start, examples.stop, batch_size * ranks):
        first = min(start + rank * batch_size, examples.stop)
        batch = held_out.batch(range(first, min(first + batch_size, examples.stop)), batch_size)
        found = model(*to_device(batch, device))
        if held_out.score:
            found, outputs = found
            predicted.append(held_out.predict(outputs))
        total += found.double()
    everywhere = [[batch.cpu().numpy() for batch in predicted]]
    if ranks > 1:
        dist.all_reduce(total)
        everywhere *= ranks
        if held_out.score:
            dist.all_gather_object(everywhere, everywhere[0])
    rows = [row for batches in zip(*everywhere, strict=True) for batch in batches for row in batch]
    return Outcome(float(total), rows[: len(examples)])  # the last batches are filled up

"""What a run learns: which model it trains, on which batches, how it is evaluated, and how its export is proven.

The loop, the engine, evaluation, the checkpoints and the export know only `Objective`. To add an objective, write a
subclass in a file beside this one, enter it in OBJECTIVES (`kinds.py`) and in the recipe's choices of `objective.kind`,
and test it.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.common.files import read_manifest
from model.architecture import Architecture
from pretrain.held_out import Batch, HeldOut, SummedLoss
from pretrain.recipe import Recipe

BenchmarkCounts = dict[str, dict[str, dict[str, int]]]
"""Benchmark -> split -> what a corpus counted of its items."""


class Exported(NamedTuple):
    """A model as transformers loads it from an exported folder."""

    outputs: Any
    """The tensors of a batch -> what `Objective.outputs` gives for our model."""
    loss: SummedLoss
    model: Any
    """transformers' model itself, which the two call."""


class Objective(ABC):
    """One thing that a run can learn. Examples are numbered over the whole run; step s has the s-th global batch."""

    config: Any
    """The model's shape, as `Architecture.config`."""
    tokenizer: Path
    """Folder of the tokenizer that made the data; the run and its export get a copy."""

    encoder: Path | None = None
    """Folder of an encoder with a tokenizer of its own; the run and its export get copies of its configuration."""

    @abstractmethod
    def __init__(self, recipe: Recipe) -> None:
        """Raises UserError if the recipe does not fit the data."""

    @abstractmethod
    def check(self) -> None:
        """Raises UserError if there is too little data to train on."""

    @abstractmethod
    def verify(self) -> None:
        """Compare all files of the data with their sha256. Raises UserError that names a damaged one."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What the examples and their order depend on, besides the step. A resumed run must have the same.

        The keys "shards" or "records", hashes of the data's content, and "weights" may differ with `data.allow_other`.
        """

    @abstractmethod
    def held_out(self, split: str = "validation") -> dict[str, HeldOut]:
        """The held-out examples of a split: name of a source -> those of it. Raises UserError if one is empty."""

    @abstractmethod
    def describe(self) -> tuple[str, dict[str, str]]:
        """What the model card says about the kind of model, in a phrase, and about the training data, a row each."""

    def corpora(self) -> dict[str, dict[str, Any]]:
        """The manifests of the corpora that the training data come from, by the source's name, as far as known."""
        return {}

    def benchmarks(self) -> BenchmarkCounts:
        """What is known of benchmarks' items in the training data."""
        return {}

    @abstractmethod
    def build_model(self) -> Architecture:
        """The model with its initial weights."""

    @abstractmethod
    def load_weights(self, model: Architecture, path: Path) -> None:
        """Load the weights that a new run starts with. Raises UserError that names what does not fit."""

    def load_encoder(self, model: Architecture) -> None:  # noqa: B027  (most have none)
        """Load the weights of `encoder`, with which a new run starts. Raises UserError that names what does not fit."""

    @abstractmethod
    def batch(self, numbers: range) -> Batch:
        """The training examples with these numbers. The model called with it gives the summed loss of its targets."""

    @abstractmethod
    def counted_targets(self, numbers: range) -> int:
        """How many targets of these examples count in the loss, known without computing it.

        Every rank asks for the whole global batch, so this must be a pure function of the numbers.
        """

    def tokens(self, numbers: range) -> int:
        """How many tokens these examples have, without padding."""
        return self.counted_targets(numbers)

    def warnings(self) -> list[str]:
        """What the user should know of the data, a line each."""
        return []

    @abstractmethod
    def epochs(self, examples: int) -> dict[str, float]:
        """How often the first so many examples of the run go through each source of data, by its name."""

    @abstractmethod
    def outputs(self, model: Architecture, batch: Batch) -> Tensor:
        """The model's outputs for a batch, which an export must reproduce."""

    @abstractmethod
    def load_exported(self, folder: Path, device: torch.device) -> Exported:
        """The model that transformers loads from an exported folder."""


def read_corpora(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """The manifests of the corpora that folders of shards or records were made from, of those that hold a copy."""
    copies = {name: folder / "corpus" for name, folder in folders.items()}
    return {name: read_manifest(copy, "corpus") for name, copy in copies.items() if copy.is_dir()}


def most_in_training(manifests: dict[str, dict[str, Any]]) -> BenchmarkCounts:
    """What manifests count of benchmarks. Of several that looked for the same items, the one that held the most."""
    found: BenchmarkCounts = {}
    for manifest in manifests.values():
        for benchmark, of_split in manifest["counts"].get("benchmarks", {}).items():
            for split, items in of_split.items():
                known = found.setdefault(benchmark, {}).get(split, items)
                found[benchmark][split] = max(known, items, key=lambda each: each["in_training"])
    return found

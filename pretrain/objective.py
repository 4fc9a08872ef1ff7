"""What a run learns: which model it trains, on which batches, how it is evaluated, and how its export is proven.

The loop, the engine, evaluation, the checkpoints and the export know only `Objective`. To add an objective, write a
subclass, enter it in OBJECTIVES and in the recipe's choices of `objective.kind`, and test it.
"""

import math
import os
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.common.files import MANIFEST, UserError, read_manifest, sha256, verify_files
from data.shards.blocks import TokenStream, TrainingBlocks, held_out_batch
from model.architecture import Architecture
from model.config import DecoderConfig
from model.decoder import Decoder, document_offsets
from model.loss import IGNORE_INDEX
from pretrain.held_out import Batch, HeldOut, SummedLoss
from pretrain.hf_folder import hf_likelihood, hf_logits, load_hf
from pretrain.recipe import Recipe
from pretrain.weights import load_weights

VERIFIED = "BIOGPT_VERIFIED_SHARDS"
"""Environment variable in which `biogpt train` tells its ranks the sha256 of the manifest it has already verified."""


class Exported(NamedTuple):
    """A model as transformers loads it from an exported folder."""

    outputs: Any
    """The tensors of a batch -> what `Objective.outputs` gives for our model."""
    loss: SummedLoss


class Objective(ABC):
    """One thing that a run can learn. Examples are numbered over the whole run; step s has the s-th global batch."""

    config: Any
    """The model's shape, as `Architecture.config`."""
    tokenizer: Path
    """Folder of the tokenizer that made the data; the run and its export get a copy."""

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

        The key "shards" is a hash of the data's content, which `data.allow_other` lets differ.
        """

    @abstractmethod
    def held_out(self, split: str = "validation") -> HeldOut:
        """The held-out examples of a split. Raises UserError if it is empty."""

    @abstractmethod
    def describe(self) -> tuple[str, dict[str, str]]:
        """What the model card says about the kind of model, in a phrase, and about the training data, a row each."""

    @abstractmethod
    def build_model(self) -> Architecture:
        """The model with its initial weights."""

    @abstractmethod
    def load_weights(self, model: Architecture, path: Path) -> None:
        """Load the weights that a new run starts with. Raises UserError that names what does not fit."""

    @abstractmethod
    def batch(self, numbers: range) -> Batch:
        """The training examples with these numbers. The model called with it gives the summed loss of its targets."""

    @abstractmethod
    def counted_targets(self, numbers: range) -> int:
        """How many targets of these examples count in the loss, known without computing it.

        Every rank asks for the whole global batch, so this must be a pure function of the numbers.
        """

    @abstractmethod
    def outputs(self, model: Architecture, batch: Batch) -> Tensor:
        """The model's outputs for a batch, which an export must reproduce."""

    @abstractmethod
    def load_exported(self, folder: Path, device: torch.device) -> Exported:
        """The model that transformers loads from an exported folder."""


class NextToken(Objective):
    """Predict every token of packed blocks from the tokens before it."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._shards = recipe, Path(recipe.data.shards)
        self._manifest = read_manifest(self._shards, "shards")
        vocabulary = self._manifest["counts"]["vocabulary"]
        if recipe.model.vocab_size not in (None, vocabulary):
            raise UserError(
                f"model.vocab_size = {recipe.model.vocab_size}: {self._shards} was made with a vocabulary of"
                f" {vocabulary}; leave the key out"
            )
        self.config: DecoderConfig = recipe.decoder_config(vocabulary)
        self.tokenizer = self._shards / "tokenizer"
        self._held_out: dict[str, HeldOut] = {}

    @cached_property
    def _blocks(self) -> TrainingBlocks:
        recipe = self._recipe
        stream = TokenStream(self._shards, self._manifest, "train")
        return TrainingBlocks(stream, recipe.context_length(), recipe.train.seed)

    def held_out(self, split: str = "validation") -> HeldOut:
        """The blocks of a split."""
        if split not in self._held_out:
            blocks = held_out_blocks(self._shards, self._manifest, split, self._recipe.context_length())
            self._held_out[split] = blocks
        return self._held_out[split]

    def check(self) -> None:
        """As `Objective.check`."""
        self.held_out()
        _ = self._blocks

    def verify(self) -> None:
        """As `Objective.verify`. Shards that `biogpt train` has just verified are not read twice."""
        if os.environ.get(VERIFIED) != self.identity()["shards"]:
            verify_files(self._shards, self._manifest)

    def identity(self) -> dict[str, Any]:
        """As `Objective.identity`."""
        return {
            "shards": sha256(self._shards / MANIFEST),
            "context_length": self._recipe.context_length(),
            "global_batch_tokens": self._recipe.train.global_batch_tokens,
            "seed": self._recipe.train.seed,
        }

    def describe(self) -> tuple[str, dict[str, str]]:
        """As `Objective.describe`."""
        train = self._manifest["counts"]["train"]
        figures = {"training documents, tokens": f"{train['documents']:,}, {train['tokens']:,}"}
        return "causal language model", figures

    def build_model(self) -> Decoder:
        """As `Objective.build_model`. The weights are a function of the seed."""
        torch.manual_seed(self._recipe.train.seed)
        return Decoder(self.config)

    def load_weights(self, model: Architecture, path: Path) -> None:
        """As `Objective.load_weights`."""
        load_weights(model, path, self.tokenizer)

    def batch(self, numbers: range) -> Batch:
        """Inputs and targets of the blocks, (len(numbers), context_length) int64 each.

        With `model.boundaries = "document"` also where their documents begin: here nothing waits for a GPU to find out.
        """
        inputs, targets = self._blocks.batch(numbers)
        if self.config.boundaries == "none":
            return inputs, targets
        return inputs, targets, document_offsets(inputs, self.config.eos_token_id)

    def counted_targets(self, numbers: range) -> int:
        """As `Objective.counted_targets`: every position is a target."""
        return len(numbers) * self._recipe.context_length()

    def outputs(self, model: Architecture, batch: Batch) -> Tensor:
        """The logits, (B, T, V)."""
        return model(batch[0])

    def load_exported(self, folder: Path, device: torch.device) -> Exported:
        """As `Objective.load_exported`."""
        model = load_hf(folder, device)
        return Exported(lambda inputs, _: hf_logits(model, inputs), hf_likelihood(model))


class HeldOutBlocks(HeldOut):
    """A stream of tokens, cut into blocks in its own order."""

    def __init__(self, stream: TokenStream, context_length: int) -> None:
        self._stream, self._context_length = stream, context_length
        self.examples = math.ceil(len(stream) / context_length)

    def batch(self, numbers: range, batch_size: int) -> Batch:
        """Inputs and targets, (batch_size, context_length) int64 each."""
        return held_out_batch(self._stream, self._context_length, numbers, batch_size, IGNORE_INDEX)

    def counted_targets(self, numbers: range) -> int:
        """As `HeldOut.counted_targets`: the tokens of the blocks."""
        start, stop = (
            min(number * self._context_length, len(self._stream)) for number in (numbers.start, numbers.stop)
        )
        return stop - start

    def figures(self, loss: float) -> dict[str, float]:
        """Perplexity, and bits per byte of text."""
        bits_per_token = loss / math.log(2)
        tokens_per_byte = len(self._stream) / max(self._stream.text_bytes, 1)
        return {"perplexity": math.exp(min(loss, 700.0)), "bits_per_byte": bits_per_token * tokens_per_byte}


def held_out_blocks(shards: Path, manifest: dict[str, Any], split: str, context_length: int) -> HeldOutBlocks:
    """The blocks of a split of a shards folder. Raises UserError if it is empty."""
    if not manifest["counts"].get(split, {}).get("tokens"):
        hint = f"; make the corpus with a larger --{split}-fraction" if split != "train" else ""
        raise UserError(f"{shards}: the {split} split is empty{hint}")
    return HeldOutBlocks(TokenStream(shards, manifest, split), context_length)


OBJECTIVES: dict[str, type[Objective]] = {"next_token": NextToken}


def make_objective(recipe: Recipe) -> Objective:
    """The objective of a recipe. Raises UserError if the recipe does not fit the data."""
    return OBJECTIVES[recipe.objective.kind](recipe)

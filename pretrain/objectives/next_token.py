"""Predict every token of packed blocks from the tokens before it: pretraining."""

import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.common.files import MANIFEST, UserError, read_manifest, sha256, verify_files
from data.shards.blocks import MixedBlocks, TokenStream, held_out_batch
from model.architecture import Architecture
from model.config import DecoderConfig
from model.decoder import Decoder, document_offsets
from model.loss import IGNORE_INDEX
from pretrain.held_out import Batch, HeldOut, text_figures
from pretrain.hf_folder import hf_likelihood, hf_logits, load_hf
from pretrain.objectives.objective import BenchmarkCounts, Exported, Objective, most_in_training, read_corpora
from pretrain.recipe import Recipe
from pretrain.weights import load_weights

VERIFIED = "BIOGPT_VERIFIED_SHARDS"
"""Environment variable in which `biogpt train` tells its ranks the sha256 of the manifest it has already verified."""


class NextToken(Objective):
    """Predict every token of packed blocks from the tokens before it."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._folders = recipe, recipe.data_folders()
        self._manifests = {name: read_manifest(folder, "shards") for name, folder in self._folders.items()}
        first, *others = self._folders
        for name in others:
            if _tokenizer(self._manifests[name]) != _tokenizer(self._manifests[first]):
                raise UserError(
                    f"data.shards: {self._folders[name]} was made with another tokenizer than {self._folders[first]};"
                    " make all of them with `biogpt shards --tokenizer` of one folder"
                )
        vocabulary = self._manifests[first]["counts"]["vocabulary"]
        if recipe.model.vocab_size not in (None, vocabulary):
            raise UserError(
                f"model.vocab_size = {recipe.model.vocab_size}: {self._folders[first]} was made with a vocabulary of"
                f" {vocabulary}; leave the key out"
            )
        self.config: DecoderConfig = recipe.trained_config(vocabulary)
        self.tokenizer = self._folders[first] / "tokenizer"
        self._held_out: dict[str, dict[str, HeldOut]] = {}

    @cached_property
    def _blocks(self) -> MixedBlocks:
        recipe = self._recipe
        streams = [TokenStream(folder, self._manifests[name], "train") for name, folder in self._folders.items()]
        weights = list(recipe.data_weights().values())
        return MixedBlocks(streams, weights, recipe.context_length(), recipe.train.seed)

    def held_out(self, split: str = "validation") -> dict[str, HeldOut]:
        """The blocks of a split of each folder of shards."""
        if split not in self._held_out:
            weights, length = self._recipe.data_weights(), self._recipe.context_length()
            sources: dict[str, HeldOut] = {}
            for name, folder in self._folders.items():
                blocks = held_out_blocks(folder, self._manifests[name], split, length, float(weights[name]))
                sources |= self.sources_of(name, blocks)
            self._held_out[split] = sources
        return self._held_out[split]

    def sources_of(self, name: str, blocks: "HeldOutBlocks") -> dict[str, HeldOut]:
        """What is evaluated on the blocks of a folder, by the sources' names. Their weights sum to the blocks'."""
        return {name: blocks}

    def check(self) -> None:
        """As `Objective.check`."""
        self.held_out()
        _ = self._blocks

    def verify(self) -> None:
        """As `Objective.verify`. Shards that `biogpt train` has just verified are not read twice."""
        if os.environ.get(VERIFIED) != str(self.identity()["shards"]):
            for name, folder in self._folders.items():
                verify_files(folder, self._manifests[name])

    def identity(self) -> dict[str, Any]:
        """As `Objective.identity`."""
        hashes = {name: sha256(folder / MANIFEST) for name, folder in self._folders.items()}
        weights = {name: str(weight) for name, weight in self._recipe.data_weights().items()}
        several = len(hashes) > 1
        return {
            "shards": hashes if several else next(iter(hashes.values())),
            **({"weights": weights} if several else {}),
            "context_length": self._recipe.context_length(),
            "global_batch_tokens": self._recipe.train.global_batch_tokens,
            "seed": self._recipe.train.seed,
        }

    def describe(self) -> tuple[str, dict[str, str]]:
        """As `Objective.describe`."""
        figures = {}
        for name, weight in self._recipe.data_weights().items():
            counts = self._manifests[name]["counts"]
            train = counts["train"]
            source = f" of {name}, {float(weight):.1%} of the mixture" if len(self._folders) > 1 else ""
            figures[f"training documents, tokens{source}"] = f"{train['documents']:,}, {train['tokens']:,}"
        return "causal language model", figures

    def corpora(self) -> dict[str, dict[str, Any]]:
        """As `Objective.corpora`. Shards of earlier versions do not hold the manifest of their corpus."""
        return read_corpora(self._folders)

    def benchmarks(self) -> BenchmarkCounts:
        """As `Objective.benchmarks`."""
        return most_in_training(self._manifests)

    def build_model(self) -> Architecture:
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
        inputs, targets = self.read(numbers)
        if self.config.boundaries == "none":
            return inputs, targets
        return inputs, targets, document_offsets(inputs, self.config.eos_token_id)

    def read(self, numbers: range) -> tuple[Tensor, Tensor]:
        """Inputs and targets of training blocks, (len(numbers), context_length) int64 each."""
        return self._blocks.batch(numbers)

    def epochs(self, examples: int) -> dict[str, float]:
        """As `Objective.epochs`."""
        return dict(zip(self._folders, self._blocks.epochs(examples), strict=True))

    def counted_targets(self, numbers: range) -> int:
        """As `Objective.counted_targets`: every position is a target."""
        return len(numbers) * self._recipe.context_length()

    def outputs(self, model: Architecture, batch: Batch) -> Tensor:
        """The logits, (B, T, V)."""
        return model(batch[0])

    def load_exported(self, folder: Path, device: torch.device) -> Exported:
        """As `Objective.load_exported`."""
        model = load_hf(folder, device)
        return Exported(lambda inputs, _: hf_logits(model, inputs), hf_likelihood(model), model)


class HeldOutBlocks(HeldOut):
    """A stream of tokens, cut into blocks in its own order."""

    def __init__(self, stream: TokenStream, context_length: int, weight: float = 1.0) -> None:
        self._stream, self._context_length, self.weight = stream, context_length, weight
        self.examples = math.ceil(len(stream) / context_length)
        self.tokens_per_byte = len(stream) / max(stream.text_bytes, 1)

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
        return text_figures(loss, self.tokens_per_byte)


def _tokenizer(manifest: dict[str, Any]) -> list[str]:
    """Hashes of the tokenizer in a folder of shards."""
    return [manifest["files"][f"tokenizer/{name}"]["sha256"] for name in ("vocab.json", "merges.txt")]


def held_out_blocks(
    shards: Path, manifest: dict[str, Any], split: str, context_length: int, weight: float = 1.0
) -> HeldOutBlocks:
    """The blocks of a split of a shards folder. Raises UserError if it is empty."""
    if not manifest["counts"].get(split, {}).get("tokens"):
        hint = f"; make the corpus with a larger --{split}-fraction" if split != "train" else ""
        raise UserError(f"{shards}: the {split} split is empty{hint}")
    return HeldOutBlocks(TokenStream(shards, manifest, split), context_length, weight)

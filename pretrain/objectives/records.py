"""What all objectives share that learn from records: their files, their order and their padded batches."""

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data.common.files import MANIFEST, UserError, read_json, read_manifest, sha256, verify_files
from data.shards.order import EpochOrder
from data.shards.records import Encoded, Record, Records, read_records
from data.text.ids import PAD_ID
from model.architecture import Architecture
from model.config import DecoderConfig
from model.loss import IGNORE_INDEX
from pretrain.given import given_model
from pretrain.held_out import Batch, HeldOut
from pretrain.objectives.objective import Objective
from pretrain.recipe import Recipe
from pretrain.weights import load_weights


class RecordObjective(Objective):
    """Learn from the records of a folder. Subclasses say which keys a record has, and what is learned of it.

    The model's shape and its tokenizer are those of `model.weights`, or the tokenizer is `data.tokenizer` and the
    weights are drawn. A run in progress has copies of both.
    """

    keys: ClassVar[dict[str, type]]
    """The keys that each record must have, and the type of their values."""
    label_width: int | None = None
    """How many labels each record has; None means as many as each has."""
    pad_id: int = PAD_ID
    """What pads the ids that the model reads."""
    config: DecoderConfig

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._folder = recipe, Path(recipe.data.records or "")
        given, own = Path(recipe.data.tokenizer or recipe.model.weights or ""), Path(recipe.train.run) / "tokenizer"
        self.tokenizer = own if own.is_dir() and not given.is_dir() else given
        if recipe.model.weights and self.tokenizer == given:
            self.tokenizer = given_model(given).tokenizer
        vocabulary = len(read_json(self.tokenizer / "vocab.json"))
        if recipe.data.tokenizer and recipe.model.vocab_size not in (None, vocabulary):
            raise UserError(
                f"model.vocab_size = {recipe.model.vocab_size}: {self.tokenizer} has a vocabulary of {vocabulary};"
                " leave the key out"
            )
        self.config = recipe.trained_config(recipe.model.vocab_size or vocabulary)
        self._records: dict[str, Records] = {}

    @cached_property
    def _order(self) -> EpochOrder:
        return EpochOrder(len(self.records("train")), self._recipe.train.seed)

    @abstractmethod
    def encode(self, records: list[Record]) -> list[Encoded]:
        """What the model reads and learns of each record. Raises UserError that names a record that does not fit."""

    @abstractmethod
    def figures(self, loss: float) -> dict[str, float]:
        """As `HeldOut.figures`."""

    def records(self, split: str) -> Records:
        """The records of a split, which are read once. Raises UserError that names what is wrong with them."""
        if split not in self._records:
            encoded = self.encode(read_records(self._folder / f"{split}.jsonl", self.keys))
            length = self._recipe.context_length()
            self._records[split] = Records(encoded, length, IGNORE_INDEX, self.label_width, self.pad_id)
        return self._records[split]

    def check(self) -> None:
        """As `Objective.check`."""
        for split in ("train", "validation"):
            self.records(split)

    def verify(self) -> None:
        """As `Objective.verify`. Only a folder that `biogpt finetune` made has a manifest to compare with."""
        if (self._folder / MANIFEST).is_file():
            verify_files(self._folder, read_manifest(self._folder, "records"))

    def identity(self) -> dict[str, Any]:
        """As `Objective.identity`."""
        return {
            "records": {split: sha256(self._folder / f"{split}.jsonl") for split in ("train", "validation")},
            "tokenizer": {name: sha256(self.tokenizer / name) for name in ("vocab.json", "merges.txt")},
            "context_length": self._recipe.context_length(),
            "global_batch_examples": self._recipe.train.global_batch_examples,
            "seed": self._recipe.train.seed,
        }

    def held_out(self, split: str = "validation") -> dict[str, HeldOut]:
        """As `Objective.held_out`."""
        return {"records": HeldOutRecords(self.records(split), self)}

    def describe(self) -> tuple[str, dict[str, str]]:
        """As `Objective.describe`."""
        train = self.records("train")
        return self.kind_in_words(), {"training records, tokens": f"{len(train):,}, {self.sizes(train).sum():,}"}

    def sizes(self, records: Records) -> np.ndarray:
        """How many tokens each record has."""
        return records.tokens

    @abstractmethod
    def kind_in_words(self) -> str:
        """What the model card says about the kind of model, in a phrase."""

    def warnings(self) -> list[str]:
        """As `Objective.warnings`: how many records are longer than the context."""
        cut = {split: records.cut for split, records in self._records.items() if records.cut}
        length = self._recipe.context_length()
        return [
            f"{count} of {len(self._records[split]):,} {split} records are longer than train.context_length = {length}"
            " and were cut"
            for split, count in cut.items()
        ]

    def load_weights(self, model: Architecture, path: Path) -> None:
        """As `Objective.load_weights`."""
        load_weights(model, path, self.tokenizer)

    def batch(self, numbers: range) -> Batch:
        """Ids and labels of the records, padded; see `Records.batch`."""
        return self.records("train").batch(self._order.places(numbers).tolist(), len(numbers))

    def counted_targets(self, numbers: range) -> int:
        """As `Objective.counted_targets`."""
        return int(self.records("train").counted[self._order.places(numbers)].sum())

    def tokens(self, numbers: range) -> int:
        """As `Objective.tokens`."""
        tokens, examples = self.sizes(self.records("train")), self._order.examples

        def of_first(count: int) -> int:
            epochs, rest = divmod(count, examples)
            return epochs * int(tokens.sum()) + int(tokens[self._order.places(range(count - rest, count))].sum())

        return of_first(numbers.stop) - of_first(numbers.start)

    def epochs(self, examples: int) -> dict[str, float]:
        """As `Objective.epochs`."""
        return {"records": examples / len(self.records("train"))}


class HeldOutRecords(HeldOut):
    """The records of a held-out file, in its order."""

    def __init__(self, records: Records, objective: RecordObjective) -> None:
        self._records, self._objective, self.examples = records, objective, len(records)

    def batch(self, numbers: range, batch_size: int) -> Batch:
        """Ids and labels, (batch_size, T)."""
        return self._records.batch(numbers, batch_size)

    def counted_targets(self, numbers: range) -> int:
        """As `HeldOut.counted_targets`."""
        return int(self._records.counted[numbers.start : numbers.stop].sum())

    def figures(self, loss: float) -> dict[str, float]:
        """Those of the objective."""
        return self._objective.figures(loss)

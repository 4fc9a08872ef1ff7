"""What all objectives share that learn from records: their files, their order and their padded batches."""

from abc import abstractmethod
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data.common.files import MANIFEST, UserError, read_json, read_manifest, sha256, verify_files
from data.shards.mixture import MixedOrder
from data.shards.records import Encoded, JoinedRecords, Keys, Record, Records, stream_records
from data.text.ids import PAD_ID
from model.architecture import Architecture
from model.config import DecoderConfig
from model.loss import IGNORE_INDEX
from pretrain.given import given_model
from pretrain.held_out import Batch, HeldOut
from pretrain.objectives.objective import BenchmarkCounts, Objective, most_in_training, read_corpora
from pretrain.recipe import Recipe
from pretrain.weights import load_weights

AT_A_TIME = 50_000
"""Records whose texts are in memory at once."""


class RecordObjective(Objective):
    """Learn from the records of a folder, or of several. Subclasses say which keys a record has, and what is learned.

    The model's shape and its tokenizer are those of `model.weights`, or the tokenizer is `data.tokenizer` and the
    weights are drawn. A run in progress has copies of both.
    """

    keys: ClassVar[Keys]
    """The keys that each record must have, and the type of their values."""
    label_width: int | None = None
    """How many labels each record has; None means as many as each has."""
    pad_id: int = PAD_ID
    """What pads the ids that the model reads."""
    config: DecoderConfig

    def __init__(self, recipe: Recipe) -> None:
        self._recipe, self._folders, self._weights = recipe, recipe.data_folders(), recipe.data_weights()
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
        """Those that were read, by the split or, of several folders, by the folder's name and the split."""

    @cached_property
    def _train(self) -> Records:
        """The training records of all folders, one folder after the other."""
        folders = [self.records("train", name) for name in self._folders]
        return folders[0] if len(folders) == 1 else JoinedRecords(folders)

    @cached_property
    def _order(self) -> MixedOrder:
        of_folders = [len(self.records("train", name)) for name in self._folders]
        return MixedOrder(of_folders, list(self._weights.values()), self._recipe.train.seed)

    @abstractmethod
    def encode(self, records: list[Record]) -> list[Encoded]:
        """What the model reads and learns of each record. Raises UserError that names a record that does not fit."""

    @abstractmethod
    def figures(self, loss: float) -> dict[str, float]:
        """As `HeldOut.figures`."""

    def records(self, split: str, name: str = "") -> Records:
        """The records of a split of a folder, which are read once. name: of the folder, if there are several.

        Raises UserError that names what is wrong with them.
        """
        name = name or next(iter(self._folders))
        called = f"{name} {split}" if len(self._folders) > 1 else split
        if called not in self._records:
            encoded, length = self._encoded(self._folders[name] / f"{split}.jsonl"), self._recipe.context_length()
            self._records[called] = Records(encoded, length, IGNORE_INDEX, self.label_width, self.pad_id)
        return self._records[called]

    def _encoded(self, path: Path) -> Iterator[Encoded]:
        records = stream_records(path, self.keys)
        while some := list(islice(records, AT_A_TIME)):
            yield from self.encode(some)

    def check(self) -> None:
        """As `Objective.check`."""
        for name in self._folders:
            for split in ("train", "validation"):
                self.records(split, name)

    def verify(self) -> None:
        """As `Objective.verify`. Only a folder that `biogpt records` or `finetune` made has a manifest."""
        for folder in self._folders.values():
            if (folder / MANIFEST).is_file():
                verify_files(folder, read_manifest(folder, "records"))

    def identity(self) -> dict[str, Any]:
        """As `Objective.identity`."""
        hashes = {
            name: {split: sha256(folder / f"{split}.jsonl") for split in ("train", "validation")}
            for name, folder in self._folders.items()
        }
        weights = {name: str(weight) for name, weight in self._weights.items()}
        several = len(hashes) > 1
        return {
            "records": hashes if several else next(iter(hashes.values())),
            **({"weights": weights} if several else {}),
            "tokenizer": {name: sha256(self.tokenizer / name) for name in ("vocab.json", "merges.txt")},
            "context_length": self._recipe.context_length(),
            "global_batch_examples": self._recipe.train.global_batch_examples,
            "seed": self._recipe.train.seed,
        }

    def held_out(self, split: str = "validation") -> dict[str, HeldOut]:
        """As `Objective.held_out`."""
        return {
            name: HeldOutRecords(self.records(split, name), self, float(weight))
            for name, weight in self._weights.items()
        }

    def describe(self) -> tuple[str, dict[str, str]]:
        """As `Objective.describe`."""
        figures = {}
        for name, weight in self._weights.items():
            train = self.records("train", name)
            source = f" of {name}, {float(weight):.1%} of the mixture" if len(self._folders) > 1 else ""
            figures[f"training records, tokens{source}"] = f"{len(train):,}, {self.sizes(train).sum():,}"
        return self.kind_in_words(), figures

    def corpora(self) -> dict[str, dict[str, Any]]:
        """As `Objective.corpora`: those that `biogpt records` read."""
        return read_corpora(self._folders)

    def benchmarks(self) -> BenchmarkCounts:
        """As `Objective.benchmarks`."""
        return most_in_training(self.corpora())

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
        return self._train.batch(self._order.places(numbers).tolist(), len(numbers))

    def counted_targets(self, numbers: range) -> int:
        """As `Objective.counted_targets`."""
        return int(self._train.counted[self._order.places(numbers)].sum())

    def tokens(self, numbers: range) -> int:
        """As `Objective.tokens`."""
        return self._order.total(self.sizes(self._train), numbers)

    def epochs(self, examples: int) -> dict[str, float]:
        """As `Objective.epochs`."""
        return dict(zip(self._folders, self._order.epochs(examples), strict=True))


class HeldOutRecords(HeldOut):
    """The records of a held-out file, in its order."""

    def __init__(self, records: Records, objective: RecordObjective, weight: float = 1.0) -> None:
        self._records, self._objective, self.examples, self.weight = records, objective, len(records), weight

    def batch(self, numbers: range, batch_size: int) -> Batch:
        """Ids and labels, (batch_size, T)."""
        return self._records.batch(numbers, batch_size)

    def counted_targets(self, numbers: range) -> int:
        """As `HeldOut.counted_targets`."""
        return int(self._records.counted[numbers.start : numbers.stop].sum())

    def figures(self, loss: float) -> dict[str, float]:
        """Those of the objective."""
        return self._objective.figures(loss)

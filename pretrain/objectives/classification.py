"""Learn classes: of the tokens of a text, from spans of its characters; or of whole texts, one or several each.

The classes come from the labels of the training records. Held-out predictions are scored as benchmarks are
(`pretrain.tasks.figures`), in percent, and the first score chooses the best checkpoint.
"""

from abc import abstractmethod
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.common.errors import UserError
from data.shards.records import Encoded, Keys, Record, encode_texts, encode_with_offsets, read_records
from data.text.ids import EOS_ID, PAD_ID
from data.text.spans import Offsets, Span, fault_of, find_spans, tag_tokens, tags_of
from model.architecture import Architecture
from model.config import ClassifierConfig, Problem
from model.heads import Classifier, SequenceClassifier, TokenClassifier, classification_loss
from model.loss import IGNORE_INDEX
from pretrain.held_out import Batch, HeldOut
from pretrain.hf_folder import load_hf
from pretrain.objectives.objective import Exported
from pretrain.objectives.records import HeldOutRecords, RecordObjective
from pretrain.recipe import Recipe
from pretrain.tasks.figures import Answers, Figure, accuracy, macro_f1, micro_f1


class Classification(RecordObjective):
    """What both objectives share: the head, the scores and the proof of an export."""

    head: ClassVar[type[Classifier]]

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        if len(self._folders) > 1:
            kind = recipe.objective.kind
            raise UserError(f'data.records: objective.kind = "{kind}" learns from one folder; name one, not a table')
        self._file = next(iter(self._folders.values())) / "train.jsonl"
        problem, classes = self.find_classes(read_records(self._file, self.keys))
        if len(classes) < 2:
            raise UserError(f"{self._file}: its records have too few labels to tell apart: {', '.join(classes)}")
        self.config = self._shape = ClassifierConfig(**asdict(self.config), labels=classes, problem=problem)

    @abstractmethod
    def find_classes(self, train: list[Record]) -> tuple[Problem, list[str]]:
        """What the head decides, and the names of the classes. Raises UserError that names a bad record."""

    @abstractmethod
    def figures_of_answers(self) -> list[Figure]:
        """How predictions are scored. The first figure chooses the best checkpoint."""

    @abstractmethod
    def right_answers(self, example: Encoded) -> Answers:
        """The right answers of an example."""

    @abstractmethod
    def answers(self, prediction: np.ndarray, example: Encoded) -> Answers:
        """What a prediction (`predict`) says of an example."""

    def predict(self, logits: Tensor) -> Tensor:
        """As `HeldOut.predict`: the likeliest class; or 1 for each of several classes that is likelier than not."""
        return (logits > 0).long() if self._shape.problem == "multiple" else logits.argmax(-1)

    def class_of(self, name: str, record: Record) -> int:
        """The number of a class. Raises UserError if no training record has it."""
        if name not in self._shape.labels:
            raise UserError(f"{record.place}: no record of {self._file} has the label {name.split('-')[-1]!r}")
        return self._shape.labels.index(name)

    def figures(self, loss: float) -> dict[str, float]:
        """None follows from the loss."""
        return {}

    def held_out(self, split: str = "validation") -> dict[str, HeldOut]:
        """As `Objective.held_out`."""
        return {name: ScoredRecords(self, split) for name in self._folders}

    def build_model(self) -> Classifier:
        """As `Objective.build_model`. A new head keeps the weights that are drawn here, a function of the seed."""
        torch.manual_seed(self._recipe.train.seed)
        return self.head(self._shape)

    def outputs(self, model: Architecture, batch: Batch) -> Tensor:
        """The logits, (B, T, C) or (B, C)."""
        return _without_padding(model(batch[0]), batch[0])

    def load_exported(self, folder: Path, device: torch.device) -> Exported:
        """As `Objective.load_exported`. transformers gets the attention mask, as its tokenizer makes it."""
        model = load_hf(folder, device, self.head.hf_name)

        def outputs(ids_BT: Tensor, _: Tensor) -> Tensor:
            return _without_padding(model(ids_BT, attention_mask=(ids_BT != PAD_ID).long()).logits.float(), ids_BT)

        def loss(ids_BT: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            logits = outputs(ids_BT, labels)
            return classification_loss(logits, labels, self._shape.problem), logits

        return Exported(outputs, loss, model)


def _without_padding(logits: Tensor, ids_BT: Tensor) -> Tensor:
    """Logits with 0 for each token that is padding: they depend on the mask there, and nobody reads them."""
    return logits.masked_fill((ids_BT == PAD_ID)[:, :, None], 0.0) if logits.dim() == 3 else logits


class ScoredRecords(HeldOutRecords):
    """Held-out records whose predictions are scored."""

    def __init__(self, objective: Classification, split: str) -> None:
        super().__init__(objective.records(split), objective)
        self._classes = objective
        self._figures = {figure.name.lower().replace(" ", "_"): figure for figure in objective.figures_of_answers()}
        self.score = next(iter(self._figures))

    def predict(self, outputs: Tensor) -> Tensor:
        """The objective's."""
        return self._classes.predict(outputs)

    def scores(self, examples: range, predictions: list[np.ndarray]) -> dict[str, float]:
        """As `HeldOut.scores`, in percent."""
        encoded = [self._records[number] for number in examples]
        right = [self._classes.right_answers(each) for each in encoded]
        given = [self._classes.answers(*pair) for pair in zip(predictions, encoded, strict=True)]
        return {name: float(figure.value(figure.counts(right, given).sum(0))) for name, figure in self._figures.items()}


class Place(NamedTuple):
    """Where the tokens of an example lie in the text of its record, and which spans begin there."""

    offsets: Offsets
    spans: list[Span]


class TokenClassification(Classification):
    """Records of a "text" and its "spans", a list of {"start": 0, "end": 7, "label": "Disease"}, in characters.

    The classes are tags by BIO (`data.text.spans`). A text that is longer than the context becomes several examples.
    Exact spans are scored.
    """

    keys: ClassVar[Keys] = {"text": str, "spans": list}
    head = TokenClassifier

    def find_classes(self, train: list[Record]) -> tuple[Problem, list[str]]:
        """As `Classification.find_classes`."""
        return "tokens", tags_of(sorted({span.label for record in train for span in read_spans(record)}))

    def encode(self, records: list[Record]) -> list[Encoded]:
        """As `RecordObjective.encode`. Every token is labelled, but not the `</s>` in front of each example."""
        texts = encode_with_offsets(self.tokenizer, [record.fields["text"] for record in records])
        room, encoded = self._recipe.context_length() - 1, []
        for record, (ids, offsets) in zip(records, texts, strict=True):
            spans = read_spans(record)
            classes = [self.class_of(tag, record) for tag in tag_tokens(spans, offsets)]
            firsts = range(0, max(len(ids), 1), room)
            begins = [0, *(offsets[first][0] for first in firsts[1:]), len(record.fields["text"])]
            for first, (begin, end) in zip(firsts, pairwise(begins), strict=True):
                tokens = slice(first, first + room)
                there = [span for span in spans if begin <= span.start < end]
                labels = np.array([IGNORE_INDEX, *classes[tokens]])
                place = Place(offsets[tokens], there)
                encoded.append(Encoded(np.array([EOS_ID, *ids[tokens]]), labels, answer=place))
        return encoded

    def right_answers(self, example: Encoded) -> Answers:
        """As `Classification.right_answers`: the spans of the record, also those that its tokens cut."""
        return tuple(example.answer.spans)

    def answers(self, prediction: np.ndarray, example: Encoded) -> Answers:
        """As `Classification.answers`: the spans that the tags of all tokens say."""
        offsets = example.answer.offsets
        tags = [self._shape.labels[number] for number in prediction[1 : 1 + len(offsets)]]
        return tuple(find_spans(tags, offsets))

    def figures_of_answers(self) -> list[Figure]:
        """As `Classification.figures_of_answers`."""
        return [micro_f1()]

    def warnings(self) -> list[str]:
        """As `Objective.warnings`: how many spans no prediction can find exactly."""
        lines = super().warnings()
        for split, records in self._records.items():
            pairs = [(self.right_answers(each), self.answers(each.labels, each)) for each in records]
            cut = sum(len(set(right) - set(best)) for right, best in pairs)
            if cut:
                total = sum(len(right) for right, _ in pairs)
                lines.append(f"{cut:,} of {total:,} {split} spans cut a token or an example, so none can match exactly")
        return lines

    def kind_in_words(self) -> str:
        """As `RecordObjective.kind_in_words`."""
        return "token classifier"


def read_spans(record: Record) -> list[Span]:
    """The spans of a record. Raises UserError that names the record if one is malformed."""
    spans = []
    for given in record.fields["spans"]:
        values: list[Any] = [given.get(key) for key in ("start", "end", "label")] if isinstance(given, dict) else []
        if [type(value) for value in values] != [int, int, str]:
            raise UserError(f'{record.place}: a span must be {{"start": 0, "end": 7, "label": "Disease"}}, not {given}')
        spans.append(Span(*values))
    if fault := fault_of(spans, record.fields["text"]):
        raise UserError(f"{record.place}: {fault}")
    return spans


class SequenceClassification(Classification):
    """Records of a "text" and its "label"; or its "labels", a list, if a text may have several or none.

    A text that is longer than the context is cut at its end.
    """

    keys: ClassVar[Keys] = {"text": str}
    head = SequenceClassifier

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self.label_width = len(self._shape.labels) if self._shape.problem == "multiple" else 1

    def find_classes(self, train: list[Record]) -> tuple[Problem, list[str]]:
        """As `Classification.find_classes`. The first record says whether texts have several labels."""
        problem = "multiple" if "labels" in train[0].fields else "single"
        return problem, sorted({label for record in train for label in read_labels(record, problem)})

    def encode(self, records: list[Record]) -> list[Encoded]:
        """As `RecordObjective.encode`."""
        texts = encode_texts(self.tokenizer, [record.fields["text"] for record in records])
        room, encoded, several = self._recipe.context_length() - 1, [], self._shape.problem == "multiple"
        for record, ids in zip(records, texts, strict=True):
            labels = read_labels(record, self._shape.problem)
            classes = [self.class_of(label, record) for label in labels]
            row = np.isin(np.arange(len(self._shape.labels)), classes) if several else np.array(classes)
            encoded.append(Encoded(np.array([EOS_ID, *ids[:room]]), row, len(ids) > room, tuple(labels)))
        return encoded

    def right_answers(self, example: Encoded) -> Answers:
        """As `Classification.right_answers`."""
        return example.answer

    def answers(self, prediction: np.ndarray, example: Encoded) -> Answers:
        """As `Classification.answers`."""
        chosen = np.flatnonzero(prediction) if self._shape.problem == "multiple" else [prediction]
        return tuple(self._shape.labels[number] for number in chosen)

    def figures_of_answers(self) -> list[Figure]:
        """As `Classification.figures_of_answers`."""
        first = micro_f1() if self._shape.problem == "multiple" else accuracy()
        return [first, macro_f1(self._shape.labels)]

    def kind_in_words(self) -> str:
        """As `RecordObjective.kind_in_words`."""
        return "classifier of texts"


def read_labels(record: Record, problem: Problem) -> list[str]:
    """The labels of a record. Raises UserError that names the record if it has none of the right kind."""
    key, kind = ("labels", list) if problem == "multiple" else ("label", str)
    given: Any = record.fields.get(key)
    labels = given if isinstance(given, list) else [given]
    if type(given) is not kind or not all(isinstance(label, str) for label in labels):
        what = "a list of texts" if kind is list else "a text"
        raise UserError(f'{record.place}: needs "{key}", {what}, as the first record for training has it')
    return labels

"""Hallmarks of Cancer (Baker et al., 2016): which of ten hallmarks does a sentence show?

The files are those of https://github.com/microsoft/BioGPT, `train.tsv`, `valid.tsv` and `test.tsv`: a sentence, a tab
and its labels, separated by `|`, or `empty`. Lines between documents are empty. BioGPT's `valid.tsv` is the same file
as its `test.tsv`, so choose nothing on it that you then report on the test split.
"""

from pathlib import Path

from data.common.errors import UserError
from pretrain.tasks.figures import Answers, micro_f1
from pretrain.tasks.task import ChoiceTask, Item, read_text


class HallmarksOfCancer(ChoiceTask):
    """Sentences of abstracts. As in BioGPT's script, `empty` is a label like the others."""

    name = "hoc"
    labels = (
        "tumor promoting inflammation",
        "inducing angiogenesis",
        "evading growth suppressors",
        "resisting cell death",
        "cellular energetics",
        "empty",
        "genomic instability and mutation",
        "sustaining proliferative signaling",
        "avoiding immune destruction",
        "activating invasion and metastasis",
        "enabling replicative immortality",
    )
    figures = (micro_f1(),)

    def read(self, split: str) -> list[Item]:
        path, text = read_text(
            self.folder, {"train": "train.tsv", "validation": "valid.tsv", "test": "test.tsv"}[split]
        )
        return [
            self._item(path, number, split, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()
        ]

    def _item(self, path: Path, number: int, split: str, line: str) -> Item:
        sentence, tab, labels = line.strip().partition("\t")
        answers = tuple(label.strip() for label in labels.split("|"))
        if not tab or not sentence.strip():
            raise UserError(f"{path}: line {number}: expected a sentence, a tab and labels separated by |")
        if unknown := [label for label in answers if label not in self.labels]:
            raise UserError(
                f"{path}: line {number}: unknown label {unknown[0]!r}; choose from {', '.join(self.labels)}"
            )
        sentence = sentence.strip()
        prompt = f"{sentence}{'' if sentence.endswith('.') else '.'} the type of this document is"
        return Item(str(number), "", split, sentence, answers, prompt, self.target(answers))

    def choices(self) -> list[Answers]:
        """The sets of labels that the training sentences have: 76 in the published file."""
        return list(dict.fromkeys(item.answers for item in HallmarksOfCancer(self.folder, "train").items))

    def target(self, answers: Answers) -> str:
        return f"{'|'.join(answers)}."

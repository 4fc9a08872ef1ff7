"""PubMedQA (Jin et al., 2019): does an abstract answer a question with yes, no or maybe?

The files are those of https://github.com/pubmedqa/pubmedqa: `ori_pqal.json` with 1,000 labelled questions, and
`test_ground_truth.json` with the answers to the 500 of the test split. The setting is "reasoning required": the model
reads the question and the abstract, but not the abstract's conclusion, which the files call LONG_ANSWER.
"""

import math
import random
from typing import Any

from data.common.errors import UserError
from pretrain.tasks.figures import Answers, accuracy, macro_f1
from pretrain.tasks.task import ChoiceTask, Item, check_fields, read_object


class PubMedQA(ChoiceTask):
    """500 test questions, and the other 500 divided as in the first of PubMedQA's ten folds, as BioGPT used them."""

    name = "pubmedqa"
    labels = ("yes", "no", "maybe")
    figures = (accuracy(), macro_f1(labels))

    def read(self, split: str) -> list[Item]:
        path, records = read_object(self.folder, "ori_pqal.json")
        for pmid, record in records.items():
            check_fields(path, pmid, record, (("QUESTION", str), ("CONTEXTS", list), ("final_decision", str)))
            if record["final_decision"] not in self.labels:
                raise UserError(f"{path}: {pmid}: final_decision {record['final_decision']!r} is not yes, no or maybe")
        decisions = {pmid: record["final_decision"] for pmid, record in records.items()}
        path, test = read_object(self.folder, "test_ground_truth.json")
        for pmid, answer in test.items():
            if decisions.get(pmid) != answer:
                raise UserError(f"{path}: {pmid}: {answer!r}, but ori_pqal.json says {decisions.get(pmid)!r}")
        validation = [pmid for pmid in first_fold(decisions) if pmid not in test]
        train = [pmid for pmid in records if pmid not in {*test, *validation}]
        pmids = {"train": train, "validation": validation, "test": test}[split]
        return [self._item(pmid, split, records[pmid]) for pmid in pmids]

    def _item(self, pmid: str, split: str, record: dict[str, Any]) -> Item:
        question, context = (
            " ".join(text.split()) for text in (record["QUESTION"], " ".join(map(str, record["CONTEXTS"])))
        )
        # BioGPT's text has the question first. Here it is last, so that a model with a short context loses the
        # beginning of the abstract and not the question.
        prompt = f"context: {context} question: {question} the answer to the question given the context is"
        answers = (record["final_decision"],)
        return Item(pmid, pmid, split, f"{question} {context}", answers, prompt, self.target(answers))

    def target(self, answers: Answers) -> str:
        return f"{answers[0]}."


def first_fold(decisions: dict[str, str]) -> list[str]:
    """The PMIDs of `pqal_fold0/dev_set.json`, which PubMedQA's own `split_dataset.py` draws with Python's seed 0."""
    generator = random.Random(0)
    not_test, _ = divide(decisions, 2, generator)
    return divide({pmid: decisions[pmid] for pmid in not_test}, 10, generator)[0]


def divide(decisions: dict[str, str], parts: int, generator: random.Random) -> list[list[str]]:
    """Divide PMIDs into parts with equal shares of each decision, in the draws of `split_dataset.py`."""
    divided: list[list[str]] = [[] for _ in range(parts)]
    for label in PubMedQA.labels:
        pmids = [pmid for pmid, decision in decisions.items() if decision == label]
        generator.shuffle(pmids)
        size = math.ceil(len(pmids) / parts)
        for number, part in enumerate(divided):
            part += pmids[number * size : (number + 1) * size]
    *others, last = divided
    if len(last) != len(others[0]):
        for part in filter(None, others):
            last.append(part.pop(part.index(generator.choice(part))))
    return divided

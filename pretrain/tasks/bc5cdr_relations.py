"""BC5CDR (Li et al., 2016) as relations: which chemicals induce which diseases, according to an abstract?

The files are those of https://github.com/microsoft/BioGPT, `train.json`, `valid.json` and `test.json`: for each PMID a
title, an abstract, the related pairs of MeSH identifiers, and the identifier of each name that occurs.
"""

import re
from typing import Any

from data.common.errors import UserError
from pretrain.tasks.figures import Answers, micro_f1
from pretrain.tasks.task import Item, WritingTask, check_fields, read_object

FIELDS = (("title", str), ("abstract", str), ("relations", list), ("chemical2id", dict), ("disease2id", dict))
UNKNOWN = "-1"
"""BioGPT's script gives this identifier to a name that the split does not know."""


class ChemicalDiseaseRelations(WritingTask):
    """The answers are pairs of identifiers, chemical and disease. The text is lower-case, as BioGPT's is."""

    name = "bc5cdr-relations"
    figures = (micro_f1(),)

    def read(self, split: str) -> list[Item]:
        path, records = read_object(self.folder, {"validation": "valid"}.get(split, split) + ".json")
        self.chemicals: dict[str, str] = {}
        self.diseases: dict[str, str] = {}
        items = []
        for pmid, record in records.items():
            check_fields(path, pmid, record, FIELDS)
            self.chemicals |= record["chemical2id"]
            self.diseases |= record["disease2id"]
            try:
                items.append(self._item(pmid, split, record))
            except (KeyError, TypeError):
                raise UserError(
                    f"{path}: {pmid}: expected relations of a chemical in chemical2id and a disease in disease2id"
                ) from None
        return items

    def _item(self, pmid: str, split: str, record: dict[str, Any]) -> Item:
        title, abstract = record["title"], record["abstract"]
        text = f"{title}{'' if re.search(r'[^a-zA-Z0-9_]$', title) else '.'} {abstract}"
        answers = tuple((relation["chemical"], relation["disease"]) for relation in record["relations"])
        chemicals, diseases = _longest_names(record["chemical2id"]), _longest_names(record["disease2id"])
        relations = [
            f"the relation between {chemicals[chemical]} and {diseases[disease]} exists"
            for chemical, disease in answers
        ]
        return Item(pmid, pmid, split, text, answers, text.lower(), f"{'; '.join(relations)}.")

    def parse(self, text: str) -> Answers:
        """The pairs in a generated text, as BioGPT's `postprocess.py` finds them. An unknown name becomes "-1"."""
        found = (
            re.match(r"the relation between (.*) and (.*) exists", part.strip())
            for part in text.strip().removesuffix(".").split(";")
        )
        pairs = ((match[1].strip(), match[2].strip()) for match in found if match)
        return tuple(
            (self.chemicals.get(chemical, UNKNOWN), self.diseases.get(disease, UNKNOWN)) for chemical, disease in pairs
        )


def _longest_names(identifiers: dict[str, str]) -> dict[str, str]:
    """From each identifier to its longest name, and to the first of equally long ones."""
    names: dict[str, str] = {}
    for name, identifier in identifiers.items():
        if len(name) > len(names.get(identifier, "")):
            names[identifier] = name
    return names

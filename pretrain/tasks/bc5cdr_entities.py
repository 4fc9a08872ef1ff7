"""BC5CDR (Li et al., 2016) as entities: where does an abstract mention chemicals and diseases?

The files are the PubTator files of BioCreative V's CDR corpus, `CDR_TrainingSet.PubTator.txt`,
`CDR_DevelopmentSet.PubTator.txt` and `CDR_TestSet.PubTator.txt`. An article is a block of lines:

    8701013|t|TITLE
    8701013|a|ABSTRACT
    8701013 <tab> START <tab> END <tab> MENTION <tab> Chemical or Disease <tab> IDENTIFIER
    8701013 <tab> CID <tab> CHEMICAL <tab> DISEASE

The positions count characters of the title, a space and the abstract.
"""

from pathlib import Path

from data.common.errors import UserError
from pretrain.tasks.figures import micro_f1
from pretrain.tasks.task import Item, SpanTask, read_text


class ChemicalDiseaseEntities(SpanTask):
    """The answers are spans (start, end, label) of characters."""

    name = "bc5cdr-entities"
    labels = ("Chemical", "Disease")
    figures = (micro_f1(),)

    def read(self, split: str) -> list[Item]:
        part = {"train": "Training", "validation": "Development", "test": "Test"}[split]
        path, content = read_text(self.folder, f"CDR_{part}Set.PubTator.txt")
        return [self._item(path, split, block.split("\n")) for block in content.strip().split("\n\n")]

    def _item(self, path: Path, split: str, lines: list[str]) -> Item:
        pmid, _, title = lines[0].partition("|t|")
        if len(lines) < 2 or "|t|" not in lines[0] or not lines[1].startswith(f"{pmid}|a|"):
            raise UserError(
                f"{path}: expected PMID|t|TITLE and PMID|a|ABSTRACT at the start of each block: {lines[0]!r}"
            )
        text = f"{title} {lines[1].removeprefix(f'{pmid}|a|')}"
        spans = []
        for line in lines[2:]:
            fields = line.split("\t")
            if fields[1:2] == ["CID"]:
                continue
            try:
                _, start, end, mention, label, *_ = fields
                if label not in self.labels or text[int(start) : int(end)] != mention:
                    raise ValueError
            except ValueError:
                raise UserError(f"{path}: {line!r} is not PMID, start, end, mention at that place, label") from None
            spans.append((int(start), int(end), label))
        return Item(pmid, pmid, split, text, tuple(spans))

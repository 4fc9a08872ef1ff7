"""subword-nmt's own learning and applying, and real Moses tokens to try them on."""

import io

from subword_nmt.apply_bpe import BPE
from subword_nmt.learn_bpe import learn_bpe

from data.archive.medline import Citation, read_medline
from data.text import moses
from data.text.bpe import END_OF_WORD, Merge
from tests.shared import NLM

SEPARATOR = "\ue000"  # of subword-nmt's output: a private character, as "@@" might be text


def subword_nmt_merges(lines: list[str], merges: int) -> list[Merge]:
    """What subword-nmt learns when it reads the text itself."""
    learned = io.StringIO()
    learn_bpe(io.StringIO("\n".join(lines)), learned, merges)
    rules = [line.split(" ") for line in learned.getvalue().split("\n")[1:-1]]
    return [(first, second) for first, second in rules]


def subword_nmt(merges: list[Merge]) -> BPE:
    rules = "".join(f"{first} {second}\n" for first, second in merges)
    return BPE(io.StringIO("#version: 0.2\n" + rules), separator=SEPARATOR)


def subwords_of(bpe: BPE, word: str) -> list[str]:
    """subword-nmt's tokens of a word as HF writes them."""
    subwords = bpe.segment_tokens([word])
    return [each[:-1] if each.endswith(SEPARATOR) else each + END_OF_WORD for each in subwords]


def real_lines() -> list[str]:
    """The Moses tokens of real citations, one line for each citation."""
    files = [*NLM.glob("pubmed21n*.xml.gz"), NLM / "pubmedsample18n0001.xml.gz"]
    records = [record for file in sorted(files) for record in read_medline(file) if isinstance(record, Citation)]
    return [" ".join(moses.tokenize(f"{record.title} {record.abstract}")) for record in records]

"""The corpus -> records to learn from: a source text, and the target to be written for it.

A record needs only a title and an abstract, so the rules below read the flattened text: sections follow one another in
one line, each after its label, as in "METHODS: ... CONCLUSIONS: ...". The splits are those of the corpus, and so is the
order.
"""

import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.common.files import (
    MANIFEST,
    UserError,
    check_places,
    make_folder,
    read_manifest,
    verify_files,
    write_json_lines,
)
from data.common.parquet import SPLITS, row_groups, split_files
from data.common.workers import progress
from data.corpus.schema import join_text
from data.shards.noise import draw_spans, draws_of
from data.text.reserved import MASK

VERSION = 1
"""Of the rules of all tasks. Raise it when a rule changes."""
LEAST_SOURCE, LEAST_TARGET = 20, 3
"""Words. Records with fewer are left out."""
MASK_SHARE, SPAN_LENGTH, SEED = 0.3, 3.0, 24
"""Of infilling: as the objective `denoising` masks blocks, but drawn from the PMID."""


class Citation(NamedTuple):
    """What the corpus has of a record."""

    pmid: int
    title: str
    abstract: str


class Pair(NamedTuple):
    """A record without its id."""

    source: str | list[str | int]
    target: str


Task = Callable[[Citation], Pair | str]
"""A record of a citation, or why it gives none, in a few words."""


def make_records(corpus: Path, task: str, out: Path, instruction: str = "") -> dict[str, Any]:
    """Write the folder `out` with a file of records for each split of a corpus. Returns its manifest.

    task: a name in TASKS. instruction: what every source begins with, for a model of several tasks. Raises UserError,
    which names a corpus that is missing or damaged, a task that does not exist, a split without a record, or an `out`
    made from other inputs.
    """
    if task not in TASKS:
        raise UserError(f"{task}: no such task; choose from {', '.join(TASKS)}")
    check_places(out, [corpus])
    manifest = read_manifest(corpus, "corpus")
    hashes = {name: entry["sha256"] for name, entry in manifest["files"].items()}

    def fill(folder: Path) -> dict[str, Any]:
        verify_files(corpus, manifest)
        files = {split: split_files(corpus, manifest, split) for split in SPLITS}
        counts, left_out = {}, Counter()
        with progress("records: writing", sum(map(len, files.values()))) as advance:
            for split, of_split in files.items():
                records = _records(of_split, TASKS[task], instruction, left_out, advance)
                counts[split] = write_json_lines(folder / f"{split}.jsonl", records)
                if not counts[split]:
                    raise UserError(
                        f"{corpus}: its {split} split gives no record for {task}; build the corpus from more text, or"
                        " with other fractions for validation and test"
                    )
        (folder / "corpus").mkdir()
        shutil.copyfile(corpus / MANIFEST, folder / "corpus" / MANIFEST)  # for the model card; it proves itself
        return {**counts, "left_out": dict(sorted(left_out.items()))}

    given = {"instruction": instruction} if instruction else {}
    return make_folder(out, "records", {"task": task, **given, "version": VERSION, "corpus": hashes}, fill)


def _records(
    files: list[Path], task: Task, instruction: str, left_out: Counter[str], advance: Callable[[], None]
) -> Iterator[dict[str, Any]]:
    """The records of Parquet files in their order, one row group at a time. Counts why others are left out."""
    for file in files:
        for rows in row_groups(file, list(Citation._fields)):
            for citation in map(Citation, *(rows[name].to_pylist() for name in Citation._fields)):
                pair = task(citation)
                if isinstance(pair, Pair) and _is_short(citation, pair):
                    pair = "too short"
                if isinstance(pair, str):
                    left_out[pair] += 1
                else:
                    source = _instructed(instruction, pair.source)
                    yield {"id": str(citation.pmid), "source": source, "target": pair.target}
        advance()


def _is_short(citation: Citation, pair: Pair) -> bool:
    source = pair.source if isinstance(pair.source, str) else join_text(citation.title, citation.abstract)
    return len(source.split()) < LEAST_SOURCE or len(pair.target.split()) < LEAST_TARGET


def _instructed(instruction: str, source: str | list[str | int]) -> str | list[str | int]:
    """The source after the instruction and a space, as one writes a prompt."""
    if not instruction:
        return source
    return f"{instruction} {source}" if isinstance(source, str) else [f"{instruction} ", *source]


def title(citation: Citation) -> Pair | str:
    """The title from the abstract."""
    return Pair(citation.abstract, citation.title) if citation.title else "without title"


# The conclusion from the rest

CAPITALS = r"[A-Z]{3}[A-Z'’/&,()-]*(?: [A-Z/&(-][A-Z'’/&,()-]*)*"
PHRASE = r"[A-Z][a-z'’-]+(?:\(s\))?(?: [A-Za-z][a-z'’-]*){0,4}"
LABEL = re.compile(rf"(?<!\S)(?:({CAPITALS})|{PHRASE}):(?=\s)")
"""A label in capitals, or a phrase of up to five words that begins with a capital."""
SENTENCE_ENDS = (".", "!", "?", ";", ":", ")", "]", '"', "'", "”", "’", "%")
IN_CAPITALS = re.compile(r"\bCONCLUSIONS?\b")
AS_PHRASE = re.compile(r"(?:(?:Author|Reviewer)s?['’]?s?['’]? )?[Cc]onclusions?\b")
OTHER_SECTIONS = re.compile(r"\b(?:RESULTS?|FINDINGS?|METHODS?|BACKGROUND|AIMS?|OBJECTIVES?|INTRODUCTION)\b")
"""A section with such a word in its label is no conclusion alone, as "RESULTS AND CONCLUSIONS"."""


def conclusion(citation: Citation) -> Pair | str:
    """The conclusion from the title and the abstract before it. What comes after the conclusion is left out."""
    place = find_conclusion(citation.abstract)
    if place is None:
        return "without conclusion"
    before = citation.abstract[: place.label].strip()
    if not before:
        return "conclusion comes first"
    target = citation.abstract[place.begin : place.end].strip()
    return Pair(join_text(citation.title, before), target)


class Place(NamedTuple):
    """Where a section stands in a text, in characters."""

    label: int
    begin: int
    """Of what follows the label."""
    end: int


def find_conclusion(abstract: str) -> Place | None:
    """The first section that is a conclusion by its label, from there to the next label; None if there is none.

    Its label is one in capitals with the word CONCLUSION or CONCLUSIONS and none of OTHER_SECTIONS, or a phrase such as
    "Conclusion:", "Authors' conclusions:" or "Conclusions and relevance:". A label begins the abstract or follows the
    end of a sentence. In capitals it may also follow a sentence without an end; it is then read from the word
    CONCLUSION on. The next label, such as "TRIAL REGISTRATION:", ends the section.
    """
    if "onclusion" not in abstract and "CONCLUSION" not in abstract:
        return None
    labels = LABEL.finditer(abstract)
    for label in labels:
        start = _start_of_conclusion(abstract, label)
        if start is not None:
            ends = (other.start() for other in labels if _ends_section(abstract, label.end(), other.start()))
            return Place(start, label.end(), next(ends, len(abstract)))
    return None


def _start_of_conclusion(abstract: str, label: re.Match[str]) -> int | None:
    begins = _begins_sentence(abstract, label.start())
    if not label[1]:
        return label.start() if begins and AS_PHRASE.match(label[0]) else None
    word = IN_CAPITALS.search(label[0])
    if not word or OTHER_SECTIONS.search(label[0]):
        return None
    return label.start() if begins else label.start() + word.start()


def _ends_section(abstract: str, begin: int, start: int) -> bool:
    """Whether a label ends the section whose text begins at `begin`. One that follows at once does not."""
    return bool(abstract[begin:start].strip()) and _begins_sentence(abstract, start)


def _begins_sentence(abstract: str, start: int) -> bool:
    before = abstract[:start].rstrip()
    return not before or before.endswith(SENTENCE_ENDS)


# Infilling


def infilling(citation: Citation) -> Pair:
    """The whole text from the text with masked spans of words (`draw_spans`), a function of the PMID."""
    text = join_text(citation.title, citation.abstract)
    return Pair(mask_words(text, citation.pmid), text)


def mask_words(text: str, pmid: int) -> list[str | int]:
    """Pieces of the text in order, with MASK for each span that is masked. Words are what spaces separate.

    The pieces keep their spaces, so the text comes back if its masked words stand in the places of the masks.
    """
    words = [word.span() for word in re.finditer(r"\S+", text)]
    pieces: list[str | int] = []
    begin = 0
    for first, last in draw_spans(len(words), MASK_SHARE, SPAN_LENGTH, draws_of(SEED, pmid)).tolist():
        start = words[first][0] if first < len(words) else len(text)
        pieces += [text[begin:start], MASK]
        begin = words[last - 1][1] if last > first else start
    return [piece for piece in [*pieces, text[begin:]] if piece != ""]


TASKS: dict[str, Task] = {"title": title, "conclusion": conclusion, "infilling": infilling}

"""Invented benchmark files in the published formats, and where the real ones lie."""

import gzip
import json
from pathlib import Path

from tests.shared import SHARED

REAL = {
    "pubmedqa": SHARED / "data" / "pubmedqa",
    "hoc": SHARED / "data" / "benchmarks" / "hoc",
    "bc5cdr-relations": SHARED / "data" / "benchmarks" / "bc5cdr",
    "bc5cdr-entities": SHARED / "data" / "benchmarks" / "bc5cdr",
}
PUBTATOR = (
    "11|t|Dravonin causes itch.\n11|a|Rats had an itch.\n"
    "11\t0\t8\tDravonin\tChemical\tD1\n11\t16\t20\titch\tDisease\tD2\n11\t34\t38\titch\tDisease\tD2\n11\tCID\tD1\tD2\n\n"
    "12|t|Nothing.\n12|a|No mention.\n\n"
)


def write_pubmedqa(folder: Path, questions: int = 60) -> None:
    """As many questions as asked for; the answers run yes, no, maybe, yes ...; every second one is a test question."""
    decisions = {str(100 + number): ("yes", "no", "maybe")[number % 3] for number in range(questions)}
    records = {
        pmid: {
            "QUESTION": f"Does  Dravonin{pmid} cause itch?",
            "CONTEXTS": [f"We gave Dravonin{pmid}\nto rats.", "They were watched."],
            "LONG_ANSWER": "The conclusion.",
            "final_decision": decision,
        }
        for pmid, decision in decisions.items()
    }
    (folder / "ori_pqal.json").write_text(json.dumps(records))
    (folder / "test_ground_truth.json").write_text(json.dumps(dict(list(decisions.items())[::2])))


def write_hoc(folder: Path) -> None:
    """Three sentences in each split. The training split has two labels in one line."""
    lines = "Cells divide .\tempty\n\nVessels grow\tinducing angiogenesis\nBoth\t{}\n"
    for name in ("valid", "test"):
        (folder / f"{name}.tsv").write_text(lines.format("cellular energetics"))
    (folder / "train.tsv").write_text(lines.format("inducing angiogenesis|resisting cell death"))


def write_relations(folder: Path) -> None:
    """Two abstracts. The longest name of D1 is Dravonin hydrate."""
    records = {
        "11": {
            "title": "Dravonin causes itch",
            "abstract": "Rats had an ITCH.",
            "relations": [{"chemical": "D1", "disease": "D2"}, {"chemical": "D1", "disease": "D3"}],
            "chemical2id": {"dravonin": "D1", "dravonin hydrate": "D1"},
            "disease2id": {"itch": "D2", "rash": "D3"},
        },
        "12": {
            "title": "Kalitinib.",
            "abstract": "It helps.",
            "relations": [{"chemical": "D4", "disease": "D2"}],
            "chemical2id": {"kalitinib": "D4"},
            "disease2id": {"itching": "D2"},
        },
    }
    for name in ("train", "valid", "test"):
        (folder / f"{name}.json").write_text(json.dumps(records))


def write_entities(folder: Path) -> None:
    """Two abstracts, one without a mention, gzipped."""
    for part in ("Training", "Development", "Test"):
        (folder / f"CDR_{part}Set.PubTator.txt.gz").write_bytes(gzip.compress(PUBTATOR.encode()))


WRITE = {
    "pubmedqa": write_pubmedqa,
    "hoc": write_hoc,
    "bc5cdr-relations": write_relations,
    "bc5cdr-entities": write_entities,
}
"""From the name of each benchmark to what writes its invented files."""

"""The items of a benchmark as a folder of records to fine-tune on."""

import hashlib
from pathlib import Path
from typing import Any

from data.common.files import UserError, json_line, make_folder, write_json_lines
from pretrain.tasks import TASKS
from pretrain.tasks.task import Item

SPLITS = ("train", "validation", "test")


def write_records(task: str, kind: str, data: Path, out: Path) -> dict[str, Any]:
    """Make the folder `out` with a file of records for each split. Returns its manifest.

    task: the name of a benchmark. kind: the objective that will read the records. data: the benchmark's own files.
    Raises UserError if those are missing or malformed, or if `out` holds other records.
    """
    if task not in TASKS:
        raise UserError(f"{task}: no such benchmark; choose from {', '.join(TASKS)}")
    splits = {split: [as_record(item, kind) for item in TASKS[task](data, split).items] for split in SPLITS}

    def fill(folder: Path) -> dict[str, Any]:
        return {split: write_json_lines(folder / f"{split}.jsonl", records) for split, records in splits.items()}

    hashes = {split: hashlib.sha256(b"".join(map(json_line, records))).hexdigest() for split, records in splits.items()}
    return make_folder(out, "records", {"task": task, "records": hashes}, fill)


def as_record(item: Item, kind: str) -> dict[str, Any]:
    """An item as the objective `kind` reads it."""
    if kind in ("prompt_target", "source_target"):
        return {"id": item.id, kind.removesuffix("_target"): item.prompt, "target": item.target}
    spans = all(isinstance(answer, tuple) and len(answer) == 3 for answer in item.answers)
    if kind == "token_classification" and spans:
        keys = ("start", "end", "label")
        named = [dict(zip(keys, answer, strict=True)) for answer in item.answers]
        return {"id": item.id, "text": item.text, "spans": named}
    if kind == "sequence_classification" and all(isinstance(answer, str) for answer in item.answers):
        return {"id": item.id, "text": item.text, "labels": list(item.answers)}
    raise UserError(f'objective.kind = "{kind}": learns nothing from a benchmark')

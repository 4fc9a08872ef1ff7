"""What a run recorded in `metrics.jsonl`: its curves, and what each of its starts was made with.

A line of figures is `{"step": 10, "train/loss": 5.1, ...}`. A line of a start is `{"step": 0, "start": {...}}`; every
start writes one, because a resume may have other settings, ranks or versions.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.common.files import MANIFEST, UserError, read_json, sha256
from data.common.settings import read_toml


@dataclass(frozen=True)
class Record:
    """The record of one run."""

    figures: dict[int, dict[str, float]]
    """Step -> name -> value."""
    starts: dict[int, dict[str, Any]]
    """Step at which the run was started or resumed -> name -> value: settings, ranks, devices, versions."""

    def curve(self, name: str) -> dict[int, float]:
        """Step -> value, of one figure."""
        return {step: values[name] for step, values in self.figures.items() if name in values}

    def newest_start(self) -> dict[str, Any]:
        """What the run was made with the last time that it was started."""
        return self.starts[max(self.starts)]


def read_records(runs: list[Path]) -> dict[str, Record]:
    """Name -> record of each run. A run's name is that of its folder, or its path if two folders share a name.

    Raises UserError if a run was named twice or has recorded nothing.
    """
    folders = [run.resolve() for run in runs]
    for number, folder in enumerate(folders):
        if folder in folders[:number]:
            raise UserError(f"{runs[number]}: is named twice")
    unique = len({folder.name for folder in folders}) == len(folders)
    return {(folder.name if unique else str(run)): read_record(run) for run, folder in zip(runs, folders, strict=True)}


def read_record(run: Path) -> Record:
    """The record of a run, which may still be in progress. Raises UserError if it has none or it is damaged."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run}: has no metrics.jsonl, so it is not a run that has started")
    figures: dict[int, dict[str, float]] = {}
    starts: dict[int, dict[str, Any]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):  # the last line: a kill cut it short, or the run is writing it
            break
        try:
            values = json.loads(line)
            step = values.pop("step")
        except (ValueError, AttributeError, KeyError):
            raise UserError(f"{path}: line {number} is damaged; remove that line") from None
        if "start" in values:  # of two starts at one step, the first has left nothing behind
            starts[step] = values["start"]
        else:
            figures.setdefault(step, {}).update(values)
    if not figures:
        raise UserError(f"{run}: has recorded no figures yet")
    return Record(figures, starts or {0: _settings_of_folder(run)})


def settings_record(recipe: dict[str, dict[str, Any]], data: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recipe by their full names, such as "train.steps".

    data: the identity of the data. Paths give way to what they lead to: a folder of shards or records to the hashes of
    its content, and a DeepSpeed file to its sha256.
    """
    flat = {f"{section}.{key}": value for section, keys in recipe.items() for key, value in keys.items()}
    del flat["train.run"]
    config = Path(flat.get("deepspeed.config", ""))
    content = {f"data.{name}": data[name] for name in ("shards", "records") if name in data}
    return flat | content | ({"deepspeed.config": sha256(config)} if config.is_file() else {})


def _settings_of_folder(run: Path) -> dict[str, Any]:
    """The settings of a run by an earlier version, which did not record its starts."""
    try:
        recipe = read_toml(run / "recipe.toml")
    except FileNotFoundError:
        raise UserError(f"{run}: has no recipe.toml, so it is not a run") from None
    manifest = read_json(run / MANIFEST) if (run / MANIFEST).is_file() else {}
    return settings_record(recipe, manifest.get("data", {}))


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    lines.insert(1, ["---"] * len(header))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

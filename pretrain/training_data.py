"""What a model was trained on: a list of stages, one for each run that trained it, in the run and in its export."""

from pathlib import Path
from typing import Any

from data.common.files import read_json
from pretrain.objectives.objective import Objective
from pretrain.recipe import Recipe

FILE = "training-data.json"


def read_stages(folder: Path) -> list[dict[str, Any]]:
    """The stages that a run or an exported folder records, the first one first. Empty if it records none."""
    return read_json(folder / FILE) if (folder / FILE).is_file() else []


def stages_of_run(folder: Path, recipe: Recipe, objective: Objective) -> list[dict[str, Any]]:
    """The stages of a run: those of the weights that it started from, and its own.

    A run that goes on with other data has one more stage.
    """
    before = read_stages(folder)
    if not before and recipe.model.weights:
        before = read_stages(Path(recipe.model.weights))
    own = stage(objective)
    return before if before[-1:] == [own] else [*before, own]


def stage(objective: Objective) -> dict[str, Any]:
    """What an objective learns from, as JSON holds it, without names of files and folders."""
    kind, figures = objective.describe()
    corpora = {name: _describe_corpus(manifest) for name, manifest in objective.corpora().items()}
    return {"kind": kind, "figures": figures, "corpora": corpora, "benchmarks": objective.benchmarks()}


def _describe_corpus(manifest: dict[str, Any]) -> dict[str, Any]:
    inputs = manifest["request"]["inputs"]
    pubmed = sum(file.endswith((".xml", ".xml.gz")) for file in inputs)
    return {
        "files": {"PubMed's XML": pubmed, "other text": len(inputs) - pubmed},
        "counts": {key: value for key, value in manifest["counts"].items() if key != "benchmarks"},
        "settings": {key: value for key, value in manifest["request"]["corpus"].items() if value not in (None, "")},
    }


def benchmark_in_words(folder: Path, benchmark: str, split: str) -> str:
    """What a model's folder says of the items of a benchmark in the text that the model was trained on."""
    stages = [each["benchmarks"] for each in read_stages(folder)]
    counts = [each[benchmark][split] for each in stages if split in each.get(benchmark, {})]
    if not counts:
        return f"{folder}: does not say whether these items were in its training text (biogpt corpus --benchmarks)"
    most = max(counts, key=lambda each: each["in_training"])
    searched = f"{most['items'] - most['not_searched']:,} of {most['items']:,} items were looked for"
    return f"{folder}: {most['in_training']:,} items were in its training text; {searched}"

"""Benchmarks of models, for `biogpt benchmark`."""

import json
from pathlib import Path
from typing import Any, cast, get_args

from data.common.files import CARD, UserError, read_json, whole_file
from data.common.workers import progress
from data.shards.records import read_records
from pretrain.answers import Answer, Scoring, choose, open_language_model, write
from pretrain.classifiers import TEXTS, TOKENS, find_entities, find_labels
from pretrain.export.card import add_scores, check_card
from pretrain.hf_folder import WITH_BERT
from pretrain.tasks import TASKS
from pretrain.tasks.figures import LEVEL, interval
from pretrain.tasks.task import ChoiceTask, SpanTask, Task, WritingTask
from pretrain.training_data import benchmark_in_words

SPLIT = "test"


def benchmark(
    name: str, given: Path, folder: Path, score: str, against: Path | None, out: Path | None, card: bool = False
) -> str:
    """The table of a model's figures on a benchmark's test split, with their intervals.

    given, against: an HF folder or a results file; with two, the table has their paired difference too. folder:
    of the benchmark's files. out: where the model's answers are written as JSON lines, one for each item. card: write
    the figures into the model card of `given`. Raises UserError for an unknown benchmark, and as its reader, the models
    and the results files do.
    """
    if name not in TASKS:
        raise UserError(f"{name}: no such benchmark; choose from {', '.join(TASKS)}")
    if score not in get_args(Scoring):
        raise UserError(f"--score {score}: choose from {', '.join(get_args(Scoring))}")
    scoring = cast(Scoring, score)
    if out is not None and not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: its folder does not exist")
    if card:
        check_card(given / CARD)
    task = TASKS[name](folder, SPLIT)
    sources = [given] if against is None else [given, against]
    read = {source: read_results(source, task) for source in sources if source.is_file()}  # mistakes are found first
    answered = [read.get(source) or answer(source, task, scoring) for source in sources]
    if out is not None:
        write_results(out, task, answered[0])
    if card:
        add_scores(given / CARD, [scores_row(task, answered[0])])
    lines = [f"{task.name}: {SPLIT} split, {len(task.items):,} items", table(task, sources, answered)]
    return "\n".join([*lines, *(benchmark_in_words(source, name, SPLIT) for source in sources if source.is_dir())])


def answer(folder: Path, task: Task, scoring: Scoring) -> list[Answer]:
    """What a model says about each item. Raises UserError if it cannot do the task."""
    if (folder / "recipe.toml").is_file():
        raise UserError(f"{folder}: is a run; export it first (biogpt export {folder} --out hf/)")
    kind = (read_json(folder / "config.json").get("architectures") or ["model that does not say its kind"])[0]
    title, items = f"{task.name}: {folder}", len(task.items)
    if isinstance(task, SpanTask) and kind == TOKENS:
        with progress(title, items) as advance:
            return find_entities(folder, task, advance)
    if isinstance(task, ChoiceTask) and kind == TEXTS:
        with progress(title, items) as advance:
            return find_labels(folder, task, advance)
    refusal = UserError(f"{folder}: is a {kind}, which cannot do {task.name}; see docs/benchmarking.md")
    if isinstance(task, SpanTask) or kind in (TOKENS, TEXTS, WITH_BERT):
        raise refusal
    model = open_language_model(folder)
    if isinstance(task, ChoiceTask):
        with progress(title, items * len(task.choices())) as advance:
            return choose(model, task, scoring, advance)
    assert isinstance(task, WritingTask)
    if model.has_encoder:
        raise refusal
    with progress(title, items) as advance:
        return write(model, task, advance)


def table(task: Task, sources: list[Path], answered: list[list[Answer]]) -> str:
    """A line for each model and, if there are two, one for the first less the second. Two columns for each figure."""
    right = [item.answers for item in task.items]
    rows = [["", *(cell for figure in task.figures for cell in (figure.name, f"{LEVEL} % interval"))]]
    counts = [
        [figure.counts(right, [each.answers for each in answers]) for figure in task.figures] for answers in answered
    ]
    for source, answers, of_source in zip(sources, answered, counts, strict=True):
        scoring = answers[0].scoring
        row = [f"{source} ({scoring})" if scoring else str(source)]
        for figure, of_figure in zip(task.figures, of_source, strict=True):
            value, low, high = interval(figure, of_figure)
            row += [f"{value:.1f}", f"{low:.1f} to {high:.1f}"]
        rows.append(row)
    if len(counts) == 2:
        row = ["difference"]
        for figure, first, second in zip(task.figures, *counts, strict=True):
            value, low, high = interval(figure, first, second)
            row += [f"{value:+.1f}", f"{low:+.1f} to {high:+.1f}"]
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )


def scores_row(task: Task, answers: list[Answer]) -> list[str]:
    """What the model card says of a task: its name, the number of items, and its figures with their intervals."""
    right, cells = [item.answers for item in task.items], []
    for figure in task.figures:
        value, low, high = interval(figure, figure.counts(right, [each.answers for each in answers]))
        cells.append(f"{figure.name} {value:.1f} ({low:.1f} to {high:.1f})")
    scoring = f", {answers[0].scoring}" if answers[0].scoring else ""
    return [f"{task.name} {SPLIT}{scoring}", f"{len(task.items):,}", ", ".join(cells)]


def write_results(path: Path, task: Task, answered: list[Answer]) -> None:
    """Write a JSON object for each item: what is right, what the model answered, and its scores or its text."""
    with whole_file(path) as stream:
        for item, given in zip(task.items, answered, strict=True):
            line: dict[str, Any] = {"id": item.id, "pmid": item.pmid, "right": item.answers, "answers": given.answers}
            line |= {"scoring": given.scoring, "scores": given.scores} if given.scores else {}
            line |= {"text": given.text} if given.text else {}
            stream.write(f"{json.dumps(line, ensure_ascii=False)}\n".encode())


def read_results(path: Path, task: Task) -> list[Answer]:
    """The answers in a results file. Raises UserError if it does not hold the items of this task in their order."""
    records = read_records(path, {"id": str, "right": list, "answers": list})
    if len(records) != len(task.items):
        raise UserError(
            f"{path}: holds {len(records)} items, but {task.name} has {len(task.items)} in its {SPLIT} split"
        )
    for record, item in zip(records, task.items, strict=True):
        if record.fields["id"] != item.id or _tuples(record.fields["right"]) != item.answers:
            raise UserError(f"{record.place}: is not item {item.id} of {task.name}; the file belongs to other data")
    return [Answer(_tuples(record.fields["answers"]), scoring=record.fields.get("scoring", "")) for record in records]


def _tuples(answers: list[Any]) -> tuple[Any, ...]:
    return tuple(tuple(each) if isinstance(each, list) else each for each in answers)

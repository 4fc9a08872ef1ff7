"""What pretraining is worth: a model pretrained here, and the same one untrained, fine-tuned and scored.

`python -m tests.bench.downstream --out FOLDER` pretrains a decoder of 2.9 million parameters on the real abstracts,
without those that hold items of the benchmarks, and fine-tunes it on BC5CDR's spans and on PubMedQA. Everything that
is done is kept in FOLDER, so a bench that was cut off goes on. It took 165 minutes of two cores.
"""

import argparse
import contextlib
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.common.files import read_json
from data.corpus.benchmarks import Benchmarks
from launch.data_commands import benchmark_items
from pretrain.benchmark import answer, read_results, write_results
from pretrain.export.folder import export
from pretrain.recipe import load_recipe
from pretrain.record import read_record
from pretrain.tasks import TASKS
from pretrain.tasks.figures import Answers, Figure, accuracy, interval, micro_f1
from pretrain.tasks.records import write_records
from pretrain.tasks.task import Task
from pretrain.train import train
from tests.bench.learning import prepare
from tests.bench.machine import machine
from tests.bench.needs import need_shared
from tests.bench.points import Figures, Points, train_on_two_ranks
from tests.paths import SHARED

MERGES, EPOCHS, BATCH = 5_000, 3, 16_384  # tokens a step
MODEL = [
    "model.preset=tiny", "model.hidden_size=192", "model.num_attention_heads=6", "model.intermediate_size=768",
    "model.max_position_embeddings=512",
]  # fmt: skip
PRETRAINING = [
    *MODEL, "optimizer.kind=muon", "optimizer.learning_rate=5e-3", "optimizer.weight_decay=0.1",
    "optimizer.betas=[0.9, 0.95]", "schedule.kind=linear", "train.micro_batch_size=8", "train.precision=bf16",
    f"train.global_batch_tokens={BATCH}", "deepspeed.stage=1", "checkpoint.every_steps=50", "evaluate.every_steps=250",
]  # fmt: skip
DATA = {"bc5cdr-entities": "benchmarks/bc5cdr", "pubmedqa": "pubmedqa"}
"""The tasks, and the folders of their files in the shared data."""
SEEDS, RATES = (1, 2, 3), (1e-3, 4e-3)
STARTS = ("pretrained", "untrained")


@dataclass(frozen=True)
class FineTuning:
    """One run of fine-tuning."""

    task: str
    start: str
    """One of STARTS."""
    rate: float
    seed: int = 1

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.task}-{self.start}-{self.rate:g}-{self.seed}"

    def settings(self, folder: Path) -> list[str]:
        """What its recipe says beyond the bundled one. All runs of a task have the same number of epochs."""
        batch, epochs = {"bc5cdr-entities": (16, 8), "pubmedqa": (16, 4)}[self.task]
        records = folder / "records" / self.task
        steps = sum(1 for _ in (records / "train.jsonl").open()) * epochs // batch
        return [
            f"data.records={records}", f"model.weights={folder / self.start}",
            f"train.run={folder / 'runs' / self.name}", f"train.steps={steps}", f"train.seed={self.seed}",
            f"train.global_batch_examples={batch}", "train.micro_batch_size=8", "train.precision=bf16",
            "deepspeed.stage=1", "model.hidden_dropout_prob=0.0", "model.attention_probs_dropout_prob=0.0",
            f"optimizer.learning_rate={self.rate}",
            "schedule.kind=linear", f"schedule.warmup_steps={steps // 10}", f"checkpoint.every_steps={steps // epochs}",
            f"evaluate.every_steps={steps // epochs}", "checkpoint.keep_last=1", "checkpoint.background=false",
        ]  # fmt: skip


def write_both_records(folder: Path) -> None:
    """The records of both tasks."""
    (folder / "records").mkdir(exist_ok=True)
    for task, kind in (("bc5cdr-entities", "token_classification"), ("pubmedqa", "prompt_target")):
        write_records(task, kind, SHARED / "data" / DATA[task], folder / "records" / task)


def pretrain(folder: Path) -> None:
    """Train the model on two ranks, or go on where it was. Also save its first weights, by a step without change."""
    tokens = read_json(folder / "shards" / "manifest.json")["counts"]["train"]["tokens"]
    steps = tokens * EPOCHS // BATCH
    settings_of_start = {
        "pretrained": [f"train.steps={steps}", f"schedule.warmup_steps={steps // 10}"],
        "untrained": [
            "train.steps=1", "schedule.warmup_steps=0", "optimizer.learning_rate=1e-30",
            "schedule.initial_learning_rate=0",
        ],
    }  # fmt: skip
    for start, given in settings_of_start.items():
        settings = [*PRETRAINING, *given, f"data.shards={folder / 'shards'}", f"train.run={folder / start}"]
        train_on_two_ranks(settings)


def measure(tuning: FineTuning, folder: Path) -> Figures:
    """Fine-tune, answer the test split, and return the best score of the validation split."""
    task = read_task(tuning.task)
    with contextlib.redirect_stdout(io.StringIO()):
        trained = train(load_recipe(f"finetune-{tuning.task}", tuning.settings(folder)))
        hf = folder / "hf" / tuning.name
        export(trained.folder, hf, step="best")
    (folder / "results").mkdir(exist_ok=True)
    write_results(folder / "results" / f"{tuning.name}.jsonl", task, answer(hf, task, "sum"))
    return {"validation": best_score(trained.folder)}


def best_score(run_folder: Path) -> float:
    """What chooses the best checkpoint: the highest F1, or the lowest loss, here with a minus."""
    record = read_record(run_folder)
    scores = record.curve("validation/micro_f1")
    return max(scores.values()) if scores else -min(record.curve("validation/loss").values())


def read_task(name: str) -> Task:
    """The test split of a benchmark."""
    return TASKS[name](SHARED / "data" / DATA[name], "test")


def figures_of(task: str) -> dict[str, tuple[Figure, str]]:
    """What is reported of a task: name -> a figure, and the one label whose spans it counts, or ""."""
    if task == "pubmedqa":
        return {"accuracy": (accuracy(), "")}
    return {"diseases, exact F1": (micro_f1(), "Disease"), "chemicals and diseases, exact F1": (micro_f1(), "")}


def of_label(answers: Answers, label: str) -> Answers:
    """The spans of a label, or all answers if it is ""."""
    return tuple(each for each in answers if each[-1] == label) if label else answers


def table(folder: Path, chosen: dict[tuple[str, str], float], scores: dict[FineTuning, float]) -> str:
    """Everything measured, in Markdown. An interval draws items, each with its answers of all seeds."""
    lines = ["| benchmark | start | learning rate | seeds | mean, 95 % interval |", "|---|---|---|---|---|"]
    for name in DATA:
        task = read_task(name)
        for title, (figure, label) in figures_of(name).items():
            summed = {}
            for start in STARTS:
                runs = [FineTuning(name, start, chosen[name, start], seed) for seed in SEEDS]
                right = [of_label(item.answers, label) for item in task.items]
                counts = [
                    figure.counts(right, [of_label(each.answers, label) for each in answers])
                    for answers in (read_results(folder / "results" / f"{run.name}.jsonl", task) for run in runs)
                ]
                summed[start] = np.sum(counts, axis=0)
                each = ", ".join(f"{float(figure.value(of_seed.sum(0))):.1f}" for of_seed in counts)
                value, low, high = interval(figure, summed[start])
                rate = f"{chosen[name, start]:g}"
                lines.append(f"| {title} | {start} | {rate} | {each} | {value:.1f} ({low:.1f} to {high:.1f}) |")
            value, low, high = interval(figure, *(summed[start] for start in STARTS))
            lines.append(f"| {title} | difference, paired | | | {value:+.1f} ({low:+.1f} to {high:+.1f}) |")
    lines += ["", "| validation score by learning rate, seed 1 | " + " | ".join(f"{rate:g}" for rate in RATES) + " |"]
    lines += ["|---" * (len(RATES) + 1) + "|"]
    for name in DATA:
        for start in STARTS:
            cells = [f"{scores[FineTuning(name, start, rate)]:.3f}" for rate in RATES]
            lines.append(f"| {name}, {start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run what has not been run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("downstream"), help="folder of everything; done parts are kept"
    )
    folder = parser.parse_args().out.absolute()
    need_shared()
    prepare(folder, MERGES, kept_out=Benchmarks(benchmark_items(SHARED / "data")))
    write_both_records(folder)
    pretrain(folder)
    points = Points(folder, 2, measure, "validation")
    points.run(FineTuning(task, start, rate) for task in DATA for start in STARTS for rate in RATES)
    scores = {tuning: figures["validation"] for tuning, figures in points.figures.items()}
    chosen = {
        (task, start): max(RATES, key=lambda rate: scores[FineTuning(task, start, rate)])
        for task in DATA
        for start in STARTS
    }
    points.run(FineTuning(*key, rate, seed) for key, rate in chosen.items() for seed in SEEDS[1:])
    points.close()
    print(f"\n{machine()}\n\n{table(folder, chosen, scores)}")


if __name__ == "__main__":
    main()

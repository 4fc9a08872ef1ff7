"""What a token teaches: held-out loss by recipe. `python -m tests.bench.learning --budget 3e6` prints a table.

Every point is a run with a complete schedule of its own length. Finished runs are kept in `--out`, so a bench that was
cut off goes on. Needs the real abstracts; about 80 minutes on two idle cores with the default budget.
"""

import argparse
import contextlib
import gzip
import io
import itertools
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data.common.files import whole_file
from data.corpus.benchmarks import Benchmarks
from data.corpus.build import make_corpus
from data.shards.build import make_shards
from data.text.train import train_tokenizer
from pretrain.checkpoint import Diverged, list_checkpoints, read_model
from pretrain.held_out import held_out_loss
from pretrain.recipe import load_recipe
from pretrain.record import read_record
from pretrain.report import plot_curves
from pretrain.run import Run
from pretrain.train import train
from tests.bench.machine import machine
from tests.bench.needs import need_shared
from tests.bench.points import Figures, Points
from tests.paths import SHARED

MERGES = 3_800


@dataclass(frozen=True)
class Size:
    """Of the decoder and of its global batch."""

    words: str
    batch: int
    """Tokens."""
    settings: tuple[str, ...]


SIZES = {
    "1M": Size("1.3 million parameters, context 128, fp32", 4_096, (
        "model.preset=tiny", "train.precision=fp32", "deepspeed.stage=0",
    )),
    "6M": Size("5.9 million parameters, context 256, bf16", 8_192, (
        "model.hidden_size=256", "model.num_hidden_layers=6", "model.num_attention_heads=4",
        "model.intermediate_size=1024", "model.max_position_embeddings=256", "train.precision=bf16",
        "deepspeed.stage=1",
    )),
}  # fmt: skip
"""The first for CPUs, where bf16 is slower, the second for a GPU."""
COMMON = [
    "train.micro_batch_size=32", "train.compile=false", "checkpoint.background=false",
    "checkpoint.keep_best=false", "log.every_steps=25",
]  # fmt: skip
WELL_TUNED = [
    "schedule.kind=linear", "optimizer.betas=[0.9, 0.95]", "optimizer.gradient_clipping=1.0",
    "optimizer.decay_biases_and_norms=false", "model.hidden_dropout_prob=0.0",
    "model.attention_probs_dropout_prob=0.0",
]  # fmt: skip
ARMS = {
    # As launch/recipes/biogpt.toml: dropout 0.1, betas 0.9 and 0.98, no clipping. Its warm-up is 10 % of its steps too.
    "published": [
        "schedule.kind=inverse_sqrt", "optimizer.betas=[0.9, 0.98]", "optimizer.gradient_clipping=0.0",
        "optimizer.decay_biases_and_norms=true", "model.hidden_dropout_prob=0.1",
        "model.attention_probs_dropout_prob=0.1",
    ],
    "adamw": WELL_TUNED,
    "muon": [*WELL_TUNED, "optimizer.kind=muon"],
}  # fmt: skip
FIRST_RATES = {"published": 2, "adamw": 3, "muon": 3}
"""The middle of the first grid, as an index of RATES."""
RATES = [1e-3 * 2**power for power in range(-2, 9)]
DECAYS = [0.01, 0.03, 0.1, 0.3, 1.0]
FIRST_DECAYS = (0, 2)
OPTIONS: dict[str, str] = {}
"""Settings that are tried one by one on top of the tuned Muon: what they do, in words -> the setting."""
AVERAGES = (2, 4)
"""How many of a final run's last checkpoints are averaged. It writes one every 16th part of its steps."""
SHARES = (0.25, 0.375, 0.5)
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Point:
    """One run."""

    arm: str
    rate: int
    """Index of RATES."""
    decay: int
    """Index of DECAYS."""
    steps: int
    size: str
    """One of SIZES."""
    seed: int = 1
    option: str = ""
    """One of OPTIONS."""
    final: bool = False
    """Whether its last checkpoints are kept, and averaged."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        option = f"-{self.option.replace(' ', '-')}" if self.option else ""
        return f"{self.size}-{self.arm}-{RATES[self.rate]:g}-{DECAYS[self.decay]:g}-{self.steps}-{self.seed}{option}"

    @property
    def tokens(self) -> int:
        """It is trained on."""
        return self.steps * SIZES[self.size].batch

    def settings(self, folder: Path) -> list[str]:
        """What its recipe says."""
        own = [
            f"data.shards={folder / 'shards'}", f"train.run={folder / 'runs' / self.name}",
            f"train.global_batch_tokens={SIZES[self.size].batch}", f"train.steps={self.steps}",
            f"train.seed={self.seed}", f"schedule.warmup_steps={self.steps // 10}",
            f"optimizer.learning_rate={RATES[self.rate]}", f"optimizer.weight_decay={DECAYS[self.decay]}",
            f"evaluate.every_steps={-(-self.steps // 8) if self.final else self.steps}",
            f"checkpoint.every_steps={-(-self.steps // 16) if self.final else self.steps}",
            f"checkpoint.keep_last={max(AVERAGES) if self.final else 1}",
        ]  # fmt: skip
        option = [OPTIONS[self.option]] if self.option else []
        return [*SIZES[self.size].settings, *COMMON, *ARMS[self.arm], *own, *option]


def prepare(
    folder: Path, merges: int = MERGES, keep: Callable[[str], bool] = bool, kept_out: Benchmarks | None = None
) -> None:
    """corpus/, tokenizer/ and shards/ of the shared abstracts, without the items of some benchmarks.

    A text a line, equal texts removed before the split, so that none is on both sides. keep: as of `write_texts`.
    """
    need_shared()
    folder.mkdir(parents=True, exist_ok=True)
    write_texts(folder / "texts.txt", keep)
    make_corpus([folder / "texts.txt"], folder / "corpus", 0.01, 0.0, workers=2, benchmarks=kept_out)
    train_tokenizer(folder / "corpus", folder / "tokenizer", merges=merges, min_count=1, workers=2)
    make_shards(folder / "corpus", folder / "tokenizer", folder / "shards", workers=2)


def write_texts(path: Path, keep: Callable[[str], bool]) -> None:
    """Write the shared abstracts, a text a line. Of equal texts one is kept, and none that `keep` does not want."""
    texts: dict[str, None] = {}
    for record in shared_abstracts():
        words = (record.get("title"), record.get("abstract"), record.get("text"))
        texts[" ".join(" ".join(part for part in words if part).split())] = None
    with whole_file(path) as stream:
        stream.write("".join(f"{text}\n" for text in filter(keep, texts)).encode())


def shared_abstracts() -> Iterator[dict[str, str]]:
    """All records, in one order."""
    for given in sorted((SHARED / "data" / "abstracts").glob("*.jsonl.gz")):
        with gzip.open(given, "rt", encoding="utf-8") as stream:
            yield from map(json.loads, stream)


def measure(point: Point, folder: Path) -> Figures:
    """Train a point, and return its last held-out figures. Of its run the metrics are kept."""
    recipe = load_recipe("tiny", point.settings(folder))
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run = train(recipe)
        figures = {name: run.held_out[name] for name in ("loss", "bits_per_byte")}
        if point.final:
            figures |= {f"mean of {last}": averaged_loss(run, last) for last in AVERAGES}
    except Diverged:
        figures = {"loss": 1e9, "bits_per_byte": 1e9}
    shutil.rmtree(Path(recipe.train.run) / "checkpoints", ignore_errors=True)
    return figures


def averaged_loss(run: Run, last: int) -> float:
    """The held-out loss of the mean of a run's last checkpoints."""
    model, mean = (run.objective.build_model() for _ in range(2))
    for parameter in mean.parameters():
        parameter.data.zero_()
    for checkpoint in list_checkpoints(run.folder)[:last]:
        read_model(checkpoint, model)
        for total, parameter in zip(mean.parameters(), model.parameters(), strict=True):
            total.data.add_(parameter.data, alpha=1 / last)
    return held_out_loss(mean.eval(), run.objective.held_out(), 32, run.device)["loss"]


def first_grid(arm: str, steps: int, size: str) -> list[Point]:
    """Three rates by two decays."""
    middle = FIRST_RATES[arm]
    return [Point(arm, rate, decay, steps, size) for rate in range(middle - 1, middle + 2) for decay in FIRST_DECAYS]


def neighbours(point: Point) -> list[Point]:
    """The next rates, with the same decay, and the next decays, with the same rate."""
    around = [replace(point, rate=point.rate + step) for step in (-1, 1)]
    around += [replace(point, decay=point.decay + step) for step in (-1, 1)]
    return [each for each in around if 0 <= each.rate < len(RATES) and 0 <= each.decay < len(DECAYS)]


def main() -> None:
    """Run everything and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", type=float, default=3e6, help="tokens of one final run (default: 3 million)")
    parser.add_argument("--size", choices=SIZES, help="by default 6M if there is a GPU, else 1M")
    parser.add_argument("--workers", type=int, default=2, help="runs at once, a core each")
    parser.add_argument("--out", type=Path, default=Path("learning"), help="folder of the runs; done ones are kept")
    given = parser.parse_args()
    size = given.size or ("6M" if torch.cuda.is_available() else "1M")
    batch = SIZES[size].batch
    steps = round(given.budget / batch)
    third, shares = steps // 3, [round(steps * share) for share in SHARES]
    runs = {
        "grids, before they are extended": sum(len(first_grid(arm, third, size)) for arm in ARMS) * third,
        "finals": len(ARMS) * len(SEEDS) * steps,
        "shorter finals": len(SEEDS) * sum(shares),
        "options": len(OPTIONS) * len(SEEDS[:2]) * steps,
    }
    total = sum(runs.values()) * batch
    parts = ", ".join(f"{name} {count * batch / 1e6:.1f}" for name, count in runs.items())
    print(f"{total / 1e6:.0f} million tokens: {parts}", flush=True)
    prepare(given.out)
    bench = Points(given.out, given.workers, measure, "loss")
    best = bench.tune({arm: first_grid(arm, third, size) for arm in ARMS}, neighbours)
    finals = {
        arm: [replace(point, steps=steps, seed=seed, final=True) for seed in SEEDS] for arm, point in best.items()
    }
    shorter = {count: [replace(point, steps=count, final=False) for point in finals["muon"]] for count in shares}
    options = {
        option: [replace(point, option=option, final=False) for point in finals["muon"][:2]] for option in OPTIONS
    }
    bench.run(point for points in (*finals.values(), *shorter.values(), *options.values()) for point in points)
    print(f"\n{machine()}; {SIZES[size].words}, {batch:,} tokens a step\n")
    print(tables(bench, best, finals, shorter, options))
    names = {f"{arm}, seed {point.seed}": point for arm, points in finals.items() for point in points[:1]}
    records = {name: read_record(given.out / "runs" / point.name) for name, point in names.items()}
    plot_curves(records, given.out / "curves.png")
    bench.close()


def tables(
    bench: Points[Point],
    best: dict[str, Point],
    finals: dict[str, list[Point]],
    shorter: dict[int, list[Point]],
    options: dict[str, list[Point]],
) -> str:
    """Everything measured, in Markdown."""
    lines = [
        "| recipe | best of the grid | points | tokens | held-out loss, three seeds | bits per byte |",
        "|---|---|---|---|---|---|",
    ]
    for arm, points in finals.items():
        tried = sum(point.arm == arm and point.steps == best[arm].steps for point in bench.figures)
        chosen = f"rate {RATES[best[arm].rate]:g}, decay {DECAYS[best[arm].decay]:g}"
        lines.append(f"| {arm} | {chosen} | {tried} | {points[0].tokens:,} | {_summary(bench, points)} |")
    for points in shorter.values():
        lines.append(f"| muon | | | {points[0].tokens:,} | {_summary(bench, points)} |")
    goal = statistics.fmean(losses_of(bench, finals["adamw"]))
    curve = [
        (points[0].steps, statistics.fmean(losses_of(bench, points))) for points in (*shorter.values(), finals["muon"])
    ]
    share = tokens_to_reach(goal, curve) / finals["adamw"][0].steps
    lines += ["", f"Muon reaches AdamW's mean final loss, {goal:.4f}, with {share:.2f}x of its tokens."]
    lines += ["", "| change of the held-out loss | recipe | by seed |", "|---|---|---|"]
    for option, points in options.items():
        without = losses_of(bench, [replace(point, option="", final=True) for point in points])
        changes = [loss - other for loss, other in zip(losses_of(bench, points), without, strict=True)]
        lines.append(f"| {option} | muon | {_changes(changes)} |")
    for last, (arm, points) in itertools.product(AVERAGES, finals.items()):
        changes = [bench.figures[point][f"mean of {last}"] - bench.figures[point]["loss"] for point in points]
        lines.append(f"| mean of the last {last} of 16 checkpoints | {arm} | {_changes(changes)} |")
    return "\n".join(lines)


def losses_of(bench: Points[Point], points: list[Point]) -> list[float]:
    """Their held-out losses."""
    return [bench.figures[point]["loss"] for point in points]


def _summary(bench: Points[Point], points: list[Point]) -> str:
    losses, bits = ([bench.figures[point][name] for point in points] for name in ("loss", "bits_per_byte"))
    return f"{statistics.fmean(losses):.4f} ({min(losses):.4f} to {max(losses):.4f}) | {statistics.fmean(bits):.4f}"


def _changes(changes: list[float]) -> str:
    return ", ".join(f"{change:+.4f}" for change in changes)


def tokens_to_reach(goal: float, curve: list[tuple[int, float]]) -> float:
    """The steps of a run that ends at a loss, between runs of other lengths: linear in the logarithm of the steps.

    NaN if the goal lies outside of what was run.
    """
    for (fewer, higher), (more, lower) in itertools.pairwise(curve):
        if lower <= goal <= higher:
            part = (higher - goal) / max(higher - lower, 1e-12)
            return math.exp(math.log(fewer) + part * (math.log(more) - math.log(fewer)))
    return math.nan


if __name__ == "__main__":
    main()

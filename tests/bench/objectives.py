"""Does an encoder and a decoder learn? `python -m tests.bench.objectives --out FOLDER` writes titles of abstracts.

Three models of 1.3 million parameters a side read the first 128 tokens of a real abstract and learn its title: an
encoder and a decoder that start from a pretrained decoder or from drawn weights, and the pretrained decoder alone with
the abstract as its prefix. Each has its own learning rate, chosen in runs of a third, and three seeds. Finished runs in
FOLDER are kept, so a bench that was cut off goes on. With `--epochs 1` it took 110 minutes.
"""

import argparse
import contextlib
import io
import json
import shutil
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from data.common.files import read_manifest
from pretrain.checkpoint import Diverged
from pretrain.generate import Decoding, Prompt, generate
from pretrain.held_out import held_out_loss
from pretrain.load import best_device, load_model, load_run
from pretrain.objectives.kinds import make_objective
from pretrain.recipe import load_recipe
from pretrain.train import train
from tests.bench.learning import prepare, shared_abstracts, tokens_to_reach
from tests.bench.machine import machine
from tests.bench.needs import need_shared
from tests.bench.points import Figures, Points, train_on_two_ranks
from tests.bench.rouge import KINDS, lead_sentence, rouge_scores

RECIPE = "titles.toml"
SOURCE, LONGEST_TITLE, CONTEXT = 128, 48, 192  # tokens
BATCH, EPOCHS, PRETRAINING_BATCH = 64, 2, 48 * CONTEXT  # records, and tokens
WRITTEN = 500  # held-out titles that each model writes
HELD_OUT = 20  # one record of so many
DECODER = ["model.preset=tiny", f"model.max_position_embeddings={CONTEXT}", "train.precision=fp32", "deepspeed.stage=0"]
COMMON = [
    "optimizer.kind=muon", "optimizer.weight_decay=0.1", "optimizer.betas=[0.9, 0.95]",
    "optimizer.gradient_clipping=1.0", "schedule.kind=linear", "model.hidden_dropout_prob=0.0",
    "model.attention_probs_dropout_prob=0.0", "train.compile=false", "checkpoint.background=false",
    "checkpoint.keep_best=false", "checkpoint.keep_last=1", "log.every_steps=25",
]  # fmt: skip
KEYS = {"prompt_target": "prompt", "source_target": "source"}
"""The kinds of objectives, and what their records call the text that is read."""
ARMS = {
    "warm": "encoder and decoder, from the pretrained decoder",
    "random": "encoder and decoder, from drawn weights",
    "causal": "the pretrained decoder, with the abstract as its prefix",
}
RATES = [1e-3 * 2**power for power in range(-2, 7)]
FIRST_RATES = range(2, 5)
"""The first grid, as indices of RATES."""
SEEDS, SHARES = (1, 2, 3), (0.25, 0.5)
"""SHARES: of the steps, for shorter runs of the warm start."""


@dataclass(frozen=True)
class Titles:
    """One run that learns titles."""

    arm: str
    """One of ARMS."""
    rate: int
    """Index of RATES."""
    steps: int
    seed: int = 1
    final: bool = False
    """Whether it also writes titles, and is given the abstracts of others."""

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.arm}-{RATES[self.rate]:g}-{self.steps}-{self.seed}{'-final' * self.final}"

    def settings(self, folder: Path) -> list[str]:
        """What its recipe says."""
        kind = "prompt_target" if self.arm == "causal" else "source_target"
        start = [f"data.tokenizer={folder / 'tokenizer'}", *DECODER]
        if self.arm != "random":
            start = [f"model.weights={folder / 'pretrained'}", "train.precision=fp32", "deepspeed.stage=0"]
        return [
            *COMMON, *start, f"objective.kind={kind}", f"data.records={folder / kind}",
            f"train.run={folder / 'runs' / self.name}", f"train.global_batch_examples={BATCH}",
            "train.micro_batch_size=32", f"train.context_length={CONTEXT if self.arm == 'causal' else SOURCE}",
            f"train.steps={self.steps}", f"train.seed={self.seed}", f"schedule.warmup_steps={self.steps // 10}",
            f"optimizer.learning_rate={RATES[self.rate]}", f"evaluate.every_steps={self.steps}",
            f"checkpoint.every_steps={-(-self.steps // 3)}",
        ]  # fmt: skip


def make_inputs(folder: Path) -> None:
    """Tokenizer, shards and a pretrained decoder, from texts without the held-out titles; the records for each kind.

    In the folders shuffled-*, each held-out title has the abstract of the next.
    """
    pairs = list(titled())
    titles_held_out = tuple(title.casefold() for title, _ in pairs[::HELD_OUT])
    prepare(folder, keep=lambda text: bool(text) and not text.casefold().startswith(titles_held_out))
    (folder / RECIPE).write_text("")  # all settings are given
    pretrain(folder)
    if (folder / "shuffled-source_target" / "validation.jsonl").is_file():  # the last one
        return
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    cut_pairs = [list(cut(tokenizer, *pair)) for pair in pairs]
    held_out = [pair for each in cut_pairs[::HELD_OUT] for pair in each]
    del cut_pairs[::HELD_OUT]
    sources, titles = zip(*held_out, strict=True)
    splits = {
        "{}/train": [pair for each in cut_pairs for pair in each],
        "{}/validation": held_out,
        "shuffled-{}/validation": list(zip([*sources[1:], sources[0]], titles, strict=True)),
    }
    for kind, key in KEYS.items():
        for place, records in splits.items():
            path = folder / f"{place.format(kind)}.jsonl"
            path.parent.mkdir(exist_ok=True)
            lines = (json.dumps({key: source, "target": target}) + "\n" for source, target in records)
            path.write_text("".join(lines), encoding="utf-8")


def titled() -> Iterator[tuple[str, str]]:
    """The titles and abstracts of the records that have both. Of equal titles, or equal abstracts, one is kept."""
    seen: set[str] = set()
    for record in shared_abstracts():
        title, abstract = (" ".join((record.get(key) or "").split()) for key in ("title", "abstract"))
        keys = {title.casefold(), abstract.casefold()}
        if title and abstract and not keys & seen:
            yield title, abstract
            seen |= keys


def cut(tokenizer: Any, title: str, abstract: str) -> Iterator[tuple[str, str]]:
    """The source and the target of a record: the same words of an abstract for all arms. None of a long title."""

    def length(text: str) -> int:
        return len(tokenizer(text)["input_ids"])  # with `</s>`

    if length(abstract) > SOURCE:
        last = tokenizer(abstract, return_offsets_mapping=True)["offset_mapping"][SOURCE - 1]
        abstract = abstract[: last[1]].rsplit(" ", 1)[0]
        while length(abstract) > SOURCE:  # a word at the end of a text may have other tokens
            abstract = abstract.rsplit(" ", 1)[0]
    if length(title) <= LONGEST_TITLE:
        yield abstract, title


def pretrain(folder: Path) -> None:
    """Train the decoder once over its texts, on two ranks, or go on where it was."""
    tokens = read_manifest(folder / "shards", "shards")["counts"]["train"]["tokens"]
    steps = tokens // PRETRAINING_BATCH
    settings = [
        *DECODER, *COMMON, f"data.shards={folder / 'shards'}", f"train.run={folder / 'pretrained'}",
        f"train.global_batch_tokens={PRETRAINING_BATCH}", "train.micro_batch_size=24", f"train.steps={steps}",
        f"schedule.warmup_steps={steps // 10}", "optimizer.learning_rate=0.016", "checkpoint.every_steps=200",
        f"evaluate.every_steps={steps}",
    ]  # fmt: skip
    train_on_two_ranks(settings)


def measure(point: Titles, folder: Path) -> Figures:
    """Train a run and return its held-out loss; of a final one, also that by others' abstracts, and ROUGE."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run = train(load_recipe(str(folder / RECIPE), point.settings(folder)))
    except Diverged:
        return {"loss": 1e9}
    figures: Figures = {"loss": run.held_out["loss"]}
    if point.final:
        kind = run.recipe.objective.kind
        figures["shuffled"] = loss_on(run.folder, folder / f"shuffled-{kind}")
        figures |= rouge_scores(*written(run.folder, folder / kind))
    shutil.rmtree(run.folder / "checkpoints")
    return figures


def loss_on(run: Path, records: Path) -> float:
    """The loss of a run's model on other records."""
    recipe, checkpoints, _ = load_run(run)
    objective, device = make_objective(recipe.with_shards(records)), best_device()
    return held_out_loss(load_model(checkpoints, objective, device), objective.held_out(), 32, device)["loss"]


def written(run: Path, records: Path) -> tuple[list[str], list[str]]:
    """Held-out titles, and those that the model writes. Of a decoder's text, what follows the prompt."""
    lines = list(map(json.loads, (records / "validation.jsonl").read_text().splitlines()[:WRITTEN]))
    prompts = [line.get("prompt") or line["source"] for line in lines]
    decoding = Decoding(max_new_tokens=LONGEST_TITLE)
    texts = generate(run, [Prompt(prompt, "the prompt") for prompt in prompts], decoding, batch_size=50)
    if "prompt" in lines[0]:
        tokenizer: Any = AutoTokenizer.from_pretrained(run / "tokenizer")
        begun = [tokenizer.decode(tokenizer(prompt)["input_ids"], skip_special_tokens=True) for prompt in prompts]
        texts = [text[len(start) :] for text, start in zip(texts, begun, strict=True)]
    return [line["target"] for line in lines], texts


def neighbours(point: Titles) -> list[Titles]:
    """The next lower and the next higher rate."""
    return [replace(point, rate=rate) for rate in (point.rate - 1, point.rate + 1) if 0 <= rate < len(RATES)]


def table(points: Points[Titles], finals: dict[str, list[Titles]], shorter: dict[int, list[Titles]]) -> str:
    """Everything measured, in Markdown."""
    names = ("loss", "shuffled", *KINDS)
    lines = [
        "| model | learning rate | held-out nats a target's token | with another's abstract | ROUGE-1 | 2 | L |",
        "|---|---|---|---|---|---|---|",
    ]

    def of(runs: list[Titles], name: str) -> list[float]:
        return [points.figures[run][name] for run in runs]

    for arm, runs in finals.items():
        cells = []
        for name in names:
            values, digits = of(runs, name), 1 if name in KINDS else 3
            low, mean, high = (f"{each:.{digits}f}" for each in (min(values), statistics.fmean(values), max(values)))
            cells.append(f"{mean} ({low} to {high})")
        lines.append(f"| {ARMS[arm]} | {RATES[runs[0].rate]:g} | {' | '.join(cells)} |")
    goal = statistics.fmean(of(finals["random"], "loss"))
    curve = [(runs[0].steps, statistics.fmean(of(runs, "loss"))) for runs in (*shorter.values(), finals["warm"])]
    ended = ", ".join(f"{loss:.3f} after {steps}" for steps, loss in curve)
    steps = finals["random"][0].steps
    share = tokens_to_reach(goal, curve) / steps
    reached = f"with {share:.2f}x of the steps" if share == share else "in none of these runs"
    if curve[0][1] < goal:
        reached = "with the fewest of these steps already"
    lines += ["", f"The drawn start ends at {goal:.3f} after {steps} steps; the warm start, by steps of a whole run: "]
    lines[-1] += f"{ended}. It reaches {goal:.3f} {reached}."
    return "\n".join(lines)


def main() -> None:
    """Run what has not been run, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("objectives"), help="folder of everything; done runs are kept")
    parser.add_argument("--epochs", type=float, default=EPOCHS, help=f"of a final run (default: {EPOCHS})")
    given = parser.parse_args()
    folder = given.out.absolute()
    need_shared()
    make_inputs(folder)
    lines = [json.loads(line) for line in (folder / "source_target" / "validation.jsonl").read_text().splitlines()]
    steps = round(given.epochs * len((folder / "source_target" / "train.jsonl").read_text().splitlines()) / BATCH)
    points = Points(folder, 2, measure, "loss")
    best = points.tune({arm: [Titles(arm, rate, steps // 3) for rate in FIRST_RATES] for arm in ARMS}, neighbours)
    finals = {
        arm: [replace(point, steps=steps, seed=seed, final=True) for seed in SEEDS] for arm, point in best.items()
    }
    shorter = {
        count: [replace(point, steps=count, final=False) for point in finals["warm"]]
        for count in (round(steps * share) for share in SHARES)
    }
    points.run(point for runs in (*finals.values(), *shorter.values()) for point in runs)
    points.close()
    print(f"\n{machine()}\n\n{table(points, finals, shorter)}")
    titles = [line["target"] for line in lines[:WRITTEN]]
    lead = rouge_scores(titles, [lead_sentence(line["source"]) for line in lines[:WRITTEN]])
    print(f"\nThe lead sentence: ROUGE {', '.join(f'{lead[kind]:.1f}' for kind in KINDS)}.")


if __name__ == "__main__":
    main()

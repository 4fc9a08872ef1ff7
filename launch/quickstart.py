"""Run the whole path on the embedded sample, for one objective: minutes on two CPU cores, or on all GPUs.

Each objective ends in its own check that the model has learned.
"""

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data.common.files import UserError, read_manifest
from data.text.reserved import MIDDLE, RESERVED_NUMBERS
from launch import data_commands, model_commands

GLOBAL_BATCH_SIZE = 32  # blocks or records of a step
LEAST_GAIN = 0.1
"""Nats a target's token that the right source must be worth, compared with the source of another record."""
LEAST_ACCURACY = 0.5
"""Of questions with eight answers, each of which is right equally often."""

FAST = ("optimizer.kind=muon", "optimizer.learning_rate=1e-2")
"""With AdamW, a decoder needs more steps than these before it reads what the encoder makes of a source."""
TITLE = (
    *FAST,
    "model.preset=tiny",
    "model.hidden_dropout_prob=0.0",
    "model.attention_probs_dropout_prob=0.0",
    "train.context_length=128",
    "train.precision=fp32",
    "train.steps=300",
    f"train.global_batch_examples={GLOBAL_BATCH_SIZE}",
    "schedule.warmup_steps=30",
    "checkpoint.every_steps=100",
    "evaluate.every_steps=50",
)


class Objective(NamedTuple):
    """What the quickstart does for an objective."""

    reserve: int
    """How many reserved ids its tokenizer has."""
    recipe: str
    settings: tuple[str, ...]
    data: str
    """"shards", the task of `biogpt records`, or "images"."""
    use: Callable[[Path], None]
    """Lets the exported model write something."""
    check: Callable[[Path], None]
    """Prints what shows that the model in a folder has learned. Raises UserError if it has not."""


def run_quickstart(out: Path, name: str = "next_token") -> None:
    """Run every stage for an objective, skip those that are finished, and print what shows that the model has learned.

    Other objectives than the first share its corpus, and have a folder of their own in `out`. Raises UserError if there
    is no such objective, or if the model has not learned.
    """
    if name not in OBJECTIVES:
        raise UserError(f"--objective {name}: choose from {', '.join(OBJECTIVES)}")
    chosen, own = OBJECTIVES[name], out if name == "next_token" else out / name
    raw, corpus, tokenizer, run, hf = out / "raw", out / "corpus", own / "tokenizer", own / "run", own / "hf"
    workers = len(os.sched_getaffinity(0))
    own.mkdir(parents=True, exist_ok=True)
    say("1/7 sample: invented citations in NLM's XML")
    data_commands.sample(raw)
    say("2/7 corpus: XML to Parquet")
    data_commands.corpus([str(raw)], corpus, validation_fraction=0.05, test_fraction=0.05, workers=workers)
    say("3/7 tokenizer: Moses and BPE")
    data_commands.tokenizer(tokenizer, corpus, merges=2_000, reserve=chosen.reserve, workers=workers)
    data = own / ("shards" if chosen.data == "shards" else "records")
    settings = [f"train.run={run}", *chosen.settings]
    if chosen.data == "shards":
        say("4/7 shards: token files")
        data_commands.shards(corpus, tokenizer, data, workers=workers)
        settings += [f"data.shards={data}"]
    else:
        say(f"4/7 records: {chosen.data}")
        model_commands.images(data) if chosen.data == "images" else data_commands.records(corpus, chosen.data, data)
        settings += [f"data.records={data}", f"data.tokenizer={tokenizer}"]
    say("5/7 train: DeepSpeed ZeRO")
    ranks = choose_ranks()
    settings += [f"train.micro_batch_size={min(16, GLOBAL_BATCH_SIZE // ranks)}"]
    model_commands.train(chosen.recipe, settings, ranks=ranks)
    say("6/7 export: to transformers' format, verified")
    model_commands.export(run, hf)
    say("7/7 use: by transformers")
    chosen.use(own)
    chosen.check(own)
    print(f"\nThe model is in {hf}; the curves: tensorboard --logdir {run / 'tensorboard'}")


def choose_ranks() -> int:
    """All GPUs, or two processes on a CPU so that ZeRO has something to partition. A power of two divides the batch."""
    import torch

    found = torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
    return min(2 ** (found.bit_length() - 1), GLOBAL_BATCH_SIZE)


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


def continue_text(folder: Path) -> None:
    """Continue the beginning of a sentence."""
    model_commands.generate(folder / "hf", "The role of")


def write_title(folder: Path) -> None:
    """Write the title of a held-out abstract, of which the model has room for the beginning."""
    with (folder / "records" / "validation.jsonl").open() as stream:
        record = json.loads(next(stream))
    beginning = " ".join(record["source"].split()[:50])
    print(f"abstract: {beginning} ...\nits title: {record['target']}\nthe model's: ", end="", flush=True)
    model_commands.generate(folder / "hf", beginning)


def describe_picture(folder: Path) -> None:
    """Say which records the model has learned."""
    with (folder / "records" / "train.jsonl").open() as stream:
        for record in map(json.loads, itertools.islice(stream, 5)):
            print(f"{record['task']}: {record['source'][0]} -> {record['target']}")


def check_losses(folder: Path) -> None:
    """The held-out loss must be below the entropy of single tokens."""
    from data.shards.blocks import TokenStream, unigram_entropy
    from pretrain.record import read_record

    shards, record = folder / "shards", read_record(folder / "run")
    entropy = unigram_entropy(TokenStream(shards, read_manifest(shards, "shards"), "validation"))
    curves = {source: list(record.curve(f"validation/{source}loss").values()) for source in ("", "infilling/")}
    curves = {source: losses for source, losses in curves.items() if losses}
    say("held-out loss, nats a token")
    for source, losses in curves.items():
        print(f"at step 0          {losses[0]:8.4f}  {source.strip('/')}".rstrip())
    print(f"unigram entropy    {entropy:8.4f}")
    for source, losses in curves.items():
        print(f"at the end         {losses[-1]:8.4f}  {source.strip('/')}".rstrip())
    if any(losses[-1] >= entropy for losses in curves.values()):
        raise did_not_learn(folder)


def check_sources(folder: Path) -> None:
    """A target must be easier to write from its own source than from that of another record."""
    from pretrain.inference import figures_with_sources

    right, others = (figures["loss"] for figures in figures_with_sources(folder / "run"))
    say("held-out loss, nats a target's token")
    print(f"with its source                {right:8.4f}")
    print(f"with another record's source   {others:8.4f}")
    if others - right < LEAST_GAIN:
        raise did_not_learn(folder)


def check_answers(folder: Path) -> None:
    """Questions about pictures, whose combinations training never showed, must be answered."""
    from pretrain.images import question_accuracy

    found = question_accuracy(folder / "hf", folder / "tokenizer", folder / "records")
    say("questions about held-out pictures: share of right answers, 0.125 by chance")
    for form, accuracy in found.items():
        print(f"{form:18} {accuracy:8.3f}")
    if min(found.values()) < LEAST_ACCURACY:
        raise did_not_learn(folder)


def did_not_learn(folder: Path) -> UserError:
    """The error that says so."""
    return UserError(f"{folder / 'run'}: the model did not learn; remove {folder} and run the quickstart again")


OBJECTIVES = {
    "next_token": Objective(0, "tiny", (), "shards", continue_text, check_losses),
    "fill_in_the_middle": Objective(
        MIDDLE + 1, "tiny", ("objective.kind=fill_in_the_middle",), "shards", continue_text, check_losses
    ),
    "denoising": Objective(
        MIDDLE + 1, "tiny", ("objective.kind=denoising", *FAST), "shards", continue_text, check_sources
    ),
    "title": Objective(0, "seq2seq-title", TITLE, "title", write_title, check_sources),
    "images": Objective(
        RESERVED_NUMBERS,
        "many-tasks",
        ("model.max_position_embeddings=128",),
        "images",
        describe_picture,
        check_answers,
    ),
}
"""What `biogpt quickstart --objective` offers."""

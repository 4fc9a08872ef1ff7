"""Run the whole path on the embedded sample: minutes on two CPU cores, or on all GPUs of the machine."""

import json
import os
from pathlib import Path

from data.common.files import UserError
from launch import data_commands, model_commands

GLOBAL_BATCH_SIZE = 32  # blocks of a step in the tiny recipe


def run_quickstart(out: Path) -> None:
    """Run every stage in `out`, skip those that are finished, and print a generated sentence and the losses."""
    raw, corpus, tokenizer = out / "raw", out / "corpus", out / "tokenizer"
    shards, run, hf = out / "shards", out / "run", out / "hf"
    workers = len(os.sched_getaffinity(0))
    say("1/7 sample: invented citations in NLM's XML")
    data_commands.sample(raw)
    say("2/7 corpus: XML to Parquet")
    data_commands.corpus([str(raw)], corpus, validation_fraction=0.05, test_fraction=0.05, workers=workers)
    say("3/7 tokenizer: Moses and BPE")
    data_commands.tokenizer(tokenizer, corpus, merges=2_000, workers=workers)
    say("4/7 shards: token files")
    data_commands.shards(corpus, tokenizer, shards, workers=workers)
    say("5/7 train: DeepSpeed ZeRO")
    ranks = choose_ranks()
    micro_batch_size = min(16, GLOBAL_BATCH_SIZE // ranks)
    settings = [f"data.shards={shards}", f"train.run={run}", f"train.micro_batch_size={micro_batch_size}"]
    model_commands.train("tiny", settings, ranks=ranks)
    say("6/7 export: to transformers' format, verified")
    model_commands.export(run, hf)
    say("7/7 generate: a sentence by transformers")
    model_commands.generate(hf, "The role of")
    report(shards, run)


def choose_ranks() -> int:
    """All GPUs, or two processes on a CPU so that ZeRO has something to partition. A power of two divides the batch."""
    import torch

    found = torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))
    return min(2 ** (found.bit_length() - 1), GLOBAL_BATCH_SIZE)


def say(text: str) -> None:
    """Print a heading."""
    print(f"\n== {text}", flush=True)


def report(shards: Path, run: Path) -> None:
    """Print the three figures that show whether the model has learned. Raises UserError if it has not."""
    from data.common.files import read_manifest
    from data.shards.blocks import TokenStream, unigram_entropy

    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["validation/loss"] for line in lines if "validation/loss" in line]
    entropy = unigram_entropy(TokenStream(shards, read_manifest(shards, "shards"), "validation"))
    say("held-out loss, nats a token")
    print(f"at step 0          {losses[0]:8.4f}")
    print(f"unigram entropy    {entropy:8.4f}")
    print(f"at the end         {losses[-1]:8.4f}")
    if losses[-1] >= entropy:
        raise UserError(f"{run}: the model did not learn; remove the folder and run the quickstart again")
    print(f"\nThe model is in {run.parent / 'hf'}; the curves: tensorboard --logdir {run / 'tensorboard'}")

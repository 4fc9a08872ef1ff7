"""One GPU in under 10 minutes: `python -m tests.bench.gpu` checks what a CPU cannot show, then measures.

Rows are printed as they are found and appended to a file, each is a process of its own with a time limit, and only one
uses the GPU at a time. So a mistake, a crash or the end of the time costs a row and not the others. Without a GPU, or
with `--device cpu`, every row runs at a tiny size: the figures mean nothing, but no line of code runs first on a GPU.
"""

import argparse
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.profiler import ProfilerActivity, profile

from data.common.files import read_manifest
from data.text.ids import EOS_ID
from model.attention import kernel_name
from model.config import PRESETS, DecoderConfig
from model.decoder import Decoder, document_offsets
from pretrain import engine as engines
from pretrain import train as loop
from pretrain.checkpoint import newest_checkpoint
from pretrain.export.folder import export
from pretrain.held_out import to_device
from pretrain.interrupt import StopRequest
from pretrain.metrics import peak_flops
from pretrain.recipe import load_recipe
from tests.bench.machine import machine
from tests.bench.model import (
    NO_DROPOUT,
    Contender,
    fair_layerdrop,
    make_step,
    memories,
    race,
    speeds,
    synchronize,
)
from tests.paths import ROOT
from tests.pretrain.runs import make_sample, metrics, plain_losses, run_case, settings
from tests.pretrain.waits import waits

VOCABULARY = 42_384
TINY: dict[str, Any] = {
    "vocab_size": 1_000, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128,
    "max_position_embeddings": 64,
}  # fmt: skip
"""The shape of a dry run."""


class Place(NamedTuple):
    """Where rows are measured."""

    device: str
    """"cuda" or "cpu"."""
    folder: Path
    """For runs; the sample is in `sample/`."""
    table: Path = Path("gpu.md")
    """Longer lists are written beside it."""

    @property
    def shards(self) -> Path:
        """The sample's."""
        return self.folder / "sample" / "shards"

    @property
    def shape(self) -> dict[str, Any]:
        """Of the decoder that is timed: 347M on a GPU."""
        return {"vocab_size": VOCABULARY, **PRESETS["biogpt"]} if self.device == "cuda" else TINY

    def contender(self, kind: str = "ours", **more: Any) -> Contender:
        """In a race."""
        size = {"cuda": 16, "cpu": 2}[self.device]
        return Contender(kind, self.device, self.shape, micro_batch_size=size, compiled=kind == "ours", **more)


class Row(NamedTuple):
    """A line of the table."""

    what: str
    measure: Callable[..., str]
    """A function of a Place. It raises an error if what it finds is wrong."""
    arguments: tuple[Any, ...] = ()
    wanted: str = ""
    seconds: int = 60
    """The most that it may take."""


def kernels(place: Place) -> str:
    """The attention kernel of each case."""
    found = []
    for boundaries in ("none", "document"):
        for dropout in (0.0, 0.1):
            config = DecoderConfig(**place.shape, boundaries=boundaries, attention_probs_dropout_prob=dropout)
            length, device = config.max_position_embeddings, torch.device(place.device)
            found.append(f"{boundaries}, {dropout}: {kernel_name(config, device, torch.bfloat16, length)}")
    return "; ".join(found)


def losses(place: Place, name: str, *more: str) -> list[float]:
    """The losses of six steps of the tiny recipe."""
    run_case(settings(place.shards, place.folder / name, "train.steps=6", "evaluate.max_blocks=4", *more))
    return list(metrics(place.folder / name, "train/loss").values())


def largest_difference(one: list[float], other: list[float]) -> float:
    """Of two curves."""
    return max(abs(each - its) for each, its in zip(one, other, strict=True))


def golden(place: Place) -> str:
    """fp32 by DeepSpeed on the device, against plain torch on the CPU."""
    plain = plain_losses(settings(place.shards, place.folder / "plain", "train.steps=6"), ranks=1)
    worst = largest_difference(losses(place, "fp32", "train.precision=fp32"), plain)
    assert worst < 1e-4, worst
    return f"{worst:.1e} nats"


def half_precision(place: Place) -> str:
    """bf16 against fp32, compiled as by default."""
    exact = losses(place, "exact", "train.precision=fp32")
    worst = largest_difference(losses(place, "half", "train.precision=bf16"), exact)
    assert worst < 3e-2, worst
    return f"{worst:.1e} nats"


def killed(place: Place) -> str:
    """kill -9 before the sixth step of eight, then the same command; with dropout and layerdrop."""
    more = ["train.steps=8", "checkpoint.every_steps=3", "evaluate.max_blocks=4", "train.precision=bf16"]
    more += ["model.layerdrop=0.2", "model.hidden_dropout_prob=0.1", "model.attention_probs_dropout_prob=0.1"]
    whole, run = place.folder / "whole", place.folder / "killed"
    run_case(settings(place.shards, whole, *more))
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    environment = os.environ | alone | {"MASTER_PORT": str(engines.free_port()), "STRIKE": "step 6"}
    command = [sys.executable, "-m", "tests.bench.killed", "tiny", *settings(place.shards, run, *more)]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-500:]
    left, _ = newest_checkpoint(run)
    run_case(settings(place.shards, run, *more))
    files = []
    for folder in (whole, run):
        end, _ = newest_checkpoint(folder)
        assert end is not None
        files.append(read_manifest(end, "checkpoint")["files"])
    assert metrics(run, "train/loss") == metrics(whole, "train/loss"), "other losses"
    assert files[0] == files[1], "another checkpoint"
    return f"resumed from {left and left.name}; the same bits"


def exported(place: Place) -> str:
    """transformers gives the loss that the run recorded, and our logits."""
    losses(place, "run", "train.precision=bf16")
    counts = export(place.folder / "run", place.folder / "hf")["counts"]
    return f"logits differ by {counts['largest_logit_difference']:.1e}"


def documents_alone(place: Place) -> str:
    """The loss and gradients of packed documents, against each document alone, bf16."""
    torch.manual_seed(1)
    shape: dict[str, Any] = TINY | NO_DROPOUT | {"hidden_size": 128, "max_position_embeddings": 256}
    config = DecoderConfig(**shape, boundaries="document")
    packed = Decoder(config).to(place.device, torch.bfloat16)
    alone = Decoder(replace(config, boundaries="none")).to(place.device, torch.bfloat16)
    alone.load_state_dict(packed.state_dict())
    ids = torch.randint(4, 1_000, (2, 256))
    cuts = [0, 30, 31, 200, 256]
    ids[:, cuts[:-1]] = EOS_ID
    targets = ids.roll(-1, 1)
    batch = to_device((ids, targets, document_offsets(ids, EOS_ID)), torch.device(place.device))
    together = packed(*batch)
    together.backward()
    apart = torch.zeros((), device=place.device)
    for start, stop in pairwise(cuts):
        apart = apart + alone(batch[0][:, start:stop], batch[1][:, start:stop])
    apart.backward()
    differences = [abs(float((together / apart).detach()) - 1)]
    for one, other in zip(packed.parameters(), alone.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        differences.append(float((one.grad - other.grad).float().norm() / other.grad.float().norm().clamp(min=1e-6)))
    with torch.no_grad():
        found = float(packed(*to_device((ids, targets), torch.device(place.device))))
    assert found == together.item(), "offsets found on the device give another loss"
    assert differences[0] < 1e-3 and max(differences) < 0.1, differences
    dropped = Decoder(replace(config, attention_probs_dropout_prob=0.1)).to(place.device, torch.bfloat16)
    dropped.load_state_dict(packed.state_dict())
    draws = [dropped(*batch).item() for _ in range(8)]
    assert len(set(draws)) > 1 and abs(sum(draws) / 8 / together.item() - 1) < 0.05, draws
    return f"loss {differences[0]:.1e}, gradients at most {max(differences[1:]):.1e}, relative"


def waited(place: Place) -> str:
    """What waits for the device in a step of 8 micro-batches after warm-up."""
    more = ["train.precision=bf16", "train.micro_batch_size=2", "optimizer.gradient_clipping=0"]
    chosen = settings(place.shards, place.folder / "waits", *more)
    run = loop.build(load_recipe("tiny", chosen), engines.init_distributed())
    request = StopRequest(run.folder, 0, run.rank)

    def step() -> None:
        loop.update(run, request.code, lambda: 0)

    step()
    step()
    if place.device == "cuda":
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
        torch.cuda.set_sync_debug_mode("default")
        found = [each for each in caught if "synchroniz" in str(each.message)]
        counts = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in found)
    else:
        with waits() as counts:
            step()
    request.close()
    counts = +counts
    return f"{sum(counts.values())}: {', '.join(f'{count} {where}' for where, count in counts.items())}"


def utilization(place: Place, tokens_per_second: float) -> str:
    """Tokens a second as a share of the GPU's peak, where that is known."""
    peak, config = peak_flops(), DecoderConfig(**place.shape)
    flops = config.flops_per_token(config.max_position_embeddings)
    share = f"MFU {tokens_per_second * flops / peak:.1%}" if peak else "MFU unknown"
    return f"{tokens_per_second:,.0f} tokens/s, {share}"


def engine_step(place: Place, micro_batch_size: int, accumulation: int, *more: str) -> Callable[[int], None]:
    """A step of the recipe `biogpt` under DeepSpeed as it trains, on random tokens, by its number."""
    shape = [f"model.{key}={value}" for key, value in place.shape.items() if key != "vocab_size"]
    length = place.shape["max_position_embeddings"]
    tokens = accumulation * micro_batch_size * length
    sizes = [f"train.micro_batch_size={micro_batch_size}", f"train.global_batch_tokens={tokens}"]
    recipe = load_recipe("biogpt", [*shape, *sizes, *more])
    device = engines.init_distributed()
    with device:
        model = Decoder(recipe.decoder_config(place.shape["vocab_size"]))
    engine, optimizer = engines.build_engine(recipe, model, 1)
    engine.train()
    optimizer.set_learning_rate(1e-5)
    generator = torch.Generator().manual_seed(1)

    def batch() -> tuple[Tensor, ...]:
        ids = torch.randint(4, place.shape["vocab_size"], (micro_batch_size, length), generator=generator)
        ids[torch.rand(ids.shape, generator=generator) < 1 / 250] = EOS_ID  # documents as long as abstracts
        found = (ids, ids.roll(-1, 1))
        return (*found, document_offsets(ids, EOS_ID)) if model.config.boundaries == "document" else found

    def step(number: int) -> None:
        for micro_step in range(accumulation):
            loss = engine(*to_device(batch(), device), step=number, micro_step=micro_step)
            engine.backward(loss / (tokens / accumulation))
            if micro_step < accumulation - 1:
                engine.step()
        engines.finish_step(engine)

    return step


def engine_speed(place: Place, micro_batch_size: int, *more: str) -> str:
    """Speed, MFU and peak memory of two engine steps, after one to warm up."""
    accumulation = 16 if place.device == "cuda" else 2
    micro_batch_size = micro_batch_size if place.device == "cuda" else 2
    step = engine_step(place, micro_batch_size, accumulation, *more)
    step(0)
    synchronize(place.device)
    if place.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    graphs, begun = counters["stats"]["unique_graphs"], time.perf_counter()
    step(1)
    step(2)
    synchronize(place.device)
    seconds = time.perf_counter() - begun
    assert counters["stats"]["unique_graphs"] == graphs, "recompiled after the first step"
    memory = f", {torch.cuda.max_memory_allocated() / 1e9:.1f} GB" if place.device == "cuda" else ""
    tokens = accumulation * micro_batch_size * place.shape["max_position_embeddings"]
    return f"{utilization(place, 2 * tokens / seconds)}{memory}"


PARTS = {
    "attention": ("flash", "fmha", "cudnn"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "aten::mm", "addmm"),
    "compiled": ("triton",),
    "copies": ("memcpy", "memset"),
}
"""Kinds of kernels by what their names contain; the first that fits counts."""


def kernel_times(place: Place, micro_batch_size: int, *more: str) -> str:
    """Milliseconds a micro-batch by kind of kernel, and those without a kernel. A file lists all kernels."""
    gpu, accumulation = place.device == "cuda", 2
    step = engine_step(place, micro_batch_size if gpu else 2, accumulation, *more)
    step(0)
    synchronize(place.device)
    begun = time.perf_counter()
    step(1)
    synchronize(place.device)
    wall = (time.perf_counter() - begun) / accumulation * 1e3
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        step(2)
        synchronize(place.device)
    kernels = [each for each in profiler.key_averages() if ("CUDA" in str(each.device_type)) == gpu]
    milliseconds = {
        each.key: (each.self_device_time_total if gpu else each.self_cpu_time_total) / accumulation / 1e3
        for each in kernels
    }
    longest = sorted(milliseconds, key=lambda name: -milliseconds[name])
    counts = {each.key: each.count / accumulation for each in kernels}
    lines = [f"{milliseconds[name]:9.3f} ms {counts[name]:6.1f} x  {name}\n" for name in longest]
    place.table.with_suffix(".kernels.txt").write_text("".join(lines))
    parts: Counter[str] = Counter()
    for name in longest:
        part = next((part for part, words in PARTS.items() if any(word in name.lower() for word in words)), "others")
        parts[part] += milliseconds[name]
    told = ", ".join(f"{part} {found:.1f}" for part, found in parts.most_common())
    return f"{told}; none {wall - sum(parts.values()):.1f} of {wall:.1f} ms"


def against(place: Place, compiled: bool) -> str:
    """Our decoder and AdamW, against transformers' decoder and the same AdamW, step by step in turns."""
    theirs = replace(place.contender("transformers"), compiled=compiled)
    found = race({"ours": place.contender(), "theirs": theirs}, 20 if place.device == "cuda" else 2)
    ours, other = found["ours"], found["theirs"]
    return f"{speeds(ours.fastest, other.fastest)}; {memories(ours, other)}"


def layerdrop(place: Place) -> str:
    """Layerdrop 0.2 against 0."""
    rounds = 20 if place.device == "cuda" else 2
    changes = NO_DROPOUT | fair_layerdrop(place.shape, place.device, rounds)
    found = race({"none": place.contender(), "some": place.contender(changes=changes)}, rounds)
    return speeds(found["some"].mean, found["none"].mean)


def largest(place: Place) -> str:
    """The largest micro-batches with room for a step, to within 4: ours with recomputation, and transformers'."""
    ours = replace(place.contender(changes=NO_DROPOUT | {"gradient_checkpointing": "selective"}), compiled=False)
    found = []
    for contender in (ours, place.contender("transformers")):
        step = make_step(contender)
        found.append(largest_that_fits(step, place.device, 1024 if place.device == "cuda" else 32))
        del step
    return f"{found[0]} to {found[1]}: {found[0] / found[1]:.1f}x"


def largest_that_fits(step: Callable[[int, int], None], device: str, most: int) -> int:
    """By doubling up to `most`, then by halving."""

    def fits(micro_batch_size: int) -> bool:
        try:
            step(0, micro_batch_size)
            synchronize(device)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()

    good, bad = 0, min(16, most)
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 4 and bad <= most:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def dropout(hidden: float, attention: float) -> list[str]:
    """Settings."""
    return [f"model.hidden_dropout_prob={hidden}", f"model.attention_probs_dropout_prob={attention}"]


EAGER, COMPILED, DOCUMENTS = "train.compile=false", "train.compile=true", "model.boundaries=document"
ROWS = [
    Row("attention kernel by boundaries and dropout", kernels),
    Row("losses in fp32 against plain torch on the CPU", golden, wanted="1e-4"),
    Row("losses in bf16 against fp32", half_precision, wanted="3e-2"),
    Row("kill -9, then resume", killed, wanted="the same bits", seconds=90),
    Row("export proven by transformers", exported, wanted="1e-4"),
    Row("documents packed against each alone, bf16", documents_alone, wanted="1e-3, 0.1"),
    Row("waits for the GPU in a step of 8 micro-batches", waited, wanted="2"),
    Row("347M, micro-batch 32, compiled, dropout 0", engine_speed, (32, COMPILED, *dropout(0, 0)), "50 %", 90),
    Row("the same, milliseconds a micro-batch", kernel_times, (32, COMPILED, *dropout(0, 0))),
    Row("347M with dropout 0.1", engine_speed, (32, COMPILED, *dropout(0.1, 0.1)), "45 %", 90),
    Row("with dropout 0.1, none in attention", engine_speed, (32, COMPILED, *dropout(0.1, 0)), "", 90),
    Row("inside documents, dropout 0", engine_speed, (32, COMPILED, DOCUMENTS, *dropout(0, 0)), "", 90),
    Row("eager, dropout 0", engine_speed, (32, EAGER, *dropout(0, 0)), "", 60),
    Row("micro-batch 16, against transformers' `BioGptForCausalLM`, sdpa", against, (False,), "2x", 90),
    Row("against it with torch.compile", against, (True,), "1.3x", 120),
    Row("micro-batch 16, compiled, dropout 0", engine_speed, (16, COMPILED, *dropout(0, 0)), "", 60),
    Row("inside documents, dropout 0.1", engine_speed, (32, COMPILED, DOCUMENTS, *dropout(0.1, 0.1)), "", 90),
    Row("eager, dropout 0.1", engine_speed, (32, EAGER, *dropout(0.1, 0.1)), "", 60),
    Row("layerdrop 0.2 against 0", layerdrop, (), "1.15x", 90),
    Row("largest micro-batch, recomputation selective, against transformers'", largest, (), "2x", 90),
]
"""In the order of what matters most."""


def serve(row: Row, place: Place, pipe: Any) -> None:
    """The process of a row."""
    if place.device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    try:
        pipe.send(row.measure(place, *row.arguments))
    except BaseException as error:
        traceback.print_exc()
        pipe.send(f"**FAILED**: {type(error).__name__}: {str(error)[:300]}".replace("\n", " "))


def measured(row: Row, place: Place, seconds: float) -> str:
    """What a row comes to within this time."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(row, place, theirs))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(seconds) else f"**FAILED**: not done within {seconds:.0f} s"
    except EOFError:
        return "**FAILED**: its process ended without an answer"
    finally:
        assert process.pid is not None
        for each in [*psutil.Process(process.pid).children(recursive=True), process]:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.join()


def main(arguments: list[str] | None = None) -> int:
    """Check and measure. Returns how many rows failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="by default a GPU if there is one")
    parser.add_argument("--minutes", type=float, default=9.5, help="begin no row that may take longer than this")
    parser.add_argument("--out", type=Path, default=Path("gpu.md"), help="file that the table is appended to")
    parser.add_argument("--only", default="", help="rows with this in their name")
    given = parser.parse_args(arguments)
    if given.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    deadline, failed = time.monotonic() + 60 * given.minutes, 0

    def say(line: str) -> None:
        print(line, flush=True)
        with given.out.open("a") as stream:
            stream.write(f"{line}\n")

    dry = "" if device == "cuda" else " A dry run: the shapes are tiny, and no figure of time means anything."
    say(f"Measured by `python -m tests.bench.gpu` on {machine()}.{dry}\n")
    say("| what | measured | wanted | seconds |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as temporary:
        make_sample(Path(temporary) / "sample")
        for number, row in enumerate(each for each in ROWS if given.only in each.what):
            place = Place(device, Path(temporary) / str(number), given.out)
            place.folder.mkdir()
            (place.folder / "sample").symlink_to(Path(temporary) / "sample")
            begun = time.monotonic()
            left = deadline - begun
            limit = min(row.seconds if device == "cuda" else 20 * row.seconds, left)
            found = measured(row, place, limit) if left > 20 else "not measured: no time left"
            failed += "FAILED" in found
            say(f"| {row.what} | {found} | {row.wanted} | {time.monotonic() - begun:.0f} |")
            shutil.rmtree(place.folder)
    return failed


if __name__ == "__main__":
    sys.exit(min(main(), 1))

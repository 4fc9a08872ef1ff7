"""How fast and lean is a training step? `python -m tests.bench.model` takes it beside transformers'; prints a table.

Each contender is a process of its own; they take their steps in turns, so that what else the machine does meets all
alike. Speed is that of all steps of a contender together. Peak memory: on a CPU that of the process above what it had
before the model, on a GPU what torch allocated. About 5 minutes on two cores; the rows of a GPU need one.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import PRESETS, DecoderConfig
from model.decoder import Decoder, is_dropped
from model.hf import hf_config
from model.loss import linear_cross_entropy
from pretrain.metrics import peak_flops
from tests.bench.machine import machine

DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CPU_SHAPE = {
    "vocab_size": 42_384,
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
GPU_SHAPE = {"vocab_size": 42_384, **PRESETS["biogpt"]}
WARM_UP = 2  # steps
Step = Callable[[int, int], None]
"""(step, micro-batch size): one training step."""


@dataclass(frozen=True)
class Contender:
    """One way to take a training step, in bf16."""

    kind: str
    """"ours", "transformers", or "our loss", "plain loss" alone."""
    device: str
    shape: dict[str, int]
    micro_batch_size: int
    compiled: bool = False
    changes: dict[str, Any] = field(default_factory=lambda: dict(NO_DROPOUT))

    def tokens(self) -> int:
        """Tokens of a step."""
        return self.micro_batch_size * self.shape["max_position_embeddings"]


def make_step(contender: Contender) -> Step:
    """Build the contender's model and optimizer."""
    torch.manual_seed(1)
    settings: dict[str, Any] = contender.shape | contender.changes
    config = DecoderConfig(**settings)
    device, length = torch.device(contender.device), config.max_position_embeddings
    if "loss" in contender.kind:
        return loss_step(contender, config)
    model: nn.Module
    if contender.kind == "ours":
        model = Decoder(config).to(device, torch.bfloat16)
        if contender.compiled:
            model.compile_layers()
    else:
        from transformers import BioGptConfig, BioGptForCausalLM

        their_config: Any = BioGptConfig(**hf_config(config))
        model = BioGptForCausalLM._from_config(their_config, attn_implementation="sdpa", dtype=torch.bfloat16)
        nn.Module.to(model, device)
        if contender.compiled:
            model = torch.compile(model)  # type: ignore[assignment]
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(number: int, micro_batch_size: int) -> None:
        generator = torch.Generator().manual_seed(number)
        ids = torch.randint(4, config.vocab_size, (micro_batch_size, length), generator=generator).to(device)
        if contender.kind == "ours":
            loss = model(ids, ids.roll(-1, 1), step=number) / ids.numel()
        else:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss_step(contender: Contender, config: DecoderConfig) -> Step:
    """The head and its loss alone, forward and backward."""
    rows, device = contender.tokens(), torch.device(contender.device)
    hidden = torch.randn(rows, config.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    words = config.padded_vocab_size if contender.kind == "our loss" else config.vocab_size
    weight = torch.randn(words, config.hidden_size, device=device) * config.hidden_size**-0.5  # logits as a model's
    weight = weight.to(torch.bfloat16).requires_grad_()
    targets = torch.randint(4, config.vocab_size, (rows,), device=device)

    def step(number: int, micro_batch_size: int) -> None:
        hidden.grad = weight.grad = None
        if contender.kind == "our loss":
            loss = linear_cross_entropy(hidden, weight, targets, config.vocab_size, contender.compiled)
        else:
            loss: Tensor = F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")
        (loss / rows).backward()

    return step


class Memory:
    """Peak memory of this process from here on, in bytes."""

    def __init__(self, device: str) -> None:
        self._device, self._before = device, self._status("VmRSS")

    def reset(self) -> None:
        """Forget the peak, not what was there before the model."""
        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Bytes."""
        if self._device == "cuda":
            return torch.cuda.max_memory_allocated()
        return self._status("VmHWM") - self._before

    def _status(self, key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def serve(contender: Contender, pipe: Any) -> None:
    """A contender's process: a step when asked, its peak memory at the end."""
    torch.set_num_threads(multiprocessing.cpu_count())
    if contender.kind == "transformers":
        import transformers  # noqa: F401  before memory is counted
    memory = Memory(contender.device)
    step = make_step(contender)
    for number in range(WARM_UP):  # the first makes the optimizer's moments and compiles
        step(number, contender.micro_batch_size)
    memory.reset()
    number = WARM_UP
    pipe.send("ready")
    while pipe.recv():
        synchronize(contender.device)
        before = time.perf_counter()
        step(number, contender.micro_batch_size)
        synchronize(contender.device)
        pipe.send((time.perf_counter() - before, memory.peak()))
        number += 1


def serve_largest(contender: Contender, pipe: Any) -> None:
    """The largest micro-batch that a step has room for, to within 4."""
    step = make_step(contender)

    def fits(micro_batch_size: int) -> bool:
        try:
            step(0, micro_batch_size)
            synchronize(contender.device)
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            torch.cuda.empty_cache()

    good, bad = 0, 16
    while fits(bad):
        good, bad = bad, 2 * bad
    while bad - good > 4:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    pipe.send(good)


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def start(target: Callable[[Contender, Any], None], contender: Contender) -> tuple[Any, Any]:
    """A process and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=target, args=(contender, theirs), daemon=True)
    process.start()
    theirs.close()  # a contender that died is an EOFError here
    return process, ours


def race(contenders: dict[str, Contender], rounds: int) -> dict[str, tuple[float, float]]:
    """Tokens a second and peak memory in GB of each contender; they step in turns."""
    started = {name: start(serve, contender) for name, contender in contenders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = dict.fromkeys(contenders, 0.0)
    for _, pipe in started.values():
        assert pipe.recv() == "ready"  # none is timed while another is warming up
    for _ in range(rounds):
        for name, (_, pipe) in started.items():
            pipe.send(True)
            taken, peak = pipe.recv()
            seconds[name].append(taken)
            peaks[name] = peak / 1e9
    for process, pipe in started.values():
        pipe.send(False)
        process.join()
    speeds = {name: contenders[name].tokens() / statistics.fmean(taken) for name, taken in seconds.items()}
    return {name: (speeds[name], peaks[name]) for name in contenders}


def fair_layerdrop(shape: dict[str, int], rounds: int) -> dict[str, Any]:
    """Layerdrop 0.2 with a seed whose draws leave out a fifth of the layers of the steps that are timed."""

    def off_by(seed: int) -> float:
        layers, steps = range(shape["num_hidden_layers"]), range(WARM_UP, WARM_UP + rounds)
        drawn = [is_dropped(0.2, seed, step, 0, layer) for step in steps for layer in layers]
        return abs(statistics.fmean(drawn) - 0.2)

    return {"layerdrop": 0.2, "layerdrop_seed": min(range(100), key=off_by)}


def beside(one: tuple[float, float], other: tuple[float, float]) -> tuple[str, str]:
    """A row's figures: tokens a second, and peak memory."""
    return (
        f"{one[0]:,.0f} to {other[0]:,.0f} tokens/s: {one[0] / other[0]:.2f}x",
        f"{one[1]:.2f} to {other[1]:.2f} GB: {one[1] / other[1]:.2f}x",
    )


def cpu_rows(rounds: int) -> list[tuple[str, str, str, str]]:
    """The rows that every machine measures."""
    ours = Contender("ours", "cpu", CPU_SHAPE, micro_batch_size=4)
    theirs = replace(ours, kind="transformers")
    modes = {
        mode: replace(ours, changes=NO_DROPOUT | {"gradient_checkpointing": mode}) for mode in ("selective", "full")
    }
    layerdrop = replace(ours, changes=NO_DROPOUT | fair_layerdrop(CPU_SHAPE, rounds))
    plain = race({"ours": ours, "theirs": theirs, "layerdrop": layerdrop, **modes}, rounds)
    dropped = race({"ours": replace(ours, changes=DROPOUT), "theirs": replace(theirs, changes=DROPOUT)}, rounds)
    losses = race({"ours": replace(ours, kind="our loss"), "theirs": replace(ours, kind="plain loss")}, rounds)
    step = "CPU step, 12 layers x 768, context 512, micro-batch 4, vocabulary 42,384, bf16, dropout 0"
    hf = "transformers' `BioGptForCausalLM`, sdpa, same AdamW"
    speed, memory = beside(plain["ours"], plain["theirs"])
    rows = [(step, hf, speed, "1.0x"), ("the same, peak memory", hf, memory, "0.85x")]
    speed, memory = beside(dropped["ours"], dropped["theirs"])
    rows += [("with dropout 0.1", hf, speed, ""), ("the same, peak memory", hf, memory, "0.6x")]
    speed, _ = beside(plain["layerdrop"], plain["ours"])
    rows += [("CPU step, layerdrop 0.2", "layerdrop 0", speed, "1.15x")]
    for mode in modes:
        speed, memory = beside(plain[mode], plain["ours"])
        rows += [(f"CPU step, recomputation {mode}", "none", f"{speed}; {memory}", "")]
    speed, memory = beside(losses["ours"], losses["theirs"])
    rows += [("head and loss alone, forward and backward", "torch's cross entropy in fp32", f"{speed}; {memory}", "")]
    return rows


def gpu_rows(rounds: int) -> list[tuple[str, str, str, str]]:
    """The rows of the 347M model; "not measured" where there is no GPU."""
    step = "GPU: 347M, context 1024, micro-batch 16, bf16, dropout 0"
    hf, hf_compiled = "transformers' `BioGptForCausalLM`, sdpa", "the same with torch.compile"
    names = [
        (step, hf, "2x"),
        (step, hf_compiled, "1.3x"),
        ("the same, MFU (2.383 GFLOP a token)", "llm.c's 46 % on H100", "50 %"),
        ("with dropout 0.1, MFU", "", "45 %"),
        ("GPU: largest micro-batch at 1024, recomputation selective", hf, "2x"),
        ("GPU: layerdrop 0.2", "layerdrop 0", "1.15x"),
    ]
    if not torch.cuda.is_available():
        return [(what, against, "not measured", least) for what, against, least in names]
    ours = Contender("ours", "cuda", GPU_SHAPE, micro_batch_size=16, compiled=True)
    theirs = replace(ours, kind="transformers", compiled=False)
    first = race({"ours": ours, "theirs": theirs, "compiled": replace(theirs, compiled=True)}, rounds)
    changes = {"dropout": DROPOUT, "layerdrop": NO_DROPOUT | fair_layerdrop(GPU_SHAPE, rounds)}
    second = race({"ours": ours} | {name: replace(ours, changes=each) for name, each in changes.items()}, rounds)
    lean = replace(ours, compiled=False, changes=NO_DROPOUT | {"gradient_checkpointing": "selective"})
    most = [largest(lean), largest(theirs)]
    measured = [
        "; ".join(beside(first["ours"], first["theirs"])),
        "; ".join(beside(first["ours"], first["compiled"])),
        utilization(first["ours"][0]),
        utilization(second["dropout"][0]),
        f"{most[0]} to {most[1]}: {most[0] / most[1]:.1f}x",
        beside(second["layerdrop"], second["ours"])[0],
    ]
    return [(what, against, found, least) for (what, against, least), found in zip(names, measured, strict=True)]


def largest(contender: Contender) -> int:
    """The largest micro-batch of a contender, alone on the GPU."""
    process, pipe = start(serve_largest, contender)
    found = pipe.recv()
    process.join()
    return found


def utilization(speed: float) -> str:
    """Tokens a second as a share of the GPU's peak, where that is known."""
    peak, flops = peak_flops(), DecoderConfig(**GPU_SHAPE).flops_per_token(1024)
    share = f"{speed * flops / peak:.1%} of {peak / 1e12:.0f} TFLOP/s" if peak else "peak of this GPU unknown"
    return f"{speed:,.0f} tokens/s: {share}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each contender (a GPU takes 20 times as many)")
    parser.add_argument("--gpu-only", action="store_true", help="leave the rows of the CPU out")
    given = parser.parse_args()
    rows = [] if given.gpu_only else cpu_rows(given.rounds)
    rows += gpu_rows(20 * given.rounds)
    print(f"Measured by `python -m tests.bench.model` on {machine()}:\n")
    print("| what | against | measured | at least (memory: at most) |\n|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()

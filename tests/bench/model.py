"""How fast and lean is a training step? `python -m tests.bench.model` takes it beside transformers'; prints a table.

Each contender is a process of its own; they take their steps in turns, so that what else the machine does meets all
alike. Speed is that of the fastest step; with layerdrop that of all steps together, as they leave out different layers.
Peak memory: on a CPU that of the process above what it had before the model, on a GPU what torch allocated.
About 9 minutes on two cores. `python -m tests.bench.gpu` measures a GPU.

Both precisions, and the processor in each row: how bf16 compares with fp32 depends on the processor's instructions, and
so does what dropout costs, since torch's own attention with dropout computes in fp32 on a CPU and ours in bf16.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.blenderbot import hf_config as blenderbot_config
from model.config import DecoderConfig, EncoderDecoderConfig
from model.decoder import Decoder, is_dropped
from model.encoder_decoder import EncoderDecoder
from model.hf import hf_config
from model.loss import IGNORE_INDEX, linear_cross_entropy
from tests.bench.machine import cores, cpuinfo, machine, processor

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
WARM_UP = {"cpu": 1, "cuda": 10}  # steps: the first makes the optimizer's moments, each layer must have been compiled
PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
Step = Callable[[int, int], None]
"""(step, micro-batch size): one training step."""


class Row(NamedTuple):
    """A line of the table."""

    what: str
    against: str
    precision: str
    measured: str
    least: str = ""
    """What the figure should be at least; memory at most."""


class Figures(NamedTuple):
    """What a race found of a contender."""

    fastest: float
    """Tokens a second in its fastest step."""
    mean: float
    """Tokens a second of all its steps together."""
    memory: float
    """Peak, in GB."""


@dataclass(frozen=True)
class Contender:
    """One way to take a training step."""

    kind: str
    """"ours", "transformers", or "our loss", "plain loss" alone."""
    device: str
    shape: dict[str, int]
    micro_batch_size: int
    precision: str = "bf16"
    compiled: bool = False
    changes: dict[str, Any] = field(default_factory=lambda: dict(NO_DROPOUT))
    sequence_to_sequence: bool = False
    """With an encoder of half the layers and a decoder of the other half."""

    def tokens(self) -> int:
        """Tokens of a step, without padding."""
        if self.sequence_to_sequence:
            return self.micro_batch_size * sum(map(sum, self.lengths())) // 4
        return self.micro_batch_size * self.shape["max_position_embeddings"]

    def lengths(self) -> list[tuple[int, int]]:
        """Of the sources and the targets of four rows, in tokens: a title from an abstract, padded to the longest."""
        longest = self.shape["max_position_embeddings"]
        return [(longest * share // 8, longest * share // 32) for share in (8, 7, 6, 5)]


def make_step(contender: Contender) -> Step:
    """Build the contender's model and optimizer."""
    torch.manual_seed(1)
    settings: dict[str, Any] = contender.shape | contender.changes
    config = DecoderConfig(**settings)
    device, dtype = torch.device(contender.device), PRECISIONS[contender.precision]
    length = config.max_position_embeddings
    if "loss" in contender.kind:
        return loss_step(contender, config)
    if contender.sequence_to_sequence:
        return sequence_to_sequence_step(contender)
    model: nn.Module
    if contender.kind == "ours":
        model = Decoder(config).to(device, dtype)
        if contender.compiled:
            model.compile_layers()
    else:
        from transformers import BioGptConfig, BioGptForCausalLM

        their_config: Any = BioGptConfig(**hf_config(config))
        model = BioGptForCausalLM._from_config(their_config, attn_implementation="sdpa", dtype=dtype)
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


def sequence_to_sequence_step(contender: Contender) -> Step:
    """Build an encoder and a decoder, and the optimizer."""
    half = contender.shape["num_hidden_layers"] // 2
    shape = contender.shape | {"num_hidden_layers": half, "num_encoder_layers": half}
    config = EncoderDecoderConfig(**shape, **contender.changes)
    device, dtype = torch.device(contender.device), PRECISIONS[contender.precision]
    model: nn.Module
    if contender.kind == "ours":
        model = EncoderDecoder(config)
    else:
        from transformers import BlenderbotConfig, BlenderbotForConditionalGeneration

        their_config: Any = BlenderbotConfig(**blenderbot_config(config))
        model = BlenderbotForConditionalGeneration._from_config(their_config, attn_implementation="sdpa")
    nn.Module.to(model, device, dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(number: int, micro_batch_size: int) -> None:
        generator = torch.Generator().manual_seed(number)
        longest = contender.lengths()[0]
        source, labels = (
            torch.randint(4, config.vocab_size, (micro_batch_size, n), generator=generator) for n in longest
        )
        for row in range(micro_batch_size):
            of_source, of_target = contender.lengths()[row % 4]
            source[row, of_source:], labels[row, of_target:] = config.pad_token_id, IGNORE_INDEX
        source, labels = source.to(device), labels.to(device)
        if contender.kind == "ours":
            loss = model(source, labels, step=number) / (labels != IGNORE_INDEX).sum()
        else:
            mask = (source != config.pad_token_id).long()
            loss = model(input_ids=source, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def loss_step(contender: Contender, config: DecoderConfig) -> Step:
    """The head and its loss alone, forward and backward."""
    rows, device, dtype = contender.tokens(), torch.device(contender.device), PRECISIONS[contender.precision]
    hidden = torch.randn(rows, config.hidden_size, device=device, dtype=dtype, requires_grad=True)
    words = config.padded_vocab_size if contender.kind == "our loss" else config.vocab_size
    weight = torch.randn(words, config.hidden_size, device=device) * config.hidden_size**-0.5  # logits as a model's
    weight = weight.to(dtype).requires_grad_()
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
    number = WARM_UP[contender.device]
    for early in range(number):
        step(early, contender.micro_batch_size)
    memory.reset()
    pipe.send("ready")
    while pipe.recv():
        synchronize(contender.device)
        before = time.perf_counter()
        step(number, contender.micro_batch_size)
        synchronize(contender.device)
        pipe.send((time.perf_counter() - before, memory.peak()))
        number += 1


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


def race(contenders: dict[str, Contender], rounds: int) -> dict[str, Figures]:
    """The figures of each contender; they step in turns."""
    started = {}
    for name, contender in contenders.items():
        process, pipe = started[name] = start(serve, contender)
        assert pipe.recv() == "ready"  # one at a time: all models at their peak at once may be too much for the memory
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = dict.fromkeys(contenders, 0.0)
    for _ in range(rounds):
        for name, (_, pipe) in started.items():
            pipe.send(True)
            taken, peak = pipe.recv()
            seconds[name].append(taken)
            peaks[name] = peak / 1e9
    for process, pipe in started.values():
        pipe.send(False)
        process.join()
    return {
        name: Figures(each.tokens() / min(seconds[name]), each.tokens() / statistics.fmean(seconds[name]), peaks[name])
        for name, each in contenders.items()
    }


def fair_layerdrop(shape: dict[str, int], device: str, rounds: int) -> dict[str, Any]:
    """Layerdrop 0.2 with a seed whose draws leave out a fifth of the layers of the steps that are timed."""

    def off_by(seed: int) -> float:
        layers, first = range(shape["num_hidden_layers"]), WARM_UP[device]
        steps = range(first, first + rounds)
        drawn = [is_dropped(0.2, seed, step, 0, layer) for step in steps for layer in layers]
        return abs(statistics.fmean(drawn) - 0.2)

    return {"layerdrop": 0.2, "layerdrop_seed": min(range(100), key=off_by)}


def speeds(one: float, other: float) -> str:
    """Two speeds and their ratio."""
    return f"{one:,.0f} to {other:,.0f} tokens/s: {one / other:.2f}x"


def memories(one: Figures, other: Figures) -> str:
    """Two peaks of memory and their ratio."""
    return f"{one.memory:.2f} to {other.memory:.2f} GB: {one.memory / other.memory:.2f}x"


def cpu_rows(precision: str, rounds: int) -> list[Row]:
    """The rows of a precision."""
    ours = Contender("ours", "cpu", CPU_SHAPE, micro_batch_size=4, precision=precision)
    theirs = replace(ours, kind="transformers")
    recomputed = {mode: NO_DROPOUT | {"gradient_checkpointing": mode} for mode in ("selective", "full")}
    modes = {mode: replace(ours, changes=changes) for mode, changes in recomputed.items()}
    layerdrop = replace(ours, changes=NO_DROPOUT | fair_layerdrop(CPU_SHAPE, "cpu", rounds))
    plain = race({"ours": ours, "theirs": theirs, "layerdrop": layerdrop, **modes}, rounds)
    dropped = race({"ours": replace(ours, changes=DROPOUT), "theirs": replace(theirs, changes=DROPOUT)}, rounds)
    both_sides = replace(ours, sequence_to_sequence=True)
    leaner = replace(both_sides, changes=recomputed["selective"])
    sides = race({"ours": both_sides, "theirs": replace(both_sides, kind="transformers"), "leaner": leaner}, rounds)
    losses = race({"ours": replace(ours, kind="our loss"), "theirs": replace(ours, kind="plain loss")}, rounds)
    step = "CPU step, 12 layers x 768, context 512, micro-batch 4, vocabulary 42,384, dropout 0"
    hf = "transformers' `BioGptForCausalLM`, sdpa, same AdamW"
    blenderbot = "transformers' `BlenderbotForConditionalGeneration`, sdpa, same AdamW"
    sides_step = "CPU step, encoder and decoder of 6 layers x 768, sources to 512 tokens, targets to 128, micro-batch 4"

    def row(what: str, against: str, measured: str, least: str = "") -> Row:
        return Row(what, against, precision, measured, least if precision == "bf16" else "")

    def both(one: Figures, other: Figures) -> str:
        return f"{speeds(one.fastest, other.fastest)}; {memories(one, other)}"

    return [
        row(step, hf, speeds(plain["ours"].fastest, plain["theirs"].fastest), "1.0x"),
        row("the same, peak memory", hf, memories(plain["ours"], plain["theirs"]), "0.85x"),
        row("with dropout 0.1", hf, speeds(dropped["ours"].fastest, dropped["theirs"].fastest)),
        row("the same, peak memory", hf, memories(dropped["ours"], dropped["theirs"]), "0.6x"),
        row("CPU step, layerdrop 0.2", "layerdrop 0", speeds(plain["layerdrop"].mean, plain["ours"].mean), "1.15x"),
        *(row(f"CPU step, recomputation {mode}", "none", both(plain[mode], plain["ours"])) for mode in modes),
        row(sides_step, blenderbot, speeds(sides["ours"].fastest, sides["theirs"].fastest), "1.0x"),
        row("the same, peak memory", blenderbot, memories(sides["ours"], sides["theirs"]), "0.85x"),
        row("the same, recomputation selective", blenderbot, both(sides["leaner"], sides["theirs"])),
        row(
            "head and loss alone, forward and backward",
            "torch's cross entropy in fp32",
            both(losses["ours"], losses["theirs"]),
        ),
    ]


def cpu() -> str:
    """The processor, its cores, and its instructions for bf16."""
    flags = cpuinfo("flags").split()
    instructions = next((each for each in ("amx_bf16", "avx512_bf16") if each in flags), "no bf16 instructions")
    return f"{processor()}, {cores()} cores, {instructions}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="steps of each contender")
    parser.add_argument("--precision", choices=PRECISIONS, help="both without this option")
    given = parser.parse_args()
    rows: list[tuple[str, ...]] = []
    for precision in [given.precision] if given.precision else PRECISIONS:
        rows += [(*row, cpu()) for row in cpu_rows(precision, given.rounds)]
    print(f"Measured by `python -m tests.bench.model` on {machine()}:\n")
    print("| what | against | precision | measured | at least (memory: at most) | processor |\n" + "|---" * 6 + "|")
    for row in rows:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()

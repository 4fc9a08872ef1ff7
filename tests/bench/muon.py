"""What Muon costs on a CPU. `python -m tests.bench.muon` prints a table; about 6 minutes on two cores.

Two ranks train a decoder of 12 layers of 768 at ZeRO 1, by AdamW and by Muon. CPU time is that of a rank's process with
all its threads, so other work on the machine hardly changes it.
"""

import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist

from pretrain.engine import build_engine, finish_step
from pretrain.muon import orthogonalize
from pretrain.objectives.kinds import make_objective
from pretrain.recipe import load_recipe
from tests.bench.machine import machine
from tests.pretrain.runs import make_sample
from tests.ranks import Ranks

STEPS, RANKS = 4, 2
TOKENS = 2 * 256  # of a micro-batch
GLOBAL_BATCH_TOKENS = 524_288  # of the recipe biogpt


def measure(shards: Path, kind: str) -> dict[str, float]:
    """Seconds of CPU time on this rank: of the passes over a micro-batch, of an optimizer step, of Newton-Schulz alone.

    Medians of some steps after a first one.
    """
    recipe = load_recipe(
        "biogpt",
        [
            "model.hidden_size=768", "model.num_hidden_layers=12", "model.num_attention_heads=12",
            "model.intermediate_size=3072", "model.max_position_embeddings=256", "model.hidden_dropout_prob=0.0",
            "model.attention_probs_dropout_prob=0.0", "train.precision=fp32", "train.micro_batch_size=2",
            f"train.global_batch_tokens={TOKENS * RANKS}", f"data.shards={shards}", f"optimizer.kind={kind}",
        ],
    )  # fmt: skip
    objective = make_objective(recipe)
    model = objective.build_model()
    matrices = [
        torch.randn(len(parameter) // count, parameter.shape[1])
        for name, parameter in model.named_parameters()
        for count in [model.hidden_matrices().get(name, 0)]
        for _ in range(count)
    ]
    engine, optimizer = build_engine(recipe, model, RANKS)
    optimizer.set_learning_rate(1e-4)
    seconds: dict[str, list[float]] = {"passes": [], "optimizer": [], "iteration": []}
    update = optimizer.torch.step

    def timed() -> None:
        began = time.process_time()
        update()
        seconds["optimizer"][-1] += time.process_time() - began

    optimizer.torch.step = timed  # type: ignore[method-assign]
    for step in range(STEPS + 1):
        seconds["optimizer"].append(0.0)  # DeepSpeed may call it for each group
        began = time.process_time()
        first = 2 * (RANKS * step + dist.get_rank())
        engine.backward(engine(*objective.batch(range(first, first + 2))))
        seconds["passes"].append(time.process_time() - began)
        finish_step(engine)
        if kind == "muon":
            began = time.process_time()
            for matrix in matrices[dist.get_rank() :: RANKS]:
                orthogonalize(matrix, torch.float32)
            seconds["iteration"].append(time.process_time() - began)
    return {name: statistics.median(found[1:] or [0.0]) for name, found in seconds.items()}


def main() -> None:
    """Print the table."""
    with TemporaryDirectory() as temporary:
        make_sample(Path(temporary))
        ranks = Ranks(RANKS)
        try:
            found = {
                kind: ranks.run(measure, Path(temporary) / "shards", kind, timeout=3600) for kind in ("adamw", "muon")
            }
        finally:
            ranks.close()
    mean = {
        kind: {name: statistics.fmean(each[name] for each in of_ranks) for name in of_ranks[0]}
        for kind, of_ranks in found.items()
    }
    added, bare = mean["muon"]["optimizer"] - mean["adamw"]["optimizer"], mean["muon"]["iteration"]
    step = mean["muon"]["passes"] * GLOBAL_BATCH_TOKENS / RANKS / TOKENS
    print(f"{machine()}\n")
    print("| CPU time of a rank, 12 layers of 768, 2 ranks, ZeRO 1, fp32 | |\n|---|---|")
    print(f"| an update by AdamW | {mean['adamw']['optimizer']:.2f} s |")
    print(f"| an update by Muon | {mean['muon']['optimizer']:.2f} s |")
    print(f"| Newton-Schulz alone, of half of the matrices | {bare:.2f} s |")
    print(f"| what Muon adds, over that | {added / bare:.3f}x |")
    print(f"| what Muon adds to a step of {GLOBAL_BATCH_TOKENS:,} tokens ({step:,.0f} s) | {added / step:.2%} |")


if __name__ == "__main__":
    main()

"""Golden losses: every ZeRO stage, recompute mode and number of ranks trains as plain torch does.

The loop's own `build` and `update` run here, without evaluations and checkpoints. Runs are compared on equal global
micro-batches, for layerdrop draws anew in each.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import pretrain.objectives.next_token
import pretrain.train
from model.config import DecoderConfig
from model.decoder import Decoder, DecoderLayer, is_dropped
from pretrain import engine as engines
from pretrain.interrupt import StopRequest
from pretrain.recipe import load_recipe
from tests.pretrain.runs import plain_losses, settings, stage_settings
from tests.ranks import Ranks

STEPS = 6
MODES = ("none", "selective", "full")


def losses_case(variants: list[list[str]]) -> list[list[float]]:
    """The losses of a run for each list of settings."""
    results = []
    for chosen in variants:
        recipe = load_recipe("tiny", chosen)
        run = pretrain.train.build(recipe, engines.init_distributed())
        request = StopRequest(run.folder, 0, run.rank)
        results.append([pretrain.train.update(run, request.code, lambda: 0)["loss"] for _ in range(STEPS)])
        request.close()
        run.engine.destroy()
    return results


def variant(shards: Path, folder: Path, ranks: int, accumulation: int, *more: str) -> list[str]:
    """16 blocks a step in `accumulation` micro-batches over all ranks, dropout 0."""
    run = folder / "-".join(more).replace("/", "_")[-100:] / f"{ranks}-{accumulation}"
    size = [f"train.micro_batch_size={16 // ranks // accumulation}", f"train.steps={STEPS}"]
    return [*settings(shards, run, "model.num_hidden_layers=4"), *size, *more]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_are_golden(stage: int, two_ranks: Ranks, sample_folder: Path, tmp_path: Path) -> None:
    """One layout for each stage: layerdrop 0.5, selective recomputation, two ranks, accumulation."""
    chosen = [*stage_settings(tmp_path, stage), "model.layerdrop=0.5", "model.gradient_checkpointing=selective"]
    (found,) = two_ranks.run(losses_case, [variant(sample_folder / "shards", tmp_path, 2, 2, *chosen)])[0]
    golden = plain_losses(variant(sample_folder / "shards", tmp_path, 1, 2, "model.layerdrop=0.5"), ranks=1)
    assert found == pytest.approx(golden, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_losses_are_golden_in_all_layouts(
    stage: int, one_rank: Ranks, two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """Layerdrop 0 and 0.5 x recompute modes x ranks 1 and 2 x accumulation 1 and 2, fp32."""
    shards, chosen, found = sample_folder / "shards", stage_settings(tmp_path, stage), {}
    cases = [(drop, mode, steps) for drop in (0.0, 0.5) for mode in MODES for steps in (1, 2)]
    for ranks in (one_rank, two_ranks):
        variants = [
            variant(
                shards, tmp_path, ranks.size, steps,
                *chosen, f"model.layerdrop={drop}", f"model.gradient_checkpointing={mode}",
            )
            for drop, mode, steps in cases
        ]  # fmt: skip
        for case, losses in zip(cases, ranks.run(losses_case, variants)[0], strict=True):
            found[*case, ranks.size] = losses
    golden = {
        (drop, steps): plain_losses(variant(shards, tmp_path, 1, steps, f"model.layerdrop={drop}"), ranks=1)
        for drop in (0.0, 0.5)
        for steps in (1, 2)
    }
    worst = 0.0
    for (drop, mode, steps, size), losses in found.items():
        wanted = golden[drop, steps]
        assert losses == pytest.approx(wanted, rel=1e-6), f"{drop}, {mode}, accumulation {steps}, {size} ranks"
        worst = max(worst, *(abs(one - other) for one, other in zip(losses, wanted, strict=True)))
    assert golden[0.0, 1] == pytest.approx(golden[0.0, 2], rel=1e-6)
    assert golden[0.5, 1] != pytest.approx(golden[0.5, 2], rel=1e-3) != pytest.approx(golden[0.0, 1], rel=1e-3)
    print(f"ZeRO {stage}: {len(found)} runs of {STEPS} steps, largest difference from plain torch {worst:.1e}")


class NaiveDecoder(Decoder):
    """LayerDrop as everyone writes it, transformers among them: the loop over layers leaves some out."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__(config)
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            layer.config = dataclasses.replace(config, layerdrop=0.0)  # nothing is decided inside

    def hidden(
        self,
        input_ids_BT: Tensor,
        segments_BT: Any = None,
        offsets_S: Any = None,
        *,
        step: int = 0,
        micro_step: int = 0,
    ) -> Tensor:
        everything, config = self.layers, self.config
        if self.training:
            dropped = [
                is_dropped(config.layerdrop, config.layerdrop_seed, step, micro_step, index)
                for index in range(config.num_hidden_layers)
            ]
            self.layers = nn.ModuleList(layer for layer, out in zip(everything, dropped, strict=True) if not out)
        hidden_BTH = super().hidden(input_ids_BT, segments_BT, offsets_S, step=step, micro_step=micro_step)
        self.layers = everything
        return hidden_BTH


def naive_case(variants: list[list[str]]) -> list[list[float]]:
    """`losses_case` with layers left out from outside."""
    right = pretrain.objectives.next_token.Decoder
    pretrain.objectives.next_token.Decoder = NaiveDecoder  # type: ignore[misc]
    try:
        return losses_case(variants)
    finally:
        pretrain.objectives.next_token.Decoder = right


def test_layers_left_out_from_outside_train_wrongly_at_stage_3(
    two_ranks: Ranks, sample_folder: Path, tmp_path: Path
) -> None:
    """The fault that DecoderLayer.forward avoids, so that the golden losses are seen to bite.

    At stage 2 the same code is right; at stage 3 the optimizer takes the gradient of a layer's last active step.
    """
    shards = sample_folder / "shards"
    golden = plain_losses(variant(shards, tmp_path, 1, 1, "model.layerdrop=0.5"), ranks=1)
    variants = [
        variant(shards, tmp_path, 2, 1, *stage_settings(tmp_path, stage), "model.layerdrop=0.5") for stage in (2, 3)
    ]
    at_stage_2, at_stage_3 = two_ranks.run(naive_case, variants)[0]
    assert at_stage_2 == pytest.approx(golden, rel=1e-6)
    print(f"stage 3 differs by {[f'{abs(one - other):.1e}' for one, other in zip(at_stage_3, golden, strict=True)]}")
    assert max(abs(one - other) for one, other in zip(at_stage_3, golden, strict=True)) > 1e-3

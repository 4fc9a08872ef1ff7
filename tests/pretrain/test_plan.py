"""`biogpt plan` against independent counts: real modules, tensors that live, the states of real optimizers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from data.common.files import UserError
from model.decoder import Decoder
from pretrain import engine as engines
from pretrain.gpus import GPUS
from pretrain.optimizer import Optimizer
from pretrain.plan import (
    CHUNK_LOGITS,
    activation_bytes,
    choices,
    choose,
    logit_bytes,
    measured_speed,
    memory,
    micro_batch_sizes,
    optimizer_bytes,
    parameter_count,
)
from pretrain.recipe import Recipe, load_recipe
from tests.pretrain.runs import stage_settings
from tests.ranks import Ranks

VOCABULARY = 300
SHAPE = [
    "model.hidden_size=64", "model.num_attention_heads=4", "model.intermediate_size=256",
    "model.max_position_embeddings=64", "train.micro_batch_size=2", "train.global_batch_tokens=512",
]  # fmt: skip


def recipe_of(*more: str) -> Recipe:
    return load_recipe("tiny", [*SHAPE, *more])


@pytest.mark.parametrize("name", ["tiny", "biogpt", "biogpt-fast", "biogpt-large"])
def test_the_parameters_are_those_of_the_real_model(name: str) -> None:
    config = load_recipe(name).decoder_config(42_001)
    with torch.device("meta"):
        model = Decoder(config)
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_optimizers_bytes_are_those_of_torchs_states(kind: str) -> None:
    recipe = recipe_of("deepspeed.stage=0", f"optimizer.kind={kind}")
    config = recipe.decoder_config(VOCABULARY)
    model = Decoder(config)
    optimizer = Optimizer(recipe, model)
    optimizer.locate((name, 0, parameter.detach().view(-1)) for name, parameter in model.named_parameters())
    model(*(torch.zeros(1, 8, dtype=torch.int64),) * 2).backward()
    optimizer.torch.step()
    states = [value for state in optimizer.torch.state.values() for name, value in state.items() if name != "step"]
    assert optimizer_bytes(recipe, config) == sum(value.nbytes for value in states)


def states_case(settings: list[str]) -> tuple[int, int]:
    """Bytes of a rank's states and of its fp32 weights after a step, without padding."""
    recipe = recipe_of(*settings)
    model = Decoder(recipe.decoder_config(VOCABULARY))
    engine, optimizer = engines.build_engine(recipe, model, ranks=2)
    tokens = torch.zeros(2, 64, dtype=torch.int64)
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward(engine(tokens, tokens) / tokens.numel())
        engine.step()
    kinds = ("model", *optimizer.state_names)
    held = {
        kind: sum(4 * len(each) for _, _, each in engines.held_fragments(engine, optimizer, kind)) for kind in kinds
    }
    return held["exp_avg"] + held["exp_avg_sq"], held["model"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_states_of_a_rank_are_those_that_deepspeed_keeps(stage: int, two_ranks: Ranks, tmp_path: Path) -> None:
    settings = stage_settings(tmp_path, stage)
    found = two_ranks.run(states_case, settings)
    planned = memory(recipe_of(*settings), VOCABULARY, ranks=2)
    assert sum(states for states, _ in found) == pytest.approx(2 * planned.optimizer, rel=0.01)
    assert max(states for states, _ in found) == pytest.approx(planned.optimizer, rel=0.05)
    masters = planned.weights - {0: 0, 1: 4, 2: 4, 3: 0}[stage] * parameter_count(
        recipe_of().decoder_config(VOCABULARY)
    )
    assert max(weights for _, weights in found) == pytest.approx(masters, rel=0.05)


class Living(TorchDispatchMode):
    """The bytes of all storages that operators made and that still live, now and at most, without the weights."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self._weights = {each.untyped_storage()._cdata for each in weights}
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def now(self) -> int:
        self._storages = {key: each for key, each in self._storages.items() if not each[0].expired()}
        return sum(size for _, size in self._storages.values())

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), more: Any = None) -> Any:
        result = function(*arguments, **(more or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.untyped_storage()._cdata not in self._weights:
                storage = each.untyped_storage()
                self._storages[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.most = max(self.most, self.now())
        return result


def kept_by(recipe: Recipe, call: Callable[[Decoder, Tensor], Any]) -> tuple[int, int]:
    """Bytes that live after a call of a new decoder, while its result lives, and the most during the call."""
    kind = torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32
    decoder = Decoder(recipe.decoder_config(VOCABULARY)).to(kind)
    tokens = torch.randint(4, VOCABULARY, (recipe.train.micro_batch_size, recipe.context_length()))
    with Living(list(decoder.parameters())) as living:
        result = call(decoder, tokens)
        kept = living.now()
    del result
    return kept, living.most


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recomputation", ["none", "selective", "full"])
def test_a_layer_keeps_what_the_plan_says(recomputation: str, dropout: float, precision: str) -> None:
    """The difference of two numbers of layers, to the bytes of the statistics that kernels keep."""
    settings = [
        f"model.gradient_checkpointing={recomputation}", f"model.hidden_dropout_prob={dropout}",
        f"model.attention_probs_dropout_prob={dropout}", f"train.precision={precision}",
    ]  # fmt: skip
    kept, planned = [], []
    for layers in (2, 5):
        recipe = recipe_of(f"model.num_hidden_layers={layers}", *settings)
        kept.append(kept_by(recipe, lambda decoder, tokens: decoder.hidden(tokens))[0])
        planned.append(activation_bytes(recipe, recipe.decoder_config(VOCABULARY), cpu=True))
    assert planned[1] - planned[0] == pytest.approx(kept[1] - kept[0], rel=0.05)


@pytest.mark.parametrize("recomputation", ["none", "full"])
def test_the_most_of_a_forward_pass_is_what_the_plan_says(recomputation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several chunks of logits. The layer that "full" recomputes comes later, in the backward pass."""
    import model.loss

    monkeypatch.setitem(CHUNK_LOGITS, "cpu", 96 * 384)
    monkeypatch.setitem(model.loss.CHUNK_LOGITS, "cpu", 96 * 384)
    recipe = recipe_of("model.num_hidden_layers=6", f"model.gradient_checkpointing={recomputation}")
    config = recipe.decoder_config(VOCABULARY)
    _, most = kept_by(recipe, lambda decoder, tokens: decoder(tokens, tokens))
    planned = activation_bytes(recipe, config, cpu=True) + logit_bytes(recipe, config, cpu=True)
    assert most <= planned * 1.05 and (recomputation == "full" or planned <= most * 1.05)


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    recipe, previous = load_recipe("biogpt"), {}
    for name in ("rtx4090", "a100-40gb", "h100", "h200"):
        for each in choices(recipe, 42_384, 1, GPUS[name]):
            key = each.recipe.deepspeed.stage, each.recipe.model.gradient_checkpointing
            sizes = micro_batch_sizes(recipe, 1)
            taken = {size: memory(choose(recipe, *key, size), 42_384, 1).step / GPUS[name].memory for size in sizes}
            assert list(taken.values()) == sorted(taken.values())
            assert all(512 % size == 0 for size in sizes)
            assert {size for size in sizes if size <= each.largest} == {size for size in sizes if taken[size] <= 0.92}
            assert each.largest >= previous.get(key, 0)
            previous[key] = each.largest
    assert max(previous.values()) > min(previous.values())


def test_more_ranks_and_a_higher_stage_never_take_more_weights_gradients_and_states() -> None:
    recipe = load_recipe("biogpt")

    def kept(stage: int, ranks: int) -> float:
        each = memory(choose(recipe, stage, "none", 1), 42_384, ranks)
        return each.weights + each.gradients + each.optimizer

    for ranks in (2, 8, 64):
        assert kept(1, ranks) > kept(2, ranks) > kept(3, ranks)
        assert all(kept(stage, ranks) > kept(stage, 2 * ranks) for stage in (1, 2, 3))


def write_run(run: Path, recipe: Recipe, speeds: list[float], ranks: int) -> None:
    from pretrain.recipe import write_recipe

    run.mkdir()
    write_recipe(recipe, run / "recipe.toml")
    (run / "manifest.json").write_text(json.dumps({"model": {"vocab_size": VOCABULARY}}))
    start = {"step": 0, "start": {"ranks": ranks, "devices": f"{ranks} x NVIDIA H100 80GB HBM3"}}
    figures = [{"step": 10 * (n + 1), "train/tokens_per_second": speed} for n, speed in enumerate(speeds)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (start, *figures)))


def test_the_speed_of_a_run_is_that_of_its_setting_and_scales_with_the_ranks(tmp_path: Path) -> None:
    write_run(tmp_path / "run", recipe_of(), [1.0, 4_000.0, 5_000.0, 4_100.0], ranks=4)
    speed = measured_speed(tmp_path / "run", "H100")
    assert speed.tokens_per_second(recipe_of(), VOCABULARY, 4) == pytest.approx(4_100.0)
    assert speed.tokens_per_second(recipe_of("train.micro_batch_size=1"), VOCABULARY, 8) == pytest.approx(8_200.0)
    recomputed = recipe_of("model.gradient_checkpointing=full")
    config = recomputed.decoder_config(VOCABULARY)
    layers = sum(each.numel() for each in Decoder(config).layers.parameters())
    forward = 2 * layers + 4 * config.num_hidden_layers * 64 * 64
    slower = config.flops_per_token(64) / (config.flops_per_token(64) + forward)
    assert speed.tokens_per_second(recomputed, VOCABULARY, 4) == pytest.approx(4_100.0 * slower)


def test_a_run_that_cannot_calibrate_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "run", recipe_of(), [1.0], ranks=4)
    for name, culprit in (("H100", "less than twice"), ("A100", "NVIDIA H100 80GB HBM3, not on A100")):
        with pytest.raises(UserError, match=culprit):
            measured_speed(tmp_path / "run", name)

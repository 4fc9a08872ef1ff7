"""Every objective in every layout, killed, moved and exported: the losses and weights of plain torch, the same bits."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pretrain.checkpoint import newest_checkpoint, step_of
from pretrain.export.folder import export
from pretrain.objectives.kinds import OBJECTIVES
from pretrain.objectives.objective import Objective
from pretrain.recipe import load_recipe
from tests.pretrain import test_bert_source, test_classification, test_records_mixture, test_source_target
from tests.pretrain.runs import end_of_run, metrics, objective_case, settings, stage_settings
from tests.pretrain.test_objective import MaskedTokens, plain_training
from tests.pretrain.tuning import tuning, write_folder
from tests.ranks import Ranks

STEPS = 6
Chosen = tuple[str, list[str]]
"""A recipe and the settings over it."""


class Folders:
    """What the runs of all objectives are made of."""

    def __init__(self, folder: Path, sample: Path, shards: Path, hf: Path) -> None:
        self.tokenizer, self.shards, self.hf = sample / "tokenizer", shards, hf
        self.prompts = write_folder(folder / "prompts")
        self.several = test_records_mixture.write_folders(folder)
        self.sources = test_source_target.write_folder(folder / "sources")
        self.tokens = test_classification.write_folder(folder / "tokens", "tokens")
        self.labels = test_classification.write_folder(folder / "labels", "multiple")
        self.bert = test_bert_source.write_given(folder / "with-bert")


def on_blocks(kind: str) -> Callable[[Folders, Path], Chosen]:
    more = [f"objective.kind={kind}", "train.micro_batch_size=2", "evaluate.max_blocks=4", "model.layerdrop=0.3"]
    return lambda given, run: ("tiny", settings(given.shards, run, *more))


def sequences(*more: str) -> Callable[[Folders, Path], Chosen]:
    return lambda given, run: test_source_target.drawn(given.sources, given.tokenizer, run, *more)


CASES: dict[str, Callable[[Folders, Path], Chosen]] = {
    "next_token": on_blocks("next_token"),
    "fill_in_the_middle": on_blocks("fill_in_the_middle"),
    "denoising": on_blocks("denoising"),
    "prompt_target": lambda given, run: tuning(given.prompts, given.hf, run),
    "several folders": lambda given, run: test_records_mixture.mixture(given.several, given.hf, run),
    "token_classification": lambda given, run: test_classification.chosen_for("tokens", given.tokens, given.hf, run),
    "sequence_classification": lambda given, run: test_classification.chosen_for(
        "multiple", given.labels, given.hf, run, "optimizer.learning_rate=2e-2"
    ),
    "source_target": sequences("model.layerdrop=0.3"),
    "source_target, shared layers": sequences("model.share_layers=true", "model.layerdrop=0.5"),
    "source_target, BERT's encoder": lambda given, run: test_bert_source.chosen(given.bert, run),
}
FAST = dict(zip(CASES, (3, 1, 2, 3, 1, 3, 0, 3, 2, 1), strict=True))
"""The stage at which each is trained by the fast tests, on two ranks."""
MATRIX = [
    pytest.param(name, stage, size, marks=[] if size == 2 and stage == FAST[name] else [pytest.mark.slow])
    for size in (2, 1, 4)
    for name in CASES
    for stage in range(4)
]


KILLED = ("fill_in_the_middle", "denoising", "source_target", "source_target, BERT's encoder")
"""Those that the fast tests kill. Next-token prediction is killed in its own tests, at other moments too."""


@pytest.fixture(scope="module")
def given(sample_folder: Path, reserved_shards: Path, hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    return Folders(tmp_path_factory.mktemp("given"), sample_folder, reserved_shards, hf)


@pytest.fixture(scope="module")
def four_ranks() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


def chosen_for(name: str, given: Folders, run: Path, stage: int, *more: str) -> Chosen:
    recipe, chosen = CASES[name](given, run)
    layout = stage_settings(run.parent, stage)
    if stage == 3 and "model.share_layers=true" in chosen:
        layout.append("model.layerdrop=0")  # ZeRO 3 refuses LayerDrop of shared layers
    steps = [f"train.steps={STEPS}", "checkpoint.every_steps=2", f"evaluate.every_steps={STEPS}"]
    return recipe, [*chosen, *steps, *layout, *more]


def objective_of(name: str, recipe: str, chosen: list[str]) -> type[Objective]:
    """Of next-token prediction the masked one: some ranks have no target in some micro-batches."""
    found = load_recipe(recipe, chosen)
    if found.model.encoder:
        return test_bert_source.BertSource
    return MaskedTokens if name == "next_token" else OBJECTIVES[found.objective.kind]


def compare(run: Path, recipe: str, chosen: list[str], ranks: int, objective: type[Objective]) -> str:
    """Assert that a run has the losses and the last weights of plain torch, and learned; what was found.

    Weights to 1e-5 but for the biases of keys: their true gradient is 0, and Adam normalises its noise.
    """
    found = list(metrics(run, "train/loss").values())
    expected, model = plain_training(load_recipe(recipe, chosen), ranks, objective)
    off = max(abs(a / b - 1) for a, b in zip(found, expected, strict=True))
    weights = load_file(run / "checkpoints" / f"step-{STEPS:07d}" / "model.safetensors")
    plain = model.hf_weights()
    furthest = {key: (tensor - plain[key]).abs().max().item() for key, tensor in weights.items()}
    keys = [key for key in furthest if key.endswith(("k_proj.bias", "key.bias"))]
    worst = max(furthest[key] for key in furthest if key not in keys)
    held_out = metrics(run, "validation/loss")
    fallen = held_out[0] - held_out[STEPS]
    assert len(found) == STEPS and keys
    assert off < 1e-6 and worst < 1e-5 and fallen > 0.1
    return f"losses {off:.1e}, weights {worst:.1e}, held-out loss fell {fallen:.2f}"


@pytest.mark.parametrize(("name", "stage", "size"), MATRIX)
def test_every_objective_trains_as_plain_torch_does(
    name: str, stage: int, size: int, given: Folders, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """And its export passes the proof: transformers finds the recorded loss, and our logits."""
    ranks: Ranks = request.getfixturevalue({1: "one_rank", 2: "two_ranks", 4: "four_ranks"}[size])
    run = tmp_path / "run"
    recipe, chosen = chosen_for(name, given, run, stage)
    objective = objective_of(name, recipe, chosen)
    ranks.run(objective_case, recipe, chosen, objective)
    print(f"{name}, ZeRO {stage}, {size} ranks: {compare(run, recipe, chosen, size, objective)}")
    counts = export(run, tmp_path / "hf")["counts"]
    assert counts["recorded_loss"] == metrics(run, "validation/loss")[STEPS]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in ("denoising", "source_target") else pytest.mark.slow) for name in CASES],
)
def test_a_run_goes_on_in_another_layout(
    name: str, given: Folders, one_rank: Ranks, two_ranks: Ranks, tmp_path: Path
) -> None:
    """One step on two ranks, the rest on one at another stage. No LayerDrop: its draws are those of micro-batches."""
    run, stage = tmp_path / "run", FAST[name]
    recipe, chosen = chosen_for(name, given, run, stage, "model.layerdrop=0", "train.stop_after_minutes=0.0000001")
    objective = objective_of(name, recipe, chosen)
    assert two_ranks.run(objective_case, recipe, chosen, objective) == [1, 1]
    _, chosen = chosen_for(name, given, run, (stage + 1) % 4, "model.layerdrop=0")
    assert one_rank.run(objective_case, recipe, chosen, objective) == [STEPS]
    print(f"{name}, ZeRO {stage} on 2 ranks, then {(stage + 1) % 4} on 1: {compare(run, recipe, chosen, 1, objective)}")


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        pytest.param(name, stage, marks=[] if stage == 1 and name in KILLED else [pytest.mark.slow])
        for name in CASES
        for stage in (1, 3)
    ],
)
def test_a_killed_run_goes_on_to_the_same_bits(
    name: str, stage: int, given: Folders, two_ranks: Ranks, tmp_path: Path
) -> None:
    recipe, chosen = chosen_for(name, given, tmp_path / "whole", stage)
    objective = objective_of(name, recipe, chosen)
    two_ranks.run(objective_case, recipe, chosen, objective)
    _, again = chosen_for(name, given, tmp_path / "killed", stage)
    ranks = Ranks(2)
    with pytest.raises(AssertionError, match="rank 0 of 2"):
        ranks.run(objective_case, recipe, again, objective, 6)
    newest, faults = newest_checkpoint(tmp_path / "killed")
    assert newest and not faults and step_of(newest) in (2, 4)
    two_ranks.run(objective_case, recipe, again, objective)
    assert end_of_run(tmp_path / "killed") == end_of_run(tmp_path / "whole")

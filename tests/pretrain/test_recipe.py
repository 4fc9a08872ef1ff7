"""Recipes: what is read, what is refused and in which words."""

import json
from pathlib import Path

import pytest

from data.common.files import UserError
from pretrain.recipe import bundled_recipes, check_settings, load_recipe, write_recipe


def test_the_biogpt_recipe_is_the_published_one() -> None:
    recipe = load_recipe("biogpt")
    assert recipe.decoder_config(42_384).parameter_count() == 346_763_264
    assert (recipe.context_length(), recipe.train.global_batch_tokens) == (1024, 524_288)
    assert (recipe.train.steps, recipe.schedule.warmup_steps, recipe.optimizer.learning_rate) == (200_000, 20_000, 2e-4)
    assert recipe.optimizer.betas == (0.9, 0.98)
    # "1024 tokens x 8 GPUs x 64 accumulation": the same global batch, whatever the micro-batch.
    assert recipe.gradient_accumulation_steps(8) * 8 * recipe.train.micro_batch_size == 8 * 64


def test_layerdrop_draws_from_the_runs_seed() -> None:
    assert load_recipe("tiny", ["train.seed=9"]).decoder_config(8).layerdrop_seed == 9


@pytest.mark.parametrize(
    ("name", "most_ranks"), [("tiny", 2), ("biogpt", 32), ("biogpt-fast", 32), ("biogpt-large", 64)]
)
def test_bundled_recipes_divide_over_their_ranks(name: str, most_ranks: int) -> None:
    assert name in bundled_recipes()
    recipe = load_recipe(name)
    blocks = recipe.train.global_batch_tokens // recipe.context_length()
    for ranks in (1, 2, most_ranks):
        assert recipe.gradient_accumulation_steps(ranks) * ranks * recipe.train.micro_batch_size == blocks


@pytest.mark.parametrize(("name", "records"), [("finetune-pubmedqa", 450), ("finetune-bc5cdr-relations", 500)])
def test_the_recipes_of_fine_tuning_are_the_published_ones(name: str, records: int, tmp_path: Path) -> None:
    """For a model of BioGPT's shape: 100 epochs, five checkpoints five epochs apart at the end."""
    shape = {
        "vocab_size": 42_384, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16,
        "intermediate_size": 4096, "max_position_embeddings": 1024,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    recipe = load_recipe(name, [f"model.weights={tmp_path}", "data.records=records"])
    assert recipe.decoder_config(42_384).parameter_count() == 346_763_264
    assert (recipe.schedule.kind, recipe.schedule.warmup_steps, recipe.optimizer.learning_rate) == (
        "inverse_sqrt", 100, 1e-5
    )  # fmt: skip
    assert (recipe.optimizer.betas, recipe.optimizer.weight_decay, recipe.optimizer.gradient_clipping) == (
        (0.9, 0.98), 0.01, 0.0
    )  # fmt: skip
    epoch = records / recipe.global_batch_size()
    assert 100 * epoch <= recipe.train.steps < 100 * epoch + 1
    assert recipe.checkpoint.keep_last == 5 and 5 * epoch <= recipe.checkpoint.every_steps < 5.2 * epoch
    for ranks in (1, 2, 4, 8):
        assert recipe.gradient_accumulation_steps(ranks) * ranks * recipe.train.micro_batch_size == 96


@pytest.mark.parametrize(
    ("name", "records", "epochs"), [("finetune-bc5cdr-entities", 500, 20), ("finetune-hoc", 9_972, 5)]
)
def test_the_recipes_of_classification_evaluate_after_each_epoch(
    name: str, records: int, epochs: int, tmp_path: Path
) -> None:
    shape = dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"), 64)
    (tmp_path / "config.json").write_text(json.dumps(shape | {"num_attention_heads": 2, "max_position_embeddings": 64}))
    recipe = load_recipe(name, [f"model.weights={tmp_path}", "data.records=records"])
    epoch = records / recipe.global_batch_size()
    assert epochs * epoch <= recipe.train.steps < epochs * epoch + 1
    assert epoch <= recipe.evaluate.every_steps == recipe.checkpoint.every_steps < epoch + 1
    assert recipe.schedule.warmup_steps == round(recipe.train.steps / 10)
    for ranks in (1, 2, 4):
        assert recipe.gradient_accumulation_steps(ranks) * ranks * recipe.train.micro_batch_size == 32


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[model]\npreset = "tiny"\n[train]\nsteps = 5\nseed = 9\n')
    recipe = load_recipe(str(path), ["train.steps=7", "train.run=my-run", "optimizer.betas=[0.8, 0.9]"])
    assert (recipe.train.steps, recipe.train.seed, recipe.train.run) == (7, 9, "my-run")
    assert recipe.optimizer.betas == (0.8, 0.9) and recipe.train.micro_batch_size == 8


def test_the_resolved_recipe_reads_back_the_same_with_absolute_paths(tmp_path: Path) -> None:
    recipe = load_recipe("biogpt", ["train.run=a-run", "data.shards=some/shards", "optimizer.epsilon=1e-8"])
    write_recipe(recipe, tmp_path / "recipe.toml")
    back = load_recipe(str(tmp_path / "recipe.toml"))
    assert Path(back.train.run) == Path("a-run").resolve() and back.data_folders()["train"].is_absolute()
    different = {"train": {"run"}, "data": {"shards"}}
    assert back.model_dump(exclude=different) == recipe.model_dump(exclude=different)


@pytest.mark.parametrize("name", ["\U0001f9ec run", 'a "quoted" run', "back\\slash", "tab\there", "ünïcode"])
def test_every_path_of_a_run_is_read_back(name: str, tmp_path: Path) -> None:
    recipe = check_settings({"model": {"preset": "tiny"}, "train": {"run": str(tmp_path / name)}}, "test")
    write_recipe(recipe, tmp_path / "recipe.toml")
    assert load_recipe(str(tmp_path / "recipe.toml")).train.run == str((tmp_path / name).resolve())


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.step=5"], "unknown key train.step; did you mean train.steps?"),
        (["trian.steps=5"], "unknown key trian; did you mean train?"),
        (["optimizer.lr=1"], "unknown key optimizer.lr"),
        (["train.steps=many"], "train.steps = 'many'"),
        (["model.preset=huge"], "choose from tiny, biogpt, biogpt-large"),
        (["train.precision=bf16", "deepspeed.stage=0"], "use deepspeed.stage=1"),
        (["train.precision=fp16", "deepspeed.stage=0"], "use deepspeed.stage=1"),
        (["deepspeed.offload_optimizer=true", "deepspeed.stage=0"], "needs deepspeed.stage 1, 2 or 3"),
        (["deepspeed.offload_optimizer=true", "model.layerdrop=0.1"], "use deepspeed.stage=3"),
        (["deepspeed.offload_parameters=true"], "needs deepspeed.stage=3"),
        (["schedule.kind=wsd"], "needs schedule.decay_steps"),
        (["schedule.kind=wsd", "schedule.decay_steps=190"], "together are more than train.steps 200"),
        (["schedule.decay_steps=20"], 'schedule.decay_steps = 20: schedule.kind = "inverse_sqrt" does not use it'),
        (["schedule.kind=cosine", "schedule.decay_steps=20"], 'schedule.decay_steps = 20: schedule.kind = "cosine"'),
        (["schedule.final_learning_rate=1e-5"], "schedule.final_learning_rate = 1e-05: schedule.kind = "),
        (["deepspeed.stage=4"], "deepspeed.stage = 4"),
        (["train.context_length=4096"], "longer than the model's max_position_embeddings 128"),
        (["model.gradient_checkpointing=true"], "model.gradient_checkpointing = True"),
        (["model.boundaries=sentence"], "model.boundaries = 'sentence'"),
        (["model.weights=hf", "model.initialization=hf"], "remove one of the keys"),
        (["model.hidden_size=30"], "not divisible by num_attention_heads"),
        (
            ["model.hidden_size=1000000000"],
            "input should be less than or equal to 1048576",
        ),
        (["train.seed=1e23"], "train.seed = 1e+23"),
        (["optimizer.learning_rate=inf"], "optimizer.learning_rate = inf"),
        (["optimizer.learning_rate=nan"], "optimizer.learning_rate = nan"),
        (["optimizer.betas=[0.9, 1.0]"], "optimizer.betas.1 = 1.0"),
        (["train.stop_after_minutes=inf"], "train.stop_after_minutes = inf"),
        (["train.run="], "train.run = ''"),
        (["data.shards="], "data.shards = ''"),
        (["steps=4"], "not of the form section.key=value"),
        (["train.steps"], "not of the form section.key=value"),
    ],
)
def test_a_mistake_is_named_in_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", overrides)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_all_mistakes_are_reported_together() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", ["train.step=5", "train.seed=-1", "optimizer.learning_rate=0"])
    assert all(key in str(caught.value) for key in ("train.step;", "train.seed = -1", "optimizer.learning_rate = 0"))


def test_settings_that_contradict_each_other_are_reported_together() -> None:
    contradictions = ["schedule.kind=wsd", "deepspeed.offload_parameters=true", "train.context_length=4096"]
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", [*contradictions, "model.hidden_size=30"])
    said = str(caught.value)
    keys = ("schedule.decay_steps", "deepspeed.offload_parameters", "train.context_length", "hidden_size = 30")
    assert all(key in said for key in keys) and "\n" not in said


@pytest.mark.parametrize(("content", "message"), [("[train\n", "not TOML"), ("train = 3\n", "train")])
def test_a_damaged_recipe_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_recipe(str(path))
    with pytest.raises(UserError, match="no such recipe file, nor a bundled recipe"):
        load_recipe(str(tmp_path / "absent.toml"))


def test_a_global_batch_that_does_not_divide_is_answered_with_one_that_does() -> None:
    with pytest.raises(UserError, match="would") as caught:
        load_recipe("tiny", ["train.global_batch_tokens=3968"]).gradient_accumulation_steps(3)
    suggested = int(str(caught.value).split(";")[1].split()[0])
    assert load_recipe("tiny", [f"train.global_batch_tokens={suggested}"]).gradient_accumulation_steps(3) >= 1
    with pytest.raises(UserError, match="not a multiple of the context length 128"):
        load_recipe("tiny", ["train.global_batch_tokens=1000"]).gradient_accumulation_steps(1)

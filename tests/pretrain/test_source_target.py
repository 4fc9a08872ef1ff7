"""Sequence to sequence on records, against a plain loop over transformers' own model and tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, BlenderbotConfig, BlenderbotForConditionalGeneration

from data.common.files import UserError, read_manifest
from data.shards.order import EpochOrder
from model.loss import IGNORE_INDEX
from pretrain.checkpoint import newest_checkpoint
from pretrain.export.folder import export
from pretrain.generate import Decoding, Prompt, generate
from pretrain.hf_folder import load_causal_lm
from pretrain.inference import evaluate_folder
from pretrain.load import load_decoder, load_run
from pretrain.objectives.kinds import make_objective
from pretrain.recipe import load_recipe
from pretrain.schedule import learning_rate
from tests.pretrain.runs import metrics
from tests.pretrain.tuning import prompts_and_targets, tuning, tuning_case, write_records
from tests.ranks import Ranks

SHAPE = [
    "model.hidden_size=32", "model.num_hidden_layers=2", "model.num_attention_heads=2", "model.intermediate_size=64",
    "model.max_position_embeddings=64",
]  # fmt: skip


def sources_and_targets(seed: int, count: int) -> list[dict[str, str]]:
    return [{"source": each["prompt"], "target": each["target"]} for each in prompts_and_targets(seed, count)]


def write_folder(folder: Path) -> Path:
    """A folder of records."""
    folder.mkdir()
    write_records(folder / "train.jsonl", sources_and_targets(0, 40))
    write_records(folder / "validation.jsonl", sources_and_targets(1, 11))
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("sources") / "records")


@pytest.fixture(scope="module")
def tokenizer(sample_folder: Path) -> Path:
    return sample_folder / "tokenizer"


def drawn(records: Path, tokenizer: Path, run: Path, *more: str) -> tuple[str, list[str]]:
    """A very small run from drawn weights: its recipe and its settings."""
    recipe, chosen = tuning(records, tokenizer, run, *SHAPE, 'objective.kind="source_target"')
    return recipe, [*(each.replace("model.weights=", "data.tokenizer=") for each in chosen), *more]


@pytest.fixture(scope="module")
def tuned(two_ranks: Ranks, records: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 8 steps on two ranks, with an encoder of one layer."""
    run = tmp_path_factory.mktemp("sequence") / "run"
    two_ranks.run(tuning_case, *drawn(records, tokenizer, run, "model.num_encoder_layers=1"))
    return run


@pytest.fixture(scope="module")
def exported(tuned: Path) -> Path:
    export(tuned, tuned.parent / "hf")
    return tuned.parent / "hf"


def plain_pair(tokenizer: Any, record: dict[str, str]) -> tuple[list[int], list[int]]:
    """As one writes it for transformers: the source as it is tokenized at generation; the target and `</s>`."""
    target = tokenizer(record["target"], add_special_tokens=False)["input_ids"]
    return tokenizer(record["source"])["input_ids"], [*target, tokenizer.eos_token_id]


def plain_mean_loss(model: Any, tokenizer: Any, records: list[dict[str, str]]) -> torch.Tensor:
    """The loss of a target's token by transformers' model, a record at a time."""
    total, count = torch.zeros(()), 0
    for record in records:
        source, labels = plain_pair(tokenizer, record)
        total = total + model(torch.tensor([source]), labels=torch.tensor([labels])).loss * len(labels)
        count += len(labels)
    return total / count


def test_losses_are_those_of_a_plain_loop_over_transformers(tuned: Path) -> None:
    recipe = load_recipe(str(tuned / "recipe.toml"))
    ours, train = make_objective(recipe).build_model(), sources_and_targets(0, 40)
    model = BlenderbotForConditionalGeneration(BlenderbotConfig(**ours.hf_config())).eval()  # the recipe has no dropout
    model.load_state_dict(ours.hf_weights(), strict=False)
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(tuned / "tokenizer")
    with torch.no_grad():
        at_start = plain_mean_loss(model, tokenizer, sources_and_targets(1, 11)).item()
    assert metrics(tuned, "validation/loss")[0] == pytest.approx(at_start, rel=1e-5)
    assert metrics(tuned, "validation/perplexity")[0] == pytest.approx(2.718281828**at_start, rel=1e-4)
    optimizer = torch.optim.AdamW(model.parameters(), betas=recipe.optimizer.betas, weight_decay=0.01)
    order, expected = EpochOrder(len(train), recipe.train.seed), []
    for step in range(8):
        optimizer.zero_grad()
        loss = plain_mean_loss(model, tokenizer, [train[order.locate(step * 8 + row)[1]] for row in range(8)])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, step)
        optimizer.step()
        expected.append(loss.item())
    found = list(metrics(tuned, "train/loss").values())
    print(f"differs by {max(abs(a - b) for a, b in zip(found, expected, strict=True)):.1e}")
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0] - 1


@pytest.mark.slow
def test_shared_layers_train_alike_under_muon(two_ranks: Ranks, records: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Muon sees each shared matrix once, whole or in parts."""
    losses = []
    for stage in (0, 2):
        more = ['optimizer.kind="muon"', "model.share_layers=true", f"deepspeed.stage={stage}"]
        two_ranks.run(tuning_case, *drawn(records, tokenizer, tmp_path / str(stage), *more))
        losses.append(list(metrics(tmp_path / str(stage), "train/loss").values()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][-1] < losses[0][0] - 0.5


def test_a_resumed_run_gives_the_same_bits(
    two_ranks: Ranks, tuned: Path, records: Path, sample_folder: Path, tmp_path: Path
) -> None:
    """Also if the tokenizer's folder is gone: the run has its own."""
    given = tmp_path / "tokenizer"
    shutil.copytree(sample_folder / "tokenizer", given)
    recipe, chosen = drawn(records, given, tmp_path / "run", "model.num_encoder_layers=1")
    two_ranks.run(tuning_case, recipe, [*chosen, "train.stop_after_minutes=0.0000001"])
    assert newest_checkpoint(tmp_path / "run")[0] == tmp_path / "run" / "checkpoints" / "step-0000001"
    shutil.rmtree(given)
    two_ranks.run(tuning_case, str(tmp_path / "run" / "recipe.toml"), ["train.stop_after_minutes=0"])
    for name in ("model", "exp_avg", "exp_avg_sq"):
        one, other = (run / "checkpoints" / "step-0000008" / f"{name}.safetensors" for run in (tmp_path / "run", tuned))
        assert one.read_bytes() == other.read_bytes()


# The export


def auto(folder: Path) -> tuple[Any, Any]:
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_export_gives_transformers_the_recorded_loss_and_our_logits(tuned: Path, exported: Path) -> None:
    model, tokenizer = auto(exported)
    with torch.no_grad():
        found = plain_mean_loss(model, tokenizer, sources_and_targets(1, 11))
    assert found.item() == pytest.approx(metrics(tuned, "validation/loss")[8], abs=1e-5)
    assert model.generation_config.decoder_start_token_id == 2 and model.generation_config.forced_eos_token_id is None
    assert not model.generation_config.encoder_no_repeat_ngram_size
    counts = read_manifest(exported, "hf")["counts"]
    assert counts["held_out"]["loss"] == pytest.approx(found.item(), abs=1e-5)
    assert counts["largest_logit_difference"] < 1e-5
    assert counts["parameters"] == sum(each.numel() for each in load_file(exported / "model.safetensors").values())


def test_the_card_says_what_it_is_and_its_lines_run(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    card = (exported / "README.md").read_text()
    assert "A BioGPT-shaped sequence-to-sequence model,\ntrained from random weights with biogpt-pretrain" in card
    assert str(exported.parent) not in card
    monkeypatch.chdir(exported)
    exec(card.split("```python\n")[1].split("```")[0], {})
    assert "nats a token" in capsys.readouterr().out


@pytest.mark.slow
def test_shared_layers_are_exported_for_both_sides(
    two_ranks: Ranks, records: Path, tokenizer: Path, tmp_path: Path
) -> None:
    two_ranks.run(tuning_case, *drawn(records, tokenizer, tmp_path / "run", "model.share_layers=true"))
    stored = load_file(tmp_path / "run" / "checkpoints" / "step-0000008" / "model.safetensors")
    assert not [name for name in stored if name.startswith("model.encoder.layers.")]  # once
    export(tmp_path / "run", tmp_path / "hf")
    with torch.no_grad():
        found = plain_mean_loss(*auto(tmp_path / "hf"), sources_and_targets(1, 11))
    assert found.item() == pytest.approx(metrics(tmp_path / "run", "validation/loss")[8], abs=1e-5)


def test_generation_writes_what_transformers_writes(tuned: Path, exported: Path) -> None:
    """From the run and from its export, in padded batches and alone, with the cache and without, and with beams."""
    texts = [record["source"] for record in sources_and_targets(1, 4)]
    prompts = [Prompt(text, "the prompt") for text in texts]
    model, tokenizer = auto(exported)
    for beams in (1, 3):
        expected = []
        for text in texts:
            source = tokenizer(text, return_tensors="pt")
            chosen = {"max_new_tokens": 12, "num_beams": beams, "do_sample": False, "early_stopping": beams > 1}
            ids = model.generate(**source, **chosen, use_cache=False)[0]
            assert ids.tolist() == model.generate(**source, **chosen)[0].tolist()
            expected.append(tokenizer.decode(ids, skip_special_tokens=True))
        for folder in (tuned, exported):
            assert generate(folder, prompts, Decoding(max_new_tokens=12, beams=beams), batch_size=4) == expected
    sampled = generate(exported, prompts, Decoding(max_new_tokens=12, sample=True, seed=3))
    assert sampled == generate(exported, prompts, Decoding(max_new_tokens=12, sample=True, seed=3)) != expected
    shown: list[str] = []
    assert generate(exported, prompts[:1], Decoding(max_new_tokens=12), show=shown.append) == [
        "".join(shown).strip("\n")
    ]
    with pytest.raises(UserError, match="the prompt has 131 tokens; the model holds 64"):
        generate(exported, [Prompt("role " * 130, "the prompt")], Decoding())


# Where it starts


def start_of(records: Path, weights: Path, folder: Path, *more: str) -> Any:
    """The model of a new run that starts from these weights, and its objective."""
    recipe = load_recipe(*tuning(records, weights, folder / "run", 'objective.kind="source_target"', *more))
    objective = make_objective(recipe)
    model = objective.build_model()
    objective.load_weights(model, weights)
    return model, objective


def test_both_sides_start_from_a_causal_decoder(records: Path, run: Path, hf: Path, tmp_path: Path) -> None:
    """From an exported folder, a run, and torch's file of a folder; the cross attention is drawn from the seed."""
    torch_folder = tmp_path / "torch"
    shutil.copytree(hf, torch_folder, ignore=shutil.ignore_patterns("model.safetensors", "manifest.json"))
    torch.save(load_file(hf / "model.safetensors"), torch_folder / "pytorch_model.bin")
    given = load_decoder(run, *load_run(run)[:2]).state_dict()
    for weights in (hf, run, torch_folder):
        for share in ("false", "true"):
            model, objective = start_of(records, weights, tmp_path, f"model.share_layers={share}")
            fresh = objective.build_model().state_dict()
            for name, tensor in model.state_dict().items():
                theirs = name.removeprefix("encoder.").removeprefix("decoder.")
                if ".encoder_attn" in name:
                    assert torch.equal(tensor, fresh[name]), name
                elif theirs == "embed_positions.weight":
                    assert torch.equal(tensor, given[theirs][2:])
                else:
                    assert torch.equal(tensor, given[theirs]), name


def test_a_run_starts_from_an_encoder_and_a_decoder(records: Path, tuned: Path, exported: Path, tmp_path: Path) -> None:
    whole = load_file(exported / "model.safetensors")
    for weights in (tuned, exported):
        model, objective = start_of(records, weights, tmp_path)
        assert objective.config.num_encoder_layers == 1 and objective.config.max_position_embeddings == 64
        found = model.hf_weights()
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], whole[name]) for name in whole)


@pytest.mark.slow
def test_a_warm_start_trains_and_is_exported(two_ranks: Ranks, records: Path, hf: Path, tmp_path: Path) -> None:
    two_ranks.run(tuning_case, *tuning(records, hf, tmp_path / "run", 'objective.kind="source_target"'))
    assert metrics(tmp_path / "run", "train/loss")[8] < metrics(tmp_path / "run", "train/loss")[1] - 0.5
    assert "fine-tuned with" in (
        export(tmp_path / "run", tmp_path / "hf") and (tmp_path / "hf" / "README.md").read_text()
    )


# The batches


def objective_of(records: Path, tokenizer: Path, folder: Path, *more: str) -> Any:
    return make_objective(load_recipe(*drawn(records, tokenizer, folder / "run", *more)))


def test_a_batch_holds_the_ids_that_transformers_finds(records: Path, tokenizer: Path, tmp_path: Path) -> None:
    objective, plain = objective_of(records, tokenizer, tmp_path), AutoTokenizer.from_pretrained(tokenizer)
    ids, labels = objective.held_out()["records"].batch(range(11), 12)
    assert ids.shape[1] != labels.shape[1]
    for row, record in enumerate(sources_and_targets(1, 11)):
        source, target = plain_pair(plain, record)
        assert ids[row].tolist() == [*source, *[1] * (ids.shape[1] - len(source))]
        assert labels[row].tolist() == [*target, *[IGNORE_INDEX] * (labels.shape[1] - len(target))]
    assert (ids[11] == 1).all() and (labels[11] == IGNORE_INDEX).all()
    for numbers in (range(3), range(36, 44), range(75, 130)):  # 40 records an epoch
        ids, labels = objective.batch(numbers)
        assert objective.counted_targets(numbers) == (labels != IGNORE_INDEX).sum()
        assert objective.tokens(numbers) == (ids != 1).sum() + (labels != IGNORE_INDEX).sum()


def test_a_long_source_loses_its_end_and_a_long_target_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    long = {"source": "Mesurafen was studied. " * 9, "target": "asthma"}
    for split in ("train", "validation"):
        write_records(tmp_path / f"{split}.jsonl", [long, {"source": "Dravonol", "target": "asthma"}])
    objective = objective_of(tmp_path, tokenizer, tmp_path, "train.context_length=16")
    objective.check()
    plain = AutoTokenizer.from_pretrained(tokenizer)
    expected = plain(long["source"], truncation=True, max_length=16)["input_ids"]
    assert objective.held_out()["records"].batch(range(2), 2)[0][0].tolist() == expected
    said = [line for line in objective.warnings() if "validation" in line]
    assert said == ["1 of 2 validation records are longer than train.context_length = 16 and were cut"]
    write_records(tmp_path / "train.jsonl", [{"source": "a", "target": "role " * 70}])
    with pytest.raises(UserError, match=r"train.jsonl: line 1: the target has .* too many for train.context_length"):
        objective_of(tmp_path, tokenizer, tmp_path).check()


# Mistakes


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("model.weights=hf", "data.tokenizer and model.weights: the weights have a tokenizer of their own; remove one"),
        ("model.vocab_size=9", "leave the key out"),
        ("model.num_encoder_layers=0", "model.num_encoder_layers"),
        ('objective.kind="prompt_target" model.share_layers=true', 'objective.kind = "prompt_target" has no encoder'),
        ("model.share_layers=true model.num_encoder_layers=1", "with share_layers it must be num_hidden_layers = 2"),
        ("model.share_layers=true model.layerdrop=0.1 deepspeed.stage=3", "use deepspeed.stage=2"),
        ("data.tokenizer=absent", "absent/vocab.json: no such file"),
    ],
)
def test_mistakes_are_one_line(given: str, said: str, records: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        objective_of(records, tokenizer, tmp_path, *given.split(" "))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_encoder_is_refused_where_a_causal_decoder_is_needed(
    records: Path, tuned: Path, exported: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r'is an encoder and a decoder; objective.kind = "prompt_target" trains a causal'
    ):
        load_recipe(*tuning(records, exported, tmp_path / "run"))
    with pytest.raises(UserError, match="its model is not a causal language model; it has an encoder"):
        load_decoder(tuned, *load_run(tuned)[:2])
    with pytest.raises(UserError, match="is an encoder and a decoder, not a causal language model"):
        load_causal_lm(exported, torch.device("cpu"))
    with pytest.raises(UserError, match=r"its config.json is not a BioGPT's"):
        evaluate_folder(exported, exported, "test")
    altered = tmp_path / "altered"
    shutil.copytree(exported, altered, ignore=shutil.ignore_patterns("manifest.json"))
    weights = load_file(altered / "model.safetensors")
    save_file(
        weights | {"final_logits_bias": torch.ones(1, len(weights["model.shared.weight"]))},
        altered / "model.safetensors",
    )
    with pytest.raises(UserError, match="final_logits_bias: is not zero, as it is in this model"):
        start_of(records, altered, tmp_path)


def test_the_held_out_loss_of_a_run_is_evaluated(tuned: Path) -> None:
    found = evaluate_folder(tuned, None, "validation")
    assert found["loss"] == pytest.approx(metrics(tuned, "validation/loss")[8], abs=1e-5)
    assert json.loads((tuned / "manifest.json").read_text())["model"]["num_encoder_layers"] == 1


@pytest.mark.parametrize("start", ["model.weights", "data.tokenizer"])
def test_the_bundled_recipe_divides_over_ranks(start: str, hf: Path) -> None:
    recipe = load_recipe("seq2seq-title", ["data.records=records", f"{start}={hf}", "train.context_length=64"])
    assert recipe.encoder_decoder_config(496).num_encoder_layers == recipe.encoder_decoder_config(496).num_hidden_layers
    for ranks in (1, 2, 4, 8):
        assert recipe.gradient_accumulation_steps(ranks) * ranks * recipe.train.micro_batch_size == 64

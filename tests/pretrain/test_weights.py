"""A run begins with given weights: whatever they come in, and each thing that does not fit by name."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from data.common.files import UserError
from model.decoder import Decoder
from pretrain.export.folder import export
from pretrain.inference import evaluate_folder
from pretrain.recipe import load_recipe
from pretrain.weights import load_weights
from tests.pretrain.runs import metrics, refused_case, run_case, settings
from tests.ranks import Ranks

UNSHAPED = {"num_attention_heads": 4, "hidden_act": "gelu_new", "scale_embedding": False}
"""What a folder's config.json may say that no weight's shape shows, other than the tests' runs have it."""


@pytest.fixture(scope="module")
def hf(one_rank: Ranks, sample_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a short run."""
    folder = tmp_path_factory.mktemp("weights")
    one_rank.run(run_case, settings(sample_folder / "shards", folder / "run", "train.steps=4"))
    export(folder / "run", folder / "hf")
    return folder / "hf"


def fresh(shards: Path) -> Decoder:
    """A decoder of the tests' runs with other weights."""
    torch.manual_seed(9)
    words = len(json.loads((shards / "tokenizer" / "vocab.json").read_text()))
    return Decoder(load_recipe("tiny", settings(shards, shards)).decoder_config(words)).eval()


def published(hf: Path, folder: Path) -> list[Path]:
    """The same weights in each form in which people have them."""
    state = load_file(hf / "model.safetensors")
    head = {"output_projection.weight": state["biogpt.embed_tokens.weight"]}
    torch.save(state | head, folder / "pytorch_model.bin")
    fairseq = {name.replace("biogpt.", "decoder."): tensor for name, tensor in state.items()}
    fairseq["decoder.version"] = torch.tensor([3.0])
    torch.save({"args": argparse.Namespace(arch="transformer_lm_biogpt"), "model": fairseq}, folder / "checkpoint.pt")
    (folder / "bin").mkdir()
    shutil.copy(folder / "pytorch_model.bin", folder / "bin")
    AutoModelForCausalLM.from_pretrained(hf).save_pretrained(folder / "sharded", max_shard_size="40KB")
    assert (folder / "sharded" / "model.safetensors.index.json").is_file()
    files = [hf / "model.safetensors", folder / "pytorch_model.bin", folder / "checkpoint.pt"]
    return [hf, *files, folder / "bin", folder / "sharded"]


def test_every_form_gives_the_same_decoder(hf: Path, sample_folder: Path, tmp_path: Path) -> None:
    shards = sample_folder / "shards"
    ids = torch.randint(4, 200, (2, 30))
    expected = AutoModelForCausalLM.from_pretrained(hf).eval()(ids).logits
    for path in published(hf, tmp_path):
        decoder = fresh(shards)
        assert not torch.allclose(decoder(ids), expected, atol=0.1)
        load_weights(decoder, path, shards / "tokenizer")
        assert torch.allclose(decoder(ids), expected, atol=1e-5, rtol=0), path


def test_a_run_goes_on_from_given_weights_and_resumes_from_its_own(
    one_rank: Ranks, hf: Path, sample_folder: Path, tmp_path: Path
) -> None:
    shards = sample_folder / "shards"
    chosen = settings(shards, tmp_path / "run", f"model.weights={hf}")
    one_rank.run(run_case, [*chosen, "train.steps=2"])
    wanted = evaluate_folder(hf, shards, "validation")["loss"]
    assert metrics(tmp_path / "run", "validation/loss")[0] == pytest.approx(wanted, abs=1e-5)
    assert load_recipe(str(tmp_path / "run" / "recipe.toml")).model.weights == str(hf)
    one_rank.run(run_case, [*chosen, "train.steps=3"])
    assert list(metrics(tmp_path / "run", "train/loss")) == [1, 2, 3]

    other = hf / "model.safetensors"
    said = one_rank.run(refused_case, [*settings(shards, tmp_path / "run"), f"model.weights={other}"])[0]
    assert f"has given weights = {hf}, this run {other}; choose" in said and "\n" not in said
    assert load_recipe(str(tmp_path / "run" / "recipe.toml")).model.weights == str(hf)
    one_rank.run(run_case, [*settings(shards, tmp_path / "run"), "train.steps=4"])  # the weights may be gone by now
    assert list(metrics(tmp_path / "run", "train/loss")) == [1, 2, 3, 4]


def test_what_does_not_fit_is_named(one_rank: Ranks, hf: Path, sample_folder: Path, tmp_path: Path) -> None:
    shards = sample_folder / "shards"
    tokenizer, state = shards / "tokenizer", load_file(hf / "model.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "noise.bin").write_bytes(b"noise" * 100)
    (tmp_path / "noise.safetensors").write_bytes(b"noise" * 100)
    torch.save({"model": 3}, tmp_path / "three.pt")
    torch.save({"model": state, "task": Path}, tmp_path / "objects.pt")
    shutil.copytree(hf, tmp_path / "other")
    (tmp_path / "other" / "manifest.json").unlink()
    (tmp_path / "other" / "merges.txt").write_text("#version: 0.2\n")
    config = json.loads((hf / "config.json").read_text())
    for key, value in {**UNSHAPED, "fitting": None}.items():
        (tmp_path / key).mkdir()
        save_file(state, tmp_path / key / "model.safetensors")
        (tmp_path / key / "config.json").write_text(json.dumps(config | {key: value}))
    load_weights(fresh(shards), tmp_path / "fitting", tokenizer)
    embedding = state["biogpt.embed_tokens.weight"]
    changed = {
        "short": state | {"biogpt.embed_tokens.weight": embedding[:-1].contiguous()},
        "wide": state | {"biogpt.layers.1.fc1.bias": torch.zeros(65)},
        "more": state | {"biogpt.layers.2.fc1.bias": torch.zeros(64)},
        "fewer": {name: tensor for name, tensor in state.items() if name != "biogpt.layers.1.fc1.bias"},
        "head": state | {"output_projection.weight": embedding + 1},
        "class": state | {"score.weight": torch.zeros(2, 32)},
    }
    for name, values in changed.items():
        save_file(values, tmp_path / f"{name}.safetensors")
    messages = {
        "absent": "no such file or folder",
        "empty": "has no weights",
        "noise.bin": "torch reads no weights from it",
        "noise.safetensors": "reads no weights from it",
        "three.pt": "holds no state dict",
        "objects.pt": "torch reads no weights from it",
        "other": r"another tokenizer than .*merges\.txt differs",
        "short.safetensors": f"has {len(embedding) - 1} rows, but the shards' vocabulary has {len(embedding)}",
        "wide.safetensors": r"layers\.1\.fc1\.bias is of shape \(65,\), this model's of \(64,\)",
        "more.safetensors": r"layers\.2\.fc1\.bias is not part of the model",
        "fewer.safetensors": r"layers\.1\.fc1\.bias is missing",
        "head.safetensors": "to which BioGPT's head is tied",
        "class.safetensors": r"score\.weight is not part of the model",
        **{key: f"config.json: {key} = {value}, this model's is {config[key]};" for key, value in UNSHAPED.items()},
    }
    for name, message in messages.items():
        with pytest.raises(UserError, match=message) as caught:
            load_weights(fresh(shards), tmp_path / name, tokenizer)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    run = tmp_path / "run"
    said = one_rank.run(refused_case, settings(shards, run, f"model.weights={tmp_path / 'wide.safetensors'}"))
    assert "is of shape (65,)" in said[0] and not run.exists()

"""Weights both ways, by transformers' own saving and loading, and out of fairseq's names."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BioGptForCausalLM

from model.decoder import Decoder
from model.hf import HEAD, from_hf, hf_config, to_hf, weights_from_hf
from tests.model.shapes import small_decoder, transformers_twin


def fairseq_names(twin: BioGptForCausalLM) -> dict[str, Tensor]:
    """The twin's state as fairseq's transformer_lm names it, its tied head and version among them."""
    names = {name: name.replace("biogpt.", "decoder.") for name in twin.state_dict()}
    names[HEAD] = "decoder.output_projection.weight"
    state = {names[name]: tensor for name, tensor in twin.state_dict().items()}
    return state | {"decoder.version": torch.tensor([3.0])}


def loaded(state: dict[str, Tensor]) -> Decoder:
    """A decoder with other weights, into which the state is loaded, strictly."""
    decoder = Decoder(small_decoder().config)
    decoder.load_state_dict(weights_from_hf(state))
    return decoder.eval()


def test_weights_come_in_from_every_form_they_are_published_in(tmp_path: Path) -> None:
    twin = transformers_twin(small_decoder())
    twin.save_pretrained(tmp_path)
    ids = torch.randint(4, 101, (2, 20))
    for state in (
        load_file(tmp_path / "model.safetensors"),
        twin.state_dict(),  # pytorch_model.bin: with the tied head
        twin.biogpt.state_dict(),  # a bare BioGptModel
        fairseq_names(twin),
    ):
        assert torch.allclose(loaded(state)(ids), twin(ids).logits, atol=1e-5, rtol=0)


def test_weights_go_out_to_a_folder_that_transformers_loads(tmp_path: Path) -> None:
    decoder = small_decoder().eval()
    transformers_twin(decoder).save_pretrained(tmp_path)
    ids = torch.randint(4, 101, (2, 20))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.config.boundaries == hf_config(decoder.config)["boundaries"] == "none"
    assert torch.allclose(decoder(ids), model.eval()(ids).logits, atol=1e-5, rtol=0)


def test_there_and_back_is_the_same_with_the_vocabulary_padded_by_zeros() -> None:
    decoder = small_decoder()
    out = to_hf(decoder.state_dict(), 101)
    assert out["biogpt.embed_tokens.weight"].shape == (101, 60)
    back = from_hf(out)
    assert back["embed_tokens.weight"].shape == (128, 60) and not back["embed_tokens.weight"][101:].any()
    again = to_hf(back, 101)
    assert out.keys() == again.keys() and all(torch.equal(tensor, again[name]) for name, tensor in out.items())


def test_names_are_transformers_own() -> None:
    decoder = small_decoder()
    assert set(to_hf(decoder.state_dict(), 101)) == set(transformers_twin(decoder).state_dict()) - {HEAD}


def test_missing_and_unknown_names_and_a_head_of_its_own_are_named() -> None:
    state = to_hf(small_decoder().state_dict(), 101)
    for missing in ("biogpt.layers.1.self_attn.v_proj.bias", "biogpt.embed_tokens.weight"):
        with pytest.raises(ValueError, match=f"{missing}: missing"):
            weights_from_hf({name: tensor for name, tensor in state.items() if name != missing})
    with pytest.raises(ValueError, match=r"gpt2\.wte: not a weight of BioGPT"):
        weights_from_hf(state | {"gpt2.wte": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"output_projection\.weight: is not biogpt\.embed_tokens\.weight"):
        weights_from_hf(state | {HEAD: torch.zeros(101, 60)})

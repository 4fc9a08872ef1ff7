"""Weights both ways, by transformers' own saving and loading."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BioGptForCausalLM

from model.hf import from_hf, to_hf
from tests.model.shapes import small_decoder, transformers_twin


def test_a_folder_saved_by_transformers_gives_our_weights_back(tmp_path: Path) -> None:
    decoder = small_decoder()
    transformers_twin(decoder).save_pretrained(tmp_path)
    back = from_hf(load_file(tmp_path / "model.safetensors"))
    assert back.keys() == decoder.state_dict().keys()
    assert all(torch.equal(tensor, back[name]) for name, tensor in decoder.state_dict().items())


def test_names_are_transformers_own() -> None:
    decoder = small_decoder()
    twin: BioGptForCausalLM = transformers_twin(decoder)
    assert set(to_hf(decoder.state_dict())) == set(twin.state_dict()) - {"output_projection.weight"}


def test_a_full_state_dict_with_the_tied_head_is_read() -> None:
    decoder = small_decoder()
    assert from_hf(transformers_twin(decoder).state_dict()).keys() == decoder.state_dict().keys()


def test_missing_and_unknown_names_are_named() -> None:
    state = to_hf(small_decoder().state_dict())
    missing = "biogpt.layers.1.self_attn.v_proj.bias"
    with pytest.raises(ValueError, match=missing):
        from_hf({name: tensor for name, tensor in state.items() if name != missing})
    with pytest.raises(ValueError, match=r"gpt2\.wte"):
        from_hf(state | {"gpt2.wte": torch.zeros(1)})

"""Markers that users add to the fast tokenizer as docs/tokenizer-and-shards.md says: its own lines are run here."""

import gzip
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, BioGptConfig, BioGptForCausalLM, BioGptTokenizer

from data.text.train import tokenizer_from_biogpt
from tests.shared import ROOT, SHARED, needs_shared

pytestmark = needs_shared
FORMS = ["{}", "({})", "[{}]", '"{}"', "{},", "{}:", "{}'s", "{}/{}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hf/: BioGPT's published tokenizer and a very small model of its vocabulary."""
    folder = tmp_path_factory.mktemp("markers")
    tokenizer_from_biogpt(SHARED / "tokenizers" / "biogpt", folder / "hf")
    config = BioGptConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    BioGptForCausalLM(config).save_pretrained(folder / "hf")
    return folder


@pytest.fixture(scope="module")
def documented(folder: Path) -> dict[str, Any]:
    """The names that the documented lines leave behind; they save into marked/."""
    page = (ROOT / "docs" / "tokenizer-and-shards.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(block, names)
    return names


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """2,100 raw titles and abstracts."""
    found = []
    for file in sorted((SHARED / "data" / "abstracts").glob("*.jsonl.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            entries = [json.loads(next(stream)) for _ in range(300)]
        found += [f"{entry.get('title') or ''} {entry.get('abstract') or entry.get('text') or ''}" for entry in entries]
    return found


def with_names(text: str, names: list[str], rng: random.Random) -> str:
    """The text with a name after every ninth word, in one of FORMS, but not beside an apostrophe."""
    words = text.split()
    for index in range(rng.randrange(5), len(words) - 1, 9):
        form, name = rng.choice(FORMS), rng.choice(names)
        if not words[index].endswith("'") and not words[index + 1].startswith("'"):
            words[index] += " " + form.replace("{}", name)
    return " ".join(words)


def test_other_words_keep_their_ids_and_markers_come_back(
    documented: dict[str, Any], folder: Path, texts: list[str]
) -> None:
    """As a capitalised word of the vocabulary in the same places, which no text has."""
    marked, markers = documented["tokenizer"], documented["markers"]
    plain: Any = AutoTokenizer.from_pretrained(folder / "hf")
    everything, vocabulary = " ".join(texts), plain.get_vocab()
    names = [token[:-4] for token in vocabulary if re.fullmatch("[A-Z][a-z]{5,}</w>", token)]
    names = [name for name in names if name not in everything][: len(markers)]
    new_id = {vocabulary[f"{name}</w>"]: len(plain) + number for number, name in enumerate(names)}
    with_markers = [with_names(text, markers, random.Random(number)) for number, text in enumerate(texts)]
    with_words = [with_names(text, names, random.Random(number)) for number, text in enumerate(texts)]
    found, expected = marked(with_markers)["input_ids"], plain(with_words)["input_ids"]
    assert found == [[new_id.get(index, index) for index in ids] for ids in expected]
    assert sum(index >= len(plain) for ids in found for index in ids) > 50_000
    decoded = plain.batch_decode(expected)
    for name, marker in zip(names, markers, strict=True):
        decoded = [text.replace(name, marker) for text in decoded]
    assert marked.batch_decode(found) == decoded
    text = 'We saw "@GENE$" (or < CHEM >), [@GENE$]; < CHEM >: @GENE$ and @GENE$.'
    assert marked.decode(marked(text)["input_ids"], skip_special_tokens=True) == text


def test_markers_are_saved_and_leave_the_model_as_it_was(
    documented: dict[str, Any], folder: Path, texts: list[str]
) -> None:
    again: Any = AutoTokenizer.from_pretrained(folder / "marked")
    some = [with_names(text, documented["markers"], random.Random(1)) for text in texts[:50]]
    ids = documented["tokenizer"](some)["input_ids"]
    assert again(some)["input_ids"] == ids and again.batch_decode(ids) == documented["tokenizer"].batch_decode(ids)
    before = AutoModelForCausalLM.from_pretrained(folder / "hf")
    after = AutoModelForCausalLM.from_pretrained(folder / "marked")
    inputs = torch.tensor([again(texts[0])["input_ids"]])
    assert torch.equal(before(inputs).logits, after(inputs).logits[..., : before.config.vocab_size])
    assert after(torch.tensor(ids[:1])).logits.shape[-1] == len(again)


def test_the_slow_tokenizer_gives_the_same_ids(documented: dict[str, Any], folder: Path, texts: list[str]) -> None:
    """But for the markers' own, which follow its shorter vocabulary."""
    fast, markers = documented["tokenizer"], documented["markers"]
    slow: Any = BioGptTokenizer.from_pretrained(folder / "hf")
    moved = len(fast) - len(slow) - len(markers)
    slow.add_tokens([AddedToken(marker, normalized=False) for marker in markers])
    some = [with_names(text, markers, random.Random(2)) for text in texts[::20]]
    expected = [[index + moved * (index >= len(slow) - len(markers)) for index in ids] for ids in slow(some).input_ids]
    assert fast(some)["input_ids"] == expected

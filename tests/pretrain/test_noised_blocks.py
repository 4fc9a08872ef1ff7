"""Denoising and fill in the middle on shards: batches, held-out losses, whole runs, the page's own code, mistakes."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from data.common.files import UserError
from data.text.ids import reserved_ids
from model.decoder import document_offsets
from model.loss import IGNORE_INDEX
from pretrain.export.folder import export, write_hf_files
from pretrain.objectives.kinds import make_objective
from pretrain.recipe import load_recipe
from tests.markdown import python_blocks
from tests.paths import ROOT
from tests.pretrain.runs import metrics, run_case, settings
from tests.ranks import Ranks

KINDS = ["fill_in_the_middle", "denoising"]
Make = Callable[..., Any]


@pytest.fixture
def make(reserved_shards: Path, tmp_path: Path) -> Make:
    """An objective on the sample, by its kind and more settings."""

    def make(kind: str, *more: str) -> Any:
        chosen = settings(reserved_shards, tmp_path / "run", f"objective.kind={kind}", *more)
        return make_objective(load_recipe("tiny", chosen))

    return make


def documents(ids: list[int]) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for each in ids:
        found[-1].append(each)
        if each == 2:
            found.append([])
    return found


def restored(document: list[int], before: int, after: int, middle: int) -> list[int]:
    """A document as it was before its middle was moved behind its suffix."""
    if before not in document:
        return document
    assert document[0] == before and document[-1] == 2
    second, third = document.index(after), document.index(middle)
    return [*document[1:second], *document[third + 1 : -1], *document[second + 1 : third], 2]


def test_a_block_to_fill_in_is_the_same_text_in_another_order(make: Make, reserved_shards: Path) -> None:
    """But for what is cut at its end. Half of the documents are rearranged."""
    inputs, targets = make("fill_in_the_middle").batch(range(600))
    plain_inputs, plain_targets = make("next_token").batch(range(600))
    sentinels = list(reserved_ids(reserved_shards / "tokenizer"))[1:4]
    assert inputs[:, 1:].equal(targets[:, :-1]) and inputs[:, 0].equal(plain_inputs[:, 0])
    whole, moved = 0, 0
    for ids, plain in zip(targets.tolist(), plain_targets.tolist(), strict=True):
        *ended, _ = documents(ids)
        for document, expected in zip(ended, documents(plain), strict=False):
            assert restored(document, *sentinels) == expected
            whole, moved = whole + (len(document) > 1), moved + (sentinels[0] in document)
        assert len(ids) == len(plain) == 64
    assert whole > 60 and 0.3 < moved / whole < 0.7


def test_a_source_is_the_block_with_spans_of_words_masked(make: Make, reserved_shards: Path) -> None:
    """The labels are the block, whose last token gives way to `</s>`; both as those of a record."""
    sources, labels = make("denoising").batch(range(200))
    _, plain = make("next_token").batch(range(200))
    assert labels[:, :-1].equal(plain[:, :-1]) and (labels[:, -1] == 2).all() and (sources[:, 0] == 2).all()
    mask, masked = reserved_ids(reserved_shards / "tokenizer")[0], 0
    for source, text in zip(sources.tolist(), labels[:, :-1].tolist(), strict=True):
        length = 64 - source.count(1)
        assert 1 not in source[:length] and mask in source  # padding on the right
        # As characters: a mask is any tokens of one document.
        pattern = "".join("[^\x02]*" if each == mask else re.escape(chr(each)) for each in source[1:length])
        assert re.fullmatch(pattern, "".join(map(chr, text)))
        masked += len(text) - (length - 1 - source.count(mask))
    assert masked / plain[:, :-1].numel() == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_functions_of_seed_and_number(kind: str, make: Make) -> None:
    """However ranks and micro-batches divide them; a block that comes back in a later epoch has other noise."""
    whole = make(kind).batch(range(16))
    for parts in (1, 2, 4, 16):
        objective = make(kind)
        size = 16 // parts
        split = [objective.batch(range(first, first + size)) for first in range(0, 16, size)]
        assert all(torch.cat([each[place] for each in split]).equal(whole[place]) for place in (0, 1))
    other = make(kind, "train.seed=2").batch(range(16))
    assert not other[1].equal(whole[1])
    inputs, targets = make("next_token").batch(range(1))
    objective = make(kind)
    again = [objective.with_noise((inputs, targets), range(number, number + 1), 1, False) for number in range(20)]
    assert len({str([tensor.tolist() for tensor in pair]) for pair in again}) > 5


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_noise_is_the_same_for_every_run(kind: str, make: Make) -> None:
    one, other = make(kind), make(kind, "train.seed=2")
    for name, held_out in one.held_out().items():
        assert held_out.examples == make("next_token").held_out()["train"].examples
        last = range(held_out.examples - 3, held_out.examples)  # the last block is shorter
        for numbers in (range(4), last):
            found = held_out.batch(numbers, 5)
            assert all(a.equal(b) for a, b in zip(found, other.held_out()[name].batch(numbers, 5), strict=True))
            assert held_out.counted_targets(numbers) == (found[1] != IGNORE_INDEX).sum()
            assert (found[0][len(numbers) :] == 1).all() and (found[1][len(numbers) :] == IGNORE_INDEX).all()
            assert ((found[0] == 1).sum() > 0) and found[0].shape == found[1].shape == (5, 64)


def test_fill_in_the_middle_is_evaluated_in_both_orders(make: Make, reserved_shards: Path) -> None:
    sources = make("fill_in_the_middle", "objective.fim_rate=0.25").held_out()
    assert {name: source.weight for name, source in sources.items()} == {"left_to_right": 0.75, "infilling": 0.25}
    plain = make("next_token").held_out()["train"].batch(range(3), 4)
    assert all(a.equal(b) for a, b in zip(sources["left_to_right"].batch(range(3), 4), plain, strict=True))
    rearranged = sources["infilling"].batch(range(30), 30)[1]
    first = reserved_ids(reserved_shards / "tokenizer")[1]
    texts = [document for ids in rearranged.tolist() for document in documents(ids)[:-1] if len(document) > 1]
    assert len(texts) > 5 and all(document[0] == first for document in texts)


def test_sources_of_several_folders_have_their_names(make: Make, reserved_shards: Path) -> None:
    more = [f"data.shards.{name}={reserved_shards}" for name in "ab"] + ["data.weights.a=3", "data.weights.b=1"]
    chosen = [each for each in settings(reserved_shards, reserved_shards) if not each.startswith("data.shards")]
    objective = make_objective(load_recipe("tiny", [*chosen, *more, "objective.kind=fill_in_the_middle"]))
    weights = {name: source.weight for name, source in objective.held_out().items()}
    assert weights == {"a-left_to_right": 0.375, "a-infilling": 0.375, "b-left_to_right": 0.125, "b-infilling": 0.125}


def test_documents_of_a_rearranged_block_are_found(make: Make) -> None:
    inputs, _, offsets = make("fill_in_the_middle", "model.boundaries=document").batch(range(8))
    assert offsets.equal(document_offsets(inputs, 2))


# Whole runs


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_its_export_agrees(kind: str, one_rank: Ranks, reserved_shards: Path, tmp_path: Path) -> None:
    more = [f"objective.kind={kind}", "train.steps=8", "checkpoint.every_steps=4", "evaluate.max_blocks=8"]
    run = tmp_path / "run"
    one_rank.run(run_case, settings(reserved_shards, run, *more))
    losses = metrics(run, "validation/loss")
    assert losses[8] < losses[0] - 0.1
    if kind == "fill_in_the_middle":
        for name in ("left_to_right", "infilling"):
            found = metrics(run, f"validation/{name}/loss")
            assert found[8] < found[0] - 0.1
        assert metrics(run, "validation/left_to_right/bits_per_byte")[8] > 0
    counts = export(run, tmp_path / "hf")["counts"]
    assert counts["held_out"]["loss"] == pytest.approx(losses[8], abs=1e-5)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "`<reserved_0>`" in card if kind == "denoising" else "`<reserved_3>` middle" in card


def test_every_block_of_the_page_runs(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On models that have learned nothing. What they read is what they read in training."""
    for kind, name in zip(KINDS, ("hf", "hf-denoising"), strict=True):
        (tmp_path / name).mkdir()
        objective = make(kind)
        write_hf_files(tmp_path / name, objective.build_model(), objective.tokenizer)
    monkeypatch.chdir(tmp_path)
    first = reserved_ids(tmp_path / "hf")[0]
    seen: list[list[int]] = []
    for block in python_blocks((ROOT / "docs" / "denoising.md").read_text()):
        names: dict[str, Any] = {}
        exec(block, names)
        given: Tensor = names["prompt"]
        seen.append(given[0].tolist())
        assert names["output"].shape[1] > 1
    causal, source = seen
    tokenizer: Any = AutoTokenizer.from_pretrained("hf")
    prefix, suffix = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Aspirin inhibits", "of platelets.")
    )
    assert causal == [2, first + 1, *prefix, first + 2, *suffix, first + 3]
    assert source == [2, *prefix, first, *suffix]


# Mistakes


@pytest.mark.parametrize(("kind", "needed"), [("fill_in_the_middle", 4), ("denoising", 1)])
def test_a_tokenizer_without_reserved_ids_is_refused(
    kind: str, needed: int, sample_folder: Path, tmp_path: Path
) -> None:
    chosen = settings(sample_folder / "shards", tmp_path / "run", f"objective.kind={kind}")
    with pytest.raises(UserError) as caught:
        make_objective(load_recipe("tiny", chosen))
    said = str(caught.value)
    assert said.startswith(f'objective.kind = "{kind}": needs {needed} reserved ids, but ') and "\n" not in said
    assert "has 0; make a tokenizer with `biogpt tokenizer --reserve 8`" in said


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("next_token", "objective.fim_rate=0.3", 'next_token" does not use it; remove it, or use fill_in_the_middle'),
        ("fill_in_the_middle", "objective.mask_share=0.2", "does not use it; remove it, or use denoising"),
        ("fill_in_the_middle", "objective.span_length=1", "objective.span_length: objective.kind = "),
        ("denoising", "objective.fim_rate=0.3", "remove it, or use fill_in_the_middle"),
        ("denoising", "model.boundaries=document", 'model.boundaries: objective.kind = "denoising" does not use it'),
        ("denoising", "objective.mask_share=1", "objective.mask_share = 1"),
        ("fill_in_the_middle", "objective.fim_rate=0", "objective.fim_rate = 0"),
        ("fill_in_the_middle", "model.share_layers=true", "has no encoder; remove it"),
        ("denoising", "data.records=there", "data.records: objective.kind"),
    ],
)
def test_keys_that_do_nothing_are_refused(kind: str, given: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("tiny", [f"objective.kind={kind}", given])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_other_noise_is_other_data(make: Make) -> None:
    """A run is not resumed with it; `check_state` compares the identities. Next-token prediction has no such keys."""
    assert make("fill_in_the_middle").identity() != make("fill_in_the_middle", "objective.fim_rate=0.25").identity()
    for more in ("objective.mask_share=0.2", "objective.span_length=2"):
        assert make("denoising").identity() != make("denoising", more).identity()
    assert set(make("next_token").identity()) == {"shards", "context_length", "global_batch_tokens", "seed"}

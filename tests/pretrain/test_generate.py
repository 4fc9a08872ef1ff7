"""Generation with a run or an exported folder, against transformers' own calls."""

import io
import json
import random
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BioGptConfig, BioGptForCausalLM, BioGptTokenizer

from data.common.files import UserError
from launch.cli import main
from pretrain.generate import Decoding, Prompt, Words, generate

WORDS = ["'", '"', "'s", "Jones'", ".", "...", ",", "(", ")", "[", "]", "%", "$", "?", "-", "<", "&", "cells", "IL-6"]
PROMPTS = ["The role of", "COVID-19 (a disease) is", "Patients", "METHODS: We measured IL-6, TNF and others in 20"]


def continued(folder: Path, *texts: str, batch_size: int = 8, step: str = "", **settings: Any) -> list[str]:
    prompts = [Prompt(text, "the prompt") for text in texts]
    return generate(folder, prompts, Decoding(**settings), batch_size, step)


@cache
def loaded(hf: Path) -> tuple[Any, Any]:
    return BioGptForCausalLM.from_pretrained(hf), BioGptTokenizer.from_pretrained(hf)


def by_transformers(hf: Path, prompt: str, **options: Any) -> str:
    """One call of `generate` for one prompt, with the slow tokenizer."""
    model, tokenizer = loaded(hf)
    output = model.generate(**tokenizer(prompt, return_tensors="pt"), **options)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of `biogpt generate`."""
    monkeypatch.setattr(sys, "argv", ["biogpt", "generate", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_greedy_generation_is_transformers_own(hf: Path) -> None:
    for prompt in PROMPTS:
        assert continued(hf, prompt, max_new_tokens=12) == [
            by_transformers(hf, prompt, max_new_tokens=12, do_sample=False)
        ]


def test_a_run_continues_a_prompt_as_its_export_does(run: Path, hf: Path) -> None:
    for beams in (1, 3):
        texts = continued(run, *PROMPTS, beams=beams, max_new_tokens=9)
        assert texts == continued(hf, *PROMPTS, beams=beams, max_new_tokens=9)
    with pytest.raises(UserError, match="step 77"):
        continued(run, "The", step="77")
    with pytest.raises(UserError, match="is not a run"):
        continued(hf, "The", step="77")


def test_each_text_of_a_batch_is_that_of_its_prompt_alone(hf: Path) -> None:
    """Of different lengths, so that the shorter ones are padded. Two leave no room for 30 tokens in a context of 64."""
    long = ["word " * 13, "word " * 19]
    assert [len(loaded(hf)[1](text)["input_ids"]) for text in long] == [40, 58]
    prompts = [*PROMPTS, *long, *PROMPTS]
    alone = [continued(hf, prompt, max_new_tokens=30)[0] for prompt in prompts]
    assert len(set(alone)) == len({*prompts})
    for batch_size in (1, 3, 8):
        assert continued(hf, *prompts, batch_size=batch_size, max_new_tokens=30) == alone


def test_beam_search_is_that_of_biogpts_example(hf: Path, tmp_path: Path) -> None:
    """`num_beams=5, early_stopping=True, min_length, max_length`: lengths that count the prompt.

    The model is drawn at random, and 120 of its tokens end a text, so that each of these settings changes the result.
    """
    config = BioGptConfig.from_pretrained(hf, initializer_range=0.2)
    torch.manual_seed(0)
    model = BioGptForCausalLM(config)
    model.generation_config.eos_token_id = list(range(4, 124))
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(hf).save_pretrained(tmp_path)
    shutil.copyfile(hf / "vocab.json", tmp_path / "vocab.json")
    shutil.copyfile(hf / "merges.txt", tmp_path / "merges.txt")
    prompt, length = "The role of", len(loaded(hf)[1]("The role of")["input_ids"])
    example: dict[str, Any] = {"num_beams": 5, "early_stopping": True, "min_length": 20, "max_length": 50}
    expected = by_transformers(tmp_path, prompt, **example)
    for name in ("num_beams", "early_stopping", "min_length"):
        others = {key: value for key, value in example.items() if key != name}
        assert by_transformers(tmp_path, prompt, **others) != expected, name
    settings: dict[str, Any] = {"beams": 5, "min_new_tokens": 20 - length, "max_new_tokens": 50 - length}
    assert continued(tmp_path, prompt, **settings) == [expected]


def test_sampling_is_transformers_own_and_follows_the_seed(hf: Path) -> None:
    settings: dict[str, Any] = {"sample": True, "temperature": 0.9, "top_k": 20, "top_p": 0.8, "max_new_tokens": 20}
    texts = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        options = {"do_sample" if name == "sample" else name: value for name, value in settings.items()}
        expected = by_transformers(hf, "The role of", **options)
        assert continued(hf, "The role of", seed=seed, **settings) == [expected]
        texts.append(expected)
    assert texts[0] == texts[2] != texts[1]
    greedy = continued(hf, *PROMPTS, max_new_tokens=9)
    settings = {"sample": True, "max_new_tokens": 9, "seed": 1}
    assert continued(hf, *PROMPTS, top_k=1, **settings) == greedy != continued(hf, *PROMPTS, top_k=0, **settings)


@pytest.mark.parametrize("kind", [AutoTokenizer, BioGptTokenizer])
def test_a_text_grows_by_whole_words_and_is_at_last_the_decoded_one(hf: Path, kind: Any) -> None:
    """Ids drawn at random, most of them of signs that Moses joins with a neighbour."""
    tokenizer, rng = kind.from_pretrained(hf), random.Random(1)
    vocabulary = tokenizer.get_vocab()
    ends = {index for token, index in vocabulary.items() if token.endswith("</w>")}
    pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in WORDS] + 3 * [[vocabulary["@-@</w>"]]]
    shown_early = 0
    for _ in range(250):
        drawn = [rng.choice(pieces) if rng.random() < 0.9 else [rng.randrange(4, len(tokenizer))] for _ in range(15)]
        ids = [index for piece in drawn for index in piece]
        whole = {tokenizer.decode(ids[:count]) for count, index in enumerate(ids, start=1) if index in ends}
        shown: list[str] = []
        streamer = Words(tokenizer, shown.append)
        streamer.put(torch.tensor([[2, *ids[:2]]]))
        for index in ids[2:]:
            streamer.put(torch.tensor([index]))
            assert not shown or "".join(shown) in whole
        shown_early += len(shown)
        streamer.end()
        assert "".join(shown) == tokenizer.decode(ids)
    assert shown_early > 2_000


def test_a_single_text_is_shown_as_it_grows(hf: Path) -> None:
    for prompts, beams, streamed in ((PROMPTS[:1], 1, True), (PROMPTS[:1], 2, False), (PROMPTS, 1, False)):
        decoding, pieces = Decoding(beams=beams, max_new_tokens=12), []
        texts = generate(hf, [Prompt(text, "it") for text in prompts], decoding, show=pieces.append)
        assert "".join(pieces) == "".join(f"{text}\n" for text in texts)
        assert (len(pieces) > 3) == streamed


def test_the_command_reads_prompts_from_a_file_and_from_standard_input(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = continued(hf, *PROMPTS, max_new_tokens=9)
    path, out = tmp_path / "prompts.txt", tmp_path / "new" / "texts.jsonl"
    for end in ("\n", "\r\n"):
        path.write_bytes("".join(f"{prompt}{end}" for prompt in PROMPTS).encode())
        assert command([str(hf), "--prompts", str(path), "--max-new-tokens", "9"], monkeypatch) == 0
        assert capsys.readouterr().out.splitlines() == texts
    for arguments in (["--prompts", str(path)], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
        assert command([str(hf), *arguments, "--out", str(out), "--max-new-tokens", "9"], monkeypatch) == 0
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert lines == [{"prompt": prompt, "text": text} for prompt, text in zip(PROMPTS, texts, strict=True)]
        assert list(out.parent.iterdir()) == [out]
        out.unlink()
    assert command([str(hf), PROMPTS[0], "--max-new-tokens", "9"], monkeypatch) == 0
    assert capsys.readouterr().out.splitlines()[-1] == texts[0]


def test_a_mistake_is_one_line_before_the_model_is_loaded(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pretrain.generate.read_hf", lambda *_: 1 / 0)
    shutil.copytree(hf, tmp_path / "bare")
    for name in ("manifest.json", "tokenizer.json", "vocab.json"):
        (tmp_path / "bare" / name).unlink()
    files = {"gap": b"One\n\nTwo\n", "long": b"One\n" + b"word " * 80 + b"\n", "latin": b"\xff\n", "none": b""}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    model = str(hf)
    for arguments, reason in (
        ([model], "name either a prompt or --prompts FILE"),
        ([model, "The", "--prompts", "gap"], "name either a prompt or --prompts FILE"),
        ([model, " "], "the prompt is empty"),
        ([model, "word " * 80], "the prompt has"),
        ([model, "--prompts", "gap"], "gap: line 2 is empty"),
        ([model, "--prompts", "long"], "long: line 2 has"),
        ([model, "--prompts", "latin"], "latin: not UTF-8"),
        ([model, "--prompts", "none"], "none: holds no prompt"),
        ([model, "--prompts", "absent"], "absent: cannot be read (No such file or directory)"),
        ([model, "--prompts", "bare"], "bare: cannot be read (Is a directory)"),
        (["absent", "The"], "absent: neither a run"),
        (["bare", "The"], "bare: AutoTokenizer finds no tokenizer.json or vocab.json"),
        ([model, "The", "--out", "bare"], "--out bare: is a folder"),
        ([model, "The", "--out", f"{model}/texts.jsonl"], "lies inside the input"),
        ([model, "--prompts", "gap", "--out", "gap"], "is the input"),
        ([model, "The", "--sample", "--beams", "2"], "choose one of --sample and --beams"),
        ([model, "The", "--top-p", "0.5"], "--temperature, --top-k and --top-p need --sample"),
        ([model, "The", "--min-new-tokens", "61"], "--min-new-tokens 61: is more than --max-new-tokens 60"),
    ):
        monkeypatch.chdir(tmp_path)
        assert command(arguments, monkeypatch) == 2, arguments
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("biogpt: error: ") and reason in lines[0], lines
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["bare", *files])
    assert (tmp_path / "gap").read_bytes() == files["gap"]


def test_a_damaged_or_incomplete_folder_is_named(hf: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "vocab.json", "config.json"):
        copy = tmp_path / name
        shutil.copytree(hf, copy)
        content = bytearray((copy / name).read_bytes())
        content[len(content) // 2] ^= 1
        (copy / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: changed since it was written"):
            continued(copy, "The")
        (copy / "manifest.json").unlink()
        (copy / name).unlink()
        if name == "vocab.json":  # the slow tokenizer's; the fast one needs it not
            (copy / "tokenizer.json").unlink()
        with pytest.raises(UserError, match=name):
            continued(copy, "The")


def test_a_folder_that_transformers_saved_continues_a_prompt(hf: Path, tmp_path: Path) -> None:
    """`save_pretrained` leaves a tokenizer.json and no vocab.json."""
    saved = tmp_path / "saved"
    BioGptForCausalLM.from_pretrained(hf).save_pretrained(saved)
    AutoTokenizer.from_pretrained(hf).save_pretrained(saved)
    assert not (saved / "vocab.json").exists()
    assert continued(saved, *PROMPTS, max_new_tokens=5) == continued(hf, *PROMPTS, max_new_tokens=5)

"""`biogpt images`: records, quantiser and manifest of a small folder, and whether codes answer the questions."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from data.common.files import UserError, read_manifest, sha256
from data.images.draw import COLOURS, SHAPES, SPLITS, make_scene
from data.images.instructions import CHOICES
from data.text.reserved import IMAGE_CODES
from launch.cli import app
from pretrain.images import draw_pictures, load_quantizer, make_images

COUNT, SEED, STEPS = 512, 5, 400


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "images"
    make_images(folder, COUNT, SEED, STEPS)
    return folder


def read(images: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (images / f"{split}.jsonl").read_text().splitlines()]


def test_the_folder_is_a_folder_of_records(images: Path) -> None:
    manifest = read_manifest(images, "records")
    files = {f"{split}.jsonl" for split in SPLITS} | {"quantizer/config.json", "quantizer/model.safetensors"}
    assert set(manifest["files"]) == files
    assert manifest["counts"]["pictures"] == {"train": COUNT, "validation": 512, "test": 512}
    tasks = Counter(record["task"] for record in read(images, "train"))
    assert tasks == dict.fromkeys(("colour", "shape", "region", "caption", "infilling"), COUNT)


def test_drawn_pictures_are_nearer_than_the_mean_picture(images: Path) -> None:
    counts = read_manifest(images, "records")["counts"]
    assert counts["squared_error"] < counts["squared_error_of_mean_picture"] / 2
    quantizer = load_quantizer(images)
    pictures = draw_pictures("validation", range(512), SEED).float()
    error = float(((quantizer.decode(quantizer.encode(pictures)) - pictures) ** 2).mean())
    assert error == pytest.approx(counts["squared_error"], abs=0.01)


def test_records_hold_the_codes_of_their_pictures(images: Path) -> None:
    codes = load_quantizer(images).encode(draw_pictures("test", range(8), SEED)).tolist()
    for number, record in enumerate(read(images, "test")[: 8 * 5 : 5]):
        assert record["id"] == f"test-{number}-colour"
        assert record["source"][1:] == [IMAGE_CODES.start + code for code in codes[number]]


@pytest.mark.parametrize("split", SPLITS)
def test_answers_are_balanced_within_each_form_of_question_and_each_question(images: Path, split: str) -> None:
    for form, choices in CHOICES.items():
        asked = Counter((r["source"][0], r["target"]) for r in read(images, split) if r["task"] == form)
        assert Counter(asked.values()) == {8: 64}  # each of 8 questions has each of 8 answers 8 times
        assert {target for _, target in asked} == set(choices) and len(choices) == 8


def test_codes_tell_shape_and_colour(images: Path) -> None:
    """A count of which codes go with which answer, over pictures of one thing, reads held-out combinations."""
    quantizer = load_quantizer(images)

    def alone(split: Any, numbers: range) -> tuple[torch.Tensor, list[Any]]:
        chosen = [number for number in numbers if len(make_scene(split, number, SEED)) == 1]
        pictures = torch.cat([draw_pictures(split, range(number, number + 1), SEED) for number in chosen])
        return quantizer.encode(pictures), [make_scene(split, number, SEED)[0] for number in chosen]

    (seen, things), (new, others) = alone("train", range(2000)), alone("validation", range(512))
    for names, kind in ((list(SHAPES), "shape"), (list(COLOURS), "colour")):
        of_things, of_others = (
            torch.tensor([names.index(getattr(thing, kind)) for thing in each]) for each in (things, others)
        )
        counts = torch.full((len(IMAGE_CODES), 8), 0.1)
        counts.index_put_((seen.flatten(), of_things.repeat_interleave(16)), torch.tensor(1.0), accumulate=True)
        votes = (counts / counts.sum(1, keepdim=True)).log()[new].sum(1)
        assert (votes.argmax(1) == of_others).float().mean() > 0.8


def test_the_same_command_does_nothing_and_another_is_refused(images: Path, tmp_path: Path) -> None:
    before = sha256(images / "manifest.json")
    make_images(images, COUNT, SEED, STEPS)
    assert sha256(images / "manifest.json") == before
    with pytest.raises(UserError, match="made from other inputs or settings"):
        make_images(images, COUNT, SEED + 1, STEPS)
    with pytest.raises(UserError, match="no such folder; expected a records folder"):
        load_quantizer(tmp_path / "absent")
    result = CliRunner().invoke(app, ["images", "--out", str(images), "--count", "0"])
    assert result.exit_code == 2 and "--count" in result.output

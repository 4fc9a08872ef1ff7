"""`biogpt images`: draw pictures, train the quantiser that turns them into codes, and write instruction records."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from data.common.files import make_folder, read_json, read_manifest, verify_files, write_json, write_json_lines
from data.images.draw import SIDE, SPLITS, Split, draw, draws_of, make_scene
from data.images.instructions import CHOICES, records_of
from data.shards.records import PIECES, Record, encode_pieces, encode_texts, read_records
from data.text.ids import EOS_ID
from data.text.reserved import IMAGE_CODES
from model.quantizer import Quantizer, QuantizerConfig, fit

HELD_OUT = 512  # pictures of validation and of test: each pair of a shape and a colour is asked for 8 times
STEPS = 800
CONFIG = QuantizerConfig(side=SIDE, codes=len(IMAGE_CODES))


def make_images(out: Path, count: int, seed: int, steps: int = STEPS) -> dict[str, Any]:
    """Make the folder `out`: records of `count` training pictures and of held-out ones, and `quantizer/`.

    Returns its manifest, whose counts have the mean squared error of the quantiser's pictures and that of the mean
    picture, on validation pictures of values from 0 to 255. Raises UserError if `out` holds anything else.
    """

    def fill(folder: Path) -> dict[str, Any]:
        numbers = {split: range(count if split == "train" else HELD_OUT) for split in SPLITS}
        pictures = {split: draw_pictures(split, numbers[split], seed) for split in SPLITS}
        with _one_thread():
            quantizer = fit(CONFIG, pictures["train"], steps, seed)
            codes = {split: quantizer.encode(pictures[split]) for split in SPLITS}
            drawn, mean = quantizer.decode(codes["validation"]), pictures["train"].float().mean(0)
        write_quantizer(folder / "quantizer", quantizer)
        for split in SPLITS:
            write_json_lines(folder / f"{split}.jsonl", _records(split, numbers[split], codes[split], seed))
        return {
            "pictures": {split: len(each) for split, each in numbers.items()},
            "squared_error": _squared_error(drawn, pictures["validation"]),
            "squared_error_of_mean_picture": _squared_error(mean, pictures["validation"]),
        }

    return make_folder(out, "records", {"images": {"count": count, "seed": seed, "steps": steps}}, fill)


def draw_pictures(split: Split, numbers: range, seed: int) -> Tensor:
    """The pictures of a split with these numbers, (N, 3, SIDE, SIDE) uint8."""
    drawn = [draw(make_scene(split, number, seed), draws_of("noise", split, number, seed)) for number in numbers]
    return torch.from_numpy(np.stack(drawn))


def write_quantizer(folder: Path, quantizer: Quantizer) -> None:
    """Write the weights and the shape of a quantiser into a new folder."""
    folder.mkdir()
    save_file(quantizer.state_dict(), folder / "model.safetensors")
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it readable for the owner only
    write_json(folder / "config.json", asdict(quantizer.config))


def load_quantizer(images: Path) -> Quantizer:
    """The quantiser of a folder that `make_images` made. Raises UserError if the folder is damaged or another one."""
    verify_files(images, read_manifest(images, "records"))
    quantizer = Quantizer(QuantizerConfig(**read_json(images / "quantizer" / "config.json")))
    quantizer.load_state_dict(load_file(images / "quantizer" / "model.safetensors"))
    return quantizer.eval()


def question_accuracy(hf: Path, tokenizer: Path, images: Path, blank: bool = False) -> dict[str, float]:
    """The share of right answers of an exported model to each form of question about the test pictures.

    All answers of a form are scored, and the likeliest is taken. images: a folder that `make_images` made; blank: put a
    picture without things in the place of all pictures.
    """
    from pretrain.answers import log_likelihoods, open_language_model

    model, found = open_language_model(hf), {}
    empty = load_quantizer(images).encode(torch.from_numpy(draw([], draws_of("noise", "test", 0, seed=1)))[None])[0]
    questions = read_records(images / "test.jsonl", {"task": str, "source": PIECES, "target": PIECES})
    for form, choices in CHOICES.items():
        asked = [record for record in questions if record.fields["task"] == form]
        if blank:
            asked = [_with_codes(record, empty.tolist()) for record in asked]
        sources = [[EOS_ID, *ids.tolist()] for ids in encode_pieces(tokenizer, asked, "source")]
        answers = [[*ids.tolist(), EOS_ID] for ids in encode_texts(tokenizer, choices)]
        scores = log_likelihoods(model, [(source, answer) for source in sources for answer in answers])
        best = torch.tensor(scores).view(len(sources), len(choices)).argmax(1).tolist()
        right = [choices.index(record.fields["target"]) for record in asked]
        found[form] = sum(a == b for a, b in zip(best, right, strict=True)) / len(right)
    return found


def _with_codes(record: Record, codes: list[int]) -> Record:
    """The record with another picture."""
    source = [record.fields["source"][0], *(IMAGE_CODES[code] for code in codes)]
    return Record(record.place, record.fields | {"source": source})


@contextmanager
def _one_thread() -> Iterator[None]:
    """With more, sums would be taken in another order, and the codes would depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _records(split: Split, numbers: range, codes_NP: Tensor, seed: int) -> Iterator[dict[str, Any]]:
    """The records of a split."""
    for number, codes in zip(numbers, codes_NP.tolist(), strict=True):
        things, mask = make_scene(split, number, seed), draws_of("mask", split, number, seed)
        yield from records_of(f"{split}-{number}", things, codes, mask)


def _squared_error(drawn: Tensor, pictures: Tensor) -> float:
    return round(float(((drawn - pictures.float()) ** 2).mean()), 2)

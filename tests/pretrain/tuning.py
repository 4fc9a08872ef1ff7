"""Folders of records and small runs on them, for the tests of fine-tuning."""

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pretrain.recipe import load_recipe
from pretrain.train import train

DRUGS, DISEASES = ("Kalitinib", "Dravonol", "Mesurafen"), ("dravonosis", "asthma", "fever", "type 2 diabetes")


def write_records(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """A file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def prompts_and_targets(seed: int, count: int) -> list[dict[str, str]]:
    """Invented prompts of very different lengths, and targets that follow from them."""
    draw = random.Random(seed)
    found = []
    for _ in range(count):
        drug, disease = draw.choice(DRUGS), draw.choice(DISEASES)
        text = " ".join(f"{draw.choice(DRUGS)} was studied." for _ in range(draw.randrange(4)))
        found.append({"prompt": f"{text} {drug} causes {disease}. Which?".strip(), "target": f"{drug} {disease}"})
    return found


def write_folder(folder: Path, train: int = 40, validation: int = 11) -> Path:
    """A folder of records with a prompt and a target."""
    folder.mkdir()
    for seed, (split, count) in enumerate({"train": train, "validation": validation}.items()):
        write_records(folder / f"{split}.jsonl", prompts_and_targets(seed, count))
    return folder


RECIPE = """
[model]
hidden_dropout_prob = 0.0
attention_probs_dropout_prob = 0.0

[train]
steps = 8
global_batch_examples = 8
micro_batch_size = 2
precision = "fp32"

[objective]
kind = "prompt_target"

[optimizer]
learning_rate = 3e-3
gradient_clipping = 1.0

[schedule]
warmup_steps = 5

[checkpoint]
every_steps = 4

[evaluate]
every_steps = 4

[log]
every_steps = 1
"""


def tuning(records: Path, weights: Path, run: Path, *more: str) -> tuple[str, list[str]]:
    """A very small run on records: its recipe, in a file beside the run, and its settings."""
    path = run.parent / "tuning.toml"
    path.write_text(RECIPE)
    return str(path), [f"data.records={records}", f"model.weights={weights}", f"train.run={run}", *more]


def tuning_case(recipe: str, chosen: list[str]) -> int:
    """Train the recipe with these settings; the step that the run ended at."""
    return train(load_recipe(recipe, chosen)).step

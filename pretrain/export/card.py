"""The model card: README.md of an exported folder."""

import json
from pathlib import Path
from typing import Any

from data.common.files import read_json
from pretrain.objectives.objective import Objective
from pretrain.recipe import Recipe
from pretrain.report import CURVES


def model_card(
    folder: Path, name: str, recipe: Recipe, objective: Objective, state: dict[str, Any], counts: dict[str, Any]
) -> str:
    """The card of the model `name` in a folder: data, recipe, losses, and the curves if the folder has their picture.

    counts: those of the folder's manifest.
    """
    held_out = counts["held_out"]
    no_paths = {"data": True, "train": {"run"}, "model": {"weights"}, "deepspeed": {"config"}}
    settings = json.dumps(recipe.model_dump(exclude=no_paths), indent=2)
    origin = "trained further from given weights" if recipe.model.weights else "pretrained from scratch"
    kind, figures = objective.describe()
    others = {name: value for name, value in held_out.items() if name not in ("loss", "tokens")}
    rows = figures | {
        "optimizer steps": f"{state['step']:,} of {recipe.global_batch()}",
        "held-out loss by transformers, nats a target": f"{held_out['loss']:.4f}",
        **{f"held-out {name.replace('_', ' ')}": f"{value:.5g}" for name, value in others.items()},
        "held-out targets": f"{held_out['tokens']:,}",
        "the same loss as the run recorded it": f"{counts['recorded_loss']:.4f}",
    }
    table = "\n".join(f"| {what} | {figure} |" for what, figure in rows.items())
    curves = f"![Losses, learning rate and throughput by step]({CURVES})\n\n" if (folder / CURVES).is_file() else ""
    unused = unused_ids(folder)
    longer = (
        f" `len(tokenizer)` is {unused} above the model's vocabulary; the tokenizer never produces those ids."
        if unused
        else ""
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
language: en
tags: [biogpt, biomedical, pretraining]
---
# {name}

A BioGPT-shaped {kind} of {counts["parameters"]:,} parameters, {origin} with
biogpt-pretrain on titles and abstracts in PubMed's format.

| | |
|---|---|
{table}

{curves}A text begins with `</s>`, which the tokenizer adds. In training, a literal `</s>`, `<pad>` or `<unk>` inside a
text was plain text; transformers' tokenizer reads it as the special token.{longer}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "hf"  # the folder of this card
tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
output = model.generate(**tokenizer("The role of", return_tensors="pt"), max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```

`pipeline("text-generation")` decodes the continuation alone, so it joins the first new word to the prompt.

```json
{settings}
```
"""


def unused_ids(folder: Path) -> int:
    """How many tokens `tokenizer.json` has beyond the vocabulary: its merges need them, but no text produces them."""
    if not (folder / "tokenizer.json").is_file():
        return 0
    return len(read_json(folder / "tokenizer.json")["model"]["vocab"]) - len(read_json(folder / "vocab.json"))

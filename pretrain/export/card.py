"""The model card: README.md of an exported folder, written from the manifests of the data and of the run.

Each section is a function. One that has nothing to say returns "".
"""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from data.archive.download import TERMS
from data.common.files import UserError, read_json, whole_file
from data.corpus.selection import funnel
from pretrain.recipe import PATHS, Recipe
from pretrain.record import markdown_table
from pretrain.report import CURVES

CONTINUES = """\
In the folder of this card, this continues a prompt and prints the loss of a text:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "."  # or the model's name on the Hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
prompt = tokenizer("The role of", return_tensors="pt")
output = model.generate(**prompt, max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))
text = tokenizer("Aspirin inhibits the aggregation of platelets.", return_tensors="pt")
print(model(**text, labels=text["input_ids"]).loss.item(), "nats a token")
```

`pipeline("text-generation")` decodes the continuation alone, so it joins the first new word to the prompt."""
CLASSIFIES = """\
In the folder of this card, this classifies {what}:

```python
from transformers import pipeline

classify = pipeline("{task}", ".")  # or the model's name on the Hub
print(classify("Aspirin inhibits the aggregation of platelets."))
```"""
WRITES = """\
In the folder of this card, this writes a target for a source, and prints the loss of a given one:

```python
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

name = "."  # or the model's name on the Hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSeq2SeqLM.from_pretrained(name)
source = tokenizer("Aspirin inhibits the aggregation of platelets.", return_tensors="pt")
output = model.generate(**source, max_new_tokens=20)
print(tokenizer.decode(output[0], skip_special_tokens=True))
labels = tokenizer("Aspirin", add_special_tokens=False, return_tensors="pt")["input_ids"]
labels = torch.cat([labels, torch.tensor([[tokenizer.eos_token_id]])], dim=1)
print(model(**source, labels=labels).loss.item(), "nats a token")
```

Pass `labels` alone: the model shifts them itself. With `decoder_input_ids` that equal the labels, it would see what it
is to predict."""
WRITES_WITH_BERT = """\
In the folder of this card, this writes a target for a source. The source has a tokenizer of its own, in the folder
`encoder`, and is read without special tokens:

```python
from transformers import AutoTokenizer, EncoderDecoderModel

name = "."  # or the model's name on the Hub
of_source = AutoTokenizer.from_pretrained(name, subfolder="encoder")
of_target = AutoTokenizer.from_pretrained(name)
model = EncoderDecoderModel.from_pretrained(name)
source = of_source("Aspirin inhibits the aggregation of platelets.", add_special_tokens=False, return_tensors="pt")
output = model.generate(source["input_ids"], attention_mask=source["attention_mask"], max_new_tokens=20)
print(of_target.decode(output[0], skip_special_tokens=True))
```

In training, pass `labels` alone: the model shifts them itself. With `decoder_input_ids` that equal the labels, it would
see what it is to predict."""
USES = {
    "BioGptForCausalLM": ("text-generation", CONTINUES),
    "BlenderbotForConditionalGeneration": ("text-generation", WRITES),
    "EncoderDecoderModel": ("text-generation", WRITES_WITH_BERT),
    "BioGptForTokenClassification": ("token-classification", CLASSIFIES.replace("{what}", "the tokens of a text")),
    "BioGptForSequenceClassification": ("text-classification", CLASSIFIES.replace("{what}", "a text")),
}
"""transformers' class of the model -> the Hub's name of its task, and how to use it."""
RIGHTS = {"PubMed's XML": TERMS, "other text": "Text from elsewhere than PubMed belongs to its authors."}
LIMITS = """\
## Intended use and limits

The model is meant for research on biomedical text: it can be fine-tuned, scored on benchmarks and studied.

- It is no source of medical advice. Its sentences sound right and may be false, and it names no sources.
- It has learned from titles and abstracts. Full articles, clinical notes and other languages are outside its data.
- It repeats the errors and biases of the literature, which include articles that were retracted later.
- It knows nothing that was published after its data, which may not be current.
- Nobody has tested it for use with patients, and no filter keeps it from harmful or private content."""
CITATION = """\
## Citation

The architecture, the tokenizer and the recipe that this model follows are BioGPT's:

```bibtex
@article{luo2022biogpt,
  title = {{BioGPT}: generative pre-trained transformer for biomedical text generation and mining},
  author = {Luo, Renqian and Sun, Liai and Xia, Yingce and Qin, Tao and Zhang, Sheng and Poon, Hoifung
            and Liu, Tie-Yan},
  journal = {Briefings in Bioinformatics},
  volume = {23},
  number = {6},
  pages = {bbac409},
  year = {2022},
  doi = {10.1093/bib/bbac409}
}
```

It was trained with biogpt-pretrain, which is free software under the licence Apache-2.0."""
UPLOAD = """\
## Upload

In this folder, one line uploads it to the Hub:

```bash
hf upload USER/NAME .
```"""


def model_card(
    folder: Path,
    recipe: Recipe,
    stages: list[dict[str, Any]],
    state: dict[str, Any],
    counts: dict[str, Any],
    license: str,
) -> str:
    """The card of the model in a folder. It names neither the folder nor any other of this machine.

    stages: what the model was trained on (`pretrain.training_data`), this run's last; state: of the checkpoint; counts:
    those of the folder's manifest; license: identifier of the Hub, "unknown" if none was chosen.
    """
    own = stages[-1]
    task, usage = USES[read_json(folder / "config.json")["architectures"][0]]
    sections = [
        f"# Biomedical {own['kind']} of {counts['parameters']:,} parameters",
        f"A BioGPT-shaped {own['kind']},\n{_origin(recipe)}.",
        usage.replace("{task}", task),
        _special_tokens(folder),
        f"## Figures\n\n{_figures(recipe, own['figures'], state, counts)}",
        f"![Losses, learning rate and throughput by step]({CURVES})" if (folder / CURVES).is_file() else "",
        _training_data(stages),
        benchmarks_section(stages),
        _recipe(recipe, own["corpora"]),
        LIMITS,
        CITATION,
        _licence(license),
        UPLOAD,
    ]
    return "\n\n".join([_front_matter(task, license), *filter(None, sections)]) + "\n"


def _origin(recipe: Recipe) -> str:
    if recipe.on_records():
        how = "fine-tuned" if recipe.model.weights else "trained from random weights"
        return f"{how} with biogpt-pretrain on records of a task"
    origin = "trained further from given weights" if recipe.model.weights else "pretrained from scratch"
    return f"{origin} with biogpt-pretrain on titles and abstracts in PubMed's format"


def _front_matter(task: str, license: str) -> str:
    """What the Hub reads of a card."""
    data = ModelCardData(
        language="en",
        license=license,
        library_name="transformers",
        pipeline_tag=task,
        tags=["biogpt", "biomedical"],
    )
    return f"---\n{data.to_yaml()}\n---"


def _special_tokens(folder: Path) -> str:
    unused = unused_ids(folder)
    longer = (
        f" `len(tokenizer)` is {unused} above the model's vocabulary; the tokenizer never produces those ids."
        if unused
        else ""
    )
    return (
        "A text begins with `</s>`, which the tokenizer adds. In training, a literal `</s>`, `<pad>` or `<unk>` inside"
        f" a\ntext was plain text; transformers' tokenizer reads it as the special token.{longer}"
    )


def _figures(recipe: Recipe, of_data: dict[str, str], state: dict[str, Any], counts: dict[str, Any]) -> str:
    """A table of the data, the training and the held-out loss."""
    held_out, averaged = counts["held_out"], counts.get("averaged_steps", ())
    others = {name: value for name, value in held_out.items() if name not in ("loss", "tokens")}
    rows = of_data | {
        "optimizer steps": f"{state['step']:,} of {recipe.global_batch()}",
        **({"weights: the mean of the steps": ", ".join(f"{step:,}" for step in averaged)} if averaged else {}),
        "held-out loss by transformers, nats a target": f"{held_out['loss']:.4f}",
        **{f"held-out {name.replace('_', ' ')}": f"{value:.5g}" for name, value in others.items()},
        "held-out targets": f"{held_out['tokens']:,}",
        "the same loss by biogpt-pretrain": f"{counts.get('recorded_loss', counts.get('computed_loss')):.4f}",
    }
    return markdown_table(["", ""], [list(row) for row in rows.items()])


def _training_data(stages: list[dict[str, Any]]) -> str:
    """Where the text comes from, what became of its records, and whose it is, for each run that trained the model."""
    parts, rights = [], {}
    for number, stage in enumerate(stages, 1):
        if len(stages) > 1:
            rows = [list(row) for row in stage["figures"].items()]
            parts.append(f"### Stage {number}: {stage['kind']}\n\n{markdown_table(['', ''], rows)}")
        for name, corpus in stage["corpora"].items():
            files = [f"{count:,} of {kind}" for kind, count in corpus["files"].items() if count]
            rights |= {kind: RIGHTS[kind] for kind, count in corpus["files"].items() if count}
            heading = f"#### {name}\n\n" if len(stage["corpora"]) > 1 else ""
            rows = [[what, f"{count:,}"] for what, count in funnel(corpus["counts"]) if count]
            parts.append(f"{heading}Files: {', '.join(files)}.\n\n{markdown_table(['records', ''], rows)}")
    return "\n\n".join(["## Training data", *parts, *rights.values()]) if parts else ""


def benchmarks_section(stages: list[dict[str, Any]]) -> str:
    """Which items of benchmarks the training text held."""
    rows = [
        [f"{benchmark} {split}", *(f"{items[key]:,}" for key in ("items", "in_input", "in_training"))]
        for stage in stages
        for benchmark, of_split in stage["benchmarks"].items()
        for split, items in of_split.items()
    ]
    header = ["benchmark", "items", "in the corpus's input", "in the training text"]
    return f"## Benchmarks in the training data\n\n{markdown_table(header, rows)}" if rows else ""


SCORES, AFTER_SCORES = "## Scores", "\n\n## Recipe\n"


def check_card(card: Path) -> str:
    """The text of a card. Raises UserError if it is missing, or has lost the section in front of which scores stand."""
    if not card.is_file():
        raise UserError(f"--card: {card.parent} has no {card.name}; name a folder written by `biogpt export`")
    text = card.read_text(encoding="utf-8")
    if AFTER_SCORES not in text:
        raise UserError(f"{card}: has no section Recipe, in front of which the scores stand; export the folder again")
    return text


def add_scores(card: Path, rows: list[list[str]]) -> None:
    """Write rows (task, items, figures) into the scores of a card. A task's earlier row is replaced.

    Raises UserError as `check_card` does.
    """
    before, found, after = check_card(card).partition(AFTER_SCORES)
    before, _, known = before.partition(f"\n\n{SCORES}\n\n")
    cells = [line.strip("| ").split(" | ") for line in known.splitlines()[2:]]
    merged = {row[0]: row for row in [*cells, *rows]}
    scores = markdown_table(["benchmark", "items", "figures in percent, 95 % interval"], list(merged.values()))
    with whole_file(card) as stream:
        stream.write(f"{before}\n\n{SCORES}\n\n{scores}{found}{after}".encode())


def _recipe(recipe: Recipe, corpora: dict[str, dict[str, Any]]) -> str:
    """The settings of the run and of its corpora, without paths and without keys that have no value."""
    settings: dict[str, Any] = recipe.model_dump(mode="json", exclude_none=True)
    for section, key in PATHS:
        settings[section].pop(key, None)
    for name, corpus in corpora.items():
        settings["corpus" if len(corpora) == 1 else f"corpus {name}"] = corpus["settings"]
    return f"## Recipe\n\n```json\n{json.dumps(settings, indent=2, ensure_ascii=False)}\n```"


def _licence(license: str) -> str:
    stated = (
        "No licence was stated for these weights; `biogpt export --license` states one."
        if license == "unknown"
        else f"These weights are published under the licence `{license}`."
    )
    return f"## Licence\n\n{stated} It does not cover the texts that the model was trained on."


def unused_ids(folder: Path) -> int:
    """How many tokens `tokenizer.json` has beyond the vocabulary: its merges need them, but no text produces them."""
    if not (folder / "tokenizer.json").is_file():
        return 0
    return len(read_json(folder / "tokenizer.json")["model"]["vocab"]) - len(read_json(folder / "vocab.json"))

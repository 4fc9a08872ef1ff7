"""Does one encoder-decoder learn many tasks with one vocabulary? `python -m tests.bench.images`.

Questions about pictures, their regions, captions and codes, titles and infilled beginnings of the embedded sample's
abstracts, and PubMedQA's questions, mixed in one run. Sources are cut to 64 tokens, so of PubMedQA's contexts little is
read. The model is asked every question about the test pictures, whose combinations training never showed, and
PubMedQA's. Finished steps in `--out` are kept. It took 25 minutes of two cores that others used too.
"""

import argparse
import itertools
import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import torch

from data.archive.sample import write_sample
from data.corpus.build import make_corpus
from data.images.draw import COLOURS, QUARTERS, SHAPES, SIZES, Thing
from data.images.instructions import CHOICES, caption
from data.shards.corpus_records import make_records
from data.shards.records import PIECES, encode_pieces, encode_texts, read_records
from data.text.ids import EOS_ID
from data.text.reserved import RESERVED_NUMBERS
from data.text.train import train_tokenizer
from pretrain.answers import log_likelihoods, open_language_model
from pretrain.benchmark import benchmark
from pretrain.export.folder import export
from pretrain.images import make_images, question_accuracy
from pretrain.inference import figures_with_sources
from pretrain.prefix_tree import search
from pretrain.recipe import load_recipe
from pretrain.tasks.records import write_records
from pretrain.train import train
from tests.bench.machine import machine
from tests.bench.needs import need_shared
from tests.paths import SHARED

PUBMEDQA = SHARED / "data" / "pubmedqa"
PICTURES = 8_192
CAPTIONED = 16  # pictures whose captions are searched; there are 512 captions of one thing
BEAMS = (1, 4, 16)
WEIGHTS = {"images": 0.7, "infilling": 0.1, "pubmedqa": 0.1, "title": 0.1}
TEXT_TASKS = {
    "infilling": ("beginnings", "What is the text without masks?"),
    "title": ("abstracts", "What is the title?"),
}
"""From which corpus their records are, and what every source begins with."""
STEPS, CONTEXT = 2_000, 64
INFILLED = 25  # words: so many of an abstract fit the context as a target


def make_inputs(out: Path) -> None:
    """A folder of records for each task, and a tokenizer/ whose corpus has the words of the pictures' records."""
    make_images(out / "images", PICTURES, seed=0)
    lines = [json.loads(line) for line in (out / "images" / "train.jsonl").read_text().splitlines()]
    values = [value for line in lines for value in (line["source"][0], line["target"])]
    texts = sorted({value for value in values if isinstance(value, str)})
    (out / "texts.txt").write_text("".join(f"{text}\n" for text in texts))
    write_sample(out / "raw", citations=1_000)
    make_corpus([out / "raw"], out / "abstracts", 0.05, 0.05, workers=1)
    files = sorted((out / "abstracts").glob("*.parquet"))
    abstracts = [text for file in files for text in pq.read_table(file)["abstract"].to_pylist()]
    (out / "beginnings.txt").write_text("".join(f"{' '.join(text.split()[:INFILLED])}\n" for text in abstracts))
    make_corpus([out / "beginnings.txt"], out / "beginnings", 0.05, 0.05, workers=1)
    make_corpus([out / "raw", out / "texts.txt"], out / "corpus", 0.05, 0.05, workers=1)
    train_tokenizer(out / "corpus", out / "tokenizer", 2_000, 1, workers=1, reserve=RESERVED_NUMBERS)
    for task, (corpus, instruction) in TEXT_TASKS.items():
        make_records(out / corpus, task, out / task, instruction)
    write_records("pubmedqa", "source_target", PUBMEDQA, out / "pubmedqa")


def learn(out: Path) -> None:
    """run/ and its export hf/."""
    folders = ", ".join(f'{name} = "{out / name}"' for name in WEIGHTS)
    weights = ", ".join(f"{name} = {weight}" for name, weight in WEIGHTS.items())
    shape = ["model.hidden_size=128", "model.intermediate_size=512", f"model.max_position_embeddings={CONTEXT}"]
    given = [
        f"data.records={{{folders}}}", f"data.weights={{{weights}}}", f"data.tokenizer={out / 'tokenizer'}", *shape,
        f"train.run={out / 'run'}", f"train.steps={STEPS}", "optimizer.kind=muon", "optimizer.learning_rate=1e-2",
    ]  # fmt: skip
    train(load_recipe("many-tasks", given))
    export(out / "run", out / "hf")


def misses(out: Path) -> dict[int, int]:
    """Beams -> how often beam search over all captions of one thing misses the likeliest, for `CAPTIONED` pictures."""
    model, tokenizer = open_language_model(out / "hf"), out / "tokenizer"
    names = itertools.product(SHAPES, COLOURS, QUARTERS, SIZES)
    captions = [caption([Thing(*name, left=0, top=0)]) for name in names]
    answers = [[*ids.tolist(), EOS_ID] for ids in encode_texts(tokenizer, captions)]
    pictures = read_records(out / "images" / "test.jsonl", {"task": str, "source": PIECES, "target": PIECES})
    chosen = [record for record in pictures if record.fields["target"] in captions][:CAPTIONED]
    sources = [[EOS_ID, *ids.tolist()] for ids in encode_pieces(tokenizer, chosen, "source")]
    scores = log_likelihoods(model, [(source, answer) for source in sources for answer in answers])
    best = torch.tensor(scores).view(len(sources), -1).argmax(1).tolist()
    ids_BS = torch.tensor(sources)  # all captions have the same instruction, and all pictures as many codes
    found = {beams: search(model.model, ids_BS, torch.ones_like(ids_BS), answers, beams) for beams in BEAMS}
    return {beams: sum(a != b for a, b in zip(numbers, best, strict=True)) for beams, numbers in found.items()}


def majority(out: Path) -> dict[str, float]:
    """The share of the most frequent answer of the training split to each form of question."""
    lines = [json.loads(line) for line in (out / "images" / "train.jsonl").read_text().splitlines()]
    counts = {form: Counter(line["target"] for line in lines if line["task"] == form) for form in CHOICES}
    return {form: max(each.values()) / each.total() for form, each in counts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("images-bench"))
    out = parser.parse_args().out.absolute()
    need_shared()
    out.mkdir(exist_ok=True)
    make_inputs(out)
    learn(out)
    folders = (out / "hf", out / "tokenizer", out / "images")
    rows = {
        "model": question_accuracy(*folders),
        "blank picture": question_accuracy(*folders, blank=True),
        "majority": majority(out),
    }
    print(f"{machine()}\n\n| {' | '.join(['accuracy', *CHOICES])} |\n|---|{'---|' * len(CHOICES)}")
    for name, found in rows.items():
        print(f"| {name} | {' | '.join(f'{found[form]:.3f}' for form in CHOICES)} |")
    print("\n| records | with its source | with another's |\n|---|---|---|")
    own, others = figures_with_sources(out / "run")
    for name in WEIGHTS:
        print(f"| {name} | {own[f'{name}/loss']:.3f} | {others[f'{name}/loss']:.3f} |")
    print(f"\n{benchmark('pubmedqa', out / 'hf', PUBMEDQA, 'sum', None, None)}")
    found = misses(out)
    print(f"\n| beams | captions of {CAPTIONED} that beam search misses |\n|---|---|")
    for beams, count in found.items():
        print(f"| {beams} | {count} |")


if __name__ == "__main__":
    main()

"""What `biogpt corpus --benchmarks` finds by text, compared with a plain slow scan. About 8 minutes of one core.

The scan reduces each sentence of an item to its letters and looks for it in every abstract with Python's `in`. An item
is in an abstract if the sentences that are there hold more than half of its letters. It knows no hashes and no runs.
"""

import gzip
import json
import random
import re
import time
import unicodedata
from collections import defaultdict
from collections.abc import Iterator

from data.corpus.benchmarks import BenchmarkItem
from data.corpus.passages import RUN, Passages
from data.corpus.schema import join_text
from launch.data_commands import benchmark_items
from tests.bench.machine import machine
from tests.bench.needs import need_shared
from tests.paths import SHARED

Pairs = set[tuple[int, int]]  # number of the item, number of the abstract
LEAST = 20  # letters: shorter sentences ("RESULTS") say nothing about where they are from
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def abstracts() -> list[tuple[str, str]]:
    """(name, text) of all shared abstracts."""
    found = []
    for path in sorted((SHARED / "data/abstracts").iterdir()):
        for line in gzip.decompress(path.read_bytes()).decode().rstrip("\n").split("\n"):
            row = json.loads(line)
            text = join_text(row.get("title") or "", row.get("abstract") or row.get("text") or "")
            found.append((f"{path.name.partition('.')[0]}/{row['id']}", text))
    return found


def plain_letters(text: str) -> str:
    """As the rule defines them, one character after another."""
    return "".join(each for each in unicodedata.normalize("NFKD", text).casefold() if each.isalnum())


def slow_scan(items: list[BenchmarkItem], texts: list[str]) -> Pairs:
    """The truth: see the top of this file."""
    sentences = [[plain_letters(each) for each in re.split(r"(?<=[.?!])\s+", item.text)] for item in items]
    everything = "\n".join(map(plain_letters, texts))
    ends = [end for end, each in enumerate(everything) if each == "\n"] + [len(everything)]
    pairs: Pairs = set()
    known: dict[str, set[int]] = {}
    for number, of_item in enumerate(sentences):
        held: dict[int, int] = defaultdict(int)
        for each in of_item:
            if len(each) < LEAST:
                continue
            if each not in known:
                known[each] = set(occurrences(everything, each, ends))
            for text in known[each]:
                held[text] += len(each)
        pairs |= {(number, text) for text, size in held.items() if size > sum(map(len, of_item)) / 2}
    return pairs


def occurrences(everything: str, part: str, ends: list[int]) -> Iterator[int]:
    """The numbers of the texts that hold a part."""
    start = text = 0
    while (start := everything.find(part, start)) >= 0:
        while ends[text] <= start:
            text += 1
        yield text
        start = ends[text]


def altered(text: str, every: int, rng: random.Random) -> str:
    """The text with one letter in `every` replaced by another."""
    return "".join(rng.choice(LETTERS) if each.isalpha() and rng.random() < 1 / every else each for each in text)


def main() -> None:
    """Print the tables and every pair about which the two disagree."""
    need_shared()
    named = abstracts()
    items = benchmark_items(SHARED / "data")
    items = [item for item in items if item.benchmark != "bc5cdr-entities"]  # the same articles as bc5cdr-relations
    texts = [text for _, text in named]
    began = time.process_time()
    passages = Passages(item.text for item in items)
    made = time.process_time() - began
    began = time.process_time()
    by_rule = {(item, text) for text, item, _ in passages.find(texts)}
    took = time.process_time() - began
    truth = slow_scan(items, texts)
    print(f"{machine()}\n\n{len(items):,} items made ready in {made:.1f} s, {len(texts):,} abstracts searched in")
    print(f"{took:.2f} s of one core, {took / len(texts) * 1e6:.0f} us each\n")
    print(
        "| benchmark, split | items | too short | pairs of the scan | both | rule alone | scan alone: short, others |"
    )
    print("|---|---|---|---|---|---|---|")
    short = {number for number, item in enumerate(items) if len(plain_letters(item.text)) < RUN}
    for group in dict.fromkeys((item.benchmark, item.split) for item in items):
        here = {number for number, item in enumerate(items) if (item.benchmark, item.split) == group}
        scan, rule = ({pair for pair in pairs if pair[0] in here} for pairs in (truth, by_rule))
        missed = scan - rule
        of_short = sum(item in short for item, _ in missed)
        cells = [len(here), len(here & short), len(scan), len(scan & rule), len(rule - scan)]
        print(f"| {', '.join(group)} | {' | '.join(map(str, cells))} | {of_short}, {len(missed) - of_short} |")
    print()
    for title, pairs in (("rule alone", by_rule - truth), ("scan alone", truth - by_rule)):
        for item, text in sorted(pairs):
            print(
                f"{title}: {items[item].benchmark} {items[item].split} {items[item].id}: {items[item].text[:90]!r}",
                end="",
            )
            print(f" in {named[text][0]}")
    rng = random.Random(1)
    articles = [item.text for item in items if item.benchmark.startswith("bc5cdr")]
    sentences = [item.text for item in items if item.benchmark == "hoc" and item.split == "test"]
    sentences = [text for text in sentences if len(plain_letters(text)) >= RUN]
    print("\n| one letter in ... replaced | articles of BC5CDR found | test sentences of HoC found |\n|---|---|---|")
    for every in (400, 200, 100, 50):
        cells = []
        for originals in (articles, sentences):
            found = {
                (text, item) for text, item, _ in Passages(originals).find(altered(t, every, rng) for t in originals)
            }
            cells.append(f"{sum((n, n) in found for n in range(len(originals))) / len(originals):.1%}")
        print(f"| {every} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""What archive and corpus cost: `python -m tests.bench.corpus` prints a table. Needs `../shared` and the extra bench.

About 6 minutes on two cores, 25 with `--files 50`, which rehearses more files of baseline size; `--kills 0` leaves the
kills out.
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.archive.sample import write_sample
from data.common.files import describe_files
from data.corpus.build import make_corpus
from data.corpus.cleaning import cleaning_switches
from data.corpus.parts import write_part
from data.corpus.settings import CLEAN
from data.text.train import train_tokenizer
from tests.bench.machine import machine, peak
from tests.bench.needs import need_extra, need_shared
from tests.data.archive.server import Archive
from tests.data.killed import kill_after, start
from tests.paths import SHARED

RECORD = "/PubmedArticle/MedlineCitation"
COLUMNS = {  # what pubmedparser2 writes, as tab-separated values
    "root": "/PubmedArticleSet",
    "key": f"{RECORD}/PMID",
    "title": f"{RECORD}/Article/ArticleTitle",
    "abstract": f"{RECORD}/Article/Abstract/AbstractText",
    "year": f"{RECORD}/Article/Journal/JournalIssue/PubDate/Year",
    "journal": f"{RECORD}/Article/Journal/Title",
}
BASELINE_FILES, BASELINE_RECORDS = 1_300, 38_000_000
CHOOSE = """
import sys; import numpy as np; from data.corpus.settings import CLEAN
from data.corpus.selection import Keys, select_rows
rows, rng = int(sys.argv[1]), np.random.default_rng(1)
keys = Keys([], CLEAN, np.empty(0, np.int64))
keys.starts = np.arange(0, rows + 1, 30_000)
keys.pmid, keys.text_hash = rng.integers(1, rows, rows), rng.integers(0, 2**63, rows, np.int64).view(np.uint64)
keys.version, keys.words = np.ones(rows, np.int16), np.full(rows, 200, np.uint32)
keys.deleted, keys.cleaned, keys.filter = np.zeros(rows, bool), np.zeros(rows, np.uint8), np.zeros(rows, np.uint8)
select_rows(keys, CLEAN, 0.002, 0.002)
"""


def wrap(folder: Path, files: int, citations: int) -> list[Path]:
    """Real abstracts as NLM's files, with PMIDs of their own."""
    tool = [sys.executable, str(SHARED / "tools" / "wrap_abstracts.py"), str(folder)]
    subprocess.run([*tool, f"--files={files}", f"--citations={citations}"], check=True, stdout=subprocess.DEVNULL)
    return sorted(folder.iterdir())


def seconds(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    before = clock()
    work()
    return clock() - before


def parsing(file: Path, folder: Path, rounds: int = 5) -> tuple[float, ...]:
    """Least CPU seconds, in turns: a file to Parquet, that with MinHash, pubmed_parser's and pubmedparser2's reading.

    pubmedparser2 leaves markup as it is, knows neither versions nor deletions, and does not check the XML.
    """
    import pubmed_parser  # pyright: ignore[reportMissingImports]
    import pubmedparser  # pyright: ignore[reportMissingImports]

    settings = cleaning_switches(CLEAN)
    works: list[Callable[[], Any]] = [
        lambda: write_part(file, folder, settings),
        lambda: write_part(file, folder, settings | {"bands": True}),
        lambda: sum(1 for _ in pubmed_parser.parse_medline_xml(str(file))),
        lambda: pubmedparser.read_xml(
            [str(file)], COLUMNS, str(folder / "in-c"), False, n_threads=1, reprocess_all=True
        ),
    ]
    took = [[seconds(work, time.process_time) for work in works] for _ in range(rounds)]
    return tuple(map(min, zip(*took, strict=True)))


def chain(raw: list[Path], tokenizer: Path, out: Path, workers: int) -> tuple[float, float]:
    """Seconds of the commands corpus and shards. Duplicates stay: wrapped abstracts come again under new PMIDs."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    corpus = ["corpus", *(str(file.absolute()) for file in raw), "corpus.drop_duplicates=false"]
    shards = ["shards", "corpus", "--tokenizer", str(tokenizer)]
    took = []
    for command in (corpus, shards):
        command += ["--out", command[0], "--workers", str(workers)]
        took.append(seconds(lambda command=command: start(out, *command).wait()))
        assert (out / command[0] / "manifest.json").exists()
    return took[0], took[1]


def size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def memory(file: Path, tokenizer: Path, folder: Path) -> tuple[float, float]:
    """Bytes of the largest process of corpus and shards on a file; and of pass two at full size, by its slope."""
    corpus = "import sys; from pathlib import Path; from data.corpus.build import make_corpus\n"
    corpus += "make_corpus([Path(sys.argv[1])], Path(sys.argv[2]), 0.002, 0.002, 1)"
    shards = "import sys; from pathlib import Path; from data.shards.build import make_shards\n"
    shards += "make_shards(*map(Path, sys.argv[1:]), 1)"
    worker = max(
        peak(corpus, str(file), str(folder / "corpus")),
        peak(shards, str(folder / "corpus"), str(tokenizer), str(folder / "shards")),
    )
    small, large = 3_000_000, 9_000_000
    at_small, at_large = peak(CHOOSE, str(small)), peak(CHOOSE, str(large))
    slope = (at_large - at_small) / (large - small)
    print(f"pass two: {at_large / 1e9:.2f} GB at {large:,} rows, {slope:.1f} bytes a row more", flush=True)
    return worker, at_large + slope * (BASELINE_RECORDS - large)


def kills(folder: Path, number: int) -> int:
    """Kill download, corpus and shards in turn at moments drawn over their time; how many ended in the same bytes."""
    archive, rng, good = Archive(), random.Random(1), 0
    threading.Thread(target=archive.serve_forever, daemon=True).start()
    made = [write_sample(folder / f"sample-{seed}", 3_000, seed) for seed in (1, 2, 3)]
    for name, path in zip(list(archive.content), [path for pair in made for path in pair], strict=False):
        archive.content[name] = path.read_bytes()
    archive.wait = 0.05
    whole = folder / "whole"
    stages = {
        "download": ["--out", "raw", "--updates", "--base-url", archive.url],
        "corpus": ["raw", "--out", "corpus", "--workers", "2"],
        "shards": ["corpus", "--tokenizer", str(folder / "tokenizer"), "--out", "shards", "--workers", "2"],
    }

    def begin(stage: str, place: Path) -> subprocess.Popen[Any]:
        place.mkdir(exist_ok=True)
        return start(place, stage, *stages[stage])

    took = {}
    for stage in stages:
        if stage == "shards":
            train_tokenizer(whole / "corpus", folder / "tokenizer", merges=1_000, min_count=1, workers=1)
        took[stage] = seconds(lambda stage=stage: begin(stage, whole).wait())
    for trial in range(number):
        stage, place = list(stages)[trial % 3], folder / f"trial-{trial}"
        inputs = {"download": None, "corpus": "raw", "shards": "corpus"}[stage]
        if inputs:
            shutil.copytree(whole / inputs, place / inputs)
        after = rng.uniform(0.3, 0.98) * took[stage]  # from when Python has started
        kill_after(after, begin(stage, place))
        made = {"download": "raw"}.get(stage, stage)
        before = "finished" if (place / made / "manifest.json").exists() else "unfinished"
        same = begin(stage, place).wait() == 0 and describe_files(place / made) == describe_files(whole / made)
        same = same and (place / made / "manifest.json").read_bytes() == (whole / made / "manifest.json").read_bytes()
        good += same
        print(f"  {trial + 1:2d}. {stage} after {after:.1f} of {took[stage]:.1f} s, {before}: {same}", flush=True)
        shutil.rmtree(place)
    archive.shutdown()
    return good


def rehearsal(raw: Path, files: int, took: tuple[float, float], out: Path) -> list[tuple[str, str, str]]:
    """Rows: what two workers took for corpus and shards, and what it comes to for all of PubMed."""
    scale, xml, hours, rows = BASELINE_FILES / files, 0.18 * files, [], []
    for stage, lasted in zip(("corpus", "shards"), took, strict=True):
        hours.append(f"{2 * lasted * scale / 3600:.1f} core hours for the {stage}")
        speed = f"{lasted:.0f} s: {xml / (2 * lasted / 3600):.0f} GB of XML an hour a core"
        rows.append((f"rehearsal: {files} files of baseline size, {stage}, 2 workers", speed, ""))
    folders = {"raw": raw} | {name: out / name for name in ("corpus.parts", "corpus", "shards")}
    disk = [f"{name} {size(folder) * scale / 1e9:.0f} GB" for name, folder in folders.items()]
    return [*rows, (f"extrapolated to {BASELINE_FILES:,} files", f"{', '.join(hours)}; disk: {', '.join(disk)}", "")]


def main() -> None:
    """Measure everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=4, help="files of baseline size to rehearse")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--wrapped", type=Path, help="a folder of wrapped files that is there")
    chosen = parser.parse_args()
    need_extra("bench", "pubmed_parser")
    need_extra("bench", "pubmedparser")
    need_shared()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if chosen.kills:
            (folder / "kills").mkdir()
            good = kills(folder / "kills", chosen.kills)
            what = f"kill -9 at {chosen.kills} moments of download, corpus and shards"
            rows.append((what, f"{good} ended in the same bytes", "all"))
        raw = chosen.wrapped or folder / "raw"
        files = sorted(raw.iterdir()) if chosen.wrapped else wrap(raw, chosen.files, 30_000)
        ours, with_bands, theirs, in_c = parsing(files[0], folder)
        what = (
            "a wrapped baseline file (30,000 records, 180 MB) to Parquet, one core, over pubmed_parser's reading of it"
        )
        rows.append((what, f"{ours:.2f} s, {theirs:.2f} s: {theirs / ours:.1f}x", "2.5x"))
        rows.append(("the same with MinHash for near duplicates", f"{with_bands:.2f} s: {with_bands / ours:.1f}x", ""))
        what = "the same file over pubmedparser2 (C) writing PMID, title, abstract, year and journal"
        rows.append((what, f"{ours:.2f} s, {in_c:.2f} s: {in_c / ours:.2f}x", "1.0x"))
        wrap(folder / "small", 8, 1_500)
        make_corpus([folder / "small"], folder / "learn", 0.002, 0.002, 2)
        train_tokenizer(folder / "learn", folder / "tokenizer", merges=10_000, min_count=1, workers=2)
        tokenizer = folder / "tokenizer"
        pairs = [[chain(files, tokenizer, folder / "full", workers) for workers in (1, 2)] for _ in range(2)]
        one, two = (min(of_workers, key=sum) for of_workers in zip(*pairs, strict=True))
        what = f"`.xml.gz` to shards with a tokenizer, {len(files)} files of baseline size, 2 workers over 1"
        rows.append((what, f"{sum(one):.0f} s, {sum(two):.0f} s: {sum(one) / sum(two):.2f}x", "1.8x"))
        rows += rehearsal(raw, len(files), two, folder / "full")
        worker, second = memory(files[0], tokenizer, folder / "memory")
        rows.append(("peak memory of a worker", f"{worker / 1e9:.2f} GB", "1 GB"))
        what = f"peak memory of pass two at {BASELINE_RECORDS:,} records, by its slope"
        rows.append((what, f"{second / 1e9:.2f} GB", "2 GB"))
    print(f"\n{machine()}\n\n| what | measured | at least |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()

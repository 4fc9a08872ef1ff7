"""Corpus + tokenizer -> shards: files of tokens, with documents in the order of a hash of the PMID.

Every document ends in `</s>`. First each row group of the corpus becomes a part, in parallel; row groups are small, so
all workers have work until the end. Then the documents of all parts are gathered in order. The tokenizer's files are
copied into `tokenizer/`, so that a run and its export need no other folder, and the corpus's manifest into `corpus/`,
for the model card.
"""

import shutil
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import pyarrow.parquet as pq

from data.common.disk import disk_full_named
from data.common.files import (
    MANIFEST,
    check_places,
    make_folder,
    parts_folder,
    read_manifest,
    sha256,
    verify_files,
    whole_file,
)
from data.common.hashing import mix64
from data.common.lease import Lease
from data.common.ownership import remove_parts
from data.common.parquet import SPLITS, split_files
from data.common.workers import JobArray, Task, Workers, hold_for, progress, run_tasks, share_of
from data.shards.indexed import IndexedTokens, write_index
from data.text.ids import EOS_ID, UNK_ID, tokenizer_files
from data.text.tokenizer import Tokenizer

pc: Any = pyarrow.compute  # pyright cannot see its functions: pyarrow creates them at run time
DOCUMENTS_PER_SHARD = 500_000


def make_shards(
    corpus: Path, tokenizer: Path, out: Path, workers: Workers, splits: tuple[str, ...] = SPLITS
) -> dict[str, Any]:
    """Tokenize splits of `corpus` with the folder `tokenizer`. Writes the folder `out` and returns its manifest.

    Raises UserError, which names a corpus or tokenizer that is missing or damaged, or an `out` made from other inputs.
    """
    check_places(out, [corpus, tokenizer])
    corpus_manifest, loaded = read_manifest(corpus, "corpus"), Tokenizer(tokenizer)
    with disk_full_named(out, str(out)), hold_for(out, workers) as lease:
        return _make_shards(corpus, corpus_manifest, tokenizer, loaded, out, workers, splits, lease)


def _make_shards(
    corpus: Path,
    corpus_manifest: dict[str, Any],
    tokenizer: Path,
    loaded: Tokenizer,
    out: Path,
    workers: Workers,
    splits: tuple[str, ...],
    lease: Lease,
) -> dict[str, Any]:
    """What make_shards does while it holds the lease of `out`."""
    files = [file for split in splits for file in split_files(corpus, corpus_manifest, split)]
    entries = {file.name: corpus_manifest["files"][file.name] for file in share_of(files, workers)}
    verify_files(corpus, {"files": entries})
    parts = parts_folder(out)
    request = {
        "corpus": {name: entry["sha256"] for name, entry in corpus_manifest["files"].items()},
        "tokenizer": {name: sha256(tokenizer / name) for name in tokenizer_files(tokenizer)},
        "splits": list(splits),
    }
    tasks = _part_tasks(corpus, entries, request["tokenizer"], parts)
    work = partial(tokenize_rows, tokenizer.absolute())
    tokenize = partial(run_tasks, work, tasks, workers, "shards: tokenizing", lease)
    if isinstance(workers, JobArray):
        tokenize()  # raises ShareDone

    def fill(folder: Path) -> dict[str, Any]:
        done = tokenize()
        _load.cache_clear()  # this process may have been the worker
        counts: dict[str, Any] = {"vocabulary": len(loaded.vocabulary)}
        if benchmarks := corpus_manifest["counts"].get("benchmarks"):
            counts["benchmarks"] = benchmarks
        for split in splits:
            of_split = [index for index, task in enumerate(tasks) if task.source.name.startswith(f"{split}-")]
            counts[split] = _gather(folder, split, [tasks[index].folder / "part" for index in of_split])
            counts[split]["unknown_tokens"] = sum(done[index]["unknown_tokens"] for index in of_split)
        (folder / "corpus").mkdir()
        # It proves itself, so the manifest of the shards, on which runs depend, need not list it.
        shutil.copyfile(corpus / MANIFEST, folder / "corpus" / MANIFEST)
        (folder / "tokenizer").mkdir()
        for name in tokenizer_files(tokenizer):
            shutil.copyfile(tokenizer / name, folder / "tokenizer" / name)
        return counts

    manifest = make_folder(out, "shards", request, fill, lease)
    remove_parts(parts, "shards part")
    return manifest


def _part_tasks(corpus: Path, entries: dict[str, Any], tokenizer: dict[str, str], parts: Path) -> list[Task]:
    """A task for each row group of each file. entries: of the corpus's manifest; tokenizer: its files' sha256."""
    tasks = []
    for name, entry in entries.items():
        for group in range(pq.read_metadata(corpus / name).num_row_groups):
            folder, settings = parts / f"{Path(name).stem}-{group:04d}", {"tokenizer": tokenizer, "row_group": group}
            tasks.append(Task("shards part", corpus / name, entry["sha256"], folder, settings))
    return tasks


@lru_cache(maxsize=1)
def _load(tokenizer: Path, hashes: str) -> Tokenizer:
    """The tokenizer of this process, which remembers fragments from task to task.

    hashes: those of its files, so that a changed tokenizer is loaded again.
    """
    return Tokenizer(tokenizer)


def tokenize_rows(tokenizer: Path, file: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Tokenize a row group of a corpus file into a part, in its order, with its PMIDs. Returns the unknown tokens."""
    part, loaded = folder / "part", _load(tokenizer, str(settings["tokenizer"]))
    rows = pq.ParquetFile(file).read_row_group(settings["row_group"], columns=["pmid", "text"])
    text = rows["text"].combine_chunks()
    ids, lengths = loaded.encode_batch(text)
    with whole_file(part.with_name(part.name + ".bin")) as stream:
        stream.write(np.insert(ids, np.cumsum(lengths), EOS_ID).tobytes())
    with whole_file(part.with_name(part.name + ".pmids.npy")) as stream:
        np.save(stream, rows["pmid"].to_numpy())
    write_index(part, loaded.dtype, lengths + 1, pc.binary_length(text).to_numpy())
    return {"unknown_tokens": int((ids == UNK_ID).sum())}


def _gather(folder: Path, split: str, part_paths: list[Path]) -> dict[str, int]:
    """Write the shards of a split from its parts, in the order of the PMIDs' hashes. Returns counts.

    A split without documents has no shard: readers that map files, such as Megatron's, cannot map an empty one.
    """
    if not part_paths:
        return {"documents": 0, "tokens": 0, "text_bytes": 0, "shards": 0}
    parts = [IndexedTokens(path) for path in part_paths]
    pmids = np.concatenate([np.load(path.with_name(path.name + ".pmids.npy")) for path in part_paths])
    order = np.argsort(mix64(pmids, salt=1), kind="stable")
    lengths = np.concatenate([part.lengths for part in parts]).astype(np.int64)
    text_bytes = np.concatenate([part.text_bytes for part in parts])
    part_of = np.repeat(np.arange(len(parts)), [len(part.lengths) for part in parts])
    ends = np.concatenate([np.cumsum(part.lengths, dtype=np.int64) for part in parts])  # of documents, in their parts
    # Slices of a memoryview are far cheaper than slices of a memory map.
    views: list[Any] = [memoryview(part.tokens) for part in parts]  # type: ignore[arg-type]
    shards = range(0, len(order), DOCUMENTS_PER_SHARD)
    with progress(f"shards: writing {split}", len(shards)) as advance:
        for index, start in enumerate(shards):
            documents = order[start : start + DOCUMENTS_PER_SHARD]
            prefix = folder / f"{split}-{index:05d}"
            where = (part_of[documents], ends[documents] - lengths[documents], ends[documents])
            with whole_file(prefix.with_name(prefix.name + ".bin")) as stream:
                for part, first, end in zip(*(array.tolist() for array in where), strict=True):
                    stream.write(views[part][first:end])
            write_index(prefix, parts[0].tokens.dtype, lengths[documents], text_bytes[documents])
            advance()
    return {
        "documents": len(order),
        "tokens": int(lengths.sum()),
        "text_bytes": int(text_bytes.sum()),
        "shards": len(shards),
    }

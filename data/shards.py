"""Corpus + tokenizer -> shards: token files in an order that is a hash of the PMID, each document ending in `</s>`.

Each corpus file is tokenized into a part (in parallel), then the documents of all parts are gathered in their order.
The tokenizer's files go along in `tokenizer/`, so that a run and its export need nothing else.
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from data.corpus import SPLITS, split_files
from data.files import make_folder, parts_folder, read_manifest, sha256, verify_files, whole_file
from data.hashing import mix64
from data.indexed import IndexedTokens, token_dtype, write_index
from data.tokenizer import EOS_ID, TOKENIZER_FILES, UNK_ID, Tokenizer
from data.workers import JobArray, Task, Workers, progress, run_tasks, share_of

DOCUMENTS_PER_SHARD = 500_000


def make_shards(
    corpus: Path, tokenizer: Path, out: Path, workers: Workers, splits: tuple[str, ...] = SPLITS
) -> dict[str, Any]:
    """Tokenize the splits of `corpus` with the folder `tokenizer`; write the folder `out`, return its manifest."""
    corpus_manifest = read_manifest(corpus, "corpus")
    verify_files(corpus, corpus_manifest)
    parts, loaded = parts_folder(out), Tokenizer(tokenizer)
    request = {
        "corpus": {name: entry["sha256"] for name, entry in corpus_manifest["files"].items()},
        "tokenizer": {name: sha256(tokenizer / name) for name in TOKENIZER_FILES},
        "splits": list(splits),
    }

    files = {split: split_files(corpus, corpus_manifest, split) for split in splits}
    settings = {"tokenizer": request["tokenizer"]}
    tasks = [
        Task("shards part", file, request["corpus"][file.name], parts / file.stem, settings)
        for split in splits
        for file in files[split]
    ]
    work = partial(tokenize_file, tokenizer.absolute())
    if isinstance(workers, JobArray):
        run_tasks(work, share_of(tasks, workers), workers, "shards: tokenizing")

    def fill(folder: Path) -> dict[str, Any]:
        done = run_tasks(work, tasks, workers, "shards: tokenizing")
        counts: dict[str, Any] = {"vocabulary": len(loaded.vocabulary)}
        for split in splits:
            counts[split] = _gather(folder, split, [parts / file.stem / "part" for file in files[split]])
        for task, of_task in zip(tasks, done, strict=True):
            counts[task.folder.name.rsplit("-", 1)[0]]["unknown_tokens"] += of_task["unknown_tokens"]
        (folder / "tokenizer").mkdir()
        for name in TOKENIZER_FILES:
            shutil.copyfile(tokenizer / name, folder / "tokenizer" / name)
        return counts

    manifest = make_folder(out, "shards", request, fill)
    shutil.rmtree(parts, ignore_errors=True)
    return manifest


def tokenize_file(tokenizer: Path, file: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """One corpus file -> a part in its order, and its PMIDs beside it. Returns counts."""
    part, loaded = folder / "part", Tokenizer(tokenizer)
    dtype = token_dtype(len(loaded.vocabulary))
    lengths, text_bytes, pmids, unknown = [], [], [], 0
    with whole_file(part.with_name(part.name + ".bin")) as stream:
        for batch in pq.ParquetFile(file).iter_batches(1_000, columns=["pmid", "text"]):
            pmids += batch["pmid"].to_pylist()
            for text in batch["text"].to_pylist():
                ids = np.array([*loaded.encode(text), EOS_ID], dtype)
                unknown += int((ids == UNK_ID).sum())
                lengths.append(len(ids))
                text_bytes.append(len(text.encode()))
                stream.write(ids.tobytes())
    np.save(part.with_name(part.name + ".pmids.npy"), np.array(pmids, np.int64))
    write_index(part, dtype, np.array(lengths, np.int64), np.array(text_bytes, np.int64))
    return {"unknown_tokens": unknown}


def _gather(folder: Path, split: str, part_paths: list[Path]) -> dict[str, int]:
    """Write the shards of a split from its parts, documents in the order of their PMIDs' hash. Returns counts.

    A split without documents has no shard: readers that map files, Megatron's too, cannot map an empty one.
    """
    if not part_paths:
        return {"documents": 0, "tokens": 0, "unknown_tokens": 0, "text_bytes": 0, "shards": 0}
    parts = [IndexedTokens(path) for path in part_paths]
    pmids = np.concatenate([np.load(path.with_name(path.name + ".pmids.npy")) for path in part_paths])
    part_of = np.repeat(np.arange(len(parts)), [len(part.lengths) for part in parts])
    lengths = np.concatenate([part.lengths for part in parts]).astype(np.int64)
    text_bytes = np.concatenate([part.text_bytes for part in parts])
    ends = np.concatenate([np.cumsum(part.lengths, dtype=np.int64) for part in parts])
    order = np.argsort(mix64(pmids, salt=1), kind="stable")
    shards = range(0, len(order), DOCUMENTS_PER_SHARD)
    with progress(f"shards: writing {split}", len(shards)) as advance:
        for index, start in enumerate(shards):
            documents = order[start : start + DOCUMENTS_PER_SHARD]
            prefix = folder / f"{split}-{index:05d}"
            with whole_file(prefix.with_name(prefix.name + ".bin")) as stream:
                for document in documents:
                    end = ends[document]
                    stream.write(parts[part_of[document]].tokens[end - lengths[document] : end].tobytes())
            write_index(prefix, parts[0].tokens.dtype, lengths[documents], text_bytes[documents])
            advance()
    return {
        "documents": len(order),
        "tokens": int(lengths.sum()),
        "unknown_tokens": 0,
        "text_bytes": int(text_bytes.sum()),
        "shards": len(shards),
    }

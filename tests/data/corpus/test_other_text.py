"""data/corpus/other_text.py: files of every kind, and the hub, from a local server that answers as huggingface.co."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from data.common.files import TasksFailed, UserError
from data.corpus.build import make_corpus
from data.corpus.settings import load_corpus_settings
from tests.data.citations import citation, write_file
from tests.data.corpora import content, rows, texts
from tests.shared import ROOT

COMMIT = "1" * 40
NOTES = "".join(json.dumps({"text": f"Note {number}, which is short."}) + "\n" for number in range(60))
FILES = {
    "README.md": b"---\nlicense: mit\n---\n",
    "dataset_infos.json": b"{}",  # no data, though its name ends in .json
    "data/train/shard_0.jsonl": NOTES.encode(),
    "data/test/shard_0.jsonl": b'{"text": "Another note."}\n',
}


class Hub(ThreadingHTTPServer):
    """The dataset me/notes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...

    def do_GET(self) -> None:
        if re.fullmatch(r"/api/datasets/me/notes(/revision/[^?]*)?(\?.*)?", self.path):
            return self.answer(json.dumps({"id": "me/notes", "sha": COMMIT, "siblings": []}).encode())
        if listed := re.fullmatch(
            r"/api/datasets/me/notes/tree/[^/?]*/?([^?]*)\?.*recursive=(true|false).*", self.path
        ):
            return self.answer(json.dumps(children(unquote(listed[1]), listed[2] == "true")).encode())
        asked = re.fullmatch(r"/datasets/me/notes/resolve/[^/]*/(.*)", self.path)
        if asked and asked[1] in FILES:
            return self.answer(FILES[asked[1]])
        self.answer(b"", 404)

    do_HEAD = do_GET

    def answer(self, body: bytes, status: int = 200) -> None:
        self.send_response(status)
        missing = {"X-Error-Code": "EntryNotFound" if "/me/notes/" in self.path else "RepoNotFound"}
        found = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'}
        for key, value in ({"Content-Length": str(len(body))} | (found if status == 200 else missing)).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def children(folder: str, recursive: bool) -> list[dict[str, object]]:
    """What stands in a folder of the repository, one level deep or all."""
    paths = {str(path) for name in FILES for path in (Path(name), *Path(name).parents)} - {"."}
    return [
        {"type": "file" if path in FILES else "directory", "path": path, "oid": "0" * 40, "size": 0}
        for path in sorted(paths)
        if Path(path).parent == Path(folder) or (recursive and Path(folder) in Path(path).parents)
    ]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def corpus_of(name: str, hub_url: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command, with this hub and a cache of its own."""
    environment = os.environ | {"HF_ENDPOINT": hub_url, "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "launch.cli", "corpus", name, "--out", str(folder / "corpus")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_a_dataset_of_the_hub_gives_the_bytes_of_its_files(hub: Hub, tmp_path: Path) -> None:
    done = corpus_of("hf://datasets/me/notes", hub.url, tmp_path)
    assert done.returncode == 0, done.stderr
    paths = [tmp_path / f"data-{split}-shard_0.jsonl" for split in ("train", "test")]
    for path in paths:
        path.write_bytes(FILES[path.name.replace("-", "/")])
    make_corpus(paths, tmp_path / "local", 0.002, 0.002, workers=1)
    assert content(tmp_path / "corpus") == content(tmp_path / "local")
    assert "of 61 records kept" in done.stdout


@pytest.mark.parametrize("name", ["hf://datasets/me/absent", "hf://datasets/me/notes#absent", "hf://datasets/a/b/c/d"])
def test_a_dataset_that_cannot_be_had_is_named(name: str, hub: Hub, tmp_path: Path) -> None:
    done = corpus_of(name, hub.url, tmp_path)
    assert done.returncode == 2 and f"biogpt: error: {name}: cannot be fetched (" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "corpus").exists() and "Traceback" not in done.stderr


@pytest.mark.slow  # Hugging Face's client tries again for 20 seconds
def test_a_hub_that_does_not_answer_is_named(tmp_path: Path) -> None:
    done = corpus_of("hf://datasets/me/notes", "http://127.0.0.1:9", tmp_path)
    assert done.returncode == 2 and "biogpt: error: hf://datasets/me/notes: cannot be fetched (" in done.stderr


# Files


def write_texts(folder: Path, texts: list[str | None]) -> list[Path]:
    """The same texts as every kind of file, under another column than the default (plain lines have no columns)."""
    table = pa.table({"id": list(range(len(texts))), "body": texts})
    lines = "".join(json.dumps(row) + "\n" for row in table.to_pylist())
    (folder / "a.jsonl").write_text(lines)
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    pq.write_table(table, folder / "c.parquet")
    pyarrow.csv.write_csv(table, folder / "d.csv")
    (folder / "e.json").write_text(json.dumps(table.to_pylist()))
    (folder / "f.txt").write_text("".join(f"{text or ''}\n" for text in texts))
    return [folder / name for name in ("a.jsonl", "b.jsonl.gz", "c.parquet", "d.csv", "e.json", "f.txt")]


@pytest.mark.parametrize("index", range(6))
def test_other_text_enters_by_the_same_door(index: int, tmp_path: Path) -> None:
    """Cleaned, counted and split like the rest; an empty one is dropped, of equal ones one stays."""
    other = write_texts(tmp_path, ["A note &lt; another.", "A second note.", None, "", "a second  note", "Cité, “ça”."])
    write_file(tmp_path / "raw" / "pubmed26n0001.xml", [citation(1)])
    settings = load_corpus_settings(None, ["corpus.text_column=body"])
    manifest = make_corpus([other[index], tmp_path / "raw"], tmp_path / "corpus", 0, 0, 1, settings)
    kept = rows(tmp_path / "corpus")["train"]
    one_of = {row["text"] for row in kept if row["pmid"] < 0} - {"A note < another.", "Cité, “ça”."}
    assert one_of in ({"A second note."}, {"a second  note"})
    assert len(kept) == 4 and {row["title"] for row in kept if row["pmid"] < 0} == {""}
    assert manifest["counts"]["unescape_entities"] == 1 and manifest["counts"]["duplicates"] == 1
    assert {row["source_file"] for row in kept} == {other[index].name, "pubmed26n0001.xml"}


def test_lines_and_words_of_other_text_stay_apart(tmp_path: Path) -> None:
    lines = ["First line.\nSecond\tline.\r\n\r\n  Third.", "word " * 70_000]
    (tmp_path / "my[notes]*.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    counts = make_corpus([tmp_path / "my[notes]*.jsonl"], tmp_path / "corpus", 0, 0, 1)["counts"]
    assert set(texts(tmp_path / "corpus").values()) == {"First line. Second line. Third.", ("word " * 70_000).strip()}
    assert counts["words"] == 5 + 70_000


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.txt"])
def test_an_empty_file_of_other_text_has_no_rows(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"") if name.endswith(".gz") else b"")
    write_file(tmp_path / "raw" / "pubmed26n0001.xml", [citation(1)])
    counts = make_corpus([tmp_path / name, tmp_path / "raw"], tmp_path / "corpus", 0, 0, 1)["counts"]
    assert (counts["records"], counts["train"]) == (1, 1)


def test_other_text_gives_way_to_pubmeds_and_passes_filters_of_what_it_has_not(tmp_path: Path) -> None:
    notes = ["Title 1. An abstract.", "A note.", "A note.", ""]
    (tmp_path / "notes.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in notes))
    write_file(tmp_path / "raw" / "pubmed26n0001.xml", [citation(1, "Title 1."), citation(2)])
    both = [tmp_path / "notes.jsonl", tmp_path / "raw"]
    counts = make_corpus(both, tmp_path / "a", 0, 0, 1)["counts"]
    assert sorted(texts(tmp_path / "a").values()) == ["A note.", "A title. An abstract.", "Title 1. An abstract."]
    assert {1, 2} < set(texts(tmp_path / "a"))
    assert (counts["superseded"], counts["without_title_or_abstract"], counts["duplicates"]) == (0, 1, 2)
    filters = ["corpus.profile=biogpt", "corpus.languages=eng"]
    counts = make_corpus(both, tmp_path / "b", 0, 0, 1, load_corpus_settings(None, filters))["counts"]
    kept = [row["text"] for row in rows(tmp_path / "b")["train"]]
    assert sorted(kept) == ["A note.", "A note.", "Title 1. An abstract."] and counts["other_language"] == 2


def test_other_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (good, bad, *_) = write_texts(tmp_path, ["A note."])
    (tmp_path / "broken.jsonl").write_text('{"body": "x"}\n{"body": \n')
    (tmp_path / "numbers.jsonl").write_text('{"body": 5}\n')
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "c.parquet").read_bytes()[:-30])
    paths = [good, *(tmp_path / name for name in ("broken.jsonl", "numbers.jsonl", "cut.parquet"))]
    settings = load_corpus_settings(None, ["corpus.text_column=body"])
    with pytest.raises(TasksFailed) as caught:
        make_corpus(paths, tmp_path / "corpus", 0, 0, 1, settings)
    assert [failure.split(": ")[0] for failure in caught.value.failures] == sorted(map(str, paths[1:]))
    assert not any("\n" in failure for failure in caught.value.failures)
    with pytest.raises(TasksFailed, match="has no column 'text', only id, body; set"):
        make_corpus([bad], tmp_path / "corpus", 0, 0, 1)
    (tmp_path / "a.docx").touch()
    with pytest.raises(UserError, match=r"a\.docx: neither \.xml"):
        make_corpus([tmp_path / "a.docx"], tmp_path / "corpus", 0, 0, 1)

"""data/corpus/other_text.py: the hub, from a local server that answers as huggingface.co does."""

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

import pytest

from data.corpus.build import make_corpus
from tests.data.corpus.test_build import content
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
    def log_message(self, *_: object) -> None: ...

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
    assert done.returncode == 2 and f"biogpt: error: {name}: cannot be had (" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "corpus").exists() and "Traceback" not in done.stderr


@pytest.mark.slow  # Hugging Face's client tries again for 20 seconds
def test_a_hub_that_does_not_answer_is_named(tmp_path: Path) -> None:
    done = corpus_of("hf://datasets/me/notes", "http://127.0.0.1:9", tmp_path)
    assert done.returncode == 2 and "biogpt: error: hf://datasets/me/notes: cannot be had (" in done.stderr

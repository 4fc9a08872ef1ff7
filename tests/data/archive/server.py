"""A local server in NLM's place, which can cut connections, give wrong md5s and lack files. Needs no pytest."""

import hashlib
import random
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NAMES = [f"pubmed26n000{number}.xml.gz" for number in range(1, 6)]


class Archive(ThreadingHTTPServer):
    """NLM's folders in miniature. Files 1 to 3 are the baseline, 4 and 5 updates; faults are switched on by name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = {name: random.Random(name).randbytes(400_000 + 1_000 * index)
                        for index, name in enumerate(NAMES)}  # fmt: skip
        self.ranges, self.cut_after, self.wait = True, 0, 0.0
        self.missing: set[str] = set()
        self.wrong_md5: Counter[str] = Counter()  # how often the md5 is another
        self.errors: Counter[str] = Counter()  # how often the answer is 503
        self.sent: Counter[str] = Counter()  # bytes
        self.url = f"http://127.0.0.1:{self.server_port}/pubmed/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed in the middle is no error here."""


class Handler(BaseHTTPRequestHandler):
    server: Archive  # type: ignore[assignment]

    def log_message(self, format: str, *args: Any) -> None: ...

    def do_HEAD(self) -> None:
        self.answer(200, b"", {"Content-Length": str(len(self.server.content[self.path.rsplit("/", 1)[1]]))})

    def do_GET(self) -> None:
        server, (folder, name) = self.server, self.path.rsplit("/", 2)[1:]
        of_folder = NAMES[:3] if folder == "baseline" else NAMES[3:]
        if not self.path.startswith("/pubmed/"):
            return self.answer(404)
        if name == "":
            links = "".join(f'<a href="{each}">{each}</a> <a href="{each}.md5">md5</a>\n' for each in of_folder)
            return self.answer(200, f"<html>{links}<a href='/'>up</a></html>".encode())
        known = name.removesuffix(".md5")
        if known not in of_folder or known in server.missing:
            return self.answer(404)
        content = server.content[known]
        if name != known:
            server.wrong_md5[known] -= 1
            digest = hashlib.md5(b"x" if server.wrong_md5[known] >= 0 else content).hexdigest()
            return self.answer(200, f"MD5({known})= {digest}\n".encode())
        server.errors[name] -= 1
        if server.errors[name] >= 0:
            return self.answer(503)
        start = int(self.headers.get("Range", "bytes=0-")[6:-1]) if server.ranges else 0
        if start >= len(content):
            return self.answer(416)
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        body = content[start:]
        self.answer(206 if start else 200, b"", headers | {"Content-Length": str(len(body))})
        body = body[: server.cut_after or None]
        for at in range(0, len(body), 20_000):
            self.wfile.write(body[at : at + 20_000])
            time.sleep(server.wait)
        server.sent[name] += len(body)

    def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(key, value)
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

"""Download PubMed from NLM's archive: check every file against NLM's md5, and resume where a download broke off.

The layout is that of https://ftp.ncbi.nlm.nih.gov/pubmed/: `baseline/` and `updatefiles/`, with `pubmed26n0001.xml.gz`
and `pubmed26n0001.xml.gz.md5` for each file.
"""

import hashlib
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import httpx2

from data.common.disk import disk_full, disk_full_named, is_full
from data.common.files import MANIFEST, TasksFailed, UserError, make_output_folder, read_json, write_manifest
from data.common.lease import Lease, hold
from data.common.workers import progress

BASE_URL = "https://ftp.ncbi.nlm.nih.gov/pubmed/"
TERMS = (
    "Courtesy of the U.S. National Library of Medicine. NLM's terms apply (https://www.nlm.nih.gov/databases/download/"
    "terms_and_conditions.html): say where the data come from, keep them up to date or say that they may not be, and"
    " do not imply that NLM endorses the use. Abstracts may be under their publishers' copyright."
)
ATTEMPTS = 6  # that bring no further bytes of a file; the pauses between them double
PAUSE = 1.0  # seconds before the second attempt
SPARE_DISK = 1 << 30  # bytes that must stay free
NAME = re.compile(r'href="(?:[^"]*/)?(pubmed(\d\d)n(\d{4,})\.xml\.gz)"')


def download(
    out: Path, updates: bool, year: int | None, files: tuple[int, int] | None, connections: int, base_url: str
) -> dict[str, Any]:
    """Download the baseline, and the update files too if `updates`, into `out`. Returns the folder's manifest.

    year: refuse files of another year; files: the first and the last number wanted; connections: downloads at a time;
    base_url: ends in "/". A file that is there with the right md5 is not fetched again. Raises UserError if the archive
    cannot be listed, has no such files or those of another year, or if the disk is too small; TasksFailed, which names
    each file that failed, after all others are done.
    """
    _check_manifest(out / MANIFEST)
    with httpx2.Client(timeout=60, follow_redirects=True) as client, ThreadPoolExecutor(connections) as threads:
        folders = ["baseline/", "updatefiles/"] if updates else ["baseline/"]
        urls = [url for folder in folders for url in list_archive(client, base_url + folder, year, files)]
        if not urls:
            raise UserError(f"{base_url}: holds no file that was asked for; see --files and --updates")
        with disk_full_named(out, str(out)), hold(out) as lease:
            make_output_folder(out)
            _check_room(client, threads, urls, out)
            return _download(client, threads, urls, out, base_url, lease)


def _check_manifest(path: Path) -> None:
    """UserError if a manifest is there that is not a download's: another folder would be unreadable without it."""
    try:
        foreign = path.exists() and read_json(path)["kind"] != "raw"
    except (UserError, KeyError, TypeError):
        foreign = True
    if foreign:
        raise UserError(f"{path}: is no manifest of a download; choose another --out, or move it away")


def _download(
    client: httpx2.Client, threads: ThreadPoolExecutor, urls: list[str], out: Path, base_url: str, lease: Lease
) -> dict[str, Any]:
    """Fetch files and write the manifest of their folder, which is returned."""
    failures = []
    with progress("download: files", len(urls)) as advance:
        running = [threads.submit(fetch, client, url, out, lease) for url in urls]
        try:
            for task in running:
                failure = task.result()
                advance()
                failures += [failure] if failure else []
        finally:
            for task in running:  # if the disk is full the others end too
                task.cancel()
            wait(running)
    if failures:
        raise TasksFailed(failures, len(urls))
    lease.check()
    (out / MANIFEST).unlink(missing_ok=True)
    names = {_name(url) for url in urls}
    others = sum(path.name not in names for path in out.glob("*.xml.gz"))
    counts = {"files": len(names), "bytes": sum((out / name).stat().st_size for name in names), "others": others}
    return write_manifest(out, "raw", {"source": base_url, "terms": TERMS}, counts)


def list_archive(client: httpx2.Client, folder: str, year: int | None, files: tuple[int, int] | None) -> list[str]:
    """The URLs of the wanted files in a folder of the archive, in the order of their numbers.

    year: refuse files of another year; files: the first and the last number wanted. Raises UserError if the folder
    cannot be listed or holds the files of another year.
    """
    try:
        page = client.get(folder).raise_for_status().text
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise UserError(
            f"{folder}: cannot be listed ({(str(error) or type(error).__name__).splitlines()[0]})"
        ) from None
    found = sorted({(int(number), int(of_year) + 2000, name) for name, of_year, number in NAME.findall(page)})
    others = {of_year for _, of_year, _ in found} - {year}
    if year and others:
        raise UserError(
            f"{folder}: holds the files of {max(others)}, not of {year}; NLM keeps one year; change --baseline"
        )
    first, last = files or (0, 10**9)
    return [folder + name for number, _, name in found if first <= number <= last]


def _check_room(client: httpx2.Client, threads: ThreadPoolExecutor, urls: list[str], out: Path) -> None:
    """UserError if the disk has no room for the files that are missing in `out`."""
    missing = [url for url in urls if not (out / _name(url)).is_file()]
    needed = -sum(path.stat().st_size for path in out.glob(".*.xml.gz.partial"))
    with progress("download: sizes", len(missing)) as advance:
        for size in threads.map(lambda url: _size(client, url), missing):
            needed += size
            advance()
    if shutil.disk_usage(out).free < needed + SPARE_DISK:
        raise UserError(
            f"{out}: the disk is too small; {needed / 1e9:.1f} GB are to come and {SPARE_DISK / 1e9:.1f} GB must stay"
            " free; choose another --out or fewer --files"
        )


def _name(url: str) -> str:
    return url.rsplit("/", 1)[1]


def _size(client: httpx2.Client, url: str) -> int:
    """The size of a file in bytes, or 0 if the server does not tell. Fetching the file will then say why."""
    try:
        return int(client.head(url).headers.get("content-length", 0))
    except httpx2.HTTPError:
        return 0


def fetch(client: httpx2.Client, url: str, out: Path, lease: Lease) -> str:
    """Download one file, whole and with the md5 that the archive lists. Returns the reason if that failed, or "".

    Raises DiskFull, and LeaseLost if another command writes the folder now.
    """
    path = out / _name(url)
    partial = path.with_name(f".{path.name}.partial")
    attempt, furthest, reason = 0, 0, ""
    while attempt < ATTEMPTS:
        if attempt:
            time.sleep(PAUSE * 2 ** (attempt - 1))
        try:
            expected = _md5_of(client, url)
            if path.is_file() and _md5(path) == expected:
                return ""
            _receive(client, url, partial)
            if _md5(partial) == expected:
                lease.check()
                partial.replace(path)
                return ""
            partial.unlink()
            reason = f"its md5 is not {expected}, which {url}.md5 lists"
        except (httpx2.HTTPError, ValueError, OSError) as error:
            if is_full(error):  # more attempts would end in the same way
                raise disk_full(out, str(path)) from None
            reason = f"{error or type(error).__name__}"
            if isinstance(error, httpx2.HTTPStatusError) and error.response.status_code in (401, 403, 404, 410):
                break
        reached = partial.stat().st_size if partial.exists() else 0
        attempt = 1 if reached > furthest else attempt + 1
        furthest = max(furthest, reached)
    return f"{url}: {reason.splitlines()[0]}"


def _md5_of(client: httpx2.Client, url: str) -> str:
    text = client.get(f"{url}.md5").raise_for_status().text
    found = re.search(r"\b[0-9a-f]{32}\b", text)
    if not found:
        raise ValueError(f"{url}.md5 holds no md5")
    return found[0]


def _md5(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()


def _receive(client: httpx2.Client, url: str, partial: Path) -> None:
    """Append the missing bytes of a file. If the server does not support ranges, fetch it from the start."""
    have = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == httpx2.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # all bytes are there, or too many: the md5 will tell
        response.raise_for_status()
        resumed = response.headers.get("content-range", "").startswith(f"bytes {have}-")
        with partial.open("ab" if resumed else "wb") as stream:
            for chunk in response.iter_raw():
                stream.write(chunk)
            stream.flush()
            os.fsync(stream.fileno())

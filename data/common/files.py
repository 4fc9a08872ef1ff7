"""How this project writes: folders that appear whole or not at all, each with a manifest that says what made it.

Every stage (corpus, tokenizer, shards, hf) writes one folder with a `manifest.json`:

    {"kind": "corpus", "version": 1, "made_by": "biogpt-pretrain 0.1.0",
     "request": {...},   what was asked for: the settings, and the sha256 of each input
     "counts": {...},    what the stage counted
     "files": {"train-00000.parquet": {"bytes": 123, "sha256": "..."}, ...},
     "checksum": "..."}  the sha256 of all other entries
"""

import hashlib
import importlib.metadata
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from data.common.disk import disk_full_named, is_full
from data.common.errors import DiskFull, ShareDone, TasksFailed, UserError
from data.common.lease import Lease, hold
from data.common.ownership import MANIFEST, MARKER, make_marked, remove_own

__all__ = ["MANIFEST", "DiskFull", "ShareDone", "TasksFailed", "UserError"]  # imported from here everywhere
VERSIONS = {
    "raw": 1,
    "corpus": 2,
    "tokenizer": 3,
    "shards": 1,
    "records": 1,
    "checkpoint": 1,
    "hf": 1,
    "corpus part": 4,
    "tokenizer part": 1,
    "shards part": 1,
}  # raise the version of a kind when its files change
CARD = "README.md"
"""The model card of an exported folder."""


def sha256(path: Path) -> str:
    """The hexadecimal sha256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Flush a folder to the disk, so that a rename in it survives a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A binary stream. Its bytes appear under `path` when the block ends without an error, otherwise not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            yield cast(BinaryIO, stream)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def json_bytes(content: Any) -> bytes:
    """JSON as this program writes it. The same content always gives the same bytes."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def write_json(path: Path, content: Any) -> None:
    """Write `content` as JSON, whole or not at all."""
    with whole_file(path) as stream:
        stream.write(json_bytes(content))


def read_json(path: Path) -> Any:
    """The content of a JSON file. UserError names a file that is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not JSON ({error}); make its folder again") from None


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> size in bytes and sha256, for every file below `folder` except manifests and unfinished files."""
    paths = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST and not path.name.endswith(".partial")
    )
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in paths
    }


def write_manifest(folder: Path, kind: str, request: dict[str, Any], counts: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of the finished `folder` and return it.

    It holds neither a time nor a path, so that the same work gives the same bytes.
    """
    try:
        version = importlib.metadata.version("biogpt-pretrain")
    except importlib.metadata.PackageNotFoundError:  # the program runs from a source folder
        version = "(not installed)"
    manifest = {
        "kind": kind,
        "version": VERSIONS[kind],
        "made_by": f"biogpt-pretrain {version}",
        "request": request,
        "counts": counts,
        "files": describe_files(folder),
    }
    write_json(folder / MANIFEST, seal(manifest))
    return seal(manifest)


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """A copy of the manifest with the checksum of all other entries."""
    content = {key: value for key, value in manifest.items() if key != "checksum"}
    return content | {"checksum": hashlib.sha256(json_bytes(content)).hexdigest()}


def read_manifest(folder: Path, *kinds: str) -> dict[str, Any]:
    """The manifest of a finished folder of one of these kinds.

    UserError names a folder that is missing, unfinished, of another kind or of a newer format, or whose manifest was
    changed.
    """
    kind = " or ".join(kinds)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; expected a {kind} folder")
    if not (folder / MANIFEST).is_file():
        raise UserError(f"{folder}: holds no {MANIFEST}, so it is not a finished {kind} folder")
    manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or not {"kind", "version", "request", "counts", "files"} <= manifest.keys():
        raise UserError(f"{folder / MANIFEST}: not a manifest of this program; expected a {kind} folder")
    if manifest["kind"] not in kinds:
        raise UserError(f"{folder}: is a {manifest['kind']} folder; expected a {kind} folder")
    if manifest["version"] > (ours := VERSIONS[manifest["kind"]]):
        raise UserError(
            f"{folder}: is a {manifest['kind']} folder of format {manifest['version']}; this program reads up to format"
            f" {ours}; install a newer biogpt-pretrain"
        )
    # Compare the bytes, not only the content: a flipped bit in the white space is damage too.
    if json_bytes(seal(manifest)) != (folder / MANIFEST).read_bytes():
        raise UserError(f"{folder / MANIFEST}: changed since it was written; make the folder again")
    return manifest


def verify_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Check the size and sha256 of every file of the manifest. UserError names the first missing or changed file.

    A model card may be edited.
    """
    for name, expected in manifest["files"].items():
        if name == CARD:
            continue
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing, though {MANIFEST} lists it; make the folder again")
        if path.stat().st_size != expected["bytes"] or sha256(path) != expected["sha256"]:
            raise UserError(f"{path}: changed since it was written (sha256 differs from {MANIFEST}); make it again")


def make_folder(
    out: Path,
    kind: str,
    request: dict[str, Any],
    fill: Callable[[Path], dict[str, Any]],
    lease: Lease | None = None,
) -> dict[str, Any]:
    """Make the folder `out`, whole or not at all: `fill(folder)` writes its files and returns the counts.

    lease: that of `out`, if the caller holds it; otherwise it is taken here. Returns the manifest. If `out` was made by
    the same request before, nothing is done. Raises UserError, and leaves `out` as it is, if anything else stands
    there, if another command writes it, or if the disk is full.
    """
    check_places(out, [])
    if lease is None:
        with disk_full_named(out, str(out)), hold(out) as lease:
            return make_folder(out, kind, request, fill, lease)
    if (out / MANIFEST).is_file():
        manifest = read_manifest(out, kind)
        if manifest["request"] != request or manifest["version"] != VERSIONS[kind]:
            raise UserError(f"{out}: was made from other inputs or settings; remove it or choose another --out")
        return manifest
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists and is not a finished {kind} folder; remove it or choose another --out")
    partial = out.with_name(f".{out.name}.{lease.token}.partial")
    for left in (out.with_name(f".{out.name}.partial"), *_left_partials(out)):
        remove_own(left, kind)
    try:
        with disk_full_named(partial, str(out)):
            make_marked(partial, out)
            manifest = write_manifest(partial, kind, request, fill(partial))
            lease.check()
            (partial / MARKER).unlink()
            if out.exists():
                out.rmdir()
            partial.replace(out)
            _sync_folder(out.parent)
    except UserError:
        raise
    except Exception:
        lease.check()  # a command that took the lease over removed what this one was writing
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def make_output_folder(folder: Path) -> None:
    """Make a folder for files that appear one by one. UserError if that is not possible."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if is_full(error):
            raise
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from None


def _left_partials(out: Path) -> list[Path]:
    """The folders that killed commands left half-written: beside `out`, with the token of a lease in their names."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.partial")
    return sorted(path for path in out.parent.iterdir() if pattern.fullmatch(path.name))


def check_places(out: Path, inputs: list[Path]) -> None:
    """UserError if a command would write into its inputs or into their folders, or read what it writes."""
    if out.name in ("", ".."):
        raise UserError(f"{out}: the folder to write needs a name of its own")
    target, parts = out.resolve(), parts_folder(out).resolve()
    for given in inputs:
        place = given.resolve()
        if place == target:
            raise UserError(f"--out {out}: is the input; choose another --out")
        if place in target.parents:
            raise UserError(f"--out {out}: lies inside the input {given}; choose another --out")
        if target in place.parents:
            raise UserError(f"--out {out}: holds the input {given}; choose another --out")
        if parts == place or parts in place.parents:
            raise UserError(f"{given}: is where the parts of --out {out} are kept; choose another --out")


def parts_folder(out: Path) -> Path:
    """`out.parts`, the folder beside `out` that holds the parts from which `out` is made."""
    return out.with_name(f"{out.name}.parts")


def input_name(path: Path) -> str:
    """The name of an input file. In Hugging Face's cache it is the path in the repository, with hyphens for slashes."""
    in_repository = re.search(r"/snapshots/[0-9a-f]{40}/(.+)$", path.as_posix())
    return in_repository[1].replace("/", "-") if in_repository else path.name


def input_files(paths: list[Path], advance: Callable[[], None] = lambda: None) -> dict[str, str]:
    """Name -> sha256 of input files. Calls `advance` after each. UserError names a file whose name occurs twice."""
    described: dict[str, str] = {}
    for path in paths:
        name = input_name(path)
        if name in described:
            raise UserError(f"{path}: a second input file of this name; rename one of the two")
        described[name] = sha256(path)
        advance()
    return described

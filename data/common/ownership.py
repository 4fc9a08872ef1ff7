"""What this program may remove: only what it proves to be its own. A user's files stay, and are named.

A folder is ours if one of these proves it:

- It holds MARKER, the first file that we write into a folder that is not finished.
- It holds nothing but its manifest (or receipt) of the expected kind, and files that this manifest lists.
- It holds nothing but files with the names that its kind writes. Earlier versions of the program wrote no marker, so
  this is all that tells what a killed command of theirs left.
"""

import errno
import hashlib
import json
import re
import shutil
import sys
import time
from contextlib import suppress
from pathlib import Path

from data.common.errors import UserError

MANIFEST = "manifest.json"
MARKER = ".made-by-biogpt.partial"  # files of such names are in no manifest
_SPLIT = r"(train|validation|test)"
_TOKENIZER = r"(vocab\.json|merges\.txt|tokenizer_config\.json|tokenizer\.json)"
FILES = {
    "corpus": rf"{_SPLIT}-\d+\.parquet|benchmarks\.json",
    "tokenizer": _TOKENIZER,
    "shards": rf"{_SPLIT}-\d+\.(bin|idx|bytes\.npy)|tokenizer/{_TOKENIZER}|corpus/manifest\.json",
    "hf": rf"config\.json|generation_config\.json|model\.safetensors|README\.md|{_TOKENIZER}",
    "corpus part": rf"part\.parquet|(bands|rows)\.npy|{_SPLIT}\.parquet|matches\.json",
    "tokenizer part": r"words\.json",
    "shards part": r"part\.(bin|idx|bytes\.npy|pmids\.npy)",
}  # the names of the files that each kind of folder holds, as regular expressions
PARTS = {
    "corpus part": r"\d+",  # of pass two; the parts of pass one are never removed together
    "tokenizer part": r"train-\d+\.parquet",
    "shards part": rf"{_SPLIT}-\d+-\d+",
}  # the names of the folders that hold the parts of each kind

_PARTIAL_PART = r"\.[0-9a-f]{16}\.[0-9a-z]+\.partial"  # see partial_part


def make_marked(folder: Path, shown: Path) -> None:
    """Make a folder that is not finished, with its marker. UserError names `shown` if it cannot be written."""
    try:
        folder.mkdir(parents=True)
        (folder / MARKER).touch()
    except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{shown}: cannot be written ({error.strerror})") from None


def partial_part(folder: Path, writer: str) -> Path:
    """Where a part is written before it is whole: a folder beside it, with a name of its own for each writer."""
    return folder.with_name(f".{hashlib.sha256(folder.name.encode()).hexdigest()[:16]}.{writer}.partial")


def remove_own(folder: Path, kind: str) -> None:
    """Remove a folder of this kind, if it is there and proven to be ours.

    Otherwise raises UserError, which names what is not ours, and removes nothing.
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if folder.is_symlink() or not folder.is_dir():
        raise UserError(f"{folder}: is not a folder of this program, which would write there; move it away")
    if not (folder / MARKER).exists():
        for name in _foreign(folder, kind):
            raise UserError(f"{folder / name}: is no file of this program, which would replace {folder}; move it away")
    for _ in range(50):  # a worker whose command was killed may write for some moments more
        try:
            return shutil.rmtree(folder)
        except FileNotFoundError:
            if not folder.exists():
                return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY:
                raise
        time.sleep(0.1)
    raise UserError(f"{folder}: another process writes there; run the command again once that one has ended")


def _foreign(folder: Path, kind: str) -> list[str]:
    """The names of the files below a folder without a marker that are not proven to be ours."""
    names = sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()
    )
    ours = {name for name in names if re.fullmatch(FILES[kind], _finished(name))}
    ours |= _listed(folder / MANIFEST, kind, bool(ours))
    return [name for name in names if name not in ours]


def _finished(name: str) -> str:
    """The name under which `whole_file` shows a file once it is whole: "a/.b.partial" becomes "a/b"."""
    return re.sub(r"(^|/)\.([^/]+)\.partial$", r"\1\2", name)


def _listed(path: Path, kind: str, among_ours: bool) -> set[str]:
    """The names that a manifest of this kind lists, and its own. One that is damaged still tells its names.

    among_ours: whether other files of this kind are there; then a manifest that is not even JSON is a damaged one.
    """
    own = {MANIFEST, f".{MANIFEST}.partial"}
    try:
        manifest = json.loads(path.read_bytes())
        return {*own, *manifest["files"]} if manifest["kind"] == kind else set()
    except (ValueError, OSError):
        return own if among_ours else set()
    except (KeyError, TypeError):
        return set()


def remove_parts(parts: Path, kind: str) -> None:
    """Remove the parts of this kind in a folder, and the folder if nothing else is in it. What stays is named."""
    if not parts.is_dir():
        return
    for part in sorted(parts.iterdir()):
        if re.fullmatch(rf"{PARTS[kind]}|{_PARTIAL_PART}", part.name):
            with suppress(UserError, OSError):  # it stays, and is named below
                remove_own(part, kind)
    stays = sorted(path.name for path in parts.iterdir())
    if stays:
        more = f" and {len(stays) - 1} more" if len(stays) > 1 else ""
        print(f"biogpt: {parts}: kept, because {stays[0]}{more} is no part of this program's", file=sys.stderr)
    else:
        with suppress(OSError):  # a link to a folder elsewhere
            parts.rmdir()

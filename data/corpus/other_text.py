"""Text that is not PubMed's, by the door of Hugging Face's datasets: JSON lines, Parquet, CSV, plain lines, the hub."""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.common.files import UserError

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
HUB = "hf://datasets/"  # before OWNER/NAME, as fsspec writes it


def builder_of(path: Path) -> str | None:
    """The name of the `datasets` builder that reads such a file; None where none does."""
    return BUILDERS.get(Path(path.name.removesuffix(".gz")).suffix)


def read_texts(path: Path, column: str) -> Iterator[str]:
    """The texts of a file in its order, streamed; "" where a row has none. Plain lines have no columns.

    Raises UserError, naming the file, where it cannot be read or has no such column of strings.
    """
    from datasets import load_dataset  # takes two seconds, and PubMed does not need it
    from datasets.exceptions import DatasetsError

    builder = builder_of(path)
    if not builder or not path.is_file():
        raise UserError(f"{path}: not a file that datasets reads by its name ({', '.join(BUILDERS)})")
    if not path.stat().st_size:
        return
    column = "text" if builder == "text" else column
    try:
        for row in load_dataset(builder, data_files=glob.escape(str(path)), split="train", streaming=True):
            if column not in row:
                raise UserError(f"{path}: has no column {column!r} but {', '.join(row)}; see corpus.text_column")
            if not isinstance(row[column] or "", str):
                raise UserError(f"{path}: column {column!r} holds {type(row[column]).__name__}, not text")
            yield row[column] or ""
    except StopIteration:  # of load_dataset, where all of a gzip file is empty
        return
    except (DatasetsError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})") from None


def fetch_hub_files(url: str) -> list[Path]:
    """The data files of `hf://datasets/OWNER/NAME`, or `...#CONFIGURATION`, of all splits, in Hugging Face's cache.

    Raises UserError, naming the dataset, where it cannot be had or its configuration must be named.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError
    from httpx2 import HTTPError
    from huggingface_hub import HfFileSystem, hf_hub_download

    name, _, configuration = url.removeprefix(HUB).partition("#")
    try:
        of_split = load_dataset_builder(name, configuration or None).config.data_files or {}
        files: list[Any] = [HfFileSystem().resolve_path(file) for split in of_split.values() for file in split]
        return [
            Path(hf_hub_download(file.repo_id, file.path_in_repo, repo_type="dataset", revision=file.revision))
            for file in files
        ]
    except (DatasetsError, HTTPError, ValueError, OSError) as error:
        raise UserError(f"{url}: cannot be had ({' '.join(str(error).split()) or type(error).__name__})") from None

"""Text that is not PubMed's, read by Hugging Face's datasets: JSON lines, Parquet, CSV, plain lines, the hub."""

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.common.files import UserError

BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv", ".txt": "text"}
HUB = "hf://datasets/"  # followed by OWNER/NAME, as fsspec writes it


def builder_of(path: Path) -> str | None:
    """The name of the `datasets` builder that reads such a file; None if there is none."""
    return BUILDERS.get(Path(path.name.removesuffix(".gz")).suffix)


def read_texts(path: Path, column: str) -> Iterator[str]:
    """The texts of a file in its order, streamed; "" for a row without text.

    column: the column that holds the text; plain lines have no columns. Raises UserError, which names the file, if it
    cannot be read or has no such column of strings.
    """
    from datasets import load_dataset  # takes two seconds to import, and PubMed does not need it
    from datasets.exceptions import DatasetsError

    builder = builder_of(path)
    if not builder or not path.is_file():
        raise UserError(f"{path}: not a file that datasets can read; expected one of {', '.join(BUILDERS)}")
    if not path.stat().st_size:
        return
    column = "text" if builder == "text" else column
    try:
        for row in load_dataset(builder, data_files=glob.escape(str(path)), split="train", streaming=True):
            if column not in row:
                raise UserError(f"{path}: has no column {column!r}, only {', '.join(row)}; set corpus.text_column")
            if not isinstance(row[column] or "", str):
                raise UserError(f"{path}: column {column!r} holds {type(row[column]).__name__}, not text")
            yield row[column] or ""
    except StopIteration:  # load_dataset raises it for a gzip file whose content is empty
        return
    except (DatasetsError, ValueError, OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split()) or type(error).__name__})") from None


def fetch_hub_files(url: str) -> list[Path]:
    """Download the data files of all splits of `hf://datasets/OWNER/NAME` or `...#CONFIGURATION`.

    Returns their paths in Hugging Face's cache. Raises UserError, which names the dataset, if it cannot be fetched or
    has several configurations and none is named.
    """
    from datasets import load_dataset_builder
    from datasets.exceptions import DatasetsError
    from httpx2 import HTTPError
    from huggingface_hub import HfFileSystem, hf_hub_download

    name, _, configuration = url.removeprefix(HUB).partition("#")
    try:
        files_of_split = load_dataset_builder(name, configuration or None).config.data_files or {}
        files: list[Any] = [HfFileSystem().resolve_path(file) for split in files_of_split.values() for file in split]
        return [
            Path(hf_hub_download(file.repo_id, file.path_in_repo, repo_type="dataset", revision=file.revision))
            for file in files
        ]
    except (DatasetsError, HTTPError, ValueError, OSError) as error:
        raise UserError(f"{url}: cannot be fetched ({' '.join(str(error).split()) or type(error).__name__})") from None

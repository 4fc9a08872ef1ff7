"""What a benchmark offers: its items, read from files in the format that the benchmark was published in."""

import gzip
import json
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from data.common.errors import UserError
from pretrain.tasks.figures import Answers, Figure


@dataclass(frozen=True)
class Item:
    """One item of a benchmark."""

    id: str
    """Unique in its split."""
    pmid: str
    """The PMID of its article; "" if the files do not say it."""
    split: str
    """train, validation or test."""
    text: str
    """What a classifier reads. Spans count its characters."""
    answers: Answers
    """The right answers."""
    prompt: str = ""
    """What a language model continues; "" if the task is not text to text."""
    target: str = ""
    """The right continuation. A space separates it from the prompt."""


class Task(ABC):
    """A split of a benchmark, read from a folder that holds its files, gzipped or plain."""

    name: ClassVar[str]
    labels: ClassVar[tuple[str, ...]] = ()
    """The closed set from which labels come; () if the answers are open."""
    figures: ClassVar[tuple[Figure, ...]]
    """How answers are scored."""

    def __init__(self, folder: Path, split: str) -> None:
        """Read a split: train, validation or test. Raises UserError, which names a missing or malformed file."""
        self.folder = folder
        self.items = self.read(split)

    @abstractmethod
    def read(self, split: str) -> list[Item]:
        """The items of a split, in the order of the files."""


class ChoiceTask(Task):
    """A task with a closed set of answers: a language model scores the target of each, and the likeliest is taken."""

    def choices(self) -> list[Answers]:
        """All answers that an item can have."""
        return [(label,) for label in self.labels]

    @abstractmethod
    def target(self, answers: Answers) -> str:
        """The text that gives the answers after the prompt."""


class WritingTask(Task):
    """A task with open answers: a language model writes them after the prompt."""

    @abstractmethod
    def parse(self, text: str) -> Answers:
        """The answers in a text that a model wrote."""


class SpanTask(Task):
    """A task whose answers are spans of the text, which a token classifier finds."""


class MissingFile(UserError):
    """A folder lacks a file of the benchmark."""


def read_text(folder: Path, name: str) -> tuple[Path, str]:
    """The path and the text of the file `name` or `name`.gz in a folder.

    Raises MissingFile if neither exists, and UserError, which names the file, if it cannot be read.
    """
    path = folder / name if (folder / name).is_file() else folder / f"{name}.gz"
    try:
        content = path.read_bytes()
        return path, (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFile(f"{folder}: holds neither {name} nor {name}.gz, which this benchmark reads") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); get the file again") from None


def read_object(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The path and the content of a JSON file that holds one object. Raises UserError as `read_text` does."""
    path, text = read_text(folder, name)
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error}); get the file again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object with a PMID for each key")
    return path, content


def check_fields(path: Path, pmid: str, record: Any, fields: Iterable[tuple[str, type]]) -> None:
    """Raise UserError, which names the file, the PMID and the field, if a record lacks one or holds another type."""
    for name, kind in fields:
        if not isinstance(record, dict) or not isinstance(record.get(name), kind):
            raise UserError(f"{path}: {pmid}: expected an object with {name}, a {kind.__name__}")

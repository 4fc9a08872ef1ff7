"""Settings: sections of a TOML file as pydantic models. `section.key=value` wins over the file.

All mistakes are reported together.
"""

import difflib
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from data.common.files import UserError


class Section(BaseModel):
    """A section of settings. It refuses unknown keys, and its values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


Settings = TypeVar("Settings", bound=Section)


def read_toml(path: Path) -> dict[str, Any]:
    """The sections of a TOML file. Raises FileNotFoundError if it is missing, UserError if it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})") from None


def override(settings: dict[str, Any], overrides: list[str] | tuple[str, ...], source: str) -> None:
    """Put each `section.key=value` into the settings, over what `source` says. A value is TOML or a bare word.

    Raises UserError, which names an argument of another form.
    """
    for given in overrides:
        key, equals, value = given.partition("=")
        *sections, name = key.split(".")
        if not (equals and sections and all(sections) and name):
            raise UserError(f"{given}: not of the form section.key=value, as in train.steps=100")
        table = settings
        for number, section in enumerate(sections, 1):
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                path = ".".join(sections[:number])
                raise UserError(f"{source}: {path} must be a section: [{path}]")
        table[name] = _parse_value(value)


def _parse_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def validate(model: type[Settings], settings: dict[str, Any], source: str) -> Settings:
    """The settings as a model. UserError names the source and all mistakes, and suggests a key for an unknown one."""
    try:
        return model.model_validate(settings)
    except ValidationError as error:
        mistakes = [_describe(model, entry) for entry in error.errors()]
        raise UserError(f"{source}: {'; '.join(mistakes)}") from None


def _describe(model: type[Section], entry: Any) -> str:
    location = entry["loc"]
    key = ".".join(str(part) for part in location)
    if entry["type"] != "extra_forbidden":
        return f"{key} = {entry['input']!r}: {entry['msg'][0].lower()}{entry['msg'][1:]}"
    fields: Any = model.model_fields
    known = list(fields) if len(location) == 1 else list(fields[location[0]].annotation.model_fields)
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.0)
    return f"unknown key {key}; did you mean {'.'.join([*map(str, location[:-1]), near[0]])}?"

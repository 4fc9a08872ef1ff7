"""launch/install.sh and requirements.lock: what is installed, when, and in which version."""

import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.paths import ROOT

LOCK = (ROOT / "requirements.lock").read_text().splitlines()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Stands in for Python and for .venv's: it makes a .venv with itself inside, and notes what pip is told.
STUB = """#!/usr/bin/env bash
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip"*) echo "$*" >> pip.txt ;;
esac
"""


def locked() -> dict[str, Version]:
    lines = [line.split("==") for line in LOCK if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in lines}


def requirements() -> Iterator[Requirement]:
    """The ranges of pyproject.toml, of the plain install and of each extra."""
    for lines in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        yield from (each for each in map(Requirement, lines) if each.name != PROJECT["name"])


def test_the_lock_names_every_dependency_within_its_range() -> None:
    versions = locked()
    for requirement in requirements():
        name = canonicalize_name(requirement.name)
        assert name in versions, f"requirements.lock lacks {name}"
        assert requirement.specifier.contains(versions[name]), f"{name}=={versions[name]} is not {requirement}"


def test_the_lock_is_of_no_machine() -> None:
    """No CPU build, which a GPU machine would not want; no paths, no addresses; each package once."""
    lines = [line for line in LOCK if not line.startswith("#")]
    assert all(version.local is None for version in locked().values())
    assert not [line for line in lines if "/" in line or "@" in line]
    assert len(locked()) == len(lines) and lines == sorted(lines)


def test_install_notices_what_changed(tmp_path: Path) -> None:
    shutil.copy(ROOT / "launch" / "install.sh", tmp_path)
    python = tmp_path / "python"
    python.write_text(STUB)
    python.chmod(0o755)
    for name in ("pyproject.toml", "requirements.lock"):
        (tmp_path / name).touch()

    def pip(*arguments: str) -> str:
        """What pip was told by `install ARGUMENTS`; "" where it was not called."""
        told = tmp_path / "pip.txt"
        told.unlink(missing_ok=True)
        command = ["bash", "-euc", 'source install.sh; install "$@"', "bash", *arguments]
        subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHON": str(python)}, check=True)
        return told.read_text().strip() if told.exists() else ""

    plain = "-m pip install --quiet --constraint requirements.lock --editable ."
    assert pip("") == plain and pip("test") == f"{plain}[test]"
    assert pip("") == pip("test") == ""
    later = (tmp_path / ".venv" / ".installed").stat().st_mtime + 10
    for name in ("pyproject.toml", "requirements.lock"):
        os.utime(tmp_path / name, (later, later))
        assert pip("") == plain
        os.utime(tmp_path / ".venv" / ".installed", (later, later))
        assert pip("") == ""
        later += 10
    newest = "-m pip install --quiet --upgrade --upgrade-strategy eager --editable .[test]"
    assert pip("test", "--newest") == pip("test", "--newest") == newest
    assert pip("test") == f"{plain}[test]" and pip("") == plain


@pytest.mark.slow
def test_the_newest_versions_install(tmp_path: Path) -> None:
    clone, python = tmp_path / "clone", ".venv/bin/python"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    bash = ["bash", "-euc", 'source launch/install.sh; install "" --newest']
    subprocess.run(bash, cwd=clone, env=clean, check=True, timeout=1_800)
    subprocess.run([python, "-m", "pip", "check"], cwd=clone, env=clean, check=True, timeout=120)
    biogpt = [".venv/bin/biogpt", "--version"]
    printed = subprocess.run(biogpt, cwd=clone, env=clean, check=True, timeout=120, capture_output=True, text=True)
    assert PROJECT["version"] in printed.stdout

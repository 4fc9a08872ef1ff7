"""Our packages have common names: beside a `data/` and a `model/` of the user's, ours are used, or it is said."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SHOW = "import data, model, pretrain, launch; print(data.__file__)"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the project's wheel was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    # Built from a copy: setuptools leaves a build/ folder beside the sources.
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(folder / "source")], check=True)
    subprocess.run([*pip, "--target", str(folder / "site"), str(folder / "source")], check=True)
    return folder / "site"


def namespace_folders(place: Path) -> None:
    for name in ("data", "model", "launch"):
        (place / name).mkdir(parents=True)
        (place / name / "notes.txt").write_text("mine")


def python(place: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=place, env=clean | environment, capture_output=True, text=True, timeout=120
    )


def test_plain_folders_of_these_names_do_not_matter(tmp_path: Path, wheel: Path) -> None:
    namespace_folders(tmp_path)
    editable = python(tmp_path, "-c", SHOW)
    assert editable.stdout.strip() == str(ROOT / "data" / "__init__.py"), editable.stderr
    installed = python(tmp_path, "-c", SHOW, PYTHONPATH=str(wheel))
    assert installed.stdout.strip() == str(wheel / "data" / "__init__.py"), installed.stderr


@pytest.mark.parametrize("name", ["data", pytest.param("model", marks=pytest.mark.slow)])
def test_a_foreign_package_is_named(tmp_path: Path, wheel: Path, name: str) -> None:
    namespace_folders(tmp_path)
    (tmp_path / name / "__init__.py").write_text("")
    for environment in ({}, {"PYTHONPATH": str(wheel)}):
        result = python(tmp_path, "-m", "pretrain.train", "tiny", **environment)
        lines = result.stderr.splitlines()
        assert result.returncode == 2 and len(lines) == 1 and str(tmp_path / name) in lines[0], result.stderr
        safe = python(tmp_path, "-m", "pretrain.train", "--help", PYTHONSAFEPATH="1", **environment)
        assert safe.returncode == 0, safe.stderr


def test_the_wheel_brings_recipes_and_deepspeed_files(tmp_path: Path, wheel: Path) -> None:
    code = "from pretrain.recipe import bundled_recipes; print(*bundled_recipes())"
    names = sorted(path.stem for path in (ROOT / "launch" / "recipes").glob("*.toml"))
    assert python(tmp_path, "-c", code, PYTHONPATH=str(wheel)).stdout.split() == names and len(names) > 3
    assert (wheel / "launch" / "lm_eval" / "pubmedqa").is_dir()
    assert len(list((wheel / "launch" / "deepspeed").glob("zero?.json"))) == 4
    assert (wheel / "launch" / "slurm.sbatch").exists() and (wheel / "launch" / "corpus.sbatch").exists()


def test_biogpt_train_works_beside_foreign_packages(tmp_path: Path, sample_folder: Path) -> None:
    """The console command starts its ranks with PYTHONSAFEPATH=1."""
    for name in ("data", "model", "pretrain"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('foreign')")
    biogpt = Path(sys.executable).with_name("biogpt")
    settings = [f"data.shards={sample_folder / 'shards'}", "train.steps=1", "evaluate.max_blocks=1"]
    result = subprocess.run(
        [str(biogpt), "train", "tiny", *settings], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "latest").read_text() == "step-0000001"

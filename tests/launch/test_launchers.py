"""The ways to start a run: torchrun, deepspeed by module and by file, the shell scripts."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretrain.runs import metrics, settings

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2"]
DEEPSPEED = [str(BIN / "deepspeed"), "--num_gpus", "2"]


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The few commands that the launchers need, and neither g++ nor ninja."""
    folder = tmp_path_factory.mktemp("bin")
    for name in ("bash", "sh", "env", "which", "uname", "python3", "cat", "hostname"):
        for place in ("/usr/bin", "/bin"):
            if (Path(place) / name).exists() and not (folder / name).exists():
                (folder / name).symlink_to(Path(place) / name)
    (folder / "python").symlink_to(sys.executable)
    for name in ("torchrun", "deepspeed"):
        (folder / name).symlink_to(BIN / name)
    return folder


@pytest.mark.parametrize(
    "launcher",
    [
        [*TORCHRUN, "-m", "pretrain.train"],
        [*DEEPSPEED, "--module", "pretrain.train"],
        [*DEEPSPEED, str(ROOT / "pretrain" / "train.py")],
        ["bash", str(ROOT / "launch" / "torchrun.sh")],
        ["bash", str(ROOT / "launch" / "deepspeed.sh")],
    ],
    ids=["torchrun", "deepspeed-module", "deepspeed-file", "torchrun.sh", "deepspeed.sh"],
)
def test_every_launcher_trains_without_a_compiler(
    launcher: list[str], tools: Path, sample_folder: Path, tmp_path: Path
) -> None:
    chosen = settings(sample_folder / "shards", tmp_path / "run", "train.steps=2", "evaluate.max_blocks=2")
    result = subprocess.run(
        [*launcher, "tiny", *chosen],
        cwd=tmp_path,
        env=os.environ | {"PATH": str(tools), "RANKS_PER_NODE": "2", "MASTER_PORT": "29531"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 ranks" in result.stdout
    assert list(metrics(tmp_path / "run", "train/loss")) == [1, 2]


def test_a_mistake_under_torchrun_is_one_line_of_rank_0(sample_folder: Path, tmp_path: Path) -> None:
    result = subprocess.run(
        [*TORCHRUN, "-m", "pretrain.train", "tiny", "train.stepz=1"], cwd=tmp_path, capture_output=True, text=True
    )
    ours = [line for line in result.stderr.splitlines() if line.startswith("biogpt: error:")]
    assert result.returncode != 0 and len(ours) == 1 and "did you mean train.steps?" in ours[0]

"""The ways to start a run: torchrun, deepspeed by module and by file, the shell scripts."""

import os
import signal
import subprocess
import sys
import time
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
        pytest.param([*TORCHRUN, "-m", "pretrain.train"], marks=pytest.mark.slow),
        pytest.param([*DEEPSPEED, "--module", "pretrain.train"], marks=pytest.mark.slow),
        pytest.param([*DEEPSPEED, str(ROOT / "pretrain" / "train.py")], marks=pytest.mark.slow),
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


FAKE_SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$*" >> requeued; fi
"""


def test_the_slurm_script_saves_at_the_warning_and_requeues(sample_folder: Path, tmp_path: Path) -> None:
    """With srun and scontrol of our own, for Slurm is not here; USR1 comes to the script, as `--signal=B:USR1` says."""
    (tmp_path / "bin").mkdir()
    for name, content in {"srun": '#!/usr/bin/env bash\nexec "$@"\n', "scontrol": FAKE_SCONTROL}.items():
        (tmp_path / "bin" / name).write_text(content)
        (tmp_path / "bin" / name).chmod(0o755)
    slurm = {"NNODES": "1", "NODEID": "0", "GPUS_ON_NODE": "2", "JOB_ID": "77", "JOB_NODELIST": "here"}
    environment = os.environ | {f"SLURM_{name}": value for name, value in slurm.items()}
    environment["PATH"] = f"{tmp_path / 'bin'}:{BIN}:{environment['PATH']}"
    job = ["bash", str(ROOT / "launch" / "slurm.sbatch"), "tiny"]
    chosen = settings(sample_folder / "shards", tmp_path / "my-run", "evaluate.max_blocks=2")
    process = subprocess.Popen([*job, *chosen, "train.steps=100000"], cwd=tmp_path, env=environment)
    try:
        deadline, path = time.monotonic() + 60, tmp_path / "my-run" / "metrics.jsonl"
        while not (path.exists() and max(metrics(tmp_path / "my-run", "train/loss"), default=0) >= 3):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR1)
        process.wait(60)
    finally:
        process.kill()
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    stopped = int((tmp_path / "my-run" / "latest").read_text().removeprefix("step-"))
    assert stopped == max(metrics(tmp_path / "my-run", "train/loss"))
    # The job begins again and finishes; then it is not requeued.
    subprocess.run([*job, *chosen, f"train.steps={stopped + 2}"], cwd=tmp_path, env=environment, check=True, timeout=90)
    assert (tmp_path / "requeued").read_text() == "requeue 77\n"
    assert (tmp_path / "my-run" / "latest").read_text() == f"step-{stopped + 2:07d}"


def test_the_job_array_script_does_its_share(sample_folder: Path, tmp_path: Path) -> None:
    """Two elements as Slurm would start them, then the command that finishes."""
    environment = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_COUNT": "2"}
    command = ["corpus", str(sample_folder / "raw"), "--out", "corpus"]
    for element in ("2", "1"):
        script = ["bash", str(ROOT / "launch" / "corpus.sbatch"), *command]
        job = environment | {"SLURM_ARRAY_TASK_ID": element}
        done = subprocess.run(script, cwd=tmp_path, env=job, capture_output=True, text=True, check=True)
        assert f"part {element} of 2 is done, 1 files" in done.stdout and not (tmp_path / "corpus").exists()
    subprocess.run(["biogpt", *command], cwd=tmp_path, env=environment, check=True)
    assert (tmp_path / "corpus" / "manifest.json").is_file()


def test_a_mistake_that_only_ranks_find_is_the_last_line_and_exit_code_2(sample_folder: Path, tmp_path: Path) -> None:
    """A precision that this device lacks: torchrun reports a failed rank, then biogpt says what it was."""
    chosen = settings(sample_folder / "shards", tmp_path / "run", "train.precision=fp16", "deepspeed.stage=1")
    command = [str(BIN / "biogpt"), "train", "tiny", *chosen, "--ranks", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    last = result.stderr.splitlines()[-1]
    assert result.returncode == 2 and last.startswith('biogpt: error: train.precision = "fp16": this device')

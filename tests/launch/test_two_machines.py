"""A run on two machines by launch/torchrun.sh that loses one of them, and goes on with the same curve.

The machines are two network namespaces with a cable between them. Making them needs root and `ip`.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from data.common.files import read_manifest
from tests.pretrain.runs import metrics, settings

SCRIPT = Path(__file__).parent.parent.parent / "launch" / "torchrun.sh"
CABLE = "biogpt0"  # the name of its end in each machine


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Machines:
    """Two machines, 10.77.0.1 and 10.77.0.2, and the processes of a run on them."""

    def __init__(self) -> None:
        self.names = [f"biogpt-{os.getpid()}-{node}" for node in range(2)]
        self.agents: list[subprocess.Popen[str]] = []
        for name in self.names:
            ip("netns", "add", name)
        ends = ["name", CABLE, "netns", self.names[0]], ["name", CABLE, "netns", self.names[1]]
        ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        for node, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"10.77.0.{node + 1}/24", "dev", CABLE)
            ip("-n", name, "link", "set", "lo", "up")
            ip("-n", name, "link", "set", CABLE, "up")

    def start(self, folder: Path, chosen: list[str]) -> None:
        """Start a run with one rank on each machine, as docs/clusters.md says."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        shared = {"PATH": path, "NNODES": "2", "RANKS_PER_NODE": "1", "MASTER_ADDR": "10.77.0.1"}
        self.agents = []
        for node, name in enumerate(self.names):
            core = str(node % (os.cpu_count() or 1))  # more threads than cores would only wait for each other
            environment = os.environ | shared | {"NODE_RANK": str(node), "GLOO_SOCKET_IFNAME": CABLE}
            command = ["ip", "netns", "exec", name, "taskset", "-c", core, "bash", str(SCRIPT), "tiny", *chosen]
            with (folder / f"node-{node}.log").open("w") as log:
                agent = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
            self.agents.append(agent)

    def end(self) -> list[int]:
        return [agent.wait(120) for agent in self.agents]

    def kill(self, node: int) -> None:
        """Everything that runs on a machine, at once."""
        if self.agents and self.agents[node].poll() is None:
            agent = psutil.Process(self.agents[node].pid)
            for process in [*agent.children(recursive=True), agent]:
                process.kill()
            self.agents[node].wait()

    def cable(self, state: str) -> None:
        ip("-n", self.names[1], "link", "set", CABLE, state)

    def close(self) -> None:
        for node, name in enumerate(self.names):
            self.kill(node)
            ip("netns", "del", name)


@pytest.fixture
def machines() -> Iterator[Machines]:
    try:
        made = Machines()
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot make network namespaces: {error}")
    yield made
    made.close()


def wait_for_step(run: Path, step: int) -> None:
    deadline = time.monotonic() + 90
    while not (run / "metrics.jsonl").exists() or max(metrics(run, "train/loss"), default=0) < step:
        assert time.monotonic() < deadline, "the run does not move"
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_that_loses_a_machine_goes_on_with_the_same_curve(
    machines: Machines, sample_folder: Path, tmp_path: Path
) -> None:
    """First its processes are killed, then its cable is cut, which no process of the other machine is told."""
    few = ["train.steps=300", "checkpoint.every_steps=20", "evaluate.max_blocks=2", "train.hang_minutes=0.1"]
    runs = [tmp_path / "whole", tmp_path / "lost"]
    whole, lost = (settings(sample_folder / "shards", run, *few, "model.hidden_dropout_prob=0.1") for run in runs)
    machines.start(tmp_path, whole)
    assert machines.end() == [0, 0], (tmp_path / "node-0.log").read_text()

    machines.start(tmp_path, lost)
    wait_for_step(runs[1], 50)
    machines.kill(1)
    assert machines.agents[0].wait(90) != 0

    machines.start(tmp_path, lost)
    wait_for_step(runs[1], 150)
    machines.cable("down")
    assert machines.agents[0].wait(90) != 0
    assert "biogpt: error: rank 1 (process " in (tmp_path / "node-0.log").read_text()
    machines.kill(1)
    machines.cable("up")

    machines.start(tmp_path, lost)
    assert machines.end() == [0, 0], (tmp_path / "node-0.log").read_text()
    assert "resumed from step-00001" in (tmp_path / "node-0.log").read_text()
    for name in ("train/loss", "validation/loss", "train/gradient_norm"):
        assert metrics(runs[0], name) == metrics(runs[1], name), name
    ends = [read_manifest(run / "checkpoints" / "step-0000300", "checkpoint")["files"] for run in runs]
    assert ends[0] == ends[1] and len(metrics(runs[1], "train/loss")) == 300

"""The distributed test harness: N ranks are started once and run many cases (importing deepspeed costs 5 s each time).

ranks = Ranks(2); results = ranks.run(case, argument)     # case(argument) on every rank; a result for each rank
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    from pretrain.engine import init_distributed

    init_distributed()
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send((True, function(*arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


class Ranks:
    """A process group on gloo. A case that fails or hangs ends it; the next case starts a new one."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, case: Callable[..., Any], *arguments: Any, timeout: float = 180) -> list[Any]:
        """`case(*arguments)` on every rank at once; the function has to be importable. Results in rank order."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((case, arguments))
        results = []
        for rank, pipe in enumerate(self._pipes):
            try:
                answered, value = pipe.recv() if pipe.poll(timeout) else (False, f"no answer within {timeout} s")
            except EOFError:
                answered, value = False, "ended"
            if not answered:
                self.close()
                raise AssertionError(f"rank {rank} of {self.size}: {value}")
            results.append(value)
        return results

    def _start(self) -> None:
        from pretrain.engine import free_port

        context, port = multiprocessing.get_context("spawn"), free_port()
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, theirs), daemon=True)
            process.start()
            theirs.close()  # so that the end of a killed rank is seen
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

"""`pretrain.train` with a fault: HANG=1 lets rank 1 loop for ever at step 5; FSYNC=60 lets one fsync of each
checkpoint sleep 60 seconds.

HANG=1 torchrun ... -m tests.pretrain.hanging RECIPE ...
"""

import os
import time
from pathlib import Path
from typing import Any

from pretrain import train

sync, seed_draws = os.fsync, train.seed_draws


def slow_fsync(descriptor: int) -> None:
    if Path(f"/proc/self/fd/{descriptor}").readlink().name == "model.safetensors":
        time.sleep(float(os.environ["FSYNC"]))
    sync(descriptor)


def loops_for_ever(seed: int, step: int, rank: int) -> Any:
    while str(rank) == os.environ["HANG"] and step == 4:
        time.sleep(0.1)
    return seed_draws(seed, step, rank)


if __name__ == "__main__":
    if "FSYNC" in os.environ:
        os.fsync = slow_fsync
    if "HANG" in os.environ:
        train.seed_draws = loops_for_ever
    train.main()

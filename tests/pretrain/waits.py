"""What a step waits for, counted on a CPU, where the same calls are made and cost nothing."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero")
"""Operations whose result the host must know: `item`, `float`, `bool` and indices that are not known before."""
READS = ("tolist", "numpy", "cpu")
"""Methods that copy to the host. On a CPU they are no operations."""


class Waits(TorchDispatchMode):
    """Counts the operations that wait for the device while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        masks = [each for each in (args[1] if name in ("index", "index_put_") else ()) if each is not None]
        self.counts[name] += name in WAITS or any(mask.dtype == torch.bool for mask in masks)
        return func(*args, **(kwargs or {}))


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """What waits for the device in a `with` block: operation or method -> how often."""

    def counted(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *arguments: Any, **more: Any) -> Any:
            mode.counts[name] += 1
            return method(tensor, *arguments, **more)

        return call

    mode, originals = Waits(), {name: getattr(torch.Tensor, name) for name in READS}
    for name, method in originals.items():
        setattr(torch.Tensor, name, counted(name, method))
    try:
        with mode:
            yield mode.counts
    finally:
        for name, method in originals.items():
            setattr(torch.Tensor, name, method)

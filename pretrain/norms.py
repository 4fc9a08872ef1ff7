"""Norms of the gradients and weights of a run, by the kind of module that they belong to."""

import math
from collections.abc import Iterable

import torch

from pretrain.tensor_file import Fragment


def group(name: str) -> str:
    """The kind of module that a parameter belongs to: "layers.qkv_proj" for "layers.3.qkv_proj.weight"."""
    return ".".join(part for part in name.split(".")[:-1] if not part.isdigit())


def squared_norms(fragments: Iterable[Fragment]) -> dict[str, float]:
    """The sum of the squares of each group's numbers. Numbers of low precision are squared and summed in fp32."""
    norms: dict[str, list[torch.Tensor]] = {}
    for name, _, values in fragments:
        norms.setdefault(group(name), []).append(torch.linalg.vector_norm(values, dtype=torch.float32))
    if not norms:
        return {}
    sums = torch.stack([torch.stack(each).double().square().sum() for each in norms.values()])
    return dict(zip(norms, sums.tolist(), strict=True))


def whole_norms(parts: list[dict[str, float]]) -> dict[str, float]:
    """The norms of the groups, from the squared norms of the parts that the ranks hold."""
    groups = {group: None for part in parts for group in part}  # a set would have another order on each rank
    return {group: math.sqrt(sum(part.get(group, 0.0) for part in parts)) for group in groups}

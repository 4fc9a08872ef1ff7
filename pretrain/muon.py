"""Muon (Jordan et al. 2024): the update of a hidden matrix is its momentum, made nearly orthogonal.

Under ZeRO a matrix may lie on several ranks. Its momentum is kept where its weights are, number by number, as ZeRO and
the checkpoints expect. For the update each matrix is brought together on one rank, which makes it orthogonal and sends
the other ranks their parts. Nothing is written into the gradients.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from pretrain.tensor_file import Fragment

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration in https://kellerjordan.github.io/posts/muon."""
ITERATIONS = 5
UPDATE_SCALE = 0.2
"""Liu et al. 2025 (arXiv 2502.16982), equation 4: an update is about as large as AdamW's, so one rate serves both."""
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
Shape = tuple[int, int]


def orthogonalize(matrix: Tensor, precision: torch.dtype) -> Tensor:
    """The matrix with all its singular values moved to about 1 (0.7 to 1.2), by Newton and Schulz's iteration.

    The products are computed in `precision`. A matrix of zeros stays zero.
    """
    a, b, c = COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    wide = ((matrix.T if tall else matrix) / matrix.norm().clamp(min=1e-30)).to(precision)
    for _ in range(ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return (wide.T if tall else wide).to(matrix.dtype)


def work(shape: Shape) -> int:
    """Multiply-adds of one iteration."""
    small, large = sorted(shape)
    return small * small * (2 * large + small)


class Part(NamedTuple):
    """A run of numbers of a flattened matrix, which one rank holds."""

    matrix: int
    """The matrix's number in the order of the model."""
    start: int
    length: int


class Holding:
    """The matrices that one call of `Muon.step` updates: who holds which of their numbers, and who works on which."""

    def __init__(self, shapes: list[Shape], own: list[Part]) -> None:
        """shapes: of all matrices of the model. own: what this rank holds. Every rank must call it."""
        self.rank, self.ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._shapes = shapes
        held: list[list[Part]] = [own] * self.ranks
        if self.ranks > 1:
            dist.all_gather_object(held, own)
        self._parts = [{part.matrix: part for part in parts} for parts in held]  # for each rank
        self.owners = self._choose_owners()
        """Matrix -> the rank that makes it orthogonal."""
        pairs = [(one, other) for one in range(self.ranks) for other in range(self.ranks)]
        self.gathers = any(self.gathered(*pair) for pair in pairs)
        self.scatters = any(self.scattered(*pair) for pair in pairs)
        self.sent = {part.matrix for rank in range(self.ranks) for part in self.scattered(self.rank, rank)}
        """The matrices of ours that other ranks have numbers of."""

    def _choose_owners(self) -> dict[int, int]:
        """The rank that holds most of a matrix, unless it has its share of the work; then the one with the least."""
        matrices = sorted({matrix for parts in self._parts for matrix in parts})
        loads, owners = [0.0] * self.ranks, {}
        share = sum(work(self._shapes[matrix]) for matrix in matrices) / self.ranks
        for matrix in matrices:
            held = [parts[matrix].length if matrix in parts else 0 for parts in self._parts]
            owner, cost = held.index(max(held)), work(self._shapes[matrix])
            if loads[owner] + cost / 2 > share:
                owner = loads.index(min(loads))
            owners[matrix] = owner
            loads[owner] += cost
        return owners

    def _whole(self, rank: int, matrix: int) -> bool:
        rows, columns = self._shapes[matrix]
        return matrix in self._parts[rank] and self._parts[rank][matrix].length == rows * columns

    def gathered(self, sender: int, owner: int) -> list[Part]:
        """The parts that an owner needs from another rank. At stage 0 it has all numbers itself."""
        parts = self._parts[sender].values() if sender != owner else ()
        return [part for part in parts if self.owners[part.matrix] == owner and not self._whole(owner, part.matrix)]

    def scattered(self, owner: int, receiver: int) -> list[Part]:
        """The parts of finished updates that another rank needs from their owner."""
        parts = self._parts[receiver].values() if receiver != owner else ()
        return [part for part in parts if self.owners[part.matrix] == owner]

    def exchange(
        self, route: Callable[[int, int], list[Part]], find: Callable[[Part], Tensor], like: Tensor
    ) -> list[tuple[Part, Tensor]]:
        """Send what `find` finds and return what the other ranks sent. route: `gathered` or `scattered`."""
        to = [route(self.rank, rank) for rank in range(self.ranks)]
        of = [route(rank, self.rank) for rank in range(self.ranks)]
        counts, expected = ([sum(part.length for part in parts) for parts in way] for way in (to, of))
        received = like.new_empty(sum(expected))
        sent = torch.cat([find(part) for parts in to for part in parts] or [like.new_empty(0)])
        dist.all_to_all_single(received, sent, expected, counts)
        parts = [part for parts in of for part in parts]
        return list(zip(parts, received.split([part.length for part in parts]), strict=True))


class Own(NamedTuple):
    """This rank's part of a matrix, and views of its numbers."""

    part: Part
    weights: Tensor
    momentum: Tensor
    gradient: Tensor | None


class Muon(torch.optim.AdamW):
    """Muon for groups with the key "matrices", torch's AdamW for the others. The momentum is Nesterov's.

    "matrices": for each parameter of the group by name, the shapes of the matrices that are stacked in it. Call
    `locate` before the first step. A matrix whose gradient is all zeros is left as it is, with its momentum: LayerDrop
    has skipped it in all micro-batches of the step, and it would take a full step along old momentum.
    """

    def __init__(self, groups: list[dict[str, Any]], momentum: float, precision: str, **adamw: Any) -> None:
        super().__init__(groups, **adamw)
        self._beta, self._precision = momentum, PRECISIONS[precision]
        self._shapes: list[Shape] = []
        self._addresses: dict[Part, int] = {}
        self._holdings: dict[int, Holding] = {}

    def locate(self, fragments: Iterable[Fragment]) -> None:
        """Learn which numbers of which matrices this rank holds. fragments: views of the optimizer's own parameters."""
        views = {name: (start, values) for name, start, values in fragments}
        stacks = [stack for group in self.param_groups for stack in group.get("matrices", {}).items()]
        for name, stacked in stacks:
            start, values = views.get(name, (0, torch.empty(0)))
            reached = 0
            for rows, columns in stacked:
                first, last = max(start, reached), min(start + values.numel(), reached + rows * columns)
                if first < last:
                    part = Part(len(self._shapes), first - reached, last - first)
                    self._addresses[part] = values[first - start :].data_ptr()
                self._shapes.append((rows, columns))
                reached += rows * columns

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all groups. At ZeRO 1 to 3 their parameters are flat pieces, and DeepSpeed may call it for each."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if "matrices" not in group]
        super().step()
        self.param_groups = groups
        for group in groups:
            if group["params"] and "matrices" in group:
                self._update(group)

    def _update(self, group: dict[str, Any]) -> None:
        own, like = self._own(group["params"]), group["params"][0]
        if like.data_ptr() not in self._holdings:
            self._holdings[like.data_ptr()] = Holding(self._shapes, [each.part for each in own.values()])
        holding = self._holdings[like.data_ptr()]
        moved = self._moved(own, holding, like)
        for matrix, each in own.items():
            if each.gradient is not None:  # a weight of 0 leaves the momentum as it is, to the last bit
                each.momentum.lerp_(each.gradient, (1 - self._beta) * moved[matrix])

        def unfinished(part: Part) -> Tensor:
            _, _, momentum, gradient = own[part.matrix]
            return momentum if gradient is None else torch.lerp(gradient, momentum, self._beta)

        def apply(part: Part, update: Tensor) -> None:
            rate = group["lr"] * moved[part.matrix]
            scale = UPDATE_SCALE * max(self._shapes[part.matrix]) ** 0.5
            own[part.matrix].weights.mul_(1 - rate * group["weight_decay"]).sub_(update * (rate * scale))

        pieces: dict[int, dict[Part, Tensor]] = {}
        for part, piece in holding.exchange(holding.gathered, unfinished, like) if holding.gathers else ():
            pieces.setdefault(part.matrix, {})[part] = piece
        finished: dict[int, Tensor] = {}
        for matrix in (matrix for matrix, owner in holding.owners.items() if owner == holding.rank):
            parts, mine = pieces.pop(matrix, {}), own[matrix].part if matrix in own else None
            if mine:
                parts[mine] = unfinished(mine)
            whole = torch.cat([parts[part] for part in sorted(parts)]).view(self._shapes[matrix])
            update = orthogonalize(whole, self._precision).flatten()
            if mine:
                apply(mine, part_of(update, mine))
            if matrix in holding.sent:
                finished[matrix] = update
        if holding.scatters:
            for part, update in holding.exchange(
                holding.scattered, lambda part: part_of(finished[part.matrix], part), like
            ):
                apply(part, update)

    def _own(self, parameters: list[Tensor]) -> dict[int, Own]:
        """This rank's numbers of the matrices that lie in these parameters, by matrix."""
        found = {}
        for parameter in parameters:
            state, begin = self.state[parameter], parameter.data_ptr()
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(parameter)
            for part, address in self._addresses.items():
                offset = (address - begin) // parameter.element_size()
                if 0 <= offset < parameter.numel():
                    tensors = (parameter, state["momentum"], parameter.grad)
                    views = [None if each is None else each.view(-1)[offset:][: part.length] for each in tensors]
                    found[part.matrix] = Own(part, *views)  # type: ignore[arg-type]
        return found

    def _moved(self, own: dict[int, Own], holding: Holding, like: Tensor) -> Tensor:
        """For each matrix of the model 1.0 if its gradient is not all zeros, on any rank."""
        moved = torch.zeros(len(self._shapes), device=like.device)
        for matrix, each in own.items():
            if each.gradient is not None:
                moved[matrix] = each.gradient.abs().amax() > 0
        if holding.gathers:
            dist.all_reduce(moved, dist.ReduceOp.MAX)
        return moved


def part_of(flat: Tensor, part: Part) -> Tensor:
    """The numbers of a part of a flattened matrix."""
    return flat[part.start :][: part.length]

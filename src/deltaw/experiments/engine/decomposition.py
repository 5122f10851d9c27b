"""Lengths and directions: what a change does to the rows of a weight, what chance does, and a look at both in a bank.

By rows of W and W′ = W + ΔW, ΔM = mean | ‖W′‖ − ‖W‖ | and ΔD = mean (1 − cos(W′, W)): equations 3 and 4 of Liu et al. 2024
(arXiv 2402.09353). The experiment is `dora_directions`.
"""

import re
from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Generator, Tensor, nn

from ...linear import AdaptedLinear
from ...wrappers import named_wrappers

TRAINED, SAME_RANK, FULL_RANK = "trained", "random, same rank", "random, full rank"  # of what kind a change is
KINDS = {"attention.self.query": "query", "attention.self.key": "key", "attention.self.value": "value",
         "attention.output.dense": "attention output", "intermediate.dense": "up", "output.dense": "down"}  # MiniLM's
BITS = 12  # of a number that is kept: one part in 4000


def changes(weight: Tensor, delta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ΔM, the same with each row's in units of its length, and ΔD: `(*K)` each, for W `(out, in)` and ΔW `(*K, out, in)`.

    1 − cos loses its digits where ΔW is small: give float64.
    """
    new = weight + delta  # (*K, out, in)
    before, after = weight.norm(dim=-1), new.norm(dim=-1)  # (out,), (*K, out)
    moved = (after - before).abs()  # (*K, out)
    cosine = (new * weight).sum(-1) / (after * before)  # (*K, out)
    return moved.mean(-1), (moved / before).mean(-1), (1 - cosine).mean(-1)


def along(weight: Tensor, delta: Tensor) -> Tensor:
    """The part of ‖ΔW‖² along the rows of W `(out, in)`, times in: `(*K)`. Chance gives 1, and in is the most."""
    unit = weight / weight.norm(dim=-1, keepdim=True)  # (out, in)
    return weight.shape[-1] * (delta * unit).sum(-1).square().sum(-1) / delta.square().sum((-2, -1))


def random_like(delta: Tensor, rank: int | None, draws: Sequence[Generator]) -> Tensor:
    """Random changes `(K, out, in)`, each of its own generator, with ‖·‖ of delta's: of that rank, or of full rank (None)."""
    _, out, in_ = delta.shape

    def normal(*shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=draw, device=delta.device) for draw in draws]).to(delta.dtype)

    change = normal(out, in_) if rank is None else normal(out, rank) @ normal(rank, in_)  # (K, out, in)
    return change * (delta.norm(dim=(1, 2)) / change.norm(dim=(1, 2)))[:, None, None]


def kept(values: Tensor) -> Tensor:
    """The values rounded to `BITS` binary digits, of which a file takes little space."""
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**BITS).round(), exponent - BITS)


class Watch:
    """For `Bank.fit(watch=…)` on MiniLM: looks at the slots' weights at checkpoints, in float64.

    Beside each it draws random changes of the same size, of a rank and of full rank, new ones at every checkpoint.

    Args:
        at: after how many updates the checkpoints are.
        seeds: of the slots, from which the random changes are drawn.
        ranks: of the slots' changes; None for full rank, where the one random change is the other, too.
    """

    def __init__(self, at: Collection[int], seeds: Sequence[int], ranks: Sequence[int | None]):
        self.at, self.seeds, self.ranks = set(at), list(seeds), list(ranks)
        self.seen: dict[int, list[dict]] = {slot: [] for slot in range(len(self.seeds))}

    def __call__(self, updates: int, model: nn.Module, slots: list[int]) -> None:
        if updates not in self.at:
            return
        layers = {name: layer for name, layer in named_wrappers(model) if isinstance(layer, AdaptedLinear)}
        device = next(iter(layers.values())).weight.device
        draws = [Generator(device).manual_seed(1_000_003 * self.seeds[slot] + updates) for slot in slots]
        for name, layer in layers.items():
            number, kind = re.search(r"layer\.(\d+)\.(.+)$", name).groups()
            for i, found in self._of_layer(layer, slots, draws):
                self.seen[slots[i]].append({"step": updates, "layer": int(number), "kind": KINDS[kind], **found})

    def _of_layer(self, layer: AdaptedLinear, slots: list[int], draws: list[Generator]) -> Iterator[tuple[int, dict]]:
        """Each change of a layer: whose it is, counted in the stack, and what it does."""
        weight, delta = layer.weight.detach().double(), layer.delta_weight(torch.float64)  # (out, in), (K, out, in)
        own = {"size": delta.norm(dim=(1, 2)) / weight.norm(), "along": along(weight, delta)}  # (K,) each
        yield from _by_slot(TRAINED, weight, delta, range(len(slots)), own)
        for rank in sorted({self.ranks[slot] for slot in slots} - {None}):
            have = [i for i, slot in enumerate(slots) if self.ranks[slot] == rank]
            random = random_like(delta[have], rank, [draws[i] for i in have])  # (have, out, in)
            yield from _by_slot(SAME_RANK, weight, random, have)
        yield from _by_slot(FULL_RANK, weight, random_like(delta, None, draws), range(len(slots)))


def _by_slot(change: str, weight: Tensor, delta: Tensor, slots: Collection[int], own: dict[str, Tensor] | None = None
             ) -> Iterator[tuple[int, dict]]:
    """The rows of some slots' changes `(slots, out, in)`; ΔM/m too, with what else there is of their own."""
    moved, relative, turned = changes(weight, delta)  # (slots,) each
    values = {"ΔM": moved, "ΔD": turned} | ({"ΔM/m": relative, **own} if own else {})
    columns = {name: kept(value).tolist() for name, value in values.items()}
    for j, slot in enumerate(slots):
        yield slot, {"change": change, **{name: column[j] for name, column in columns.items()}}

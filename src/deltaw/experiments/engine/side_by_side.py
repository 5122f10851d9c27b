"""Runs under different optimizers, side by side on one frozen model: what a run trains is a row of one matrix.

A `deltaw.Bank` trains all its slots by one optimizer. Here some rows are given to one optimizer and some to another. It may be
any of `torch.optim` that treats every entry by itself; Muon takes the rows apart into their matrices.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...claims.two_forms import orthogonalized
from ...tasks import Task

Shape = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Slot:
    """A run.

    Attributes:
        name: to find it by.
        optimizer: what slots share that are given to one optimizer, with `trains_mixer`.
        make: a parameter `(k, P)` and the shapes of the matrices in its rows → the optimizer.
        clip: changes the gradient `(k, P)` in place, row by row, and gives the share that it changed, `(k,)`; or None.
        numbers: A `(r, in)`, B `(out, r)` and M `(r, r)` of each layer, by their names in the model.
        trains_mixer: whether M is trained.
    """

    name: tuple[str, ...]
    optimizer: tuple[str, float]
    make: Callable[[nn.Parameter, list[Shape]], torch.optim.Optimizer]
    clip: Callable[[Tensor], Tensor] | None
    numbers: Mapping[str, Tensor]
    trains_mixer: bool = False


class Part:
    """Some rows and columns of the matrix, and the optimizer they are given to.

    Attributes:
        weights: `(k, P)`, a view of the matrix.
        clipped: the share of the gradients that was clipped, summed over the steps, `(k,)`.
    """

    def __init__(self, matrix: Tensor, rows: slice, columns: slice, make: Callable, clip: Callable | None = None):
        self.rows, self.columns, self.clip = rows, columns, clip
        self.weights = nn.Parameter(matrix.detach()[rows, columns])
        self.optimizer = make(self.weights)
        self.clipped = matrix.new_zeros(len(self.weights))  # (k,)

    def step(self, gradient: Tensor) -> None:
        """`gradient` is the whole matrix's, `(K, P)`."""
        self.weights.grad = gradient[self.rows, self.columns]
        if self.clip is not None:
            self.clipped += self.clip(self.weights.grad)
        self.optimizer.step()


class SideBySide(nn.Module):
    """The model with K slots in it: it gets every example K times, slot by slot.

    Args:
        model: with MoSLoRA attached, the scale s = 1, and with `Heads` for its head.
        slots: those of one optimizer and with the same `trains_mixer` side by side. All have the same names and shapes.
        head: its tensors by their names in the model; each slot gets a copy.
        head_rate: of Adam, which trains the heads whatever trains the rest.
        device: to train on.

    Raises:
        ValueError: if two slots have one name.
    """

    def __init__(self, model: nn.Module, slots: Sequence[Slot], head: Mapping[str, Tensor], head_rate: float, device: str):
        super().__init__()
        self.model, self.device = model.to(device).requires_grad_(False).eval(), device
        self.places = {slot.name: place for place, slot in enumerate(slots)}
        if len(self.places) < len(slots):
            raise ValueError(f"the slots' names must differ: {[slot.name for slot in slots]}")
        names = sorted(slots[0].numbers, key=lambda name: name.endswith(".M"))  # what may be fixed comes last
        self.shapes = {name: tuple(slots[0].numbers[name].shape) for name in names}
        ends = [sum(rows * columns for name, (rows, columns) in self.shapes.items() if mixers or not name.endswith(".M"))
                for mixers in (False, True)]
        rows = [torch.cat([slot.numbers[name].flatten() for name in names] + [part.flatten() for part in head.values()])
                for slot in slots]  # (P,) each
        self.shapes |= {name: tuple(part.shape) for name, part in head.items()}
        self.matrix = torch.stack(rows).to(device).requires_grad_()  # (K, P)

        self.parts, first = [], 0
        for _, group in itertools.groupby(slots, key=lambda slot: (slot.optimizer, slot.trains_mixer)):
            group = list(group)
            shapes = [shape for name, shape in self.shapes.items()
                      if name not in head and (group[0].trains_mixer or not name.endswith(".M"))]
            place = slice(first, first + len(group)), slice(0, ends[group[0].trains_mixer])
            self.parts.append(Part(self.matrix, *place, partial(group[0].make, shapes=shapes), group[0].clip))
            first += len(group)
        place = slice(0, len(slots)), slice(ends[True], None)
        self.heads = Part(self.matrix, *place, lambda weights: torch.optim.Adam([weights], lr=head_rate))

    def __len__(self) -> int:
        return len(self.places)

    def numbers(self) -> dict[str, Tensor]:
        """The slots' tensors by name, `(K, …)`."""
        columns = self.matrix.split([torch.Size(shape).numel() for shape in self.shapes.values()], dim=1)  # (K, size) each
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(self.shapes.items(), columns)}

    def forward(self, **inputs: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):  # the faster kernels' gradients add up in an order that varies
            return functional_call(self.model, self.numbers(), (), inputs)

    def step(self, task: Task, batch: Mapping[str, Tensor]) -> Tensor:
        """One update of all slots on the same batch; their losses before it, `(K,)`."""
        folded = {name: tensor.to(self.device).expand(len(self), *tensor.shape).flatten(0, 1)  # (K · batch, …)
                  for name, tensor in batch.items()}
        losses = task.losses(self, folded).unflatten(0, (len(self), -1)).mean(dim=1)  # (K,)
        losses.sum().backward()  # each slot's own gradients: no loss depends on another slot's row
        for part in (*self.parts, self.heads):
            part.step(self.matrix.grad)
        self.matrix.grad = None
        return losses.detach()

    def clipped(self) -> list[float]:
        """The share of its gradients that each slot's clipping has changed, summed over the steps; 0 without clipping."""
        return torch.cat([part.clipped for part in self.parts]).tolist()

    @torch.no_grad()
    def products(self) -> Iterator[Tensor]:
        """ΔW of each layer, `(K, out, in)` in float64."""
        numbers = self.numbers()
        for name in numbers:
            if name.endswith(".A"):
                a, m, b = (numbers[name[:-1] + factor].double() for factor in "AMB")  # (K, r, in), (K, r, r), (K, out, r)
                yield b @ m @ a

    def distances(self, one: Sequence[int], other: Sequence[int]) -> tuple[list[float], list[float]]:
        """‖ΔW − ΔW′‖ / ‖ΔW‖ of the slots at these places from those, and ‖ΔW‖, over all layers together."""
        apart = size = torch.zeros(len(one), dtype=torch.float64, device=self.device)
        for product in self.products():
            mine = product[one]  # (pairs, out, in)
            size = size + torch.linalg.vector_norm(mine, dim=(1, 2)).square()  # (pairs,)
            apart = apart + torch.linalg.vector_norm(mine - product[other], dim=(1, 2)).square()
        return (apart / size).sqrt().tolist(), size.sqrt().tolist()


class Heads(nn.Module):
    """K linear layers, each for its own part of the examples. `weight` is `(K, out, in)`, `bias` `(K, out)`."""

    def __init__(self, like: nn.Linear):
        super().__init__()
        self.weight, self.bias = nn.Parameter(like.weight[None]), nn.Parameter(like.bias[None])

    def forward(self, x: Tensor) -> Tensor:
        """`(K · batch, in)` to `(K · batch, out)`."""
        x = x.unflatten(0, (len(self.weight), -1))  # (K, batch, in)
        return torch.baddbmm(self.bias[:, None], x, self.weight.mT).flatten(0, 1)


# ---------------------------------------------------------------------------------------------------------------------
# What does not treat each entry by itself


class Muon(torch.optim.Optimizer):
    """`two_forms.Muon` for rows `(k, P)` that hold matrices of these shapes."""

    def __init__(self, weights: nn.Parameter, shapes: Sequence[Shape], lr: float, momentum: float = 0.95):
        super().__init__([weights], {"lr": lr, "momentum": momentum})
        self.shapes = list(shapes)

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        (weights,) = group["params"]
        mean = self.state[weights].setdefault("mean", torch.zeros_like(weights))  # (k, P)
        mean.lerp_(weights.grad, 1 - group["momentum"])
        weights -= group["lr"] * self._updates(weights.grad.lerp(mean, group["momentum"]))  # Nesterov's

    def _updates(self, ahead: Tensor) -> Tensor:
        """Of the matrices in the rows `(k, P)`, orthogonalized, those of one shape together; `(k, P)`."""
        parts = [part.unflatten(1, shape)  # (k, rows, columns)
                 for part, shape in zip(ahead.split([rows * columns for rows, columns in self.shapes], dim=1), self.shapes)]
        for rows, columns in set(self.shapes):
            places = [i for i, shape in enumerate(self.shapes) if shape == (rows, columns)]
            same = torch.stack([parts[i] for i in places], dim=1)  # (k, n, rows, columns)
            new = max(1, rows / columns) ** 0.5 * vmap(vmap(orthogonalized))(same)
            for i, part in zip(places, new.unbind(dim=1)):
                parts[i] = part
        return torch.cat([part.flatten(1) for part in parts], dim=1)


def clip_by_norm(most: float) -> Callable[[Tensor], Tensor]:
    """Shrink each row to that norm, as `torch.nn.utils.clip_grad_norm_` does with all parameters of one run."""

    def clip(gradient: Tensor) -> Tensor:
        norm = gradient.norm(dim=1)  # (k,)
        gradient.mul_((most / (norm + 1e-6)).clamp(max=1)[:, None])
        return (norm > most).to(gradient.dtype)

    return clip


def clip_by_value(most: float) -> Callable[[Tensor], Tensor]:
    """Each entry to −most … most."""

    def clip(gradient: Tensor) -> Tensor:
        changed = (gradient.abs() > most).to(gradient.dtype).mean(dim=1)  # (k,)
        gradient.clamp_(-most, most)
        return changed

    return clip

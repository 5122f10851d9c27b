"""K modules of one kind as one: their tensors get a leading axis of K. And the optimizers for what they train."""

import copy
import itertools
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from .adapters import Adapter
from .train import Recipe, up_side_of

if TYPE_CHECKING:
    from .bank import Run


class StackedAdapters(Adapter):
    """A layer's adapters of K slots: a stacked one for each kind, ranks padded with zeros to the largest.

    Args:
        parts: adapters whose tensors have a leading axis.
        sizes: how long that is in each of them; K in all.
        rates: of dropout, of each slot.
    """

    def __init__(self, parts: Sequence[Adapter], sizes: Sequence[int], rates: Sequence[float]):
        super().__init__()
        self.parts, self.sizes = nn.ModuleList(parts), list(sizes)
        differ = len(set(rates)) > 1
        self.dropout = torch.tensor(rates).to(next(self.parameters()))[:, None, None] if differ else rates[0]  # (K, 1, 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        factors = [part.factors() for part in self.parts]  # (Kᵢ, rᵢ, in), (Kᵢ, out, rᵢ)
        if len(factors) == 1:
            return factors[0]
        rank = max(down.shape[-2] for down, _ in factors)
        down = torch.cat([F.pad(down, (0, 0, 0, rank - down.shape[-2])) for down, _ in factors])  # (K, r, in)
        up = torch.cat([F.pad(up, (0, rank - up.shape[-1])) for _, up in factors])  # (K, out, r)
        return down, up

    def gain(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor | None:
        factors = zip(down.split(self.sizes), up.split(self.sizes))
        gains = [part.gain(weight, *own) for part, own in zip(self.parts, factors)]  # (Kᵢ, out), or None
        if all(gain is None for gain in gains):
            return None
        ones = [up.new_ones(size, up.shape[-2]) for size in self.sizes]  # (Kᵢ, out)
        return torch.cat([one if gain is None else gain for gain, one in zip(gains, ones)])  # (K, out)


class StackedHead(nn.Module):
    """K copies of a module whose tensors have a leading axis of K: each gets its own part of the examples."""

    def __init__(self, module: nn.Module, slots: int):
        super().__init__()
        self.module, self.slots = module, slots

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Tensors `(K · batch, …)`, and whatever else the module takes, to tensors `(K · batch, …)`."""
        inputs, form = tree_flatten((args, kwargs))
        inputs = [leaf.unflatten(0, (self.slots, -1)) if isinstance(leaf, Tensor) else leaf for leaf in inputs]
        axes = [0 if isinstance(leaf, Tensor) else None for leaf in inputs]

        def one(state: dict[str, Tensor], inputs: list[Any]) -> Any:
            return functional_call(self.module, state, *tree_unflatten(inputs, form))

        state = dict(itertools.chain(self.module.named_parameters(), self.module.named_buffers()))  # (K, …) each
        outputs = vmap(one, in_dims=(0, axes), randomness="different")(state, inputs)  # (K, batch, …)
        return tree_map_only(Tensor, lambda tensor: tensor.flatten(0, 1), outputs)


class Block:
    """What slots of one kind train, as a matrix with a row a slot.

    Args:
        part: "adapters" or "heads": which modules of the runs.
        runs: of a stack's slots.
        rows: which of the runs.
        device: to train on.
        compile: whether to compile the optimizer's step, which makes one kernel of it.

    Attributes:
        modules: the runs' modules, stacked.
        weights: `(K, P)`; the parameters of `modules` are views of its columns.
        moments: the optimizer's, `(moments, K, P)`, in fp32 or better, as all arithmetic with them.
    """

    def __init__(self, part: str, runs: "Sequence[Run]", rows: slice, device: torch.device, compile: bool = False):
        self.part, self.runs, self.rows = part, runs[rows], rows
        recipes, members = [run.recipe for run in self.runs], [getattr(run, part) for run in self.runs]
        rule = recipes[0].optimizer
        self.step = torch.compile(_step, dynamic=False) if compile else _step
        self.rule = UPDATES[rule]
        parameters = list(members[0].parameters())
        self.sizes = [parameter.numel() for parameter in parameters]
        flat = [torch.cat([p.detach().flatten() for p in member.parameters()]) for member in members]  # (P,) each
        self.weights = torch.stack(flat).to(device)  # (K, P)
        exact = torch.promote_types(self.weights.dtype, torch.float32)
        self.moments = torch.zeros(MOMENTS[rule], *self.weights.shape, dtype=exact, device=device)
        for run, moments in zip(self.runs, self.moments.unbind(1)):  # (moments, P) each
            if part in run.moments:
                moments.copy_(run.moments[part])
        self.settings = {name: table.to(exact).to(device) for name, table in settings(recipes).items()}  # (steps, K, 1)

        # Of the rates of those that have one of their own to the recipe's.
        up_side, is_head = up_side_of(members[0]), part == "heads"
        apart = torch.cat([torch.full((p.numel(),), is_head or p in up_side) for p in parameters])  # (P,)
        ratios = [(recipe.head_learning_rate or recipe.learning_rate) / recipe.learning_rate if is_head else
                  recipe.lora_plus_ratio for recipe in recipes]
        ratio = torch.tensor(ratios, dtype=exact)[:, None]  # (K, 1)
        self.ratio = torch.where(apart, ratio, 1.0).to(device) if (ratio != 1).any() else 1.0  # (K, P)

        # The first slot's modules are copied with every tensor replaced by the one of all slots.
        columns = self.weights.split(self.sizes, dim=1)
        stacked = {id(p): nn.Parameter(column.view(-1, *p.shape)) for p, column in zip(parameters, columns)}  # (K, …)
        for buffers in zip(*(member.buffers() for member in members), strict=True):
            stacked[id(buffers[0])] = _together(buffers).to(device)  # (K, …)
        self.modules = copy.deepcopy(members[0], stacked)

    def gradient(self) -> Tensor:
        """`(K, P)`."""
        parts = []
        for parameter in self.modules.parameters():
            part = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parts.append(part.reshape(len(part), -1).to(self.moments.dtype))  # (K, size)
        return torch.cat(parts, dim=1)

    def let_go(self) -> None:
        """Of the parameters' own gradients."""
        for parameter in self.modules.parameters():
            parameter.grad = None

    @torch.no_grad()
    def update(self, gradient: Tensor, shrink: Tensor, alive: Tensor, at: Tensor) -> None:
        """One step of the optimizer down `shrink` · `gradient`, `(K, 1)` and `(K, P)`.

        Rows that are not `alive`, `(K, 1)`, stay as they are. `at` is which step it is, `(1,)`, on the device.
        """
        now = {name: table.index_select(0, at)[0] for name, table in self.settings.items()}  # (K, 1) each
        self.step(self.rule, self.weights, gradient, self.moments, shrink, alive, self.ratio, now)

    @torch.no_grad()
    def unstack(self) -> None:
        """Give the runs their numbers."""
        for run, row, moments in zip(self.runs, self.weights, self.moments.unbind(1)):
            run.moments[self.part] = moments
            for parameter, values in zip(getattr(run, self.part).parameters(), row.split(self.sizes)):
                parameter.copy_(values.view_as(parameter))


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """`(K, …)`. What all slots have in common, as VeRA's A and B, is there once."""
    if all(torch.equal(tensor, tensors[0]) for tensor in tensors):
        return tensors[0].expand(len(tensors), *tensors[0].shape)
    return torch.stack(list(tensors))


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers with settings for each slot, in torch's order of operations


def settings(recipes: Sequence[Recipe]) -> dict[str, Tensor]:
    """What an optimizer has to know at each step of each slot, `(steps, K, 1)` in float64."""
    steps = range(recipes[0].steps)
    beta1, beta2 = torch.tensor([recipe.betas for recipe in recipes], dtype=torch.float64).T  # (K,)
    t = torch.arange(1.0, len(steps) + 1, dtype=torch.float64)[:, None]  # (steps, 1)
    values = {
        "rate": [[recipe.learning_rate_at(step) for recipe in recipes] for step in steps],
        "weight_decay": [recipe.weight_decay for recipe in recipes],
        "momentum": [recipe.momentum for recipe in recipes],
        "eps": [recipe.eps for recipe in recipes],
        "new1": 1 - beta1,  # the weight of the new gradient in its running mean
        "new2": 1 - beta2,
        "bias1": 1 - beta1**t,  # what the weights of a mean that began with zero add up to
        "bias2": 1 - beta2**t,
    }
    return {name: torch.as_tensor(value, dtype=torch.float64).expand(len(steps), len(recipes))[..., None]
            for name, value in values.items()}


def _step(
    rule: Callable, weights: Tensor, gradient: Tensor, moments: Tensor, shrink: Tensor, alive: Tensor, ratio: Tensor | float,
    now: dict[str, Tensor],
) -> None:
    """An optimizer's step, of the rows that are alive; see `Block.update`."""
    at = SimpleNamespace(**now)
    at.rate = torch.where(alive, at.rate * ratio, 0.0)  # (K, 1), or (K, P) with LoRA+
    new = weights.to(gradient.dtype)  # itself, but of a bf16 base's head
    rule(new, torch.where(alive, gradient * shrink, 0.0), moments, at)
    weights.copy_(new)


def _sgd(weights: Tensor, gradient: Tensor, moments: Tensor, at: SimpleNamespace) -> None:
    (velocity,) = moments
    velocity.mul_(at.momentum).add_(gradient + at.weight_decay * weights)
    weights.sub_(at.rate * velocity)


def _adam(weights: Tensor, gradient: Tensor, moments: Tensor, at: SimpleNamespace) -> None:
    _adam_step(weights, gradient + at.weight_decay * weights, moments, at)


def _adamw(weights: Tensor, gradient: Tensor, moments: Tensor, at: SimpleNamespace) -> None:
    weights.mul_(1 - at.rate * at.weight_decay)  # decoupled: the decay does not go through the moments
    _adam_step(weights, gradient, moments, at)


def _adam_step(weights: Tensor, gradient: Tensor, moments: Tensor, at: SimpleNamespace) -> None:
    mean, square = moments
    mean.lerp_(gradient, at.new1)
    square.lerp_(gradient.square(), at.new2)
    weights.sub_(at.rate / at.bias1 * mean / (square.sqrt() / at.bias2.sqrt() + at.eps))


UPDATES = {"sgd": _sgd, "adam": _adam, "adamw": _adamw}
MOMENTS = {"sgd": 1, "adam": 2, "adamw": 2}

"""Beyond appendix A of MoSLoRA: whole training runs, merged and unmerged, under many optimizers.

The appendix compares one step of SGD and concludes about "the optimization process". Here both forms are trained
side by side in float64, from B = 0, with the mixer fixed unless it says otherwise. The rule that the runs obey:
merging a fixed mixer is invisible when the mixer is a symmetry of the optimizer.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import claim, require

RANK = 4
Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Sign(torch.optim.Optimizer):
    """X − η sign(∂L/∂X)."""

    def __init__(self, params: list[nn.Parameter], lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()


ROTATING: dict[str, Optimizer] = {
    "SGD": partial(torch.optim.SGD, lr=0.02),
    "momentum": partial(torch.optim.SGD, lr=0.01, momentum=0.9),
    "Nesterov": partial(torch.optim.SGD, lr=0.01, momentum=0.9, nesterov=True),
    "weight decay": partial(torch.optim.SGD, lr=0.02, weight_decay=0.1),
}
CLIPPED = partial(torch.optim.SGD, lr=0.1)
ELEMENTWISE: dict[str, Optimizer] = {
    "Adam": partial(torch.optim.Adam, lr=0.02),
    "AdamW": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.05),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01),
    "sign": partial(Sign, lr=0.01),
}


def orthogonal(seed: int = 1) -> Tensor:
    """A rotation that mixes every direction."""
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(RANK, RANK, generator=g, dtype=torch.float64)).Q


def signed_permutation(seed: int = 1) -> Tensor:
    """A permutation with signs: the orthogonal matrices that move entries and never mix them."""
    g = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (RANK,), generator=g).double() * 2 - 1
    return torch.eye(RANK, dtype=torch.float64)[torch.randperm(RANK, generator=g)] * signs


def any_mixer(seed: int = 1) -> Tensor:
    """Nothing special."""
    return torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(
    optimizer: Optimizer,
    mixer: Tensor,
    steps: int,
    train_mixer: bool = False,
    clip: Callable[[list[nn.Parameter]], Any] = lambda parameters: None,
    merged_optimizer: Optimizer | None = None,
) -> list[float]:
    """How far the products of the unmerged and the merged run are apart after each step, relative to their size.

    The unmerged one trains A and B (and M), the merged one Â = M A and B, both from B = 0, on the same batches.
    """
    import deltaw as dw

    g = torch.Generator().manual_seed(0)
    weight, start = torch.randn(10, 12, generator=g).double(), torch.randn(RANK, 12, generator=g).double()
    inputs, targets = torch.randn(steps, 16, 12, generator=g).double(), torch.randn(steps, 16, 10, generator=g).double()

    def run(spec: dw.Spec, make: Optimizer, **values: Tensor) -> list[Tensor]:
        layer = nn.Linear(12, 10, bias=False, dtype=torch.float64)
        model = dw.attach(nn.Sequential(layer), spec)
        adapter = model[0].adapter
        with torch.no_grad():
            layer.weight.copy_(weight)
            for name, value in values.items():
                getattr(adapter, name).copy_(value)
        parameters = list(adapter.parameters())
        stepper, products = make(parameters), []
        for x, y in zip(inputs, targets, strict=True):
            stepper.zero_grad()
            (torch.tanh(model(x)) - y).square().mean(0).sum().backward()
            clip(parameters)
            stepper.step()
            products.append(model[0].delta_weight())  # (out, in)
        return products

    unmerged = run(dw.MoSLoRA(RANK, mixer=mixer, train_mixer=train_mixer), optimizer, A=start)
    merged = run(dw.LoRA(RANK), merged_optimizer or optimizer, A=mixer @ start)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(unmerged, merged, strict=True)]


def clip_by_norm(parameters: list[nn.Parameter]) -> None:
    """To a global norm so small that it acts."""
    torch.nn.utils.clip_grad_norm_(parameters, 2.0)


def clip_by_value(parameters: list[nn.Parameter]) -> None:
    """Each entry, to what A's gradient exceeds once B has grown; B's gradient is the same in both forms."""
    torch.nn.utils.clip_grad_value_(parameters, 0.1)


@claim("symmetry-first-step", "From B = 0 the merged and the unmerged form take the same first step of SGD, whatever the mixer.",
       "this book, after MoSLoRA, appendix A.3", "holds", "measured at this scale")  # fmt: skip
def first_step() -> dict[str, Any]:
    """Trained mixers, too, as long as there is no weight decay: A W would decay twice, Â once."""
    fixed = apart(ROTATING["SGD"], any_mixer(), 2)
    trained = apart(ROTATING["SGD"], any_mixer(), 2, train_mixer=True)
    require(max(fixed[0], trained[0]) < 1e-13, f"apart at step 1: {fixed[0]:.1e} fixed, {trained[0]:.1e} trained")
    require(min(fixed[1], trained[1]) > 1e-4, f"together at step 2: {fixed[1]:.1e} fixed, {trained[1]:.1e} trained")
    return {"step 1": max(fixed[0], trained[0]), "step 2, fixed": fixed[1], "step 2, trained": trained[1]}


@claim("symmetry-rotations", "A fixed orthogonal mixer stays invisible for 200 steps of SGD, momentum, Nesterov, weight decay and "
       "clipping by the global norm.", "this book, beyond MoSLoRA, appendix A.4", "holds", "measured at this scale")  # fmt: skip
def rotations() -> dict[str, Any]:
    found = {name: max(apart(make, orthogonal(), 200)) for name, make in ROTATING.items()}
    found["clipping by norm"] = max(apart(ROTATING["SGD"], orthogonal(), 200, clip=clip_by_norm))
    require(max(found.values()) < 1e-10, f"apart: {found}")
    return found


@claim("symmetry-a5", "The optimization process is the same if and only if W is a fixed orthogonal matrix.", "MoSLoRA, appendix A.5",
       "holds if the optimizer commutes with rotations, as SGD does and Adam does not", "measured at this scale")  # fmt: skip
def appendix_conclusion() -> dict[str, Any]:
    """Under element-wise optimizers a fixed orthogonal mixer is seen at the second step, when A first moves; with
    clipping by value, when A's gradient is first clipped."""
    found = {name: max(apart(make, orthogonal(), 2)) for name, make in ELEMENTWISE.items()}
    found["SGD, clipping by value"] = max(apart(CLIPPED, orthogonal(), 100, clip=clip_by_value))
    require(min(found.values()) > 1e-3, f"not apart: {found}")
    require(max(apart(ROTATING["SGD"], orthogonal(), 100)) < 1e-10, "SGD parts as well")
    return found


@claim("symmetry-signed-permutations", "A fixed signed permutation stays invisible for 200 steps of Adam, AdamW, Adagrad, RMSprop, "
       "sign descent, and clipping by value.", "this book", "holds", "measured at this scale")  # fmt: skip
def signed_permutations() -> dict[str, Any]:
    found = {name: max(apart(make, signed_permutation(), 200)) for name, make in ELEMENTWISE.items()}
    found["SGD, clipping by value"] = max(apart(CLIPPED, signed_permutation(), 200, clip=clip_by_value))
    require(max(found.values()) < 1e-10, f"apart: {found}")
    return found


@claim("symmetry-scaled", "A fixed mixer c·Q, Q orthogonal, is invisible under SGD once A's rate is divided by c².", "this book",
       "holds if there is neither coupled weight decay nor clipping by the global norm", "measured at this scale")  # fmt: skip
def scaled() -> dict[str, Any]:
    """Merged, Â = c Q A: its gradient is that of A divided by c, and its step c times as large as A's."""
    c = 3.0

    def slower(parameters: list[nn.Parameter], **options: Any) -> torch.optim.Optimizer:
        """A, the first parameter of the unmerged form, at a rate divided by c²."""
        a, *others = parameters
        return torch.optim.SGD([{"params": [a], "lr": 0.005 / c**2}, {"params": others}], lr=0.005, **options)

    plain = partial(torch.optim.SGD, lr=0.005)
    found = {
        "one rate": max(apart(plain, c * orthogonal(), 50)),
        "A's rate / c²": max(apart(slower, c * orthogonal(), 50, merged_optimizer=plain)),
        "with weight decay": max(apart(partial(slower, weight_decay=1.0), c * orthogonal(), 50,
                                       merged_optimizer=partial(plain, weight_decay=1.0))),
        "with clipping": max(apart(slower, c * orthogonal(), 50, clip=clip_by_norm, merged_optimizer=plain)),
    }  # fmt: skip
    require(found["A's rate / c²"] < 1e-10, f"apart: {found}")
    require(min(value for name, value in found.items() if name != "A's rate / c²") > 1e-5, f"not apart: {found}")
    return found

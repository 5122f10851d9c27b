"""A mixer left between A and B, and the same mixer merged into A: both trained side by side, in float64.

In our notation ΔW = B M A, and merging is Â = M A. Which optimizers see the difference, for which M?
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import measure

if TYPE_CHECKING:
    import pandas

RANK = 4
EQUAL = 1e-9  # runs whose products differ by less, relative to their size, at every step count as equal


class Sign(torch.optim.Optimizer):
    """X − η sign(∂L/∂X)."""

    def __init__(self, params: list[nn.Parameter], lr: float):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter -= group["lr"] * parameter.grad.sign()


class Muon(torch.optim.Optimizer):
    """X − η orthogonalized(momentum of ∂L/∂X), as torch.optim.Muon without weight decay, Newton–Schulz in `dtype`."""

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, dtype: torch.dtype = torch.float64):
        super().__init__(params, {"lr": lr, "momentum": momentum, "dtype": dtype})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                mean = self.state[parameter].setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                ahead = parameter.grad.lerp(mean, group["momentum"])  # Nesterov's
                update = orthogonalized(ahead.to(group["dtype"])).to(parameter.dtype)
                rows, columns = parameter.shape
                parameter -= group["lr"] * max(1, rows / columns) ** 0.5 * update


def orthogonalized(gradient: Tensor) -> Tensor:
    """U f(Σ) Vᵀ for the gradient U Σ Vᵀ, with f(σ) near 1: five steps of the quintic Newton–Schulz iteration."""
    wide = gradient if gradient.shape[0] <= gradient.shape[1] else gradient.mT
    x = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if gradient.shape[0] <= gradient.shape[1] else x.mT


# ---------------------------------------------------------------------------------------------------------------------
# Mixers


def orthogonal(seed: int = 1) -> Tensor:
    """A rotation (or reflection) that mixes every direction."""
    return torch.linalg.qr(torch.randn(RANK, RANK, generator=_generator(seed), dtype=torch.float64)).Q


def signed_permutation(seed: int = 1) -> Tensor:
    """A permutation with signs: the orthogonal matrices that move entries and never mix them."""
    g = _generator(seed)
    signs = torch.randint(0, 2, (RANK,), generator=g).double() * 2 - 1
    return torch.eye(RANK, dtype=torch.float64)[torch.randperm(RANK, generator=g)] * signs


def any_mixer(seed: int = 1) -> Tensor:
    """Nothing special: Gaussian, of about an orthogonal matrix's size."""
    return torch.randn(RANK, RANK, generator=_generator(seed), dtype=torch.float64) / RANK**0.5


@dataclass(frozen=True)
class Mixer:
    """M at the start, and whether it is trained."""

    start: Callable[[], Tensor]
    trained: bool = False


MIXERS = {
    "signed permutation": Mixer(signed_permutation),
    "orthogonal": Mixer(orthogonal),
    "2 × orthogonal": Mixer(lambda: 2 * orthogonal()),
    "random": Mixer(any_mixer),
    "orthogonal, trained": Mixer(orthogonal, trained=True),
}

# ---------------------------------------------------------------------------------------------------------------------
# Optimizers, each with its symmetries: the M for which mapping A to M A and ∂L/∂A to M⁻ᵀ ∂L/∂A maps its steps alike


def is_orthogonal(mixer: Tensor) -> bool:
    """M Mᵀ = 1?"""
    return torch.allclose(mixer @ mixer.mT, torch.eye(len(mixer), dtype=mixer.dtype), atol=1e-12)


def is_signed_permutation(mixer: Tensor) -> bool:
    """Orthogonal with entries −1, 0, 1?"""
    return is_orthogonal(mixer) and bool(((mixer.abs() - mixer.abs().round()).abs() < 1e-12).all())


@dataclass(frozen=True)
class Rule:
    """An optimizer at a rate that is stable here, clipping included.

    Attributes:
        make: parameters → torch optimizer.
        symmetries: is the mixer one of them?
        clip: done to the gradients before each step.
    """

    make: Callable[..., torch.optim.Optimizer]
    symmetries: Callable[[Tensor], bool]
    clip: Callable[[list[nn.Parameter]], Any] = lambda parameters: None


def clip_by_norm(parameters: list[nn.Parameter]) -> None:
    """To a global norm so small that it acts."""
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)


def clip_by_value(parameters: list[nn.Parameter]) -> None:
    """Each entry, to what A's gradient exceeds once B has grown; B's gradient is the same in both forms."""
    torch.nn.utils.clip_grad_value_(parameters, 0.05)


sgd = torch.optim.SGD
RULES = {
    "SGD": Rule(partial(sgd, lr=0.02), is_orthogonal),
    "momentum": Rule(partial(sgd, lr=0.005, momentum=0.9), is_orthogonal),
    "Nesterov": Rule(partial(sgd, lr=0.005, momentum=0.9, nesterov=True), is_orthogonal),
    "SGD, decay": Rule(partial(sgd, lr=0.02, weight_decay=0.02), is_orthogonal),
    "SGD, norm clip": Rule(partial(sgd, lr=0.02), is_orthogonal, clip_by_norm),
    "Muon": Rule(partial(Muon, lr=0.02), is_orthogonal),
    "SGD, value clip": Rule(partial(sgd, lr=0.05), is_signed_permutation, clip_by_value),
    "sign": Rule(partial(Sign, lr=0.005), is_signed_permutation),
    "RMSprop": Rule(partial(torch.optim.RMSprop, lr=0.005), is_signed_permutation),
    "Adagrad": Rule(partial(torch.optim.Adagrad, lr=0.05), is_signed_permutation),
    "Adam": Rule(partial(torch.optim.Adam, lr=0.01), is_signed_permutation),
    "AdamW": Rule(partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1), is_signed_permutation),
}


# ---------------------------------------------------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Run:
    """ΔW `(out, in)` and the loss after and before each step."""

    products: list[Tensor]
    losses: list[float]


def run(spec: Any, make: Callable[..., torch.optim.Optimizer], steps: int, clip: Callable = lambda parameters: None, **start: Tensor) -> Run:
    """Train one adapter of the library on a small regression; `start` overwrites its parameters and buffers."""
    import deltaw as dw

    g = _generator(0)
    weight = torch.randn(10, 12, generator=g).double() / 12**0.5  # (out, in)
    teacher = weight + torch.randn(10, RANK, generator=g).double() @ torch.randn(RANK, 12, generator=g).double() / 12**0.5
    inputs = torch.randn(steps, 32, 12, generator=g).double()  # (steps, batch, in)

    layer = nn.Linear(12, 10, bias=False, dtype=torch.float64)
    model = dw.attach(nn.Sequential(layer), spec)
    adapter = model[0].adapter
    with torch.no_grad():
        layer.weight.copy_(weight)
        for name, value in start.items():
            getattr(adapter, name).copy_(value)
    parameters = list(adapter.parameters())
    optimizer, products, losses = make(parameters), [], []
    for x in inputs:
        optimizer.zero_grad()
        loss = (torch.tanh(model(x)) - torch.tanh(x @ teacher.mT)).square().mean(0).sum()
        loss.backward()
        clip(parameters)
        optimizer.step()
        losses.append(loss.item())
        products.append(model[0].delta_weight())
    return Run(products, losses)


def start_of_a() -> Tensor:
    """A `(r, in)` before the first step."""
    return measure.draw(2, RANK, 12) / 12**0.5


def both_forms(rule: Rule, mixer: Mixer, steps: int, merged_make: Callable | None = None) -> tuple[Run, Run]:
    """The unmerged run, which trains A and B (and M), and the merged one, Â = M A and B, from B = 0, on the same batches."""
    import deltaw as dw

    start, m = start_of_a(), mixer.start()  # (r, in), (r, r)
    unmerged = run(dw.MoSLoRA(RANK, mixer=m, train_mixer=mixer.trained), rule.make, steps, rule.clip, A=start)
    merged = run(dw.LoRA(RANK), merged_make or rule.make, steps, rule.clip, A=m @ start)
    return unmerged, merged


def apart(rule: Rule, mixer: Mixer, steps: int, merged_make: Callable | None = None) -> list[float]:
    """‖ΔW − ΔŴ‖ / ‖ΔŴ‖ after each step."""
    unmerged, merged = both_forms(rule, mixer, steps, merged_make)
    return _distances(unmerged, merged)


def compare(steps: int = 200) -> "pandas.DataFrame":
    """Every optimizer with every mixer.

    Returns:
        One row a pair: optimizer, mixer, apart (the largest distance of any step), equal (is it below `EQUAL`?),
        predicted (is the mixer fixed, and a symmetry of the optimizer?), and loss, the larger of both forms' mean
        loss over the last tenth as a share of the first step's.
    """
    import pandas

    rows = []
    for name, rule in RULES.items():
        for called, mixer in MIXERS.items():
            forms = both_forms(rule, mixer, steps)
            distance = max(_distances(*forms))
            last = max(sum(form.losses[-(steps // 10) :]) / (steps // 10) / form.losses[0] for form in forms)
            predicted = not mixer.trained and rule.symmetries(mixer.start())
            rows.append((name, called, distance, distance < EQUAL, predicted, last))
    return pandas.DataFrame(rows, columns=["optimizer", "mixer", "apart", "equal", "predicted", "loss"])


def _distances(unmerged: Run, merged: Run) -> list[float]:
    return [measure.apart(a, b) for a, b in zip(unmerged.products, merged.products, strict=True)]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)

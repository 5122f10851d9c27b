"""What training MoSLoRA's mixer does (chapter 6): three terms, a balance between the factors, a rate of its own.

ΔW = B M A with s = 1; G is ∂L/∂ΔW, Â = M A and B̂ = B M.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import claim, require
from .measure import apart, draw, largest
from .moslora import BOOK, IN, OUT, layer
from .two_forms import RANK, any_mixer, orthogonal, run, start_of_a

if TYPE_CHECKING:
    import numpy as np

SGD = torch.optim.SGD


class Rates(NamedTuple):
    """Of the three factors."""

    a: float
    m: float
    b: float


class Terms(NamedTuple):
    """What a step of B, of M and of A adds to ΔW, to first order, `(out, in)` each."""

    b: Tensor
    m: Tensor
    a: Tensor


def terms(a: Tensor, m: Tensor, b: Tensor, gradient: Tensor, rates: Rates) -> Terms:
    """Under SGD: −η_B G ÂᵀÂ, −η_M BBᵀ G AᵀA and −η_A B̂B̂ᵀ G, with Â = M A and B̂ = B M."""
    down, up = m @ a, b @ m  # (r, in), (out, r)
    return Terms(-rates.b * gradient @ down.mT @ down, -rates.m * b @ b.mT @ gradient @ a.mT @ a,
                 -rates.a * up @ up.mT @ gradient)  # fmt: skip


class Loss:
    """Not a quadratic one: of a weight `(out, in)`, the mean square of tanh(x Wᵀ) − tanh(x Tᵀ)."""

    def __init__(self, seed: int = 20, in_: int = IN, out: int = OUT):
        self.x, self.target = draw(seed, 32, in_), draw(seed + 1, out, in_) / in_**0.5  # (n, in), (out, in)

    def __call__(self, weight: Tensor) -> Tensor:
        return (torch.tanh(F.linear(self.x, weight)) - torch.tanh(F.linear(self.x, self.target))).square().mean(0).sum()

    def gradient(self, weight: Tensor) -> Tensor:
        weight = weight.detach().requires_grad_()
        return torch.autograd.grad(self(weight), weight)[0]


def weight_of(model: nn.Sequential) -> Tensor:
    """W + ΔW `(out, in)`, through which gradients flow to the factors."""
    down, up = model[0].adapter.factors()
    return model[0].weight + up @ down


def descend(model: nn.Sequential, loss: Callable[[Tensor], Tensor], rates: Rates, steps: int) -> None:
    """SGD on what the adapter trains of A, M and B, in place."""
    each = {"A": rates.a, "M": rates.m, "B": rates.b}
    names, parameters = zip(*model[0].adapter.named_parameters())
    for _ in range(steps):
        gradients = torch.autograd.grad(loss(weight_of(model)), parameters)
        with torch.no_grad():
            for name, parameter, gradient in zip(names, parameters, gradients):
                parameter -= each[name] * gradient


@claim("moslora-three-terms", "To first order a step of SGD changes ΔW by −(η_B G ÂᵀÂ + η_M BBᵀ G AᵀA + η_A B̂B̂ᵀ G), with "
       "Â = MA and B̂ = BM, and each of the three lowers the loss.", BOOK, "holds", "proved")  # fmt: skip
def three_terms(factor: float = 1.0) -> dict[str, Any]:
    """The odd part of a step in its size, against the library's MoSLoRA on a loss that is not quadratic."""
    import deltaw as dw

    loss, rates, size = Loss(), Rates(0.3, 0.7, 1.1), 1e-4
    start = {"A": draw(2, RANK, IN) / IN**0.5, "M": any_mixer(), "B": draw(4, OUT, RANK) / 3}
    before = layer(dw.MoSLoRA(RANK), **start)
    gradient = loss.gradient(weight_of(before))
    expected = terms(start["A"], start["M"], start["B"], gradient, rates)
    ahead, back = (layer(dw.MoSLoRA(RANK), **start) for _ in range(2))
    descend(ahead, loss, Rates(*(size * rate for rate in rates)), 1)
    for group, rate in zip("AMB", rates):  # a step up instead of down
        parameter = getattr(before[0].adapter, group)
        step = torch.autograd.grad(loss(weight_of(before)), parameter)[0]
        with torch.no_grad():
            getattr(back[0].adapter, group).add_(size * rate * step)
    change = (ahead[0].delta_weight() - back[0].delta_weight()) / (2 * size)
    error = apart(change, expected.b + factor * expected.m + expected.a)
    require(error < 1e-6, f"off by {error:.1e}")
    falls = [(gradient * term).sum().item() for term in expected]
    squares = [-rates.b * (gradient @ start["A"].mT @ start["M"].mT).square().sum().item(),
               -rates.m * (start["B"].mT @ gradient @ start["A"].mT).square().sum().item(),
               -rates.a * ((start["B"] @ start["M"]).mT @ gradient).square().sum().item()]  # fmt: skip
    agree = all(abs(x - y) < 1e-12 and x < 0 for x, y in zip(falls, squares, strict=True))
    require(agree, f"the loss changes by {falls}, not {squares}")
    return {"error": error} | {f"share of {name} in the fall": fall / sum(falls) for name, fall in zip("BMA", falls)}


@claim("moslora-onset",
       "From B = 0, training the mixer changes ΔW only from the third power of the rate on, as a step of A does.",
       BOOK, "holds", "proved")  # fmt: skip
def onset(power: int = 3) -> dict[str, Any]:
    """After n steps of SGD, trained − fixed = −η³ (n²(n−1)/2 G ÂᵀK A + n(n−1)(n−2)/6 G AᵀKᵀÂ) + O(η⁴), with K = Â GᵀG Aᵀ
    and G at the start: checked for two rates at n = 2 and 4."""
    import deltaw as dw

    loss, m, a = Loss(), any_mixer(), draw(2, RANK, IN) / IN**0.5
    gradient, down = loss.gradient(layer(dw.LoRA(RANK))[0].weight), m @ a  # (out, in), (r, in)
    k, errors = down @ gradient.mT @ gradient @ a.mT, {}  # (r, r)
    for n in (2, 4):
        expected = -(n * n * (n - 1) / 2 * gradient @ down.mT @ k @ a
                     + n * (n - 1) * (n - 2) / 6 * gradient @ a.mT @ k.mT @ down)  # fmt: skip
        for rate in (2e-3, 1e-3):
            runs = [layer(dw.MoSLoRA(RANK, mixer=m, train_mixer=trained), A=a) for trained in (True, False)]
            for model in runs:
                descend(model, loss, Rates(rate, rate, rate), n)
            errors[n, rate] = apart((runs[0][0].delta_weight() - runs[1][0].delta_weight()) / rate**power, expected)
    for n in (2, 4):
        require(errors[n, 1e-3] < 0.02 and 1.8 < errors[n, 2e-3] / errors[n, 1e-3] < 2.2, f"{errors}")
    return {f"n = {n}, η = {rate:g}: error": error for (n, rate), error in errors.items()}


@claim("moslora-balance", "Under gradient flow AAᵀ/η_A − MᵀM/η_M and MMᵀ/η_M − BᵀB/η_B do not change: from B = 0 and an "
       "orthogonal M, MMᵀ = 1 + (η_M/η_B) BᵀB.", f"{BOOK}, as for deep linear networks", "holds", "proved")  # fmt: skip
def balance(power: float = 1.0) -> dict[str, Any]:
    """SGD at smaller and smaller rates, over the same time: what is left of a change halves with the rate."""
    import deltaw as dw

    loss, a, q, left = Loss(), draw(2, RANK, IN) / IN**0.5, orthogonal(), {}
    ratio = Rates(1.0, 3.0, 0.5)

    def kept(adapter: nn.Module) -> tuple[Tensor, Tensor]:
        a, m, b = (getattr(adapter, name).detach() for name in "AMB")
        weights = [rate**power for rate in ratio]
        return a @ a.mT / weights[0] - m.mT @ m / weights[1], m @ m.mT / weights[1] - b.mT @ b / weights[2]

    for steps in (400, 800):
        model = layer(dw.MoSLoRA(RANK, mixer=q), A=a)
        before = kept(model[0].adapter)
        descend(model, loss, Rates(*(8 / steps * rate for rate in ratio)), steps)
        after, m, b = kept(model[0].adapter), model[0].adapter.M.detach(), model[0].adapter.B.detach()
        left[steps] = max((x - y).norm().item() for x, y in zip(before, after, strict=True))
        grown = (m @ m.mT - torch.eye(RANK)).norm().item()
        rule = apart(m @ m.mT, torch.eye(RANK) + (ratio.m / ratio.b) ** power * b.mT @ b)
    require(grown > 0.5, f"the mixer has hardly moved: {grown:.2f}")
    require(left[800] < 0.05 * grown and 1.8 < left[400] / left[800] < 2.2, f"{left}, while MMᵀ moved by {grown:.2f}")
    require(rule < 0.02, f"MMᵀ is off by {rule:.1e}")
    return {"MMᵀ moved by": grown, "left at 400 steps": left[400], "at 800": left[800]}


def rise(
    pull: Callable[[float], float], a: float, m: float, trained: bool, times: Sequence[float], most: float = 1e-3
) -> list[float]:
    """p = b m a at these times, from b = 0, by Runge and Kutta's fourth-order steps of `most` at most."""
    import numpy as np

    def slope(x: "np.ndarray") -> "np.ndarray":
        g = pull(x[0] * x[1] * x[2])
        return g * np.array([x[1] * x[2], x[0] * x[2] * trained, x[0] * x[1]])

    x, t, found = np.array([a, m, 0.0]), 0.0, []
    for end in times:
        count = math.ceil((end - t) / most)
        h = (end - t) / max(count, 1)
        for _ in range(count):
            k1 = slope(x)
            k2 = slope(x + h / 2 * k1)
            k3 = slope(x + h / 2 * k2)
            x, t = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(x + h * k3)), t + h
        found.append(float(x.prod()))
    return found


@claim("moslora-speed", "Three balanced factors make a direction of ΔW grow like 3 p^4/3, two like 2 p: slower below "
       "p = 8/27, faster above.", f"{BOOK}, as for deep linear networks", "holds", "proved")  # fmt: skip
def speeds(crossing: float = 8 / 27) -> dict[str, Any]:
    """One input, one output, rank 1, in the library: one small step from balanced factors, at a pull of 1; and a whole run
    from b = 0 against the flow."""
    import deltaw as dw

    def pulled(weight: Tensor) -> Tensor:
        return -weight.sum()

    def gained(p: float, three: bool, rate: float = 1e-6) -> float:
        each = torch.full((1, 1), p ** (1 / 3 if three else 1 / 2), dtype=torch.float64)
        values = {"A": each, "B": each} | ({"M": each} if three else {})
        model = layer(dw.MoSLoRA(1, mixer="identity") if three else dw.LoRA(1), 1, 1, **values)
        before = model[0].delta_weight().item()
        descend(model, pulled, Rates(rate, rate, rate), 1)
        return (model[0].delta_weight().item() - before) / rate

    for p in (0.01, 0.1, 0.5, 3.0):
        for three, law in ((True, 3 * p ** (4 / 3)), (False, 2 * p)):
            found = gained(p, three)
            require(abs(found / law - 1) < 1e-4, f"p = {p}, {2 + three} factors: {found:.4f}, not {law:.4f}")
    below, above = (gained(f * crossing, True) / gained(f * crossing, False) for f in (0.95, 1.05))
    require(below < 1 < above, f"beside p = {crossing:.3f} three factors are {below:.3f} and {above:.3f} times as fast")
    model = layer(dw.MoSLoRA(1, mixer="identity"), 1, 1, A=torch.full((1, 1), 3**-0.5))
    descend(model, lambda weight: (weight - model[0].weight - 1).square().sum() / 2, Rates(1e-3, 1e-3, 1e-3), 2000)
    error = abs(model[0].delta_weight().item() - rise(lambda p: 1 - p, 3**-0.5, 1.0, True, [2.0])[0])
    require(error < 1e-3, f"a run is off by {error:.1e}")
    return {f"three over two at {p}": gained(p, True) / gained(p, False) for p in (0.01, 3.0)}


@claim("moslora-growth", "Of the three factors' growth in squared norm the mixer gets a third under SGD, from B = 0 and at "
       "one small rate; under sign-like updates only r of r + in + out parts.",
       BOOK, "holds", "measured at this scale")  # fmt: skip
def growth(optimizer: str = "Adam") -> dict[str, Any]:
    """Of ‖X‖² under SGD, which is what the balance conserves; of ‖X − X₀‖² under Adam, where every entry moves alike. A
    layer of 96 × 64, rank 8."""
    import deltaw as dw

    r, in_, out, loss = 8, 96, 64, Loss(30, 96, 64)
    start = draw(2, r, in_) / (3 * in_) ** 0.5  # (r, in)
    model = layer(dw.MoSLoRA(r, mixer="orthogonal"), in_, out, A=start)
    adapter = model[0].adapter
    before = {name: p.detach().clone() for name, p in adapter.named_parameters()}
    descend(model, loss, Rates(2e-3, 2e-3, 2e-3), 400)
    grown = {name: (p.square().sum() - before[name].square().sum()).item() for name, p in adapter.named_parameters()}
    shares = {name: value / sum(grown.values()) for name, value in grown.items()}
    require(max(abs(share - 1 / 3) for share in shares.values()) < 0.02, f"under SGD: {shares}")

    model = layer(dw.MoSLoRA(r, mixer="orthogonal"), in_, out, A=start)
    adapter = model[0].adapter
    make = {"Adam": partial(torch.optim.Adam, lr=2e-3, eps=1e-30), "SGD": partial(SGD, lr=2e-3)}[optimizer]
    stepper = make(list(adapter.parameters()))
    for _ in range(20):
        stepper.zero_grad()
        loss(weight_of(model)).backward()
        stepper.step()
    moved = {name: (p.detach() - before[name]).square().sum().item() for name, p in adapter.named_parameters()}
    mixers = moved["M"] / sum(moved.values())
    expected = r / (r + in_ + out)
    require(0.7 < mixers / expected < 1.3, f"under {optimizer} the mixer has {mixers:.3f}, not {expected:.3f}")
    return {"SGD: the mixer's share": shares["M"], "Adam: its share": mixers, "r / (r + in + out)": expected}


@claim("moslora-mixer-rate",
       "A mixer c·M with the scale s/c trains as M with its own rate divided by c² (SGD) or by c (Adam).", BOOK, "holds",
       "proved")  # fmt: skip
def mixer_rate(adams: float = 1.0) -> dict[str, Any]:
    """A's and B's gradients do not change, the mixer's is c times smaller: 50 steps of both, for c = 1/3 and 4."""
    import deltaw as dw

    found, start, m = {}, start_of_a(), any_mixer()
    rules = {"SGD": (partial(SGD), 0.01, 2.0), "momentum": (partial(SGD, momentum=0.9), 0.003, 2.0),
             "Adam": (partial(torch.optim.Adam, eps=1e-30), 0.005, adams)}  # fmt: skip
    for name, (make, rate, power) in rules.items():
        for c in (1 / 3, 4.0):
            def own_rate(parameters: list[nn.Parameter], make=make, rate=rate, slower=c**power) -> torch.optim.Optimizer:
                a, b, mixer = parameters
                return make([{"params": [a, b]}, {"params": [mixer], "lr": rate / slower}], lr=rate)

            sized = run(dw.MoSLoRA(RANK, alpha=RANK / c, mixer=c * m), partial(make, lr=rate), 50, A=start)
            rated = run(dw.MoSLoRA(RANK, mixer=m), own_rate, 50, A=start)
            found[f"{name}, c = {c:.2g}"] = largest(sized.products, rated.products)
            require(rated.losses[-1] < rated.losses[0], f"{name} does not learn")
    require(max(found.values()) < 1e-9, f"apart: {found}")
    return found

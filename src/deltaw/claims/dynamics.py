"""Dynamics: what Init[A] and Init[B] do to training as a layer widens (chapter 3).

One layer, one example z, a loss that is linear in the layer's output, and sign descent: here the whole run has a closed
form, which the claims compare with the library's LoRA in float64, and whose growth with the width they compare with the
rules for exponents. v = Θ(n^γ) is written γ[v]; sizes are of a typical entry.

    Z_A = A z    Z_B = B A z    ΔZ_B = B ΔZ_A + ΔB Z_A + ΔB ΔZ_A = δ¹ + δ² + δ³

What is measured in networks of growing width is in the record of the experiment `init_width`, on MiniLM in `init_text`, on code
in `tuned_comparison` and `tuned_further`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import claim, require
from .comparison import on_code, rates_on_code
from .initialization import SIGN_LIKE, Optimizer, Rates, adapted, problem, train
from .initialization import start as drawn_start
from .measure import apart, draw, largest, shown

if TYPE_CHECKING:
    import pandas

RANK, STEPS = 3, 6
SLACK = 0.08  # of a slope between finite widths; what it is told from is 1/4 away
GAMMAS = (-1.0, -0.75, -0.5)  # at which exponents of the learning rate the tables are made
INIT = "Hayou, Ghosh and Yu 2024"
PLUS = "LoRA+"
NOTE = "reading note, the initialization of LoRA"
BOOK = "this book"

SIGN_DESCENT = partial(torch.optim.Adam, betas=(0.0, 0.0), eps=1e-30)  # g / |g|, and 0 where g is 0


class Start(NamedTuple):
    """Which factor is random, and how its standard deviation grows: σ = Θ(n^spread)."""

    random: str
    spread: float


STARTS = {"Init[A]": Start("A", -0.5), "Init[B], 1/r": Start("B", 0.0), "Init[B], 1/n": Start("B", -0.5)}


# ---------------------------------------------------------------------------------------------------------------------
# The two rules: γ of a product is the sum, of a sum the largest


def exponents(start: Start, rate_a: float, rate_b: float | None = None) -> dict[str, float]:
    """γ of everything after a few steps, for rates η_A = Θ(n^rate_a) and η_B = Θ(n^rate_b); one rate for both if None.

    "seen" is the mean of Z_B's entries against the signs of the error: what a readout of size 1/n is given.
    """
    rate_b = rate_a if rate_b is None else rate_b
    drawn_z = start.spread + 0.5 if start.random == "A" else -math.inf  # A₀z: n independent terms
    drawn_b = start.spread if start.random == "B" else -math.inf
    moved_z = rate_a + 1  # ΔZ_A: n terms of one sign
    z_a, b = max(drawn_z, moved_z), max(drawn_b, rate_b)
    return {
        "Z_A": z_a,
        "Z_B": b + z_a,
        "δ¹": b + moved_z,
        "δ²": rate_b + z_a,
        "δ³": rate_b + moved_z,
        "seen": max(drawn_b - 0.5, rate_b) + z_a,  # B₀'s columns are nearly orthogonal to the error
    }


def threshold(start: Start, quantity: str = "Z_B", at_most: float = 0.0) -> float:
    """The largest γ[η], of one rate for both factors, at which γ of the quantity is at most that."""
    return max(gamma / 64 for gamma in range(-128, 1) if exponents(start, gamma / 64)[quantity] <= at_most)


# ---------------------------------------------------------------------------------------------------------------------
# The closed form


class Layer(NamedTuple):
    """One example z (n,), minus its error u (out,), and a start A (r, n), B (out, r): the loss is −uᵀ B A z."""

    z: Tensor
    u: Tensor
    a: Tensor
    b: Tensor


@lru_cache(maxsize=128)
def _drawn(width: int, seed: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """z (n,), u (n,) and what the random factor is made of (r, n): standard normal."""
    return draw(10 * seed, width), draw(10 * seed + 1, width), draw(10 * seed + 2, rank, width)


def layer(start: Start, width: int, seed: int = 0, rank: int = RANK) -> Layer:
    """A square layer with entries of z and u of size 1; the random factor has the variance n^(2·spread)."""
    z, u, drawn = _drawn(width, seed, rank)
    drawn, zero = width**start.spread * drawn, torch.zeros_like(drawn)
    return Layer(z, u, drawn, zero.mT) if start.random == "A" else Layer(z, u, zero, drawn.mT)


class State(NamedTuple):
    """After some steps: Z_A (r,), B's columns, and Z_B (out,)."""

    z_a: Tensor
    b: Tensor

    @property
    def z_b(self) -> Tensor:
        return self.b @ self.z_a


def closed_form(given: Layer, rates: Rates, step: int, common: float = 1.0) -> State:
    """The theorem of the chapter. `common` is the sign of the term that both starts have."""
    z, u, a, b = given
    (eta_a, eta_b), size, signs = rates, z.abs().sum(), u.sign()
    first_a, first_b = max(step - 1, 0), step  # A gets no gradient in the first step where B is zero
    side = (a @ z).sign()  # (r,)
    if not a.any():
        side, first_a, first_b = (b.mT @ u).sign(), step, max(step - 1, 0)
    return State(a @ z + first_a * eta_a * size * side, b + common * first_b * eta_b * torch.outer(signs, side))


def trained(given: Layer, rates: Rates, steps: int, make: Optimizer = SIGN_DESCENT, scale: float = 1.0) -> Iterator[State]:
    """The same by the library: the state at the start and after each step."""
    model = adapted(torch.zeros(len(given.u), len(given.z), dtype=torch.float64), given.a, given.b, scale)
    adapter = model[0].adapter
    optimizer = make([{"params": [adapter.A], "lr": rates[0]}, {"params": [adapter.B], "lr": rates[1]}])
    yield State(adapter.A.detach() @ given.z, adapter.B.detach().clone())
    for _ in range(steps):
        optimizer.zero_grad()
        (-given.u @ model(given.z)).backward()
        optimizer.step()
        yield State(adapter.A.detach() @ given.z, adapter.B.detach().clone())


def parts(before: State, after: State) -> dict[str, Tensor]:
    """δ¹, δ² and δ³ of one step, (out,) each."""
    moved_z, moved_b = after.z_a - before.z_a, after.b - before.b
    return {"δ¹": before.b @ moved_z, "δ²": moved_b @ before.z_a, "δ³": moved_b @ moved_z}


def sizes(given: Layer, before: State, after: State) -> dict[str, float]:
    """The root mean square entry of everything; and what a readout is given of Z_B."""
    found = {"Z_A": after.z_a, "Z_B": after.z_b} | parts(before, after)
    return {name: vector.square().mean().sqrt().item() for name, vector in found.items()} | {
        "seen": (given.u.sign() @ after.z_b / len(given.u)).item()}  # fmt: skip


@lru_cache(maxsize=256)
def growth(start: Start, rate_a: float, rate_b: float | None = None) -> dict[str, float]:
    """How everything grows by the closed form at η = 0.3·n^γ, between widths of 2⁹ and 2¹⁵: the slope in logarithms."""
    rate_b, logs, draws = rate_a if rate_b is None else rate_b, [], {2**9: 24, 2**15: 6}
    for width, seeds in draws.items():
        drawn, rates = [layer(start, width, seed, rank=8) for seed in range(seeds)], (0.3 * width**rate_a, 0.3 * width**rate_b)
        found = [sizes(one, closed_form(one, rates, STEPS - 1), closed_form(one, rates, STEPS)) for one in drawn]
        logs.append({name: math.log(sum(one[name] for one in found) / seeds) for name in found[0]})
    return {name: (logs[1][name] - logs[0][name]) / math.log(2**6) for name in logs[0]}


# ---------------------------------------------------------------------------------------------------------------------
# Signs align


@claim("dynamics-signs-align", "A sign-like step of A moves Z_A by η·Θ(n), because all n signs agree with z's; of random signs it would "
       "be η·Θ(√n).", f"{INIT}, the assumption on processed gradients",
       "holds if the number of examples stays fixed while the layer widens: N of them divide it by about √N", "proved")  # fmt: skip
def signs_align(power: float = 0.5) -> dict[str, Any]:
    """One example: the step is η·‖z‖₁·sign(Bᵀu), exactly. N examples with independent Gaussian entries: coordinate k
    gives sign(Σᵢ cᵢzᵢₖ)·zⱼₖ, whose mean is √(2/π)·cⱼ/‖c‖."""
    given, rate = layer(STARTS["Init[B], 1/r"], 40), 0.01
    _, after = trained(given, (rate, rate), 1)
    expected = rate * given.z.abs().sum() * (given.b.mT @ given.u).sign()
    one = apart(after.z_a, expected)
    require(one < 1e-12, f"one example: {one:.1e} from η‖z‖₁")
    found, width = {"one example, from the formula": one}, 200_000
    for examples in (1, 4, 16):
        z, c = draw(20 + examples, examples, width), torch.ones(examples, dtype=torch.float64)
        moved = ((c @ z).sign() * z[0]).mean().item()
        predicted = math.sqrt(2 / math.pi) * examples**-power
        found[f"{examples} examples, a coordinate's share"] = moved
        require(abs(moved - predicted) < 5 / math.sqrt(width), f"{examples} examples: {moved:.4f}, not {predicted:.4f}")
    found["random signs"] = (draw(30, width).sign() * z[0]).mean().item()
    require(abs(found["random signs"]) < 5 / math.sqrt(width), "random signs do not cancel")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The run, exactly


@claim("dynamics-closed-form", "One example, a loss linear in the output, sign descent: after t steps Z_B/s is t·η_B·‖A₀z‖₁·v + t(t−1)·η_A·η_B·‖z‖₁·r·v "
       "from Init[A] and t·η_A·‖z‖₁·B₀c + t(t−1)·η_A·η_B·‖z‖₁·r·v from Init[B], with v = sign u and c = sign B₀ᵀu.", BOOK, "holds",
       "proved")  # fmt: skip
def exact(common: float = 1.0) -> dict[str, Any]:
    """Against the library, after each of eight steps, at three widths, with a rate for each factor and a scale."""
    found, (eta_a, eta_b) = {}, (0.02, 0.05)
    for name, start in STARTS.items():
        worst = 0.0
        for width in (2, 7, 24):
            given = layer(start, width, seed=width)
            for t, state in enumerate(trained(given, (eta_a, eta_b), 8, scale=2.0)):
                size, v, c = given.z.abs().sum(), given.u.sign(), (given.b.mT @ given.u).sign()
                first = eta_b * (given.a @ given.z).abs().sum() * v if start.random == "A" else eta_a * size * given.b @ c
                printed = t * first + common * t * (t - 1) * eta_a * eta_b * size * RANK * v
                predicted = closed_form(given, (eta_a, eta_b), t, common)
                if t:
                    worst = max(worst, apart(state.z_b, printed), apart(state.z_b, predicted.z_b), apart(state.z_a, predicted.z_a))
        found[name] = worst
        require(worst < 1e-12, f"{name}: {worst:.1e} from the formula")
    return found


@claim("dynamics-exponents", "γ of Z_A, Z_B and ΔZ_B's three terms, for γ[η] from −1 to −1/2: Init[A] γ[Z_A] = γ[η]+1 and γ[Z_B] = γ[δⁱ] = 2γ[η]+1; "
       "Init[B] with σ² = 1/r γ[Z_A] = γ[Z_B] = γ[δ¹] = γ[η]+1 and γ[δ²] = γ[δ³] = 2γ[η]+1.", f"this book, after {INIT}",
       "holds", "proved")  # fmt: skip
def rules(theory: Callable[..., dict[str, float]] = exponents) -> dict[str, Any]:
    """The rules against what is claimed, exactly, and against the closed form: its slope between widths of 2⁹ and 2¹⁵."""
    for gamma in GAMMAS:
        one, two = gamma + 1, 2 * gamma + 1
        said = {"Init[A]": {"Z_A": one, "Z_B": two, "δ¹": two, "δ²": two, "δ³": two},
                "Init[B], 1/r": {"Z_A": one, "Z_B": one, "δ¹": one, "δ²": two, "δ³": two}}  # fmt: skip
        for name, expected in said.items():
            derived = theory(STARTS[name], gamma)
            require(all(derived[key] == value for key, value in expected.items()), f"{name}, γ[η] = {gamma}: {derived}")
    found = {}
    for name, start in STARTS.items():
        for gamma in GAMMAS:
            measured = growth(start, gamma)
            expected = theory(start, gamma)
            worst = max(measured, key=lambda key: abs(measured[key] - expected[key]))
            found[f"{name}, γ[η] = {gamma}"] = {key: round(value, 3) for key, value in measured.items()}
            require(abs(measured[worst] - expected[worst]) < SLACK,
                    f"{name}, γ[η] = {gamma}: γ[{worst}] = {measured[worst]:.3f}, not {expected[worst]}")  # fmt: skip
    return found


@claim("dynamics-adam", "The exponents of sign descent are those of Adam.", f"this book, after {INIT}", "holds",
       "measured at this scale")  # fmt: skip
def adam(make: Optimizer = SIGN_LIKE) -> dict[str, Any]:
    """The library's LoRA under Adam with its usual betas, at widths 64 and 1024: the slopes beside sign descent's."""
    found, widths = {}, (64, 1024)
    for name, start in STARTS.items():
        for gamma in (-1.0, -0.5):
            logs = {}
            for optimizer in (make, SIGN_DESCENT):
                for width in widths:
                    given = layer(start, width, seed=3)
                    *_, before, after = trained(given, (3 * width**gamma,) * 2, STEPS, optimizer)
                    logs[optimizer, width] = {key: math.log(value) for key, value in sizes(given, before, after).items()}
            slopes = [{key: (logs[optimizer, widths[1]][key] - logs[optimizer, widths[0]][key]) / math.log(widths[1] / widths[0])
                       for key in logs[optimizer, widths[0]]} for optimizer in (make, SIGN_DESCENT)]  # fmt: skip
            worst = max(abs(slopes[0][key] - slopes[1][key]) for key in slopes[0])
            found[f"{name}, γ[η] = {gamma}"] = worst
            require(worst < 0.06, f"{name}, γ[η] = {gamma}: {slopes[0]}, not {slopes[1]}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Stability


def stable_up_to(name: str, expected: float, quantity: str = "Z_B", at_most: float = 0.0) -> dict[str, float]:
    """The threshold by the rules; and by the closed form: at it the quantity keeps to its bound, 1/4 above it does not."""
    start = STARTS[name]
    derived = threshold(start, quantity, at_most)
    require(derived == expected, f"{name}: γ[{quantity}] ≤ {at_most} up to γ[η] = {derived}, not {expected}")
    at, above = (growth(start, gamma)[quantity] for gamma in (expected, expected + 0.25))
    require(at < at_most + SLACK and above > at_most + 0.2, f"{name}: γ[{quantity}] is {at:.3f} at γ[η] = {expected}, {above:.3f} above")
    return {f"{name}: γ[{quantity}] at the threshold": at, "1/4 above": above}


@claim("dynamics-stable-a", "From Init[A], Z_B stays bounded as the layer widens for learning rates up to Θ(n^−1/2).", INIT, "holds",
       "proved")  # fmt: skip
def stable_a(expected: float = -0.5) -> dict[str, Any]:
    """And the variance of A does not matter for it, from 1/n to 1."""
    require(threshold(Start("A", 0.0)) == threshold(Start("A", -0.5)), "A's variance moves the threshold")
    return stable_up_to("Init[A]", expected)


@claim("dynamics-stable-b", "From Init[B], Z_B stays bounded as the layer widens for learning rates up to Θ(n^−1) only.", INIT,
       "holds if the variance of B does not shrink with the width, as 1/r; with 1/n the bound is Θ(n^−1/2)", "proved")  # fmt: skip
def stable_b(expected: tuple[float, float] = (-1.0, -0.5)) -> dict[str, Any]:
    return stable_up_to("Init[B], 1/r", expected[0]) | stable_up_to("Init[B], 1/n", expected[1])


@claim("dynamics-larger-rates", "Init[A] allows the use of larger learning rates than Init[B], without causing output instability.",
       f"{INIT}, abstract", "holds if each has its usual variance: given the same variance, both bear Θ(n^−1/2)", "proved")  # fmt: skip
def larger_rates(other: str = "Init[B], 1/n") -> dict[str, Any]:
    """For B's variance n^(2β), the bound is −1 − β, and never above −1/2: so what sets it is β."""
    found = {name: threshold(start) for name, start in STARTS.items()}
    require(found["Init[A]"] == found["Init[B], 1/r"] + 0.5, f"thresholds {found}")
    require(found["Init[A]"] == found[other], f"thresholds {found}")
    for beta in (0.0, -0.125, -0.25, -0.375, -0.5, -0.75):
        bound = min(-1 - beta, -0.5)
        require(threshold(Start("B", beta)) == bound, f"σ_B = n^{beta}: {threshold(Start('B', beta))}, not {bound}")
    return found


@claim("dynamics-contrast-is-a-ratio", "The usual Init[B] is Init[B] with a variance n/r times smaller, 1/n, trained with a ratio η_B/η_A = r/n.",
       BOOK, "holds if there is neither weight decay nor clipping", "proved")  # fmt: skip
def contrast_is_a_ratio(power: float = 1.0) -> dict[str, Any]:
    """Rescale A by √(n/r) and B by its inverse, and their rates likewise: under Adam ΔW is the same at every step. In
    float64, six examples, a loss that is not linear."""
    width, rate = 24, 0.01
    given, b = problem(n=6, out=width, into=width), draw(4, width, RANK)  # B of variance Θ(1)
    zero, factor = torch.zeros(RANK, width, dtype=torch.float64), (width / RANK) ** (power / 2)
    found = {}
    for name, make, options in (("sign descent", SIGN_DESCENT, {}), ("Adam", SIGN_LIKE, {}), ("Adam, weight decay", SIGN_LIKE, {"weight_decay": 0.1})):
        usual = train(adapted(given.weight, zero, b), given, make, (rate, rate), 40, **options)
        ratio = (rate * (width / RANK) ** 0.5, rate / (width / RANK) ** 0.5)
        found[name] = largest(train(adapted(given.weight, zero, b / factor), given, make, ratio, 40, **options), usual)
    require(max(found["sign descent"], found["Adam"]) < 1e-9, f"apart: {found}")
    require(found["Adam, weight decay"] > 1e-3, f"weight decay does not see it: {found}")
    require(abs((b / factor).var() / b.var() * width / RANK - 1) < 1e-9, f"the variance is not r/n of the usual, but {factor**-2:.3g}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Efficiency


@claim("dynamics-internal-instability", "At the largest stable rate, Init[A]'s Z_A grows like n^1/2 while Z_B does not grow: an internal instability.",
       INIT, "holds", "proved")  # fmt: skip
def internal(name: str = "Init[A]") -> dict[str, Any]:
    """So does Init[B]'s with the variance 1/n; with 1/r, at its own largest rate, nothing grows."""
    found = {}
    for one, expected in ((name, 0.5), ("Init[B], 1/n", 0.5), ("Init[B], 1/r", 0.0)):
        start = STARTS[one]
        gamma = threshold(start)
        measured = growth(start, gamma)
        found[one] = {key: round(measured[key], 3) for key in ("Z_A", "Z_B")}
        require(abs(measured["Z_A"] - expected) < SLACK and abs(measured["Z_B"]) < SLACK, f"{one}: {found[one]}")
        require(exponents(start, gamma)["Z_A"] == expected, f"{one}: by the rules {exponents(start, gamma)}")
    return found


@claim("dynamics-undertrained-b", "At the largest stable rate of Init[B] its B is undertrained: δ², what B's step adds, vanishes like 1/n.", INIT,
       "holds if the variance of B does not shrink with the width; with 1/n, δ¹ and δ² are both Θ(1)", "proved")  # fmt: skip
def undertrained(vanishing: str = "Init[B], 1/r") -> dict[str, Any]:
    found = {}
    for name, start in STARTS.items():
        gamma = threshold(start)
        measured = growth(start, gamma)
        found[name] = {key: round(measured[key], 3) for key in ("δ¹", "δ²")}
        expected = -1.0 if name == vanishing else 0.0
        require(abs(measured["δ²"] - expected) < SLACK and abs(measured["δ¹"]) < SLACK, f"{name}: {found[name]}")
        require(exponents(start, gamma)["δ²"] == expected, f"{name}: by the rules {exponents(start, gamma)}")
    return found


@claim("dynamics-one-rate", "One learning rate for A and B does not allow efficient feature learning.", f"{PLUS}, abstract",
       "holds if Z_A is to stay bounded as well: by δ¹ and δ² alone, Init[A] at Θ(n^−1/2) is efficient", "proved")  # fmt: skip
def one_rate(bounded: float = 0.0) -> dict[str, Any]:
    """Over all rates and all variances of either factor, on a grid of exponents."""
    efficient, internally_stable = [], []
    for random in "AB":
        for spread in (-1.0, -0.75, -0.5, -0.25, 0.0):
            for gamma in (step / 8 for step in range(-16, 1)):
                found = exponents(Start(random, spread), gamma)
                if found["Z_B"] == found["δ¹"] == found["δ²"] == 0:
                    efficient.append((random, spread, gamma, found["Z_A"]))
                    internally_stable += [efficient[-1]] if found["Z_A"] <= bounded else []
    require(("A", -0.5, -0.5, 0.5) in efficient, "Init[A] at n^−1/2 is not efficient")
    require(not internally_stable, f"efficient with Z_A bounded: {internally_stable}")
    return {"δ¹ = δ² = Z_B = Θ(1)": [f"Init[{one[0]}], σ = n^{one[1]}, η = n^{one[2]}: Z_A = n^{one[3]}" for one in efficient]}


@claim("dynamics-lora-plus", "With η_A = Θ(n^−1) and η_B = Θ(1), feature learning is efficient: Z_A, Z_B, δ¹ and δ² are all Θ(1).", PLUS, "holds",
       "proved")  # fmt: skip
def lora_plus(ratio: float = 1.0) -> dict[str, Any]:
    """From each of the three starts: with the ratio Θ(n) the contrast is gone."""
    found = {}
    for name, start in STARTS.items():
        derived = exponents(start, -1.0, -1.0 + ratio)
        measured = growth(start, -1.0, -1.0 + ratio)
        found[name] = {key: round(measured[key], 3) for key in ("Z_A", "Z_B", "δ¹", "δ²")}
        require(all(derived[key] == 0 and abs(value) < SLACK for key, value in found[name].items()), f"{name}: {found[name]}")
    return found


@claim("dynamics-gaussian-start", "Init[A] with a variance that does not shrink with the width, as PEFT's \"gaussian\", is, with one rate of Θ(n^−1/2), LoRA+ from the "
       "usual Init[A] with a ratio of Θ(n).", BOOK, "holds if there is neither weight decay nor clipping", "proved")  # fmt: skip
def gaussian_start(power: float = 0.5) -> dict[str, Any]:
    """A start c·A at the rate η is the start A at η/c and c·η: the same ΔW at every step. With c = √n and η = n^−1/2
    those are 1/n and 1. In float64, six examples, a loss that is not linear."""
    found: dict[str, Any] = {}
    for width in (12, 48):
        given, a = problem(n=6, out=width, into=width), width**-0.5 * draw(3, RANK, width)
        zero, rate = torch.zeros(width, RANK, dtype=torch.float64), 0.1 * width**-power
        one = train(adapted(given.weight, a * width**0.5, zero), given, SIGN_LIKE, (rate, rate), 40)
        plus = train(adapted(given.weight, a, zero), given, SIGN_LIKE, (0.1 / width, 0.1), 40)
        found[f"width {width}, apart"] = largest(one, plus)
    require(max(found.values()) < 1e-9, f"apart: {found}")
    variances = [drawn_start("gaussian", 8, 4, width)[0].var().item() for width in (64, 4096)]
    require(all(abs(64 * variance - 1) < 0.2 for variance in variances), f"PEFT's variance is not 1/r²: {variances}")
    return found | {"variance of PEFT's start at rank 8, widths 64 and 4096": variances}


# ---------------------------------------------------------------------------------------------------------------------
# What the readout sees

READOUTS = {"1/√n": -0.5, "1/n": 0.0}  # how large "seen" may be for the output to stay bounded


@claim("dynamics-seen", "A bound on Z_B bounds the learning rate of the loss: what a readout sees of Z_B is as large as Z_B.", BOOK,
       "holds if the start is Init[A]: of Init[B]'s B₀c a readout sees n^−1/2, and its output is bounded up to n^−1 (readout 1/√n) or n^−1/2 (1/n)",
       "proved")  # fmt: skip
def seen(thresholds: Mapping[str, tuple[float, float, float]] | None = None) -> dict[str, Any]:
    """The largest rates at which the output s·uᵀZ_B/√n or s·uᵀZ_B/n stays bounded, by the rules and by the closed form,
    for the three starts; and uᵀZ_B/‖Z_B‖₁ at γ[η] = −1."""
    thresholds = thresholds or {"1/√n": (-0.75, -1.0, -0.75), "1/n": (-0.5, -0.5, -0.5)}
    found: dict[str, Any] = {}
    for readout, expected in thresholds.items():
        for name, bound in zip(STARTS, expected, strict=True):
            found[f"{name}, readout {readout}"] = bound
            stable_up_to(name, bound, "seen", READOUTS[readout])
    for name, start in STARTS.items():
        measured = growth(start, -1.0)
        found[f"{name}: γ of the share seen"] = round(measured["seen"] - measured["Z_B"], 3)
    shares = [found[f"{name}: γ of the share seen"] for name in STARTS]
    require(abs(shares[0]) < SLACK and abs(shares[1] + 0.5) < SLACK, f"shares {shares}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The note's two conclusions


@claim("dynamics-note-efficient", "The initialization of A enhances feature learning efficiency.", NOTE,
       "holds if each start has its usual variance, one rate for both factors, and the largest it bears", "proved")  # fmt: skip
def note_efficient(gamma_a: float = -0.5) -> dict[str, Any]:
    """Each at its own largest rate: δ² is Θ(1) from Init[A], Θ(1/n) from Init[B]. At one rate δ² has the same power in
    both, and Init[B]'s δ¹ the larger: neither is efficient below n^−1/2, and at it only Init[A] is, as Init[B]'s Z_B has blown up."""
    own = {name: exponents(start, gamma_a if name == "Init[A]" else threshold(start))["δ²"] for name, start in STARTS.items()}
    require(own["Init[A]"] == own["Init[B], 1/n"] == 0 > own["Init[B], 1/r"], f"δ² at the largest rates: {own}")
    for gamma in GAMMAS:
        a, b = (exponents(STARTS[name], gamma) for name in ("Init[A]", "Init[B], 1/r"))
        require(b["δ¹"] > a["δ¹"] and b["δ²"] == a["δ²"] and b["seen"] >= a["seen"], f"at the same rate, {gamma}: {a}, {b}")
        efficient = [one["δ¹"] == one["δ²"] == 0 >= one["Z_B"] for one in (a, b)]
        require(efficient == [gamma == -0.5, False], f"efficient at the same rate, {gamma}: {efficient}")
    plus = {name: exponents(start, -1.0, 0.0)["δ²"] for name, start in STARTS.items()}
    require(set(plus.values()) == {0.0}, f"with two rates: {plus}")
    return {"γ[δ²] at the largest rate": own, "γ[δ²] with two rates": plus}


@claim("dynamics-note-unstable", "The initialization of A leads to an unstable training process.", NOTE,
       "holds if it means Z_A, inside the adapter: Z_B and the output grow at no rate at which they do not from the usual Init[B]",
       "proved")  # fmt: skip
def note_unstable(names: tuple[str, str] = ("Init[A]", "Init[B], 1/r")) -> dict[str, Any]:
    """Z_A has the same exponents from both starts at the same rate, from n^−1 on, and below it grows from neither: from Init[A] it grows because the rate may be larger."""
    for gamma in (step / 16 for step in range(-24, 1)):
        a, b = (exponents(STARTS[name], gamma) for name in names)
        for quantity in ("Z_B", "seen"):
            require(max(a[quantity], 0) <= max(b[quantity], 0), f"γ[η] = {gamma}: Init[A]'s {quantity} grows more: {a}, {b}")
        require(max(a["Z_A"], 0) == max(b["Z_A"], 0), f"γ[η] = {gamma}: Z_A grows differently: {a}, {b}")
    return {"Init[A] at its largest rate": exponents(STARTS["Init[A]"], -0.5)} | internal()


@claim("dynamics-note-b-stable", "The initialization of B ensures stable training.", NOTE,
       "holds if the rate is at most Θ(n^−1), or B's variance shrinks with the width: at Θ(n^−1/2), which Init[A] bears, Z_B grows like n^1/2",
       "proved")  # fmt: skip
def note_b_stable(at: float = -0.5) -> dict[str, Any]:
    found = {name: growth(start, at)["Z_B"] for name, start in STARTS.items()}
    require(abs(found["Init[B], 1/r"] - 0.5) < SLACK, f"γ[Z_B] at n^{at}: {found}")
    require(max(abs(found["Init[A]"]), abs(found["Init[B], 1/n"])) < SLACK, f"γ[Z_B] at n^{at}: {found}")
    require(threshold(STARTS["Init[B], 1/r"]) == -1, "not stable at n^−1")
    return {f"γ[Z_B] at γ[η] = {at}": found}


@claim("dynamics-note-b-not-optimal", "The initialization of B does not achieve optimal feature learning.", NOTE,
       "holds if its variance is the usual one and A and B share one rate", "proved")  # fmt: skip
def note_b_not_optimal(with_two_rates: float = 0.0) -> dict[str, Any]:
    """With one rate, δ¹ = Θ(1) and δ² = Θ(1) exclude each other; with the variance 1/n, or with a rate each, they do not."""
    usual = [exponents(STARTS["Init[B], 1/r"], step / 16) for step in range(-32, 1)]
    require(not any(found["δ¹"] == found["δ²"] == 0 for found in usual), "one rate makes both Θ(1)")
    smaller = exponents(STARTS["Init[B], 1/n"], -0.5)
    plus = exponents(STARTS["Init[B], 1/r"], -1.0, with_two_rates)
    require(smaller["δ¹"] == smaller["δ²"] == 0, f"variance 1/n: {smaller}")
    require(plus["δ¹"] == plus["δ²"] == 0, f"two rates: {plus}")
    return {"usual, at n^−1": exponents(STARTS["Init[B], 1/r"], -1.0), "variance 1/n, at n^−1/2": smaller, "two rates": plus}


# ---------------------------------------------------------------------------------------------------------------------
# In networks of widths from 128 to 8192: the record of init_width

ARMS = ("A", "B, 1/r", "B, 1/n")  # its names of STARTS
PLUS_ARM = "A, LoRA+"
BOTH = ("1/√n", "1/n")


@lru_cache(maxsize=1)
def width_record() -> "pandas.DataFrame":
    from deltaw import results

    return results.load("init_width")


@lru_cache(maxsize=1)
def fitted() -> "pandas.DataFrame":
    """The powers after five updates, with the theory's."""
    from deltaw.experiments import init_width

    return init_width.exponents(width_record(), resamples=400)


@lru_cache(maxsize=2)
def rate_slopes(how: str) -> "pandas.DataFrame":
    """Of the "best" rate or the "edge", by readout and start, with what follows from a bounded Z_B ("paper") and output."""
    from deltaw.experiments import init_width

    return init_width.rate_exponents(width_record(), how, resamples=200).set_index(["readout", "start"])


@lru_cache(maxsize=2)
def rates(how: str) -> "pandas.Series":
    """By readout, start and width."""
    from deltaw.experiments import init_width

    return init_width.chosen_rates(width_record(), how).set_index(["readout", "start", "width"]).rate.sort_index()


@lru_cache(maxsize=1)
def at_best() -> "pandas.DataFrame":
    """Each arm's log loss after the last update, its Z_A and Z_B, at the rate of the lowest mean: by readout, start, width, seed."""
    import numpy as np

    table = width_record()
    last = table[(table.kind == "sweep") & (table.step == table.step.max())]
    last = last.assign(log=np.log(last.train_loss)).set_index(["readout", "start", "width", "rate", "seed"])
    means = last.log.groupby(level=[0, 1, 2, 3]).mean()
    best = means.groupby(level=[0, 1, 2]).idxmin()
    return last.loc[last.index.droplevel("seed").isin(best)].droplevel("rate")[["log", "z_a", "z_b"]].sort_index()


def log_ratio(one: str, other: str, readout: str, width: int) -> tuple[float, float, float]:
    """Of the losses of two arms at their best rates, the mean over seeds, and Student's interval of it: pairs share a seed."""
    from scipy import stats

    log = at_best().log
    difference = log[readout, one, width] - log[readout, other, width]
    reach = stats.t.ppf(0.975, len(difference) - 1) * difference.std() / len(difference) ** 0.5
    return tuple(round(float(difference.mean() + side * reach), 2) for side in (0, -1, 1))


def printed(row: Any) -> str:
    return f"{row.exponent:.2f} [{row.low:.2f}, {row.high:.2f}]"


@claim("dynamics-record-exponents", "In a network trained by Adam, Z_A, Z_B, δ¹, δ² and δ³ grow with the width as the exponents say.", BOOK,
       "holds if A and B share one rate and the readout is 1/n: each of 45 powers is within 0.1; of LoRA+'s 15 there nine are, all at η = c·n^−1/2 among "
       "them; with 1/√n, 25 of 60, at η = c·n^−1/2 up to half a power off", "measured at this scale")  # fmt: skip
def record_exponents(readouts: tuple[str, str] = ("1/n", "1/√n")) -> dict[str, Any]:
    """After five updates, over all widths: the four arms' powers that are within 0.1; of the three starts with one rate the
    intervals; and how much of the loss is left then, in the widest network."""
    table, found = fitted(), {}
    table = table[table.quantity != "step_z_a"]
    near = (table.exponent - table.theory).abs() < 0.1
    plus = table.start == PLUS_ARM
    for readout in readouts:
        chosen = table.readout == readout
        found[f"readout {readout}: powers within 0.1"] = f"{near[chosen].sum()} of {chosen.sum()}, LoRA+'s {near[chosen & plus].sum()} of {(chosen & plus).sum()}"
    chosen = plus & (table.readout == readouts[0])
    require(near[chosen].sum() == 9 and bool(near[chosen & (table.gamma == -0.5)].all()), f"LoRA+: {found}")
    require(near[table.readout == readouts[1]].sum() == 25, f"{found}")
    table = table[~plus]
    off = (table.exponent - table.theory).abs()
    inside = (table.low <= table.theory) & (table.theory <= table.high)
    worst = off.groupby([table.readout, table.gamma]).max()
    for readout in readouts:
        chosen = table.readout == readout
        found[f"readout {readout}: intervals that have the theory's power in them"] = f"{inside[chosen].sum()} of {chosen.sum()}"
        found[f"readout {readout}: farthest, by γ[η]"] = {gamma: round(float(worst[readout, gamma]), 2) for gamma in GAMMAS}
    require(worst[readouts[0]].max() < 0.1 and inside[table.readout == readouts[0]].mean() > 0.9, f"{found}")
    require(worst[readouts[1], -0.5] > 0.3 and worst[readouts[1], -0.5] > worst[readouts[1], -0.75], f"{found}")
    rows = width_record()
    rows = rows[(rows.kind == "scaled") & (rows.step == 5) & (rows.gamma == -0.5) & (rows.width == rows.width.max()) & (rows.start == "A")]
    left = rows.groupby("readout").train_loss.mean()
    require(left[readouts[0]] > 0.8 and left[readouts[1]] < 0.3, f"the loss left: {left.to_dict()}")
    return found | {"of Init[A]'s loss is left": left.round(2).to_dict()}


@claim("dynamics-record-best-rate", "The best learning rate falls like n^−1/2 from Init[A] and like n^−1 from Init[B].",
       f"{INIT}, the figure of the best rate against the width", "does not hold", "measured at this scale")  # fmt: skip
def best_rate(theory: str = "paper", how: str = "best") -> dict[str, Any]:
    """With the readout 1/√n Init[A]'s falls faster than n^−1/2, with 1/n the usual Init[B]'s more slowly than n^−1."""
    table = rate_slopes(how)
    a, b = table.loc["1/√n", "A"], table.loc["1/n", "B, 1/r"]
    require(a.high < a[theory] and b.low > b[theory], f"Init[A], 1/√n: {printed(a)}; Init[B], 1/n: {printed(b)}")
    return {f"{start}, readout {readout}": printed(table.loc[readout, start]) for readout in BOTH for start in ("A", "B, 1/r")}


@claim("dynamics-record-best-rate-seen", "The best learning rate falls with the width as the largest rate at which the output stays bounded.", BOOK,
       "holds if A and B share one rate: for all three starts with both readouts; LoRA+'s as well with 1/n, but with 1/√n it falls more slowly",
       "measured at this scale")  # fmt: skip
def best_rate_seen(theory: str = "output", how: str = "best") -> dict[str, Any]:
    """Eight slopes were predicted and seven hold: each of the six with one rate, whose intervals have the power in them (the
    two theories differ in three of the six), and LoRA+'s with the readout 1/n."""
    table = rate_slopes(how)
    found = {f"{start}, readout {readout}": f"{printed(row)}, theory {row[theory]:g}" for (readout, start), row in table.iterrows()}
    require(bool(table.inside.all()), "a rate lies at the end of the grid")
    one_rate = table[table.index.get_level_values("start").isin(ARMS)]
    require(bool(((one_rate.low <= one_rate[theory]) & (one_rate[theory] <= one_rate.high)).all()), f"{found}")
    require((one_rate.exponent - one_rate[theory]).abs().max() < 0.1, f"{found}")
    plus = table.loc["1/n", PLUS_ARM]
    require(plus.low <= plus[theory] <= plus.high, f"LoRA+, readout 1/n: {printed(plus)}, theory {plus[theory]:g}")
    plus = table.loc["1/√n", PLUS_ARM]
    require(plus.low > plus[theory] + 0.1, f"LoRA+: {printed(plus)}, theory {plus[theory]:g}")
    return found


@claim("dynamics-record-edge", "The edge of stability falls with the width as the largest rate at which Z_B, or at which the output stays bounded.",
       BOOK, "does not hold", "measured at this scale")  # fmt: skip
def edge(common: Mapping[str, float] | None = None) -> dict[str, Any]:
    """Neither of the usual Init[B] with the readout 1/√n. It falls alike from all three starts, as the bound on the term that
    they share, which is of second order in the rate: −3/4 and −1/2. The edge lies at 10 to 60 times the best rate."""
    table, common = rate_slopes("edge"), common or {"1/√n": -0.75, "1/n": -0.5}
    b = table.loc["1/√n", "B, 1/r"]
    require(b.low > b.paper and b.low > b.output, f"Init[B], 1/r: {printed(b)}")
    found = {f"{start}, readout {readout}": printed(table.loc[readout, start]) for readout in BOTH for start in ARMS}
    for readout, power in common.items():
        rows = table.loc[readout].loc[list(ARMS)]
        require(bool(((rows.low <= power) & (power <= rows.high)).all()), f"not {power}: {found}")
    ratio = rates("edge") / rates("best")
    require(10 < ratio.min() and ratio.max() < 60, f"edge over best rate: {ratio.min():.0f} to {ratio.max():.0f}")
    return found | {"edge over best rate": (round(ratio.min()), round(ratio.max()))}


@claim("dynamics-record-larger-rate", "The best rate of Init[A] is larger than that of Init[B].", f"{INIT}, abstract",
       "holds if the readout is 1/√n: in the widest network by a factor of three; with 1/n they are equal", "measured at this scale")  # fmt: skip
def larger_rate(other: str = "B, 1/r") -> dict[str, Any]:
    """The ratio by width; with the variance 1/n for B there is none with either readout."""
    found = {}
    for readout in BOTH:
        ratio = rates("best")[readout, "A"] / rates("best")[readout, other]
        found[f"readout {readout}"] = ratio.round(2).to_dict()
        if readout == "1/√n":
            require(bool((ratio[512:] > 1.5).all()) and ratio[8192] > 3, f"{found}")
        else:
            require(bool(ratio.between(0.75, 1.25).all()), f"{found}")
        same = rates("best")[readout, "A"] / rates("best")[readout, "B, 1/n"]
        require(bool(same.between(0.7, 1.3).all()), f"Init[B], 1/n, readout {readout}: {same.to_dict()}")
    return found


@claim("dynamics-record-better", "Init[A] on average yields better performance than Init[B].", f"{INIT}, abstract",
       "holds if the readout is 1/√n and the network wide; with 1/n Init[B] ends lower at every width, by 13 to 35 %", "measured at this scale")  # fmt: skip
def better(one: str = "A", other: str = "B, 1/r") -> dict[str, Any]:
    """Training loss after 60 updates, each start at its best rate: the log ratio, with its interval over six seeds."""
    widths = sorted(set(width_record().width))
    found = {f"readout {readout}, width {width}": log_ratio(one, other, readout, width)
             for readout in BOTH for width in (widths[0], widths[-1])}  # fmt: skip
    require(found["readout 1/√n, width 8192"][2] < 0, f"not lower at 1/√n: {found}")
    behind = [log_ratio(one, other, "1/n", width)[0] for width in widths]
    means = at_best().log["1/n"].groupby(level=["start", "width"]).mean()
    lower = [round(100 * (1 - math.exp(apart_by))) for apart_by in means[other] - means[one]]
    found["readout 1/n: percent lower, by width"] = lower
    require((min(lower), max(lower)) == (13, 35), f"{found}")
    require(min(behind) > 0 and found["readout 1/n, width 8192"][1] > 0, f"not higher at 1/n: {found}")
    return found


@claim("dynamics-record-variance", "In a network, too, the contrast between Init[A] and Init[B] is the variance's: with 1/n for both none is found.",
       BOOK, "holds", "measured at this scale")  # fmt: skip
def record_variance(other: str = "B, 1/n") -> dict[str, Any]:
    """In the slopes of the best rate and of the edge, and in the lowest loss of the widest network."""
    found = {}
    for how in ("best", "edge"):
        for readout in BOTH:
            a, b = (rate_slopes(how).loc[readout, start] for start in ("A", other))
            found[f"{how} rate, readout {readout}"] = printed(a), printed(b)
            require(abs(a.exponent - b.exponent) < 0.05, f"{found}")
    for readout in BOTH:
        found[f"log ratio of the losses, readout {readout}"] = ratio = log_ratio("A", other, readout, 8192)
        require(ratio[1] < 0 < ratio[2], f"{found}")
    return found


@claim("dynamics-record-norms", "Over training Z_A grows with the width from Init[A], and not from Init[B].", f"{INIT}, internal instability",
       "holds if the readout is 1/√n; with 1/n it grows like n^1/2 from both, and from Init[B] so does Z_B, without harm to the loss",
       "measured at this scale")  # fmt: skip
def norms(other: str = "B, 1/r") -> dict[str, Any]:
    """After 60 updates, each start at its best rate: powers over all widths. Of Init[A] with LoRA+ it does not grow."""
    import numpy as np

    from deltaw import statistics

    powers = {}
    for readout in BOTH:
        for start in ("A", other, "A, LoRA+"):
            means = at_best()[["z_a", "z_b"]].loc[readout, start].groupby(level="width").mean()
            powers[readout, start] = dict(zip(("Z_A", "Z_B"), (float(statistics.power(means.index.to_numpy(float), np.array(means[name])))
                                                               for name in means), strict=True))  # fmt: skip
    found = {f"{start}, readout {readout}": {key: round(value, 2) for key, value in powers[readout, start].items()}
             for readout, start in powers}  # fmt: skip
    require(powers["1/√n", "A"]["Z_A"] > 0.15 + powers["1/√n", other]["Z_A"], f"readout 1/√n: {found}")
    require(min(powers["1/n", "A"]["Z_A"], powers["1/n", other]["Z_A"], powers["1/n", other]["Z_B"]) > 0.4, f"readout 1/n: {found}")
    require(abs(powers["1/n", "A"]["Z_B"]) < 0.1, f"Z_B of Init[A]: {found}")
    require(max(powers[readout, "A, LoRA+"]["Z_A"] for readout in BOTH) < 0.1, f"LoRA+: {found}")
    return found


@claim("dynamics-record-lora-plus", "LoRA+ improves performance over one learning rate.", f"{PLUS}, abstract",
       "holds if the readout is 1/√n and the network wide: it ends lower by two fifths; with 1/n it makes no difference", "measured at this scale")  # fmt: skip
def record_lora_plus(one: str = "A, LoRA+") -> dict[str, Any]:
    """Against Init[A], each at its best rate, in the widest network: the log ratio of the training losses."""
    found = {f"readout {readout}": log_ratio(one, "A", readout, 8192) for readout in BOTH}
    require(found["readout 1/√n"][2] < 0 and found["readout 1/√n"][0] < -0.4, f"{found}")
    require(found["readout 1/n"][1] < 0 < found["readout 1/n"][2] < 0.2, f"{found}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# On MiniLM: the record of init_text


@lru_cache(maxsize=1)
def text_record() -> "pandas.DataFrame":
    from deltaw import results

    return results.load("init_text")


@lru_cache(maxsize=1)
def text_differences() -> "pandas.DataFrame":
    """A − B at the chosen rates, and the decades between these, for each task and in their "mean"."""
    from deltaw.experiments import init_text

    return init_text.differences(text_record()).set_index("task")


def at_one_rate(one: str = "A", other: str = "B") -> "pandas.DataFrame":
    """What one start is ahead of the other at the same rate, on the validation set, in the mean of the tasks: mean, and
    Student's interval over seeds. Without the rates at which a run was stopped."""
    from scipy import stats

    from deltaw.tasks.text import MEASURES

    table = text_record()
    score = table["report/accuracy"].where(table.task.map(MEASURES) != "matthews", table["report/matthews"])
    score = table.assign(score=score).pivot(index=["task", "seed"], columns=["start", "rate"], values="score")
    apart = (score[one] - score[other]).groupby(level="seed").mean()
    apart = apart.loc[:, (table.stopped == "").groupby(table.rate).all()]
    reach = stats.t.ppf(0.975, len(apart) - 1) * apart.std() / len(apart) ** 0.5
    return (apart.mean().to_frame("mean").assign(low=apart.mean() - reach, high=apart.mean() + reach)).round(3)


def trained_loss() -> "pandas.DataFrame":
    """The training loss in the mean over a run, by task and seed; of start and rate."""
    table = text_record()
    tenths = [name for name in table.columns if name.startswith("train_loss_")]
    return table.assign(loss=table[tenths].mean(axis=1, skipna=False)).pivot(index=["task", "seed"], columns=["start", "rate"], values="loss")


def same_loss(at_most: float = 0.0005, slow: str = "A", fast: str = "B") -> "pandas.Series":
    """By how much larger a rate `slow` needs to reach `fast`'s training loss, by task and `fast`'s rate."""
    import numpy as np
    import pandas

    means, factors = trained_loss().groupby(level="task", sort=False).mean(), {}
    for task, row in means.iterrows():
        fall = row[slow][:row[slow].idxmin()]  # up to the rate of its lowest loss, where it falls
        for rate, loss in row[fast][:at_most].items():
            if fall.min() <= loss <= fall.max():
                factors[task, rate] = float(np.exp(np.interp(-loss, -fall.to_numpy(), np.log(fall.index.to_numpy(float))))) / rate
    return pandas.Series(factors).rename_axis(["task", "rate"])


@claim("dynamics-text-better", "On a language model Init[A] on average yields better performance than Init[B].", f"{INIT}, abstract",
       "holds if both are run at one rate that is too large for Init[B], 0.002 or 0.004; each at its own tuned rate they are not told apart, "
       "Init[A] being ahead by 0.001 [−0.011, 0.013] in the mean of four tasks", "measured at this scale")  # fmt: skip
def text_better(one: str = "A", other: str = "B", at: tuple[float, ...] = (0.002, 0.004)) -> dict[str, Any]:
    """MiniLM, rank 8, four tasks, five seeds: the measure on the validation set. The tuned rates were the primary endpoint,
    fixed before the run; the same rate for both was looked at afterwards."""
    table, same = text_differences(), at_one_rate(one, other)
    found = {f"{task}, each at its own rate": f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" for task, row in table.iterrows()}
    require(bool((table.verdict == "not separated").all()), f"{found}")
    require([round(float(table[end]["mean"]), 3) for end in ("difference", "low", "high")] == [0.001, -0.011, 0.013], f"{found}")
    found |= {f"mean, both at {rate:g}": f"{row['mean']:+.3f} [{row.low:+.3f}, {row.high:+.3f}]" for rate, row in same.iterrows()}
    require(bool((same.low[list(at)] > 0).all()), f"{one} is not ahead at {at}: {found}")
    return found


@claim("dynamics-text-larger-rate", "On a language model the best rate of Init[A] is larger than that of Init[B].", f"{INIT}, abstract",
       "holds if four tasks are taken together: by a factor of two, one step of the grid; in no single task is it told from none",
       "measured at this scale")  # fmt: skip
def text_larger_rate(together: str = "mean", factor: float = 2.0) -> dict[str, Any]:
    """Decades from Init[B]'s chosen rate to Init[A]'s, with an interval over seeds in which each resample chooses again."""
    from deltaw.experiments import init_text

    table, chosen = text_differences(), init_text.chosen(text_record())
    found = {task: f"{row.decades:+.2f} [{row.decades_low:+.2f}, {row.decades_high:+.2f}]" for task, row in table.iterrows()}
    require(not chosen.at_edge.any(), "a rate lies at the end of the grid")
    require(bool(((table.decades - math.log10(factor)).abs() < 1e-6).all()), f"not a factor of {factor}: {found}")
    require(table.decades_low[together] > 0, f"{together}: {found}")
    require(bool((table.decades_low.drop("mean") < 0).all()), f"a task alone: {found}")
    return found | {"chosen": chosen.set_index(["task", "start"]).rate.to_dict()}


@claim("dynamics-text-same-rate", "At one and the same rate the usual Init[B] learns faster than Init[A].", BOOK,
       "holds if the rate is at most 0.001: to reach its training loss Init[A] needs a rate about twice as large; at 0.004 Init[B] has "
       "broken down on three tasks of four and Init[A] on one", "measured at this scale")  # fmt: skip
def text_same_rate(slow: str = "A", fast: str = "B", at_most: float = 0.001) -> dict[str, Any]:
    """On MiniLM. The training loss in the mean over a run, by task, with Student's interval over seeds of the paired
    difference; and the measure on the validation set, in the mean of the tasks. Looked for after the run."""
    from scipy import stats

    from deltaw.experiments import init_text

    loss, found = trained_loss(), {}
    ahead = (loss[slow] - loss[fast]).groupby(level="task", sort=False)
    low = ahead.mean() - stats.t.ppf(0.975, 4) * ahead.std() / 5**0.5
    small = low.loc[:, :at_most]
    found[f"training loss: {fast} lower beyond the interval, rates up to {at_most:g}"] = f"{int((small > 0).sum().sum())} of {small.size}"
    require(bool((small > 0).all().all()), f"{found}")
    factor = same_loss(slow=slow, fast=fast)
    found["rate at which it is reached, over the other's"] = dict(zip(("least", "median", "largest"), (round(float(value), 1) for value in factor.quantile([0, 0.5, 1])), strict=True))
    require(len(factor) == 16 and 1.8 < factor.median() < 2.2 and factor.min() > 1.4 and factor.max() < 3.2, f"{found}")
    same = at_one_rate(fast, slow)
    found["measure on the validation set"] = same["mean"].to_dict()
    require(bool((same.low[:0.0005] > 0).all()) and same.high[0.004] < 0, f"{found}")
    curves = init_text.curves(text_record())
    curves = curves[curves.set == "report"].set_index(["start", "task", "rate"])["mean"].unstack("rate")
    lost = (curves.max(axis=1) - curves[0.004]).round(3)
    found["lost of the best at 0.004"] = lost.unstack("task", sort=False).T.to_dict()
    broken = (lost > 0.1).groupby(level="start").sum()
    require(broken[fast] == 3 and broken[slow] == 1, f"{found}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# On code: the records of tuned_comparison and tuned_further, whose rows are tuned alike


@claim("dynamics-code-variance", "On code Init[B] with the variance 1/(3·out) is between the usual Init[B] and Init[A], each at its own rate.",
       f"{BOOK}, fixed before the record", "does not hold", "measured at this scale")  # fmt: skip
def code_variance(start: str = "Init[B], 1/n", usual: str = "Init[B]", other: str = "LoRA") -> dict[str, Any]:
    """It is equivalent to Init[A], within 0.01 nats: −0.0034 [−0.0070, 0.0002]. The usual Init[B], from the same draws √(out/r)
    times as large, is behind by 0.110 [0.095, 0.126]. One decoder, rank 8."""
    table, rates = on_code(), rates_on_code()
    pairs = {f"{one} − {another}": table.loc[(one, another)] for one, another in ((start, other), (usual, other), (start, usual))
             if (one, another) in table.index}  # fmt: skip
    found = {name: f"{shown(one, True, 4)}: {one.verdict}" for name, one in pairs.items()}
    require(len(pairs) == 3, f"not in the records: {found}")
    level, behind, ahead = pairs.values()
    require(level.verdict == "equivalent", f"{found}")
    require([round(level[end], 4) for end in ("difference", "low_all", "high_all")] == [-0.0034, -0.0070, 0.0002], f"{found}")
    require(behind.verdict == "worse" and ahead.verdict == "better", f"{found}")
    require([round(behind[end], 3) for end in ("difference", "low_all", "high_all")] == [0.110, 0.095, 0.126], f"{found}")
    require(rates[start] == rates[other] > rates[usual], f"rates {rates}")
    return found | {"rates": {row: rates[row] for row in (other, start, usual)}}

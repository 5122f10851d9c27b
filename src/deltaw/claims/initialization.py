"""Initialization: which of LoRA's two factors may be zero at the start, and what follows (chapter 2).

The gradients are derived on letters that do not commute and compared with autograd through the library's LoRA; starts
are followed through whole runs in float64. What is a statement about expectations is averaged over drawn starts, and
what is measured is measured on turned digits, with a base small enough to be trained here.

The reading note that some statements are from writes ΔW = A·B with A of in × r: its A, B and ΔW are our transposes.
"""

import copy
import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import sympy
import torch
from sympy import Expr
from torch import Tensor, nn

from . import claim, require
from .algebra import equal, evaluate, gradient, matrix, transpose
from .measure import apart, draw, largest

OUT, IN, RANK = 5, 7, 3
NOTE = "reading note, the initialization of LoRA"
BOOK = "this book"

A, B, D = (matrix(name) for name in ("A", "B", "Δ"))
At, Bt, Dt = (transpose(letter) for letter in (A, B, D))
s = sympy.Symbol("s", positive=True)

Optimizer = Callable[..., torch.optim.Optimizer]
Rates = tuple[float, float]  # of A and of B


class Problem(NamedTuple):
    """A layer's weight (out, in), inputs (n, in) and targets (n, out), in float64: fewer inputs than the layer is wide."""

    weight: Tensor
    x: Tensor
    target: Tensor

    def loss(self, y: Tensor) -> Tensor:
        """Of the layer's outputs (n, out); not quadratic in them, so that the gradient changes as they do."""
        return (torch.tanh(y) - self.target).square().sum() / 2


def problem(n: int = 4, out: int = OUT, into: int = IN) -> Problem:
    return Problem(draw(0, out, into), draw(1, n, into), torch.tanh(draw(2, n, out)))


def adapted(weight: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> nn.Sequential:
    """The library's LoRA on one layer, with A `(r, in)` and B `(out, r)` as its init gives them.

    A start whose factors are both other than zero is subtracted, as always.
    """
    import deltaw as dw

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(weight)
    spec = dw.LoRA(a.shape[0], alpha=scale * a.shape[0], init=lambda *_: (a, b))
    return dw.attach(nn.Sequential(layer), spec)


def put(model: nn.Sequential, a: Tensor, b: Tensor) -> nn.Sequential:
    """Other factors into an adapter that began at zero: so nothing is subtracted."""
    require(model[0].adapter.A0 is None, "the adapter subtracts its start")
    with torch.no_grad():
        model[0].adapter.A.copy_(a)
        model[0].adapter.B.copy_(b)
    return model


def gradients(model: nn.Sequential, given: Problem) -> tuple[Tensor, Tensor]:
    """∂L/∂A `(r, in)` and ∂L/∂B `(out, r)`, by autograd through the library."""
    adapter = model[0].adapter
    return torch.autograd.grad(given.loss(model(given.x)), (adapter.A, adapter.B))


def upstream(model: nn.Sequential, given: Problem) -> Tensor:
    """∂L/∂ΔW `(out, in)`, by autograd through the merged weight alone."""
    merged = model[0].merged_weight().detach().requires_grad_(True)
    return torch.autograd.grad(given.loss(given.x @ merged.mT), merged)[0]


def train(
    model: nn.Sequential, given: Problem, make: Optimizer, rates: Rates, steps: int, clip: float = math.inf, **options: Any
) -> list[Tensor]:
    """ΔW `(out, in)` after each step, with a learning rate for each factor, and clipping by the global norm."""
    adapter = model[0].adapter
    groups = [{"params": [adapter.A], "lr": rates[0]}, {"params": [adapter.B], "lr": rates[1]}]
    optimizer = make(groups, **options)
    products = []
    for _ in range(steps):
        optimizer.zero_grad()
        given.loss(model(given.x)).backward()
        nn.utils.clip_grad_norm_(adapter.parameters(), clip)
        optimizer.step()
        products.append(model[0].delta_weight())
    return products


SIGN_LIKE = partial(torch.optim.Adam, eps=1e-30)  # its first step is the gradient's sign
NO_A, NO_B = torch.zeros(RANK, IN, dtype=torch.float64), torch.zeros(OUT, RANK, dtype=torch.float64)


def some_a() -> Tensor:
    return draw(3, RANK, IN)


def some_b() -> Tensor:
    return draw(4, OUT, RANK)


# ---------------------------------------------------------------------------------------------------------------------
# The two gradients


@claim("init-gradients", "With ΔW = s·B·A the gradients are ∂L/∂A = s·Bᵀ·(∂L/∂ΔW) and ∂L/∂B = s·(∂L/∂ΔW)·Aᵀ.",
       "LoRA, equation 3, differentiated", "holds", "proved")  # fmt: skip
def check_gradients(printed: Mapping[str, Expr] | None = None) -> dict[str, Any]:
    """By algebra, and by autograd through the library at a place where neither factor is zero."""
    printed = printed or {"A": s * Bt * D, "B": s * D * At}
    compare(s * B * A, printed)
    model = put(adapted(problem().weight, some_a(), NO_B, scale=2.0), some_a(), some_b())
    values = {A: some_a(), B: some_b(), D: upstream(model, problem()), s: 2.0}
    seen = dict(zip("AB", gradients(model, problem()), strict=True))
    return {"largest relative difference": numbers_agree(printed, values, seen)}


@claim("init-note-gradients", "With ΔW = A·B the gradients are ∂L/∂A = (∂L/∂ΔW)·Bᵀ and ∂L/∂B = Aᵀ·(∂L/∂ΔW).", NOTE, "holds",
       "proved")  # fmt: skip
def check_note_gradients(printed: Mapping[str, Expr] | None = None) -> dict[str, Any]:
    """In the note's shapes: its A is our Aᵀ, its B our Bᵀ, its ΔW our ΔWᵀ, and there is no scale."""
    printed = printed or {"A": D * Bt, "B": At * D}
    compare(A * B, printed)
    model = put(adapted(problem().weight, some_a(), NO_B), some_a(), some_b())
    values = {A: some_a().mT, B: some_b().mT, D: upstream(model, problem()).mT}
    seen = {name: grad.mT for name, grad in zip("AB", gradients(model, problem()), strict=True)}
    return {"largest relative difference": numbers_agree(printed, values, seen)}


def compare(product: Expr, printed: Mapping[str, Expr]) -> None:
    """Raises unless the printed gradients of A and B are those of the product."""
    for name, letter in (("A", A), ("B", B)):
        derived = gradient(product, letter, D)
        require(equal(derived, printed[name]), f"∂L/∂{name} is {derived}, not {printed[name]}")


def numbers_agree(printed: Mapping[str, Expr], values: Mapping[Any, Any], seen: Mapping[str, Tensor]) -> float:
    """The largest relative difference of the printed gradients from those that autograd found."""
    worst = max(apart(evaluate(printed[name], values, seen[name]), seen[name]) for name in seen)
    require(worst < 1e-12, f"{worst:.1e} from what autograd finds")
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# Which factor may be zero


@claim("init-begins-as-base", "With B zero, ΔW is zero and the model begins as the pretrained one.", NOTE, "holds", "proved")  # fmt: skip
def begins_as_base(b: Tensor = NO_B) -> dict[str, Any]:
    """Bit for bit; and B zero at the start in each of the library's starts that say so."""
    import deltaw as dw

    model = put(adapted(problem().weight, some_a(), NO_B), some_a(), b)
    change = (model(problem().x) - model[0].base(problem().x)).abs().max().item()
    require(change == 0 and not model[0].delta_weight().any(), f"the outputs change by {change:.1e}")
    for init in ("A", "gaussian", "orthogonal"):
        network = dw.attach(nn.Sequential(nn.Linear(IN, IN), nn.Tanh(), nn.Linear(IN, OUT)), dw.LoRA(RANK, init=init))
        x = problem().x.float()
        with dw.disabled(network):
            base = network(x)
        require(torch.equal(network(x), base), f"init {init!r} does not begin as the base")
    return {"largest change of an output": change}


@claim("init-gaussian", "A is initialized using a Gaussian distribution.", f"{NOTE}; LoRA, section 4.1",
       "holds if one asks for it: the default is uniform", "measured at this scale")  # fmt: skip
def gaussian(default: str = "A") -> dict[str, Any]:
    """By the fourth moment, which is 9/5 of the squared variance for a uniform distribution and 3 for a Gaussian."""
    fourth = {}
    for init in (default, "gaussian"):
        a = start(init, rank=16, out=4, into=4096)[0]
        fourth[init] = (a.pow(4).mean() / a.square().mean() ** 2).item()
    require(abs(fourth[default] - 9 / 5) < 0.05, f"the default's fourth moment is {fourth[default]:.2f}")
    require(abs(fourth["gaussian"] - 3) < 0.2, f"the fourth moment of 'gaussian' is {fourth['gaussian']:.2f}")
    bound = start(default, rank=16, out=4, into=4096)[0].abs().max().item() * 64
    require(bound <= 1, f"the default exceeds 1/√in by the factor {bound:.2f}")
    return {"fourth moment, default": fourth[default], "fourth moment, 'gaussian'": fourth["gaussian"]}


def start(init: str | Callable, rank: int, out: int, into: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """A and B as the library draws them for a layer of that size."""
    import deltaw as dw
    from deltaw.adapters.inits import INITS

    layer = dw.Layer("layer", torch.zeros(out, into))
    return INITS.get(init, init)(layer, rank, scale, torch.Generator().manual_seed(seed))


@claim("init-b-gradient", "With B zero the gradient of B is not zero, because it depends on the loss and on A.", NOTE,
       "holds if (∂L/∂ΔW)·Aᵀ is not zero: a loss that is stationary, or an A that no input reaches, makes it so", "proved")  # fmt: skip
def b_gradient(unreached: Callable[[Tensor], Tensor] | None = None) -> dict[str, Any]:
    """A random A has a gradient for B. Rows of A orthogonal to every input have none, nor has a loss at its minimum;
    in both cases nothing ever moves, though A is not zero."""
    given = problem()
    found = {"A random": gradients(adapted(given.weight, some_a(), NO_B), given)[1].norm().item()}
    require(found["A random"] > 0.1, "a random A gives B no gradient")
    deaf = (unreached or orthogonal_to_inputs)(given.x)
    model = adapted(given.weight, deaf, NO_B)
    grad_a, grad_b = gradients(model, given)
    found["A orthogonal to the inputs"] = grad_b.norm().item()
    require(deaf.norm() > 0.1 and grad_b.norm() < 1e-13 and not grad_a.any(),
            f"rows orthogonal to the inputs: a gradient of {grad_b.norm():.1e}")  # fmt: skip
    fitted = given._replace(target=torch.tanh(given.x @ given.weight.mT))
    found["loss stationary"] = gradients(adapted(given.weight, some_a(), NO_B), fitted)[1].norm().item()
    require(found["loss stationary"] < 1e-13, "a stationary loss has a gradient")
    return found


def orthogonal_to_inputs(x: Tensor) -> Tensor:
    """A `(r, in)` whose rows are orthonormal, and orthogonal to all inputs `(n, in)`; n + r must not exceed in."""
    return torch.linalg.svd(x, full_matrices=True).Vh[len(x) : len(x) + RANK]


@claim("init-a-zero", "If A is initialized with zeros, its gradient will be zero.", NOTE, "holds if B is zero", "proved")  # fmt: skip
def a_zero(rule: Callable[[bool, bool], bool] = lambda a_is_zero, b_is_zero: b_is_zero) -> dict[str, Any]:
    """∂L/∂A = s·Bᵀ·(∂L/∂ΔW) has no A in it: what decides is B, whatever A is.

    Args:
        rule: whether A's gradient is zero, given which of the factors are.
    """
    found = {}
    for a_name, a in (("A zero", NO_A), ("A random", some_a())):
        for b_name, b in (("B zero", NO_B), ("B random", some_b())):
            norm = gradients(put(adapted(problem().weight, NO_A, NO_B), a, b), problem())[0].norm().item()
            expected = rule(not a.any(), not b.any())
            require((norm == 0) == expected and (expected or norm > 0.1), f"{a_name}, {b_name}: A's gradient is {norm:.1e}")
            found[f"{a_name}, {b_name}"] = norm
    derived = gradient(s * B * A, A, D)
    require(A not in derived.free_symbols and equal(derived.subs({B: 0, Bt: 0}), sympy.Integer(0)), f"∂L/∂A = {derived}")
    return found


OPTIMIZERS: dict[str, Optimizer] = {
    "SGD, momentum, weight decay": partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
    "AdamW": partial(torch.optim.AdamW, weight_decay=0.1),
    "RMSprop": torch.optim.RMSprop,
    "Adagrad": torch.optim.Adagrad,
}


@claim("init-both-zero", "With both factors zero both gradients are zero, and nothing ever moves.", "this book, after LoRA, section 4.1",
       "holds", "proved")  # fmt: skip
def both_zero(noise: float = 0.0) -> dict[str, Any]:
    """Exactly, after 50 steps of each optimizer, with momentum and weight decay."""
    found = {}
    for name, make in OPTIMIZERS.items():
        model = put(adapted(problem().weight, NO_A, NO_B), noise * some_a(), noise * some_b())
        last = train(model, problem(), make, (0.1, 0.1), 50)[-1]
        found[name] = last.norm().item()
        adapter = model[0].adapter
        require(not any(t.any() for t in (adapter.A, adapter.B, last)), f"{name}: ‖ΔW‖ = {found[name]:.1e}")
    return found


@claim("init-saddle", "Both factors zero is a saddle: a disturbance along the top singular vectors of G = ∂L/∂ΔW grows by 1 + η·s·σ₁(G) "
       "a step, while G does not change.", BOOK, "holds", "proved")  # fmt: skip
def saddle(rate: float = 0.05, growth: Callable[[float], float] = lambda step: 1 + step) -> dict[str, Any]:
    """With a loss that is linear in ΔW, so that G stays put: exactly for the disturbance εv₁ᵀ, −εu₁, whose loss falls
    and whose mirror image's rises; and from a random one, ΔW turns towards u₁v₁ᵀ."""
    g, scale, size, steps = draw(5, OUT, IN), 2.0, 1e-6, 40
    linear = Problem(draw(0, OUT, IN), torch.eye(IN, dtype=torch.float64), g.mT)
    u, sigma, vt = torch.linalg.svd(g)
    top = u[:, :1] @ vt[:1]  # (out, in)

    def norms(a: Tensor, b: Tensor) -> tuple[list[float], nn.Sequential]:
        model = put(adapted(linear.weight, torch.zeros_like(a), torch.zeros_like(b), scale), a, b)
        optimizer = torch.optim.SGD(model[0].adapter.parameters(), lr=rate)
        sizes = [model[0].adapter.B.norm().item()]
        for _ in range(steps):
            optimizer.zero_grad()
            (model(linear.x) * linear.target).sum().backward()  # = ⟨G, W + ΔW⟩
            optimizer.step()
            sizes.append(model[0].adapter.B.norm().item())
        return sizes, model

    expected = growth(rate * scale * sigma[0].item())
    sizes, down = norms(size * vt[:1], -size * u[:, :1])
    worst = max(abs(after / before / expected - 1) for before, after in pairwise(sizes))
    require(worst < 1e-9, f"the growth differs from {expected:.3f} by {worst:.1e}")
    up = put(adapted(linear.weight, NO_A[:1], NO_B[:, :1], scale), size * vt[:1], size * u[:, :1])
    changes = [(model[0].delta_weight() * g).sum().item() for model in (down, up)]
    require(changes[0] < 0 < changes[1], f"the loss changes by {changes}")
    _, turned = norms(size * some_a(), size * some_b())
    delta = turned[0].delta_weight()
    cosine = -((delta * top).sum() / delta.norm()).item()
    require(cosine > 0.95, f"cos(ΔW, −u₁v₁ᵀ) = {cosine:.3f}")
    return {"growth a step": expected, "cosine of ΔW with −u₁v₁ᵀ, from a random start": cosine}


@claim("init-zero-product", "For ΔW to be zero at the start, one of the factors has to be zero.", BOOK, "does not hold", "proved")  # fmt: skip
def zero_product(overlap: int = 0) -> dict[str, Any]:
    """Half of the rank from Init[A], half from Init[B]: neither factor is zero, B·A is, and both have a gradient."""
    a = torch.cat([draw(3, 2, IN), torch.zeros(2, IN, dtype=torch.float64)])  # (4, in)
    b = torch.cat([torch.zeros(OUT, 2 - overlap, dtype=torch.float64), draw(4, OUT, 2 + overlap)], 1)  # (out, 4)
    model = adapted(problem().weight, a, b)
    grad_a, grad_b = gradients(model, problem())
    require(not (b @ a).any() and torch.equal(model(problem().x), model[0].base(problem().x)), "the model does not begin as the base")
    require(min(a.norm(), b.norm(), grad_a.norm(), grad_b.norm()) > 0.1, "a factor or its gradient is zero")
    return {"‖BA‖": (b @ a).norm().item(), "‖∂L/∂A‖": grad_a.norm().item(), "‖∂L/∂B‖": grad_b.norm().item()}


@claim("init-zero-mixer", "Of the factors of a product at most one may begin at zero: MoSLoRA with a zero mixer and B zero never moves, "
       "LoRA-XS with a zero mixer, A and B not zero, does.", BOOK, "holds", "proved")  # fmt: skip
def zero_mixer(zero: tuple[str, ...] = ("M",)) -> dict[str, Any]:
    """By algebra for three factors: each term of a gradient has the two others in it. And in the library."""
    import deltaw as dw

    mixer = matrix("M")
    for letter in (A, B, mixer):
        derived = gradient(B * mixer * A, letter, D)
        for other in {A, B, mixer} - {letter}:
            gone = derived.subs({other: 0, transpose(other): 0})
            require(equal(gone, sympy.Integer(0)), f"with {other} zero, ∂L/∂{letter} is {gone}")

    def moves(spec: dw.Spec, zero: tuple[str, ...]) -> float:
        layer = nn.Linear(IN, OUT, bias=False, dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(problem().weight)
        model = dw.attach(nn.Sequential(layer), spec)
        with torch.no_grad():
            for name in zero:
                getattr(model[0].adapter, name).zero_()
        optimizer = torch.optim.SGD(model[0].adapter.parameters(), lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            problem().loss(model(problem().x)).backward()
            optimizer.step()
        return model[0].delta_weight().norm().item()

    found = {"MoSLoRA, B zero": moves(dw.MoSLoRA(RANK), ()), "MoSLoRA, B and M zero": moves(dw.MoSLoRA(RANK), zero),
             "LoRA-XS, M zero": moves(dw.LoRAXS(RANK), ())}  # fmt: skip
    require(found["MoSLoRA, B and M zero"] == 0, f"it moves: {found}")
    require(min(found["MoSLoRA, B zero"], found["LoRA-XS, M zero"]) > 1e-3, f"it does not move: {found}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The exchange of A and B


def transposed_runs(make: Optimizer, std_a: float, std_b: float, steps: int = 60) -> float:
    """Init[A] on a layer and Init[B] on the transposed layer, trained side by side: how far ΔW and the other ΔWᵀ part.

    The loss is a function of uₙᵀ W′ xₙ = xₙᵀ W′ᵀ uₙ, so that both are ordinary forward passes: one layer is given xₙ
    and its output multiplied by uₙ, the other the other way round.
    """
    weight, x, u, target = draw(0, OUT, IN), draw(1, 6, IN), draw(2, 6, OUT), draw(6, 6)
    a, b = std_a * draw(3, RANK, IN), std_b * draw(3, RANK, IN).mT

    def run(model: nn.Sequential, into: Tensor, against: Tensor) -> list[Tensor]:
        optimizer, products = make(model[0].adapter.parameters()), []
        for _ in range(steps):
            optimizer.zero_grad()
            (torch.tanh((model(into) * against).sum(-1)) - target).square().sum().backward()
            optimizer.step()
            products.append(model[0].delta_weight())
        return products

    original = run(adapted(weight, a, NO_B), x, u)
    exchanged = run(adapted(weight.mT.contiguous(), torch.zeros(RANK, OUT, dtype=torch.float64), b), u, x)
    return largest([product.mT for product in exchanged], original)


BLIND_TO_TRANSPOSITION: dict[str, Optimizer] = {
    "SGD": partial(torch.optim.SGD, lr=0.02),
    "momentum, weight decay": partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=0.01),
    "Adam": partial(torch.optim.Adam, lr=0.02, eps=1e-12),
    "AdamW": partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1, eps=1e-12),
}


@claim("init-transposition", "The explanation applies equally if A and B are swapped, so it does not explain the choice: (A, B, W) ↦ "
       "(Bᵀ, Aᵀ, Wᵀ) takes Init[A] on a layer to Init[B] on the transposed layer, for the whole run.", NOTE, "holds", "proved")  # fmt: skip
def transposition(std_b: float = 0.5) -> dict[str, Any]:
    """By algebra, the exchange turns one gradient into the transpose of the other; and in runs of 60 steps."""
    exchange = {A: Bt, B: At, At: B, Bt: A, D: Dt, Dt: D}
    for one, other in ((A, B), (B, A)):
        mirrored = gradient(s * B * A, one, D).xreplace(exchange)
        require(equal(mirrored, transpose(gradient(s * B * A, other, D))), f"∂L/∂{one} becomes {mirrored}")
    found = {name: transposed_runs(make, 0.5, std_b) for name, make in BLIND_TO_TRANSPOSITION.items()}
    require(max(found.values()) < 1e-9, f"apart: {found}")
    return found


@claim("init-not-mirrored", "The usual Init[B] is the mirror image of the usual Init[A].", BOOK,
       "holds if B's variance is 1/(3·out): the usual one is 1/(3·r), A's is 1/(3·in)", "proved")  # fmt: skip
def not_mirrored(mirrored: float = 1 / (3 * IN)) -> dict[str, Any]:
    """The variances that the library draws with, and the runs of `transposed_runs` with them: the transposed layer has
    `in` outputs."""
    rank, width = 8, 2000
    found = {"in · Var A": width * start("A", rank, width, width)[0].var().item(),
             "r · Var B": rank * start("B", rank, width, width, seed=1)[1].var().item()}  # fmt: skip
    require(all(abs(value - 1 / 3) < 0.01 for value in found.values()), f"variances: {found}")
    make, std_a = BLIND_TO_TRANSPOSITION["SGD"], (3 * IN) ** -0.5
    found["apart, B's variance 1/(3·out)"] = transposed_runs(make, std_a, mirrored**0.5)
    found["apart, B's variance 1/(3·r)"] = transposed_runs(make, std_a, (3 * RANK) ** -0.5)
    require(found["apart, B's variance 1/(3·out)"] < 1e-9, f"apart: {found}")
    require(found["apart, B's variance 1/(3·r)"] > 1e-2, f"not apart: {found}")
    return found


@claim("init-unseen", "Under SGD, Init[B] leaves the layer's answer to directions orthogonal to all inputs of the training as the base's, "
       "and Init[A] does not.", BOOK, "holds", "proved")  # fmt: skip
def unseen(blind: str = "B") -> dict[str, Any]:
    """Steps of A are combinations of the inputs, steps of B of the errors. So from Init[B] ΔW v = 0 for v orthogonal to
    the inputs, and from Init[A] uᵀ ΔW = 0 for u orthogonal to the errors. Adam keeps this coordinate by coordinate: an
    input that is always zero stays without effect."""
    given = problem()
    given.x[:, 0] = 0
    beyond = torch.linalg.svd(given.x, full_matrices=True).Vh[len(given.x) :]  # (in − n, in)
    starts = {"A": (some_a(), NO_B), "B": (NO_A, some_b())}

    def response(init: str, make: Optimizer, rate: float, directions: Tensor) -> float:
        last = train(adapted(given.weight, *starts[init]), given, make, (rate, rate), 50)[-1]
        return ((last @ directions.mT).norm() / last.norm()).item()

    first = torch.eye(IN, dtype=torch.float64)[:1]
    found = {
        "Init[B], SGD": response(blind, torch.optim.SGD, 0.02, beyond),
        "Init[A], SGD": response("A", torch.optim.SGD, 0.02, beyond),
        "Init[B], Adam, an input always zero": response(blind, torch.optim.Adam, 0.02, first),
        "Init[A], Adam, an input always zero": response("A", torch.optim.Adam, 0.02, first),
        "Init[B], Adam": response("B", torch.optim.Adam, 0.02, beyond),
    }
    require(found["Init[B], SGD"] < 1e-13 and found["Init[B], Adam, an input always zero"] == 0, f"Init[B] answers: {found}")
    require(min(found["Init[A], SGD"], found["Init[A], Adam, an input always zero"]) > 0.05, f"Init[A] does not: {found}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The first step

G = matrix("G")
eta = sympy.Symbol("η", positive=True)


@claim("init-first-step", "The first step of SGD is ΔW₁ = −η·s²·G·AᵀA from Init[A] and −η·s²·BBᵀ·G from Init[B]; of a sign-like optimizer, "
       "−η·s·sign(GAᵀ)·A and −η·s·B·sign(BᵀG).", BOOK, "holds", "proved")  # fmt: skip
def first_step(printed: Mapping[str, Expr] | None = None) -> dict[str, Any]:
    printed = printed or {"A": -eta * s**2 * D * At * A, "B": -eta * s**2 * B * Bt * D}
    stepped = (s * (B - eta * gradient(s * B * A, B, D)) * (A - eta * gradient(s * B * A, A, D))).expand()
    zeros = {"A": {B: 0, Bt: 0}, "B": {A: 0, At: 0}}
    starts = {"A": (some_a(), NO_B), "B": (NO_A, some_b())}
    found = {}
    for init, (a, b) in starts.items():
        derived = sympy.expand(stepped.subs(zeros[init]))
        require(equal(derived, printed[init]), f"Init[{init}]: ΔW₁ = {derived}, not {printed[init]}")
        g = upstream(adapted(problem().weight, a, b), problem())
        values = {A: a, B: b, D: g, eta: 0.01, s: 2.0}
        signs = -0.01 * 2.0 * ((g @ a.mT).sign() @ a if init == "A" else b @ (b.mT @ g).sign())
        for name, make, expected in (("SGD", torch.optim.SGD, evaluate(printed[init], values, g)), ("sign-like", SIGN_LIKE, signs)):
            step = train(adapted(problem().weight, a, b, scale=2.0), problem(), make, (0.01, 0.01), 1)[0]
            found[f"Init[{init}], {name}"] = apart(step, expected)
    require(max(found.values()) < 1e-12, f"apart: {found}")
    return found


@claim("init-first-step-size", "On average over the start, the first SGD step from Init[A] is that of full fine-tuning at the rate η·s²·r/(3·in), "
       "from Init[B] at η·s²/3: in/r times larger.", BOOK, "holds", "measured at this scale")  # fmt: skip
def first_step_size(expected: tuple[float, float] | None = None, draws: int = 3000) -> dict[str, Any]:
    """The mean of AᵀA and of BBᵀ over drawn starts, entry by entry; and the mean squared size of the step, which is
    (k + r − 1/5)·r·σ⁴·‖G‖² with k = in or out: an independent check of the spread, not only of the mean."""
    rank, width = 4, 24
    means = {"A": rank / (3 * width), "B": 1 / 3}
    if expected is not None:
        means = dict(zip("AB", expected, strict=True))
    g = draw(7, width, width) / width
    found = {}
    for init in "AB":
        seeds = range(draws) if init == "A" else range(draws, 2 * draws)
        drawn = [start(init, rank, width, width, seed)[init == "B"].double() for seed in seeds]
        stacked = torch.stack(drawn if init == "A" else [b.mT for b in drawn])  # (draws, r, width)
        squares = stacked.mT @ stacked  # AᵀA or BBᵀ, (draws, width, width)
        mean = squares.mean(0)
        off = (mean - mean.diagonal().mean() * torch.eye(width, dtype=torch.float64)).abs().max() / means[init]
        steps = g @ squares if init == "A" else squares @ g
        variance = means[init] / rank
        second = (steps.square().sum((1, 2)).mean() / g.square().sum() / (variance**2 * rank * (width + rank - 0.2))).item()
        found |= {f"mean of the diagonal, Init[{init}]": mean.diagonal().mean().item(),
                  f"squared size over its prediction, Init[{init}]": second}  # fmt: skip
        require(abs(found[f"mean of the diagonal, Init[{init}]"] / means[init] - 1) < 0.02, f"not {means[init]:.4f}: {found}")
        require(off < 0.08 and abs(second - 1) < 0.05, f"Init[{init}]: off the diagonal {off:.3f}, second moment {second:.3f}")
    found["ratio"] = found["mean of the diagonal, Init[B]"] / found["mean of the diagonal, Init[A]"]
    return found


@claim("init-first-output", "From Init[A] the first SGD step on one example moves its output exactly against its error; from Init[B] only "
       "within the columns of B.", BOOK, "holds", "proved")  # fmt: skip
def first_output(swapped: bool = False) -> dict[str, Any]:
    """ΔW₁x = −η·s²·‖Ax‖²·δ from Init[A], −η·s²·‖x‖²·BBᵀδ from Init[B]."""
    given = problem(n=1)
    starts = {"A": (some_a(), NO_B), "B": (NO_A, some_b())}
    if swapped:
        starts = {"A": starts["B"], "B": starts["A"]}
    y = (given.x @ given.weight.mT).requires_grad_(True)
    delta = torch.autograd.grad(given.loss(y), y)[0][0]  # (out,)
    x, found = given.x[0], {}
    for init, (a, b) in starts.items():
        moved = train(adapted(given.weight, a, b), given, torch.optim.SGD, (0.01, 0.01), 1)[0] @ x
        found[f"cosine with −δ, Init[{init}]"] = -(torch.dot(moved, delta) / moved.norm() / delta.norm()).item()
        expected = -0.01 * ((a @ x).square().sum() * delta if init == "A" else x.square().sum() * (b @ b.mT @ delta))
        require(apart(moved, expected) < 1e-12, f"Init[{init}] is {apart(moved, expected):.1e} from the formula")
    require(abs(found["cosine with −δ, Init[A]"] - 1) < 1e-12 and found["cosine with −δ, Init[B]"] < 0.99, f"{found}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What the scales do


def rescaled(make: Optimizer, power: int, factors: tuple[float, float], steps: int = 60, **options: Any) -> float:
    """How far two runs part: one from (A, 0) with scale s, one from (aA, 0) with scale s/(ab), its rates a^p and b^p
    times as large."""
    (a, b), scale, rates = factors, 2.0, (0.004, 0.01)
    one = train(adapted(problem().weight, some_a(), NO_B, scale), problem(), make, rates, steps, **options)
    other = adapted(problem().weight, a * some_a(), NO_B, scale / (a * b))
    return largest(train(other, problem(), make, (rates[0] * a**power, rates[1] * b**power), steps, **options), one)


@claim("init-two-numbers", "Scaling A by a, B by b and s by 1/(ab) changes no step of ΔW, once the rates of A and B are multiplied by a² and b² "
       "(SGD), or by a and b (Adam, ε → 0).", BOOK, "holds if there is neither weight decay nor clipping", "proved")  # fmt: skip
def two_numbers(powers: tuple[int, int] = (2, 1)) -> dict[str, Any]:
    """Hence four settings, s, the size of A's start and two rates, are two numbers. Momentum is allowed."""
    factors = (3.0, 0.25)
    found = {
        "SGD": rescaled(torch.optim.SGD, powers[0], factors),
        "momentum": rescaled(partial(torch.optim.SGD, momentum=0.9), powers[0], factors),
        "Adam": rescaled(SIGN_LIKE, powers[1], factors),
    }
    require(max(found.values()) < 1e-9, f"apart: {found}")
    seen = {"SGD, weight decay": rescaled(torch.optim.SGD, 2, factors, weight_decay=0.1),
            "SGD, clipping": rescaled(torch.optim.SGD, 2, factors, clip=1.0),
            "AdamW": rescaled(partial(torch.optim.AdamW, eps=1e-30), 1, factors, weight_decay=0.1)}  # fmt: skip
    require(min(seen.values()) > 1e-3, f"not apart: {seen}")
    return found | seen


@claim("init-variance-is-a-ratio", "A start c·A at the rate η is, under Adam, LoRA+ from A: its ratio c², its rate η/c.", BOOK,
       "holds if there is neither weight decay nor clipping", "proved")  # fmt: skip
def variance_is_a_ratio(power: int = 2) -> dict[str, Any]:
    """By `fit` and its `lora_plus_ratio`, in float64, on turned digits: the loss of every step. Under SGD the ratio is
    c⁴ and the rate η/c²."""
    c, rate, found = 4.0, 1e-2, {}
    for optimizer, exponent in (("adam", power), ("sgd", 2 * power)):
        eta_a = rate / c ** (exponent / 2)
        scaled_run = run_digits(scaled(c), rate, steps=15, optimizer=optimizer, double=True)
        plus = run_digits("A", eta_a, steps=15, optimizer=optimizer, double=True, lora_plus_ratio=c**exponent)
        found[optimizer] = max(abs(a - b) for a, b in zip(scaled_run.loss, plus.loss, strict=True)) / max(plus.loss)
    require(max(found.values()) < 1e-9, f"apart: {found}")
    plain = run_digits("A", rate, steps=15, optimizer="adam", double=True)
    require(max(abs(a - b) for a, b in zip(scaled_run.loss, plain.loss, strict=True)) > 1e-2, "the start's size does nothing")
    return found


@claim("init-alpha-is-a-rate", "With Adam, tuning α is roughly the same as tuning the learning rate if the initialization is scaled appropriately.",
       "LoRA, section 4.1", "holds if A's start is divided by √s; it is then the same exactly, and the rate is √s·η", "proved")  # fmt: skip
def alpha_is_a_rate(power: float = 0.5) -> dict[str, Any]:
    """LoRA with s = 4 from A/√s at η is LoRA with s = 1 from A at √s·η. With the start not scaled, no one rate of
    many does it."""
    scale, rate, steps = 4.0, 0.01, 40
    a = some_a()
    plain = train(adapted(problem().weight, a, NO_B), problem(), SIGN_LIKE, (rate * scale**0.5,) * 2, steps)
    exact = train(adapted(problem().weight, a / scale**power, NO_B, scale), problem(), SIGN_LIKE, (rate, rate), steps)
    unscaled = train(adapted(problem().weight, a, NO_B, scale), problem(), SIGN_LIKE, (rate, rate), steps)
    others = [train(adapted(problem().weight, a, NO_B), problem(), SIGN_LIKE, (rate * factor,) * 2, steps)
              for factor in torch.logspace(-0.5, 1.5, 11, base=4).tolist()]  # fmt: skip
    found = {"start divided by √s": largest(exact, plain), "start not scaled, best of 11 rates": min(largest(unscaled, run) for run in others)}
    require(found["start divided by √s"] < 1e-9, f"apart: {found}")
    require(found["start not scaled, best of 11 rates"] > 1e-2, f"not apart: {found}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# On turned digits


@lru_cache(maxsize=1)
def small_digits() -> Any:
    """Turned digits with a base that takes a second to train, tuned on a split of the training images."""
    from deltaw.tasks import digits

    return digits(angle=90, width=64, base_steps=250).for_tuning()


def run_digits(init: str | Callable, rate: float, steps: int, seed: int = 0, double: bool = False, **options: Any) -> Any:
    """The History of a rank-8 LoRA from that start; a loss of infinity stands for a run that diverged."""
    import deltaw as dw

    task = small_digits()
    base = task.model().double() if double else task.model()
    model = dw.attach(base, dw.LoRA(rank=8, init=init), seed=seed)
    options = {"optimizer": "adam", "eps": 1e-30, "schedule": "constant" if double else "linear"} | options
    return dw.fit(model, task, dw.Recipe(steps=steps, learning_rate=rate, batch_size=64, seed=seed, **options),
                  progress=False, device="cpu")  # fmt: skip


def scaled(c: float, init: str = "A") -> Callable:
    """A start of the library, c times as large."""

    def drawn(layer: Any, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        from deltaw.adapters.inits import INITS

        a, b = INITS[init](layer, rank, scale, generator)
        return c * a, c * b

    return drawn


def with_variance(init: str, variance: str) -> Callable:
    """Init[A] or Init[B] with a variance of "1/(3 width)", in or out as it may be, or of "1/(3 r)"."""

    def drawn(layer: Any, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        width = layer.in_features if init == "A" else layer.out_features
        usual = width if init == "A" else rank
        wanted = width if variance == "1/(3 width)" else rank
        return scaled(math.sqrt(usual / wanted), init)(layer, rank, scale, generator)

    return drawn


@claim("init-abrupt", "Without B zero, the model would change abruptly at the start.", NOTE,
       "holds if the product is neither small beside W nor subtracted", "measured at this scale")  # fmt: skip
def abrupt(small: float = 0.03, large: float = 2.0) -> dict[str, Any]:
    """The loss on upright digits, which the base knows, with B drawn at random behind a random A."""
    import deltaw as dw

    upright = copy.copy(small_digits())
    upright.held_out = small_digits().upright.for_tuning().held_out
    base_loss = dw.evaluate(upright.model(), upright)["loss"]

    def loss(std: float, subtract: bool) -> float:
        """At the start, with entries of B of that standard deviation."""
        g = torch.Generator().manual_seed(1)
        chosen: list[Tensor] = []

        def drawn(layer: Any, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
            a, b = scaled(1.0)(layer, rank, scale, generator)
            chosen.append(std * torch.randn(b.shape, generator=g))
            return a, chosen[-1] if subtract else b

        model = dw.attach(upright.model(), dw.LoRA(rank=8, init=drawn))
        if not subtract:
            with torch.no_grad():
                for layer, b in zip(dw.adapted_layers(model).values(), chosen, strict=True):
                    layer.adapter.B.copy_(b)
        return dw.evaluate(model, upright)["loss"]

    found = {"base": base_loss, f"std {small}": loss(small, False), f"std {large}": loss(large, False),
             f"std {large}, subtracted": loss(large, True)}  # fmt: skip
    require(found[f"std {small}"] < 1.1 * base_loss, f"a small product is abrupt: {found}")
    require(found[f"std {large}"] > 10 * base_loss, f"a large one is not: {found}")
    require(found[f"std {large}, subtracted"] == base_loss, f"subtracting does not help: {found}")
    return found


@claim("init-one-rate", "Once the learning rate is tuned, the variance of A makes no difference.", BOOK,
       "holds if A and B have a rate each; one rate for both leaves a difference", "measured at this scale")  # fmt: skip
def one_rate(small: float = 0.25, large: float = 4.0) -> dict[str, Any]:
    """On turned digits, Adam, A scaled by 1/4, 1 and 4, each at the best of three rates. With two rates the runs from
    4·A and from A are one run, and so attain the same."""
    rates = (0.016, 0.032, 0.064)
    losses = {c: [run_digits(scaled(c), rate, steps=80).metrics["loss"] for rate in rates] for c in (small, 1.0, large)}
    best = {f"{c:g}·A, one rate, best of three": min(found) for c, found in losses.items()}
    spread = min(losses[small]) / min(losses[large])
    require(spread > 1.3, f"tuned, the losses differ by the factor {spread:.2f}: {losses}")
    both = run_digits(scaled(large), 0.032, steps=15, double=True)
    same = run_digits("A", 0.032 / large, steps=15, double=True, lora_plus_ratio=large**2)
    difference = abs(both.metrics["loss"] - same.metrics["loss"])
    require(difference < 1e-9, f"with two rates, {difference:.1e} apart")
    return best | {"two rates: 4·A from A's, apart": difference}


@claim("init-which-is-zero", "It makes no meaningful difference whether A or B is zero, as long as the other one is not.",
       "LoRA's code, issue 98, one of the authors", "holds if what is random has the same variance; with the usual ones Init[B] learns faster",
       "measured at this scale")  # fmt: skip
def which_is_zero(variances: tuple[str, str] = ("1/(3 width)", "1/(3 r)")) -> dict[str, Any]:
    """Both starts with both variances, at two rates; in logarithms, the effect of the variance against that of the factor."""
    rates = (0.008, 0.016)
    losses = torch.tensor([[[run_digits(with_variance(init, variance), rate, steps=70).metrics["loss"] for rate in rates]
                            for variance in variances] for init in "AB"], dtype=torch.float64)  # fmt: skip
    logs = losses.log().mean(-1)  # (factor, variance)
    by_variance, by_factor = (logs[:, 0] - logs[:, 1]).mean().item(), (logs[0] - logs[1]).mean().abs().item()
    require(by_variance > 0.2 and by_variance > 2 * by_factor, f"by variance {by_variance:.2f}, by factor {by_factor:.2f}: {losses}")
    names = [f"Init[{init}], variance {variance}" for init in "AB" for variance in variances]
    return {"rates": rates, **dict(zip(names, losses.view(4, 2).tolist(), strict=True)),
            "log ratio by variance": by_variance, "log ratio by factor": by_factor}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Starts that are not zero


def pissa_model(rate: float = 0.0, steps: int = 0, init: str = "pissa") -> nn.Sequential:
    """A layer with a spectrum that falls, and a start that is not zero on it, after some steps of SGD."""
    import deltaw as dw

    given = problem(n=9, out=12, into=10)
    u, _, vt = torch.linalg.svd(given.weight, full_matrices=False)
    layer = nn.Linear(10, 12, bias=False, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(u * torch.logspace(1, -1, 10, dtype=torch.float64) @ vt)
    model = dw.attach(nn.Sequential(layer), dw.LoRA(RANK, alpha=2 * RANK, init=init))
    train(model, given, torch.optim.SGD, (rate, rate), steps)
    return model


@claim("init-subtracted", "A start whose product is not zero can begin as the base exactly, with the base's weight untouched, and gives both "
       "factors a gradient.", BOOK, "holds", "proved")  # fmt: skip
def subtracted(init_names: tuple[str, ...] = ("pissa", "orthogonal-pair")) -> dict[str, Any]:
    """The library computes s·(BA − B₀A₀) as s·[B − B₀, B₀]·[A; A − A₀]: at the start an exact zero."""
    found, given = {}, problem(n=9, out=12, into=10)
    for init in init_names:
        model = pissa_model(init=init)
        adapter = model[0].adapter
        before = model[0].base.weight.clone()
        change = (model(given.x) - model[0].base(given.x)).abs().max().item()
        grads = [g.norm().item() for g in gradients(model, given)]
        require((adapter.B @ adapter.A).norm() > 0.1, f"{init}: the product is zero")
        require(change == 0 and torch.equal(before, model[0].base.weight), f"{init}: the outputs change by {change:.1e}")
        require(min(grads) > 1e-3, f"{init}: gradients of {grads}")
        found[init] = f"change {change:.1f}, ‖∂L/∂A‖ {grads[0]:.2f}, ‖∂L/∂B‖ {grads[1]:.2f}"
    return found


@claim("init-pissa-eckart-young", "PiSSA's start s·B·A is the best rank-r part of W, and what it leaves frozen is the rest.",
       "PiSSA, equations 2 – 3; Eckart and Young", "holds", "proved")  # fmt: skip
def pissa_eckart_young(kept: int = RANK) -> dict[str, Any]:
    model = pissa_model()
    adapter, weight = model[0].adapter, model[0].base.weight.detach()
    rest = weight - adapter.scale * adapter.B.detach() @ adapter.A.detach()
    sigma = torch.linalg.svdvals(weight)
    require(abs(rest.square().sum() / sigma[kept:].square().sum() - 1).item() < 1e-10, "the rest is not Eckart and Young's")
    return {"‖W − sBA‖": rest.norm().item(), "by the theorem": sigma[kept:].square().sum().sqrt().item()}


@claim("init-pissa-principal", "PiSSA updates the principal components while freezing the residual parts.", "PiSSA, abstract",
       "holds if the step is small: outside the principal directions ΔW is of second order in it", "proved")  # fmt: skip
def pissa_principal(order: float = 2.0) -> dict[str, Any]:
    """Outside: with neither its column nor its row space among the r principal ones. At η → 0 that part of the first
    step falls like η², the step like η. After a hundred steps it is no longer small."""
    u, _, vt = torch.linalg.svd(pissa_model()[0].base.weight.detach(), full_matrices=False)
    u, v = u[:, :RANK], vt[:RANK].mT

    def sizes(rate: float, steps: int) -> tuple[float, float]:
        delta = pissa_model(rate, steps)[0].delta_weight()
        outside = delta - u @ (u.mT @ delta)
        outside = outside - (outside @ v) @ v.mT
        return outside.norm().item(), delta.norm().item()

    (small, step), (large, _) = sizes(1e-4, 1), sizes(1e-3, 1)
    found_order = math.log10(large / small)
    require(abs(found_order - order) < 0.05, f"the part outside is of order {found_order:.2f} in the rate")
    require(small / step < 1e-2, f"the first step has {small / step:.1e} outside")
    outside, whole = sizes(0.02, 100)
    require(outside / whole > 0.05, f"after 100 steps only {outside / whole:.1e} is outside")
    return {"order in η": found_order, "outside, one small step": small / step, "outside, after 100 steps": outside / whole}


@claim("init-twice-the-rank", "Trained from a start that is subtracted, ΔW has rank r.", BOOK,
       "holds if the start is zero: otherwise its rank is up to 2·r", "proved")  # fmt: skip
def twice_the_rank(times: int = 2) -> dict[str, Any]:
    """ΔW = s·(BA − B₀A₀) is a difference of two matrices of rank r."""
    ranks = {init: int(torch.linalg.matrix_rank(pissa_model(0.02, 20, init)[0].delta_weight(), rtol=1e-9))
             for init in ("A", "pissa", "orthogonal-pair")}  # fmt: skip
    require(ranks == {"A": RANK, "pissa": times * RANK, "orthogonal-pair": times * RANK}, f"ranks {ranks}")
    return ranks

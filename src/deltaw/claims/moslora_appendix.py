"""Appendix A of MoSLoRA (arXiv 2406.11909), equations 2 – 10, in the paper's own row-vector notation.

y = x W_merge with W_merge = W₀ + A W B: here W is the mixer, and A, W, B are our Aᵀ, Mᵀ, Bᵀ with s = 1. Each
equation is *derived*, by algebra on letters that do not commute, and compared with what is printed; and each is
checked in float64 against autograd on the library's MoSLoRA. The text writes ∂y where it means ∂L.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy import Expr
from torch import Tensor, nn

from . import claim, require
from .algebra import assuming_orthogonal, coefficients, equal, evaluate, gradient, matrix, transpose
from .measure import apart

A, W, B, D, W0, HAT = (matrix(name) for name in ("A", "W", "B", "Δ", "W₀", "Â"))
At, Wt, Bt, Ht = (transpose(letter) for letter in (A, W, B, HAT))
eta = sympy.Symbol("η", positive=True)

SOURCE = "MoSLoRA, appendix {}, equation {}"


@dataclass(frozen=True)
class Equation:
    """An equation of the appendix.

    Attributes:
        number: as printed.
        section: of the appendix.
        says: in one sentence.
        sides: (derived, printed) pairs. What is printed is a list of terms, as the paper writes them, so that a
            test can change the sign of any of them.
        given: what may be assumed of either side before they are compared.
        numbers: which of `observed`'s quantities each pair is checked against in float64.
    """

    number: int
    section: str
    says: str
    sides: Callable[[], list[tuple[Expr, list[Expr]]]]
    numbers: tuple[str, ...]
    given: Callable[[Expr], Expr] = sympy.expand
    orthogonal: bool = False


def updated(letter: Expr, function: Expr) -> Expr:
    """One step of SGD: X − η ∂L/∂X."""
    return letter - eta * gradient(function, letter, D)


MERGED = W0 + A * W * B
MERGED_HAT = W0 + HAT * B


def after_step() -> Expr:
    """A W B after one step of all three, derived."""
    return updated(A, MERGED) * updated(W, MERGED) * updated(B, MERGED)


def after_step_hat() -> Expr:
    """Â B after one step of both, derived, with Â = A W put in at the end."""
    return (updated(HAT, MERGED_HAT) * updated(B, MERGED_HAT)).subs({HAT: A * W, Ht: Wt * At})


def after_step_fixed() -> Expr:
    """A W B after one step of A and B, W fixed."""
    return updated(A, MERGED) * W * updated(B, MERGED)


def products(left: list[Expr], right: list[Expr]) -> list[Expr]:
    """The terms of (Σ left)(Σ right), so that a sign in either bracket is a sign of a printed term."""
    return [one * sum(right) for one in left]


EQUATIONS = (
    Equation(2, "A.1", "An unmerged MoSLoRA computes y = x W_merge with W_merge = W₀ + A W B.",
             lambda: [(MERGED, [W0, A * W * B])], ("merged",)),
    Equation(3, "A.1", "The gradients of A, W and B are Δ Bᵀ Wᵀ, Aᵀ Δ Bᵀ and Wᵀ Aᵀ Δ.",
             lambda: [(gradient(MERGED, A, D), [D * Bt * Wt]),
                      (gradient(MERGED, W, D), [At * D * Bt]),
                      (gradient(MERGED, B, D), [Wt * At * D])], ("grad A", "grad W", "grad B")),
    Equation(4, "A.1", "A step of SGD takes A to A − η Δ Bᵀ Wᵀ, and likewise W and B (which the paper leaves out).",
             lambda: [(updated(A, MERGED), [A, -eta * D * Bt * Wt]),
                      (updated(W, MERGED), [W, -eta * At * D * Bt]),
                      (updated(B, MERGED), [B, -eta * Wt * At * D])], ("new A", "new W", "new B")),
    Equation(5, "A.1", "After a step the product A W B is the three updated factors multiplied out.",
             lambda: [(after_step(), products(
                 [A * W, -eta * A * At * D * Bt, -eta * D * Bt * Wt * W, eta**2 * D * Bt * Wt * At * D * Bt],
                 [B, -eta * Wt * At * D]))], ("new product",)),
    Equation(6, "A.2", "With Â = A W the merged form begins with the same W_merge.",
             lambda: [(MERGED_HAT.subs(HAT, A * W), [W0, A * W * B])], ("merged hat",)),
    Equation(7, "A.2", "The gradients of Â and B are Δ Bᵀ and Âᵀ Δ.",
             lambda: [(gradient(MERGED_HAT, HAT, D), [D * Bt]),
                      (gradient(MERGED_HAT, B, D), [Ht * D])], ("grad Â", "grad B hat")),
    Equation(8, "A.2", "After a step the merged product is (A W − η Δ Bᵀ)(B − η Wᵀ Aᵀ Δ).",
             lambda: [(after_step_hat(), products([A * W, -eta * D * Bt], [B, -eta * Wt * At * D]))], ("new product hat",)),
    Equation(9, "A.3", "The merged product minus the unmerged one is the printed difference, in both its forms.",
             lambda: [(after_step_hat() - after_step(), products(
                 [-eta * D * Bt, eta * A * At * D * Bt, eta * D * Bt * Wt * W, -(eta**2) * D * Bt * Wt * At * D * Bt],
                 [B, -eta * Wt * At * D])),
                 (after_step_hat() - after_step(), products(
                     [eta * A * At * D * Bt, -(eta**2) * D * Bt * Wt * At * D * Bt, eta * D * Bt * Wt * W, -eta * D * Bt],
                     [B, -eta * Wt * At * D]))], ("difference", "difference")),
    Equation(10, "A.4", "With W fixed and orthogonal, the unmerged product after a step is the merged one.",
             lambda: [(after_step_fixed(), products([A * W, -eta * D * Bt], [B, -eta * Wt * At * D])),
                      (after_step_fixed(), [after_step_hat()])], ("new product fixed", "new product hat"),
             given=lambda expression: assuming_orthogonal(expression, W), orthogonal=True),
)  # fmt: skip


def check_symbolic(equation: Equation, sides: list[tuple[Expr, list[Expr]]] | None = None) -> dict[str, Any]:
    """Every derived side is, as a polynomial in η with non-commuting coefficients, what is printed."""
    sides = equation.sides() if sides is None else sides
    for derived, printed in sides:
        for power, difference in coefficients(equation.given(derived - sum(printed)), eta).items():
            require(equal(difference, sympy.Integer(0)),
                    f"equation {equation.number}: derived − printed has {difference} at η^{power}")
    return {"terms compared": sum(len(sympy.Add.make_args(sympy.expand(derived))) for derived, _ in sides)}


def check_numbers(equation: Equation, sides: list[tuple[Expr, list[Expr]]] | None = None) -> dict[str, Any]:
    """Every printed side, evaluated in float64, is what autograd and SGD do to the library's MoSLoRA."""
    sides = equation.sides() if sides is None else sides
    values, seen = observed(equation.orthogonal)
    worst = 0.0
    for (_, printed), quantity in zip(sides, equation.numbers, strict=True):
        expected = evaluate(sum(printed), values, seen[quantity])
        worst = max(worst, apart(expected, seen[quantity]))
    require(worst < 1e-12, f"equation {equation.number}: {worst:.1e} from what autograd finds")
    return {"largest relative difference": worst}


def observed(orthogonal: bool, seed: int = 0) -> tuple[dict[Any, Tensor | float], dict[str, Tensor]]:
    """One SGD step of the library's MoSLoRA, unmerged, merged into A, and with W fixed, on a loss that is not linear.

    Returns:
        The values of the letters (in the paper's row-vector form), and what was seen: gradients, updated factors
        and products, each as in × out or the like.
    """
    import deltaw as dw

    rate, rank = 0.05, 3
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weight, a, b, x = draw(5, 6), draw(rank, 6), draw(5, rank), draw(7, 6)  # (out, in), (r, in), (out, r), (n, in)
    mixer = torch.linalg.qr(draw(rank, rank)).Q if orthogonal else draw(rank, rank)

    def step(spec: dw.Spec, **start: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
        """Gradients, updated factors, and the product before and after, all transposed to the paper's form."""
        base = nn.Linear(6, 5, bias=False, dtype=torch.float64)
        with torch.no_grad():
            base.weight.copy_(weight)
        model = dw.attach(nn.Sequential(base), spec)
        adapter = model[0].adapter
        with torch.no_grad():
            for name, value in start.items():
                getattr(adapter, name).copy_(value)
        before = model[0].merged_weight()
        torch.tanh(model(x)).square().sum().backward()
        grads = {name: parameter.grad.mT for name, parameter in adapter.named_parameters()}
        torch.optim.SGD(adapter.parameters(), lr=rate).step()
        new = {name: parameter.detach().mT for name, parameter in adapter.named_parameters()}
        return grads, new, before.mT, model[0].delta_weight().mT

    grads, new, before, product = step(dw.MoSLoRA(rank), A=a, B=b, M=mixer)
    hat_grads, _, hat_before, hat_product = step(dw.LoRA(rank), A=mixer @ a, B=b)
    _, _, _, fixed_product = step(dw.MoSLoRA(rank, mixer=mixer, train_mixer=False), A=a, B=b)

    merged = (weight + b @ mixer @ a).requires_grad_(True)
    (delta,) = torch.autograd.grad(torch.tanh(x @ merged.mT).square().sum(), merged)
    values = {A: a.mT, W: mixer.mT, B: b.mT, D: delta.mT, W0: weight.mT, HAT: (mixer @ a).mT, eta: rate}
    seen = {
        "merged": before, "merged hat": hat_before,
        "grad A": grads["A"], "grad W": grads["M"], "grad B": grads["B"],
        "new A": new["A"], "new W": new["M"], "new B": new["B"],
        "grad Â": hat_grads["A"], "grad B hat": hat_grads["B"],
        "new product": product, "new product hat": hat_product, "new product fixed": fixed_product,
        "difference": hat_product - product,
    }  # fmt: skip
    return values, seen


def _register(equation: Equation) -> None:
    source = SOURCE.format(equation.section, equation.number)
    claim(f"appendix-eq{equation.number}", equation.says, source, "holds", "proved")(
        _named(lambda: check_symbolic(equation)))
    claim(f"appendix-eq{equation.number}-float64", f"Equation {equation.number}, evaluated in float64, is what autograd and "
          "one step of SGD do to the library's MoSLoRA.", source, "holds",
          "measured at this scale")(_named(lambda: check_numbers(equation)))


def _named(check: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    check.__module__ = __name__
    return check


for _equation in EQUATIONS:
    _register(_equation)


@claim("appendix-difference-not-zero", "The difference of the merged and the unmerged product after one step (equation 9) is not zero.",
       "MoSLoRA, appendix A.3", "holds if B is not zero, in general", "proved")  # fmt: skip
def difference_not_zero() -> dict[str, Any]:
    """It is a polynomial that is not zero; each of its terms has B in it or Bᵀ, so at B = 0 it vanishes for every W."""
    difference = sympy.expand(after_step_hat() - after_step())
    require(difference != 0, "the difference vanishes identically")
    at_zero = difference.subs({B: 0, Bt: 0})
    require(at_zero == 0, f"at B = 0 the difference is {at_zero}")
    _, seen = observed(orthogonal=False)
    require(seen["difference"].norm() > 1e-3 * seen["new product"].norm(), "the difference is negligible in float64")
    return {"terms": len(sympy.Add.make_args(difference)), "at B = 0": "0"}


@claim("appendix-only-if", "For a fixed W the two products agree after a step for all A, B and Δ only if WᵀW = I.",
       "MoSLoRA, appendix A.5", "holds", "proved")  # fmt: skip
def only_if_orthogonal() -> dict[str, Any]:
    """Their difference is −η Δ Bᵀ (WᵀW − I)(B − η Wᵀ Aᵀ Δ). With A = 0 and square invertible B, Δ it is zero for these
    only if WᵀW = I."""
    difference = after_step_fixed() - after_step_hat()
    factored = -eta * D * Bt * (Wt * W - 1) * (B - eta * Wt * At * D)
    require(equal(difference, factored), f"the difference is {sympy.expand(difference)}")
    at_zero = sympy.expand(difference.subs({A: 0, At: 0}))
    require(equal(at_zero, -eta * D * Bt * (Wt * W - 1) * B), f"at A = 0 the difference is {at_zero}")
    return {"at A = 0": str(at_zero)}


@claim("appendix-partial-y", "The gradients of equation 3 are those of y.", "MoSLoRA, appendix A.1, equation 3",
       "holds if ∂y is read as ∂L, for a loss L of y", "proved")  # fmt: skip
def partial_of_the_loss() -> dict[str, Any]:
    """y has a row for each input and a column for each output, so ∂y/∂A has four axes; ∂L/∂A is a matrix like A, and y
    itself enters it: only Δ = ∂L/∂W_merge = xᵀ ∂L/∂y makes the printed products fit."""
    g = torch.Generator().manual_seed(0)
    sizes = {"x": (7, 6), "W₀": (6, 5), "A": (6, 3), "W": (3, 3), "B": (3, 5)}
    x, w0, a, w, b = (torch.randn(*size, generator=g, dtype=torch.float64) for size in sizes.values())

    def y(a: Tensor) -> Tensor:
        return x @ (w0 + a @ w @ b)  # (n, out)

    jacobian = torch.autograd.functional.jacobian(y, a)  # (n, out, in, r)
    require(jacobian.shape == (7, 5, 6, 3) != a.shape, f"∂y/∂A has shape {tuple(jacobian.shape)}")
    back = torch.randn(7, 5, generator=g, dtype=torch.float64)  # ∂L/∂y of some loss, (n, out)
    by_chain = torch.einsum("no,noir->ir", back, jacobian)  # (in, r)
    printed = (x.mT @ back) @ b.mT @ w.mT  # Δ Bᵀ Wᵀ, (in, r)
    error = apart(by_chain, printed)
    require(error < 1e-12, f"∂L/∂A is not Δ Bᵀ Wᵀ, by {error:.1e}")
    return {"axes of ∂y/∂A": jacobian.dim(), "axes of A": a.dim(), "∂L/∂A against Δ Bᵀ Wᵀ": error}


@claim("appendix-same-delta", "Equations 5 and 8 have the same Δ.", "MoSLoRA, appendix A.2 – A.3",
       "holds if both forms have the same W_merge, as at the start", "measured at this scale")  # fmt: skip
def same_delta() -> dict[str, Any]:
    """Δ is the gradient at W_merge. Once the products differ, so do the two Δ, and equation 9 no longer describes them."""
    values, seen = observed(orthogonal=False)
    x, target = torch.randn(7, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 0.3

    def delta(product: Tensor) -> Tensor:
        merged = (values[W0] + product).requires_grad_(True)  # (in, out)
        return torch.autograd.grad((torch.tanh(x @ merged) - target).square().sum(), merged)[0]

    before = values[A] @ values[W] @ values[B], values[HAT] @ values[B]
    after = seen["new product"], seen["new product hat"]
    at_start, later = (apart(delta(other), delta(one)) for one, other in (before, after))
    require(at_start < 1e-12 and later > 1e-2, f"apart by {at_start:.1e} at the start, {later:.1e} after a step")
    return {"at the start": at_start, "after one step": later}


@claim("appendix-orthogonal-trained", "A trained W is seen even while it is orthogonal: the difference of equation 9 is then "
       "η (A − η Δ Bᵀ Wᵀ) Aᵀ Δ Bᵀ (B − η Wᵀ Aᵀ Δ).", "this book, from MoSLoRA, appendix A.3", "holds", "proved")  # fmt: skip
def orthogonal_but_trained() -> dict[str, Any]:
    difference = assuming_orthogonal(after_step_hat() - after_step(), W)
    expected = eta * (A - eta * D * Bt * Wt) * At * D * Bt * (B - eta * Wt * At * D)
    require(equal(difference, expected), f"the difference is {difference}")
    require(difference != 0, "the difference vanishes")
    return {"first order": str(coefficients(difference, eta)[1])}

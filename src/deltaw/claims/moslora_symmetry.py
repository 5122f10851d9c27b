"""Beyond appendix A of MoSLoRA: which optimizers see a mixer (chapter 7).

The appendix compares one step of SGD and concludes about "the optimization process". The rule that whole runs obey:
merging a fixed mixer is invisible exactly when the mixer is a symmetry of the optimizer.
"""

from functools import lru_cache, partial
from itertools import product
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import Tensor, nn

from . import claim, require
from .algebra import assuming_orthogonal, coefficients, equal, gradient, transpose
from .moslora_appendix import HAT, MERGED, MERGED_HAT, A, At, B, Bt, D, W, Wt, eta, updated
from .two_forms import (
    MIXERS,
    RULES,
    Mixer,
    Muon,
    Rule,
    apart,
    clip_by_norm,
    is_orthogonal,
    orthogonal,
    orthogonalized,
    signed_permutation,
)

if TYPE_CHECKING:
    import pandas

ROTATING = [name for name, rule in RULES.items() if rule.symmetries is is_orthogonal]
ELEMENTWISE = [name for name in RULES if name not in ROTATING]


@lru_cache(maxsize=1)
def compared() -> "pandas.DataFrame":
    """Every optimizer with every mixer, 200 steps: several claims look at it."""
    from .two_forms import compare

    return compare()


def distances(optimizers: list[str], mixer: str) -> dict[str, float]:
    """How far each of these optimizers' two runs came apart."""
    table = compared()
    rows = table[table.optimizer.isin(optimizers) & (table.mixer == mixer)]
    return dict(zip(rows.optimizer, rows["apart"]))


# ---------------------------------------------------------------------------------------------------------------------
# The first step, and the induction


@claim("symmetry-first-step", "From B = 0 the two forms take the same first step, whatever the optimizer and the mixer.",
       "this book, after MoSLoRA, appendix A.3",
       "holds if weight decay neither acts on a trained mixer nor enters an element-wise step", "measured at this scale")  # fmt: skip
def first_step() -> dict[str, Any]:
    """A's gradient is zero and B's is the same in both. Decaying, A W shrinks twice where Â shrinks once; and as an L2
    term inside Adam or RMSprop, decay gives A something like a gradient."""
    steps = {(name, called): apart(rule, mixer, 1)[0] for name, rule in RULES.items() for called, mixer in MIXERS.items()}
    decaying = {(name, "orthogonal, trained") for name in ("SGD, decay", "AdamW")}
    same = max(distance for pair, distance in steps.items() if pair not in decaying)
    require(same < 1e-12, f"apart at step 1: {steps}")
    twice = min(steps[pair] for pair in decaying)
    l2 = {make.__name__: apart(Rule(partial(make, lr=0.01, weight_decay=0.1), is_orthogonal), MIXERS["orthogonal"], 1)[0]
          for make in (torch.optim.Adam, torch.optim.RMSprop)}  # fmt: skip
    require(twice > 1e-6 and min(l2.values()) > 1e-3, f"decay makes no difference: {twice:.1e}, {l2}")
    return {"largest distance": same, "a trained mixer decays": twice, "L2 inside Adam": l2["Adam"]}


@claim("symmetry-induction", "If Â = A W with W fixed and orthogonal, then Â = A W and both B agree after another step of SGD.",
       "this book, the induction that MoSLoRA, appendix A.4 – A.5 leaves out", "holds", "proved")  # fmt: skip
def induction() -> dict[str, Any]:
    """The two W_merge agree, so they have one Δ; with it the factors, not only their products, correspond."""
    new_a_w = assuming_orthogonal(updated(A, MERGED) * W, W)
    new_hat = updated(HAT, MERGED_HAT).subs({HAT: A * W})
    new_b, new_b_hat = updated(B, MERGED), updated(B, MERGED_HAT).subs({transpose(HAT): Wt * At})
    require(equal(new_a_w, new_hat), f"A W after the step is {new_a_w}, Â is {new_hat}")
    require(equal(new_b, new_b_hat), f"B after the step is {new_b}, in the merged form {new_b_hat}")
    return {"A W after the step": str(sympy.expand(new_hat)), "B": str(sympy.expand(new_b))}


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


@claim("symmetry-rotations", "A fixed orthogonal mixer stays invisible for 200 steps of SGD, momentum, Nesterov, weight decay, "
       "clipping by the global norm, and Muon.", "this book, beyond MoSLoRA, appendix A.4", "holds", "measured at this scale")  # fmt: skip
def rotations() -> dict[str, Any]:
    found = distances(ROTATING, "orthogonal")
    require(max(found.values()) < 1e-9, f"apart: {found}")
    return found


@claim("symmetry-a5", "The optimization process would be the same i.i.f. W is a fixed orthogonal matrix.", "MoSLoRA, appendix A.5",
       "holds if the optimizer commutes with rotations, as SGD does and Adam does not", "measured at this scale")  # fmt: skip
def appendix_conclusion() -> dict[str, Any]:
    """Under element-wise optimizers a fixed orthogonal mixer is seen as soon as A moves; with clipping by value, once
    A's gradient is clipped."""
    found = distances(ELEMENTWISE, "orthogonal")
    require(min(found.values()) > 1e-2, f"not apart: {found}")
    require(max(distances(ROTATING, "orthogonal").values()) < 1e-9, "SGD and its like part as well")
    return found


@claim("symmetry-learnable", "The optimization process would be different if W is learnable.", "MoSLoRA, appendix A.5", "holds",
       "measured at this scale")  # fmt: skip
def learnable() -> dict[str, Any]:
    """Even if it starts orthogonal, and under every optimizer tried."""
    found = distances(list(RULES), "orthogonal, trained")
    require(min(found.values()) > 1e-2, f"not apart: {found}")
    return found


@claim("symmetry-signed-permutations", "A fixed signed permutation stays invisible for 200 steps of every optimizer tried, Adam, "
       "AdamW, Adagrad, RMSprop, sign descent and clipping by value among them.", "this book", "holds",
       "measured at this scale")  # fmt: skip
def signed_permutations() -> dict[str, Any]:
    found = distances(list(RULES), "signed permutation")
    require(max(found.values()) < 1e-9, f"apart: {found}")
    return found


@claim("symmetry-table", "Of 12 optimizers × 5 mixers, merging is invisible exactly where the mixer is fixed and a symmetry of the "
       "optimizer.", "this book", "holds", "measured at this scale")  # fmt: skip
def whole_table() -> dict[str, Any]:
    """At stable rates: the loss falls in every run. No cell is near the threshold."""
    table = compared()
    wrong = table[table.equal != table.predicted]
    require(wrong.empty, f"not as predicted: {wrong.to_dict('records')}")
    require((table.loss < 0.6).all(), f"a loss does not fall: {table.loss.max():.2f} of the first")
    equal_cells, other = table["apart"][table.equal], table["apart"][~table.equal]
    require(equal_cells.max() < 1e-10 and other.min() > 1e-2, "cells lie near the threshold")
    return {"cells": len(table), "equal": int(table.equal.sum()), "largest of these": equal_cells.max(), "smallest other": other.min()}


@claim("symmetry-muon-bf16", "Under Muon a fixed orthogonal mixer is invisible.", "this book",
       "holds if Newton–Schulz runs in more than the usual bfloat16", "measured at this scale")  # fmt: skip
def muon_in_bf16() -> dict[str, Any]:
    """The rule is a symmetry, its rounding is none: rounding does not commute with rotations, and the error grows."""
    double = apart(RULES["Muon"], MIXERS["orthogonal"], 50)
    rounded = apart(Rule(partial(Muon, lr=0.02, dtype=torch.bfloat16), is_orthogonal), MIXERS["orthogonal"], 50)
    require(max(double) < 1e-9 and max(rounded) > 1e-4, f"float64 {max(double):.1e}, bfloat16 {max(rounded):.1e}")
    return {"float64": max(double), "bfloat16, step 2": rounded[1], "bfloat16, step 50": rounded[-1]}


# ---------------------------------------------------------------------------------------------------------------------
# Only if


FIRST_STEPS = {  # φ in X − η φ(∂L/∂X)
    "identity": lambda h: h,
    "sign": torch.sign,
    "Adam's": lambda h: h / (h.abs() + 1e-8),
    "clipped by value": lambda h: h.clamp(-0.1, 0.1),
    "polar factor": lambda h: _polar(h),
}


def _polar(h: Tensor) -> Tensor:
    u, _, vt = torch.linalg.svd(h, full_matrices=False)
    return u @ vt


def defect(phi, mixer: Tensor, tries: int = 64) -> float:
    """The largest entry of φ(H Wᵀ) W − φ(H) over Gaussian H `(in, r)`: zero when one step does not see W."""
    g = torch.Generator().manual_seed(3)
    h = torch.randn(tries, 9, len(mixer), generator=g, dtype=torch.float64)  # (tries, in, r)
    return (phi(h @ mixer.mT) @ mixer - phi(h)).abs().max().item()


@claim("symmetry-one-step", "Two forms agree after one step for all A, B and Δ if and only if φ(H Wᵀ) W = φ(H) for all H, where "
       "X − η φ(∂L/∂X) is the step.", "this book", "holds", "proved")  # fmt: skip
def one_step() -> dict[str, Any]:
    """Both forms have one B′, so the products differ by η (φ(H) − φ(H Wᵀ) W) B′ with H = Δ Bᵀ. At A = 0, B is any and stays so."""
    g = torch.Generator().manual_seed(4)
    in_, out, r, rate = 7, 6, 4, 0.1
    a, b, delta = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((in_, r), (r, out), (in_, out)))
    worst = 0.0
    for phi in FIRST_STEPS.values():
        for w in (orthogonal(), signed_permutation(), 2 * orthogonal(), MIXERS["random"].start()):
            new_b = b - rate * phi(w.mT @ a.mT @ delta)  # (r, out)
            unmerged = (a - rate * phi(delta @ b.mT @ w.mT)) @ w @ new_b  # (in, out)
            merged = (a @ w - rate * phi(delta @ b.mT)) @ new_b  # (in, out)
            h = delta @ b.mT  # (in, r)
            worst = max(worst, (unmerged - merged - rate * (phi(h) - phi(h @ w.mT) @ w) @ new_b).abs().max().item())
    require(worst < 1e-12, f"the difference is not as derived, by {worst:.1e}")
    return {"largest error of the formula": worst}


@claim("symmetry-only-if-rotations", "For steps along the gradient (SGD) or its polar factor (Muon) φ(H Wᵀ) W = φ(H) for all H only "
       "if W is orthogonal.", "this book, after MoSLoRA, appendix A.5", "holds", "proved")  # fmt: skip
def only_if_rotations() -> dict[str, Any]:
    """At H with orthonormal columns the identity reads H WᵀW = H, and H PᵀW = H with P the polar factor of W."""
    for name in ("identity", "polar factor"):
        phi = FIRST_STEPS[name]
        require(defect(phi, orthogonal()) < 1e-10, f"{name} sees a rotation")
        for mixer in (2 * orthogonal(), MIXERS["random"].start()):
            h = torch.eye(9, len(mixer), dtype=torch.float64)  # (in, r), orthonormal columns
            expected = h @ (mixer if name == "identity" else _polar(mixer)).mT @ mixer - h
            require((phi(h @ mixer.mT) @ mixer - phi(h) - expected).abs().max().item() < 1e-10, f"{name}: not as derived")
            require(expected.abs().max().item() > 1e-2, f"{name} does not see {mixer}")
    return {"identity sees": "all but orthogonal W", "polar factor sees": "all but orthogonal W"}


@claim("symmetry-only-if-signs", "For element-wise steps that saturate (sign, Adam's first, clipping by value) φ(H Wᵀ) W = φ(H) for all "
       "H only if W is a signed permutation.", "this book", "holds", "proved")  # fmt: skip
def only_if_signs() -> dict[str, Any]:
    """W must map sign vectors to sign vectors. Changing one sign moves an entry of u W by 2 W_ij, so W_ij is −1, 0 or 1;
    each column then has one entry that is not 0. Here: of all such W of size 3, the invertible ones are the 48."""
    r = 3
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=r)))  # (2^r, r)
    matrices = torch.tensor(list(product((-1.0, 0.0, 1.0), repeat=r * r))).reshape(-1, r, r)  # (3^(r²), r, r)
    onto = matrices[(signs @ matrices).abs().eq(1).flatten(1).all(1)]
    invertible = onto[torch.linalg.det(onto).abs() > 0.5].double()
    require(len(onto) == (2 * r) ** r and len(invertible) == 48, f"{len(onto)} map signs to signs, {len(invertible)} are invertible")
    for name in ("sign", "Adam's", "clipped by value"):
        phi = FIRST_STEPS[name]
        require(all(defect(phi, mixer) < 1e-10 for mixer in invertible), f"{name} sees a signed permutation")
        require(min(defect(phi, mixer) for mixer in (orthogonal(), 2 * orthogonal(), MIXERS["random"].start())) > 1e-3,
                f"{name} does not see a rotation")  # fmt: skip
    return {"map signs to signs": len(onto), "invertible": len(invertible)}


# ---------------------------------------------------------------------------------------------------------------------
# Scaled mixers


def slower_a(make, divisor: float):
    """`make`, with the rate of A, the first parameter, divided."""

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        a, *others = parameters
        rate = make.keywords["lr"]
        return make([{"params": [a], "lr": rate / divisor}, {"params": others}])

    return optimizer


@claim("symmetry-scaled", "A fixed mixer c·Q with Q a symmetry is invisible once A's rate is divided by c² (SGD) or c (normalized "
       "steps).", "this book", "holds if there is neither weight decay nor clipping by the global norm", "measured at this scale")  # fmt: skip
def scaled() -> dict[str, Any]:
    """Merged, Â = c Q A: its gradient is A's divided by c, and a step of A moves it c times as far."""
    c, steps, sgd = 2.0, 100, torch.optim.SGD

    def distance(make, divisor: float, mixer: Tensor, clip=lambda parameters: None) -> float:
        rule = Rule(slower_a(make, divisor), is_orthogonal, clip)
        return max(apart(rule, Mixer(lambda: c * mixer), steps, merged_make=make))

    q, p = orthogonal(), signed_permutation()
    found = {
        "SGD, A's rate / c²": distance(partial(sgd, lr=0.01), c**2, q),
        "momentum, A's rate / c²": distance(partial(sgd, lr=0.005, momentum=0.9), c**2, q),
        "Muon, A's rate / c": distance(partial(Muon, lr=0.02), c, q),
        "Adam, signed permutation, A's rate / c": distance(partial(torch.optim.Adam, lr=0.01, eps=1e-30), c, p),
        "SGD, one rate": distance(partial(sgd, lr=0.01), 1, q),
        "Adam, rotation, A's rate / c": distance(partial(torch.optim.Adam, lr=0.01, eps=1e-30), c, q),
        "SGD with weight decay, A's rate / c²": distance(partial(sgd, lr=0.01, weight_decay=0.1), c**2, q),
        "SGD with clipping by norm, A's rate / c²": distance(partial(sgd, lr=0.01), c**2, q, clip_by_norm),
    }
    values = list(found.values())
    require(max(values[:4]) < 1e-9 and min(values[4:]) > 1e-4, f"{found}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A trained mixer


@claim("symmetry-trained-step", "While W is orthogonal, training it too moves Â = A W by −η (1 + A Aᵀ) Δ Bᵀ to first order, where LoRA "
       "moves Â by −η Δ Bᵀ.", "this book", "holds", "proved")  # fmt: skip
def trained_step() -> dict[str, Any]:
    """What a trained mixer adds is a step inside the column space that A has already."""
    change = sympy.expand(updated(A, MERGED) * updated(W, MERGED) - A * W)
    first = assuming_orthogonal(coefficients(change, eta)[1], W)
    require(equal(first, -(1 + A * At) * D * Bt), f"the first-order change is {first}")
    return {"first order": str(first)}


@claim("symmetry-conserved", "Under gradient flow AᵀA − W Wᵀ and WᵀW − B Bᵀ do not change.", "this book, as for deep linear networks",
       "holds", "proved")  # fmt: skip
def conserved() -> dict[str, Any]:
    """d(AᵀA) = ȦᵀA + AᵀȦ with Ȧ = −∂L/∂A, and so on: every term cancels."""
    flow = {letter: -gradient(MERGED, letter, D) for letter in (A, W, B)}

    def rate(left: sympy.Expr, right: sympy.Expr) -> sympy.Expr:
        """d(left · right)/dt, where either is one of the letters or its transpose."""
        known = flow | {transpose(letter): transpose(speed) for letter, speed in flow.items()}
        return sympy.expand(known[left] * right + left * known[right])

    first, second = rate(At, A) - rate(W, Wt), rate(Wt, W) - rate(B, Bt)
    require(sympy.expand(first) == 0, f"AᵀA − W Wᵀ changes by {sympy.expand(first)}")
    require(sympy.expand(second) == 0, f"WᵀW − B Bᵀ changes by {sympy.expand(second)}")
    require(rate(At, A) != 0 and rate(B, Bt) != 0, "nothing moves at all")
    return {"d(AᵀA)/dt": str(rate(At, A)), "d(W Wᵀ)/dt": str(rate(W, Wt))}


@claim("symmetry-orthogonalized", "Muon's Newton–Schulz iteration commutes with rotations of either side.", "this book", "holds",
       "measured at this scale")  # fmt: skip
def newton_schulz_commutes() -> dict[str, Any]:
    """It is an odd polynomial G p(GᵀG), with a norm that rotations leave alone."""
    g = torch.Generator().manual_seed(5)
    gradient_ = torch.randn(9, 4, generator=g, dtype=torch.float64)  # (in, r)
    q = orthogonal()
    difference = (orthogonalized(gradient_ @ q) - orthogonalized(gradient_) @ q).norm() / orthogonalized(gradient_).norm()
    stretched = (orthogonalized(gradient_ @ MIXERS["random"].start()) - orthogonalized(gradient_) @ MIXERS["random"].start()).norm()
    require(difference.item() < 1e-12 and stretched.item() > 1e-2, f"{difference:.1e}, {stretched:.1e}")
    return {"rotation": difference.item(), "random": stretched.item()}

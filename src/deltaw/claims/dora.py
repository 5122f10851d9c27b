"""DoRA: magnitude and direction, its two gradients, its norm (chapter 5). What the records say is in `dora_record`.

Rows throughout: a weight is out × in and has one length for each output. With V = W + up·down, v its rows at unit
length, C their lengths, g = m / C and G = ∂L/∂W′, the formulas of Liu et al. (arXiv 2402.09353) read, row by row,

    W′ = g V,    ∂L/∂m = G·v (eq. 7),    ∂L/∂V = g (G − (G·v) v) (eq. 6),    detached: ∂L/∂V = g G (eq. 11).
"""

import copy
import itertools
import math
from collections.abc import Callable, Collection, Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, Tensor, nn

from ..adapters.dora import merged_norm
from . import claim, require
from .measure import apart, draw

if TYPE_CHECKING:
    import deltaw as dw

PAPER = "DoRA, "


# --- the formulas ----------------------------------------------------------------------------------------


def length(v: Tensor) -> Tensor:
    """Of every row: (out, in) → (out, 1)."""
    return v.norm(dim=1, keepdim=True)


def along(a: Tensor, b: Tensor) -> Tensor:
    """The dot product of every row of a with that of b: (out, in) twice → (out, 1)."""
    return (a * b).sum(dim=1, keepdim=True)


def exact(v: Tensor, m: Tensor, g: Tensor) -> Tensor:
    """Equation 6 by rows: ∂L/∂V for V and G = ∂L/∂W′ of (out, in) and m of (out,)."""
    unit = v / length(v)
    return m[:, None] / length(v) * (g - along(g, unit) * unit)


def detached(v: Tensor, m: Tensor, g: Tensor) -> Tensor:
    """Equation 11."""
    return m[:, None] / length(v) * g


def of_magnitude(v: Tensor, g: Tensor) -> Tensor:
    """Equation 7: ∂L/∂m, (out,)."""
    return along(g, v / length(v))[:, 0]


def radial_part(v: Tensor, m: Tensor, g: Tensor) -> Tensor:
    """What the detached gradient has and the exact one has not: g ∂L/∂m along each row."""
    unit = v / length(v)
    return m[:, None] / length(v) * along(g, unit) * unit


# --- the library's DoRA in float64 -----------------------------------------------------------------------


def dora(weight: Tensor, a: Tensor, b: Tensor, magnitude: Tensor | None = None, detach: bool = True, s: float = 1.0) -> "dw.AdaptedLinear":
    """The library's DoRA over LoRA on one layer without bias: W (out, in), A (r, in), B (out, r), m (out,) or ‖W‖."""
    import deltaw as dw

    rank = a.shape[0]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        linear.weight.copy_(weight)
    layer = dw.attach(nn.Sequential(linear), dw.DoRA(dw.LoRA(rank, alpha=s * rank), detach_norm=detach))[0]
    with torch.no_grad():
        layer.adapter.inner.A.copy_(a)
        layer.adapter.inner.B.copy_(b)
        if magnitude is not None:
            layer.adapter.magnitude.copy_(magnitude)
    return layer


def dora_of_v(weight: Tensor, change: Tensor, magnitude: Tensor, detach: bool) -> "dw.AdaptedLinear":
    """A DoRA that trains V itself: with A the identity, V = W + B, so ∂L/∂B is ∂L/∂V."""
    return dora(weight, torch.eye(weight.shape[1], dtype=weight.dtype), change, magnitude, detach)


def bend(y: Tensor) -> Tensor:
    """A loss that is not linear."""
    return torch.tanh(y).square().sum()


def upstream(merged: Tensor, x: Tensor) -> Tensor:
    """G = ∂L/∂W′ by autograd, on a plain weight."""
    merged = merged.detach().requires_grad_(True)
    return torch.autograd.grad(bend(x @ merged.mT), merged)[0]


def gradients_of_v(detach: bool, seed: int = 0) -> dict[str, Tensor]:
    """V, m, G, and what the library's autograd gives for V and m."""
    weight, change, x = draw(seed, 5, 6), draw(seed + 1, 5, 6), draw(seed + 2, 7, 6)
    m = draw(seed + 3, 5).abs() + 0.5
    layer = dora_of_v(weight, change, m, detach)
    bend(layer(x)).backward()
    adapter = layer.adapter
    return {"V": weight + change, "m": m, "G": upstream(layer.merged_weight(), x), "of V": adapter.inner.B.grad,
            "of m": adapter.magnitude.grad}  # fmt: skip


# --- decomposition ---------------------------------------------------------------------------------------


@claim("dora-two-matrices", "The weights are decomposed into two matrices, one for the magnitude and one for the direction.",
       "the reading note, on DoRA", "holds if the magnitude is read as a diagonal matrix: it is a vector, one number an output",
       "proved")  # fmt: skip
def two_matrices() -> dict[str, Any]:
    """W = diag(m) V̂: the library's magnitude is (out,), and diag(m) times the rows at unit length is W."""
    weight = draw(0, 5, 7)
    adapter = dora(weight, draw(1, 2, 7), torch.zeros(5, 2, dtype=torch.float64)).adapter
    m = adapter.magnitude.detach()
    require(m.shape == (5,), f"the magnitude has the shape {tuple(m.shape)}")
    found = apart(m.diag() @ (weight / length(weight)), weight)
    require(found < 1e-14, f"diag(m) V̂ is {found:.1e} from W")
    return {"numbers in m": m.numel(), "numbers in W": weight.numel(), "diag(m) V̂ − W": found}


@claim("dora-start", "With m = ‖W₀‖ and B = 0, W′ equals W₀ before the fine-tuning.", PAPER + "section 4.1, equation 5",
       "holds if no row of W₀ is zero", "proved")  # fmt: skip
def start() -> dict[str, Any]:
    """A row of zeros has no direction: the printed formula gives 0/0 there. The library lets its gain be 1."""
    weight, a, b = draw(0, 5, 7), draw(1, 2, 7), torch.zeros(5, 2, dtype=torch.float64)
    printed = length(weight) * (weight + b @ a) / length(weight + b @ a)
    found = {"no zero row": apart(printed, weight)}
    require(found["no zero row"] < 1e-14, f"W′ is {found['no zero row']:.1e} from W₀")
    weight[2] = 0
    printed = length(weight) * (weight + b @ a) / length(weight + b @ a)
    require(bool(printed[2].isnan().all()) and bool(printed[[0, 1, 3, 4]].isfinite().all()), "the zero row is finite")
    merged = dora(weight, a, b).merged_weight()
    require(torch.equal(merged, weight), "the library does not begin as W₀")
    return found | {"numbers that are not finite, as printed": int(printed.isnan().sum()), "in the library": int(merged.isnan().sum())}


# --- gradients -------------------------------------------------------------------------------------------


@claim("dora-eq6", "The gradient of V′ is (m / ‖V′‖)(I − V′V′ᵀ / ‖V′‖²) times that of W′.", PAPER + "section 4.2, equation 6",
       "holds if it is read one vector at a time: V′V′ᵀ of the whole matrix is no projection", "proved")  # fmt: skip
def equation_6() -> dict[str, Any]:
    seen = gradients_of_v(detach=False)
    by_vector = apart(exact(seen["V"], seen["m"], seen["G"]), seen["of V"])
    require(by_vector < 1e-12, f"equation 6 by rows is {by_vector:.1e} from autograd")
    units, g = (seen["V"] / length(seen["V"])).mT, seen["G"].mT  # (in, out): the paper's columns
    whole = (seen["m"] / length(seen["V"])[:, 0] * (g - units @ (units.mT @ g))).mT
    require(apart(whole, seen["of V"]) > 0.1, "the product of whole matrices is the gradient, too")
    return {"by vector": by_vector, "as whole matrices": apart(whole, seen["of V"])}


@claim("dora-eq7", "The gradient of m is the gradient of W′ along V′ / ‖V′‖, whether or not the norm is detached.",
       PAPER + "equation 7 and section 4.3", "holds", "proved")  # fmt: skip
def equation_7() -> dict[str, Any]:
    found = {}
    for detach in (False, True):
        seen = gradients_of_v(detach)
        found["detached" if detach else "exact"] = apart(of_magnitude(seen["V"], seen["G"]), seen["of m"])
    require(max(found.values()) < 1e-12, f"equation 7 is {found} from autograd")
    return found


@claim("dora-eq11", "With the norm taken as a constant C the gradient of V′ is (m / C) times that of W′.", PAPER + "equation 11",
       "holds", "proved")  # fmt: skip
def equation_11() -> dict[str, Any]:
    seen = gradients_of_v(detach=True)
    found = apart(detached(seen["V"], seen["m"], seen["G"]), seen["of V"])
    require(found < 1e-12, f"equation 11 is {found:.1e} from autograd")
    require(apart(exact(seen["V"], seen["m"], seen["G"]), seen["of V"]) > 0.1, "equation 6 is the same")
    return {"from autograd": found}


@claim("dora-orthogonal", "The loss does not depend on the length of V; so its exact gradient is orthogonal to V, and a step of SGD can "
       "only lengthen the rows of V.", "this book, after Salimans and Kingma 2016, section 2.1", "holds", "proved")  # fmt: skip
def orthogonal() -> dict[str, Any]:
    """L(cV) = L(V), V·∂L/∂V = 0, hence ‖V − η ∂L/∂V‖² = ‖V‖² + η² ‖∂L/∂V‖² by rows: for V itself, not for B·A."""
    weight, change, x, m = draw(0, 5, 6), draw(1, 5, 6), draw(2, 7, 6), draw(3, 5).abs() + 0.5
    c = torch.tensor([0.1, 0.5, 2.0, 10.0, 100.0], dtype=torch.float64)[:, None]
    scaled = c * (weight + change) - weight  # the change that makes V c times as long
    losses = [bend(dora_of_v(weight, d, m, False)(x)).item() for d in (change, scaled)]
    require(abs(losses[0] - losses[1]) < 1e-12 * losses[0], f"the loss changes with the length of V: {losses}")
    found = {}
    for detach in (False, True):
        seen = gradients_of_v(detach)
        v, grad = seen["V"], seen["of V"]
        found["detached" if detach else "exact"] = (along(grad, v).abs() / (length(grad) * length(v))).max().item()
        if not detach:
            grown = length(v - 0.3 * grad).square() - length(v).square()
            require(apart(grown, 0.09 * length(grad).square()) < 1e-12, "‖V‖² does not grow by η² ‖∂L/∂V‖²")
    require(found["exact"] < 1e-14, f"the exact gradient has a cosine of {found['exact']:.1e} with V")
    require(found["detached"] > 0.1, "the detached gradient is orthogonal to V as well")
    return {f"largest |cos(∂L/∂V, V)|, {key}": value for key, value in found.items()}


# --- detaching -------------------------------------------------------------------------------------------


def direction_after(detach: bool, rate: float | Tensor, seed: int = 0) -> Tensor:
    """The rows of V at unit length after one step of SGD on V itself, by the library; `rate` may be (out, 1)."""
    weight, change, x, m = draw(seed, 5, 6), draw(seed + 1, 5, 6), draw(seed + 2, 7, 6), draw(seed + 3, 5).abs() + 0.5
    layer = dora_of_v(weight, change, m, detach)
    bend(layer(x)).backward()
    v = weight + change - rate * layer.adapter.inner.B.grad
    return v / length(v)


@claim("dora-detach-v", "For V itself a detached step turns each row exactly as an exact step at the rate η / (1 − η g ∂L/∂m / ‖V‖) "
       "does: the two differ by O(η²).", "this book", "holds", "proved")  # fmt: skip
def detaching_v() -> dict[str, Any]:
    seen = gradients_of_v(detach=True)
    gain = seen["m"][:, None] / length(seen["V"])
    found = {}
    for rate in (1e-1, 1e-2, 1e-3):
        other = rate / (1 - rate * gain * of_magnitude(seen["V"], seen["G"])[:, None] / length(seen["V"]))
        same = apart(direction_after(True, rate), direction_after(False, other))
        require(same < 1e-13, f"η = {rate}: {same:.1e} from the exact step at the other rate")
        found[f"η = {rate}"] = apart(direction_after(True, rate), direction_after(False, rate))
    large, middle, small = found.values()
    require(80 < middle / small < 125 and large > middle, f"not of second order: {found}")
    return found | {"ten times the rate, times the difference": middle / small}


@claim("dora-detach-factors", "For B and A the detached gradient is the exact one plus s (g ∂L/∂m v) Aᵀ and s Bᵀ (g ∂L/∂m v).",
       "this book", "holds", "proved")  # fmt: skip
def detaching_factors() -> dict[str, Any]:
    s = 2.0
    weight, a, b, x, m = draw(0, 5, 6), draw(1, 2, 6), draw(2, 5, 2), draw(3, 7, 6), draw(4, 5).abs() + 0.5
    grads = {}
    for detach in (False, True):
        layer = dora(weight, a, b, m, detach, s)
        bend(layer(x)).backward()
        grads[detach] = layer.adapter.inner.A.grad, layer.adapter.inner.B.grad
    v, g = weight + s * b @ a, upstream(layer.merged_weight(), x)
    extra = radial_part(v, m, g)
    found = {
        "A": apart(grads[True][0] - grads[False][0], s * b.mT @ extra),
        "B": apart(grads[True][1] - grads[False][1], s * extra @ a.mT),
    }
    require(max(found.values()) < 1e-12, f"the difference is {found} from the formula")
    sizes = {name: apart(grads[True][i], grads[False][i]) for i, name in enumerate("AB")}
    require(min(sizes.values()) > 0.01, f"the two gradients hardly differ: {sizes}")
    return {f"{name}, detached against exact": size for name, size in sizes.items()} | {"off the formula": max(found.values())}


# The worked example of the chapter: two rows 3-4-5, one step away from W along A.
EXAMPLE_W = [[3.0, 0.0], [4.0, 0.0]]
EXAMPLE_A, EXAMPLE_B = [[0.0, 1.0]], [[4.0], [3.0]]


@claim("dora-detach-stationary", "The detached and the exact gradient vanish at the same points.", "this book",
       "holds if the magnitude is trained: at ∂L/∂m = 0 the two are one", "proved")  # fmt: skip
def stationary() -> dict[str, Any]:
    """Their difference is a multiple of ∂L/∂m, row by row. With m fixed, the worked example has a detached gradient
    of zero where the exact one is not."""
    weight, a, b, m = draw(0, 5, 6), draw(1, 2, 6), draw(2, 5, 2), draw(4, 5).abs() + 0.5
    unit = (weight + b @ a) / length(weight + b @ a)
    g = draw(5, 5, 6)
    g = g - along(g, unit) * unit  # ∂L/∂m = 0
    found = {}
    for detach in (False, True):
        layer = dora(weight, a, b, m, detach)
        (layer(torch.eye(6, dtype=torch.float64)) * g.mT).sum().backward()
        found[detach] = layer.adapter
    require(found[True].magnitude.grad.abs().max() < 1e-13, "∂L/∂m is not zero here")
    same = max(apart(getattr(found[True].inner, n).grad, getattr(found[False].inner, n).grad) for n in "AB")
    require(same < 1e-13, f"the two are {same:.1e} apart where ∂L/∂m = 0")

    fixed = {}
    for detach in (False, True):
        layer = dora(*(torch.tensor(t, dtype=torch.float64) for t in (EXAMPLE_W, EXAMPLE_A, EXAMPLE_B)), detach=detach)
        layer(torch.eye(2, dtype=torch.float64))[0].sum().backward()  # L = W′₁₁ + W′₂₁
        fixed["detached" if detach else "exact"] = layer.adapter.inner.B.grad[:, 0]
    require(fixed["detached"].abs().max() < 1e-15, f"the detached gradient of B is {fixed['detached'].tolist()}")
    require(fixed["exact"].abs().min() > 0.2, f"the exact gradient of B is {fixed['exact'].tolist()}")
    return {"apart where ∂L/∂m = 0": same} | {f"example, ∂L/∂B, {key}": value.tolist() for key, value in fixed.items()}


def magnitudes_faster(ratio: float) -> Callable[[list[dict]], torch.optim.Optimizer]:
    """For `Recipe(optimizer=…)`: AdamW that gives the magnitudes (what is trained and is a vector) `ratio` times the rate."""

    def make(groups: list[dict]) -> torch.optim.Optimizer:
        split = []
        for group in groups:
            vectors = [p for p in group["params"] if p.dim() == 1]
            split.append(group | {"params": [p for p in group["params"] if p.dim() > 1]})
            split.append(group | {"params": vectors, "lr": ratio * group["lr"]})
        return torch.optim.AdamW([group for group in split if group["params"]], fused=True)

    return make


def watched(task: "dw.tasks.Task", look: Callable[[int, nn.Module], None], steps: Collection[int]) -> "dw.tasks.Task":
    """The task, which calls `look(step, model)` before the updates in `steps`; for one run."""
    task, counter, losses = copy.copy(task), itertools.count(), task.losses

    def looking(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        step = next(counter)
        if model.training and step in steps:
            look(step, model)
        return losses(model, batch)

    task.losses = looking
    return task


@torch.no_grad()
def row_growth(model: nn.Module) -> float:
    """How many times as long as W's the rows of V = W + up·down are, on average over all of the model's layers."""
    import deltaw as dw

    ratios = []
    for layer in dw.adapted_layers(model).values():
        down, up = layer.adapter.factors()
        ratios.append(length(layer.weight + up @ down) / length(layer.weight))
    return torch.cat(ratios).mean().item()


def two_gradients(model: nn.Module, task: "dw.tasks.Task", batch: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """For each layer ‖up·down‖ / ‖W‖, and how far the detached gradient of the inner adapter is from the exact one."""
    import deltaw as dw

    grads: dict[bool, dict[str, Tensor]] = {}
    for detach in (True, False):
        twin = copy.deepcopy(model).double()
        layers = dw.adapted_layers(twin)
        for layer in layers.values():
            layer.adapter.detach_norm = detach
        twin.zero_grad()
        task.losses(twin, batch).mean().backward()
        grads[detach] = {name: torch.cat([p.grad.flatten() for p in layer.adapter.inner.parameters()]) for name, layer in layers.items()}
    found = {}
    for name, layer in dw.adapted_layers(model).items():
        with torch.no_grad():
            down, up = layer.adapter.factors()
            found[name] = ((up @ down).norm() / layer.weight.norm()).item(), apart(grads[True][name], grads[False][name])
    return found


@cache
def on_digits(angle: int, detach: bool, rate: float, ratio: float = 1.0, steps: int = 120) -> dict[str, float]:
    """DoRA(LoRA(8)) on turned digits: accuracy, and how much longer the rows of V have become."""
    import deltaw as dw
    from deltaw.tasks import digits

    task = digits(angle=angle)
    model = dw.attach(task.model(), dw.DoRA(dw.LoRA(rank=8), detach_norm=detach), seed=1)
    recipe = dw.Recipe(steps=steps, learning_rate=rate, batch_size=64, schedule="linear", seed=1, optimizer=magnitudes_faster(ratio))
    history = dw.fit(model, task, recipe, progress=False, device="cpu")
    return {"accuracy": history.metrics["accuracy"], "rows of V longer by": row_growth(model)}


@claim("dora-detach-magnitude", "Where detaching costs accuracy, the rows of V grow for nothing, and magnitudes trained at ten times the "
       "rate prevent both.", "this book", "holds", "measured at this scale")  # fmt: skip
def detaching_magnitude() -> dict[str, Any]:
    runs = {"exact": on_digits(90, False, 0.03), "detached": on_digits(90, True, 0.03),
            "exact, m faster": on_digits(90, False, 0.03, 10.0), "detached, m faster": on_digits(90, True, 0.03, 10.0)}  # fmt: skip
    grown = {name: run["rows of V longer by"] for name, run in runs.items()}
    right = {name: run["accuracy"] for name, run in runs.items()}
    require(grown["detached"] > 1.4 * max(grown["exact"], grown["detached, m faster"]), f"lengths: {grown}")
    require(right["exact"] - right["detached"] > 0.04, f"accuracies: {right}")
    require(abs(right["exact, m faster"] - right["detached, m faster"]) < 0.03, f"accuracies: {right}")
    return {f"{name}, rows of V": f"× {grown[name]:.2f}, accuracy {right[name]:.3f}" for name in runs}


# --- the norm --------------------------------------------------------------------------------------------


def formed_norm(weight: Tensor, weight_norm: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """‖W + up·down‖ as it is read: an out × in matrix, in the weight's precision, and its norm."""
    return torch.linalg.vector_norm(weight + (up @ down).to(weight.dtype), dim=1)


@claim("dora-norm", "‖W + up·down‖² = ‖W‖² + rowsum((2 W downᵀ + up (down downᵀ)) ⊙ up), without an out × in matrix.", "this book",
       "holds", "proved")  # fmt: skip
def factored_norm() -> dict[str, Any]:
    """The library's `merged_norm` in float64; on the meta device, no tensor it makes is as large as the weight."""
    weight, down, up = draw(0, 40, 30), draw(1, 3, 30), draw(2, 40, 3)
    found = apart(merged_norm(weight, weight.norm(dim=1), down, up), (weight + up @ down).norm(dim=1))
    require(found < 1e-14, f"{found:.1e} from the norm of the formed matrix")
    largest = {name: max(made_by(norm, 4096, 11008, 16)) for name, norm in (("factored", merged_norm), ("formed", formed_norm))}
    require(largest["formed"] == 4096 * 11008, f"the formed norm makes {largest['formed']} numbers at most")
    require(largest["factored"] == 4096 * 16, f"the factored norm makes {largest['factored']} numbers at most")
    return {"relative difference": found} | {f"largest tensor made, {name}": size for name, size in largest.items()}


def made_by(norm: Callable[..., Tensor], out: int, in_: int, rank: int, dtype: torch.dtype = torch.float32) -> list[int]:
    """How many numbers each new tensor has that a norm makes on its way, for an out × in layer on the meta device."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    sizes = []

    class Seeing(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
            sizes.extend(t.numel() for t in tree_leaves(result)
                         if isinstance(t, Tensor) and t.untyped_storage()._cdata not in known)  # fmt: skip
            return result

    given = on_meta(out, in_, rank, dtype)
    with torch.no_grad(), Seeing():
        norm(*given)
    return sizes


def kept_by(norm: Callable[..., Tensor], out: int, in_: int, rank: int, detach: bool, dtype: torch.dtype = torch.float32) -> int:
    """Bytes that autograd keeps because of the gain m / norm, besides the parameters and the weight: out × in on meta."""
    weight, weight_norm, down, up = on_meta(out, in_, rank, dtype)
    down.requires_grad_(True), up.requires_grad_(True)
    m = torch.empty(out, device="meta", requires_grad=True)
    there = {t.untyped_storage()._cdata for t in (weight, weight_norm, down, up, m)}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        value = norm(weight, weight_norm, down, up)
        if detach:
            kept.clear()  # the graph of a norm that is detached goes at once
            value = value.detach()
        gain = m / value
    del gain
    return sum(t.untyped_storage().nbytes() for key, t in kept.items() if key not in there)


def on_meta(out: int, in_: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W in `dtype`, ‖W‖, down and up in fp32."""
    meta = {"device": "meta"}
    return (torch.empty(out, in_, dtype=dtype, **meta), torch.empty(out, **meta), torch.empty(rank, in_, **meta),
            torch.empty(out, rank, **meta))  # fmt: skip


# --- LLaMA's shapes --------------------------------------------------------------------------------------

LLAMA = {
    "LLaMA-7B": {"hidden": 4096, "inner": 11008, "layers": 32, "keys": 4096, "vocabulary": 32000},
    "LLaMA-13B": {"hidden": 5120, "inner": 13824, "layers": 40, "keys": 5120, "vocabulary": 32000},
    "LLaMA-3-8B": {"hidden": 4096, "inner": 14336, "layers": 32, "keys": 1024, "vocabulary": 128256},
}
FIVE = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # its Table 8
SEVEN = (*FIVE, "o_proj", "gate_proj")


class Block(nn.Module):
    """The parameters of one of LLaMA's layers; `keys` is the width of keys and values together."""

    def __init__(self, hidden: int, inner: int, keys: int):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(hidden, hidden, bias=False), nn.Linear(hidden, keys, bias=False)
        self.v_proj, self.o_proj = nn.Linear(hidden, keys, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.norms = nn.ModuleList(nn.RMSNorm(hidden) for _ in range(2))


@cache
def trained(name: str, rank: int, directions: tuple[str, ...], magnitudes: tuple[str, ...] = ()) -> dict[str, int]:
    """What DoRA trains in a LLaMA: A and B on `directions`, m on `magnitudes`, one number a row or one a column.

    The library counts one block on the meta device, where tensors have shapes and no numbers; all blocks are alike.
    """
    import deltaw as dw

    shape = LLAMA[name]
    layers, hidden = shape["layers"], shape["hidden"]
    with torch.device("meta"):
        block = Block(hidden, shape["inner"], shape["keys"])
    sides = {key: (layer.out_features, layer.in_features) for key, layer in block.named_children() if key in magnitudes}
    base = layers * sum(p.numel() for p in block.parameters()) + 2 * shape["vocabulary"] * hidden + hidden
    dw.attach(block, dw.DoRA(dw.LoRA(rank)), targets=directions)
    adapters = [layer.adapter for layer in dw.adapted_layers(block).values()]
    inner = sum(p.numel() for adapter in adapters for p in adapter.inner.parameters())
    rows, columns = (layers * sum(sizes[i] for sizes in sides.values()) for i in (0, 1))
    if magnitudes == directions:
        rows = layers * sum(adapter.magnitude.numel() for adapter in adapters)  # the library's own
    return {"base": base, "A and B": layers * inner, "m by rows": rows, "m by columns": columns}


def percent(counts: dict[str, int], axis: str = "rows") -> float:
    """Of all numbers, the trained ones included, as PEFT counts."""
    own = counts["A and B"] + counts["m by " + axis]
    return 100 * own / (counts["base"] + own)


# (table, model, rank, directions, magnitudes, printed)
PRINTED = [
    ("Table 1", "LLaMA-7B", 32, FIVE, (), "0.83"), ("Table 1", "LLaMA-7B", 32, FIVE, FIVE, "0.84"),
    ("Table 1", "LLaMA-7B", 16, FIVE, FIVE, "0.43"),
    ("Table 1", "LLaMA-13B", 32, FIVE, (), "0.67"), ("Table 1", "LLaMA-13B", 32, FIVE, FIVE, "0.68"),
    ("Table 1", "LLaMA-13B", 16, FIVE, FIVE, "0.35"),
    ("Table 1", "LLaMA-3-8B", 32, FIVE, (), "0.70"), ("Table 1", "LLaMA-3-8B", 32, FIVE, FIVE, "0.71"),
    ("Table 1", "LLaMA-3-8B", 16, FIVE, FIVE, "0.35"),
    ("Table 5", "LLaMA-7B", 64, SEVEN, (), "2.31"), ("Table 5", "LLaMA-7B", 64, SEVEN, SEVEN, "2.33"),
    ("Table 6", "LLaMA-7B", 32, FIVE[:3], SEVEN, "0.39"), ("Table 6", "LLaMA-13B", 32, FIVE[:3], SEVEN, "0.31"),
    *(("Table 15", "LLaMA-7B", rank, FIVE, (), printed) for rank, printed in ((4, "0.10"), (8, "0.21"), (16, "0.42"), (64, "1.64"))),
    *(("Table 15", "LLaMA-7B", rank, FIVE, FIVE, printed) for rank, printed in ((4, "0.11"), (8, "0.22"), (64, "1.65"))),
]  # fmt: skip


def printed_percentages(cells: Iterable[tuple] = PRINTED) -> list[dict[str, Any]]:
    """Each of the cells with what the shapes give, magnitudes counted by rows and by columns."""
    rows = []
    for table, model, rank, directions, magnitudes, printed in cells:
        counts = trained(model, rank, directions, magnitudes)
        what = "LoRA" if not magnitudes else "DoRA" if magnitudes == directions else "DoRA, V of q, k, v only"
        rows.append({"table": table, "model": model, "method": what, "rank": rank, "printed": printed,
                     "by rows": percent(counts, "rows"), "by columns": percent(counts, "columns")})  # fmt: skip
    return rows


@claim("dora-table1", "DoRA of rank 32 trains 0.84 %, 0.68 % and 0.71 % of LLaMA-7B, LLaMA-13B and LLaMA-3-8B; of rank 16, 0.43 %, 0.35 % "
       "and 0.35 %.", PAPER + "Table 1", "holds if the last is read as 0.36 %", "proved")  # fmt: skip
def table_1() -> dict[str, Any]:
    found = {}
    for row in printed_percentages(cell for cell in PRINTED if cell[0] == "Table 1" and cell[4]):
        name = f"{row['model']}, rank {row['rank']}"
        found[name] = f"printed {row['printed']}, computed {row['by rows']:.4f}"
        axes = {f"{row[axis]:.2f}" for axis in ("by rows", "by columns")}
        expected = {"0.36"} if name == "LLaMA-3-8B, rank 16" else {row["printed"]}
        require(axes == expected, f"{name}: the shapes give {axes}, printed is {row['printed']}")
    require(len(found) == 6, f"{len(found)} cells")
    return found


@claim("dora-axis", "The printed percentages tell whether a magnitude belongs to an output or to an input.", PAPER + "Tables 1, 5, 6 and 15",
       "does not hold", "proved")  # fmt: skip
def axis() -> dict[str, Any]:
    """LLaMA-7B has as many of the one as of the other; where the counts differ, one cell rounds to what is printed by
    columns alone, fewer than round to it by neither."""
    counts = {name: {key: trained(name, 32, FIVE, FIVE)["m by " + key] // LLAMA[name]["layers"] for key in ("rows", "columns")} for name in LLAMA}
    require(set(counts["LLaMA-7B"].values()) == {27392}, f"LLaMA-7B: {counts['LLaMA-7B']}")
    require(counts["LLaMA-3-8B"] == {"rows": 24576, "columns": 30720}, f"LLaMA-3-8B: {counts['LLaMA-3-8B']}")
    fits: dict[str, int] = {"both": 0, "rows only": 0, "columns only": 0, "neither": 0}
    for row in printed_percentages():
        rows, columns = (f"{row[key]:.2f}" == row["printed"] for key in ("by rows", "by columns"))
        fits["both" if rows and columns else "rows only" if rows else "columns only" if columns else "neither"] += 1
    require(max(fits["rows only"], fits["columns only"]) < fits["neither"], f"cells that fit: {fits}")
    return {"magnitudes a layer": counts, "printed cells that fit": fits}


@claim("dora-memory", "Taking the norm as a constant saves 24.4 % of the training memory on LLaMA-7B, 37.3 − 28.2 = 9.1 GB.",
       PAPER + "section 4.3, Table 7", "holds if V is formed: the factored norm keeps next to nothing for the exact gradient either",
       "proved")  # fmt: skip
def memory() -> dict[str, Any]:
    """Bytes kept for the backward pass of all 160 norms, V in 16 bits as their code has it, by counting on meta."""
    shape = LLAMA["LLaMA-7B"]
    sizes = {"q_proj": (4096, 4096), "up_proj": (shape["inner"], 4096), "down_proj": (4096, shape["inner"])}
    layers = [sizes["q_proj"]] * 3 + [sizes["up_proj"], sizes["down_proj"]]
    found = {}
    for name, norm in (("formed", formed_norm), ("factored", merged_norm)):
        for detach in (False, True):
            kept = sum(kept_by(norm, *size, 32, detach, torch.bfloat16) for size in layers) * shape["layers"]
            found[f"{name}, {'detached' if detach else 'exact'}"] = kept / 1e9
    saved = found["formed, exact"] - found["formed, detached"]
    require(abs(saved / (37.3 - 28.2) - 1) < 0.03, f"the shapes give {saved:.2f} GB")
    require(abs((37.3 - 28.2) / 37.3 - 0.244) < 5e-4, "the printed share is not that of the printed numbers")
    require(found["factored, exact"] < 0.04 * saved, f"the factored norm keeps {found['factored, exact']:.2f} GB")
    return {f"GB kept, {name}": round(value, 3) for name, value in found.items()} | {"printed": 9.1}


# --- precision -------------------------------------------------------------------------------------------


def norm_error(norm: Callable[..., Tensor], size: float, cancelling: bool = False, dtype: torch.dtype = torch.float32, seed: int = 0) -> float:
    """Largest relative error of a norm over 256 rows, against float64.

    Args:
        norm: `merged_norm` or `formed_norm`.
        size: ‖ΔW‖ / ‖W‖ for a random ΔW of rank 8; with `cancelling`, ‖W + ΔW‖ / ‖W‖, where ΔW = −(1 − size) W and
            W itself is of rank 8.
        dtype: of W; the factors are fp32.
    """
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(256, 512, generator=g)
    down, up = torch.randn(8, 512, generator=g), torch.randn(256, 8, generator=g)
    if cancelling:
        weight = up @ down
        up = -(1 - size) * up
    else:
        up = up * (size * weight.norm() / (up @ down).norm())
    weight = weight.to(dtype)
    truth = (weight.double() + up.double() @ down.double()).norm(dim=1)
    found = norm(weight, weight.float().norm(dim=1), down, up).double()
    return ((found - truth).abs() / truth).max().item()


@claim("dora-norm-precision", "In fp32 the factored norm is as exact as that of the formed matrix.", "this book",
       "holds if ΔW does not nearly cancel W: a row shortened by a factor ε costs ε⁻², formed ε⁻¹", "measured at this scale")  # fmt: skip
def norm_precision() -> dict[str, Any]:
    found = {}
    for size in (1e-3, 1.0, 1e3):
        found[f"‖ΔW‖ = {size:g} ‖W‖"] = norm_error(merged_norm, size)
    require(max(found.values()) < 1e-6, f"errors: {found}")
    shortened = {eps: (norm_error(merged_norm, eps, True), norm_error(formed_norm, eps, True)) for eps in (0.1, 0.01)}
    growth = [shortened[0.01][i] / shortened[0.1][i] for i in (0, 1)]
    require(30 < growth[0] < 300 and 3 < growth[1] < 30, f"a tenth of the length costs a factor {growth}")
    require(shortened[0.01][0] > 5 * shortened[0.01][1], f"errors: {shortened}")
    return found | {f"row shortened to {eps:g}": f"factored {a:.0e}, formed {b:.0e}" for eps, (a, b) in shortened.items()}


@claim("dora-bf16", "In bf16 every gain from 1 − 2⁻⁹ to 1 + 2⁻⁸ is 1, so a gain within 0.19 % of 1 has no effect.", "this book", "holds",
       "proved")  # fmt: skip
def bf16() -> dict[str, Any]:
    """The library keeps its gain in fp32 on a bf16 base."""
    import deltaw as dw

    low, high = 1 - 2.0**-9, 1 + 2.0**-8
    inside = torch.linspace(low, high, 10_001, dtype=torch.float64).bfloat16()
    outside = torch.tensor([low - 1e-6, high + 1e-6], dtype=torch.float64).bfloat16()
    require(bool((inside == 1).all()) and bool((outside != 1).all()), "the interval is another one")
    model = dw.attach(nn.Sequential(nn.Linear(64, 48)).bfloat16(), dw.DoRA(dw.LoRA(4)))
    with torch.no_grad():
        model[0].adapter.magnitude *= 1.001
        gain = model[0].factors(model[0].adapter)[2]
    require(gain.dtype == torch.float32 and bool((gain != 1).all()), "the library rounds its gain")
    require(bool((gain.bfloat16() == 1).all()), "bf16 would have kept this gain")
    return {"from": low, "to": high, "the library's gain": gain.dtype}


# --- not a LoRA ------------------------------------------------------------------------------------------


def rank_error(delta: Tensor, k: int) -> float:
    """By Eckart and Young: the share of ‖ΔW‖ that the best matrix of rank k misses."""
    energy = torch.linalg.svdvals(delta).square()
    return (energy[k:].sum() / energy.sum()).clamp_min(0).sqrt().item()


@claim("dora-not-lora", "A trained DoRA is a LoRA of the same rank.", "this book", "does not hold", "proved")  # fmt: skip
def not_lora() -> dict[str, Any]:
    """ΔW = diag(g − 1) W + diag(g) up·down: with g ≠ 1 it has full rank, and `convert` says what the best LoRA misses."""
    import deltaw as dw

    layer = dora(draw(0, 24, 20), draw(1, 3, 20), 0.1 * draw(2, 24, 3), draw(3, 24).abs() + 4.0)
    delta = layer.delta_weight()
    down, up, gain = layer.factors(layer.adapter)
    require(apart((gain - 1)[:, None] * layer.weight + gain[:, None] * (up @ down), delta) < 1e-14, "ΔW is another one")
    rank = int(torch.linalg.matrix_rank(delta))
    require(rank == 20, f"ΔW has rank {rank}")
    missed = rank_error(delta, 3)
    require(missed > 0.5, f"the best matrix of rank 3 misses {missed:.2f} of it")
    model = dw.attach(nn.Sequential(nn.Linear(20, 24)), dw.DoRA(dw.LoRA(3)))
    try:
        dw.convert(model, dw.LoRA)
    except ValueError as error:
        require("rescales rows" in str(error), str(error))
    else:
        require(False, "the library converts it")
    return {"rank of ΔW, of B A": (rank, 3), "missed by the best of rank 3": missed}


# --- the analysis of magnitude and direction -------------------------------------------------------------


def changes(before: Tensor, after: Tensor, relative: bool = False) -> tuple[float, float]:
    """(ΔM, ΔD) of equations 3 and 4, by rows: the mean |m′ − m|, in units of m if `relative`, and the mean 1 − cos."""
    m0, m1 = length(before)[:, 0], length(after)[:, 0]
    cosine = along(before, after)[:, 0] / (m0 * m1)
    moved = (m1 - m0).abs()
    return (moved / m0 if relative else moved).mean().item(), (1 - cosine).mean().item()


def radial_share(before: Tensor, after: Tensor) -> float:
    """The share of ‖ΔW‖² along the rows of W: 1/in for a random change, whatever its size."""
    delta = after - before
    return (along(delta, before / length(before)).square().sum() / delta.square().sum()).item()


def random_change(weight: Tensor, rank: int | None, size: float, generator: Generator) -> Tensor:
    """A change of random direction and Frobenius norm `size`: of that rank, or all independent (None)."""
    out, in_ = weight.shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=weight.dtype)

    change = normal(out, in_) if rank is None else normal(out, rank) @ normal(rank, in_)
    return change * (size / change.norm())


def expected(rho: float, in_features: int) -> tuple[float, float]:
    """(ΔM / m, ΔD) of random changes of relative size ρ on every row: the null.

    With a the part along the row, in units of it, normal with variance ρ²/in: the new length is √(1 + 2a + ρ²) and
    the cosine (1 + a) over it.
    """
    z = torch.special.ndtri((torch.arange(4001, dtype=torch.float64) + 0.5) / 4001)
    a = rho * z / math.sqrt(in_features)
    new = (1 + 2 * a + rho**2).sqrt()
    return (new - 1).abs().mean().item(), (1 - (1 + a) / new).mean().item()


def correlation(x: Iterable[float], y: Iterable[float]) -> float:
    """Pearson's."""
    return torch.corrcoef(torch.tensor([list(x), list(y)], dtype=torch.float64))[0, 1].item()


@claim("dora-expansion", "A change with the part a along a row and ρ across it, in units of the row, gives ΔM/m = |a + ρ²/2| and ΔD = ρ²/2 "
       "to second order.", "this book", "holds", "proved")  # fmt: skip
def expansion() -> dict[str, Any]:
    """By sympy: along t·a and t·ρ, the terms of order t and t² of √((1 + ta)² + t²ρ²) − 1 and of 1 − cos."""
    import sympy

    t, a, rho = sympy.symbols("t a rho", real=True)
    new = sympy.sqrt((1 + t * a) ** 2 + t**2 * rho**2)
    longer = sympy.series(new - 1, t, 0, 3).removeO()
    turned = sympy.series(1 - (1 + t * a) / new, t, 0, 3).removeO()
    require(sympy.simplify(longer - (t * a + t**2 * rho**2 / 2)) == 0, f"the length grows by {longer}")
    require(sympy.simplify(turned - t**2 * rho**2 / 2) == 0, f"1 − cos is {turned}")
    across = sympy.simplify((new - 1).subs({a: 0, t: 1}) - (1 - 1 / new).subs({a: 0, t: 1}) * new.subs({a: 0, t: 1}))
    require(across == 0, "across the row, ΔM/m is not ΔD/(1 − ΔD)")
    return {"length": str(longer), "1 − cos": str(turned), "a = 0": "ΔM/m = ΔD/(1 − ΔD)"}


# Mean row norms of MiniLM's six query matrices.
QUERY_NORMS = (1.82, 1.65, 1.60, 1.60, 1.56, 1.48)


def null_correlations(rank: int | None, low: float, high: float, repeats: int = 10, in_features: int = 384) -> list[float]:
    """Correlations of ΔM with ΔD over six layers and four checkpoints of random changes, ΔD between `low` and `high`."""
    g = torch.Generator().manual_seed(0)
    found = []
    for _ in range(repeats):
        points = []
        for norm, _step in itertools.product(QUERY_NORMS, range(4)):
            weight = torch.randn(96, in_features, generator=g)
            weight *= norm / length(weight)
            turn = low + (high - low) * torch.rand((), generator=g).item()
            rho = math.sqrt(1 / (1 - turn) ** 2 - 1)  # from ΔD = 1 − 1/√(1 + ρ²)
            points.append(changes(weight, weight + random_change(weight, rank, rho * weight.norm().item(), g)))
        found.append(correlation(*zip(*points)))
    return found


def turn(size: float, cosine: float) -> float:
    """ΔD of a row of unit length after a change of that size and that cosine with it."""
    return 1 - (1 + size * cosine) / math.sqrt(1 + 2 * size * cosine + size**2)


@claim("dora-eq10", "Of two updates of one size, the one that turns the row less has the larger gradient of m.",
       PAPER + "section 4.2, equations 8 – 10", "holds if the updates are small; and then for any method, not for DoRA alone", "proved")  # fmt: skip
def equation_10() -> dict[str, Any]:
    """|∂L/∂m| = ‖G‖ |cos(G, v)| (equation 9, by the library), so the question is whether a smaller turn means a larger
    |cos|. To leading order ΔD = size² (1 − cos²)/2; a large step that shortens the row turns it more."""
    seen = gradients_of_v(detach=True)
    v, g = seen["V"], seen["G"]
    cosine = along(g, v) / (length(g) * length(v))
    require(apart((length(g) * cosine)[:, 0], seen["of m"]) < 1e-12, "equation 9 does not hold")

    def exceptions(size: float) -> list[tuple[float, float]]:
        grid = [i / 10 for i in range(-9, 10)]
        return [(c, d) for c in grid for d in grid if abs(c) + 0.05 < abs(d) and turn(size, c) < turn(size, d)]

    require(not exceptions(0.01), f"exceptions for small updates: {exceptions(0.01)[:3]}")
    large = exceptions(0.5)
    require((0.1, -0.2) in large, f"exceptions for large updates: {large[:3]}")
    return {"exceptions at size 0.01": 0, "at size 0.5": len(large),
            "one of them": f"cos 0.1 turns by {turn(0.5, 0.1):.4f}, cos −0.2 by {turn(0.5, -0.2):.4f}"}  # fmt: skip


@cache
def magnitudes_moved(shuffled: bool, rate: float, steps: int) -> float:
    """The mean |m − m₀| of DoRA on turned digits after some steps of Adam, with true or with shuffled labels."""
    import deltaw as dw
    from deltaw.tasks import digits

    task = digits(angle=15)
    if shuffled:
        order = torch.randperm(len(task.train["labels"]), generator=torch.Generator().manual_seed(0))
        task.train = task.train | {"labels": task.train["labels"][order]}
    model = dw.attach(task.model(), dw.DoRA(dw.LoRA(rank=8)))
    recipe = dw.Recipe(steps=steps, learning_rate=rate, batch_size=64, optimizer="adam")
    dw.fit(model, task, recipe, progress=False, device="cpu")
    with torch.no_grad():
        return torch.cat([(layer.adapter.magnitude - layer.adapter.weight_norm).abs() for layer in dw.adapted_layers(model).values()]).mean().item()


@claim("dora-magnitude-clock", "Under Adam DoRA's ΔM is no measure of what is learnt: shuffled labels move the magnitudes at least as far, "
       "and the rate sets how far.", "this book", "holds", "measured at this scale")  # fmt: skip
def magnitude_clock() -> dict[str, Any]:
    """The mean |m − m₀| after 24 steps on digits turned by 15°."""
    found = {"true labels": magnitudes_moved(False, 0.01, 24), "shuffled labels": magnitudes_moved(True, 0.01, 24),
             "true labels, half the rate": magnitudes_moved(False, 0.005, 24)}  # fmt: skip
    true, shuffled, half = found.values()
    require(shuffled > 0.9 * true, f"shuffled labels move them less: {found}")
    require(1.6 < true / half < 2.4, f"not in proportion to the rate: {found}")
    return found

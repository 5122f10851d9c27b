"""VeRA: its counts, its gradients, and what shared random matrices cost (chapter 4).

The seed's reading note says of VeRA that it shares "a low-rank matrix", trains "two parameters" and needs far fewer of
them than LoRA. The paper's first table counts them. Both are taken at their word here, with the library's VeRA.
"""

import math
import re
import tempfile
from collections.abc import Callable
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import claim, measure, require

if TYPE_CHECKING:
    import pandas

    import deltaw as dw


# ---------------------------------------------------------------------------------------------------------------------
# Layers to look at


def layer(spec: "dw.Spec", out_features: int, in_features: int, seed: int = 0) -> "dw.AdaptedLinear":
    """One linear layer in float64 with an adapter whose trained numbers are standard normal."""
    import deltaw as dw

    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(in_features, out_features, dtype=torch.float64)
    model = dw.attach(nn.Sequential(base), spec)
    with torch.no_grad():
        for parameter in (*base.parameters(), *model[0].adapter.parameters()):
            parameter.normal_(generator=generator)
    return model[0]


def parts(layer: "dw.AdaptedLinear") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """b `(out,)`, d `(r,)` and the layer's slices of the shared A `(r, in)` and B `(out, r)`."""
    adapter = layer.adapter
    a, b = adapter.projection.A[:, : layer.in_features], adapter.projection.B[: layer.out_features]
    return adapter.b.detach(), adapter.d.detach(), a, b


# ---------------------------------------------------------------------------------------------------------------------
# The formula and its gradients


@claim("vera-formula", "A VeRA layer computes h = W₀x + Λb B Λd A x, with two frozen matrices and two trained diagonals.",
       "VeRA, equation 2", "holds", "proved")  # fmt: skip
def formula() -> dict[str, Any]:
    """For the library's layer, and for one that gets slices of larger matrices."""
    import deltaw as dw

    found = {}
    model = nn.Sequential(nn.Linear(5, 7, dtype=torch.float64), nn.Linear(7, 4, dtype=torch.float64))
    dw.attach(model, dw.VeRA(rank=6))
    for name, one in dw.adapted_layers(model).items():
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in one.adapter.parameters():
                parameter.normal_(generator=generator)
        b, d, a, big_b = parts(one)
        x = torch.randn(one.in_features, generator=generator, dtype=torch.float64)  # (in,)
        expected = one.weight @ x + b.diag() @ big_b @ d.diag() @ a @ x + one.bias  # (out,)
        found[f"layer {name}"] = measure.apart(one(x[None])[0], expected)
    require(max(found.values()) < 1e-14, f"apart from equation 2: {found}")
    return found


def gradients(upstream: Tensor, a: Tensor, big_b: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """∂L/∂b `(out,)` and ∂L/∂d `(r,)`, given ∂L/∂ΔW `(out, in)`: with Q = B ⊙ (∂L/∂ΔW Aᵀ), Q d and Qᵀ b."""
    q = big_b * (upstream @ a.mT)  # (out, r)
    return q @ d, q.mT @ b


@claim("vera-gradients", "With Q = B ⊙ (∂L/∂ΔW Aᵀ), b's gradient is Q d and d's is Qᵀ b.", "this book", "holds", "proved")  # fmt: skip
def gradients_are_autograds() -> dict[str, Any]:
    """Against the library's backward pass, on a loss that is not linear; ∂L/∂ΔW from a plain layer of the merged weight."""
    import deltaw as dw

    one = layer(dw.VeRA(rank=6), 5, 4)
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.tanh(one(x)).square().sum().backward()
    merged = one.merged_weight().requires_grad_(True)  # (out, in)
    (upstream,) = torch.autograd.grad(torch.tanh(x @ merged.mT + one.bias).square().sum(), merged)
    b, d, a, big_b = parts(one)
    of_b, of_d = gradients(upstream, a, big_b, b, d)
    found = {"b": measure.apart(of_b, one.adapter.b.grad), "d": measure.apart(of_d, one.adapter.d.grad)}
    require(max(found.values()) < 1e-12, f"apart from autograd: {found}")
    return found


@claim("vera-rank-one", "ΔW = (b dᵀ ⊙ B) A: VeRA trains a matrix of rank one, seen through a fixed linear map.", "this book",
       "holds", "proved")  # fmt: skip
def rank_one_in_disguise() -> dict[str, Any]:
    import deltaw as dw

    one = layer(dw.VeRA(rank=6), 5, 4)
    b, d, a, big_b = parts(one)
    inside = torch.outer(b, d)  # (out, r)
    apart, rank = measure.apart((inside * big_b) @ a, one.delta_weight()), int(torch.linalg.matrix_rank(inside))
    require(apart < 1e-14 and rank == 1, f"{apart:.1e} apart, rank {rank}")
    return {"apart": apart, "rank of b dᵀ": rank, "rank of ΔW": int(torch.linalg.matrix_rank(one.delta_weight()))}


STARTS = {"b zero": (0.0, 0.1), "d zero": (0.1, 0.0), "both zero": (0.0, 0.0)}


@claim("vera-start", "With b zero and d not, the model begins as the base and trains; with both zero it never would.",
       "VeRA, section 3.3", "holds", "proved")  # fmt: skip
def start() -> dict[str, Any]:
    """∂L/∂b has the factor d, ∂L/∂d the factor b. So the roles can be swapped, and both zero is a dead end."""
    import deltaw as dw

    found = {}
    for name, (of_b, of_d) in STARTS.items():
        one = layer(dw.VeRA(rank=6), 5, 4)
        with torch.no_grad():
            one.adapter.b.fill_(of_b), one.adapter.d.fill_(of_d)
        x = torch.randn(9, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        y = one(x)
        y.square().sum().backward()
        moved = {which: bool(parameter.grad.any()) for which, parameter in one.adapter.named_parameters()}
        found[name] = {"as the base": torch.equal(y, one.base(x)), **moved}
    require(all(one["as the base"] for one in found.values()), f"not the base: {found}")
    gets = {name: (one["b"], one["d"]) for name, one in found.items()}
    require(gets == {"b zero": (True, False), "d zero": (False, True), "both zero": (False, False)}, f"gradients: {gets}")
    return found


Groups = list[dict[str, Any]]
OPTIMIZERS: dict[str, tuple[Callable[[Groups], torch.optim.Optimizer], int, bool]] = {
    # the optimizer, by which power of c its rates change, and whether it is clipped
    "SGD": (torch.optim.SGD, 2, False),
    "momentum": (partial(torch.optim.SGD, momentum=0.9), 2, False),
    "Adam": (partial(torch.optim.Adam, eps=1e-30), 1, False),
    "SGD, weight decay": (partial(torch.optim.SGD, weight_decay=1.0), 2, False),
    "AdamW, weight decay": (partial(torch.optim.AdamW, eps=1e-30, weight_decay=1.0), 1, False),
    "SGD, clipped": (torch.optim.SGD, 2, True),
}


def d_init_apart(name: str, scale: float = 3.0, steps: int = 30) -> float:
    """Two runs: d from c·0.1, against d from 0.1 with b's rate times c^p and d's divided by it. Largest distance of ΔW."""
    import deltaw as dw

    make, power, clipped = OPTIMIZERS[name]
    generator = torch.Generator().manual_seed(0)
    weight, x, y = (torch.randn(*shape, generator=generator).double() for shape in ((5, 4), (16, 4), (16, 5)))

    def run(d_init: float, ratio: float) -> list[Tensor]:
        base = nn.Linear(4, 5, bias=False, dtype=torch.float64)
        with torch.no_grad():
            base.weight.copy_(weight)
        one = dw.attach(nn.Sequential(base), dw.VeRA(rank=6, d_init=d_init))[0]
        rates = {one.adapter.b: 0.02 * ratio, one.adapter.d: 0.02 / ratio}
        optimizer, seen = make([{"params": [p], "lr": rate} for p, rate in rates.items()], lr=0.02), []
        for _ in range(steps):
            optimizer.zero_grad()
            (torch.tanh(one(x)) - y).square().mean(0).sum().backward()
            if clipped:
                torch.nn.utils.clip_grad_norm_(list(rates), 0.1)
            optimizer.step()
            seen.append(one.delta_weight())
        return seen

    pairs = zip(run(0.1 * scale, 1.0), run(0.1, scale**power), strict=True)
    return max(measure.apart(one, other) for one, other in pairs)


@claim("vera-d-init", "Starting d at c times d-init only changes two learning rates: b's times c², d's divided by c² (under Adam, c).",
       "this book", "holds if there is neither weight decay nor clipping by the global norm", "proved")  # fmt: skip
def d_init_is_a_ratio_of_rates() -> dict[str, Any]:
    """(b / c, c d) gives the same ΔW. Proved in the chapter; here 30 steps side by side, and the two exceptions."""
    found = {name: d_init_apart(name) for name in OPTIMIZERS}
    same = [found[name] for name in ("SGD", "momentum", "Adam")]
    other = [value for name, value in found.items() if "," in name]
    require(max(same) < 1e-9, f"apart: {found}")
    require(min(other) > 1e-3, f"not apart: {found}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What can be expressed


def dimension(spec: "dw.Spec", out_features: int, in_features: int) -> int:
    """Of the set of ΔW around a generic point: the rank of the Jacobian of ΔW by what is trained."""
    one = layer(spec, out_features, in_features)
    trained = [parameter for parameter in one.adapter.parameters() if parameter.requires_grad]
    down, up = one.adapter.factors()
    return _jacobian_rank([up @ down], trained)


def _jacobian_rank(outputs: list[Tensor], trained: list[nn.Parameter]) -> int:
    rows = []
    for entry in torch.cat([output.flatten() for output in outputs]):
        found = torch.autograd.grad(entry, trained, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([gradient.flatten() for gradient in found]))
    return int(torch.linalg.matrix_rank(torch.stack(rows), rtol=1e-9))


@claim("vera-dimension", "The ΔW of one VeRA layer form a set of dimension out + r − 1 (r ≤ in), LoRA's one of r(in + out) − r².",
       "this book", "holds", "proved")  # fmt: skip
def dimensions() -> dict[str, Any]:
    """Proved in the chapter; here the Jacobian's rank. Above r = in, at these sizes, out + r − 1 until in · out."""
    import deltaw as dw

    out_features, in_features = 8, 6
    vera = {r: dimension(dw.VeRA(rank=r), out_features, in_features) for r in (1, 2, 4, 6, 12, 24, 40, 41, 42, 64)}
    lora = {r: dimension(dw.LoRA(rank=r), out_features, in_features) for r in (1, 2, 3, 6)}
    for r, found in vera.items():
        require(found == min(out_features + r - 1, out_features * in_features), f"VeRA of rank {r}: {found}")
    for r, found in lora.items():
        require(found == r * (in_features + out_features) - r**2, f"LoRA of rank {r}: {found}")
    return {"VeRA": vera, "LoRA": lora}


@claim("vera-high-rank", "VeRA's ΔW has rank min(r, in, out) in general: on a square layer, full rank from as many trained "
       "numbers as a LoRA of rank one has.", "this book", "holds", "proved")  # fmt: skip
def high_rank() -> dict[str, Any]:
    """That it cannot be more is plain; that it is so in general needs one example of each size."""
    import deltaw as dw

    n, found = 12, {}
    for r in (1, 5, 12, 40):
        found[r] = int(torch.linalg.matrix_rank(layer(dw.VeRA(rank=r), n, n).delta_weight()))
        require(found[r] == min(r, n), f"VeRA of rank {r} gives rank {found[r]}")
    one, other = layer(dw.VeRA(rank=n), n, n), layer(dw.LoRA(rank=1), n, n)
    numbers = [sum(p.numel() for p in either.adapter.parameters()) for either in (one, other)]
    dims = [dimension(dw.VeRA(rank=n), n, n), dimension(dw.LoRA(rank=1), n, n)]
    require(numbers == [2 * n, 2 * n] and dims == [2 * n - 1] * 2, f"numbers {numbers}, dimensions {dims}")
    require(int(torch.linalg.matrix_rank(other.delta_weight())) == 1, "LoRA of rank 1 has another rank")
    return {"rank by r": found, "trained numbers": numbers[0], "dimension": dims[0]}


@claim("vera-sharing", "That layers share A and B costs no dimension: two layers reach the sum of what each reaches.", "this book",
       "holds", "proved")  # fmt: skip
def sharing() -> dict[str, Any]:
    """Each layer has a b and a d of its own, so the Jacobian has a block for each layer."""
    import deltaw as dw

    model = dw.attach(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 5)).double(), dw.VeRA(rank=4))
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.normal_(generator=generator)
    factors = [one.adapter.factors() for one in dw.adapted_layers(model).values()]
    require(model[0].adapter.projection is model[1].adapter.projection, "the layers do not share")
    found = _jacobian_rank([up @ down for down, up in factors], trained)
    require(found == (8 + 4 - 1) + (5 + 4 - 1), f"dimension {found}")
    return {"both layers": found}


def gaussian(n: int, seed: int) -> Tensor:
    """An n × n matrix of independent normal numbers."""
    return torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank(n: int, rank: int, seed: int) -> Tensor:
    """A product of two Gaussian matrices."""
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((n, rank), (rank, n)))
    return up @ down


@torch.no_grad()
def fit(target: Tensor, rank: int, seed: int = 0, rounds: int = 40, starts: int = 1) -> "dw.AdaptedLinear":
    """A VeRA layer whose ΔW is as near to `target` as alternating least squares brings it.

    Given d, each row has its own best b_i; given b, ΔW is linear in d. No step makes it worse. The first start is the
    library's, d constant, others are Gaussian, and the best is taken: it may be a local optimum all the same.
    """
    import deltaw as dw

    out_features, in_features = target.shape
    base = nn.Linear(in_features, out_features, bias=False, dtype=torch.float64)
    one = dw.attach(nn.Sequential(base), dw.VeRA(rank=rank, projection_seed=seed))[0]
    _, constant, a, big_b = parts(one)
    generator = torch.Generator().manual_seed(seed)
    others = [torch.randn(rank, generator=generator, dtype=torch.float64) for _ in range(starts - 1)]
    best = max((_alternate(target, a, big_b, d, rounds) for d in (constant, *others)), key=lambda found: found[0])
    one.adapter.b.copy_(best[1]), one.adapter.d.copy_(best[2])
    return one


def _alternate(target: Tensor, a: Tensor, big_b: Tensor, d: Tensor, rounds: int) -> tuple[float, Tensor, Tensor]:
    """The share of the target that is held, b and d."""
    gram, seen = a @ a.mT, target @ a.mT  # (r, r), (out, r)

    def best_b() -> tuple[Tensor, Tensor]:
        rows = (big_b * d) @ a  # (out, in): ΔW with b = 1
        b = (rows * target).sum(1) / rows.square().sum(1)  # (out,)
        return b, b[:, None] * rows

    for _ in range(rounds):
        scaled = best_b()[0][:, None] * big_b  # (out, r)
        normal = (scaled.mT @ scaled) * gram  # (r, r)
        normal.diagonal().add_(1e-12 * normal.diagonal().mean())
        d = torch.linalg.solve(normal, (scaled * seen).sum(0))  # (r,)
    b, fitted = best_b()
    return share(target, fitted), b, d


def share(target: Tensor, fitted: Tensor) -> float:
    """How much of ‖target‖² the fit holds."""
    return 1 - ((target - fitted).square().sum() / target.square().sum()).item()


def share_of_lora(target: Tensor, rank: int) -> float:
    """What the best LoRA of that rank holds, by Eckart and Young."""
    energy = torch.linalg.svdvals(target).square()
    return (energy[:rank].sum() / energy.sum()).item()


@claim("vera-fit-gaussian", "Of a Gaussian matrix, the best VeRA fit found holds as much, within a tenth, as the best LoRA with as "
       "many trained numbers.", "this book", "holds", "measured at this scale")  # fmt: skip
def fit_of_gaussian() -> dict[str, Any]:
    """On 32 × 32: VeRA of rank 32, 96, 224 has the trained numbers of LoRA of rank 1, 2, 4."""
    found = {rank: _ratio([gaussian(32, seed) for seed in range(3)], rank) for rank in (1, 2, 4)}
    require(all(0.9 < ratio < 1.1 for ratio in found.values()), f"VeRA over LoRA: {found}")
    return found


@claim("vera-fit-low-rank", "The best VeRA fit found to a matrix of rank 1 or 2 holds less than half of what LoRA of that rank, with "
       "as many trained numbers, holds: all.", "this book", "holds", "measured at this scale")  # fmt: skip
def fit_of_low_rank() -> dict[str, Any]:
    found = {rank: _ratio([low_rank(32, rank, seed) for seed in range(3)], rank) for rank in (1, 2)}
    require(max(found.values()) < 0.5, f"VeRA over LoRA: {found}")
    return found


def _ratio(targets: list[Tensor], rank: int) -> float:
    """What VeRA's fits hold over what LoRA of that rank holds, with as many trained numbers; sums over the targets."""
    n = targets[0].shape[0]
    held = [share(one, fit(one, (2 * rank - 1) * n, seed, starts=4).delta_weight()) for seed, one in enumerate(targets)]
    return sum(held) / sum(share_of_lora(one, rank) for one in targets)


# ---------------------------------------------------------------------------------------------------------------------
# The paper's table 1: numbers that are trained, and bytes

SHAPES = {"RoBERTa-base": (24, 768), "RoBERTa-large": (48, 1024), "GPT-3": (192, 12288)}  # adapted matrices, their width
RANKS = (1, 16, 256)
PRINTED = {  # by model and family: the cells for r = 1, 16, 256, numbers and bytes
    ("RoBERTa-base", "LoRA"): (("36.8K", "589.8K", "9437.1K"), ("144KB", "2MB", "36MB")),
    ("RoBERTa-base", "VeRA"): (("18.4K", "18.8K", "24.5K"), ("72KB", "74KB", "96KB")),
    ("RoBERTa-large", "LoRA"): (("98.3K", "1572.8K", "25165.8K"), ("384KB", "6MB", "96MB")),
    ("RoBERTa-large", "VeRA"): (("49.2K", "49.5K", "61.4K"), ("192KB", "195KB", "240KB")),
    ("GPT-3", "LoRA"): (("4.7M", "75.5M", "1207.9M"), ("18MB", "288MB", "4.6GB")),
    ("GPT-3", "VeRA"): (("2.4M", "2.8M", "8.7M"), ("9.1MB", "10.5MB", "33MB")),
}
UNITS = {"K": 10**3, "M": 10**6, "KB": 2**10, "MB": 2**20, "GB": 2**30}


def read(cell: str) -> tuple[Fraction, Fraction]:
    """What a printed cell says, and one unit of its last digit."""
    digits, unit = re.fullmatch(r"([\d.]+)([A-Z]+)", cell).groups()
    places = len(digits.partition(".")[2])
    return Fraction(digits) * UNITS[unit], Fraction(UNITS[unit], 10**places)


def within_a_unit(number: int, cell: str) -> bool:
    """Is the number within one unit of the cell's last digit?"""
    printed, unit = read(cell)
    return abs(number - printed) <= unit


@cache
def count(model: str, family: str, rank: int) -> tuple[int, int]:
    """Numbers trained, and those frozen in the adapters, by attaching to a model of that shape on the meta device."""
    import deltaw as dw

    matrices, width = SHAPES[model]
    net = nn.Sequential(*(nn.Linear(width, width, device="meta") for _ in range(matrices)))
    dw.attach(net, {"LoRA": dw.LoRA, "VeRA": dw.VeRA}[family](rank=rank))
    buffers = {id(buffer): buffer.numel() for module in dw.adapted_layers(net).values()
               for buffer in module.adapter.buffers() if buffer.dim() == 2}  # fmt: skip
    return int(dw.count(net).loc["(total)", "trainable"]), sum(buffers.values())


def table(models: tuple[str, ...] = tuple(SHAPES), families: tuple[str, ...] = ("LoRA", "VeRA")) -> "pandas.DataFrame":
    """The paper's table 1, cell by cell: printed, counted, and counted with the frozen A and B."""
    import pandas

    rows = []
    for model in models:
        for family in families:
            for rank, cell, size in zip(RANKS, *PRINTED[model, family], strict=True):
                trained, frozen = count(model, family, rank)
                rows.append((model, family, rank, cell, trained, within_a_unit(trained, cell), trained + frozen,
                             within_a_unit(trained + frozen, cell), size))  # fmt: skip
    columns = ["model", "family", "r", "printed", "trained", "agrees", "with frozen", "agrees with frozen", "bytes printed"]
    return pandas.DataFrame(rows, columns=columns)


@claim("vera-table-lora", "The table's nine counts for LoRA are 2·L·d·r, within one unit of the last digit printed.",
       "VeRA, table 1", "holds", "proved")  # fmt: skip
def table_lora() -> dict[str, Any]:
    found = table(families=("LoRA",))
    by_formula = [2 * SHAPES[row.model][0] * SHAPES[row.model][1] * row.r for row in found.itertuples()]
    require(list(found.trained) == by_formula, "the library does not count 2·L·d·r")
    require(found.agrees.all(), f"apart from the print:\n{found[~found.agrees]}")
    return dict(zip(found.printed, found.trained))


def _formula(found: "pandas.DataFrame") -> list[int]:
    """L·(d + r) for each row."""
    return [SHAPES[row.model][0] * (SHAPES[row.model][1] + row.r) for row in found.itertuples()]


@claim("vera-table-base", "The table's counts for VeRA on RoBERTa-base are L·(d + r), within one unit of the last digit printed.",
       "VeRA, table 1", "holds", "proved")  # fmt: skip
def table_base() -> dict[str, Any]:
    found = table(("RoBERTa-base",), ("VeRA",))
    require(list(found.trained) == _formula(found), "the library does not count L·(d + r)")
    require(found.agrees.all(), f"apart from the print:\n{found[~found.agrees]}")
    return dict(zip(found.printed, found.trained))


@claim("vera-table-large", "The table's counts for VeRA on RoBERTa-large are L·(d + r): 49.2K, 49.5K and 61.4K.",
       "VeRA, table 1", "does not hold", "proved")  # fmt: skip
def table_large() -> dict[str, Any]:
    """49.5K should read 49.9K, which is also what the 195KB beside it amount to."""
    found = table(("RoBERTa-large",), ("VeRA",))
    require(list(found.trained) == _formula(found), "the library does not count L·(d + r)")
    require(list(found.agrees) == [True, False, True], f"the cells that agree are others:\n{found}")
    middle = found.iloc[1]
    require(middle.trained == 49_920 and within_a_unit(middle.trained, "49.9K"), f"counted: {middle.trained}")
    require(read(middle["bytes printed"])[0] == 4 * middle.trained, "the bytes say something else")
    return {"printed": middle.printed, "counted": int(middle.trained), "bytes / 4": int(read(middle["bytes printed"])[0] / 4)}


@claim("vera-table-gpt3", "The table's counts for VeRA on GPT-3 are its trained numbers: 2.4M, 2.8M and 8.7M.", "VeRA, table 1",
       "holds if the frozen A and B are counted, too", "proved")  # fmt: skip
def table_gpt3() -> dict[str, Any]:
    """L·(d + r) + 2·d·r; no other row of the table counts them."""
    found = table(("GPT-3",), ("VeRA",))
    require(list(found.trained) == _formula(found), "the library does not count L·(d + r)")
    with_frozen = [n + 2 * SHAPES["GPT-3"][1] * r for n, r in zip(_formula(found), RANKS)]
    require(list(found["with frozen"]) == with_frozen and found["agrees with frozen"].all(), f"with A and B:\n{found}")
    require(list(found.agrees) == [True, False, False], f"without A and B:\n{found}")
    others = table(("RoBERTa-base", "RoBERTa-large"), ("VeRA",))
    require(not others["agrees with frozen"].any(), f"other rows count A and B, too:\n{others}")
    return dict(zip(found.printed, zip(found.trained, found["with frozen"])))


def how_printed(number: int, cell: str) -> str:
    """Whether the cell is the number "rounded", "cut off", "both", or "neither"."""
    printed, unit = read(cell)
    cut, rounded = number // unit * unit, (number / unit + Fraction(1, 2)).__floor__() * unit
    return {(True, True): "both", (True, False): "cut off", (False, True): "rounded"}.get((printed == cut, printed == rounded), "neither")


def printing() -> dict[str, str]:
    """How each cell of the table that agrees with a count was made from it."""
    found = table()
    found["number"] = found.trained.where(found.model.ne("GPT-3") | found.family.ne("VeRA"), found["with frozen"])
    return {row.printed: how_printed(int(row.number), row.printed) for row in found.itertuples() if row.printed != "49.5K"}


@claim("vera-table-digits", "One rule, rounding or cutting off, gives every printed count of the table.", "this book, on VeRA, table 1",
       "does not hold", "proved")  # fmt: skip
def table_digits() -> dict[str, Any]:
    found = printing()
    rules = set(found.values()) - {"both"}
    require(rules == {"rounded", "cut off"}, f"the table is printed by {rules}")
    return {rule: [cell for cell, how in found.items() if how == rule] for rule in sorted(rules)}


@claim("vera-table-bytes", "The table's bytes are four for each number of the cell beside them.", "VeRA, table 1",
       "holds if 49.5K is read as 49.9K", "proved")  # fmt: skip
def table_bytes() -> dict[str, Any]:
    """KB = 1024 bytes; the GPT-3 row with its frozen matrices. 4.6GB is 4608 MB: 4.5 GB, one unit of the last digit away."""
    found = table()
    number = found.trained.where(found.model.ne("GPT-3") | found.family.ne("VeRA"), found["with frozen"])
    apart = [cell for n, cell in zip(number, found["bytes printed"]) if not within_a_unit(4 * int(n), cell)]
    require(not apart, f"bytes that are not 4 a number: {apart}")
    fine = []
    for cell, size in zip(found.printed, found["bytes printed"]):
        (numbers, unit), (printed, of_size) = read(cell), read(size)
        fine.append(abs(4 * numbers - printed) <= 4 * unit + of_size)
    wrong = [cell for cell, agrees in zip(found.printed, fine) if not agrees]
    require(wrong == ["49.5K"], f"cells whose bytes contradict them: {wrong}")
    return {"cells": len(found), "contradict each other": wrong}


# ---------------------------------------------------------------------------------------------------------------------
# The reading note


def widths() -> nn.Sequential:
    """Three layers of different widths, in float32."""
    return nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 6), nn.Tanh(), nn.Linear(6, 6))


@claim("vera-note-shared", "VeRA shares a low-rank matrix across the layers.", "reading note",
       "holds if that means two matrices, A and B, and r is below the layers' width", "proved")  # fmt: skip
def note_shared() -> dict[str, Any]:
    """All layers hold the same two tensors; and at r = in = out their product has full rank."""
    import deltaw as dw

    model = dw.attach(widths(), dw.VeRA(rank=24))
    held = {tensor.data_ptr() for one in dw.adapted_layers(model).values() for tensor in one.adapter.buffers() if tensor.dim() == 2}
    require(len(held) == 2, f"{len(held)} matrices are held")
    ranks = {}
    for r in (4, 16):
        _, _, a, big_b = parts(layer(dw.VeRA(rank=r), 16, 16))
        ranks[r] = int(torch.linalg.matrix_rank(big_b @ a))
    require(ranks == {4: 4, 16: 16}, f"ranks of B A: {ranks}")
    return {"matrices held": len(held), "rank of B A, 16 × 16": ranks}


@claim("vera-note-two", "VeRA trains two parameters, b and d.", "reading note", "holds if they are vectors, a pair for each layer",
       "proved")  # fmt: skip
def note_two() -> dict[str, Any]:
    import deltaw as dw

    model = dw.attach(widths(), dw.VeRA(rank=10))
    trained = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    shapes = [shape for one in dw.adapted_layers(model).values() for shape in ((one.out_features,), (10,))]
    require(list(trained.values()) == shapes, f"trained: {trained}")
    total = int(dw.count(model).loc["(total)", "trainable"])
    require(total == 24 + 6 + 6 + 3 * 10, f"{total} numbers")
    return {"tensors": len(trained), "numbers": total}


@claim("vera-note-fewer", "VeRA significantly decreases the number of trained parameters of LoRA.", "reading note; VeRA, abstract",
       "holds if out + r is well below r′(in + out), r′ being LoRA's rank", "proved")  # fmt: skip
def note_fewer() -> dict[str, Any]:
    """At equal rank always; but VeRA's ranks are larger. On a layer of 10 outputs r = 256 is more than LoRA of rank one."""
    import deltaw as dw

    def trained(spec: dw.Spec, out_features: int, in_features: int) -> int:
        return sum(p.numel() for p in layer(spec, out_features, in_features).adapter.parameters())

    found = {}
    for out_features, in_features in ((64, 64), (10, 128), (128, 10)):
        for r in (1, 8, 64, 256):
            vera, lora = trained(dw.VeRA(rank=r), out_features, in_features), trained(dw.LoRA(rank=r), out_features, in_features)
            require(vera == out_features + r and lora == r * (in_features + out_features), f"counted {vera} and {lora}")
            require(vera < lora, f"VeRA is not smaller at rank {r} on {out_features} × {in_features}: {vera}, {lora}")
            found[out_features, in_features, r] = lora / vera
    more = trained(dw.VeRA(rank=256), 10, 128), trained(dw.LoRA(rank=1), 10, 128)
    require(more[0] > more[1], f"no counterexample: {more}")
    return {"LoRA / VeRA, 64 × 64": {r: round(found[64, 64, r], 1) for r in (1, 8, 64)}, "10 × 128: r = 256 against 1": more}


# ---------------------------------------------------------------------------------------------------------------------
# Seeds and files


def frozen(model: nn.Module) -> tuple[Tensor, Tensor]:
    """The shared A and B of a model with one VeRA attached."""
    import deltaw as dw

    projection = next(iter(dw.adapted_layers(model).values())).adapter.projection
    return projection.A, projection.B


@claim("vera-seed", "The frozen matrices need not be stored: a seed gives them back.", "VeRA, section 3",
       "holds if the rank, the widest input and output among the targets and the generator's stream are the same",
       "measured at this scale")  # fmt: skip
def seed() -> dict[str, Any]:
    """Same targets: bit for bit, whatever the base's dtype. Other targets, another rank, a float64 stream: other numbers."""
    import deltaw as dw

    a, b = frozen(dw.attach(widths(), dw.VeRA(rank=8)))
    again = frozen(dw.attach(widths(), dw.VeRA(rank=8), seed=5))
    double = frozen(dw.attach(widths().double(), dw.VeRA(rank=8)))
    half = frozen(dw.attach(widths().bfloat16(), dw.VeRA(rank=8)))
    same = {"again": torch.equal(again[0], a) and torch.equal(again[1], b),
            "float64 base": torch.equal(double[0].float(), a) and torch.equal(double[1].float(), b),
            "bfloat16 base": torch.equal(half[0], a) and torch.equal(half[1], b)}  # fmt: skip
    require(all(same.values()), f"not the same: {same}")

    # Only the last layer (6 × 6) is a target now, which saw the corner of the larger A and B before.
    subset = frozen(dw.attach(widths(), dw.VeRA(rank=8), targets=["4"]))
    longer = frozen(dw.attach(widths(), dw.VeRA(rank=9)))
    wide = torch.empty(8, 24, dtype=torch.float64).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    narrow = torch.empty(8, 24).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
    found = {"subset of the targets": measure.apart(subset[0], a[:, :6]), "rank 9, first 8 of B": measure.apart(longer[1][:, :8], b),
             "drawn in float64": measure.apart(wide.float(), narrow)}  # fmt: skip
    require(min(found.values()) > 0.5, f"not apart: {found}")

    with tempfile.TemporaryDirectory() as folder:
        model = dw.attach(widths(), dw.VeRA(rank=8), targets=["4"])
        loaded = dw.load(widths(), dw.save(model, folder))
        require(list(dw.adapted_layers(loaded)) == ["4"], "a file is loaded into other layers than it was saved from")
        require(torch.equal(frozen(loaded)[0], subset[0]), "a file's seed gives other matrices")
    return {"the same": list(same), "apart": found}


def file_bytes(model: nn.Module, **options: Any) -> tuple[int, int]:
    """Bytes of the tensors in the file that `dw.save` writes, and of the whole file."""
    import deltaw as dw

    with tempfile.TemporaryDirectory() as folder:
        path = next(Path(dw.save(model, folder, **options)).glob("*.safetensors"))
        content = path.read_bytes()
    return len(content) - 8 - int.from_bytes(content[:8], "little"), len(content)


@claim("vera-files", "By seed, an adapter's file holds four bytes for each trained number; with A and B, 4 r (in + out) more, once.",
       "this book", "holds", "proved")  # fmt: skip
def files() -> dict[str, Any]:
    """Bytes of the tensors, fp32; in and out are the largest among the layers. The header comes on top."""
    import deltaw as dw

    r = 40
    vera = dw.attach(widths(), dw.VeRA(rank=r))
    lora = dw.attach(widths(), dw.LoRA(rank=4))
    found = {"by seed": file_bytes(vera)[0], "A and B stored": file_bytes(vera, projections=True)[0], "LoRA": file_bytes(lora)[0]}
    trained = {name: int(dw.count(model).loc["(total)", "trainable"]) for name, model in (("VeRA", vera), ("LoRA", lora))}
    expected = {"by seed": 4 * trained["VeRA"], "A and B stored": 4 * (trained["VeRA"] + r * (24 + 24)), "LoRA": 4 * trained["LoRA"]}
    require(found == expected, f"bytes {found}, by formula {expected}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Scales


def projected_std(fan_in: str, widths: tuple[int, ...] = (64, 256), rank: int = 512) -> dict[int, float]:
    """Standard deviation of the numbers that x, standard normal, is projected to, by the layer's fan-in."""
    import deltaw as dw

    model = nn.Sequential(*(nn.Linear(width, 4, dtype=torch.float64) for width in widths))
    dw.attach(model, dw.VeRA(rank=rank, fan_in=fan_in))
    generator, found = torch.Generator().manual_seed(0), {}
    for one in dw.adapted_layers(model).values():
        x = torch.randn(400, one.in_features, generator=generator, dtype=torch.float64)
        down, _ = one.adapter.factors()
        found[one.in_features] = (x @ down.mT * one.adapter.scale).std().item()
    return found


@claim("vera-fan-in", "One A, sliced for all layers, projects inputs of equal scale to numbers of equal scale in every layer.",
       "this book, on PEFT's VeRA", "holds if all layers have the same fan-in, or each slice is scaled by its own",
       "measured at this scale")  # fmt: skip
def fan_in() -> dict[str, Any]:
    """Entries have variance 2 / (largest fan-in), so a layer of fan-in n projects to variance 2 n / largest."""
    shared, own = projected_std("shared"), projected_std("layer")
    require(abs(shared[64] / shared[256] - math.sqrt(64 / 256)) < 0.03, f"shared: {shared}")
    require(abs(own[64] / own[256] - 1) < 0.06, f"by layer: {own}")
    require(abs(shared[256] - math.sqrt(2)) < 0.05, f"the widest: {shared}")
    return {"shared": shared, "by layer": own}


def slopes(ranks: tuple[int, ...] = (64, 256, 1024, 4096), n: int = 48) -> dict[str, float]:
    """Exponents of r, between the smallest and the largest rank: of the variance of B A, and of what a first-order step does.

    ∂L/∂ΔW is a fixed Gaussian matrix, d constant and b Gaussian. A step of SGD lowers the loss by η ‖gradient‖², one of a
    sign-like optimizer by η times the sum of its absolute values.
    """
    import deltaw as dw

    def measure(r: int, seed: int) -> Tensor:
        base = nn.Linear(n, n, bias=False, dtype=torch.float64)
        one = dw.attach(nn.Sequential(base), dw.VeRA(rank=r, projection_seed=seed))[0]
        with torch.no_grad():
            one.adapter.b.normal_(generator=torch.Generator().manual_seed(seed))
        b, d, a, big_b = parts(one)
        of_b, of_d = gradients(gaussian(n, seed), a, big_b, b, d)
        return torch.stack([(big_b @ a).var(), of_b.square().sum(), of_d.square().sum(), of_b.abs().sum(), of_d.abs().sum()])

    names = ("variance of B A", "SGD, b", "SGD, d", "Adam, b", "Adam, d")
    first, last = (torch.stack([measure(r, seed) for seed in range(6)]).mean(0) for r in (ranks[0], ranks[-1]))
    return dict(zip(names, ((last / first).log() / math.log(ranks[-1] / ranks[0])).tolist()))


@claim("vera-rank-rate", "Kaiming's scaling makes the variance of B·A, and what a step at a given learning rate does to first order, "
       "the same at every rank.", "after VeRA, section 3.3", "holds if the optimizer is SGD, or only b is trained",
       "measured at this scale")  # fmt: skip
def rank_and_rate() -> dict[str, Any]:
    """Under Adam what a step of d does grows like √r."""
    found = slopes()
    require(all(abs(found[name]) < 0.08 for name in found if name != "Adam, d"), f"exponents of r: {found}")
    require(abs(found["Adam, d"] - 0.5) < 0.08, f"exponents of r: {found}")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Cost


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products, those in place, too."""

    SECOND: ClassVar[dict[str, int]] = {"mm": 0, "addmm": 1, "addmm_": 1, "bmm": 0, "baddbmm": 1, "baddbmm_": 1}

    def __init__(self) -> None:
        super().__init__()
        self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self.SECOND:
            one, other = args[self.SECOND[name] :][:2]
            self.multiplications += one.numel() * other.shape[-1]
        return func(*args, **(kwargs or {}))


def cost(spec: "dw.Spec", out_features: int, in_features: int, tokens: int = 32) -> dict[str, float]:
    """Of one layer's adapter, beyond the frozen base: multiplications a token, forward and backward, and numbers kept a token.

    Kept is what the backward pass needs; the input counts where the adapter asks for it.
    """
    import deltaw as dw

    def run(model: nn.Module) -> tuple[int, int, int]:
        x, kept = torch.randn(tokens, in_features, requires_grad=True), {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.dim() == 2 and tensor.shape[0] == tokens:
                kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), Products() as forward:
            y = model(x)
        with Products() as backward:
            y.sum().backward()
        return forward.multiplications, backward.multiplications, sum(kept.values())

    base = nn.Sequential(nn.Linear(in_features, out_features)).requires_grad_(False)
    floor = run(base)
    found = run(dw.attach(base, spec))
    return {name: (a - b) / tokens for name, a, b in zip(("forward", "backward", "kept"), found, floor)}


@claim("vera-cost", "A token costs VeRA as many multiplications as LoRA of the same rank: r(in + out) forward.", "this book", "holds",
       "proved")  # fmt: skip
def costs() -> dict[str, Any]:
    """And r(in + 2 out) backward where LoRA has 2 r(in + out), since A has no gradient; r numbers kept, LoRA r + in."""
    import deltaw as dw

    r, n_out, n_in = 8, 48, 80
    vera, lora = cost(dw.VeRA(rank=r), n_out, n_in), cost(dw.LoRA(rank=r), n_out, n_in)
    require(vera == {"forward": r * (n_in + n_out), "backward": r * (n_in + 2 * n_out), "kept": r}, f"VeRA: {vera}")
    require(lora == {"forward": r * (n_in + n_out), "backward": 2 * r * (n_in + n_out), "kept": r + n_in}, f"LoRA: {lora}")
    return {"VeRA": vera, "LoRA": lora}

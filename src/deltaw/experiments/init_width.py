"""Init[A] or Init[B]: what does each do to training as the network widens?

The toy of Hayou, Ghosh and Yu 2024 (arXiv 2406.08447), `deltaw.tasks.teacher_student`, of width n. Trained: LoRA of
rank 4, s = 1, on the hidden layer, by full-batch Adam with ε ≈ 0, at constant rates and without weight decay. The starts:
Init[A] with A of variance 1/n, Init[B] with B of variance 1/r or 1/n, and Init[A] with LoRA+, where the rate of B is
n/128 times that of A. All share weights, data and the numbers they are drawn from. Of the input z of the hidden layer,
which no training changes, these are measured (root mean squares over entries and examples; ΔA, ΔB of one update):

    Z_A = A z,   ΔZ_A = ΔA z,   Z_B = B A z,   ΔZ_B = δ¹ + δ² + δ³ = B ΔA z + ΔB A z + ΔB ΔA z  (A and B from before)

Said before the record was made, and then left alone:

1. Primary. At η = c · n^γ, γ = −1, −3/4, −1/2, they grow as n to the powers of `theory`, after 5 updates.
2. Secondary, the edge of stability: how far, up from the best rate, the loss after T updates is below the one at the start.
3. Third, the best rate after T updates. The paper asks for the largest η with Z_B = O(1), which says of both: n^(−1/2)
   for Init[A], n^(−1) for Init[B] with 1/r, n^(−1/2) with 1/n: `threshold(start)`. But Z_B is not what the loss sees. If
   one asks for the largest η with which the output moves by O(1), the same derivation says −3/4, −1, −3/4 with the
   readout 1/√n, and −1/2 for all three with 1/n: `threshold(start, readout)`. The two contradict each other most for
   Init[B] with 1/r under the readout 1/n. LoRA+ (its rate is √(η_A η_B)): −1/2 by the paper's measure, −1 and −1/2 by
   the output's, and at n^(−1/2) its Z_A stays O(1), where that of Init[A] is n^(1/2).
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor, nn

from .. import statistics
from ..adapters import LoRA
from ..adapters.adapter import Layer
from ..adapters.inits import normal
from ..bank import Bank
from ..tasks import teacher_student
from ..tasks.teacher_student import READOUTS
from ..train import Recipe

if TYPE_CHECKING:
    import pandas

# The start of each arm: which factor is random, and its variance as (power of n, power of r).
STARTS = {"A": ("A", -1, 0), "B, 1/r": ("B", 0, -1), "B, 1/n": ("B", -1, 0), "A, LoRA+": ("A", -1, 0)}
MEASURES = ("z_a", "step_z_a", "z_b", "delta1", "delta2", "delta3")
STEP = 5  # of the primary exponents: A and B have both moved, and the theory speaks of the first few updates
BASE = 128  # the width at which the rates of all γ are the same, and LoRA+'s two rates
# In fp32 a square below 1e-45 is zero, and the update a gradient of 1e-21 over 0 + ε: this ε makes that less than one
# tenth of the rate. Beside gradients that matter here, 1e-12 and more, it is nothing.
EPS = 1e-20


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        widths: n.
        readouts: see `deltaw.tasks.teacher_student`.
        seeds: how many; each has its own weights, data and starts.
        first_seed: of them. 0 to 2 were the pilot's, from which the grid and the number of steps were chosen.
        points: examples for training, all in every batch.
        held_out: examples for the test loss.
        rank: of LoRA.
        steps: updates, T.
        record: after how many updates there is a row, rising, up to T.
        rates: size of the sweep's grid.
        spacing: the factor from one rate to the next.
        centre: the middle of the grid at width 128; at width n it is centre · (n/128)^(−3/4).
        gammas: γ in η = c · n^γ.
        scaled: η at width 128, whatever γ.
    """

    widths: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    readouts: tuple[str, ...] = ("1/√n", "1/n")
    seeds: int = 6
    first_seed: int = 3
    points: int = 500
    held_out: int = 100
    rank: int = 4
    steps: int = 60
    record: tuple[int, ...] = (1, 2, 3, 5, 10, 20, 40, 60)
    rates: int = 19
    spacing: float = 1.6
    centre: float = 0.15
    gammas: tuple[float, ...] = (-1.0, -0.75, -0.5)
    scaled: float = 0.01

    def __post_init__(self) -> None:
        if list(self.record) != sorted({*self.record, self.steps}) or self.record[0] < 1:
            raise ValueError(f"record must rise from 1 or more to steps={self.steps}, not {self.record!r}")


QUICK = Settings(widths=(32, 64, 128, 256), seeds=2, points=64, held_out=64, steps=20, record=(1, 2, 3, 5, 10, 20),
                 rates=9, spacing=2.5)


def cells(settings: Settings) -> list[dict]:
    """One a width, readout and seed, the narrowest first."""
    every = itertools.product(settings.widths, settings.readouts,
                              range(settings.first_seed, settings.first_seed + settings.seeds))
    return [{"width": width, "readout": readout, "seed": seed} for width, readout, seed in every]


def data(settings: Settings) -> dict[str, str]:
    """None: everything is drawn from the seeds."""
    return {}


def arms(width: int, settings: Settings) -> list[dict]:
    """What a cell trains side by side: start, kind ("sweep" or "scaled"), gamma (None in the sweep), rate and ratio.

    The ratio is B's rate over A's, and the rate is √(η_A η_B): that of both, but with LoRA+.
    """
    wide, middle = width / BASE, (settings.rates - 1) / 2
    centre = settings.centre * wide**-0.75
    rates = [("sweep", None, centre * settings.spacing ** (i - middle)) for i in range(settings.rates)]
    rates += [("scaled", gamma, settings.scaled * wide**gamma) for gamma in settings.gammas]
    return [{"start": start, "kind": kind, "gamma": gamma, "rate": rate, "ratio": wide if start.endswith("LoRA+") else 1.0}
            for start in STARTS for kind, gamma, rate in rates]


def init(start: str) -> Callable[[Layer, int, float, Generator], tuple[Tensor, Tensor]]:
    """The start, in the form of `deltaw.adapters.inits`: one factor normal, the other zero."""
    factor, by_width, by_rank = STARTS[start]

    def draw(layer: Layer, rank: int, scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
        deviation = math.sqrt(layer.in_features**by_width * rank**by_rank)
        a = normal((rank, layer.in_features), generator, layer) * deviation  # (r, n), the same numbers for A and for Bᵀ
        return (a, torch.zeros_like(a.mT)) if factor == "A" else (torch.zeros_like(a), a.mT)

    return draw


def measure(cell: dict, settings: Settings, device: str) -> list[dict]:
    """All arms of a cell, as one bank. A row a recorded step; in the sweep, for all but each start's best rate, the last.

    Each row has `arms`' columns, step (updates made), `MEASURES`, train_loss (1 at step 0) and, at the last step, test_loss.
    A run that is no longer finite has an infinite loss.
    """
    task = teacher_student(**cell, points=settings.points, held_out=settings.held_out)
    runs, seed = arms(cell["width"], settings), cell["seed"]
    recipe = {"steps": settings.steps, "batch_size": settings.points, "optimizer": "adam", "eps": EPS, "precision": "fp32"}
    bank = Bank(task.model(), [
        (LoRA(settings.rank, init=init(run["start"])),
         Recipe(learning_rate=run["rate"] / math.sqrt(run["ratio"]), lora_plus_ratio=run["ratio"], seed=seed, **recipe))
        for run in runs
    ], targets=["hidden"])
    watch = Watch(task, settings.record)
    histories = bank.fit(task, watch=watch, progress=False, device="cpu" if device == "cpu" else None)

    losses = [_finite([*history.loss, watch.last[slot]], settings.steps) for slot, history in enumerate(histories)]
    best = {start: min((loss[-1], slot) for slot, (run, loss) in enumerate(zip(runs, losses))
                       if (run["start"], run["kind"]) == (start, "sweep"))[1] for start in STARTS}
    return [run | {"step": step} | dict(zip(MEASURES, watch.seen[step][slot])) | {
                "train_loss": losses[slot][step],
                "test_loss": histories[slot].metrics.get("loss", math.inf) if step == settings.steps else None}
            for slot, run in enumerate(runs)
            for step in (settings.record if run["kind"] == "scaled" or slot == best[run["start"]] else settings.record[-1:])]


def _finite(losses: list[float], steps: int) -> list[float]:
    """The loss before each update and after the last; infinite from the first on that is not finite."""
    first = next((i for i, loss in enumerate(losses) if not math.isfinite(loss)), steps + 1)
    return losses[:first] + [math.inf] * (steps + 1 - first)


class Watch:
    """Looks at the factors of all slots, in float64, while the bank trains them.

    Attributes:
        seen: by step and slot, the values of `MEASURES`.
        last: by slot, the training loss after the last step.
    """

    def __init__(self, task, record: tuple[int, ...]):
        self.task, self.record = task, record
        self.seen: dict[int, dict[int, list[float]]] = {}
        self.last: dict[int, float] = {}

    def __call__(self, updates: int, model: nn.Module, slots: list[int]) -> None:
        if not {updates, updates + 1} & {0, *self.record}:
            return
        down, up, _ = model.hidden.factors(model.hidden.adapter)
        a, b = down.to(torch.float64, copy=True), up.to(torch.float64, copy=True)  # (K, r, n), (K, n, r)
        batch = {name: tensor.to(a.device) for name, tensor in self.task.train.items()}
        if updates == 0:
            self.z = model.features(batch["inputs"]).double()  # (N, n)
        z_a = a @ self.z.mT  # (K, r, N)
        if updates in self.record:
            self.seen[updates] = dict(zip(slots, measures(*self.before, b, z_a).tolist()))
        if updates == self.record[-1]:
            folded = {name: torch.cat([tensor] * len(slots)) for name, tensor in batch.items()}  # (K · N, …)
            losses = self.task.losses(model, folded).unflatten(0, (len(slots), -1)).mean(1)  # (K,)
            self.last = dict(zip(slots, losses.tolist()))
        self.before = b, z_a


def measures(b0: Tensor, z_a0: Tensor, b: Tensor, z_a: Tensor) -> Tensor:
    """`MEASURES` of one update, `(K, 6)` in fp32: B `(K, n, r)` and Z_A `(K, r, N)` before it and after it."""
    step_b, step_z_a = b - b0, z_a - z_a0  # (K, n, r), (K, r, N)
    columns = [_rms(z_a), _rms(step_z_a), _rms(b, z_a), _rms(b0, step_z_a), _rms(step_b, z_a0), _rms(step_b, step_z_a)]
    return torch.stack(columns, dim=1).float()  # (K, 6), rounded to what is worth storing


def _rms(left: Tensor, right: Tensor | None = None) -> Tensor:
    """Root mean square of the entries of `left`, or of `left @ right`, which is not formed: n × N is large. `(K,)`"""
    if right is None:
        return left.square().mean((1, 2)).sqrt()
    trace = ((left.mT @ left) * (right @ right.mT)).sum((1, 2))  # (K,): ‖LR‖² = tr(RᵀLᵀL R), from r × r matrices
    return (trace.clamp(min=0) / (left.shape[1] * right.shape[2])).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# What was expected


def theory(start: str, gamma: float, step: int = STEP, readout: str | None = None) -> dict[str, float]:
    """The power of n with which each of `MEASURES` grows at η = c · n^gamma; −inf for what is exactly zero.

    Sign-like updates change each entry by ±η. The signs in a row of ΔA agree with z, so that n of them add up in ΔA z.
    Rank and number of steps do not depend on n. So products add powers, and of a sum the largest counts. While one
    factor is zero the other has no gradient, and Adam leaves it alone.

    With a readout there is "output" too, of the change of f by this update. What has been learnt of B has the readout's
    signs: in readout · B n entries add up. B's random start has not: √n.
    """
    factor, by_width, _ = STARTS[start]
    zero = -math.inf
    apart = 0.5 if start.endswith("LoRA+") else 0.0  # a ratio ∝ n, half of it on either side of the rate
    z_a, b_start = ((by_width + 1) / 2, zero) if factor == "A" else (zero, by_width / 2)
    b_learnt = z_b = zero
    gain = zero if readout is None else READOUTS[readout] + 1
    for _ in range(step):
        b = max(b_start, b_learnt)
        step_z_a = gamma - apart + 1 if b > zero else zero
        step_b = gamma + apart if z_a > zero else zero
        delta1, delta2, delta3 = b + step_z_a, step_b + z_a, step_b + step_z_a
        output = gain + max(b_start - 0.5 + step_z_a, b_learnt + step_z_a, delta2, delta3)
        z_a, b_learnt, z_b = max(z_a, step_z_a), max(b_learnt, step_b), max(z_b, delta1, delta2, delta3)
    found = dict(zip(MEASURES, (z_a, step_z_a, z_b, delta1, delta2, delta3)))
    return found if readout is None else found | {"output": output}


def threshold(start: str, readout: str | None = None) -> float:
    """The largest γ, at least −4, with Z_B = O(1), as the paper asks; given a readout, with an output that moves by O(1)."""
    low, high = -4.0, 1.0
    for _ in range(50):  # both powers rise with γ
        middle = (low + high) / 2
        power = theory(start, middle, readout=readout)["output" if readout else "z_b"]
        low, high = (middle, high) if power <= 0 else (low, middle)
    return round(low, 6)


# ---------------------------------------------------------------------------------------------------------------------
# What was found, from the record's table


def exponents(table: "pandas.DataFrame", step: int = STEP, **options) -> "pandas.DataFrame":
    """The powers of n after `step` updates beside the theory's: a row a readout, start, gamma and quantity.

    `options` go to `deltaw.statistics.exponents`, whose columns these are, with theory.
    """
    rows = table[(table["kind"] == "scaled") & (table["step"] == step)]
    found = statistics.exponents(rows, MEASURES, ("readout", "start", "gamma"), **options)
    expected = [theory(row.start, row.gamma, step)[row.quantity] for row in found.itertuples()]
    return found.assign(theory=expected)


def chosen_rates(table: "pandas.DataFrame", how: str) -> "pandas.DataFrame":
    """The "best" or "edge" rate at each width: as `deltaw.statistics.picks`, with inside: is it between grid points?"""
    return statistics.picks(_sweep(table), ("readout", "start"), _pick(how))


def rate_exponents(table: "pandas.DataFrame", how: str, **options) -> "pandas.DataFrame":
    """The power of n of the "best" or "edge" rate: a row a readout and start, beside what the paper and the output say.

    `options` go to `deltaw.statistics.pick_exponents`, whose columns these are, with paper and output.
    """
    found = statistics.pick_exponents(_sweep(table), ("readout", "start"), _pick(how), **options)
    return found.assign(paper=[threshold(row.start) for row in found.itertuples()],
                        output=[threshold(row.start, row.readout) for row in found.itertuples()])


def _sweep(table: "pandas.DataFrame") -> "pandas.DataFrame":
    return table[(table["kind"] == "sweep") & (table["step"] == table["step"].max())]


def _pick(how: str) -> statistics.Pick:
    picks = {"best": statistics.best, "edge": statistics.edge}
    if how not in picks:
        raise ValueError(f"how must be one of {tuple(picks)}, not {how!r}")
    return picks[how]

"""MoSLoRA's mixers beside LoRA on text and code: what the record of the experiment `mixers` says, and an account of it (chapter 6).

Two tasks, ten seeds, each row at its own tuned rate. What was fixed before the record is in the experiment's docstring.
Intervals are over seeds, given the chosen rates and the examples, unless examples are named. On code less is better.
The account is tested on a matrix, and on code by the records `tuned_comparison` and `tuned_further`, with another decoder.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..tasks.task import Batch, Task
from . import claim, require
from .comparison import beside, on_code, rates_on_code
from .measure import draw, largest, shown
from .moslora import paired, same_loss
from .two_forms import RANK, any_mixer, run, start_of_a

if TYPE_CHECKING:
    import pandas

BOOK = "this book"
FIXED = "this book, fixed before the record"
MEASURED = "measured at this scale"
MARGIN = 0.01  # of a difference that does not matter: in Matthews' correlation, or in nats a token
LORA, ORTHOGONAL, KAIMING = "LoRA", "orthogonal, fixed", ("kaiming, fixed", "kaiming, trained")
HALVES = ("two-subspace, fixed", "two-subspace, trained")
EVEN = ("MoSLoRA, orthogonal", "MoSLoRA, orthogonal, trained", "MoSLoRA, evened")  # as the tuned records call them
UNEVEN = "MoSLoRA, trained"  # from a Kaiming mixer


@lru_cache(maxsize=1)
def record() -> "pandas.DataFrame":
    from deltaw import results

    return results.load("mixers")


@lru_cache(maxsize=1)
def differences() -> "pandas.DataFrame":
    """Every row − LoRA, each at its own rate, by task and row: one family a task."""
    from deltaw.experiments import mixers

    return mixers.differences(record(), MARGIN).set_index(["task", "row"])


@lru_cache(maxsize=1)
def rates() -> "pandas.DataFrame":
    """Of each row: its rate, and that in LoRA's; what it gains over LoRA's rate. By task and row."""
    from deltaw.experiments import mixers

    found = mixers.confound(record())
    return found.assign(times=found.rate / found.rate_of_lora).set_index(["task", "row"])


@lru_cache(maxsize=8)
def pair(one: str, other: str, examples: bool = False) -> "pandas.DataFrame":
    """Two rows by themselves, a family of one, by task; over seeds, or over seeds and examples."""
    from deltaw.experiments.engine import two_level, verdicts

    return (two_level if examples else verdicts).between(record(), [(one, other)], MARGIN).set_index("task")


@lru_cache(maxsize=1)
def training() -> "pandas.DataFrame":
    """Each mixer trained − the same fixed, by task and mixer: a family that was not fixed before."""
    from deltaw.experiments import mixers
    from deltaw.experiments.engine import verdicts

    names = record().attrs["manifest"]["settings"]["mixers"]
    found = verdicts.between(record(), [(mixers.name(name, True), mixers.name(name, False)) for name in names], MARGIN)
    return found.assign(mixer=found.row.str.partition(",")[0]).set_index(["task", "mixer"])


def tuning_seeds(one: str, other: str, task: str = "cola") -> tuple[float, float, float]:
    """Low, mean and high of one − other, on the validation set, of the seeds that tuned, each at its own rate."""
    from deltaw.experiments.engine.tuning import TUNING, measure_of
    from deltaw.experiments.engine.verdicts import student

    runs, chosen = record(), rates().rate[task]
    runs = runs[(runs.task == task) & runs.phase.isin(TUNING)]
    values = [runs[(runs.row == row) & (runs.rate == chosen[row])].set_index("seed")[f"report/{measure_of(task)}"]
              for row in (one, other)]  # fmt: skip
    return student((values[0] - values[1]).to_numpy())


def tuned_by(task: str, row: str) -> "pandas.DataFrame":
    """The measure on the tuning split, by tuning seed and rate. (seeds, rates)"""
    from deltaw.experiments.engine.tuning import TUNING, measure_of

    runs = record()
    runs = runs[(runs.task == task) & (runs.row == row) & runs.phase.isin(TUNING)]
    return runs.pivot(index="seed", columns="rate", values=f"tune/{measure_of(task)}")


@lru_cache(maxsize=8)
def factors(task: str, row: str, other: str = LORA) -> "pandas.Series":
    """The row's best rate over `other`'s, to a tenth: the share of the ways to draw the tuning seeds anew that chooses it."""
    import numpy
    import pandas

    from deltaw.experiments.engine.tuning import measure_of

    sign, best = 1 if measure_of(task) == "loss" else -1, []
    for table in (tuned_by(task, row), tuned_by(task, other)):
        draws = numpy.array(list(product(range(len(table)), repeat=len(table))))  # (draws, seeds)
        means = sign * table.to_numpy()[draws].mean(axis=1)  # (draws, rates)
        best.append(table.columns.to_numpy(float)[means.argmin(axis=1)])
    return pandas.Series(best[0] / best[1]).round(1).value_counts(normalize=True).sort_index()


def lag(task: str, row: str) -> "pandas.Series":
    """By how much larger a rate the row needs to end at LoRA's training loss, by LoRA's rates below its best."""
    runs = record().rename(columns={"row": "name", "train_loss": "loss"})
    found = same_loss(runs[(runs.task == task) & (runs.phase == "coarse")], row, LORA)
    return found[found.index < 0.75 * rates().rate[task, LORA]]


# ---------------------------------------------------------------------------------------------------------------------
# The two endpoints


@claim("moslora-record-primary", "On CoLA a fixed orthogonal mixer and LoRA, each at its own rate, are equivalent: within one "
       "point.", FIXED, "does not hold", MEASURED)  # fmt: skip
def primary(one: str = ORTHOGONAL, other: str = LORA) -> dict[str, Any]:
    """The mixer is ahead by 0.024 [0.004, 0.043], "better" by the rule that was fixed, over seeds and sentences as well. Not
    in the family of all rows; and the five tuning seeds, on the same sentences and at the same rate, do not show it."""
    found = pair(one, other).loc["cola"]
    require(found.verdict == "better" and shown(found) == "+0.024 [+0.004, +0.043]", f"{shown(found)}: {found.verdict}")
    both = pair(one, other, True).loc["cola"]
    require(both.verdict == "better", f"over sentences {shown(both)}: {both.verdict}")
    require(abs(both.low - 0.006) < 0.0015 and abs(both.high - 0.041) < 0.0015, f"over sentences {shown(both)}")
    family = differences().loc["cola", one]
    require(family.verdict == "not separable" and family.low_all < 0, f"among all rows {shown(family, True)}")
    low, mean, high = tuning_seeds(one, other)
    require(low < 0 < high and mean < 0, f"the tuning seeds: {mean:+.3f} [{low:+.3f}, {high:+.3f}]")
    return {"over seeds": shown(found), "over seeds and sentences": shown(both), "among all rows": shown(family, True),
            "five tuning seeds": f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"}  # fmt: skip


@claim("moslora-record-code", "On code a fixed orthogonal mixer and LoRA, each at its own rate, are equivalent: within 0.01 "
       "nats.", FIXED, "holds", MEASURED)  # fmt: skip
def code(one: str = ORTHOGONAL, other: str = LORA) -> dict[str, Any]:
    """0.0017 [−0.0028, 0.0061]; over seeds and headers as well, and in the family of all rows."""
    found = pair(one, other).loc["code_lm"]
    require(shown(found, digits=4) == "+0.0017 [-0.0028, +0.0061]", shown(found, digits=4))
    every = {"over seeds": found, "over seeds and headers": pair(one, other, True).loc["code_lm"],
             "among all rows": differences().loc["code_lm", one]}  # fmt: skip
    require(all(x.verdict == "equivalent" for x in every.values()), f"{ {name: x.verdict for name, x in every.items()} }")
    return {name: shown(x, name == "among all rows", 4) for name, x in every.items()}


@claim("moslora-record-identity", "A fixed identity is LoRA, run by run and to the last bit.", FIXED, "holds", MEASURED)
def identity(other: str = "") -> dict[str, Any]:
    from deltaw.experiments import mixers

    table = record()
    if other:
        table = table[table.row != "identity, fixed"].replace({"row": {other: "identity, fixed"}})
    gap = mixers.identity_gap(table)
    require(gap == 0, f"the largest difference is {gap:.1e}")
    return {"largest difference of any measure": gap}


# ---------------------------------------------------------------------------------------------------------------------
# Kaiming


@claim("moslora-record-published", "On CoLA and on code, each at its own rate, MoSLoRA as its code has it by default, with a trained "
       "Kaiming mixer, does better than LoRA.", "after MoSLoRA, abstract", "does not hold", MEASURED)  # fmt: skip
def published(row: str = KAIMING[1]) -> dict[str, Any]:
    """On CoLA it is ahead by 0.021, not separable in the family of all rows; on code it is behind by 0.027 nats."""
    text, nats = (differences().loc[task, row] for task in ("cola", "code_lm"))
    require(text.verdict == "not separable" and text.difference > 0, f"CoLA: {shown(text, True)}, {text.verdict}")
    require(nats.verdict == "worse" and nats.low_all > 0.015, f"code: {shown(nats, True)}, {nats.verdict}")
    return {"CoLA": shown(text, True), "CoLA, by itself": shown(text), "code": shown(nats, True)}


@claim("moslora-record-best-rate", "By the rule's choice both Kaiming mixers have a larger best rate than LoRA, by about 1.4.", FIXED,
       "does not hold", MEASURED)  # fmt: skip
def best_rate(text: float = 1.0, nats: tuple[float, float] = (2.0, 2.84)) -> dict[str, Any]:
    """On CoLA it is LoRA's; on code 2 times as large, fixed, and 2.8 times, trained. No choice lies at an edge. But LoRA's two
    best rates on code tie, and with the other one the factors are 1.4 and 2: if the tuning seeds are drawn anew, the fixed
    mixer's is 1.4 in 43 % of the draws, the trained one's in 6 %."""
    from deltaw.experiments import mixers
    from deltaw.experiments.engine.verdicts import student

    require(not mixers.chosen(record()).at_edge.any(), "a rate lies at the edge of its grid")
    times = rates().times
    for row, expected in zip(KAIMING, nats, strict=True):
        require(times["cola", row] == text and abs(times["code_lm", row] - expected) < 0.01, f"{times.to_dict()}")
    losses = tuned_by("code_lm", LORA)
    best, second = losses.mean().nsmallest(2).index
    low, mean, high = student((losses[best] - losses[second]).to_numpy())
    require(second > best and low < 0 < high and abs(mean) < 0.001, f"LoRA at {best}, {second}: {mean:+.4f} [{low:+.4f}, {high:+.4f}]")
    shares = {row: float(factors("code_lm", row).get(1.4, 0)) for row in KAIMING}
    for row, factor, share in zip(KAIMING, (1.4, 2.0), (0.43, 0.06), strict=True):
        require(round(rates().rate["code_lm", row] / second, 1) == factor, f"{row}: {rates().rate['code_lm', row]} over {second}")
        require(abs(shares[row] - share) < 0.01, f"{row}: {shares[row]:.3f} of the draws have 1.4")
    return {task: {row: round(float(times[task, row]), 2) for row in KAIMING} for task in ("cola", "code_lm")} | {
        "LoRA's two best rates on code": f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]", "share of draws with 1.4": shares}  # fmt: skip


@claim("moslora-record-confound", "At LoRA's rate a Kaiming mixer does worse than at its own.", FIXED,
       "holds if code is meant, by 0.007 nats fixed and 0.017 trained; on CoLA the two rates are one", MEASURED)  # fmt: skip
def confound(rows: Sequence[str] = KAIMING) -> dict[str, Any]:
    table = rates()
    for row, gain in zip(rows, (-0.007, -0.017), strict=True):
        one = table.loc["code_lm", row]
        require(one.high < 0 and round(one.gain, 3) == gain, f"{row}: {one.gain:+.4f} [{one.low:+.4f}, {one.high:+.4f}]")
        require(table.gain["cola", row] == 0 and table.times["cola", row] == 1, f"{row}, CoLA: {table.gain['cola', row]}")
    return {row: f"{one.gain:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" for row in rows for one in [table.loc["code_lm", row]]}


@claim("moslora-record-tuned", "What sets a Kaiming mixer back is its size: with its own rate it is level with LoRA.",
       f"{BOOK}, expected from the derivation", "does not hold", MEASURED)  # fmt: skip
def tuned(rows: Sequence[str] = KAIMING) -> dict[str, Any]:
    """On code both are behind LoRA at their own rates, by 0.046 and 0.027 nats; of what LoRA's rate shows, the rate explains
    0.13 and 0.39. Over seeds and headers, too."""
    from deltaw.experiments import mixers

    same = mixers.differences_at_one_rate(record(), MARGIN).set_index(["task", "row"]).loc["code_lm"]
    both = mixers.differences_over_examples(record()[record().task == "code_lm"], MARGIN).set_index("row")
    shares = {row: float(-rates().gain["code_lm", row] / same.difference[row]) for row in rows}
    for row, share in zip(rows, (0.13, 0.39), strict=True):
        own = differences().loc["code_lm", row]
        require(own.verdict == "worse" and both.verdict[row] == "worse" and own.low_all > MARGIN, f"{row}: {shown(own, True)}")
        require(abs(shares[row] - share) < 0.006, f"{row}: the rate explains {shares[row]:.3f}")
    return {row: shown(differences().loc["code_lm", row], True) for row in rows} | {"explained by the rate": shares}


# ---------------------------------------------------------------------------------------------------------------------
# Two subspaces, and training


@claim("moslora-record-half-rate", "Two subspaces, fixed, which are LoRA of half the rank at twice the rate, have a smaller best "
       "rate than LoRA.", FIXED, "holds", MEASURED)  # fmt: skip
def half_rate(row: str = HALVES[0]) -> dict[str, Any]:
    """Half of LoRA's on CoLA, 0.71 of it on code."""
    times = rates().times.xs(row, level="row")
    require(times["cola"] == 0.5 and abs(times["code_lm"] - 0.71) < 0.01, f"{times.to_dict()}")
    return {task: round(float(value), 2) for task, value in times.items()}


@claim("moslora-record-two-subspaces", "Mixing two subspaces enhances performance, on CoLA and on code.", "after MoSLoRA, abstract",
       "does not hold", MEASURED)  # fmt: skip
def two_subspaces(rows: Sequence[str] = HALVES) -> dict[str, Any]:
    """Each at its own rate: not separable from LoRA on CoLA, and on code behind by 0.059 and 0.056 nats. On CoLA the validation
    loss, the secondary measure, is lower, by 0.020: at LoRA's rate by 0.005, which is not told from zero."""
    from deltaw.experiments.engine import verdicts

    table = record()
    secondary, at_loras = (verdicts.by_seed(table[table.task == "cola"], "report/loss", at) for at in (None, LORA))
    others = [(row, LORA) for row in secondary if row != LORA]
    secondary, at_loras = (verdicts.compare(losses, others, MARGIN, less_is_better=True).set_index("row")
                           for losses in (secondary, at_loras))  # fmt: skip
    for row in rows:
        text, nats = (differences().loc[task, row] for task in ("cola", "code_lm"))
        require(text.verdict == "not separable" and abs(text.difference) < 0.003, f"CoLA, {row}: {shown(text, True)}")
        require(nats.verdict == "worse" and nats.low_all > 0.045, f"code, {row}: {shown(nats, True)}")
        require(secondary.verdict[row] == "better" and round(secondary.difference[row], 3) == -0.020, shown(secondary.loc[row]))
        require(-0.006 < at_loras.difference[row] < 0 < at_loras.high[row], f"at LoRA's rate {shown(at_loras.loc[row])}")
    return {f"{row}, {task}": shown(differences().loc[task, row], True) for row in rows for task in ("cola", "code_lm")} | {
        f"{row}, loss on CoLA": shown(secondary.loc[row]) for row in rows}  # fmt: skip


@claim("moslora-record-training", "Training the mixer does better than leaving it fixed.", "after MoSLoRA, section 3",
       "holds if it is Kaiming's, on code; of the other three, on code, the difference is within 0.01 nats, and on CoLA none "
       "is separable", MEASURED)  # fmt: skip
def trained(mixer: str = "kaiming") -> dict[str, Any]:
    """Each at its own rate. On code by 0.019 nats for Kaiming's; 0.003 to 0.005 for the others, every mean in favour of
    training; told from zero are Kaiming's and the identity's."""
    table = training()
    require((table.verdict["cola"] == "not separable").all(), f"{table.verdict.to_dict()}")
    nats = table.loc["code_lm"]
    require(nats.verdict[mixer] == "better" and nats.high_all[mixer] < -MARGIN, f"{mixer}: {shown(nats.loc[mixer], True)}")
    rest = nats.drop(mixer)
    require((rest.verdict == "equivalent").all(), f"{rest.verdict.to_dict()}")
    require(rest.difference.between(-0.0055, -0.0025).all(), f"{rest.difference.to_dict()}")
    require((nats.high_all < 0).sum() == 2 and nats.high_all["identity"] < 0, f"{nats.high_all.to_dict()}")
    return {f"{task}, {name}": f"{shown(one, True)}: {one.verdict}" for (task, name), one in table.iterrows()}


# ---------------------------------------------------------------------------------------------------------------------
# An account of why: a mixer's singular values


@claim("moslora-singular-values", "Under SGD, from B = 0, a fixed mixer M = UΣVᵀ acts by its singular values alone: it is LoRA "
       "from VᵀA whose k-th component has the scale σ_k.", f"{BOOK}, after MoSLoRA, appendix A.4", "holds",
       "proved")  # fmt: skip
def singular_values(power: float = 1.0) -> dict[str, Any]:
    """30 steps, with and without momentum: M from A and Σ from VᵀA. Under Adam it is not so."""
    import deltaw as dw

    m, a, found = any_mixer(), start_of_a(), {}
    _, values, vt = torch.linalg.svd(m)
    rules = {"SGD": partial(torch.optim.SGD, lr=0.01), "momentum": partial(torch.optim.SGD, lr=0.003, momentum=0.9),
             "Adam": partial(torch.optim.Adam, lr=0.005)}  # fmt: skip
    for name, make in rules.items():
        full = run(dw.MoSLoRA(RANK, mixer=m, train_mixer=False), make, 30, A=a)
        plain = run(dw.MoSLoRA(RANK, mixer=values.pow(power).diag(), train_mixer=False), make, 30, A=vt @ a)
        require(full.losses[-1] < full.losses[0], f"{name} does not learn")
        found[name] = largest(full.products, plain.products)
    require(max(found["SGD"], found["momentum"]) < 1e-9 and found["Adam"] > 1e-3, f"apart: {found}")
    return found


@claim("moslora-effective-rank", "A Kaiming mixer's effective rank is r/2 for large r, which is what two subspaces have; an "
       "orthogonal one's is r.", BOOK, "holds", "proved")  # fmt: skip
def mixers_rank(r: int = 8, draws: int = 1000) -> dict[str, Any]:
    """With r² entries of variance v and fourth moment κv² (1.8 for a uniform one) E tr MᵀM = r²v and E tr (MᵀM)² =
    r²v²(2r − 2 + κ): their ratio is r²/(2r − 0.2). Against the library's mixers, over draws."""
    from deltaw.adapters.adapter import Layer
    from deltaw.adapters.moslora import MIXERS

    g, like = torch.Generator().manual_seed(0), Layer("layer", torch.empty(4, 4, dtype=torch.float64))
    found = {}
    for name, expected in (("kaiming", r * r / (2 * r - 0.2)), ("two-subspace", r / 2), ("orthogonal", r)):
        energies = [torch.linalg.svdvals(MIXERS[name](r, g, like)).square() for _ in range(draws)]
        energy = torch.stack(energies)  # (draws, r)
        ratio = (energy.sum(1).mean().square() / energy.square().sum(1).mean()).item()
        require(abs(ratio / expected - 1) < 0.03, f"{name}: {ratio:.2f}, not {expected:.2f}")
        found[name] = ratio
    return found


class Toward(Task):
    """A linear layer of zeros is to become `target` (out, in), from fresh Gaussian inputs: half the squared error."""

    def __init__(self, target: Tensor):
        self.target = target

    def model(self) -> nn.Module:
        layer = nn.Linear(self.target.shape[1], self.target.shape[0], bias=False)
        nn.init.zeros_(layer.weight)
        return nn.Sequential(layer)

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        g = torch.Generator().manual_seed(seed)
        while True:
            x = torch.randn(batch_size, self.target.shape[1], generator=g)  # (batch, in)
            yield {"x": x, "labels": x @ self.target.mT}

    def validation(self, batch_size: int) -> Iterator[Batch]:
        yield next(self.batches(10**6, batch_size))

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return (model(batch["x"]) - batch["labels"]).square().sum(-1) / 2  # (batch,)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"])

    def metrics(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        return {"loss": (predictions - labels).square().sum(-1).mean().item() / 2}


def goal(directions: int, size: int = 32) -> Tensor:
    """A Gaussian matrix (size, size), or a product of two of that many directions."""
    if directions >= size:
        return draw(3, size, size).float() / size**0.5
    return (draw(4, size, directions) @ draw(5, directions, size)).float() / (size * directions) ** 0.5


def drawn(name: str, seed: int, rank: int = 8) -> Any:
    """LoRA, or MoSLoRA from a Kaiming mixer UΣVᵀ of that seed: as it is ("Kaiming"), √3 times as large ("large"), or with all
    singular values alike ("even", UVᵀ/√3); fixed but for "Kaiming, trained". "two subspaces" is fixed."""
    import deltaw as dw
    from deltaw.adapters.moslora import MIXERS

    if name == LORA:
        return dw.LoRA(rank)
    if name == "two subspaces":
        return dw.MoSLoRA(rank, mixer="two-subspace", train_mixer=False)
    m = MIXERS["kaiming"](rank, torch.Generator().manual_seed(1000 + seed), dw.Layer("layer", torch.empty(4, 4)))  # (r, r)
    u, _, vt = torch.linalg.svd(m)
    made = {"Kaiming": m, "Kaiming, trained": m, "large": 3**0.5 * m, "even": u @ vt / 3**0.5}
    return dw.MoSLoRA(rank, mixer=made[name], train_mixer="trained" in name)


NAMES = (LORA, "even", "Kaiming, trained", "Kaiming", "large", "two subspaces")


@lru_cache(maxsize=2)
def toward(directions: int, names: Sequence[str] = NAMES, seeds: int = 6, steps: int = 100) -> "pandas.DataFrame":
    """A run a row: name, rate, seed, and what is left of the target's squared norm. Adam, rank 8, a 32 × 32 layer."""
    import pandas

    import deltaw as dw

    task, rates = Toward(goal(directions)), [0.02 * 2**k for k in range(5)]
    runs = list(product(names, rates, range(seeds)))
    recipe = partial(dw.Recipe, steps=steps, batch_size=32, schedule="linear")
    bank = dw.Bank(task.model(), [(drawn(name, seed), recipe(learning_rate=rate, seed=seed)) for name, rate, seed in runs])
    bank.fit(task, progress=False)
    rows = []
    for slot, each in enumerate(runs):
        model = bank.adapter(slot)
        off = model[0].delta_weight().detach() - task.target  # (out, in)
        rows.append((*each, (off.square().sum() / task.target.square().sum()).item()))
        dw.detach(model)
    return pandas.DataFrame(rows, columns=["name", "rate", "seed", "left"])


def at_best(table: "pandas.DataFrame") -> "pandas.DataFrame":
    """Of each name at the rate of the lowest mean: that rate, and `left` minus LoRA's, low, mean and high over seeds."""
    import pandas

    means = table.groupby(["name", "rate"], sort=False).left.mean()
    best = means.groupby(level="name", sort=False).idxmin()
    own = table.set_index(["name", "rate"]).loc[list(best)].reset_index()
    rows = {name: (best[name][1], means[best[name]], *paired(own, name, LORA, "left")) for name in best.index}
    return pandas.DataFrame(rows, index=["rate", "left", "low", "difference", "high"]).T


@claim("moslora-uneven", "A fixed Kaiming mixer is behind LoRA, each at its best rate, since its singular values differ and not "
       "since it is small.", BOOK, "holds if the task needs all r directions: shown on a Gaussian target, at r = 8 in 100 "
       "steps of Adam", MEASURED)  # fmt: skip
def uneven(directions: int = 32, behind: str = "Kaiming") -> dict[str, Any]:
    """The same mixer with all singular values alike, 1/√3, is level with LoRA; √3 times the mixer is not. Trained, it makes up
    most of it. For a target of rank 4 it is no handicap. Two subspaces are behind the most."""
    table = at_best(toward(directions))
    require(table.low[behind] > 0 and table.low["large"] > 0, f"{table}")
    require(abs(table.difference["even"]) < 0.1 * table.difference[behind], f"{table}")
    require(table.difference["Kaiming, trained"] < 0.3 * table.difference[behind], f"{table}")
    require(table.difference["two subspaces"] > 3 * table.difference[behind], f"{table}")
    easy = at_best(toward(RANK))
    require(easy.left.max() < 0.01, f"a target of rank {RANK}: {easy}")
    found = {name: f"{one.difference:+.3f} [{one.low:+.3f}, {one.high:+.3f}]" for name, one in table.iterrows() if name != LORA}
    return found | {"LoRA leaves": float(table.left[LORA]), "the best of rank 8": floor(goal(directions))}


def floor(target: Tensor, rank: int = 8) -> float:
    """What the best matrix of that rank leaves of the target's squared norm."""
    energy = torch.linalg.svdvals(target).square()
    return (energy[rank:].sum() / energy.sum()).item()


# ---------------------------------------------------------------------------------------------------------------------
# The account, tested on code: the records of tuned_comparison and tuned_further


def bridge() -> "pandas.DataFrame":
    """How far the rows that both records have are apart, by row."""
    return beside("bridge").set_index("row")


def tuned_pair(one: str, other: str, verdict: str, *numbers: float) -> "pandas.Series":
    """A difference of the two records that has that verdict, and these ends: difference, low and high to three digits."""
    found = on_code().loc[(one, other)] if (one, other) in on_code().index else None
    require(found is not None, f"{one} − {other} is not in the records")
    require(found.verdict == verdict, f"{one} − {other}: {shown(found, True)}, {found.verdict}")
    ends = [found.difference, found.low_all, found.high_all]
    require(all(abs(end - number) < 0.0006 for end, number in zip(ends, numbers, strict=True)), f"{one} − {other}: {shown(found, True)}")
    return found


@claim("moslora-further-evened", "On code a fixed mixer of a Kaiming mixer's size, but with all singular values alike, is equivalent to "
       "LoRA, each at its own rate.", FIXED, "holds", MEASURED)  # fmt: skip
def evened_on_code(row: str = EVEN[2]) -> dict[str, Any]:
    """It is better than the trained Kaiming mixer by 0.030 nats, which is behind LoRA by 0.028: so the
    account, by which size is not the reason, stands. A fixed Kaiming mixer was not run in this setting."""
    require(bridge().report_apart[LORA] == 0, f"LoRA's runs in the two records: {bridge()}")
    pairs = {(row, LORA): ("equivalent", -0.003, -0.008, 0.003), (row, UNEVEN): ("better", -0.030, -0.037, -0.024),
             (row, EVEN[0]): ("equivalent", 0.002, 0.001, 0.003), (UNEVEN, LORA): ("worse", 0.028, 0.019, 0.037)}  # fmt: skip
    found = {f"{one} − {other}": shown(tuned_pair(one, other, *expected), True) for (one, other), expected in pairs.items()}
    times = {name: round(rates_on_code()[name] / rates_on_code()[LORA], 2) for name in (EVEN[0], row, UNEVEN)}
    require(list(times.values()) == [1.0, 1.41, 1.99], f"rates, of LoRA's: {times}")
    return found | {"rates, of LoRA's": times}


@claim("moslora-further-start", "On code a mixer that is trained from an orthogonal one is equivalent to LoRA, and better than one that is "
       "trained from Kaiming's: the start does it, not training.", FIXED, "holds", MEASURED)  # fmt: skip
def start_on_code(row: str = EVEN[1]) -> dict[str, Any]:
    """Each at its own rate. It is equivalent to the orthogonal mixer that stays fixed."""
    require(bridge().report_apart[LORA] == 0, f"LoRA's runs in the two records: {bridge()}")
    pairs = {LORA: ("equivalent", -0.005, -0.011, 0.001), UNEVEN: ("better", -0.033, -0.043, -0.022),
             EVEN[0]: ("equivalent", 0.000, -0.007, 0.006)}  # fmt: skip
    return {f"− {other}": shown(tuned_pair(row, other, *expected), True) for other, expected in pairs.items()}

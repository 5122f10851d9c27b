"""Do a mixer left between A and B and one merged into A train alike on a real task?

MiniLM (22.6 M) learns TREC's question types, with ΔW = B M A of rank 8, s = 1, on all 36 linear layers of the encoder, from
B = 0. For each fixed mixer M there is a run that keeps it (A and B move) and one that is merged (LoRA from M A); where it is
trained (A, B and M move), that run is compared with the same merged one. All runs of a cell go through the model together: same
start, same batches, same rate. The twelve optimizers are chapter 7's (`deltaw.claims.two_forms.RULES`) and train the factors.
The head is trained by Adam at 0.001 in all runs; clipping by norm is by that of all factors of a run. Mixers differ from layer
to layer. "Head alone" has A = B = 0, which no optimizer leaves. (TREC, because on CoLA LoRA has hardly left the majority class
after 500 steps: so the record of `init_text`, which was known.)

Measured are ‖ΔW − ΔW′‖ / ‖ΔW‖ over all layers together (Frobenius), the difference of the losses, and how many validation
examples are predicted differently in the end. No choice of kernels makes a pair agree to the last bit, because B M A and
B (M A) are different products. So each fixed mixer has a *control*, the same run with each entry of A times 1 ± 4ε, ε the
precision's (that is 8.9e-16 in float64): what comes of this, comes of rounding.

Fixed before the run, when nothing was known of it but a sketch of rates and clipping (LoRA, float32, 50 or 60 steps of 8
examples, another seed) and `QUICK`, which is another task and at most eight steps:

- *Rates.* Of five, half a decade apart, the one with the least mean training loss of LoRA in the last quarter of 200 steps
  (float32, another seed); constant, and the same for both forms and all mixers. A choice at an end is flagged.
- *Verdict* of a pair. "Equal to rounding" if in no seed and at no checkpoint its distance exceeds `EQUAL` times that of its
  mixer's control (the largest of any seed up to that checkpoint, and at least ε); "apart" if in every seed it exceeds `APART`
  times that at some checkpoint; else "between"; "stopped" if a distance is not finite.
- *Hypothesis 1*, the theorem of chapter 7. In float64 a pair is equal to rounding if the mixer is fixed and a symmetry of the
  optimizer (a signed permutation under all twelve, an orthogonal one under six: 18 of 60), else apart. One pair against it, and
  it has failed.
- *Hypothesis 2.* From B = 0 the first step is blind. So the pairs that part do so at step 2; only a trained mixer under weight
  decay does at step 1.
- *Hypothesis 3.* Rounding grows, by how much nothing predicts, but not otherwise where the mixer is merged: in float64 the
  exponents of pairs that should be equal, in decades per 100 steps, are within `ALIKE` of their controls'. (One that cannot be
  fitted counts against it.)
- *Hypothesis 4.* In float32, where rounding is 10⁹ times larger, the verdicts are the same; and in pairs that should be equal the
  share of validation examples that both predict differently is at most `SHARE` above the control's.

Which form is better is not asked: so few seeds cannot tell.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from ..tasks.text import fingerprint
from .engine.merged_runs import CONTROL, DECAYING, FIXED, HEAD, MIXERS, OPTIMIZERS, TRAINED, compared, tried

EQUAL, APART = 100, 1000  # times the control
GROWING = (25, 1e-2)  # the growth is fitted from this step on, to distances below this one
ALIKE = 0.5  # exponents that differ by less, in decades per 100 steps
SHARE = 0.01
SHOWN = (1, 2, 10, 100, 500)  # steps of the table


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        task: as `deltaw.tasks.text` knows it.
        optimizers: of `OPTIMIZERS`.
        mixers: of `MIXERS`. Each is run fixed and merged, and has a control.
        trained: of these, those that are trained too.
        seeds: of the start, the mixers, the head and the order of the examples, in float64.
        seeds_float32: in float32, in which PyTorch multiplies matrices unless it is told that less will do.
        rank, steps, batch_size: of each run.
        length: tokens a sentence, cut or padded; 2.4 % of the training and no validation sentence of TREC exceed 24.
        decades: the grid of rates around an optimizer's own.
        rate_steps, rate_seed: of the runs that the rates are chosen by.
        limit: at most so many training and so many validation sentences are read.
    """

    task: str = "trec"
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    mixers: tuple[str, ...] = tuple(MIXERS)
    trained: tuple[str, ...] = ("orthogonal", "Kaiming")
    seeds: tuple[int, ...] = (0, 1, 2)
    seeds_float32: tuple[int, ...] = (0, 1)
    rank: int = 8
    steps: int = 500
    batch_size: int = 16
    length: int = 24
    decades: tuple[float, ...] = (-1.0, -0.5, 0.0, 0.5, 1.0)
    rate_steps: int = 200
    rate_seed: int = 100
    limit: int = 1_000_000

    def __post_init__(self) -> None:
        for name, allowed in (("optimizers", OPTIMIZERS), ("mixers", MIXERS), ("trained", self.mixers)):
            if unknown := set(getattr(self, name)) - set(allowed):
                raise ValueError(f"{name} must be among {list(allowed)}, not {sorted(unknown)}")


QUICK = Settings("docstrings", ("SGD", "Adam"), ("orthogonal",), ("orthogonal",), (0,), (), rank=4, steps=2, batch_size=2,
                 length=8, decades=(0.0, 0.5), rate_steps=2, limit=16)


def cells(settings: Settings) -> list[dict]:
    """The choice of the rates, then one cell a precision and seed."""
    choice = {"part": "rates", "precision": "float32", "seed": settings.rate_seed}
    return [choice, *({"part": "runs", "precision": precision, "seed": seed}
                      for precision, seeds in (("float64", settings.seeds), ("float32", settings.seeds_float32)) for seed in seeds)]


def data(settings: Settings) -> dict[str, str]:
    return {settings.task: fingerprint(settings.task)}


def measure(cell: dict, settings: Settings, device: str) -> list[dict]:
    """Of the choice: optimizer, rate, loss, chosen. Of the runs a row for each pair and checkpoint:

    optimizer, rate, mixer; kind, "fixed" or "trained" (compared with the merged run) or "control" (with the fixed one);
    predicted, whether both should be equal; step; distance; size, ‖ΔW‖; loss, the run's mean over the steps since the last
    checkpoint (before their updates); loss_gap, its largest difference from the other's in them; at the end clipped, the share
    of steps or entries that were, and on the validation set score, other_score, and how many of examples the two predict
    differently, differ. The head alone has a row of loss and score.
    """
    if cell["part"] == "rates":
        return [dict(row) for row in tried(settings, device)]
    return compared(settings, getattr(torch, cell["precision"]), cell["seed"], device)


# ---------------------------------------------------------------------------------------------------------------------
# The analysis: from the record, DataFrame in, DataFrame out

PAIR = ["precision", "optimizer", "mixer", "kind"]


def rates(table: pd.DataFrame) -> pd.DataFrame:
    """Each optimizer's grid: rate, loss, chosen, and whether the chosen one is at an end."""
    grid = table[table["part"] == "rates"][["optimizer", "rate", "loss", "chosen"]].reset_index(drop=True)
    ends = grid.groupby("optimizer")["rate"].transform(lambda rate: (rate == rate.min()) | (rate == rate.max()))
    return grid.astype({"chosen": bool}).assign(at_edge=lambda grid: grid["chosen"] & ends)


def curves(table: pd.DataFrame) -> pd.DataFrame:
    """The distance by precision, optimizer, mixer, kind (controls too) and step: median, least and largest of the seeds."""
    return pairs(table).groupby([*PAIR, "step"], sort=False)["distance"].agg(["median", "min", "max"]).reset_index()


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """Each pair's verdict beside the theorem's prediction, by the rule that was fixed before.

    Returns:
        precision, optimizer, mixer, kind; predicted and verdict, "equal to rounding" or "apart" (the verdict may also be
        "between" or "stopped"); as_predicted; largest, of distance over control; parted, the first checkpoint by which every
        seed has been more than `APART` times the control apart; and the median distance at the steps `SHOWN`.
    """
    rows = pairs(table)
    least = rows["precision"].map({name: torch.finfo(getattr(torch, name)).eps for name in rows["precision"].unique()})
    control = rows[rows["kind"] == CONTROL].groupby(["precision", "optimizer", "mixer", "step"])["distance"].max()
    control = control.groupby(level=[0, 1, 2]).cummax()  # up to that step
    rows = rows.assign(times=rows["distance"] / np.maximum(_looked_up(control, rows), least))
    found = []
    for names, runs in rows[rows["kind"] != CONTROL].groupby(PAIR, sort=False):
        times = runs.pivot(index="step", columns="seed", values="times")  # (steps, seeds)
        parted = (times.cummax() > APART).all(axis=1)  # (steps,)
        verdict = ("stopped" if not np.isfinite(times).all(axis=None) else "apart" if parted.any() else
                   "equal to rounding" if times.max(axis=None) <= EQUAL else "between")
        predicted = "equal to rounding" if runs["predicted"].iloc[0] else "apart"
        at = runs.groupby("step")["distance"].median()
        found.append({**dict(zip(PAIR, names)), "predicted": predicted, "verdict": verdict, "as_predicted": verdict == predicted,
                      "largest": times.max(axis=None), "parted": parted.idxmax() if parted.any() else None,
                      **{f"step {step}": at.get(step, np.nan) for step in SHOWN}})
    return pd.DataFrame(found).astype({"parted": "Int64"})


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """How fast rounding grows: log10 of the distance against the step, of pairs that should be equal and of their controls.

    A straight line by least squares through the checkpoints of `GROWING`, of each seed; NaN where fewer than four remain.

    Returns:
        precision, optimizer, mixer, kind; decades per 100 steps, the mean over seeds, and least, largest; difference, from the
        control's mean; end, the median distance at the last step; highest, the largest at any checkpoint.
    """
    rows, found = pairs(table), []
    for names, runs in rows[rows["predicted"].astype(bool)].groupby(PAIR, sort=False):
        slopes = np.array([_slope(run) for _, run in runs.groupby("seed")])  # (seeds,)
        found.append({**dict(zip(PAIR, names)), "decades": slopes.mean(), "least": slopes.min(), "largest": slopes.max(),
                      "end": runs[runs["step"] == runs["step"].max()]["distance"].median(), "highest": runs["distance"].max()})
    found = pd.DataFrame(found)
    return found.assign(difference=found["decades"] - _of_control(found, "decades"))


def _slope(run: pd.DataFrame) -> float:
    first, below = GROWING
    run = run[(run["step"] >= first) & (run["distance"] < below) & (run["distance"] > 0)]
    return float(np.polyfit(run["step"] / 100, np.log10(run["distance"]), 1)[0]) if len(run) >= 4 else np.nan


def learning(table: pd.DataFrame) -> pd.DataFrame:
    """Do the runs train? Means over seeds of precision, optimizer, mixer and kind, "fixed" or "trained".

    Returns:
        first_loss (before any step), loss over the last stretch, score, other_score (merged), head_alone, clipped; and learns:
        in every seed the loss fell, and both runs score above the head alone.
    """
    rows = pairs(table)
    keys = ["seed", *PAIR]
    first, last = (rows[rows["step"] == step].set_index(keys) for step in (rows["step"].min(), rows["step"].max()))
    last = last[["loss", "score", "other_score", "clipped"]].astype(float).assign(first_loss=first["loss"]).reset_index()
    alone = table[table["kind"] == HEAD].set_index(["precision", "seed"])["score"].astype(float)
    last["head_alone"] = _looked_up(alone, last)
    last["learns"] = (last["loss"] < last["first_loss"]) & (last[["score", "other_score"]].min(axis=1) > last["head_alone"])
    groups = last[last["kind"] != CONTROL].groupby(PAIR, sort=False)
    means = groups[["first_loss", "loss", "score", "other_score", "head_alone", "clipped"]].mean()
    return means.assign(learns=groups["learns"].all()).reset_index()


def ends(table: pd.DataFrame) -> pd.DataFrame:
    """What two runs predict in the end: of each pair, controls too, score and other_score, how many of the validation
    examples are predicted differently (differ: mean, least, largest of the seeds), and the same of its control (control).
    """
    rows = pairs(table)
    rows = rows[rows["step"] == rows["step"].max()].astype(dict.fromkeys(("score", "other_score", "differ"), float))
    groups = rows.groupby(PAIR, sort=False)
    found = groups[["score", "other_score", "differ"]].mean().assign(
        least=groups["differ"].min(), largest=groups["differ"].max(), examples=groups["examples"].first().astype(int),
        predicted=groups["predicted"].first()).reset_index()
    return found.assign(control=_of_control(found, "differ"))


def hypotheses(table: pd.DataFrame) -> pd.DataFrame:
    """What became of each: how many pairs do as it says (as_said), of how many, and whether all do (holds)."""
    found, exponents, last = verdicts(table), growth(table), ends(table)
    of = {name: found["precision"] == name for name in ("float64", "float32")}
    parting = found[of["float64"] & (found["verdict"] == "apart")]
    at_once = (parting["kind"] == TRAINED) & parting["optimizer"].isin(DECAYING)
    exponents = exponents[(exponents["precision"] == "float64") & (exponents["kind"] == FIXED)]
    last = last[(last["precision"] == "float32") & (last["kind"] == FIXED) & last["predicted"].astype(bool)]
    rows = {"1, the theorem": found[of["float64"]]["as_predicted"],
            "2, when they part": parting["parted"] == np.where(at_once, 1, 2),
            "3, growth like the control's": exponents["difference"].abs() <= ALIKE,
            "4, verdicts in float32": found[of["float32"]]["as_predicted"],
            "4, predictions in float32": last["differ"] - last["control"] <= SHARE * last["examples"]}
    return pd.DataFrame([{"hypothesis": name, "as_said": int(each.sum()), "of": len(each),
                          "holds": bool(each.all()) if len(each) else None} for name, each in rows.items()])


def pairs(table: pd.DataFrame) -> pd.DataFrame:
    """The rows that compare two runs."""
    return table[table["kind"].isin((FIXED, TRAINED, CONTROL))]


def _of_control(found: pd.DataFrame, column: str) -> np.ndarray:
    """What the control of each row's optimizer and mixer has in a column, `(rows,)`."""
    return _looked_up(found[found["kind"] == CONTROL].set_index(["precision", "optimizer", "mixer"])[column], found)


def _looked_up(values: pd.Series, rows: pd.DataFrame) -> np.ndarray:
    """`values` by their index, for each row, `(rows,)`."""
    return values.reindex(pd.MultiIndex.from_frame(rows[list(values.index.names)])).to_numpy(float)

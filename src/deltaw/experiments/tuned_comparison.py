"""With every learning rate tuned on the same budget, what is left between the variants?

Six tasks: MiniLM (22.6 M) on CoLA, SST-2, TREC and SUBJ; a small network on digits turned by 90°; a decoder of 46.9 M
parameters, trained on Python, on C++ and CUDA headers (`deltaw.tasks.code_lm`). Adapters are on every linear layer but
the head. A classifier's head is new and trained in full at a rate that is the same for all rows, whatever their factors
want (0.005; 0.01 on the digits: between LoRA's and VeRA's best in `vera_budget`, where the head shares the factors'
rate), but for "head only", where it is tuned; the decoder's is not trained, but in "head only", where the output matrix
is all that is. "full" trains every entry of the adapted layers' weights. AdamW without weight decay, dropout or clipping;
the rate rises over 5 % of the updates, then falls linearly to zero. What is trained and its scale are in each row's
`parameters` and `scale`. MoSLoRA's mixer is Kaiming where it is trained, as in the authors' code; LoRA+ has B's rate 16
times A's; VeRA's A and B are drawn anew for each seed. PiSSA and LoRA-XS draw nothing: their seeds are those of head and
order.

Ranks: 8, but LoRA-XS 16 and VeRA 256. rsLoRA at one rank is LoRA of another scale, so that it is compared with LoRA over
ranks: α = 8 in both, s = α/√r and α/r, at ranks 4, 16, 64 and 256 on code, and at 16 on every task.

Fixed before the run:

- *Tuning.* By `engine.tuning`: for every row seven rates, half a decade apart, from 1e-4 to 1e-1; then five a factor √2
  apart around its best; either goes on beyond an end that is best. Three seeds, measured on a part of the training side
  that is not trained on. A row whose rate is still at the edge is "not tuned" and gets no verdict.
- *Report.* Ten fresh seeds at the chosen rate, on the validation set. Start aside, a seed is the same head and order for
  all.
- *Measure.* Matthews' correlation on CoLA, accuracy on the other classifiers, nats a token on code.
- *Primary endpoint.* Code: each main row (all but those over ranks) − LoRA, one family. The loss of 40,960 tokens resolves
  what a thousand labels do not. Secondary: the same family on each other task, all pairs of main rows, rsLoRA − LoRA over
  the ranks.
- *Intervals.* Over seeds and examples (`two_level`; blocks of neighbouring windows for code): these decide. Beside them
  those over seeds, given the examples (`verdicts`). Simultaneous by max-t, tests by Holm, each within its family.
- *Verdicts.* "equivalent" if two one-sided tests put the difference within `MARGIN`; else "better" or "worse" if separated;
  else "not separable".
- *Headroom.* full − head only. Where the interval does not lie beyond twice `MARGIN`, the task "cannot rank".
- *Hypotheses.* (1) On code Init[B], PiSSA, LoRA+, DoRA and the MoSLoRAs are equivalent to LoRA: the tuned re-evaluations
  (arXiv 2602.04998) say within 1 – 2 %. Any that is separated by more than `MARGIN` counts against it. (2) VeRA, DVoRA and
  LoRA-XS, with a sixth of the numbers and less, are worse than LoRA on code, full is better, head only the worst. (3) The
  text tasks do not separate the variants of LoRA over seeds and examples. (4) rsLoRA's best rate varies less with the rank
  than LoRA's, whose rises; tuned, they are equivalent up to rank 64.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ..adapters import DoRA, LoRA, LoRAXS, MoSLoRA, Spec, VeRA, inits, lora_xs
from ..statistics import power
from .engine import two_level, verdicts
from .engine.ends import FullLinear, HeadOnly
from .engine.sensitivity import costs
from .engine.starts import Once
from .engine.subjects import hashes
from .engine.trained import PADDED, tuned
from .engine.tuning import SMALL_CODE, Budgets, Row, measure_of

MARGIN = 0.01  # of a difference that does not matter: one point of accuracy or correlation, or 0.01 nats
LORA, HEAD, FULL = "LoRA", "head only", "full"
SCALINGS = {LORA: ("standard", 1), "rsLoRA": ("rslora", 0.5)}  # and s = α / rank to this power
PISSA, SVD = Once(inits.pissa), Once(lora_xs.svd)
CODE = "code_lm"


@dataclass(frozen=True)
class Tuned(Budgets):
    """What every row gets, here and in `tuned_further`: `Budgets`' fields, and

    The runs are short, so that every row can have the same number of them within half an hour of one GPU: 200 updates of 32
    sentences, cut at 32 tokens (39 % of SUBJ's training sentences reach that, 6 % of SST-2's, hardly any of the others'),
    300 of 32 digits, 125 of 8 × 256 tokens of code.

    Attributes:
        rank: of LoRA and what is made of it, also its α.
    """

    steps: int = 200
    warmup_steps: int = 10
    code_steps: int = 125
    code_warmup_steps: int = 6
    code_batch_size: int = 8
    code_windows: int = 160
    rank: int = 8


@dataclass(frozen=True)
class Settings(Tuned):
    """What is run: `Tuned`'s fields, and

    Attributes:
        tasks: names, as `subjects.subject` knows them.
        xs, vera: LoRA-XS's rank and VeRA's.
        d_init: VeRA's.
        ratio: LoRA+'s.
        head_rate, digits_head_rate: of a new head, beside factors of any rate.
        everywhere: the rank of LoRA and rsLoRA on all tasks; ranks: on `code_lm`, with it.
    """

    tasks: tuple[str, ...] = (CODE, "cola", "sst2", "trec", "subj", "digits")
    xs: int = 16
    vera: int = 256
    d_init: float = 0.1
    ratio: float = 16.0
    head_rate: float = 5e-3
    digits_head_rate: float = 1e-2
    everywhere: int = 16
    ranks: tuple[int, ...] = (4, 16, 64, 256)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.everywhere not in self.ranks:
            raise ValueError(f"everywhere must be one of ranks={self.ranks}, not {self.everywhere!r}")


QUICK = Settings(
    coarse=(1e-3, 1e-2), fine=1, further=0, tune_seeds=(100,), report_seeds=(0, 1), digits_steps=4, digits_warmup_steps=1,
    code_coarse=(1e-3, 1e-2), code_steps=2, code_warmup_steps=1, code_batch_size=2, **SMALL_CODE, tasks=("digits", CODE),
    rank=2, xs=2, vera=8, everywhere=4, ranks=(2, 4))


def groups(settings: Settings) -> dict[str, list[Row]]:
    """Rows that are tuned in one cell, because they go through a model together."""
    s = settings

    def row(name: str, spec: Spec, scale: str = f"s = 1 (α = {s.rank})", **recipe: float) -> Row:
        return Row(name, lambda seed: spec, scale, recipe)

    def vera(seed: int) -> VeRA:
        return VeRA(s.vera, s.d_init, projection_seed=seed)

    d = f"d = {s.d_init:g} at the start"
    found = {
        HEAD: [row(HEAD, HeadOnly(), "ΔW = 0")],
        "factors": [
            row(LORA, LoRA(s.rank)), row("Init[B]", LoRA(s.rank, init="B")), row("PiSSA", LoRA(s.rank, init=PISSA)),
            row("LoRA+", LoRA(s.rank), lora_plus_ratio=s.ratio), row("MoSLoRA, trained", MoSLoRA(s.rank)),
            row("MoSLoRA, orthogonal", MoSLoRA(s.rank, mixer="orthogonal", train_mixer=False)),
            row("LoRA-XS", LoRAXS(s.xs, init=SVD), f"s = 1 (α = {s.xs})")],
        "magnitudes": [row("DoRA", DoRA(LoRA(s.rank))), row("DoRA(MoSLoRA)", DoRA(MoSLoRA(s.rank)))],
        "vectors": [Row("VeRA", vera, d), Row("DVoRA", lambda seed: DoRA(vera(seed)), d)],
        FULL: [row(FULL, FullLinear(), "every entry of ΔW")],
    }
    for rank in s.ranks:
        group = f"ranks to {next((most for most in PADDED if rank <= most), rank)}"
        found.setdefault(group, []).extend(of_rank(name, rank, s.rank) for name in SCALINGS)
    return found


def of_rank(name: str, rank: int, alpha: int) -> Row:
    """LoRA or rsLoRA, there for its rank."""
    how, power = SCALINGS[name]
    spec = LoRA(rank, alpha, scaling=how)
    return Row(f"{name} {rank}", lambda seed: spec, f"s = {alpha / rank**power:.4g} (α = {alpha})")


def rows(task: str, group: str, settings: Settings) -> list[Row]:
    """A cell's."""
    known = groups(settings)
    if task == CODE:
        return known[group]
    rate = settings.digits_head_rate if task == "digits" else settings.head_rate

    def beside_a_head(rows: list[Row]) -> list[Row]:
        return [replace(row, recipe={**row.recipe, "head_learning_rate": rate}) for row in rows]

    if group != "factors":
        return beside_a_head(known[group])
    ranks = [row for own in known.values() for row in own if rank_of(row.name) == settings.everywhere]
    return known[HEAD] + beside_a_head(known[group] + ranks)  # what is trained beside every row goes with them, alone


def rank_of(row: str) -> int | None:
    """The rank of a row that is there for its rank."""
    last = row.split()[-1]
    return int(last) if last.isdigit() else None


def cells(settings: Settings) -> list[dict]:
    """A cell is a task and a group of rows, each tuned without a look at the others. Those of `code_lm` come one after
    the other, because its base is trained once in a process. Its head alone, which is no new one, is a group of its own,
    and so are ranks."""
    return [{"task": task, "group": group} for task in settings.tasks for group in groups(settings)
            if task == CODE or group != HEAD and not group.startswith("ranks")]


def data(settings: Settings) -> dict[str, str]:
    return hashes(settings.tasks, settings)


def measure(cell: dict, settings: Settings, device: str) -> list[dict]:
    """A row for each run: phase, rate, seed, what was trained, and what it measures on the sets."""
    head = ("lm_head",) if cell["group"] == HEAD else None
    return tuned(rows(cell["task"], cell["group"], settings), cell["task"], settings, device, head=head)


# ---------------------------------------------------------------------------------------------------------------------
# The analysis: from the record, DataFrame in, DataFrame out


def main_rows(table: pd.DataFrame) -> list[str]:
    """The rows that are compared with each other: all but those of the sweep over ranks."""
    return [row for row in table["row"].unique() if rank_of(row) is None]


def reported(table: pd.DataFrame) -> pd.DataFrame:
    """Of each task and row: what it trains, the chosen rate, and the measure on "report" with both half-widths.

    Columns: those of `verdicts.reported` (low, high and half_width are over seeds), parameters, with_head, and
    half_width_all, over seeds and examples.
    """
    found = []
    for _, runs in table.groupby("task", sort=False):
        counts = runs.groupby("row", sort=False)[["parameters", "with_head"]].first().reset_index()
        both = two_level.half_widths(two_level.resampled(runs))[["row", "half_width_all"]]
        found.append(verdicts.reported(runs).merge(counts, on="row").merge(both, on="row", how="left"))
    return pd.concat(found, ignore_index=True)


def resolution(table: pd.DataFrame) -> pd.DataFrame:
    """Of each task the median and the largest half-width of its rows, and how many rows are at an edge or were stopped."""
    tasks = reported(table).groupby("task", sort=False)
    return tasks.agg(rows=("row", "size"), over_seeds=("half_width", "median"), most_over_seeds=("half_width", "max"),
                     over_both=("half_width_all", "median"), most_over_both=("half_width_all", "max"),
                     at_edge=("at_edge", "sum"), stopped=("stopped", "sum")).reset_index()


def headroom(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Of each task: full − head only as a gain, with its interval over seeds and examples, and whether the task can rank."""
    found = two_level.between(table, [(FULL, HEAD)], margin)
    sign = np.where(found["task"].map(measure_of) == "loss", -1, 1)
    ends = np.sort(found[["low", "high"]].mul(sign, axis=0), axis=1)  # (tasks, 2)
    gains = pd.DataFrame({"task": found["task"], "gain": sign * found["difference"], "low": ends[:, 0], "high": ends[:, 1]})
    return gains.assign(can_rank=gains["low"] > 2 * margin)


def against_lora(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Each main row − LoRA, a family in each task: see `judged`. On `code_lm` it is the primary endpoint."""
    return judged(table, [(row, LORA) for row in main_rows(table) if row != LORA], margin)


def every_pair(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """The same for every pair of main rows, all of a task one family."""
    names = main_rows(table)
    return judged(table, [(a, b) for i, a in enumerate(names) for b in names[:i]], margin)


def judged(table: pd.DataFrame, pairs: list[tuple[str, str]], margin: float = MARGIN) -> pd.DataFrame:
    """The pairs' differences in each task, over seeds and examples, with the verdicts of this file's docstring.

    Columns: task, those of `verdicts.compare`, low_seeds and high_seeds (over seeds, given the examples). Verdicts are
    "stopped", "not tuned" and "cannot rank", in this order, before what the intervals say.
    """
    found = two_level.between(table, pairs, margin)
    seeds = verdicts.between(table, pairs, margin)[["task", "row", "reference", "low", "high"]]
    found = found.merge(seeds, on=["task", "row", "reference"], suffixes=("", "_seeds"))
    rank = headroom(table, margin).set_index("task")["can_rank"]
    edges = {(task, row) for task, runs in table.groupby("task", sort=False)
             for row, rate in verdicts.rates(runs).items() if verdicts.at_edge(runs, row, rate)}
    at_edge = [bool({(task, row), (task, other)} & edges)
               for task, row, other in found[["task", "row", "reference"]].itertuples(index=False)]
    verdict = np.select([found["verdict"] == "stopped", at_edge, ~found["task"].map(rank).astype(bool)],
                        ["stopped", "not tuned", "cannot rank"], found["verdict"])
    return found.assign(verdict=verdict)


def by_rank(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """rsLoRA − LoRA at each rank, those of a task one family: `judged`'s columns, rank, and the two rates."""
    ranks = sorted({rank_of(row) for row in table["row"].unique()} - {None})
    found = judged(table, [(f"rsLoRA {rank}", f"{LORA} {rank}") for rank in ranks], margin)
    rate = {(task, row): each for task, runs in table.groupby("task") for row, each in verdicts.rates(runs).items()}
    chosen = {column: [rate[key] for key in zip(found["task"], found[name])]
              for column, name in (("rate", "row"), ("rate_reference", "reference"))}
    return found.assign(rank=found["row"].map(rank_of), **chosen)


def rate_powers(table: pd.DataFrame, rank: int = 8) -> pd.DataFrame:
    """The power of the rank with which the chosen rate grows, where there are three ranks: task, scaling, ranks, exponent.

    Args:
        table: a record.
        rank: of the row "LoRA", which belongs to LoRA's ranks: its α is theirs.
    """
    found = []
    for task, runs in table.groupby("task", sort=False):
        rates = {(LORA, rank) if row == LORA else (row.split()[0], rank_of(row)): rate
                 for row, rate in verdicts.rates(runs).items()}
        for name in (LORA, "rsLoRA"):
            own = sorted((each, rate) for (scaling, each), rate in rates.items() if scaling == name and each and rate)
            if len(own) > 2:
                x, y = np.array(own).T  # (ranks,), (ranks,)
                found.append({"task": task, "scaling": name, "ranks": len(own), "exponent": float(power(x, y))})
    return pd.DataFrame(found)


def sensitivity(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """What a rate that is off costs, and how far it may be off: see `deltaw.experiments.engine.sensitivity.costs`."""
    return costs(table, margin)

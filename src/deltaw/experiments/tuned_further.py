"""Where do the ranks, scales and mixers stand that readers of `tuned_comparison` asked for, tuned alike on code?

All is as in `tuned_comparison` on `code_lm`, whose record on code was known: base, corpus, recipe, budget, seeds. The rows:

- LoRA of ranks 1 and 2, DoRA of rank 16: α = 8 and s = α/r, as LoRA has it there at its other ranks, so s = 8, 4 and 0.5;
  rsLoRA of rank 8, s = 8/√8.
- MoSLoRA from an orthogonal mixer, trained; and *evened*: a fixed Kaiming mixer UΣVᵀ with all singular values alike, UVᵀ/√3,
  of the same mean square. That is s = 1/√3 before an orthogonal mixer Q: s·B·Q and B·(Q/√3) are one function of A and B. Q is
  uniformly distributed, which the UVᵀ of a Gaussian mixer is, and that of a uniformly drawn one nearly.
- Init[B] whose B has the variance 1/(3·out), A's of the transposed layer, in place of 1/(3·r): "1/n" in `init_width`. A seed
  draws the numbers that it draws for Init[B], √(r/out) times as large.
- LoRA and DoRA of rank 8 once more: `bridge` says how far their runs are from those of the main record. Rounding apart (other
  banks, for DoRA of another width) they are the same, so that rows of the two records can be compared. If a mean differs by
  more than a quarter of `MARGIN`, what is said of rows from both counts for nothing.
- The frozen base, measured and not tuned: phase "base". Its rate and seed are 0.

Fixed before the run. Intervals (over seeds and examples), `MARGIN` and verdicts are those of `tuned_comparison`; two families:
the new rows − LoRA (`against_lora`), and `wanted`'s pairs with rows of the main record (`pairs`). Expected:

1. LoRA 1 is better than DVoRA with fewer numbers, 118,272 for 150,528: from 2.431, 2.398 and 2.373 at ranks 4, 8 and 16 one
   expects 2.50 to 2.54, and DVoRA has 2.577. Any other verdict counts against it.
2. DoRA 16 is better than LoRA 16, by about DoRA's lead over LoRA, 0.016: `lead_by_rank` is "equivalent". Against it: a verdict
   on the pair other than "better"; or leads that are separated by more than `MARGIN`, which a lead that stems from what only a
   small rank lacks would show.
3. rsLoRA 8, LoRA of 2.8 times the scale, is equivalent to LoRA, as at ranks 4 and 16. Against it: separated beyond `MARGIN`.
4. The trained orthogonal mixer is equivalent to LoRA (in `mixers` it was 0.003 ahead), and better than the trained Kaiming one,
   which was 0.028 behind LoRA: the start does it, not training. Against it: it is worse than LoRA.
5. The evened mixer is equivalent to LoRA, being LoRA with another ratio of two rates, 1/√3. Kaiming mixers were not, trained
   here and either way in `mixers`. If the evened one is worse as well, chapter 6's account (uneven singular values, not size)
   fails on this task. It was tested on a matrix so far.
6. Init[B], 1/n, is between the two: better than Init[B] (0.110 behind LoRA), worse than LoRA. Were it equivalent to LoRA,
   the variance would be all, as in `init_width`; were it not better than Init[B], the variance would be nothing.
"""

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import pandas as pd
from torch import Generator, Tensor

from ..adapters import DoRA, Layer, LoRA, MoSLoRA, inits
from . import tuned_comparison as main_record
from .engine import two_level, verdicts
from .engine.ends import HeadOnly
from .engine.subjects import hashes, subject
from .engine.trained import banked, recipe, summary, tuned
from .engine.tuning import TUNING, Row
from .tuned_comparison import CODE, LORA, MARGIN, Tuned, of_rank, rank_of

BASE = "frozen base"
OVER_N, TRAINED, EVENED = "Init[B], 1/n", "MoSLoRA, orthogonal, trained", "MoSLoRA, evened"
AGAIN = (LORA, "DoRA")  # rows of the main record


@dataclass(frozen=True)
class Settings(Tuned):
    """What is run: the fields of `tuned_comparison.Tuned`, and

    Attributes:
        few: LoRA's ranks.
        higher: DoRA's, one of the main record's for LoRA.
    """

    few: tuple[int, ...] = (1, 2)
    higher: int = 16


QUICK = Settings(**{each.name: getattr(main_record.QUICK, each.name) for each in fields(Tuned)}, few=(1,), higher=4)


def init_b_over_n(layer: Layer, rank: int, scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Init[B], but B of variance 1 / (3 out): A zero `(rank, in)`, B `(out, rank)`."""
    a, b = inits.init_b(layer, rank, scale, generator)
    return a, math.sqrt(rank / layer.out_features) * b


def groups(settings: Settings) -> dict[str, list[Row]]:
    """Rows that are tuned in one cell, because they go through a model together."""
    r, one = settings.rank, f"s = 1 (α = {settings.rank})"
    half, even = DoRA(LoRA(settings.higher, r)), MoSLoRA(r, r / math.sqrt(3), mixer="orthogonal", train_mixer=False)
    return {
        "factors": [
            Row(LORA, lambda seed: LoRA(r), one), *(of_rank(LORA, few, r) for few in settings.few), of_rank("rsLoRA", r, r),
            Row(OVER_N, lambda seed: LoRA(r, init=init_b_over_n), one),
            Row(TRAINED, lambda seed: MoSLoRA(r, mixer="orthogonal"), one),
            Row(EVENED, lambda seed: even, f"s = 1/√3 (α = {r}/√3)")],
        "magnitudes": [
            Row("DoRA", lambda seed: DoRA(LoRA(r)), one),
            Row(f"DoRA {settings.higher}", lambda seed: half, f"s = {r / settings.higher:.4g} (α = {r})")],
    }


def cells(settings: Settings) -> list[dict]:
    """The base as it is, then the groups of rows."""
    return [{"task": CODE, "group": group} for group in ("base", *groups(settings))]


def data(settings: Settings) -> dict[str, str]:
    return hashes((CODE,), settings)


def measure(cell: dict, settings: Settings, device: str) -> list[dict]:
    """A row for each run, as in `tuned_comparison`; of the base one row."""
    if cell["group"] == "base":
        return [frozen(settings, device)]
    return tuned(groups(settings)[cell["group"]], CODE, settings, device)


def frozen(settings: Settings, device: str) -> dict:
    """The base's row, measured as all runs are, in a bank: of ΔW = 0, after an update by which nothing moves."""
    what = subject(CODE, settings, device)
    row = Row(BASE, lambda seed: HeadOnly(), "ΔW = 0")
    slot = HeadOnly(), recipe(replace(what.budget, steps=1, warmup_steps=0), row, what.budget.coarse[0], 0)
    history, = banked(what.task.model(), [slot], [[0]], what.task, device)
    return {"row": BASE, "phase": "base", "rate": 0.0, "seed": 0, "scale": row.scale, "parameters": 0, "with_head": 0,
            **summary(history, examples=True)}


# ---------------------------------------------------------------------------------------------------------------------
# The analysis: from this record and the main one, DataFrame in, DataFrame out


def adapted(table: pd.DataFrame) -> pd.DataFrame:
    """Without the base."""
    return table[table["phase"] != "base"]


def joined(table: pd.DataFrame, main: pd.DataFrame) -> pd.DataFrame:
    """The adapted rows, and those that the main record alone has on code.

    Raises:
        ValueError: if the two were made with other data or another budget.
    """
    ours, theirs = (each.attrs.get("manifest", {}) for each in (table, main))
    for part in ("data", "settings"):
        one, other = ours.get(part, {}), theirs.get(part, {})
        if differing := sorted(key for key in one.keys() & other.keys() if one[key] != other[key]):
            raise ValueError(f"the records cannot be compared: of their {part} {', '.join(differing)} differ")
    rest = main[(main["task"] == CODE) & ~main["row"].isin(table["row"])]
    return pd.concat([adapted(table), rest], ignore_index=True)


def reported(table: pd.DataFrame) -> pd.DataFrame:
    """Of each row: see `tuned_comparison.reported`."""
    return main_record.reported(adapted(table))


def base_loss(table: pd.DataFrame) -> pd.DataFrame:
    """The base's losses, one row: tune, report, python; and half_width, of "report" over its blocks."""
    base, = table[table["phase"] == "base"].to_dict("records")
    low, _, high = verdicts.student(np.array(base["report/blocks"].split(), float))
    return pd.DataFrame([{name: base[f"{name}/loss"] for name in ("tune", "report", "python")} | {"half_width": (high - low) / 2}])


def against_lora(table: pd.DataFrame, main: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Each new row − LoRA, one family: `tuned_comparison.judged`. Whether the task can rank, the main record says."""
    new = [row for row in adapted(table)["row"].unique() if row not in AGAIN]
    return main_record.judged(joined(table, main), [(row, LORA) for row in new], margin)


def pairs(table: pd.DataFrame, main: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """`wanted`'s differences, one family."""
    return main_record.judged(joined(table, main), wanted(table), margin)


def wanted(table: pd.DataFrame) -> list[tuple[str, str]]:
    """New rows, each with a row of the main record that it is to be held against."""
    few, higher = f"{LORA} {min(_ranks(table, LORA))}", max(_ranks(table, "DoRA"))
    return [(few, "DVoRA"), (f"DoRA {higher}", f"{LORA} {higher}"), (f"DoRA {higher}", f"rsLoRA {higher}"),
            (TRAINED, "MoSLoRA, orthogonal"), (TRAINED, "MoSLoRA, trained"), (EVENED, "MoSLoRA, orthogonal"),
            (EVENED, "MoSLoRA, trained"), (OVER_N, "Init[B]")]


def lead_by_rank(table: pd.DataFrame, main: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """DoRA − LoRA at the higher rank, less the same at LoRA's usual one: `verdicts.compare`'s columns, a family of one."""
    higher = max(_ranks(table, "DoRA"))
    signs = {f"DoRA {higher}": 1.0, f"{LORA} {higher}": -1.0, "DoRA": -1.0, LORA: 1.0}
    found = two_level.resampled(joined(table, main))
    of = two_level.precision(found, np.array([[signs.get(row, 0.0)] for row in found.rows]))
    return verdicts.judge([(f"DoRA {higher} − {LORA} {higher}", f"DoRA − {LORA}")], of.value, of.error, of.freedom,
                          of.reach_all, margin, less_is_better=True)


def bridge(table: pd.DataFrame, main: pd.DataFrame) -> pd.DataFrame:
    """How far the rows that both records have are apart.

    Columns: row; rate and rate_main, as chosen; report and report_main, the means; and over the runs that both made at the
    main record's rate the largest |difference| of a loss: tune_apart and report_apart (NaN if the choices differ).
    """
    tables = adapted(table), main[main["task"] == CODE]
    rates, rates_main = (verdicts.rates(runs) for runs in tables)
    means, means_main = (verdicts.by_seed(runs, "report/loss").mean() for runs in tables)
    both = tables[0].merge(tables[1], on=["row", "rate", "seed"], suffixes=("", "_main"))
    rows = []
    for row in AGAIN:
        runs = both[(both["row"] == row) & (both["rate"] == rates_main[row])]
        tuning = runs["phase"].isin(TUNING)
        apart = {f"{name}_apart": (part[f"{name}/loss"] - part[f"{name}/loss_main"]).abs().max()
                 for name, part in (("tune", runs[tuning]), ("report", runs[~tuning]))}
        rows.append({"row": row, "rate": rates[row], "rate_main": rates_main[row], "report": means[row],
                     "report_main": means_main[row], **apart})
    return pd.DataFrame(rows)


def _ranks(table: pd.DataFrame, name: str) -> list[int]:
    """Of the rows called so and a rank."""
    return [rank_of(row) for row in table["row"].unique() if row.rpartition(" ")[0] == name and rank_of(row) is not None]

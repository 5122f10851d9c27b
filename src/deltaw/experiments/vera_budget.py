"""What does a trained parameter buy: LoRA of small rank, or VeRA of large rank, each at its best learning rate?

MiniLM (22.6 M) classifies the sentences of CoLA (why CoLA: see `mixers`). LoRA of rank 1 to 16, s = 1, and VeRA of rank 64
to 1024, d = 0.1 at the start, on all 36 linear layers of the encoder; the head is trained in full, at the same rate. Beside
them the head alone. AdamW without weight decay, dropout or clipping. VeRA's A and B are drawn anew for each seed, so that an
interval does not speak of one draw only. A run's budget and the choice of a rate: `deltaw.experiments.engine.tuning`; coarse rates
half a decade apart from 1e-4 to 1e-1, and five a factor √2 apart around each row's best.

Fixed before the run:

- *Measure.* Matthews' correlation on the validation set, ten fresh seeds; secondary, the validation loss.
- *Parameters.* Trained numbers without the head and with it.
- *Hypotheses.* VeRA's: at a tenth of the parameters it is as good as LoRA. Ours: it needs a larger rate; more rank costs it
  hardly any parameters and buys less with every doubling.
- *Primary endpoint.* VeRA − LoRA at about the same count: LoRA of the smallest rank (41,472 without the head), and VeRA of
  the largest rank that has no more (512: 39,168; see `nearest`). Secondary: every VeRA against every LoRA (`pairs`), as one
  family.
- *Headroom.* Best row − head only. Where no simultaneous interval is above twice `MARGIN`, the rows cannot be ranked.
- *Verdicts.* The rule of `verdicts.compare`, margin one point, over seeds, given the sentences; beside it the same over both
  (`two_level`). A row whose rate is at the edge counts as not tuned.
"""

from dataclasses import dataclass

import pandas as pd

from ..adapters import LoRA, VeRA
from .engine import two_level, verdicts
from .engine.ends import HeadOnly
from .engine.subjects import hashes
from .engine.trained import tuned
from .engine.tuning import Budget, Row

MARGIN = 0.01  # of a difference that does not matter, in Matthews' correlation or accuracy: one point
HEAD = "head only"


@dataclass(frozen=True)
class Settings(Budget):
    """What is run: `Budget`'s fields, and

    Attributes:
        tasks: names, as `deltaw.tasks.text` knows them.
        lora: LoRA's ranks.
        vera: VeRA's.
        d_init: VeRA's.
    """

    tasks: tuple[str, ...] = ("cola",)
    lora: tuple[int, ...] = (1, 2, 4, 8, 16)
    vera: tuple[int, ...] = (64, 128, 256, 512, 1024)
    d_init: float = 0.1


QUICK = Settings(coarse=(1e-3, 1e-2), fine=3, further=0, tune_seeds=(100,), report_seeds=(0, 1), steps=4, warmup_steps=1,
                 batch_size=4, length=16, limit=24, tasks=("docstrings",), lora=(1, 2), vera=(16,))


def cells(settings: Settings) -> list[dict]:
    """A cell is a task and a family, tuned without a look at the other. The head alone is a family of its own."""
    return [{"task": task, "family": family} for task in settings.tasks for family in ("none", "LoRA", "VeRA")]


def data(settings: Settings) -> dict[str, str]:
    return hashes(settings.tasks, settings)


def rows(family: str, settings: Settings) -> list[Row]:
    """A family's, by rank."""
    if family == "none":
        return [Row(HEAD, lambda seed: HeadOnly(), scale="ΔW = 0")]
    if family == "LoRA":
        return [Row(f"LoRA {rank}", lambda seed, rank=rank: LoRA(rank)) for rank in settings.lora]
    return [Row(f"VeRA {rank}", lambda seed, rank=rank: VeRA(rank, settings.d_init, projection_seed=seed),
                scale=f"d = {settings.d_init:g} at the start") for rank in settings.vera]


def measure(cell: dict, settings: Settings, device: str) -> list[dict]:
    """A row for each run: phase, rate, seed, what was trained, and what it measures on both sets."""
    return tuned(rows(cell["family"], settings), cell["task"], settings, device)


# ---------------------------------------------------------------------------------------------------------------------
# The analysis: from the record, DataFrame in, DataFrame out


def curves(table: pd.DataFrame, part: str = "tune") -> pd.DataFrame:
    """The measure on "tune" (or "report") against the rate: mean, least and largest over the tuning seeds."""
    return verdicts.curves(table, part)


def budget(table: pd.DataFrame) -> pd.DataFrame:
    """Of each task and row: parameters without and with head, chosen rate, at an edge or not, "report" with its interval."""
    counts = table.groupby(["task", "row"], sort=False)[["parameters", "with_head"]].first().reset_index()
    return counts.merge(verdicts.reported(table), on=["task", "row"])


def pairs(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Every VeRA − every LoRA on "report": intervals, tests and the verdict of `verdicts.compare`, and the parameters."""
    found = verdicts.between(table, [(a, b) for a in _named(table, "VeRA") for b in _named(table, "LoRA")], margin)
    counts = table.groupby("row")["parameters"].first()
    return found.assign(parameters=found["row"].map(counts), parameters_reference=found["reference"].map(counts))


def pairs_over_examples(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """`pairs` with intervals over seeds and examples: what other sentences might have shown."""
    return two_level.between(table, [(a, b) for a in _named(table, "VeRA") for b in _named(table, "LoRA")], margin)


def nearest(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """The primary endpoint, a family of one: VeRA − LoRA where their counts are nearest, VeRA's not the larger."""
    counts = table.groupby("row")["parameters"].first()
    lora = min(_named(table, "LoRA"), key=counts.get)
    vera = max((row for row in _named(table, "VeRA") if counts[row] <= counts[lora]), key=counts.get)
    return verdicts.between(table, [(vera, lora)], margin)


def headroom(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Every row − the head alone, and whether the best of them leaves room for a ranking."""
    found = verdicts.against(table, HEAD, margin)
    room = found.groupby("task")["low_all"].max() > 2 * margin
    return found.assign(can_rank=found["task"].map(room))


def _named(table: pd.DataFrame, family: str) -> list[str]:
    return list(table.loc[table["family"] == family, "row"].unique())

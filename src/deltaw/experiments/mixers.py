"""Does a mixer between the factors help, once each has its own learning rate?

On two tasks: MiniLM (22.6 M) classifies the sentences of CoLA, and a decoder of 10.6 M parameters that was trained on
Python learns C++ and CUDA headers (`deltaw.tasks.code_lm`). MoSLoRA of rank 8, ΔW = B M A with s = 1, on all linear layers
of the encoder (36) or decoder (56); a new head is trained in full at the same rate, the decoder's is not. A random
(Kaiming), B zero, and the mixer M the identity, two subspaces, Kaiming (the official code's) or orthogonal, each fixed and
trained; beside LoRA, which has none. AdamW without weight decay, dropout or clipping. A run's budget, the choice of a rate
and what a seed is: `deltaw.experiments.engine.tuning`.

Why CoLA: of the four text tasks of `init_text` (its record was known; its seeds are not used here) it alone has room for
a difference. There LoRA's correlation was 0.19, 0.25, 0.25 and 0.05 at rates 0.0005, 0.001, 0.002 and 0.004, with a
deviation over seeds of 0.006 to 0.009: a rate that is wrong by a factor of 2 shows. TREC went from 0.960 to 0.955. Its
sentences are cut at 32 tokens, which 0.06 % of the training and 0.5 % of the validation sentences exceed. Why code: a loss
over 131,072 tokens resolves differences that no set of a thousand labels does.

Fixed before the run:

- *Rates.* One grid for all, a factor √2 apart, five seeds at each, the curves; extended where an end is best. No fine pass.
- *Report.* Ten fresh seeds at each row's chosen rate, and at LoRA's chosen rate, on the validation set.
- *Measure.* Matthews' correlation and, secondary, the validation loss; of code the validation loss, in nats a token.
- *Primary endpoint.* Fixed orthogonal − LoRA on CoLA, each at its own rate. The appendix says that they are the same run
  under SGD; under Adam they are not. Hypothesis: equivalent, within `MARGIN`. On code the same, as the second endpoint.
- *Confound.* Hypothesis: both Kaiming mixers have a larger best rate than LoRA, by about the 1.4 by which the first |ΔW|
  is smaller under a sign-like update, and at LoRA's rate they do no better than at their own. `confound` has the
  difference, own − LoRA's rate, with the paired interval; of a row whose rate is LoRA's, zero.
- *Two subspaces*, fixed, is LoRA of half the rank at twice the rate: its best rate is smaller than LoRA's.
- *All rows* against LoRA, the rows of one task a family: simultaneous intervals, Holm, equivalence, the rule of
  `verdicts.compare`, over seeds, given the examples. Beside it the same over seeds and examples (`two_level`).
- *Check.* The fixed identity is LoRA, run by run: `identity_gap` is the largest difference of any measure, and zero.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..adapters import LoRA, MoSLoRA
from .engine import two_level, verdicts
from .engine.subjects import hashes
from .engine.trained import tuned
from .engine.tuning import SMALL_CODE, Budgets, Row, measure_of, rounded

MARGIN = 0.01  # of a difference that does not matter: one point of Matthews' correlation or accuracy, or 0.01 nats
LORA = "LoRA"


@dataclass(frozen=True)
class Settings(Budgets):
    """What is run: `Budgets`' fields, and

    Attributes:
        tasks: names, as `subjects.subject` knows them.
        mixers: MoSLoRA's `mixer`.
        rank: of all rows, even.
    """

    coarse: tuple[float, ...] = tuple(rounded(1e-3 * 2 ** (k / 2)) for k in range(-4, 6))
    fine: int = 1
    tune_seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    code_coarse: tuple[float, ...] = tuple(rounded(4e-3 * 2 ** (k / 2)) for k in range(-5, 5))
    code_size: str = "10m"
    tasks: tuple[str, ...] = ("cola", "code_lm")
    mixers: tuple[str, ...] = ("identity", "two-subspace", "kaiming", "orthogonal")
    rank: int = 8


QUICK = Settings(
    coarse=(1e-3, 4e-3), further=0, tune_seeds=(100,), report_seeds=(0, 1), steps=4, warmup_steps=1, batch_size=4, length=16,
    limit=16, code_coarse=(1e-3, 4e-3), code_steps=4, code_warmup_steps=1, code_batch_size=4, **SMALL_CODE,
    tasks=("docstrings", "code_lm"), mixers=("identity", "kaiming"), rank=4)


def cells(settings: Settings) -> list[dict]:
    """A cell is a task: LoRA's rate, which all rows are reported at, has to be known in it."""
    return [{"task": task} for task in settings.tasks]


def data(settings: Settings) -> dict[str, str]:
    return hashes(settings.tasks, settings)


def rows(settings: Settings) -> list[Row]:
    """LoRA, and each mixer fixed and trained."""
    made = [Row(LORA, lambda seed: LoRA(settings.rank))]
    for mixer in settings.mixers:
        for trained in (False, True):
            spec = MoSLoRA(settings.rank, mixer=mixer, train_mixer=trained)
            made.append(Row(name(mixer, trained), lambda seed, spec=spec: spec))
    return made


def name(mixer: str, trained: bool) -> str:
    """What its row is called."""
    return f"{mixer}, {'trained' if trained else 'fixed'}"


def measure(cell: dict, settings: Settings, device: str) -> list[dict]:
    """A row for each run: phase ("coarse" is the grid), rate, seed, what was trained, and what it measures on both sets."""
    return tuned(rows(settings), cell["task"], settings, device, reference=LORA)


# ---------------------------------------------------------------------------------------------------------------------
# The analysis: from the record, DataFrame in, DataFrame out


def curves(table: pd.DataFrame, part: str = "tune") -> pd.DataFrame:
    """The measure on "tune" (or "report") against the rate: mean, least and largest over the tuning seeds."""
    return verdicts.curves(table, part)


def chosen(table: pd.DataFrame) -> pd.DataFrame:
    """Of each task and row: the chosen rate, whether it is at an edge, and the measure on "report" with its interval."""
    return verdicts.reported(table)


def differences(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """Each row − LoRA on "report", each at its own rate: intervals, tests and the verdict of `verdicts.compare`."""
    return verdicts.against(table, LORA, margin)


def primary(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """The primary endpoint, a family of one: fixed orthogonal − LoRA, each at its own rate."""
    return verdicts.between(table, [(name("orthogonal", False), LORA)], margin)


def differences_over_examples(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """`differences` with intervals over seeds and examples: what other sentences or headers might have shown."""
    return two_level.between(table, [(row, LORA) for row in table["row"].unique() if row != LORA], margin)


def differences_at_one_rate(table: pd.DataFrame, margin: float = MARGIN) -> pd.DataFrame:
    """The same, all rows at LoRA's rate: the comparison that a mixer's size confounds."""
    return verdicts.against(table, LORA, margin, at=LORA)


def confound(table: pd.DataFrame) -> pd.DataFrame:
    """Of each row: what its own rate gains over LoRA's, in paired differences on "report", and the two rates."""
    found = []
    for task, runs in table.groupby("task", sort=False):
        own, other = (verdicts.by_seed(runs, f"report/{measure_of(task)}", at) for at in (None, LORA))
        rates = verdicts.rates(runs)
        for row in own.columns.intersection(other.columns):
            low, mean, high = verdicts.student((own[row] - other[row]).to_numpy())
            found.append({"task": task, "row": row, "rate": rates[row], "rate_of_lora": rates[LORA],
                          "gain": mean, "low": low, "high": high})
    return pd.DataFrame(found)


def identity_gap(table: pd.DataFrame) -> float:
    """The largest difference between LoRA and the fixed identity, over all runs both have and all measures."""
    measures = [column for column in table.select_dtypes("number") if "/" in column] + ["train_loss"]
    runs = table.set_index(["task", "rate", "seed"])
    lora, identity = (runs[runs["row"] == row][measures].astype(float) for row in (LORA, name("identity", False)))
    both = lora.index.intersection(identity.index)
    return float(np.nanmax(abs(lora.loc[both] - identity.loc[both]).to_numpy()))

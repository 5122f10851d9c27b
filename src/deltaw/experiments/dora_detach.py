"""What does taking DoRA's norm as a constant cost in loss, and what does it save in time and memory?

DoRA's W′ = m (W + ΔW) / ‖W + ΔW‖ has two gradients: the exact one (equation 6 of Liu et al. 2024, arXiv 2402.09353) and the
detached one, in which the norm is a constant (equation 11). The paper trains with the second: "without a noticeable
difference in accuracy" it takes 24.4 % less memory on LLaMA-7B (section 4.3). Chapter 5 says from shapes that this is the
memory of the merged weights which the paper's code forms, and that the factored norm of this library forms none.

*Loss.* Both gradients, DoRA around LoRA of rank 8, s = 1, tuned alike (`deltaw.experiments.engine.tuning`: the same rates, seeds and
passes) and reported with ten fresh seeds, in paired differences, detached − exact.

- CoLA: MiniLM, all 36 linear layers, a new head trained in full, 500 steps of 32 sentences cut at 32 tokens.
- digits turned by 90°: a network of three linear layers that knows them upright, all of them adapted, in fp32; 120 steps of
  64 images, and 1200. Chapter 5 found there (two rates, two seeds) that detaching costs some 20 points after 120 steps.

*Cost.* A step on one GPU, forward, backward to the input and AdamW: an encoder layer of MiniLM's shape and a decoder layer
of Llama-2-7B's, random weights in bf16 under autocast, eager and compiled. The arms take turns in each of several rounds:

    frozen base                  no adapter: forward, and backward to the input
    LoRA, DoRA,                  this library's; DoRA is the detached one
      DoRA, exact gradient
    formed norm, and             the same DoRA with ‖W + ΔW‖ of the formed matrix in W's precision, as the paper's code has
      … exact gradient           it, detached and exact; on Llama only
    PEFT DoRA, PEFT DoRA bf16    PEFT's, which is detached: its default of fp32 adapters, and, eager, adapters in bf16

On all linear layers of MiniLM with rank 8, and on q, k, v, up and down of Llama with rank 32, as the paper has them. The
input requires a gradient in every arm, as in the middle of a model. A round's mean time is divided by the frozen base's in
the same round; the median of these is the ratio, with the least and the largest. Memory is above the base's weights: what
is there between forward and backward ("kept", which adds up over a model's layers), and the step's peak. MiniLM is measured
at 32 × 64 tokens, where a GPU waits for its host, and at 2048 × 64, where it does not.

Fixed before the run:

- *Primary endpoint.* The measure on CoLA, detached − exact: equivalent, within `MARGIN`, by two one-sided tests. Its
  validation loss likewise within `LOSS_MARGIN` nats. Against it: "better" or "worse".
- *Digits*, 120 steps: detached is worse in accuracy, though each has its own rate. 1200 steps: within two points.
- *Memory.* With the formed norm detaching saves on Llama's layer, of what is kept, the five merged weights: 281 MB
  (0.262 GiB, a 32nd part of the 9.0 GB in chapter 5), within a tenth. With the factored norm less than a twentieth of that.
- *Time.* On Llama's layer, eager, the exact gradient takes at most 3 % longer than the detached one, and DoRA at most 20 %
  longer than LoRA; PEFT's DoRA takes longer than this library's in every cell.

After that, and before the record, a trial on the GPU showed the eager cost cells (to see that they run): the hypotheses on
memory and time were not changed then, though one of them looked wrong.
"""

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from ..adapters import DoRA, LoRA
from .engine import step, verdicts
from .engine.dora_step import COLUMNS, DETACHED, EXACT, FORMED, FORMED_EXACT, costs
from .engine.step import SHAPES
from .engine.subjects import hashes
from .engine.trained import tuned
from .engine.tuning import Budget, Row, measure_of

TIMED = True  # the cost part: two runs differ
MARGIN, LOSS_MARGIN = 0.01, 0.01  # one point of the measure; nats


@dataclass(frozen=True)
class Settings(Budget):
    """What is run: `Budget`'s fields, of the text tasks, and

    Attributes:
        tasks: names, as `deltaw.tasks.text` knows them.
        rank: of the loss part.
        digits_steps: a cell each.
        digits_coarse, digits_batch: in place of `coarse` and `batch_size`. There is no warm-up.
        shapes: of `SHAPES`, measured eager.
        compiled_shapes: measured under `torch.compile`, which takes each arm some seconds.
        rounds, round_steps: how many rounds, and of how many steps.
    """

    coarse: tuple[float, ...] = (1e-4, 3.16e-4, 1e-3, 3.16e-3, 1e-2)
    fine: int = 3
    spacing: float = 1.778
    tasks: tuple[str, ...] = ("cola",)
    rank: int = 8
    digits_steps: tuple[int, ...] = (120, 1200)
    digits_coarse: tuple[float, ...] = (1e-3, 3.16e-3, 1e-2, 3.16e-2, 1e-1)
    digits_batch: int = 64
    shapes: tuple[str, ...] = ("MiniLM, 32 × 64", "MiniLM, 2048 × 64", "Llama-2-7B, 4 × 2048")
    compiled_shapes: tuple[str, ...] = ("MiniLM, 2048 × 64", "Llama-2-7B, 4 × 2048")
    rounds: int = 7
    round_steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := {*self.shapes, *self.compiled_shapes} - SHAPES.keys():
            raise ValueError(f"shapes must be of {list(SHAPES)}, not {sorted(unknown)}")


QUICK = Settings(coarse=(1e-3, 1e-2), fine=1, further=0, tune_seeds=(100,), report_seeds=(0, 1), steps=2, warmup_steps=1,
                 batch_size=2, length=8, limit=12, tasks=("docstrings",), rank=2, digits_steps=(10,), digits_coarse=(1e-2, 1e-1),
                 shapes=("small bert", "small llama"), compiled_shapes=(), rounds=2, round_steps=1)


def cells(settings: Settings) -> list[dict]:
    """The loss part's, a task and a number of steps, then the cost part's, a shape eager or compiled."""
    losses = [(task, settings.steps) for task in settings.tasks] + [("digits", steps) for steps in settings.digits_steps]
    costs = [(shape, False) for shape in settings.shapes] + [(shape, True) for shape in settings.compiled_shapes]
    return ([{"part": "loss", "task": task, "steps": steps} for task, steps in losses]
            + [{"part": "cost", "shape": shape, "compiled": compiled} for shape, compiled in costs])


def data(settings: Settings) -> dict[str, str]:
    """Of the loss part; the other's input is drawn from a seed."""
    return hashes([*settings.tasks, *(["digits"] if settings.digits_steps else [])], settings)


def measure(cell: dict, settings: Settings, device: str) -> list[dict]:
    """Of the loss part a row a run, as `trained.tuned` has it; of the cost part a row an arm and round: ms a step, and of
    memory above the base's weights the GiB kept for the backward pass and the peak's."""
    if cell["part"] == "cost":
        return costs(SHAPES[cell["shape"]], cell["compiled"], settings.rounds, settings.round_steps, device)
    on_digits = cell["task"] == "digits"
    recipe = {"precision": "fp32"} if on_digits else {}
    rows = [Row(name, lambda seed, detach=detach: DoRA(LoRA(settings.rank), detach_norm=detach), recipe=recipe)
            for name, detach in ((DETACHED, True), (EXACT, False))]
    if on_digits:
        budget = replace(settings, steps=cell["steps"], coarse=settings.digits_coarse, batch_size=settings.digits_batch,
                         warmup_steps=0, length=1)
        runs = tuned(rows, "digits", budget, device, reference=EXACT, head=())
    else:
        runs = tuned(rows, cell["task"], settings, device, reference=EXACT)
    return [{key: value for key, value in run.items() if not ("/" in key and isinstance(value, str))} for run in runs]


# ---------------------------------------------------------------------------------------------------------------------
# The analysis: from the record, DataFrame in, DataFrame out


def losses(table: pd.DataFrame) -> pd.DataFrame:
    """The loss part, as `verdicts` takes it: the digits' tasks have their steps in their names."""
    runs = table[table["part"] == "loss"].dropna(axis=1, how="all")
    digits = runs["task"] == "digits"
    return runs.assign(task=runs["task"].where(~digits, "digits, " + runs["steps"].astype(str) + " steps"))


def reported(table: pd.DataFrame) -> pd.DataFrame:
    """Of each task and gradient: the chosen rate, whether it is at an edge, the measure on "report" with its interval."""
    return verdicts.reported(losses(table))


def curves(table: pd.DataFrame, part: str = "tune") -> pd.DataFrame:
    """The measure on "tune" (or "report") against the rate: mean, least and largest over the tuning seeds."""
    return verdicts.curves(losses(table), part)


def detach_differences(table: pd.DataFrame, at_one_rate: bool = False, margin: float = MARGIN,
                       loss_margin: float = LOSS_MARGIN) -> pd.DataFrame:
    """Detached − exact on "report", of each task in its measure and in the loss: each a family of one.

    Args:
        table: the record.
        at_one_rate: both at the rate of the exact gradient, not each at its own.
        margin, loss_margin: of differences that do not matter, in the measure and in nats.

    Returns:
        task, quantity, detached and exact (means), and `verdicts.compare`'s difference, low, high, p, p_equivalent and
        verdict.
    """
    found = []
    for task, runs in losses(table).groupby("task", sort=False):
        for quantity in (measure_of(task), "loss"):
            values = verdicts.by_seed(runs, f"report/{quantity}", EXACT if at_one_rate else None)
            if len(values) < 2:  # no run could be reported
                values = pd.DataFrame(index=range(2))
            is_loss = quantity == "loss"
            row = verdicts.compare(values, [(DETACHED, EXACT)], loss_margin if is_loss else margin, less_is_better=is_loss)
            means = {name: values[key].mean() if key in values else np.nan for name, key in
                     (("detached", DETACHED), ("exact", EXACT))}
            columns = row[["difference", "low", "high", "p", "p_equivalent", "verdict"]].iloc[0].to_dict()
            found.append({"task": task, "quantity": quantity, **means, **columns})
    return pd.DataFrame(found)


def cost(table: pd.DataFrame) -> pd.DataFrame:
    """Of each shape, eager or compiled, and arm of the cost part: `step.cost`'s columns."""
    return step.cost(_costs(table))


def saved(table: pd.DataFrame) -> pd.DataFrame:
    """What detaching saves, of each shape, eager or compiled, and norm: exact − detached.

    Columns: kept_gib, of what is kept for the backward pass; peak_gib, and its share of the exact gradient's peak; slower,
    the exact step's time over the detached one's in the same round (median), least and largest.
    """
    found = []
    for key, ms, memory in step.by_cell(_costs(table)):
        for norm, exact, detached in (("factored", EXACT, DETACHED), ("formed", FORMED_EXACT, FORMED)):
            if exact in ms:
                gib, ratio = memory.loc[exact] - memory.loc[detached], ms[exact] / ms[detached]
                found.append({**key, "norm": norm, **gib, "share": gib["peak_gib"] / memory.loc[exact, "peak_gib"],
                              "slower": ratio.median(), "least": ratio.min(), "largest": ratio.max()})
    return pd.DataFrame(found)


def _costs(table: pd.DataFrame) -> pd.DataFrame:
    """The cost part, without the loss part's columns."""
    return table.loc[table["part"] == "cost", ["shape", "compiled", *COLUMNS]]

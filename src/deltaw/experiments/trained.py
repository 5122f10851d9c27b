"""The runs that `tuning.search` asks for, trained in banks: rows of about one rank go through the model together."""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ..adapters import Adapter, Spec
from ..attach import attach
from ..bank import Bank
from ..tasks import Task
from ..tasks.text import TextTask, text
from ..train import History, Recipe
from ..wrappers import AdaptedLinear, TrainedCopy, wrappers
from .ends import HeadOnly
from .tuning import Budget, Row, Run, search

PADDED = (16, 256)  # ranks up to these go together
SLOTS = 96  # that go through the model at once, at most
BYTES_A_TOKEN = (300_000, 150)  # that a slot takes of a GPU's memory, at most, and what each rank adds
BYTES_A_NUMBER = 24  # of the factors: weights, gradients, moments, copies in bf16


def text_task(name: str, budget: Budget) -> TextTask:
    """A text task whose metrics are "tune/…" and "report/…"."""
    return text(name, length=budget.length, limit=budget.limit).for_tuning(budget.share, report=True)


def tuned(
    rows: Sequence[Row], task: Task, budget: Budget, device: str, measure: str, reference: str | None = None,
    train_also: Sequence[str] = ("classifier",),
) -> list[dict]:
    """`search`, each run trained as a slot of a bank. A run's row says scale, parameters and with_head, too.

    Args:
        rows, budget, measure, reference: as in `search`.
        task: its metrics are "tune/…" and "report/…", as `text_task`'s are. Its sentences have `budget.length` tokens.
        device: as `harness` gives it.
        train_also: the head; drawn anew for each seed. () for a task without one, such as a language model.
    """
    model = task.model()
    sizes = {row.name: Size.of(model, row.spec(0), train_also) for row in rows}

    def train(runs: list[Run]) -> list[dict]:
        results: dict[int, dict] = {}
        for part in parts([(sizes[row.name], rate, seed) for row, rate, seed in runs], budget, device):
            slots = [(runs[i][0].spec(runs[i][2]), recipe(budget, *runs[i])) for i in part]
            bank = Bank(copy.deepcopy(model), slots, train_also=train_also, reset_also=bool(train_also))
            on = {"device": "cpu"} if device == "cpu" else {"cuda_graph": True}
            results |= zip(part, map(summary, bank.fit(task, progress=False, **on)))
        stated = ({"parameters": size.parameters, "with_head": size.with_head} for size in (sizes[r.name] for r, *_ in runs))
        return [{"scale": runs[i][0].scale, **own, **results[i]} for i, own in enumerate(stated)]

    return search(rows, train, budget, measure, reference)


@dataclass(frozen=True)
class Size:
    """What a row holds: its trained numbers, without and with the head, and what decides which rows train together."""

    parameters: int
    with_head: int
    rank: int  # the widest layer's
    numbers: int  # of all factors
    gain: bool  # is there one?

    @classmethod
    def of(cls, model: nn.Module, spec: Spec, train_also: Sequence[str]) -> "Size":
        held = list(wrappers(attach(copy.deepcopy(model), spec, train_also=train_also)))
        adapters = [each.adapters["default"] for each in held if isinstance(each, AdaptedLinear)]
        factors = [adapter.factors() for adapter in adapters]
        own, head = (sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())
                     for modules in (adapters, [each.adapters["default"] for each in held if isinstance(each, TrainedCopy)]))
        own *= not isinstance(spec, HeadOnly)  # whose parameters are there for form's sake, and never move
        return cls(own, own + head, max(down.shape[0] for down, _ in factors),
                   sum(down.numel() + up.numel() for down, up in factors),
                   any(type(adapter).gain is not Adapter.gain for adapter in adapters))

    @property
    def group(self) -> tuple[int, bool]:
        """A bank pads ranks to its largest: to 16 and to 256 that costs less than more banks. A gain costs all slots."""
        return next((rank for rank in PADDED if self.rank <= rank), self.rank), self.gain


def parts(runs: Sequence[tuple[Size, float, int]], budget: Budget, device: str) -> list[list[int]]:
    """The runs' places, in parts of one group that fit the device. Those of one rate and seed stay together: two rows
    that should agree to the last bit then go through the very same products."""
    tokens = budget.batch_size * budget.length
    memory = math.inf if device == "cpu" else torch.cuda.get_device_properties(device).total_memory
    found = []
    order = sorted(range(len(runs)), key=lambda i: (runs[i][0].group, *runs[i][1:], i))
    for _, group in itertools.groupby(order, key=lambda i: runs[i][0].group):
        blocks = [list(block) for _, block in itertools.groupby(group, key=lambda i: runs[i][1:])]
        sizes = [runs[i][0] for i in itertools.chain(*blocks)]
        base, per_rank = BYTES_A_TOKEN
        most = max(tokens * (base + per_rank * size.rank) + BYTES_A_NUMBER * size.numbers for size in sizes)
        at_once = max(1, int(min(SLOTS, 0.9 * memory // most)))
        share = math.ceil(len(sizes) / math.ceil(len(sizes) / at_once))  # parts about as large as each other
        part: list[int] = []
        for block in blocks:
            if part and len(part) + len(block) > at_once or len(part) >= share:
                found, part = [*found, part], []
            part += block
        found += [part[i:i + at_once] for i in range(0, len(part), at_once)]
    return found


def recipe(budget: Budget, row: Row, rate: float, seed: int) -> Recipe:
    common = {"steps": budget.steps, "schedule": "linear", "warmup_steps": budget.warmup_steps,
              "batch_size": budget.batch_size}
    return Recipe(**common | dict(row.recipe), learning_rate=rate, seed=seed)


def summary(history: History) -> dict:
    """Of a run: why it was stopped, what it measures on both sets, and the mean training loss of its last tenth."""
    last = history.loss[-max(1, history.recipe.steps // 10):]
    if history.stopped:
        return {"stopped": history.stopped}
    return {"stopped": "", **history.metrics, "train_loss": float(np.mean(last))}

"""The runs that `tuning.search` asks for, trained in banks: rows of about one rank go through the model together.

What a run gives depends on its row, rate and seed. Which others went through the model beside it makes a difference of
rounding only (on a GPU, other shapes take other kernels), and how many did depends on the GPU's memory.
"""

import copy
import gc
import itertools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from ...adapters import Adapter, Spec
from ...attach import attach
from ...bank import Bank
from ...tasks import Task
from ...train import History, Recipe
from ...wrappers import AdaptedLinear, TrainedCopy, wrappers
from .ends import HeadOnly
from .subjects import Subject, subject
from .tuning import Budget, Row, Run, search

PADDED = (16, 64, 256)  # ranks up to these go together
SLOTS = 256  # that go through the model at once, at most
TOKENS = 200_000  # likewise: a GPU is busy with a third of it
BYTES_A_NUMBER = 40  # of the factors: weights, gradients, moments, what an update makes, copies in bf16
MEMORY = 0.85  # of a GPU's memory, for the slots


def tuned(
    rows: Sequence[Row], name: str, budget: Budget, device: str, reference: str | None = None,
    head: tuple[str, ...] | None = None,
) -> list[dict]:
    """`search`, each run trained as a slot of a bank. A run's row says scale, parameters and with_head, too.

    Args:
        rows, budget, reference: as in `search`.
        name: of the task, as `subjects.subject` knows it.
        device: as `harness` gives it.
        head: of the model, trained in full from where it is, in place of the task's own, which begins anew for each seed.
    """
    what = subject(name, budget, device)
    model, train_also = what.task.model(), what.head if head is None else head
    sizes = {row.name: Size.of(model, row.spec(0), train_also) for row in rows}

    def train(runs: list[Run]) -> list[dict]:
        slots = [(row.spec(seed), recipe(what.budget, row, rate, seed)) for row, rate, seed in runs]
        together = parts([(sizes[row.name], rate, seed) for row, rate, seed in runs], what, device)
        reset = head is None and bool(train_also)
        histories = banked(model, slots, together, what.task, device, train_also, reset)
        stated = ({"parameters": size.parameters, "with_head": size.with_head} for size in (sizes[r.name] for r, *_ in runs))
        return [{"scale": row.scale, **own, **summary(history, examples=seed in budget.report_seeds)}
                for (row, _, seed), own, history in zip(runs, stated, histories, strict=True)]

    return search(rows, train, what.budget, what.measure, reference)


def banked(
    model: nn.Module, slots: Sequence[tuple[Spec, Recipe]], parts: Sequence[list[int]], task: Task, device: str,
    train_also: Sequence[str] = (), reset_also: bool = False,
) -> list[History]:
    """The slots' histories, each part of them trained in a bank of its own; one too large for the GPU's memory is halved.

    Args:
        model: the base; it stays as it is.
        slots, train_also, reset_also: as in `Bank`.
        parts: places in `slots`, each of them once.
        task: what is learnt.
        device: as `harness` gives it; on a GPU, steps are recorded as a CUDA graph.
    """
    found: dict[int, History] = {}
    waiting = list(parts)
    while waiting:
        part = waiting.pop(0)
        histories = _in_one_bank(model, [slots[i] for i in part], task, device, train_also, reset_also)
        if histories is None:
            waiting[:0] = part[:len(part) // 2], part[len(part) // 2:]
        else:
            found |= zip(part, histories)
    return [found[i] for i in range(len(slots))]


def _in_one_bank(
    model: nn.Module, slots: list[tuple[Spec, Recipe]], task: Task, device: str, train_also: Sequence[str], reset_also: bool
) -> list[History] | None:
    """The slots' histories; None if there are several and the GPU has not the memory for them."""
    on = {"device": "cpu"} if device == "cpu" else {"cuda_graph": True}
    # A recording that fails leaves PyTorch on the stream that it was recorded from: here, not any longer.
    stream = nullcontext() if device == "cpu" else torch.cuda.stream(torch.cuda.current_stream(device))
    try:
        with stream:
            bank = Bank(copy.deepcopy(model), slots, train_also=train_also, reset_also=reset_also)
            return bank.fit(task, progress=False, **on)
    except RuntimeError as error:
        if len(slots) == 1 or not out_of_memory(error):
            raise
    gc.collect()  # here, where nothing holds the error, and with it what was on the GPU, any more
    if device != "cpu":
        torch.cuda.empty_cache()
    return None


def out_of_memory(error: BaseException | None) -> bool:
    """Is this, or what it was raised in the wake of, such an error? While a CUDA graph is recorded, it is the latter."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False


@dataclass(frozen=True)
class Size:
    """What a row holds: its trained numbers, without and with the head, and what decides which rows train together."""

    parameters: int
    with_head: int
    rank: int  # the widest layer's
    numbers: int  # of all factors, and of the head
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
                   sum(down.numel() + up.numel() for down, up in factors) + head,
                   any(type(adapter).gain is not Adapter.gain for adapter in adapters))

    @property
    def group(self) -> tuple[int, bool]:
        """A bank pads ranks to its largest: to the next of `PADDED` that costs less than more banks. A gain costs all."""
        return next((rank for rank in PADDED if self.rank <= rank), self.rank), self.gain


def parts(runs: Sequence[tuple[Size, float, int]], what: Subject, device: str) -> list[list[int]]:
    """The runs' places, in parts of one group that fit the device. Those of one rate and seed stay together: two rows
    that should agree to the last bit then go through the very same products."""
    tokens = what.budget.batch_size * what.budget.length
    memory = math.inf if device == "cpu" else torch.cuda.get_device_properties(device).total_memory
    found = []
    order = sorted(range(len(runs)), key=lambda i: (runs[i][0].group, *runs[i][1:], i))
    for _, group in itertools.groupby(order, key=lambda i: runs[i][0].group):
        blocks = [list(block) for _, block in itertools.groupby(group, key=lambda i: runs[i][1:])]
        sizes = [runs[i][0] for i in itertools.chain(*blocks)]
        base, per_rank = what.bytes_a_token
        most = max(tokens * (base + per_rank * size.rank) + BYTES_A_NUMBER * size.numbers for size in sizes)
        at_once = max(1, int(min(SLOTS, TOKENS // tokens, MEMORY * memory // most)))
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


def summary(history: History, examples: bool = False) -> dict:
    """Of a run: why it was stopped, what it measures on the sets, and the mean training loss of its last tenth.

    With `examples`, also what the task keeps of the single examples of "report" (`deltaw.tasks.task.Measured`).
    """
    if history.stopped:
        return {"stopped": history.stopped}
    last = history.loss[-max(1, history.recipe.steps // 10):]
    measured = {name: value for name, value in history.metrics.items() if "/" in name}  # the same as one of these else
    if examples:
        measured |= {name: text for name, text in history.metrics.examples.items() if name.startswith("report/")}
    return {"stopped": "", **measured, "train_loss": float(np.mean(last))}

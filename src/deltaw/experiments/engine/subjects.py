"""What the tuned experiments train on: a task by its name, with its head, its measure and the memory that it takes."""

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ...tasks import Task, code_lm, digits
from ...tasks.code_base import SHAPES, Base
from ...tasks.code_tokens import Options, corpus
from ...tasks.digits import fingerprint as digits_fingerprint
from ...tasks.text import fingerprint, text
from .tuning import Budget, Budgets, measure_of


class Subject(NamedTuple):
    """A task for `trained.tuned`.

    Attributes:
        task: its metrics are "tune/…" and "report/…".
        budget: the task's own.
        measure: as of `measure_of`.
        head: of a classifier, trained in full and drawn anew for each seed; of a language model none.
        bytes_a_token: of a GPU's memory that a slot takes in training, at most; and what each rank adds.
    """

    task: Task
    budget: Budget
    measure: str
    head: tuple[str, ...] = ("classifier",)
    bytes_a_token: tuple[int, int] = (300_000, 150)  # MiniLM's; 90,000 were measured for its layers in bf16, compiled


def subject(name: str, budget: Budget, device: str = "cpu") -> Subject:
    """The task of that name.

    Args:
        name: one of `deltaw.tasks.text`'s, "digits" (turned by 90°) or "code_lm".
        budget: `Budgets` for the last two.
        device: where `code_lm`'s base is trained, the first time in a process.
    """
    own = budget.of(name) if isinstance(budget, Budgets) else budget
    if name == "digits":
        task = digits(angle=90).for_tuning(own.share, report=True)
        return Subject(task, own, measure_of(name), bytes_a_token=(20_000, 20))
    if name == "code_lm":
        base = Base(own.code_size, own.base_steps, own.base_batch, own.length, deterministic=own.deterministic)
        task = code_lm(base, _options(own), sets=("tune", "report", "python"), windows=own.code_windows,
                       blocks=own.code_blocks, device="cpu" if device == "cpu" else None)
        if device != "cpu":
            torch._dynamo.reset()  # it holds only so many compilations of a layer; a base of another size needs its own
        shape = SHAPES[own.code_size]
        each = 120 * shape.layers * shape.width + 20 * own.vocabulary  # between the layers, and the logits with gradients
        return Subject(task, own, measure_of(name), (), (each, 40 * shape.layers))
    return Subject(_text(name, own.length, own.limit, own.share, os.environ.get("DELTAW_DATA")), own, measure_of(name))


def hashes(names: Sequence[str], budget: Budget) -> dict[str, str]:
    """The SHA-256 of the tasks' data, by name."""
    found = {}
    for name in names:
        if name == "code_lm":
            found |= {f"code_lm {part}": each for part, each in corpus(_options(budget)).sha256.items()}
        else:
            found[name] = digits_fingerprint() if name == "digits" else fingerprint(name)
    return found


def _options(budget: Budgets) -> Options:
    return Options(budget.packages, budget.headers, budget.vocabulary, budget.code_share)


@lru_cache(maxsize=1)
def _text(name: str, length: int, limit: int, share: float, data_dir: str | None) -> Task:
    """Kept for the next cell, because to divide SST-2 takes its time."""
    return text(name, data_dir, length, limit).for_tuning(share, report=True)

"""What does each adapter gain when a language model of Python learns C++ and CUDA, and what does it forget?

The base is a decoder of Llama's architecture, trained from nothing on the Python of the installed packages; the target is
the C++ and CUDA headers that they bring (`deltaw.tasks.code_corpus` says how both are cleaned and split). All adapters are
on every linear layer but the head, with s = 1; "full" trains all parameters, "head" the output matrix alone, which is not
tied to the embedding. AdamW without weight decay, a warm-up, then linearly to zero; a short adaptation and a long one.

Each run measures "tune" (headers, to choose the rate by), "target" (headers, to report) and "python" (what is left), in
nats a token, over folders or packages of which nothing was trained on. The rates are a coarse grid, half a decade apart,
moved by one step for the methods that are known to want it; no ranking is claimed from it. `tuned_comparison` tunes.

A base is too large to be kept with the record: each process trains it once, in its first cell that needs it, and "base" in
every row is the beginning of its parameters' SHA-256. Only deterministic kernels train it, so that one kind of GPU with one
set of libraries should give it again; where the hash differs between rows all the same, they are of two bases, and only
rows of one hash are to be compared.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..adapters import DoRA, LoRA, MoSLoRA, VeRA
from ..adapters.adapter import Spec
from ..tasks.code_base import Base, compiled, plain_tokens_per_second
from ..tasks.code_lm import AdaptationTask, code_lm
from ..tasks.code_tokens import STREAMS, Options, corpus
from ..train import History, Recipe, evaluate, fit
from .engine.ends import HeadOnly
from .engine.trained import Size, banked

if TYPE_CHECKING:
    import pandas

TIMED = True  # the row "summary" of a base holds times; all others can be had again
SETS = ("tune", "target", "python")
WINDOWS = 10  # equal stretches of an adaptation, whose mean training losses are kept
POINTS = 100  # of a base's training loss
NONE = "-"  # a cell's size or method, where it has none


class Method(NamedTuple):
    """What is trained: what the spec builds and `also`; without a spec, all parameters. `factor` moves the grid of rates."""

    spec: Spec | None
    factor: float = 1.0
    also: tuple[str, ...] = ()


HALF_DECADE = math.sqrt(10)
METHODS = {
    "LoRA r8": Method(LoRA(8)),
    "LoRA r16": Method(LoRA(16)),
    "DoRA r8": Method(DoRA(LoRA(8))),
    "MoSLoRA r8": Method(MoSLoRA(8)),
    "VeRA r256": Method(VeRA(256), HALF_DECADE),
    "full": Method(None, 1 / HALF_DECADE),
    "head": Method(HeadOnly(), also=("lm_head",)),
}


@dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
        sizes: of the bases, in order.
        methods: names of `METHODS`.
        rates: the grid, before a method's factor.
        seeds: of an adapter's start and of the order of the examples.
        short, long: updates of the two adaptations; batch_size windows each.
        base_steps, base_batch: of each base.
        plain_steps: of a plain PyTorch loop, timed beside `fit`; 0 for none.
        length: tokens a window. windows: of each set, at most.
        packages, headers, vocabulary, share: as in `deltaw.tasks.code_tokens.Options`.
        deterministic: as in `deltaw.tasks.code_base.Base`.
    """

    sizes: tuple[str, ...] = ("45m", "10m")
    methods: tuple[str, ...] = tuple(METHODS)
    rates: tuple[float, ...] = tuple(1e-3 * HALF_DECADE**k for k in range(-1, 3))
    seeds: tuple[int, ...] = (0, 1)
    short: int = 200
    long: int = 1000
    batch_size: int = 16
    base_steps: int = 3000
    base_batch: int = 256
    plain_steps: int = 100
    length: int = 256
    windows: int = 512
    packages: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    vocabulary: int = 8192
    share: float = 0.06
    deterministic: bool = True


# Packages that deltaw's own dependencies bring to every machine.
QUICK = Settings(
    sizes=("tiny",), methods=("LoRA r8", "VeRA r256", "full", "head"), rates=(3e-3, 1e-2), seeds=(0, 1), short=10, long=20,
    batch_size=4, base_steps=30, base_batch=16, plain_steps=4, length=32, windows=48,
    packages=("filelock", "fsspec", "jinja2", "packaging", "tqdm"), headers=("numpy", "pyarrow"), vocabulary=512, share=0.15)


def cells(settings: Settings) -> list[dict]:
    """The corpus; then for each size its base, and each method's short and long adaptation."""
    found = [{"size": NONE, "stage": "corpus", "method": NONE}]
    for size in settings.sizes:
        found.append({"size": size, "stage": "base", "method": NONE})
        found += [{"size": size, "stage": stage, "method": method}
                  for stage in ("short", "long") for method in settings.methods]
    return found


def data(settings: Settings) -> dict[str, str]:
    return corpus(_options(settings)).sha256


def measure(cell: dict, settings: Settings, device: str) -> list[dict]:
    """A row for each stream and reason of the corpus, each point of a base's curve, or each run of an adaptation."""
    if cell["stage"] == "corpus":
        return _corpus_rows(settings)
    if device != "cpu":
        torch._dynamo.reset()  # it holds only so many compilations of a layer, and then goes on without compiling
    where = "cpu" if device == "cpu" else None  # as `fit` takes it
    how = settings.base_steps, settings.base_batch, settings.length
    base = Base(cell["size"], *how, deterministic=settings.deterministic)
    task = code_lm(base, _options(settings), sets=SETS, windows=settings.windows, device=where)
    rows = _base_rows(task, settings, where) if cell["stage"] == "base" else _adaptation_rows(task, cell, settings, where)
    return [row | {"base": task.pretrained.fingerprint[:12]} for row in rows]


def _options(settings: Settings) -> Options:
    return Options(settings.packages, settings.headers, settings.vocabulary, settings.share)


# ---------------------------------------------------------------------------------------------------------------------
# The corpus, and the base


def _corpus_rows(settings: Settings) -> list[dict]:
    made = corpus(_options(settings))
    rows = [{"row": "kept", "name": name, **made.report[name], "bytes_per_token": made.bytes_per_token(name)}
            for name in STREAMS]
    return rows + [{"row": "removed", "name": f"{language}: {reason}", "files": files}
                   for language in ("python", "cpp") for reason, files in made.report[f"{language} removed"].items()]


def _base_rows(task: AdaptationTask, settings: Settings, where: str | None) -> list[dict]:
    base, history = task.pretrained, task.pretrained.history
    parts = np.array_split(np.arange(len(history.loss)), min(POINTS, len(history.loss)))
    rows = [{"row": "curve", "step": int(part[-1]) + 1, "train_loss": float(np.mean([history.loss[i] for i in part]))}
            for part in parts]
    rows += [{"row": "evaluation", "step": step, "python/loss": metrics["python/loss"]}
             for step, metrics in history.evaluations.items()]
    with torch.autocast("cuda", torch.bfloat16, enabled=where != "cpu" and torch.cuda.is_available()):  # as in `fit`
        before = evaluate(task.model(), task)
    plain = math.nan
    if settings.plain_steps:
        plain = plain_tokens_per_second(task.base, task.pretraining, settings.plain_steps, where)
    return [*rows, {
        "row": "summary", "step": len(history.loss), "trained": sum(each.numel() for each in base.model.parameters()),
        "tokens": len(history.loss) * task.base.batch_size * task.length, "seconds": base.seconds,
        "tokens_per_second": base.tokens_per_second, "plain_tokens_per_second": plain, **_losses(before)}]


# ---------------------------------------------------------------------------------------------------------------------
# The adaptations


def _adaptation_rows(task: AdaptationTask, cell: dict, settings: Settings, where: str | None) -> list[dict]:
    method, steps = METHODS[cell["method"]], settings.short if cell["stage"] == "short" else settings.long
    recipes = [Recipe(steps=steps, learning_rate=rate * method.factor, schedule="linear", warmup_steps=steps // 20,
                      batch_size=settings.batch_size, seed=seed) for rate in settings.rates for seed in settings.seeds]
    model = task.model()
    if method.spec is None:
        trained = sum(each.numel() for each in model.parameters())
        histories = [_fitted(task, recipe, where) for recipe in recipes]
    else:
        trained = Size.of(model, method.spec, method.also).with_head
        slots = [(method.spec, recipe) for recipe in recipes]
        histories = banked(model, slots, [list(range(len(slots)))], task, where or "cuda", method.also)
    return [{"row": "run", "rate": recipe.learning_rate, "seed": recipe.seed, "trained": trained, "stopped": history.stopped,
             **_losses(history.metrics), **_tenths(history)}
            for recipe, history in zip(recipes, histories, strict=True)]


def _fitted(task: AdaptationTask, recipe: Recipe, where: str | None) -> History:
    """A run that trains all parameters."""
    model = task.model()
    if task.base.compile and where != "cpu" and torch.cuda.is_available():
        compiled(model)
    try:
        return fit(model, task, recipe, progress=False, device=where)
    except FloatingPointError as error:  # at too large a rate; a bank says so in the history
        return History(recipe, [], [], [], stopped=str(error))


def _losses(metrics: dict[str, float]) -> dict[str, float]:
    return {f"{name}/loss": metrics.get(f"{name}/loss", math.nan) for name in SETS}


def _tenths(history: History) -> dict[str, float]:
    loss = np.full(history.recipe.steps, np.nan)  # (steps,)
    loss[:len(history.loss)] = history.loss
    return {f"train_loss_{i}": float(part.mean()) if len(part) else math.nan
            for i, part in enumerate(np.array_split(loss, WINDOWS), 1)}


# ---------------------------------------------------------------------------------------------------------------------
# The analysis: from the record's table


def adapted(table: "pandas.DataFrame") -> "pandas.DataFrame":
    """Of each size, stage and method: the rate of the least mean loss on "tune", and what it gives.

    Columns: trained; rate, and whether it is at the grid's edge (then it is not tuned); target and python, the mean
    losses over the seeds; gained, the base's target less that; forgotten, that python less the base's; place, the
    method's among those of its size and stage by target, from 1. A rate at which a run was stopped is not chosen.
    """
    import pandas

    runs, rows = table[table["row"] == "run"], []
    start = table[table["row"] == "summary"].set_index("size")
    for (size, stage, method), own in runs.groupby(["size", "stage", "method"], sort=False):
        means = own.groupby("rate")[[f"{name}/loss" for name in SETS]].agg(lambda each: each.mean(skipna=False))
        if means["tune/loss"].isna().all():
            continue
        rate = means["tune/loss"].idxmin()
        best = means.loc[rate]
        rows.append({
            "size": size, "stage": stage, "method": method, "trained": int(own["trained"].iloc[0]), "rate": rate,
            "at_edge": rate in (means.index.min(), means.index.max()), "target": best["target/loss"],
            "python": best["python/loss"], "gained": start.loc[size, "target/loss"] - best["target/loss"],
            "forgotten": best["python/loss"] - start.loc[size, "python/loss"]})
    found = pandas.DataFrame(rows)
    return found.assign(place=found.groupby(["size", "stage"])["target"].rank().astype(int))

"""Train what is trainable in a model: `Recipe` says how, `fit` does it, `History` is what happened."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral, Real

import torch
from torch import nn

from .wrappers import TrainedCopy

OPTIMIZERS = ("adamw", "adam", "sgd")
SCHEDULES = ("constant", "linear", "cosine")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
CHECK_EVERY = 25  # steps between looks at the loss, because each look makes a GPU wait


# ---------------------------------------------------------------------------------------------------------------------
# How to train


@dataclass(frozen=True)
class Recipe:
    """How to train: everything `fit` needs besides a model and a task. Checked when made.

    Args:
        steps: optimizer updates.
        learning_rate: the highest rate of the schedule.
        optimizer: "adamw" (decoupled weight decay), "adam", "sgd", or a callable that gets parameter groups, each with
            `params`, `lr` and `weight_decay`, and returns a `torch.optim.Optimizer`.
        momentum: of "sgd".
        betas: of "adamw" and "adam".
        eps: of "adamw" and "adam". Not 0: a parameter whose gradient is exactly zero, as A's while B is zero, would
            get 0/0. For a purely sign-like update take something tiny, such as 1e-30.
        schedule: "constant", "linear" (to zero) or "cosine" (to zero), after the warm-up.
        warmup_steps: steps of linear warm-up, fewer than `steps`.
        weight_decay: on every trained parameter alike.
        clip_norm: the largest global gradient norm; None for no clipping.
        batch_size: examples per update.
        accumulation: equal parts in which a batch goes through the model. It saves memory and changes nothing else,
            so it has to divide `batch_size`.
        precision: "bf16" or "fp16" run the model under autocast; "fp32" does not: every tensor keeps the type it has.
            "auto" is "bf16" on a GPU that has it, else "fp32". A float64 model is trained in float64.
        seed: of the order of the examples and of dropout.
        lora_plus_ratio: how many times larger the rate of the up side (B) is, as in LoRA+ (arXiv 2402.12354).
        head_learning_rate: of what `attach(train_also=…)` names, such as a new head, on the same schedule; None for
            `learning_rate`. Factors of different families want rates that are decades apart, and a head does not.
    """

    steps: int = 500
    learning_rate: float = 2e-4
    optimizer: str | Callable[[list[dict]], torch.optim.Optimizer] = "adamw"
    momentum: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    schedule: str = "constant"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float | None = None
    batch_size: int = 32
    accumulation: int = 1
    precision: str = "auto"
    seed: int = 0
    lora_plus_ratio: float = 1.0
    head_learning_rate: float | None = None

    def __post_init__(self):
        def is_number(value):
            return isinstance(value, Real) and not isinstance(value, bool)

        for name in ("steps", "warmup_steps", "batch_size", "accumulation", "seed"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, not {value!r}")
        optional = ("clip_norm", "head_learning_rate")
        for name in ("learning_rate", "momentum", "eps", "weight_decay", "lora_plus_ratio", *optional):
            value = getattr(self, name)
            if not is_number(value) and not (name in optional and value is None):
                raise TypeError(f"{name} must be a number, not {value!r}")
        if not (isinstance(self.betas, tuple) and len(self.betas) == 2 and all(map(is_number, self.betas))):
            raise TypeError(f"betas must be a tuple of two numbers, not {self.betas!r}")

        def check(name, allowed, ok):
            if not ok:
                raise ValueError(f"{name} must be {allowed}, not {getattr(self, name)!r}")

        check("steps", "at least 1", self.steps >= 1)
        check("learning_rate", "positive and finite", 0 < self.learning_rate < math.inf)
        check("optimizer", f"one of {OPTIMIZERS} or a callable",
              callable(self.optimizer) or self.optimizer in OPTIMIZERS)
        check("momentum", "in [0, 1)", 0 <= self.momentum < 1)
        check("betas", "in [0, 1)", all(0 <= beta < 1 for beta in self.betas))
        check("eps", "positive and finite (1e-30 is nearly none)", 0 < self.eps < math.inf)
        check("schedule", f"one of {SCHEDULES}", self.schedule in SCHEDULES)
        check("warmup_steps", f"at least 0 and fewer than steps={self.steps}", 0 <= self.warmup_steps < self.steps)
        check("weight_decay", "at least 0 and finite", 0 <= self.weight_decay < math.inf)
        check("clip_norm", "positive and finite, or None", self.clip_norm is None or 0 < self.clip_norm < math.inf)
        check("batch_size", "at least 1", self.batch_size >= 1)
        check("accumulation", f"at least 1 and a divisor of batch_size={self.batch_size}",
              self.accumulation >= 1 and self.batch_size % self.accumulation == 0)
        check("precision", f"one of {PRECISIONS}", self.precision in PRECISIONS)
        check("seed", "at least 0 and less than 2**63", 0 <= self.seed < 2**63)
        check("lora_plus_ratio", "positive and finite", 0 < self.lora_plus_ratio < math.inf)
        check("head_learning_rate", "positive and finite, or None",
              self.head_learning_rate is None or 0 < self.head_learning_rate < math.inf)

    def learning_rate_at(self, step: int) -> float:
        """The rate of update `step`, counted from 0.

        Warm-up of w steps: (step + 1)/(w + 1) of the rate. After it, with t = (step − w)/(steps − w) in [0, 1):
        constant 1, linear 1 − t, cosine (1 + cos πt)/2. So no update has rate zero, the first and the last included.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / (self.warmup_steps + 1)
        t = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        shape = {"constant": 1.0, "linear": 1 - t, "cosine": (1 + math.cos(math.pi * t)) / 2}
        return self.learning_rate * shape[self.schedule]


# ---------------------------------------------------------------------------------------------------------------------
# What happened


@dataclass(frozen=True, repr=False)
class History:
    """What a training run did. A step is the number of updates made before it, so step 0 is the model as it came.

    Attributes:
        recipe: the recipe of the run.
        loss: the mean loss of each step's batch, before its update.
        learning_rate: the rate of each step (without the LoRA+ ratio, and not a head's own).
        grad_norm: the global gradient norm of each step, before clipping.
        evaluations: {step: {metric: value}} over the validation examples; the last one is after the last update.
        stopped: why the run ended before its last step, as a slot of a bank can; else empty.
    """

    recipe: Recipe
    loss: list[float]
    learning_rate: list[float]
    grad_norm: list[float]
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    stopped: str = ""

    @property
    def metrics(self) -> dict[str, float]:
        """The validation metrics after the last update; of a run that was stopped, the last ones there are."""
        return self.evaluations[max(self.evaluations)] if self.evaluations else {}

    @property
    def table(self):
        """One row per (step, split, metric), with its value: a tidy `pandas.DataFrame`.

        Split "train" has loss, learning_rate and grad_norm at every step; "validation" has the task's metrics.
        """
        import pandas as pd

        rows = []
        for metric in ("loss", "learning_rate", "grad_norm"):
            rows += [(step, "train", metric, value) for step, value in enumerate(getattr(self, metric))]
        for step, metrics in self.evaluations.items():
            rows += [(step, "validation", metric, value) for metric, value in metrics.items()]
        return pd.DataFrame(rows, columns=["step", "split", "metric", "value"])

    def plot(self, ax=None, metric: str = "loss"):
        """Draw `metric` over the steps, the training batches as a line and the validation examples as dots.

        Returns the matplotlib axes, new ones unless given.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            figure, ax = plt.subplots(figsize=(6, 3.5), facecolor="white", layout="constrained")
            ax.set_facecolor("white")
        curves = {"loss": self.loss, "learning_rate": self.learning_rate, "grad_norm": self.grad_norm}
        dots = {step: metrics[metric] for step, metrics in self.evaluations.items() if metric in metrics}
        if metric not in curves and not dots:
            raise ValueError(f"metric must be one of {sorted({*curves, *self.metrics})}, not {metric!r}")
        if metric in curves:
            ax.plot(curves[metric], linewidth=1, label="train, each batch")
        if dots:
            ax.plot(list(dots), list(dots.values()), "o-", label="validation")
        ax.set(xlabel="step", ylabel=metric.replace("_", " "))
        ax.legend(frameon=False)
        return ax

    def __repr__(self):
        metrics = "".join(f", {name}={value:.4g}" for name, value in self.metrics.items())
        stopped = f", stopped={self.stopped!r}" if self.stopped else ""
        return f"History(steps={len(self.loss)}, first={self.loss[0]:.4g}, last={self.loss[-1]:.4g}{metrics}{stopped})"

    def _repr_html_(self):
        cells = {"steps": len(self.loss), "first batch's loss": f"{self.loss[0]:.4g}",
                 "last batch's loss": f"{self.loss[-1]:.4g}"}
        cells |= {f"validation {name}": f"{value:.4g}" for name, value in self.metrics.items()}
        cells |= {"stopped": self.stopped} if self.stopped else {}
        head = "".join(f"<th>{name}</th>" for name in cells)
        body = "".join(f"<td>{value}</td>" for value in cells.values())
        return f"<table><tr><th>loss</th>{head}</tr><tr><td>{_sparkline(self.loss)}</td>{body}</tr></table>"


def _sparkline(values: list[float], width: int = 120, height: int = 24, points: int = 60) -> str:
    """The values as a small SVG line; each point is the mean of a stretch of values."""
    points = min(points, len(values))
    edges = [len(values) * i // points for i in range(points + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:])]
    low, span = min(means), (max(means) - min(means)) or 1.0
    line = " ".join(f"{width * i / max(points - 1, 1):.0f},{1 + (height - 2) * (1 - (mean - low) / span):.0f}"
                    for i, mean in enumerate(means))
    return (f'<svg width="{width}" height="{height}" role="img" aria-label="training loss over the steps">'
            f'<polyline points="{line}" fill="none" stroke="currentColor"/></svg>')


# ---------------------------------------------------------------------------------------------------------------------
# Training


def fit(model: nn.Module, task, recipe: Recipe = Recipe(), *, evaluate_every: int | None = None,
        progress: bool | None = None, device: str | None = None) -> History:
    """Train the parameters of `model` that require a gradient on the mean of `task.losses`, and evaluate at the end.

    The model is trained in place and stays on the device it was trained on. Its mode (train or eval, module by
    module) and the random state of the process are as before. Devices, autocast, accumulation, clipping and several
    GPUs (`accelerate launch`) are accelerate's work; each process then takes its share of every batch.

    Args:
        model: what is trained; the task calls it as a whole, `model(…)`.
        task: see `deltaw.tasks.Task`.
        recipe: see `Recipe`.
        evaluate_every: evaluate at steps 0, evaluate_every, 2·evaluate_every, … as well.
        progress: whether to show a bar; None shows it on a terminal only.
        device: "cpu" to stay on the CPU; None for accelerate's choice, a GPU where there is one.

    Raises:
        ValueError: nothing to train, or the recipe does not suit the model or the device.
        FloatingPointError: the loss is not finite; the model is left as it is.
    """
    from tqdm import tqdm

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ValueError("the model has nothing to train: every parameter is frozen. "
                         "Attach an adapter, or name modules in attach(…, train_also=…)")
    if evaluate_every is not None and evaluate_every < 1:
        raise ValueError(f"evaluate_every must be at least 1 or None, not {evaluate_every!r}")
    groups = parameter_groups(model, recipe)
    losses, norms, rates, evaluations = [], [], [], {}

    with accelerator_for(recipe, trainable[0].dtype, device) as accelerator, \
            seeded(recipe.seed + accelerator.process_index, accelerator.device), \
            in_mode(model, training=True), \
            prepared_model(accelerator, model) as prepared:
        optimizer = _optimizer(recipe, groups, accelerator)
        batches = task.batches(recipe.seed, recipe.batch_size)
        # One process shows a bar; tqdm takes None for "on a terminal only".
        hidden = (None if progress is None else not progress) if accelerator.is_main_process else True
        for step in tqdm(range(recipe.steps), disable=hidden, leave=False):
            if evaluate_every and step % evaluate_every == 0:
                evaluations[step] = evaluate(model, task)
            rates.append(recipe.learning_rate_at(step))
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rates[step] / recipe.learning_rate

            losses.append(0.0)
            for part in _parts(next(batches), accelerator, recipe):
                with accelerator.accumulate(prepared):  # processes wait for each other at the last part only
                    loss = task.losses(prepared, part).mean()
                    accelerator.backward(loss)  # divides by recipe.accumulation
                    losses[step] += loss.detach() / recipe.accumulation
            if step == 0:
                warn_of_the_unreached(model)
            norms.append(_clip(trainable, accelerator, recipe.clip_norm))
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % CHECK_EVERY == 0 or step + 1 == recipe.steps:
                _check_finite(losses, rates, accelerator)
        evaluations[recipe.steps] = evaluate(model, task)
        losses = accelerator.reduce(torch.stack(losses), "mean").tolist()
        norms = torch.stack(norms).tolist()
    return History(recipe, losses, rates, norms, evaluations)


def evaluate(model: nn.Module, task, batch_size: int = 256) -> dict[str, float]:
    """The task's metrics over all its validation examples, in eval mode, where the model is.

    The mode is put back, no gradient is kept and no random number is drawn.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size!r}")
    (predictions,), labels = predict(model, task, batch_size)
    return task.metrics(predictions, labels)


@torch.no_grad()
def predict(model: nn.Module, task, batch_size: int, slots: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model predicts for all validation examples `(slots, n, …)`, and their labels `(n, …)`, on the CPU.

    A model that holds a bank's K slots sees every example K times, slot by slot.
    """
    device = next(model.parameters()).device
    predictions, labels = [], []
    with in_mode(model, training=False):
        for batch in task.validation(batch_size):
            folded = {name: tensor.expand(slots, *tensor.shape).flatten(0, 1)  # (slots · batch, …)
                      for name, tensor in to_device(batch, device).items()}
            predictions.append(task.predict(model, folded).unflatten(0, (slots, -1)).cpu())
            labels.append(batch["labels"].cpu())
    return torch.cat(predictions, dim=1), torch.cat(labels)


# ---------------------------------------------------------------------------------------------------------------------
# The parts of fit


def up_side_of(model: nn.Module) -> set[nn.Parameter]:
    """The parameters on the up side (B of LoRA): a module names its own in `up_parameters`, a tuple."""
    return {module.get_parameter(name) for module in model.modules() for name in getattr(module, "up_parameters", ())}


def heads_of(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of what is trained in full beside the adapters."""
    return {parameter for module in model.modules() if isinstance(module, TrainedCopy) for parameter in module.parameters()}


def parameter_groups(model: nn.Module, recipe: Recipe, heads: set[nn.Parameter] | None = None) -> list[dict]:
    """What is trained, as optimizer groups: the up side and the heads apart where they have rates of their own.

    Raises:
        ValueError: if the recipe has a rate for one of them, and the model has none.
    """
    up, heads = up_side_of(model), heads_of(model) if heads is None else heads
    rates = {parameter: recipe.learning_rate for parameter in model.parameters() if parameter.requires_grad}
    for name, part, rate, found in (
        ("lora_plus_ratio", up, recipe.learning_rate * recipe.lora_plus_ratio,
         "on an up side: the adapters' classes name none in up_parameters"),
        ("head_learning_rate", heads, recipe.head_learning_rate or recipe.learning_rate,
         "in a head: attach names none in train_also"),
    ):
        own = rates.keys() & part
        if rate != recipe.learning_rate and not own:
            raise ValueError(f"{name}={getattr(recipe, name)}, but no trained parameter is {found}")
        rates |= dict.fromkeys(own, rate)
    return [{"params": [parameter for parameter in rates if rates[parameter] == rate], "lr": rate,
             "weight_decay": recipe.weight_decay} for rate in dict.fromkeys(rates.values())]


def _optimizer(recipe: Recipe, groups: list[dict], accelerator) -> torch.optim.Optimizer:
    scaled = accelerator.scaler is not None  # fp16: gradients are scaled, and an update that overflows is skipped
    fused = accelerator.device.type in ("cpu", "cuda") and not scaled  # one kernel for all parameters
    if callable(recipe.optimizer):
        optimizer = recipe.optimizer(groups)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"the recipe's optimizer must return a torch.optim.Optimizer, not {optimizer!r}")
    elif recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=recipe.momentum, fused=fused)
    else:
        adam = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[recipe.optimizer]
        optimizer = adam(groups, betas=recipe.betas, eps=recipe.eps, fused=fused)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return accelerator.prepare(optimizer) if scaled else optimizer


@contextmanager
def accelerator_for(recipe: Recipe, dtype: torch.dtype, device: str | None) -> Iterator:
    """An `Accelerator` for one run.

    accelerate keeps precision, device and accumulation for the whole process, so that a second run could not choose
    others: its state is set aside for the run, and put back as it was.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import GradientAccumulationPlugin

    if device not in (None, "cpu"):
        raise ValueError(f'device must be "cpu" or None (a GPU where there is one), not {device!r}')
    states = [state._shared_state for state in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in states]
    try:
        for state in states:
            state.clear()
        # Of the GPUs, only CUDA's have float64.
        cpu = device == "cpu" or (dtype == torch.float64 and not torch.cuda.is_available())
        on = PartialState(cpu=cpu).device
        # A plugin, because a plain number of steps would give way to an environment variable of `accelerate launch`.
        accumulation = GradientAccumulationPlugin(num_steps=recipe.accumulation, sync_with_dataloader=False)
        yield Accelerator(mixed_precision=_mixed_precision(recipe.precision, dtype, on), cpu=cpu,
                          gradient_accumulation_plugin=accumulation)
    finally:
        for state, was in zip(states, before):
            state.clear()
            state.update(was)


def _mixed_precision(precision: str, dtype: torch.dtype, device: torch.device) -> str:
    """The recipe's precision in accelerate's words: "no", "bf16" or "fp16"."""
    if dtype == torch.float64 and precision in ("bf16", "fp16"):
        raise ValueError(f'precision={precision!r} on a float64 model: use "auto" or "fp32", which keep float64')
    if precision == "fp16" and device.type == "cpu":
        raise ValueError('precision="fp16" needs a GPU: use "auto", "fp32" or "bf16" on a CPU')
    if precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if bf16 and dtype != torch.float64 else "no"
    return "no" if precision == "fp32" else precision


@contextmanager
def prepared_model(accelerator, model: nn.Module, each_its_own: bool = False) -> Iterator[nn.Module]:
    """The model as accelerate wants it; afterwards, it is the plain one that it was.

    Several processes train one model together, unless `each_its_own`.
    """
    before = dict(vars(model))
    model.to(accelerator.device)
    model.zero_grad()  # of whatever the caller computed before
    try:
        yield accelerator.prepare_model(model, evaluation_mode=each_its_own)
    finally:
        # accelerate marks the model as prepared and puts a forward with autocast on it.
        for name in set(vars(model)) - set(before):
            delattr(model, name)
        if "forward" in before:
            model.forward = before["forward"]
        model.zero_grad()


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from `seed` inside, and leave the random state of the process as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Train or eval mode inside; afterwards each module is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, was in before:
            module.training = was


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def _parts(batch: dict[str, torch.Tensor], accelerator, recipe: Recipe) -> Iterator[dict[str, torch.Tensor]]:
    """This process's share of the batch, in `recipe.accumulation` parts of equal size."""
    parts = recipe.accumulation * accelerator.num_processes
    size = recipe.batch_size // parts
    if size * parts != recipe.batch_size:
        raise ValueError(f"batch_size={recipe.batch_size} must be a multiple of accumulation × processes = {parts}")
    for i in range(accelerator.process_index, parts, accelerator.num_processes):
        rows = slice(i * size, (i + 1) * size)
        yield to_device({name: tensor[rows] for name, tensor in batch.items()}, accelerator.device)


def _clip(parameters: list[nn.Parameter], accelerator, clip_norm: float | None) -> torch.Tensor:
    """The global norm of the gradients, which are then scaled down to `clip_norm` where they exceed it."""
    if clip_norm is not None:
        return accelerator.clip_grad_norm_(parameters, clip_norm)
    accelerator.unscale_gradients()  # of fp16
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def warn_of_the_unreached(model: nn.Module) -> None:
    """Some modules read a layer's weight instead of calling it, and then its adapter does nothing."""
    unreached = [name for name, parameter in model.named_parameters() if parameter.requires_grad and parameter.grad is None]
    if unreached:
        warnings.warn(f"no gradient reached {unreached[:4]}{' and others' if len(unreached) > 4 else ''} in the first step: "
                      "the loss does not depend on them there. Is the layer called at all, or only its weight read?",
                      stacklevel=3)


def _check_finite(losses: list[torch.Tensor], rates: list[float], accelerator) -> None:
    """Raise for the first of the latest losses that is not finite, in every process alike."""
    first = max(len(losses) - CHECK_EVERY, 0)
    latest = accelerator.reduce(torch.stack(losses[first:]), "mean").tolist()
    for step, loss in enumerate(latest, start=first):
        if not math.isfinite(loss):
            raise FloatingPointError(not_finite("loss", loss, step, rates[step]))


def not_finite(what: str, value: float, step: int, rate: float) -> str:
    """How to say it."""
    return f"the {what} is {value} at step {step}, learning rate {rate:.3g}: try a smaller rate, warm-up or clipping"

"""K adapters trained at once on one frozen base: a sweep is one batched product.

The kernel takes factors with a leading axis, so that one pass of the base serves all the slots of a bank:

    x (K · batch, …),    down (K, r, in),    up (K, out, r),    g (K, out)

`Bank` is the face. A `Run` is one slot on its way, a `Stack` the slots that go through the model together. How K
adapters become one is in `stacked.py`.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from . import fused, train
from .adapters import Spec
from .attach import attach, build, detach
from .stacked import UPDATES, Block, StackedAdapters, StackedHead
from .train import History, Recipe
from .wrappers import AdaptedLinear, TrainedCopy, base_modules, named_wrappers

NAME = "bank"  # under which the slots stand in the model while they are trained
WARM_UP = 3  # steps before a CUDA graph is recorded, in which libraries and torch.compile set themselves up
SHARED = ("steps", "batch_size", "accumulation", "optimizer", "precision")  # what all recipes of a bank agree on

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Halving:
    """Successive halving: at each rung, the slots with the largest validation loss are dropped.

    Args:
        rungs: steps, rising, before whose updates the slots are compared.
        keep: the share of the slots that goes on, in (0, 1); rounded up, so that one always does.
    """

    rungs: tuple[int, ...]
    keep: float = 0.5

    def __post_init__(self) -> None:
        rungs = self.rungs if isinstance(self.rungs, tuple) else ()
        if not rungs or not all(isinstance(rung, Integral) for rung in rungs) or sorted({0, *rungs}) != [0, *rungs]:
            raise ValueError(f"rungs must be rising steps from 1 on, such as (100, 200), not {self.rungs!r}")
        if not 0 < self.keep < 1:
            raise ValueError(f"keep must be in (0, 1), not {self.keep!r}")


class Bank:
    """Adapters trained together on one frozen base, each as if it were alone.

    >>> slots = [(dw.LoRA(8, init=init), dw.Recipe(learning_rate=rate)) for init in "AB" for rate in (1e-4, 1e-3)]
    >>> bank = dw.Bank(model, slots, train_also=["classifier"])
    >>> histories = bank.fit(task)
    >>> dw.save(bank.adapter(3), "out/")

    Slot i becomes what `attach(model, spec, targets, seed=recipe.seed, train_also=…, reset_also=…)` and then
    `fit(model, task, recipe)` make alone. With dropout it draws other masks.

    Args:
        model: the base, with no adapter attached. It is changed while `fit` runs, and is afterwards what it was.
        slots: (spec, recipe) pairs. Families, ranks and all else may differ, but for the recipes' steps,
            batch_size, accumulation, optimizer and precision. Of slots that go through the model together, ranks
            are padded to the largest: beside a VeRA of rank 256, a LoRA of rank 8 costs as much.
        targets, train_also, reset_also: as in `attach`, for all slots.

    Raises:
        TypeError: if a slot is no (spec, recipe) pair. ValueError: if the recipes differ where they may not, or ask
            for what a bank cannot do; if the base has a batch norm; as `attach`, with the slot. The model is then
            as it was.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Iterable[tuple[Spec, Recipe]],
        targets: str | Sequence[str] = "all-linear",
        train_also: str | Sequence[str] = (),
        reset_also: bool = False,
    ):
        self.model, self.slots = model, list(slots)
        self._how = {"targets": targets, "train_also": train_also, "reset_also": reset_also}
        _check_slots(self.slots)
        _check_base(model)
        with _naming(0), self._attached(0) as wrappers:  # what `attach` would refuse is refused here
            self._names = list(wrappers)
            layers = {name: wrapper.base for name, wrapper in wrappers.items() if isinstance(wrapper, AdaptedLinear)}
            also = {name: wrapper.base for name, wrapper in wrappers.items() if name not in layers}
        self._modules: list[tuple[nn.ModuleList, nn.ModuleList]] = []  # of each slot, adapters by layer, and heads
        for slot, (spec, recipe) in enumerate(self.slots):
            with _naming(slot):
                adapters, copies = build(spec, layers, also, recipe.seed, reset_also)
                modules = [nn.ModuleList(adapters.values()), nn.ModuleList(copies.values()).requires_grad_(True)]
                # Raises if a part that is to have a rate of its own is not there.
                train.parameter_groups(nn.ModuleList(modules), recipe, heads=set(modules[1].parameters()))
            self._modules.append(tuple(modules))

    def fit(
        self,
        task,
        *,
        evaluate_every: int | None = None,
        halving: Halving | None = None,
        slots_at_once: int | None = None,
        compile: bool = False,
        cuda_graph: bool = False,
        watch: Callable[[int, nn.Module, list[int]], None] | None = None,
        progress: bool | None = None,
        device: str | None = None,
    ) -> list[History]:
        """Train all slots, and evaluate each at the end. Called again, it goes on from where they are.

        A slot whose loss is not finite is frozen as it was then, and its `History.stopped` says so; to the others
        it makes no difference. Under `accelerate launch`, process p of n trains the slots p, p + n, p + 2n, …, and
        every process gets all results.

        Args:
            task: see `deltaw.tasks.Task`.
            evaluate_every: as in `deltaw.fit`, and so are `progress` and `device`.
            halving: when to drop the worse slots; they leave the batch.
            slots_at_once: how many slots go through the model at once: fewer take less memory. None for all.
            compile: compile model and loss by `torch.compile`.
            cuda_graph: record a whole step, optimizer included, as a CUDA graph and replay it: a small model on a fast
                GPU otherwise waits for the CPU to start its kernels. The model must not look at values on the way.
            watch: called as `watch(updates, model, slots)` before the first update and after each: how many there have
                been, the model with the stacked adapters in it, and which slots those are, in the stack's order (their
                factors: `layer.factors(layer.adapter)`, `(K, r, in)` and `(K, out, r)`). It must not change anything.

        Returns:
            Each slot's history.

        Raises:
            ValueError: an option is not allowed; there is an adapter on the model; a layer's input has no axis of
                the examples in front, or an example's loss depends on the others in its batch. The model is the
                plain base again, whatever was raised.
        """
        from accelerate.utils import gather_object
        from tqdm import tqdm

        recipe = self.slots[0][1]  # for all that the recipes agree on
        _check_options(recipe, evaluate_every, halving, slots_at_once, cuda_graph, device)
        _check_base(self.model)
        _check_foldable(self.model, task, self._names, recipe)
        runs = [Run(slot, own, *modules) for slot, ((_, own), modules) in enumerate(zip(self.slots, self._modules))]
        dtype = next(runs[0].adapters.parameters()).dtype
        losses = torch.compile(task.losses, dynamic=False) if compile else task.losses
        with train.accelerator_for(recipe, dtype, device) as accelerator, \
                train.seeded(recipe.seed + accelerator.process_index, accelerator.device), \
                train.in_mode(self.model, training=True), \
                train.prepared_model(accelerator, self.model, each_its_own=True) as model, \
                self._attached(0) as wrappers:
            racing = here = runs[accelerator.process_index::accelerator.num_processes]
            streams = {run.recipe.seed: task.batches(run.recipe.seed, recipe.batch_size) for run in here}
            wrappers = list(wrappers.values())
            stacks = _stacks(racing, slots_at_once, list(streams), wrappers, accelerator.device, compile, cuda_graph)
            # One process shows a bar; tqdm takes None for "on a terminal only".
            hidden = (None if progress is None else not progress) if accelerator.is_main_process else True
            for step in tqdm(range(recipe.steps), disable=hidden, leave=False):
                if step == 0:
                    _show(stacks, watch, model, 0)
                rung = halving is not None and step in halving.rungs
                if rung or (evaluate_every and step % evaluate_every == 0):
                    for stack in stacks:
                        stack.evaluate(model, task, step)
                if rung:
                    for stack in stacks:
                        stack.unstack()
                    racing = _best(racing, step, halving.keep)
                    streams = {run.recipe.seed: streams[run.recipe.seed] for run in racing}
                    stacks = _stacks(racing, slots_at_once, list(streams), wrappers, accelerator.device, compile, cuda_graph)
                batch = train.to_device(_joined([next(stream) for stream in streams.values()]), accelerator.device)
                for stack in stacks:
                    stack.update(model, losses, batch, step)
                _show(stacks, watch, model, step + 1)
            for stack in stacks:
                stack.evaluate(model, task, recipe.steps)
                stack.unstack()
            runs = sorted(gather_object(here), key=lambda run: run.slot)  # of all processes
        self._modules = [(run.adapters, run.heads) for run in runs]
        return [run.history() for run in runs]

    def adapter(self, slot: int, name: str | None = None) -> nn.Module:
        """The model with a slot's adapter attached and active: as ordinary as any, to be saved, merged, converted.

        Args:
            slot: which one.
            name: to attach it under; None for "slot3" if it is slot 3.

        Raises:
            IndexError: if there is no such slot. ValueError: as `attach`, for example if the name is taken.
        """
        if not 0 <= slot < len(self.slots):
            raise IndexError(f"slot must be in 0 … {len(self.slots) - 1}, not {slot!r}")
        spec, recipe = self.slots[slot]
        name = f"slot{slot}" if name is None else name
        attach(self.model, spec, name=name, seed=recipe.seed, **self._how)
        for wrapper, module in zip(_wrappers(self.model, name).values(), itertools.chain(*self._modules[slot]), strict=True):
            wrapper.adapters[name].load_state_dict(module.state_dict())
        return self.model

    @contextmanager
    def _attached(self, slot: int) -> Iterator[dict[str, AdaptedLinear | TrainedCopy]]:
        """The model with a slot's start attached; afterwards it is the plain base. Yields what holds the adapters."""
        spec, recipe = self.slots[slot]
        attach(self.model, spec, name=NAME, seed=recipe.seed, **self._how)
        try:
            yield _wrappers(self.model, NAME)
        finally:
            detach(self.model, NAME)


def _wrappers(model: nn.Module, name: str) -> dict[str, AdaptedLinear | TrainedCopy]:
    """What holds the adapter `name`: the layers, then the modules that are trained in full."""
    wrappers = [(key, wrapper) for key, wrapper in named_wrappers(model) if name in wrapper.adapters]
    return dict(sorted(wrappers, key=lambda item: isinstance(item[1], TrainedCopy)))


# ---------------------------------------------------------------------------------------------------------------------
# One slot, and the slots that go through the model together


@dataclass
class Run:
    """A slot on its way: what it trains, and what it has done.

    Attributes:
        adapters: one a layer, and heads: one a module of `train_also`. They have the slot's numbers whenever it is
            in no stack.
        moments: of the optimizer, likewise: `(moments, P)` for "adapters" and for "heads".
        dropped: why it was, if it was.
    """

    slot: int
    recipe: Recipe
    adapters: nn.ModuleList
    heads: nn.ModuleList
    moments: dict[str, Tensor] = field(default_factory=dict)
    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    evaluations: dict[int, dict[str, float]] = field(default_factory=dict)
    dropped: str = ""

    @cached_property
    def kind(self) -> str:
        """What is the same for adapters that stack: classes, shapes, and settings that are no tensors."""
        settings = [
            (name, type(module), {key: value for key, value in vars(module).items() if key[0] != "_" and key != "dropout"})
            for name, module in self.adapters.named_modules()
        ]
        tensors = [*self.adapters.named_parameters(), *self.adapters.named_buffers()]
        return repr((settings, [(name, type(tensor), tensor.shape, tensor.dtype) for name, tensor in tensors]))

    def history(self) -> History:
        """What happened, up to the first loss or gradient that is not finite."""
        rates = [self.recipe.learning_rate_at(step) for step in range(len(self.loss))]
        steps, stopped = len(rates), self.dropped
        for step, (loss, norm) in enumerate(zip(self.loss, self.grad_norm)):
            if not math.isfinite(loss + norm):
                what = ("loss", loss) if not math.isfinite(loss) else ("gradient's norm", norm)
                steps, stopped = step + 1, train.not_finite(*what, step, rates[step])
                break
        return History(self.recipe, self.loss[:steps], rates[:steps], self.grad_norm[:steps], self.evaluations, stopped)


class Stack:
    """K slots that go through the model together. While they are trained, nothing waits for the device.

    Args:
        runs: the slots, those of one kind side by side.
        seeds: of the batches that `update` gets.
        wrappers: what holds the adapters in the model.
        device: where the model is.
        compile: compile the optimizer's step.
        cuda_graph: replay a recorded step after the first few.
    """

    def __init__(
        self, runs: list[Run], seeds: list[int], wrappers: list[nn.Module], device: torch.device,
        compile: bool, cuda_graph: bool,
    ):
        self.runs, self.wrappers = runs, wrappers
        self.graph = torch.cuda.CUDAGraph() if cuda_graph else None
        self.recorded: tuple[Batch, list[Tensor]] | None = None  # where the graph reads the batch, and writes its results
        self.at = torch.zeros(1, dtype=torch.long, device=device)  # the step, where the device can read it, (1,)
        recipes = [run.recipe for run in runs]
        self.stream = torch.tensor([seeds.index(recipe.seed) for recipe in recipes], device=device)  # (K,)
        self.alive = torch.ones(len(runs), dtype=torch.bool, device=device)  # (K,)
        self.finished = False
        self.losses: list[Tensor] = []  # (K,) a step
        self.norms: list[Tensor] = []  # (K,) a step

        sizes = [len(list(same)) for _, same in itertools.groupby(runs, key=lambda run: run.kind)]
        ends = list(itertools.accumulate(sizes))
        self.blocks = [Block("adapters", runs, rows, device, compile) for rows in map(slice, [0, *ends], ends)]
        layers = zip(*(block.modules for block in self.blocks), strict=True)
        rates = zip(*([adapter.dropout for adapter in run.adapters] for run in runs), strict=True)  # by layer
        self.modules: list[nn.Module] = [StackedAdapters(parts, sizes, rate) for parts, rate in zip(layers, rates)]
        if len(runs[0].heads):
            self.blocks.append(Block("heads", runs, slice(0, len(runs)), device, compile))
            self.modules += [StackedHead(head, len(runs)) for head in self.blocks[-1].modules]
        clip = [math.inf if recipe.clip_norm is None else recipe.clip_norm for recipe in recipes]
        self.clip = torch.tensor(clip, dtype=self.blocks[0].moments.dtype, device=device)  # (K,)

    def install(self) -> None:
        """Put the stacked modules into the model."""
        for wrapper, module in zip(self.wrappers, self.modules, strict=True):
            if wrapper.adapters[NAME] is not module:
                wrapper.adapters[NAME] = module.train(wrapper.training)

    def update(self, model: nn.Module, losses: Callable, batch: Batch, step: int) -> None:
        """One update of each slot; `batch` is `(seeds, batch, …)`."""
        if self.finished:
            return
        self.install()
        self.at.fill_(step)
        warm = len(self.losses) >= WARM_UP
        with fused.enabled(self.graph is not None):
            results = self._replay(model, losses, batch) if self.graph and warm else self._step(model, losses, batch)
        if step == 0:
            train.warn_of_the_unreached(model)
        for block in self.blocks:
            block.let_go()
        for kept, result in zip((self.losses, self.norms), results):
            kept.append(result.clone())  # the graph writes to the same place again
        if (step + 1) % train.CHECK_EVERY == 0:
            self.finished = not self.alive.any()

    def _step(self, model: nn.Module, losses: Callable, batch: Batch) -> list[Tensor]:
        """Forward, backward and the optimizer; the losses and the gradients' norms, `(K,)` each."""
        slots, recipe = len(self.runs), self.runs[0].recipe
        size = recipe.batch_size // recipe.accumulation
        total = torch.zeros_like(self.clip)  # (K,)
        for start in range(0, recipe.batch_size, size):
            part = {key: tensor[self.stream, start:start + size].flatten(0, 1) for key, tensor in batch.items()}
            loss = losses(model, part).unflatten(0, (slots, size)).mean(1) / recipe.accumulation  # (K,)
            loss.sum().backward()  # each slot's own gradients: no loss depends on another slot's parameters
            total = total + loss.detach()

        gradients = [block.gradient() for block in self.blocks]  # (rows, P) each
        squares = torch.zeros_like(self.clip)  # (K,)
        for block, gradient in zip(self.blocks, gradients):
            squares[block.rows] += torch.linalg.vector_norm(gradient, dim=1).square()
        norm = squares.sqrt()  # (K,)
        self.alive &= total.isfinite() & norm.isfinite()
        shrink = torch.where(self.clip < math.inf, (self.clip / (norm + 1e-6)).clamp(max=1.0), 1.0)  # (K,)
        for block, gradient in zip(self.blocks, gradients):
            block.update(gradient, shrink[block.rows, None], self.alive[block.rows, None], self.at)
        return [total, norm]

    def _replay(self, model: nn.Module, losses: Callable, batch: Batch) -> list[Tensor]:
        """`_step`, recorded the first time."""
        if self.recorded is None:
            buffers = {key: tensor.clone() for key, tensor in batch.items()}
            with torch.cuda.graph(self.graph):
                self.recorded = buffers, self._step(model, losses, buffers)
        buffers, results = self.recorded
        for key, tensor in batch.items():
            buffers[key].copy_(tensor)
        self.graph.replay()
        return results

    def evaluate(self, model: nn.Module, task, step: int) -> None:
        """Measure the slots that have not been stopped."""
        self.install()
        slots, recipe = len(self.runs), self.runs[0].recipe
        batch_size = max(2 * recipe.batch_size // recipe.accumulation, 256 // slots)  # nothing is kept for a backward pass
        predictions, labels = train.predict(model, task, batch_size, slots)  # (K, n, …), (n, …)
        for run, alive, own in zip(self.runs, self.alive.tolist(), predictions):
            if alive:
                run.evaluations[step] = task.metrics(own, labels)

    def unstack(self) -> None:
        """Give each run what is its own."""
        for block in self.blocks:
            block.unstack()
        for name, steps in (("loss", self.losses), ("grad_norm", self.norms)):
            for run, values in zip(self.runs, torch.stack(steps, dim=1).tolist() if steps else ()):
                getattr(run, name).extend(values)


def _stacks(runs: list[Run], at_once: int | None, *where: Any) -> list[Stack]:
    """The runs in stacks of at most `at_once`, those of one kind side by side."""
    runs = sorted(runs, key=lambda run: run.kind)
    at_once = at_once or max(1, len(runs))
    return [Stack(runs[i:i + at_once], *where) for i in range(0, len(runs), at_once)]


def _show(stacks: list[Stack], watch: Callable | None, model: nn.Module, updates: int) -> None:
    """Let `watch` look at each stack."""
    for stack in stacks if watch else ():
        stack.install()
        with torch.no_grad():
            watch(updates, model, [run.slot for run in stack.runs])


def _joined(batches: list[Batch]) -> Batch:
    """`(batches, batch, …)`; nothing of none."""
    return {key: torch.stack([batch[key] for batch in batches]) for key in (batches[0] if batches else ())}


def _best(runs: list[Run], step: int, keep: float) -> list[Run]:
    """Those of this process's runs that are among the best of all processes'. The others learn that they are not."""
    from accelerate.utils import gather_object

    ranked = []
    for run in runs:
        metrics = run.evaluations.get(step, {"loss": math.inf})  # a slot that was stopped is not evaluated
        if "loss" not in metrics:
            raise ValueError(f"halving compares the slots' 'loss', but the task's metrics are {list(metrics)}")
        ranked.append((metrics["loss"] if math.isfinite(metrics["loss"]) else math.inf, run.slot))
    ranked = sorted(gather_object(ranked))
    places = math.ceil(keep * len(ranked))
    best = {slot for loss, slot in ranked[:places] if loss < math.inf}
    for run in runs:
        if run.slot not in best:
            run.dropped = f"dropped before step {step}: its loss is not among the {places} least of {len(ranked)}"
    return [run for run in runs if run.slot in best]


# ---------------------------------------------------------------------------------------------------------------------
# What a bank refuses


@contextmanager
def _naming(slot: int) -> Iterator[None]:
    """Errors say which slot it was."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"slot {slot}: {error}") from error


def _check_slots(slots: list) -> None:
    """Raises unless the slots are (spec, recipe) pairs that can be trained together."""
    if not slots:
        raise ValueError("a bank needs at least one slot, a (spec, recipe) pair")
    for slot, pair in enumerate(slots):
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Spec) and isinstance(pair[1], Recipe)):
            raise TypeError(f"slot {slot} must be a (spec, recipe) pair, such as (LoRA(rank=8), Recipe()), not {pair!r}")
        recipe, first = pair[1], slots[0][1]
        if recipe.optimizer not in UPDATES:
            raise ValueError(f"slot {slot}: the optimizer of a bank must be one of {train.OPTIMIZERS}, not "
                             f"{recipe.optimizer!r}; `fit` takes it, one adapter at a time")
        if recipe.precision == "fp16":
            raise ValueError(f"slot {slot}: the precision of a bank must not be 'fp16', whose scale is one for all "
                             "slots: the overflow of one would skip the step of all. Take 'bf16' or 'fp32'")
        for name in SHARED:
            ours, theirs = getattr(recipe, name), getattr(first, name)
            if ours != theirs:
                raise ValueError(f"slot {slot}: {name} must be that of slot 0, {theirs!r}, not {ours!r}: all slots share it")


def _check_base(model: nn.Module) -> None:
    """Raises unless the model is a plain base whose modules treat each example by itself."""
    if hasattr(model, "_deltaw"):
        raise ValueError(f"a bank needs the plain base; adapters are attached to this {type(model).__name__}, detach them")
    for name, module in base_modules(model):
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(module, "track_running_stats", False):
            raise ValueError(f"{name!r} is a {type(module).__name__}, which mixes the examples of a batch, so slots "
                             "would not be independent of each other; `fit` takes it, one adapter at a time")


def _check_options(
    recipe: Recipe, evaluate_every: int | None, halving: Halving | None, slots_at_once: int | None,
    cuda_graph: bool, device: str | None,
) -> None:
    for name, value in (("evaluate_every", evaluate_every), ("slots_at_once", slots_at_once)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1 or None, not {value!r}")
    if cuda_graph and (device == "cpu" or not torch.cuda.is_available()):
        raise ValueError(f"cuda_graph needs a CUDA device, not {device or 'cpu'!r}")
    if halving is not None and halving.rungs[-1] >= recipe.steps:
        raise ValueError(f"halving's rungs must be less than steps={recipe.steps}, not {halving.rungs!r}")


@torch.no_grad()
def _check_foldable(model: nn.Module, task, names: list[str], recipe: Recipe) -> None:
    """Raises unless two batches joined are to every layer, and to the loss, what they are one after the other."""
    modules, device = dict(base_modules(model)), next(model.parameters()).device

    def inputs_and_losses(batch: Batch) -> list[tuple[str, Tensor | None]]:
        """What each layer gets, in the order of the calls; then the losses."""
        seen = []

        def note(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
            seen.append((f"the input of {name!r}", tensors[0] if tensors else None))

        hooks = [modules[name].register_forward_pre_hook(partial(note, name), with_kwargs=True) for name in names]
        try:
            losses = task.losses(model, train.to_device(batch, device))
            return [*seen, ("the loss of each example", losses)]
        finally:
            for hook in hooks:
                hook.remove()

    one, two = (next(task.batches(seed, recipe.batch_size)) for seed in (0, 1))
    one, two = ({key: tensor[:2] for key, tensor in batch.items()} for batch in (one, two))
    joined = {key: torch.cat([one[key], two[key]]) for key in one}
    with train.in_mode(model, training=False):
        together, *apart = (inputs_and_losses(batch) for batch in (joined, one, two))
    calls = {tuple(what for what, _ in seen) for seen in (together, *apart)}
    if len(calls) > 1:
        raise ValueError("which layers are called depends on the batch, so slots cannot go through them together; `fit` "
                         "takes any model, one adapter at a time")
    for (what, whole), *parts in zip(together, *apart):
        if not _is_joined(whole, [part for _, part in parts]):
            raise ValueError(f"{what}: for two batches joined, this is not what it is for one and for the other, joined. "
                             "In a bank the examples have to be on the first axis, each treated by itself; `fit` takes "
                             "any model, one adapter at a time")


def _is_joined(whole: Tensor | None, parts: list[Tensor | None]) -> bool:
    """Is `whole` the parts, two of one shape, one after the other on the first axis, up to rounding?"""
    if any(tensor is None or tensor.dim() == 0 or not len(tensor) for tensor in (whole, *parts)):
        return False
    if parts[0].shape != parts[1].shape or whole.shape != torch.cat(parts).shape:
        return False
    expected, tolerance = torch.cat(parts).float(), 1e-3 if whole.dtype.itemsize > 2 else 5e-2
    return not (whole.float() - expected).abs().max() > tolerance * expected.abs().max()

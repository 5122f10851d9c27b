"""The runs of `appendix_runs`: every optimizer with every mixer, unmerged and merged, from one start."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Generator, Tensor, nn

from ...adapters import MoSLoRA, moslora
from ...adapters.adapter import Layer
from ...attach import adapted_layers, attach
from ...claims.two_forms import RULES
from ...tasks.minilm import minilm
from ...tasks.text import TextTask, text
from ...train import predict
from .side_by_side import Heads, Muon, SideBySide, Slot, clip_by_norm, clip_by_value
from .tuning import measure_of, rounded

if TYPE_CHECKING:
    from ..appendix_runs import Settings

FIXED, TRAINED, CONTROL, MERGED, HEAD = "fixed", "trained", "control", "merged", "head alone"  # kinds of runs
NUDGE = 4  # of A's entries in the control, in units of the precision's ε
HEAD_RATE = 1e-3  # of Adam


@dataclass(frozen=True)
class Own:
    """What an optimizer of chapter 7 is given here: the middle of its grid of rates, and what differs from there."""

    rate: float
    options: tuple[tuple[str, float], ...] = ()
    clip: Callable[[Tensor], Tensor] | None = None


OPTIMIZERS = {
    "SGD": Own(0.3),
    "momentum": Own(0.1),
    "Nesterov": Own(0.1),
    "SGD, decay": Own(0.3, (("weight_decay", 1e-3),)),
    "SGD, norm clip": Own(1.0, clip=clip_by_norm(0.3)),
    "Muon": Own(0.01),
    "SGD, value clip": Own(1.0, clip=clip_by_value(1e-3)),
    "sign": Own(1e-3),
    "RMSprop": Own(3e-4),
    "Adagrad": Own(0.01),
    "Adam": Own(1e-3),
    "AdamW": Own(1e-3),
}
DECAYING = ("SGD, decay", "AdamW")


def orthogonal(rank: int, generator: Generator, layer: Layer) -> Tensor:
    """`(rank, rank)`, orthogonal in float64; the library's own is drawn in float32 and orthogonal in that."""
    return torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64)).Q


def signed_permutation(rank: int, generator: Generator, layer: Layer) -> Tensor:
    """`(rank, rank)`."""
    signs = torch.randint(0, 2, (rank,), generator=generator) * 2.0 - 1  # (rank,)
    return torch.eye(rank)[torch.randperm(rank, generator=generator)] * signs


MIXERS = {
    "signed permutation": signed_permutation,
    "orthogonal": orthogonal,
    "Kaiming": moslora.MIXERS["kaiming"],
}


class Start:
    """What a seed decides: A `(r, in)` of each layer, every mixer `(r, r)` of each layer, the head. In float64."""

    def __init__(self, settings: "Settings", seed: int):
        self.settings = settings
        self.task: TextTask = text(settings.task, length=settings.length, limit=settings.limit)
        self.model = minilm(self.task.num_labels, seed=seed, dtype=torch.float64)
        self.model.classifier = Heads(self.model.classifier)
        attach(self.model, MoSLoRA(settings.rank, mixer="identity"), seed=seed)
        layers = adapted_layers(self.model)
        generator = torch.Generator().manual_seed(1000 + seed)  # not A's stream
        self.a = {name: layer.adapter.A.detach() for name, layer in layers.items()}
        self.identity = {name: torch.eye(settings.rank, dtype=torch.float64) for name in layers}
        described = [Layer(name, layer.weight) for name, layer in layers.items()]
        self.mixers = {mixer: {layer.name: layer.new(MIXERS[mixer](settings.rank, generator, layer)) for layer in described}
                       for mixer in settings.mixers}
        self.signs = {name: torch.randint(0, 2, a.shape, generator=generator).double() * 2 - 1 for name, a in self.a.items()}

    def slots(self, rates: Mapping[str, float], dtype: torch.dtype) -> list[Slot]:
        """Of each optimizer and mixer: fixed, the control, merged, trained; and the head alone."""
        runs, eps = {}, torch.finfo(dtype).eps
        nudged = {name: a * (1 + NUDGE * eps * self.signs[name]) for name, a in self.a.items()}
        for mixer, m in self.mixers.items():
            runs[mixer, FIXED] = self.a, m
            runs[mixer, CONTROL] = nudged, m
            runs[mixer, MERGED] = {name: m[name] @ a for name, a in self.a.items()}, self.identity
        for mixer in self.settings.trained:
            runs[mixer, TRAINED] = runs[mixer, FIXED]
        found = [slot((optimizer, *run), optimizer, rate, self.numbers(*start, dtype), run[1] == TRAINED)
                 for optimizer, rate in rates.items() for run, start in runs.items()]
        nothing = {name: torch.zeros_like(a) for name, a in self.a.items()}
        return [*found, slot((HEAD,), "SGD", 1.0, self.numbers(nothing, self.identity, dtype))]

    def pairs(self) -> list[tuple[str, str, str, bool]]:
        """Optimizer, mixer and kind of what is compared, and whether the theorem says that both runs are equal.

        A fixed and a trained mixer are compared with the merged run, the control with the fixed one.
        """
        found = []
        for optimizer in self.settings.optimizers:
            for mixer, m in self.mixers.items():
                found.append((optimizer, mixer, FIXED, all(map(RULES[optimizer].symmetries, m.values()))))
                found.append((optimizer, mixer, CONTROL, True))
            found += [(optimizer, mixer, TRAINED, False) for mixer in self.settings.trained]
        return found

    def numbers(self, a: Mapping[str, Tensor], m: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        """A slot's tensors, from A and M of each layer and B = 0."""
        b = {name: layer.adapter.B for name, layer in adapted_layers(self.model).items()}
        return {f"{name}.adapters.default.{factor}": tensors[name].detach().to(dtype)
                for name in a for factor, tensors in (("A", a), ("M", m), ("B", b))}

    def side_by_side(self, slots: list[Slot], dtype: torch.dtype, device: str) -> SideBySide:
        """The model, once, with these slots in it."""
        head = {f"classifier.{name}": tensor.detach()[0].to(dtype) for name, tensor in self.model.classifier.named_parameters()}
        return SideBySide(self.model.to(dtype), slots, head, HEAD_RATE, device)


def slot(name: tuple, optimizer: str, rate: float, numbers: Mapping[str, Tensor], trains_mixer: bool = False) -> Slot:
    """A run under an optimizer of `OPTIMIZERS`."""
    own = OPTIMIZERS[optimizer]

    def make(weights: nn.Parameter, shapes: list[tuple[int, int]]) -> torch.optim.Optimizer:
        if optimizer == "Muon":
            return Muon(weights, shapes, lr=rate)
        return RULES[optimizer].make([weights], lr=rate, **dict(own.options))

    return Slot(name, (optimizer, rate), make, own.clip, numbers, trains_mixer)


# ---------------------------------------------------------------------------------------------------------------------
# Trained, and compared


@lru_cache(maxsize=4)
def tried(settings: "Settings", device: str) -> tuple[dict, ...]:
    """LoRA under every optimizer at every rate of its grid. Every cell needs it: it is done once in a process."""
    start = Start(settings, settings.rate_seed)
    runs = [(name, rounded(OPTIMIZERS[name].rate * 10**decade)) for name in settings.optimizers for decade in settings.decades]
    slots = [slot(run, *run, start.numbers(start.a, start.identity, torch.float32)) for run in runs]
    side = start.side_by_side(slots, torch.float32, device)
    batches = start.task.batches(settings.rate_seed, settings.batch_size)
    losses = torch.stack([side.step(start.task, next(batches)) for _ in range(settings.rate_steps)])  # (steps, K)
    last = losses[-max(1, settings.rate_steps // 4):].double().mean(dim=0).tolist()
    rows = [{"optimizer": name, "rate": rate, "loss": short(loss, 6)} for (name, rate), loss in zip(runs, last)]
    best = {name: min((row for row in rows if row["optimizer"] == name), key=lambda row: np.nan_to_num(row["loss"], nan=np.inf))
            for name in settings.optimizers}
    return tuple(row | {"chosen": row is best[row["optimizer"]]} for row in rows)


def compared(settings: "Settings", dtype: torch.dtype, seed: int, device: str) -> list[dict]:
    """All runs of a cell, and their rows."""
    rates = {row["optimizer"]: row["rate"] for row in tried(settings, device) if row["chosen"]}
    start = Start(settings, seed)
    side = start.side_by_side(start.slots(rates, dtype), dtype, device)
    pairs = start.pairs()
    one = [side.places[pair[:3]] for pair in pairs]  # (pairs,), and so is the other
    other = [side.places[optimizer, mixer, FIXED if kind == CONTROL else MERGED] for optimizer, mixer, kind, _ in pairs]
    rows, losses, steps = [], [], checkpoints(settings.steps)
    batches = start.task.batches(seed, settings.batch_size)
    for step in range(1, settings.steps + 1):
        losses.append(side.step(start.task, next(batches)))  # (K,)
        if step in steps:
            stretch, losses = torch.stack(losses).double().cpu(), []  # (steps since the last, K)
            gaps = (stretch[:, one] - stretch[:, other]).abs().amax(dim=0).tolist()  # (pairs,)
            values = zip(pairs, *side.distances(one, other), stretch.mean(dim=0)[one].tolist(), gaps)
            rows += [{"optimizer": optimizer, "rate": rates[optimizer], "mixer": mixer, "kind": kind, "predicted": equal,
                      "step": step, "distance": short(distance), "size": short(size), "loss": short(loss, 6),
                      "loss_gap": short(gap)} for (optimizer, mixer, kind, equal), distance, size, loss, gap in values]
    predictions, labels = predict(side, start.task, settings.batch_size, len(side))  # (K, n, classes), (n,)
    scores = [start.task.metrics(own, labels)[measure_of(settings.task)] for own in predictions]
    classes, clipped = predictions.argmax(dim=-1), side.clipped()  # (K, n)
    for row, i, j in zip(rows[-len(pairs):], one, other):
        row |= {"clipped": short(clipped[i] / settings.steps), "score": short(scores[i]), "other_score": short(scores[j]),
                "differ": int((classes[i] != classes[j]).sum()), "examples": len(labels)}
    alone = side.places[HEAD,]
    return [*rows, {"kind": HEAD, "step": settings.steps, "loss": short(stretch.mean(dim=0)[alone].item(), 6),
                    "score": short(scores[alone]), "examples": len(labels)}]


def short(value: float, digits: int = 4) -> float:
    """To so many digits, so that the record stays small."""
    return float(f"{value:.{digits}g}")


def checkpoints(steps: int) -> list[int]:
    """After how many updates the runs are compared: often at first, then every 25."""
    return sorted(step for step in {1, 2, 3, 4, 5, 7, 10, 14, 20, 35, *range(25, steps, 25), steps} if step <= steps)

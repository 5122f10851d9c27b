"""Starts that follow from the base's weight alone, computed once for all the slots of an experiment's banks."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from ...adapters import Layer


class Once:
    """An `init` that draws nothing, and remembers: an SVD of every layer for every slot would take longer than to train.

    >>> LoRA(8, init=Once(inits.pissa))

    Attributes:
        init: the function of `deltaw.adapters.inits`'s form; its result is to depend on weight, rank and scale only.
    """

    def __init__(self, init: Callable):
        self.init = init
        self._known: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}  # the weight it is of, A, B

    def __call__(self, layer: Layer, rank: int, scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
        """A `(rank, in)` and B `(out, rank)`, the caller's own."""
        if layer.weight.is_meta:
            return self.init(layer, rank, scale, generator)
        key = layer.name, rank, scale
        known = self._known.get(key)
        if known is None or known[0].dtype != layer.weight.dtype or not torch.equal(known[0], layer.weight.detach().cpu()):
            made = (layer.weight, *self.init(layer, rank, scale, generator))
            known = self._known[key] = tuple(each.detach().cpu().clone() for each in made)
        return known[1].clone(), known[2].clone()

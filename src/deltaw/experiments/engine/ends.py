"""The two ends between which all adapters lie, as specs, so that they are slots of a bank like any other row."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Generator, Tensor, nn

from ...adapters import Adapter, Layer, Spec


@dataclass(frozen=True)
class HeadOnly(Spec):
    """ΔW = 0 and stays so: of the model, only what `train_also` names is trained."""

    def build(self, layers: Mapping[str, Layer], generator: Generator) -> dict[str, Adapter]:
        return {name: Fixed(layer) for name, layer in layers.items()}


@dataclass(frozen=True)
class FullLinear(Spec):
    """Every entry of ΔW is trained, from zero: full fine-tuning of the adapted layers' weights.

    Biases, normalizations and embeddings stay fixed. Without weight decay, an optimizer does to ΔW what it would do to W.
    """

    def build(self, layers: Mapping[str, Layer], generator: Generator) -> dict[str, Adapter]:
        return {name: Full(layer) for name, layer in layers.items()}


class Fixed(Adapter):
    """A bank wants a parameter of every adapter: this one's gradient is exactly zero, and so is its effect."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.register_buffer("A", layer.new(torch.zeros(1, layer.in_features)))  # (1, in)
        self.B = nn.Parameter(layer.new(torch.zeros(layer.out_features, 1)))  # (out, 1)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.A, self.B


@lru_cache
def _identity(size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`(size, size)`: one for all slots of a bank, which then sees at once that they are the same."""
    return torch.eye(size, dtype=dtype, device=device)


class Full(Adapter):
    """Trains ΔW `(*K, out, in)`, the `up` of a `down` that is the identity."""

    up_parameters = ("change",)

    def __init__(self, layer: Layer):
        super().__init__()
        self.register_buffer("identity", _identity(layer.in_features, layer.dtype, layer.weight.device))  # (in, in)
        self.change = nn.Parameter(layer.new(torch.zeros(layer.weight.shape)))  # (out, in)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.identity, self.change

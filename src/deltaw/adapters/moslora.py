"""MoSLoRA: ΔW = s · B M A with an r × r mixer M (Wu et al. 2024, arXiv 2406.11909, eq. 2).

The paper writes row vectors, ΔW = A W B: its mixer W is our Mᵀ.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from .adapter import Adapter, Layer, LowRankAdapter, LowRankSpec, check_init, check_one_of, draw_start
from .inits import haar, kaiming


@dataclass(frozen=True)
class MoSLoRA(LowRankSpec):
    """Two trained factors and a mixer between them: down = A, up = s·B·M.

    >>> MoSLoRA(rank=16), MoSLoRA(rank=16, mixer="orthogonal", train_mixer=False)

    Attributes:
        mixer: "kaiming" (uniform, variance 1 / (3 rank): the official code's), "orthogonal" (uniformly
            distributed), "identity" (with a fixed one this is LoRA), "two-subspace" ([[I, I], [I, I]] in
            blocks of rank / 2, the paper's motivation; its rank is rank / 2), or a `(rank, rank)` tensor.
        train_mixer: whether M is trained.
        init: of A and B, as in LoRA.

    The other settings are `LowRankSpec`'s: rank, alpha, scaling, dropout, rank_pattern, alpha_pattern.

    Raises:
        ValueError: when made, on a setting that is not allowed; on a mixer of zeros, which no gradient could
            ever leave while B is zero; when built, on a given mixer whose size is not the layer's rank.
    """

    mixer: str | Tensor = "kaiming"
    train_mixer: bool = True
    init: str | Callable = "A"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_init(self.init)
        if not isinstance(self.train_mixer, bool):
            raise ValueError(f"train_mixer must be True or False, not {self.train_mixer!r}")
        if not isinstance(self.mixer, Tensor):
            check_one_of("mixer (unless it is a tensor)", self.mixer, MIXERS)
        elif self.mixer.dim() != 2 or not torch.isfinite(self.mixer).all():
            raise ValueError(f"mixer must be a finite (rank, rank) tensor; it has shape {tuple(self.mixer.shape)}")
        elif not self.mixer.any():
            raise ValueError("a mixer of zeros lets no gradient through to A or B; LoRAXS trains from a zero mixer")
        if isinstance(self.mixer, str) and self.mixer == "two-subspace":
            for rank in (self.rank, *self.rank_pattern.values()):
                if rank % 2:
                    raise ValueError(f"mixer='two-subspace' needs an even rank, not {rank}")

    def build_layer(self, layer: Layer, rank: int, scale: float, generator: Generator) -> Adapter:
        a, b = draw_start(self.init, layer, rank, scale, generator)
        mixer = self.mixer if isinstance(self.mixer, Tensor) else MIXERS[self.mixer](rank, generator, layer)
        if mixer.shape != (rank, rank):
            raise ValueError(f"mixer has shape {tuple(mixer.shape)}; layer {layer.name!r} has rank {rank}")
        mixer = layer.new(mixer)  # (r, r)
        adapter = MoSLoRAAdapter(layer, a, b, mixer, scale, self.train_mixer)
        adapter.keep_start(a, b @ mixer)
        return adapter


class MoSLoRAAdapter(LowRankAdapter):
    """Trains A `(*K, r, in)`, B `(*K, out, r)` and, unless it is fixed, M `(*K, r, r)`."""

    up_parameters = ("B",)

    def __init__(self, layer: Layer, a: Tensor, b: Tensor, mixer: Tensor, scale: float, train_mixer: bool):
        super().__init__(layer, scale)
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)
        if train_mixer:
            self.M = nn.Parameter(mixer)
        else:
            self.register_buffer("M", mixer)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.since_start(self.A, self.B @ self.M)


def two_subspace(rank: int) -> Tensor:
    """[[I, I], [I, I]]: x (A₁ + A₂) (B₁ + B₂) written as one product, `(rank, rank)` of rank rank / 2."""
    return torch.eye(rank // 2).repeat(2, 2)


MIXERS = {
    "kaiming": lambda rank, generator, layer: kaiming((rank, rank), generator, layer, gain=1 / math.sqrt(3)),
    "orthogonal": lambda rank, generator, layer: haar(rank, rank, generator, layer),
    "identity": lambda rank, generator, layer: torch.eye(rank),
    "two-subspace": lambda rank, generator, layer: two_subspace(rank),
}

"""VeRA: ΔW = diag(b) B diag(d) A, with A and B random, fixed and shared (Kopiczko et al. 2024, arXiv 2310.11454, eq. 2)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Generator, Tensor, nn

from .adapter import Adapter, Layer, Spec, check_dropout, check_one_of, check_positive, check_rank
from .inits import kaiming


@dataclass(frozen=True)
class VeRA(Spec):
    """Two trained vectors a layer: down = A, up = diag(b)·B·diag(d).

    >>> VeRA(rank=256, d_init=0.1)

    A and B are drawn once, for the largest input and output among the layers, and sliced for each: the same
    numbers as PEFT draws from the same seed.

    Attributes:
        rank: r, which may be large: it costs r trained numbers a layer.
        d_init: every entry of d at the start; b starts at zero.
        projection_seed: A and B are regenerated from it, so that a file need not hold them.
        fan_in: "shared", A scaled by the largest fan-in among the layers as in PEFT, or "layer", each slice
            of A scaled by its own layer's.
        dropout: on the adapter's path, in [0, 1).
        projection: A `(rank, in)` and B `(out, rank)` for the largest in and out, instead of drawn ones; a file
            then holds them.

    Raises:
        ValueError: when made, on a setting that is not allowed; when built, on a given projection that is too
            small for a layer.
    """

    rank: int = 256
    d_init: float = 0.1
    projection_seed: int = 0
    fan_in: str = "shared"
    dropout: float = 0.0
    projection: tuple[Tensor, Tensor] | None = None

    def __post_init__(self) -> None:
        check_rank("rank", self.rank)
        check_positive("d_init", self.d_init)
        check_one_of("fan_in", self.fan_in, ("shared", "layer"))
        check_dropout(self.dropout)
        if not isinstance(self.projection_seed, Integral) or isinstance(self.projection_seed, bool):
            raise ValueError(f"projection_seed must be a whole number, not {self.projection_seed!r}")
        if self.projection is not None:
            a, b = self.projection
            if a.dim() != 2 or b.dim() != 2 or not a.shape[0] == b.shape[1] == self.rank:
                raise ValueError(f"projection must be A ({self.rank}, in) and B (out, {self.rank}), not "
                                 f"{tuple(a.shape)} and {tuple(b.shape)}")

    def build(self, layers: Mapping[str, Layer], generator: Generator) -> dict[str, Adapter]:
        widest_in = max(layer.in_features for layer in layers.values())
        widest_out = max(layer.out_features for layer in layers.values())
        a, b = self.projection or draw_projection(self.rank, widest_in, widest_out, self.projection_seed, layers)
        if a.shape[1] < widest_in or b.shape[0] < widest_out:
            raise ValueError(f"projection reaches {a.shape[1]} inputs and {b.shape[0]} outputs; "
                             f"the layers have up to {widest_in} and {widest_out}")
        shared = {}  # one projection for each device and dtype among the layers
        adapters = {}
        for name, layer in layers.items():
            key = (layer.weight.device, layer.dtype)
            projection = shared.setdefault(key, Projection(layer.new(a), layer.new(b)))
            scale = math.sqrt(widest_in / layer.in_features) if self.fan_in == "layer" else 1.0
            adapters[name] = VeRAAdapter(layer, projection, self.d_init, scale)
            adapters[name].dropout = self.dropout
        return adapters


def draw_projection(
    rank: int, widest_in: int, widest_out: int, seed: int, layers: Mapping[str, Layer]
) -> tuple[Tensor, Tensor]:
    """A `(rank, widest_in)`, then B `(widest_out, rank)`, Kaiming-uniform from one generator."""
    generator, like = torch.Generator().manual_seed(seed), next(iter(layers.values()))
    a = kaiming((rank, widest_in), generator, like, gain=math.sqrt(2))
    b = kaiming((widest_out, rank), generator, like, gain=math.sqrt(2))
    return a, b


class Projection(nn.Module):
    """The shared A `(r, widest in)` and B `(widest out, r)`. One module, held by every adapter, so that moving
    the model moves it once; not in the state dict, since a seed gives it back."""

    def __init__(self, a: Tensor, b: Tensor):
        super().__init__()
        self.register_buffer("A", a, persistent=False)
        self.register_buffer("B", b, persistent=False)


class VeRAAdapter(Adapter):
    """Trains b `(*K, out)` and d `(*K, r)`."""

    up_parameters = ("b",)

    def __init__(self, layer: Layer, projection: Projection, d_init: float, scale: float):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.projection = projection
        self.register_buffer("scale", layer.new(torch.tensor(scale, dtype=torch.float64)), persistent=False)  # ()
        self.b = nn.Parameter(layer.new(torch.zeros(layer.out_features)))
        self.d = nn.Parameter(layer.new(torch.full((projection.A.shape[-2],), float(d_init), dtype=torch.float64)))

    def factors(self) -> tuple[Tensor, Tensor]:
        a = self.projection.A[..., : self.in_features]  # (*K, r, in)
        b = self.projection.B[..., : self.out_features, :]  # (*K, out, r)
        d = self.d * self.scale[..., None]  # (*K, r)
        return a, self.b[..., :, None] * b * d[..., None, :]

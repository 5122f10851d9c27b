"""LoRA: ΔW = s · B A (Hu et al. 2021, arXiv 2106.09685, eq. 3)."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Generator, Tensor, nn

from .adapter import Adapter, Layer, LowRankAdapter, LowRankSpec, check_init, draw_start


@dataclass(frozen=True)
class LoRA(LowRankSpec):
    """Two trained factors: down = A, up = s·B.

    >>> LoRA(rank=8), LoRA(rank=8, alpha=16), LoRA(rank=8, init="B"), LoRA(64, 64, scaling="rslora")

    Attributes:
        init: "A" (A random, B zero), "B" (swapped), "gaussian", "orthogonal", "orthogonal-pair", "pissa", or
            a callable of the form of those in `inits.py`.

    The other settings are `LowRankSpec`'s: rank, alpha, scaling, dropout, rank_pattern, alpha_pattern.

    Raises:
        ValueError: when made, on a setting that is not allowed; the message says what is.
    """

    init: str | Callable = "A"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_init(self.init)

    def build_layer(self, layer: Layer, rank: int, scale: float, generator: Generator) -> Adapter:
        a, b = draw_start(self.init, layer, rank, scale, generator)
        adapter = LoRAAdapter(layer, a, b, scale)
        adapter.keep_start(a, b)
        return adapter


class LoRAAdapter(LowRankAdapter):
    """Trains A `(*K, r, in)` and B `(*K, out, r)`."""

    up_parameters = ("B",)

    def __init__(self, layer: Layer, a: Tensor, b: Tensor, scale: float):
        super().__init__(layer, scale)
        self.A, self.B = nn.Parameter(a), nn.Parameter(b)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.since_start(self.A, self.B)

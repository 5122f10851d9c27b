"""LoRA-XS: ΔW = s · B M A, A and B fixed by the SVD of W, only M trained (Bałazy et al. 2024, arXiv 2405.17604)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from torch import Generator, Tensor, nn

from .adapter import Adapter, Layer, LowRankAdapter, LowRankSpec, Spec, check_init, draw_start
from .inits import top_svd


@dataclass(frozen=True)
class LoRAXS(LowRankSpec):
    """r² trained numbers a layer: down = Vᵣᵀ, up = s·UᵣΣᵣ·M with M zero at the start.

    >>> LoRAXS(rank=16)

    Attributes:
        init: of the two fixed factors: "svd", or one of LoRA's inits that makes neither of them zero, or a
            callable of their form.

    The other settings are `LowRankSpec`'s: rank, alpha, scaling, dropout, rank_pattern, alpha_pattern.

    Raises:
        ValueError: when made, on a setting that is not allowed; when built, if the rank is larger than a
            layer's input or output, or if a fixed factor is zero (M would never get a gradient).
    """

    init: str | Callable = "svd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != "svd":
            check_init(self.init)

    def resuming(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Spec:
        return replace(self, init=lambda layer, *_: (tensors[layer.name]["A"], tensors[layer.name]["B"]))

    def build_layer(self, layer: Layer, rank: int, scale: float, generator: Generator) -> Adapter:
        a, b = draw_start(svd if self.init == "svd" else self.init, layer, rank, scale, generator)
        if not a.is_meta and not (a.any() and b.any()):
            raise ValueError(f"init={self.init!r} makes a fixed factor zero on layer {layer.name!r}: M would never move")
        return LoRAXSAdapter(layer, a, b, scale)


class LoRAXSAdapter(LowRankAdapter):
    """Trains M `(*K, r, r)` between fixed A `(*K, r, in)` and B `(*K, out, r)`."""

    def __init__(self, layer: Layer, a: Tensor, b: Tensor, scale: float):
        super().__init__(layer, scale)
        self.register_buffer("A", a)
        self.register_buffer("B", b)
        self.M = nn.Parameter(a.new_zeros(a.shape[0], a.shape[0]))  # (r, r)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.since_start(self.A, self.B @ self.M)


def svd(layer: Layer, rank: int, scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """A = Vᵣᵀ, B = UᵣΣᵣ: the frame of W's largest singular directions (the authors' code puts Σ on the other side)."""
    u, sigma, vt = top_svd("LoRAXS", layer, rank)
    return vt, u * sigma  # (rank, in), (out, rank)

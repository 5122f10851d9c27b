"""DoRA: W′ = m · (W + ΔW) / ‖W + ΔW‖, row by row (Liu et al. 2024, arXiv 2402.09353, eq. 5).

The paper writes columns of a d × k weight; its code, and every checkpoint, norms each *output*: a row of the
field's out × in.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from .adapter import Adapter, Layer, Spec

ZERO_ROW = 1e-12  # a row of W with a smaller norm counts as zero: its square would vanish in fp32


@dataclass(frozen=True)
class DoRA(Spec):
    """A trained magnitude m around any family: down and up as inside, g = m / ‖W + up·down‖.

    >>> DoRA(LoRA(rank=8)), DoRA(VeRA(rank=256)), DoRA(MoSLoRA(rank=16), detach_norm=False)

    Attributes:
        inner: the spec of the family that gives ΔW.
        detach_norm: treat the norm as a constant in the backward pass (eq. 11), as the paper trains; False
            gives the exact gradient (eq. 6).

    A row of W that is zero (of norm 1e-12 at most) has no direction to normalize: its gain is 1, so it is adapted
    by the inner family alone and its m is not used.

    Raises:
        TypeError: if `inner` is not a spec. ValueError: if it is a DoRA itself.
    """

    inner: Spec
    detach_norm: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.inner, type) or not isinstance(self.inner, Spec):
            raise TypeError(f"DoRA wraps a spec such as LoRA(rank=8), not {self.inner!r}")
        if isinstance(self.inner, DoRA):
            raise ValueError("DoRA of DoRA has one magnitude too many; wrap the inner family once")
        if not isinstance(self.detach_norm, bool):
            raise ValueError(f"detach_norm must be True or False, not {self.detach_norm!r}")

    def build(self, layers: Mapping[str, Layer], generator: Generator) -> dict[str, Adapter]:
        inner = self.inner.build(layers, generator)
        return {name: DoRAAdapter(layer, inner[name], self.detach_norm) for name, layer in layers.items()}

    def resuming(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> Spec:
        inner = {layer: {key.removeprefix("inner."): t for key, t in known.items()} for layer, known in tensors.items()}
        return DoRA(self.inner.resuming(inner), self.detach_norm)


class DoRAAdapter(Adapter):
    """Trains m `(*K, out)` and what `inner` trains; norm and gain in fp32 (float64 on a float64 base)."""

    def __init__(self, layer: Layer, inner: Adapter, detach_norm: bool):
        super().__init__()
        self.inner, self.detach_norm, self.dropout = inner, detach_norm, inner.dropout
        norm = row_norms(layer.weight, layer.dtype)
        self.magnitude = nn.Parameter(norm)
        self.register_buffer("weight_norm", norm.clone(), persistent=False)  # ‖W‖: W is frozen, so it never changes

    def weight_changed(self, weight: Tensor) -> None:
        self.weight_norm.copy_(row_norms(weight, self.weight_norm.dtype))
        self.inner.weight_changed(weight)

    def factors(self) -> tuple[Tensor, Tensor]:
        return self.inner.factors()

    def gain(self, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        if weight.requires_grad:
            raise ValueError("DoRA computes ‖W‖ once, so W has to stay frozen; this layer's weight requires a gradient")
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.detach_norm):
            norm = merged_norm(weight, self.weight_norm, down, up)  # (*K, out)
        return torch.where(self.weight_norm > ZERO_ROW, self.magnitude / norm, 1.0)


def row_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """‖W‖ of every row, `(out,)`."""
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=dtype)


def merged_norm(weight: Tensor, weight_norm: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """‖W + up·down‖ of every row, without forming an out × in matrix.

        ‖W + up·down‖² = ‖W‖² + rowsum((2 W downᵀ + up (down downᵀ)) ⊙ up)

    Args:
        weight: `(out, in)`.
        weight_norm: ‖W‖ by rows, `(out,)`.
        down: `(*K, r, in)`, and up: `(*K, out, r)`.

    Returns:
        `(*K, out)`, in fp32 (float64 for float64) and above zero: a row that rounding would take to zero or below
        (ΔW = −W) is held at a millionth of ‖W‖, a zero row at 1.
    """
    weight_norm, down, up = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (weight_norm, down, up))
    cross = weight @ down.mT.to(weight.dtype)  # (*K, out, r)
    change = ((2 * cross + up @ (down @ down.mT)) * up).sum(-1)  # (*K, out)
    floor = torch.where(weight_norm > ZERO_ROW, 1e-6 * weight_norm, 1.0)  # (out,)
    return (weight_norm.square() + change).clamp_min(floor.square()).sqrt()

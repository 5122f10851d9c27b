"""Starts of the two factors: pure functions `(layer, rank, scale, generator) -> (A, B)`.

A is `(rank, in)`, B is `(out, rank)`, in fp32 or better. A start whose product B·A is not zero is
subtracted by the adapter, so that the model still begins as the base. Any callable of this form may stand
where a name stands.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import Generator, Tensor

if TYPE_CHECKING:
    from .adapter import Layer


def init_a(layer: "Layer", rank: int, scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Init[A]: A Kaiming-uniform, entries of variance 1 / (3 in), and B zero (LoRA, section 4.1; PEFT's default)."""
    return kaiming((rank, layer.in_features), generator, layer), layer.weight.new_zeros(layer.out_features, rank)


def init_b(layer: "Layer", rank: int, scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Init[B]: the same swapped, A zero and B Kaiming-uniform, of variance 1 / (3 rank) (arXiv 2406.08447)."""
    return layer.weight.new_zeros(rank, layer.in_features), kaiming((layer.out_features, rank), generator, layer)


def gaussian(layer: "Layer", rank: int, scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """A normal with standard deviation 1 / rank, B zero (PEFT's "gaussian")."""
    a = normal((rank, layer.in_features), generator, layer) / rank  # (rank, in)
    return a, layer.weight.new_zeros(layer.out_features, rank)


def orthogonal(layer: "Layer", rank: int, scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """A with orthonormal rows, B zero.

    Raises:
        ValueError: if `rank` is larger than the layer's input.
    """
    check_rank_fits("orthogonal", layer, rank, layer.in_features)
    a = haar(layer.in_features, rank, generator, layer).mT  # (rank, in)
    return a, layer.weight.new_zeros(layer.out_features, rank)


def orthogonal_pair(layer: "Layer", rank: int, scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """A with orthonormal rows and B with orthonormal columns: neither is zero, nor is their product.

    Raises:
        ValueError: if `rank` is larger than the layer's input or output.
    """
    check_rank_fits("orthogonal-pair", layer, rank, min(layer.weight.shape))
    a = haar(layer.in_features, rank, generator, layer).mT  # (rank, in)
    return a, haar(layer.out_features, rank, generator, layer)


def pissa(layer: "Layer", rank: int, scale: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """s·B·A is the best rank-r part of W: B = U √(Σ/s), A = √(Σ/s) Vᵀ (PiSSA, arXiv 2404.02948, eq. 2 – 3).

    Raises:
        ValueError: if `rank` is larger than the layer's input or output.
    """
    u, sigma, vt = top_svd("pissa", layer, rank)
    root = (sigma / scale).sqrt()  # (rank,)
    return root[:, None] * vt, u * root  # (rank, in), (out, rank)


INITS = {
    "A": init_a,
    "B": init_b,
    "gaussian": gaussian,
    "orthogonal": orthogonal,
    "orthogonal-pair": orthogonal_pair,
    "pissa": pissa,
}


def kaiming(shape: tuple[int, int], generator: Generator, like: "Layer", gain: float = 1 / math.sqrt(3)) -> Tensor:
    """Uniform with standard deviation gain / √fan-in, fan-in the last axis; a = √5 is a gain of 1/√3."""
    bound = math.sqrt(3) * (gain / math.sqrt(shape[-1]))  # in torch.nn.init's order, so that it is the same float
    return _empty(shape, like).uniform_(-bound, bound, generator=generator)


def normal(shape: tuple[int, int], generator: Generator, like: "Layer") -> Tensor:
    """Standard normal."""
    return _empty(shape, like).normal_(generator=generator)


def haar(n: int, columns: int, generator: Generator, like: "Layer") -> Tensor:
    """`(n, columns)` with orthonormal columns, uniformly distributed: Q of a Gaussian's QR, signs fixed by R."""
    q, r = torch.linalg.qr(normal((n, columns), generator, like))
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0)  # (columns,)
    return q * signs


def top_svd(what: str, layer: "Layer", rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `rank` largest singular triples of the layer's weight: `(out, rank)`, `(rank,)`, `(rank, in)`."""
    check_rank_fits(what, layer, rank, min(layer.weight.shape))
    u, sigma, vt = torch.linalg.svd(layer.weight.detach().to(layer.dtype), full_matrices=False)
    return u[:, :rank], sigma[:rank], vt[:rank]


def check_rank_fits(what: str, layer: "Layer", rank: int, limit: int) -> None:
    """Raises if there are not `rank` orthogonal directions to be had."""
    if rank > limit:
        raise ValueError(f"{what} needs a rank of at most {limit} on layer {layer.name!r}; rank is {rank}")


def _empty(shape: tuple[int, int], like: "Layer") -> Tensor:
    # Drawn in fp32 on the CPU, so that a seed means the same numbers on every device and for every dtype;
    # on the meta device there is nothing to draw.
    return torch.empty(shape, dtype=torch.float32, device="meta" if like.weight.is_meta else "cpu")

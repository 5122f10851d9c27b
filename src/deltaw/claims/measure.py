"""What the claims draw, and how they compare it."""

import torch
from torch import Tensor


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(one: Tensor, other: Tensor) -> float:
    """‖one − other‖ / ‖other‖."""
    return ((one - other).norm() / other.norm()).item()


def largest(ones: list[Tensor], others: list[Tensor]) -> float:
    """How far two runs come apart: the largest of their tensors' distances, step by step.

    Raises:
        ValueError: if one is longer than the other.
    """
    return max(apart(one, other) for one, other in zip(ones, others, strict=True))

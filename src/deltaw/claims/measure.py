"""What the claims draw, how they compare it, and how they show it."""

from typing import Any

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


def shown(found: Any, all_rows: bool = False, digits: int = 3) -> str:
    """A difference with its interval, as `verdicts.compare` has them in a row: simultaneous if of all rows."""
    low, high = (found.low_all, found.high_all) if all_rows else (found.low, found.high)
    return f"{found.difference:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"

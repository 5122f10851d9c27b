"""Rotated digits: a small network knows upright handwritten digits, and has to learn turned ones."""

import copy
import hashlib
from functools import lru_cache
from numbers import Integral

import torch
from torch import nn
from torch.nn import functional as F

from .task import ClassificationTask

TRAINING_IMAGES = 1297  # of scikit-learn's 1797; 500 are left for validation


class DigitsNet(nn.Module):
    """Two hidden layers: pixels (batch, 64) → logits (batch, 10)."""

    def __init__(self, width: int = 128):
        super().__init__()
        self.hidden1 = nn.Linear(64, width)
        self.hidden2 = nn.Linear(width, width)
        self.classifier = nn.Linear(width, 10)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.hidden1(pixels))  # (batch, width)
        x = F.relu(self.hidden2(x))  # (batch, width)
        return self.classifier(x)  # (batch, 10)


class DigitsTask(ClassificationTask):
    """Which digit is in the turned image? Inputs: pixels (batch, 64), float32 in [0, 1].

    Attributes:
        upright: the task that the base model was trained on: the same images, not turned.
    """

    def __init__(self, angle: float, width: int, base_steps: int):
        train, held_out = _images(angle)
        super().__init__(train, held_out, num_labels=10)
        self.angle, self.width, self.base_steps = angle, width, base_steps

    @property
    def upright(self) -> "DigitsTask":
        return DigitsTask(0, self.width, self.base_steps)

    def model(self) -> DigitsNet:
        """A `DigitsNet` trained on upright digits: once in a process, then copied."""
        return copy.deepcopy(_base(self.width, self.base_steps))


def digits(angle: float = 90, width: int = 128, base_steps: int = 600) -> DigitsTask:
    """scikit-learn's 8×8 handwritten digits, turned anticlockwise by `angle` degrees.

    The base model has seen the training images upright, and no validation image in any form.

    Args:
        angle: multiples of 90 are exact, others are interpolated, and corners that leave the image are lost.
        width: of the network's hidden layers.
        base_steps: updates that train the base.
    """
    for name, value in (("width", width), ("base_steps", base_steps)):
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name} must be an int of at least 1, not {value!r}")
    if not -360 <= angle <= 360:
        raise ValueError(f"angle must be in degrees, -360 to 360, not {angle!r}")
    return DigitsTask(angle, width, base_steps)


def fingerprint(angle: float = 90) -> str:
    """SHA-256 of the images and labels of `digits(angle)`, of both sides."""
    digest = hashlib.sha256()
    for examples in _images(angle):
        for name in ("pixels", "labels"):
            digest.update(examples[name].numpy().tobytes())  # (n, 64), (n,)
    return digest.hexdigest()


def _images(angle: float) -> tuple[dict, dict]:
    """Training and validation examples, the images turned; the split is the same for every angle."""
    import numpy as np
    from scipy.ndimage import rotate
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)  # (1797, 64) in 0 … 16, (1797,)
    images = (images / 16).reshape(-1, 8, 8)
    if angle % 90 == 0:
        images = np.rot90(images, k=int(angle // 90), axes=(1, 2))
    else:
        # Bilinear, and dark beyond the edge.
        images = rotate(images, angle, axes=(2, 1), reshape=False, order=1, mode="grid-constant")
    pixels = torch.tensor(np.ascontiguousarray(images), dtype=torch.float32).flatten(1)  # (1797, 64)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return tuple({"pixels": pixels[rows], "labels": torch.tensor(labels)[rows]}
                 for rows in (order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]))


@lru_cache(maxsize=8)
def _base(width: int, steps: int) -> DigitsNet:
    from deltaw.train import Recipe, fit

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = DigitsNet(width)
    recipe = Recipe(steps=steps, batch_size=64, learning_rate=3e-3, schedule="linear", weight_decay=0.01)
    fit(model, DigitsTask(0, width, steps), recipe, progress=False, device="cpu")
    return model

"""The toy of the initialization paper: a wide network, and a teacher whose hidden layer differs from its by rank 20."""

import copy
import math
from collections.abc import Iterator
from numbers import Integral

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from .task import Batch, Task

INPUTS, TEACHER_RANK = 5, 20
READOUTS = {"1/√n": -0.5, "1/n": -1.0}  # the power of the width that scales the readout's entries


class TeacherStudentNet(nn.Module):
    """f(x) = readout · φ(W_h φ(W_in x)), φ the ReLU: inputs (batch, 5) → outputs (batch,)."""

    def __init__(self, embed: Tensor, hidden: Tensor, readout: Tensor):  # (n, 5), (n, n), (1, n)
        super().__init__()
        self.embed, self.hidden, self.readout = _linear(embed), _linear(hidden), _linear(readout)

    def features(self, inputs: Tensor) -> Tensor:
        """What goes into the hidden layer: (batch, 5) → z of (batch, n). It does not depend on what is trained there."""
        return F.relu(self.embed(inputs))  # (batch, n)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.hidden(self.features(inputs)))  # (batch, n)
        return self.readout(hidden).squeeze(-1)  # (batch,)


class TeacherStudentTask(Task):
    """Become the teacher. Inputs (batch, 5), labels (batch,), squared loss.

    Every batch is all training examples in one order, whatever the recipe's seed: two runs differ by what they are told
    to differ by. Made by `teacher_student`.

    Args:
        base: what `model()` copies.
        train, held_out: `inputs` (…, 5) and `labels` (…,).
    """

    def __init__(self, base: TeacherStudentNet, train: Batch, held_out: Batch):
        self.base, self.train, self.held_out = base, train, held_out

    def model(self) -> TeacherStudentNet:
        return copy.deepcopy(self.base)

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """All training examples, again and again.

        Raises:
            ValueError: if `batch_size` is not their number.
        """
        points = len(self.train["labels"])
        if batch_size != points:
            raise ValueError(f"a batch is all {points} training examples, so batch_size must be that, not {batch_size!r}")
        while True:
            yield dict(self.train)

    def validation(self, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(self.held_out["labels"]), batch_size):
            yield {name: tensor[start:start + batch_size] for name, tensor in self.held_out.items()}

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        return (self.predict(model, batch) - batch["labels"]).square()  # (batch,)

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """f(x), (batch,), in the model's dtype."""
        return model(batch["inputs"].to(next(model.parameters()).dtype))

    def metrics(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        """The mean squared error."""
        return {"loss": (predictions.double() - labels.double()).square().mean().item()}

    def __repr__(self) -> str:
        sizes = f"train={len(self.train['labels'])}, validation={len(self.held_out['labels'])}"
        return f"{type(self).__name__}(width={self.base.hidden.in_features}, {sizes})"


def teacher_student(
    width: int, readout: str = "1/√n", seed: int = 0, *, points: int = 1000, held_out: int = 100
) -> TeacherStudentTask:
    """A frozen random network of width n, to be adapted in its hidden layer, and a teacher to be learnt.

    The student is f(x) = readout · φ((W_h + ΔW) φ(W_in x)) with x in R⁵, φ the ReLU, and independent normal entries of
    variance 1/5 (W_in) and 1/n (W_h), so that entries of z = φ(W_in x) and of W_h z are Θ(1). The readout's entries are
    normal, times 1/√n or 1/n.

    The teacher is the student with ΔW = UV of rank 20, U (n × 20) of variance 1/20 and V (20 × n) of variance 1/n. This
    is the reading of the paper (Hayou, Ghosh, Yu 2024, arXiv 2406.08447) that gives 'teacher of rank 20, student of rank
    4' a meaning: both are adapters of the same frozen weights. (A teacher of its own, the same at every width, would
    make the base one more thing to be unlearnt.) Input 5, ranks 20 and 4, 1000 and 100 points are what we remember of
    the paper and have not checked; that it uses just this architecture is our guess.

    What the teacher adds to the base, g = f_teacher − f, shrinks as 1/√n under the readout 1/n, because its U is random.
    So the labels are y = f + g / rms(g), the root mean square over the training examples. That makes the loss at ΔW = 0
    exactly 1 at every width, with either readout and for every seed, and gives both readouts the same thing to learn.

    Args:
        width: n, of the hidden layer.
        readout: "1/√n" (as PyTorch and the paper scale it) or "1/n" (as mean-field networks and μP do).
        seed: draws x, the same at every width, and all weights.
        points, held_out: numbers of examples for training and for validation.

    Raises:
        ValueError: a setting is not allowed; the message says what is.
    """
    for name, value in (("width", width), ("points", points), ("held_out", held_out)):
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
    if readout not in READOUTS:
        raise ValueError(f"readout must be one of {tuple(READOUTS)}, not {readout!r}")
    if not isinstance(seed, Integral) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed must be a whole number of at least 0, not {seed!r}")
    inputs = _normal(Generator().manual_seed(int(seed)), points + held_out, INPUTS)  # (points + held_out, 5)
    weights = Generator().manual_seed(int(seed) + 2**32)  # drawn apart, so that x does not depend on the width
    embed = _normal(weights, width, INPUTS) / math.sqrt(INPUTS)  # (n, 5)
    out = _normal(weights, 1, width)  # (1, n)
    u = _normal(weights, width, TEACHER_RANK) / math.sqrt(TEACHER_RANK)  # (n, 20)
    v = _normal(weights, TEACHER_RANK, width) / math.sqrt(width)  # (20, n)
    hidden = _normal(weights, width, width).div_(math.sqrt(width))  # (n, n), last and in place: it is large
    base = TeacherStudentNet(embed, hidden, out * width ** READOUTS[readout])
    with torch.no_grad():
        z = base.features(inputs)  # (points + held_out, n)
        before = base.hidden(z)  # (points + held_out, n)
        added = (F.relu(before + z @ v.mT @ u.mT) - F.relu(before)) @ out[0]  # (points + held_out,), up to a factor
        labels = base.readout(F.relu(before)).squeeze(-1) + added / added[:points].square().mean().sqrt()
    examples = {"inputs": inputs, "labels": labels}
    return TeacherStudentTask(base, *({name: tensor[rows] for name, tensor in examples.items()}
                                      for rows in (slice(points), slice(points, None))))


def _normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def _linear(weight: Tensor) -> nn.Linear:
    """A linear layer without bias that has `weight`, and draws nothing."""
    layer = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer

"""What is learnt: the contract of a task, and the classification tasks that fit in memory."""

import copy
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

Batch = dict[str, torch.Tensor]


class Measured(dict[str, float]):
    """Metrics, numbers by name, with what a record keeps of single examples.

    Attributes:
        examples: texts by name, such as one character an example: short enough to stand in a table's cell.
    """

    def __init__(self, metrics: dict[str, float], examples: dict[str, str]):
        super().__init__(metrics)
        self.examples = examples


class Task:
    """What `deltaw.fit` needs to know about data: examples, a loss, and how to measure.

    A batch is a dict of tensors whose first axis is the example; one of them is `labels`.
    """

    def model(self) -> nn.Module:
        """A fresh base model, the same each time."""
        raise NotImplementedError

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """Training batches without end, all of one shape, in the order that `seed` gives."""
        raise NotImplementedError

    def validation(self, batch_size: int) -> Iterator[Batch]:
        """Every validation example once; the last batch may be smaller."""
        raise NotImplementedError

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The loss of each example, (batch,): their mean is trained on. Calls the model as a whole."""
        raise NotImplementedError

    def predict(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """What `metrics` needs to know of the model's output, (batch, …)."""
        raise NotImplementedError

    def metrics(self, predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Measures of the predictions for all validation examples."""
        raise NotImplementedError


class ClassificationTask(Task):
    """Which of `num_labels` classes? Examples in memory, cross-entropy, accuracy.

    Args:
        train, held_out: tensors by name, the first axis the example; `labels` is int64 (n,), the others go to
            `model(**inputs)`, which returns logits (batch, num_labels).
        num_labels: the number of classes.

    Attributes:
        sets: name and size of each set that is validated on, one after the other, if there is more than one.
    """

    def __init__(self, train: Batch, held_out: Batch, num_labels: int):
        for examples in (train, held_out):
            labels = examples["labels"]
            if len(labels) == 0:
                raise ValueError("a task needs training and validation examples, not none")
            if labels.min() < 0 or labels.max() >= num_labels:
                raise ValueError(f"labels must be in 0 … {num_labels - 1}, not {labels.min()} … {labels.max()}")
        self.train, self.held_out, self.num_labels, self.sets = train, held_out, num_labels, {}

    def for_tuning(self, share: float = 0.2, seed: int = 0, report: bool = False) -> "ClassificationTask":
        """The same task with the training examples alone, split once more: the validation examples have no part
        in what is chosen on it.

        Args:
            share: of the training examples, held out; in (0, 1).
            seed: of the split.
            report: measure the validation examples too, in the same pass. The metrics are then those of two sets,
                "tune/accuracy", "report/accuracy", and so on: what is chosen on the one is reported on the other. Beside
                them (`Measured.examples`) are "report/predicted" and "report/labels", the classes, "0" being the first
                and each of the others the next character.
        """
        if not 0 < share < 1:
            raise ValueError(f"share must be in (0, 1), not {share!r}")
        order = torch.randperm(len(self.train["labels"]), generator=torch.Generator().manual_seed(seed))
        held_out, train = order.tensor_split([max(1, round(share * len(order)))])
        return self._divided(train, held_out, report)

    def _divided(self, train: Sequence[int], tune: Sequence[int], report: bool) -> "ClassificationTask":
        """With the training examples of some rows, and those of others to be measured; see `for_tuning`."""
        task = copy.copy(self)
        task.train, held_out = ({name: tensor[rows] for name, tensor in self.train.items()} for rows in (train, tune))
        task.held_out, task.sets = held_out, {}
        if report:
            task.held_out = {name: torch.cat([held_out[name], tensor]) for name, tensor in self.held_out.items()}  # (n, …)
            task.sets = {"tune": len(tune), "report": len(self.held_out["labels"])}
        return task

    def batches(self, seed: int, batch_size: int) -> Iterator[Batch]:
        """One shuffled epoch after another, cut into batches: every batch is full, one may span two epochs.

        The stream of examples depends on the seed alone: two batches of 16 hold what one of 32 does.
        """
        generator = torch.Generator().manual_seed(seed)
        order = torch.empty(0, dtype=torch.long)
        while True:
            while len(order) < batch_size:
                epoch = torch.randperm(len(self.train["labels"]), generator=generator)
                order = torch.cat([order, epoch])
            rows, order = order[:batch_size], order[batch_size:]  # (batch,)
            yield {name: tensor[rows] for name, tensor in self.train.items()}

    def validation(self, batch_size: int) -> Iterator[Batch]:
        for start in range(0, len(self.held_out["labels"]), batch_size):
            yield {name: tensor[start:start + batch_size] for name, tensor in self.held_out.items()}

    def losses(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits = self.predict(model, batch)  # (batch, num_labels)
        return F.cross_entropy(logits, batch["labels"], reduction="none")  # (batch,)

    def predict(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """The logits, (batch, num_labels). Real-valued inputs are cast to the model's dtype, so float64 stays so."""
        dtype = next(model.parameters()).dtype
        inputs = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
                  for name, tensor in batch.items() if name != "labels"}
        return model(**inputs)

    def metrics(self, predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        """Mean cross-entropy and accuracy of logits (n, num_labels) for labels (n,); of each set, if there are several."""
        if not self.sets:
            return self._of_one_set(predictions, labels)
        sizes, metrics, examples = list(self.sets.values()), {}, {}
        for part, *one in zip(self.sets, predictions.split(sizes), labels.split(sizes), strict=True):
            metrics |= {f"{part}/{name}": value for name, value in self._of_one_set(*one).items()}
            if part == "report":
                examples = {"report/predicted": characters(one[0].argmax(dim=-1)), "report/labels": characters(one[1])}
        return Measured(metrics, examples)

    def _of_one_set(self, predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
        accuracy = (predictions.argmax(dim=-1) == labels).double().mean()
        return {"loss": F.cross_entropy(predictions.double(), labels).item(), "accuracy": accuracy.item()}

    def __repr__(self):
        sizes = f"train={len(self.train['labels'])}, validation={len(self.held_out['labels'])}"
        return f"{type(self).__name__}({sizes}, num_labels={self.num_labels})"


def characters(classes: torch.Tensor) -> str:
    """Classes (n,) as n characters: "0" for the first, and so on."""
    return "".join(chr(ord("0") + each) for each in classes.tolist())
